"""An evaluation in the terminal: a statistic a line, base and tuned side by side, with what the difference is
worth.

Where the window is too narrow for a line, what the difference is worth goes to a line of its own, then the
change goes with it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict

from rich.cells import cell_len
from rich.console import Console
from rich.text import Text

from tunesmith.display import words
from tunesmith.runs.records import Score

SAID = {"improved": "+ improved", "regressed": "− regressed", "no difference shown": "= none shown"}
STYLES = {"improved": "green", "regressed": "red"}
HEAD = ("what", "base", "tuned", "change, 95 % interval", "n")
CHANGE = HEAD.index("change, 95 % interval")


def render(scores: Sequence[Score], console: Console) -> None:
    """Print all scores but those of parts, which are in the report."""
    notes: dict[str, int] = {}
    shown = [one for one in scores if one.part is None]
    rows: list[tuple[str, ...]] = [HEAD]
    for one in shown:
        mark = "" if one.note is None else f" ({notes.setdefault(one.note, len(notes) + 1)})"
        about = asdict(one)
        change = "" if one.delta is None else words.interval(about, of="delta")
        base = "" if one.base is None else words.number(one.base, one.unit)
        rows.append((words.title(about), base, words.number(one.value, one.unit), change, f"{one.n:,}{mark}"))
    said = [Text("difference"), *map(_said, shown)]
    wide = [max(map(cell_len, column)) for column in zip(*rows, strict=True)]
    room = console.width - sum(wide) - 2 * (len(wide) - 1)
    beside = room >= 2 + max(one.cell_len for one in said)
    kept = [at for at in range(len(HEAD)) if room >= 0 or at != CHANGE]
    task = None
    for at, (row, worth) in enumerate(zip(rows, said, strict=True)):
        one = shown[at - 1] if at else None
        if one is not None and one.task != task:
            console.print()
            task = one.task
        cells = [row[0] + " " * (wide[0] - cell_len(row[0]))]
        cells += [" " * (wide[column] - cell_len(row[column])) + row[column] for column in kept[1:]]
        line = Text(
            "  ".join(cells).rstrip() if not beside else "  ".join(cells),
            "bold" if one is None or one.headline else "",
        )
        if beside:
            line.append("  ").append_text(worth)
        console.print(line, highlight=False)
        below = Text("" if one is None or CHANGE in kept else row[CHANGE])
        below.append("  " * bool(below and worth)).append_text(Text() if one is None or beside else worth)
        if below:
            console.print(Text("    ").append_text(below), highlight=False)
    console.print()
    for note, number in notes.items():
        console.print(f"({number}) {note}", style="dim", highlight=False, markup=False)


def _said(one: Score) -> Text:
    """What the difference is worth, and what came of the target."""
    found = Text(SAID.get(one.verdict or "", ""), STYLES.get(one.verdict or "", ""))
    if one.target is not None:
        bad = one.met is False and one.verdict != "improved"
        found.append(f"{'; ' * bool(found)}{one.target}: {words.met(asdict(one))}", "red" if bad else "")
    return found
