"""A sweep in the terminal: a setting a line, then the verdict."""

from __future__ import annotations

from collections.abc import Mapping

from rich.cells import cell_len
from rich.console import Console
from rich.table import Table
from rich.text import Text

from tunesmith.display.console import duration, size
from tunesmith.display.text import many
from tunesmith.sweeps.measured import Metric
from tunesmith.sweeps.outcome import SettingResult, SweepOutcome

NONE = "–"
GAP = 2
COLUMNS = ("95 % interval", "minus the best", "p", "weights", "memory", "time")
"""After the setting and its value."""
DISPENSABLE = ("95 % interval", "time", "memory", "weights")
"""Columns that are left out, in this order, where the terminal is too narrow for all."""


def render(outcome: SweepOutcome, console: Console) -> None:
    """All settings, in the order of the file."""
    names = ["", "setting", outcome.metric.name, *COLUMNS]
    marks = ["→" if place == outcome.choice else "" for place in range(len(outcome.settings))]
    rows = [
        [mark, setting.label, *cells(setting, outcome.metric)]
        for mark, setting in zip(marks, outcome.settings, strict=True)
    ]
    columns = list(range(len(names)))
    for name in DISPENSABLE:
        widths = [max(cell_len(row[column]) for row in (names, *rows)) for column in columns]
        if sum(widths) + GAP * len(widths) > console.width:
            columns.remove(names.index(name))
    table = Table(box=None, pad_edge=False, padding=(0, GAP, 0, 0), header_style="bold")
    for column in columns:
        table.add_column(Text(names[column]), no_wrap=True, justify="left" if column < 2 else "right")
    for mark, setting, row in zip(marks, outcome.settings, rows, strict=True):
        style = "bold" if mark else "dim" if setting.value is None else ""
        table.add_row(*(Text(row[column]) for column in columns), style=style)
    console.print(table)
    console.print()


def cells(setting: SettingResult, metric: Metric) -> tuple[str, ...]:
    """Value, interval, difference from the best, its corrected p, and cost."""
    behind = setting.behind
    interval = NONE if setting.low is None else f"{metric.text(setting.low)} to {metric.text(setting.high)}"
    corrected = None if behind is None else behind.p_corrected
    taken = setting.cost
    return (
        setting.state if setting.value is None else metric.text(setting.value),
        interval,
        NONE if behind is None else metric.difference(behind.value, signed=True),
        NONE if corrected is None else f"{corrected:.2g}",
        NONE if taken is None else f"{taken.trainable:,}",
        NONE if taken is None else size(taken.memory_bytes),
        NONE if taken is None else duration(taken.seconds),
    )


def planned(commands: Mapping[str, str]) -> list[str]:
    """The trials, each with the command that trains it alone."""
    lines = [line for name, command in commands.items() for line in (name, f"  {command}")]
    return [*lines, f"{many(len(commands), 'trial')}; nothing was trained"]
