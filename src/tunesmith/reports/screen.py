"""An evaluation in the terminal: a statistic a line, base and tuned side by side, with the verdict on the
difference.

If the window is too narrow for a line, the verdict goes to a line of its own, then the change goes with
it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from rich.cells import cell_len
from rich.console import Console
from rich.text import Text

from tunesmith.display import words
from tunesmith.reports.measures import interval, met, title
from tunesmith.runs.records import Score

SAID = {"improved": "+ improved", "regressed": "− regressed", "no difference shown": "= none shown"}
STYLES = {"improved": "green", "regressed": "red"}
HEAD = ("what", "base", "tuned", "change, 95 % interval", "n")
CHANGE = HEAD.index("change, 95 % interval")
GAP = 2


def render(scores: Sequence[Score], console: Console) -> None:
    """Print all scores but those of parts, which are in the report."""
    notes: dict[str, int] = {}
    shown = [score for score in scores if score.part is None]
    rows = [HEAD, *(_row(score, notes) for score in shown)]
    verdicts = [Text("difference"), *map(_verdict, shown)]
    for score, lines in zip([None, *shown], _lines(rows, verdicts, console.width), strict=True):
        first_of_task = score is not None and (
            score is shown[0] or score.task != shown[shown.index(score) - 1].task
        )
        if score is not None and first_of_task:
            console.print()
            console.print(score.task, style="dim", highlight=False, markup=False)
        lines[0].stylize("bold" if score is None or score.headline else "")
        for line in lines:
            console.print(line, highlight=False)
    console.print()
    for note, number in notes.items():
        console.print(f"({number}) {note}", style="dim", highlight=False, markup=False)


def _row(score: Score, notes: dict[str, int]) -> tuple[str, ...]:
    """The cells; a note is numbered, and kept in ``notes``."""
    mark = "" if score.note is None else f" ({notes.setdefault(score.note, len(notes) + 1)})"
    change = "" if score.delta is None else interval(score, of="delta")
    base = "" if score.base is None else words.number(score.base, score.unit)
    return title(score), base, words.number(score.value, score.unit), change, f"{score.n:,}{mark}"


def _lines(rows: Sequence[tuple[str, ...]], verdicts: Sequence[Text], width: int) -> Iterator[list[Text]]:
    """The one or two lines of each row."""
    widths = [max(map(cell_len, column)) for column in zip(*rows, strict=True)]
    room = width - sum(widths) - GAP * (len(widths) - 1)
    beside = room >= GAP + max(verdict.cell_len for verdict in verdicts)
    columns = [column for column in range(1, len(HEAD)) if room >= 0 or column != CHANGE]
    for row, verdict in zip(rows, verdicts, strict=True):
        cells = [row[0] + " " * (widths[0] - cell_len(row[0]))]
        cells += [" " * (widths[column] - cell_len(row[column])) + row[column] for column in columns]
        line, below = Text((" " * GAP).join(cells)), Text("" if CHANGE in columns else row[CHANGE])
        if beside:
            line.append(" " * GAP).append_text(verdict)
        elif row is not HEAD:
            below.append(" " * GAP if below and verdict else "").append_text(verdict)
        line.rstrip()
        yield [line, Text("    ").append_text(below)] if below and row is not HEAD else [line]


def _verdict(score: Score) -> Text:
    """The verdict on the difference, and what came of the target."""
    verdict = Text(SAID.get(score.verdict or "", ""), STYLES.get(score.verdict or "", ""))
    if score.target is not None:
        bad = score.met is False and score.verdict != "improved"
        verdict.append(f"{'; ' if verdict else ''}{score.target}: {met(score)}", "red" if bad else "")
    return verdict
