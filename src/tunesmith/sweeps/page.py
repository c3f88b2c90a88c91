"""A sweep as one HTML page that needs no network: the metric against each key and against cost, the paired
differences, and the settings."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from markupsafe import Markup

from tunesmith.display import charts, notebook, page, words
from tunesmith.display.console import duration, size
from tunesmith.sweeps.outcome import KeyResult, SweepOutcome
from tunesmith.sweeps.screen import COLUMNS, NONE, cells

PAGE = "sweep.html"
VERB = "sweep"
STYLES = {"finished": "", "stopped": "stopped by racing", "failed": "failed", "unfinished": "not finished"}


class ShownSetting(NamedTuple):
    """A line of the table. ``changes``: by whole keys, "" if the label says as much. ``state``: "" if it is
    finished."""

    label: str
    changes: str
    cells: tuple[str, ...]
    state: str
    seeds: int
    spread: str
    notes: tuple[str, ...]
    chosen: bool


def check(folder: Path) -> None:
    """Raises ConfigError if ``folder`` has a file of this name that tunesmith did not write."""
    page.check(folder / PAGE, VERB)


def write(outcome: SweepOutcome, folder: Path, command: list[str]) -> Path:
    """Write the page into ``folder``. command: what makes it again."""
    path = folder / PAGE
    page.write(html(outcome, command), path, VERB)
    return path


def html(outcome: SweepOutcome, command: list[str]) -> str:
    """The whole page. The same outcome gives the same letters."""
    decided = outcome.choice is not None
    return page.render(
        "sweep.html",
        {},
        package="tunesmith.sweeps",
        verb=VERB,
        tone="good" if decided else "note",
        filters={"number": words.number, "cut": words.cut},
        facts={
            "sweep": outcome,
            "settings": [_shown(outcome, place) for place in range(len(outcome.settings))],
            "forest": charts.forest(list(_differences(outcome)), head="minus the best"),
            "by_key": [_by_key(outcome, key) for key in outcome.keys],
            "by_cost": list(_by_cost(outcome)),
            "command": shlex.join(command),
        },
    )


def in_notebook(outcome: SweepOutcome) -> Markup:
    """What a notebook shows: the verdict, the settings, the metric by each key."""
    parts = [notebook.verdict(outcome.verdict, "good" if outcome.choice is not None else "note")]
    parts += [Markup("<p>{}</p>").format(line) for line in outcome.lines]
    head = ["", "setting", outcome.metric.name, *COLUMNS]
    rows = [
        ("→" if place == outcome.choice else "", setting.label, *cells(setting, outcome.metric))
        for place, setting in enumerate(outcome.settings)
    ]
    parts.append(notebook.table(head, rows, numbers=range(2, len(head))))
    by_key = Markup("").join(_by_key(outcome, key) for key in outcome.keys)
    return Markup("").join([*parts, Markup('<div class="grid">{}</div>').format(by_key)])


def _shown(outcome: SweepOutcome, place: int) -> ShownSetting:
    setting = outcome.settings[place]
    changes = ", ".join(f"{key}={json.dumps(value)}" for key, value in setting.changes.items())
    changes = "" if changes == setting.label else changes or "as the base"
    spread = NONE if setting.spread is None else outcome.metric.difference(setting.spread)
    return ShownSetting(
        setting.label,
        changes,
        cells(setting, outcome.metric),
        STYLES[setting.state],
        setting.seeds,
        spread,
        setting.notes,
        place == outcome.choice,
    )


def _differences(outcome: SweepOutcome) -> Iterator[charts.Difference]:
    """Each setting against the best, right of the line if it is better."""
    sign = -1.0 if outcome.metric.lower_is_better else 1.0
    for setting in outcome.settings:
        behind = setting.behind
        if behind is None:
            continue
        ends = behind.interval
        low, high = sorted(sign * end for end in ends) if ends else (None, None)
        p = NONE if behind.p_corrected is None else f"{behind.p_corrected:.2g}"
        verdict = "regressed" if setting.worse else "no difference shown"
        difference = outcome.metric.difference
        interval = f" [{difference(min(ends))}, {difference(max(ends))}]" if ends else ""
        about = "worse" if setting.worse else "no difference shown"
        told = f"{difference(behind.value, signed=True)}{interval}, p {p}"
        yield charts.Difference(
            setting.label, about, sign * behind.value, low, high, told, verdict, outcome.metric.name
        )


def _by_key(outcome: SweepOutcome, key: KeyResult) -> Markup:
    """The mean of each value of a key: a line over numbers, else bars."""
    known = [(level, mean) for level, mean in key.levels if mean is not None]
    note = key.note or ("matters" if key.matters else "no difference shown")
    numbers = [_as_number(level) for level, _ in known]
    if len(known) > 1 and None not in numbers:
        points = sorted(
            (number, mean) for number, (_, mean) in zip(numbers, known, strict=True) if number is not None
        )
        line = charts.Line("mean", [x for x, _ in points], [y for _, y in points], "marks")
        return charts.lines(f"By {key.key}", [line], x=key.key, y=outcome.metric.name, note=note)
    drawn = charts.bars([(level, mean, outcome.metric.text(mean)) for level, mean in known])
    below = Markup('<p class="soft">{}</p>').format(note)
    return charts.card(f"By {key.key}", drawn + below, outcome.metric.name)


def _as_number(level: str) -> float | None:
    try:
        return float(level)
    except ValueError:
        return None


def _by_cost(outcome: SweepOutcome) -> Iterator[Markup]:
    """The metric against trained weights, memory and time: each setting is one point."""
    measured = [
        (setting.label, setting.cost, setting.value)
        for setting in outcome.settings
        if setting.cost is not None and setting.value is not None
    ]
    axes = {
        "trained weights": [float(cost.trainable) for _, cost, _ in measured],
        "memory, bytes": [float(cost.memory_bytes) for _, cost, _ in measured],
        "seconds of updates": [cost.seconds for _, cost, _ in measured],
    }
    for title, costs in axes.items():
        if len(set(costs)) > 1:
            points = [
                charts.Line(f"{label}: {_amount(title, cost)}", [cost], [value], "marks", number % 5)
                for number, (cost, (label, _, value)) in enumerate(zip(costs, measured, strict=True))
            ]
            yield charts.lines(f"By {title}", points, x=title, y=outcome.metric.name)


def _amount(title: str, value: float) -> str:
    if title.startswith("memory"):
        return size(value)
    return duration(value) if title.startswith("seconds") else f"{value:,.0f}"
