"""A comparison of runs as one HTML file that needs no network, as Markdown, and as JSON.

What the page says is in ``compare.html``; how pages look is in `display.page`. Curves differ by dash as well
as by colour, and every chart has its table. Texts of the data are only ever text (`page.render`,
`display.markdown`)."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

from markupsafe import Markup

from tunesmith.display import charts, notebook, words
from tunesmith.display.console import duration, size
from tunesmith.display.markdown import cell, fence, table, verdict
from tunesmith.errors import ConfigError
from tunesmith.evaluation.pairing import PairedExample, PairedRecords
from tunesmith.files import write_text
from tunesmith.reports import page
from tunesmith.reports.comparison import (
    MARK,
    SAID,
    ComparedRun,
    CurvePoint,
    DifferingRow,
    ReadingGroup,
    RunAgainstFirst,
    RunComparison,
    probability,
    read_side_by_side,
)
from tunesmith.reports.facts import Facts
from tunesmith.reports.measures import differences, identifier, interval, label, title
from tunesmith.runs.records import Score

PAGE, TEXT, MACHINE = "compare.html", "compare.md", "compare.json"
READ, SHORT = 20, 4_000
"""Prompts of each kind and task that are shown, and letters of each text; compare.json has all of them."""
LISTED = 3
"""Prompts of each kind in the Markdown file."""
STYLES = ("line", "dash", "dot")


class ComparedLine(NamedTuple):
    """A line of a table: each run's own number, the difference, and its verdict."""

    title: str
    identifier: str
    first: str
    second: str
    difference: str
    p: str
    verdict: str | None
    n: int
    note: str
    prompts: str


@dataclass(frozen=True)
class ComparedTask:
    task: str
    note: str | None
    n_examples: int
    about: str
    headlines: list[ComparedLine]
    scores: list[ComparedLine]
    reading: list[ReadingGroup]


def check(out: Path) -> None:
    """Raises ConfigError if ``out`` is not a folder, or has one of the output files and tunesmith did not
    write it."""
    hint = "name a folder that does not exist yet with --out, or remove this"
    if out.exists() and not out.is_dir():
        raise ConfigError("is not a folder", where=str(out), hint=hint)
    for path in (out / name for name in (PAGE, TEXT, MACHINE)):
        if path.is_file():
            with path.open("rb") as stream:
                if MARK.encode() in stream.read(4096):
                    continue
        if path.exists():
            message = "was not made by tunesmith compare, so it is not replaced"
            raise ConfigError(message, where=str(path), hint=hint)


def write(comparison: RunComparison) -> None:
    """The three files, each whole or not at all. Raises ConfigError if they cannot be written."""
    out = comparison.out
    try:
        out.mkdir(parents=True, exist_ok=True)
        content = json.dumps(comparison.to_json(), indent=1, ensure_ascii=False) + "\n"
        # Half of a surrogate pair is written as \udc00.
        write_text(out / MACHINE, content.encode("utf-8", "backslashreplace").decode())
        write_text(out / TEXT, markdown(comparison))
        write_text(out / PAGE, html(comparison))
    except OSError as error:
        message = f"the comparison cannot be written: {error.strerror}"
        raise ConfigError(message, where=str(out), hint="name another folder with --out") from error


def html(comparison: RunComparison) -> str:
    """The whole page. The same comparison gives the same letters."""
    first = comparison.runs[0].letter
    sides = [
        {
            "letter": side.run.letter,
            "verdict": side.verdict,
            "reasons": side.reasons,
            "forest": _forest(first, side),
            "tasks": [_task(pair) for pair in side.pairs],
            "uncompared": side.uncompared,
        }
        for side in comparison.sides
    ]
    rows = [("Settings that differ", comparison.settings), ("What else differs", comparison.others)]
    differing = [
        (head, [(row.key, list(zip(map(_value, row.values), row.origins, strict=True))) for row in section])
        for head, section in rows
    ]
    return page.render(
        "compare.html",
        {},
        verb="compare",
        tone=comparison.tone,
        verdict=comparison.verdict,
        reasons=comparison.reasons,
        tests=comparison.tests,
        runs=comparison.runs,
        costs=_costs(comparison.runs),
        sides=sides,
        drawn=list(_charts(comparison.runs)),
        differing=differing,
        again=_again(comparison),
        short=SHORT,
        said=SAID,
    )


def _task(pair: PairedRecords) -> ComparedTask:
    checkpoints = f"checkpoints {pair.first.checkpoint} and {pair.second.checkpoint}"
    return ComparedTask(
        pair.second.task,
        pair.note,
        len(pair.examples),
        f"version {pair.second.version}{pair.second.variant}, {checkpoints}",
        [_line(pair, score) for score in _headlines(pair)],
        [_line(pair, score) for score in pair.scores],
        list(read_side_by_side(pair, READ)),
    )


def _line(pair: PairedRecords, score: Score) -> ComparedLine:
    return ComparedLine(
        title(score),
        "" if title(score) == identifier(score) else identifier(score),
        _own(pair, score, "first"),
        _own(pair, score, "second"),
        interval(score, of="delta"),
        "–" if score.p_corrected is None else probability(score.p_corrected),
        score.verdict,
        score.n,
        score.note or "",
        " / ".join(f"{count:,}" for count in score.sources) if score.sources else "–",
    )


def _headlines(pair: PairedRecords) -> list[Score]:
    """The headline scores, or if there are none the first score."""
    whole = [score for score in pair.scores if score.part is None]
    return [score for score in whole if score.headline] or whole[:1]


def _own(pair: PairedRecords, score: Score, side: Literal["first", "second"]) -> str:
    """A run's own value with its interval, as in its report."""
    record = pair.first if side == "first" else pair.second
    for own in record.scores:
        if (own.name, own.part) == (score.name, score.part):
            return interval(own)
    return interval(score, of="base" if side == "first" else "value")


def _again(comparison: RunComparison) -> str:
    """The command that makes these files."""
    runs = [str(run.path) for run in comparison.runs]
    return shlex.join(["tunesmith", "compare", *runs, "--out", str(comparison.out)])


def _value(value: Any) -> str:
    """A setting as it would be typed."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _costs(runs: Sequence[ComparedRun]) -> list[tuple[str, list[str]]]:
    """What each run was and took; a line is left out if no run has a number for it."""
    number = words.number

    def row(name: str, cell_of: Callable[[Facts], str | None]) -> tuple[str, list[str]]:
        return name, [cell_of(run.summary.facts) or "–" for run in runs]

    checkpoints = [sorted({str(record.checkpoint) for record in run.records}) for run in runs]
    rows = [
        row("status", lambda facts: facts.status),
        row("objective", lambda facts: facts.settings.get("objective.kind")),
        row("updates", lambda facts: f"{facts.updates.done:,}"),
        row("trainable weights", lambda facts: facts.weights and f"{facts.weights.trainable:,}"),
        row(
            "loss of the last updates", lambda facts: facts.training_loss and number(facts.training_loss.last)
        ),
        row(
            "validation loss, first",
            lambda facts: number(facts.validation[0].loss) if facts.validation else None,
        ),
        row(
            "validation loss, last",
            lambda facts: number(facts.validation[-1].loss) if facts.validation else None,
        ),
        ("checkpoint evaluated", [", ".join(names) or "–" for names in checkpoints]),
        row("updates took", lambda facts: duration(facts.time.training_s) if facts.time.training_s else None),
        row(
            "whole run took",
            lambda facts: None if facts.time.seconds is None else duration(facts.time.seconds),
        ),
        row(
            "tokens a second", lambda facts: None if facts.speeds.all is None else f"{facts.speeds.all:,.0f}"
        ),
        row("most memory of MLX", lambda facts: _size(facts, "peak")),
        row("most memory of the process", lambda facts: _size(facts, "resident")),
    ]
    return [(name, cells) for name, cells in rows if set(cells) != {"–"}]


def _size(facts: Facts, name: str) -> str | None:
    return size(facts.memory_peak[name]) if name in facts.memory_peak else None


def _charts(runs: Sequence[ComparedRun]) -> Iterator[Markup]:
    """Training and validation loss, by step and by tokens; a chart for each kind of loss."""
    kinds: dict[tuple[str, str], list[ComparedRun]] = {}
    for run in runs:
        kinds.setdefault((str(run.settings.get("objective.kind", "")), run.unit), []).append(run)
    for (objective, unit), alike in kinds.items():
        of_kind = f" of {objective}" if len(kinds) > 1 else ""
        apart = len({run.held_out for run in alike}) > 1
        other = "The runs hold out other rows: their lines cannot be compared." if apart else ""
        smooth = "Each point is a mean over the last twentieth of the updates."
        for name, note in (("training", smooth), ("validation", other)):
            for x in ("step", "tokens"):
                curve = [
                    _curve_line(run, runs.index(run), _points(run, name), x)
                    for run in alike
                    if _points(run, name)
                ]
                heading = f"{name.capitalize()} loss{of_kind} by {x}"
                yield charts.lines(heading, curve, x=x, y=unit, note=note)


def _points(run: ComparedRun, name: str) -> list[CurvePoint]:
    return run.training if name == "training" else run.validation


def _curve_line(run: ComparedRun, number: int, points: Sequence[CurvePoint], x: str) -> charts.Line:
    places = [point.step if x == "step" else point.tokens for point in points]
    losses = [point.loss for point in points]
    return charts.Line(run.letter, places, losses, STYLES[number % 3], number % 5)


def in_notebook(comparison: RunComparison) -> Markup:
    """What a notebook shows: verdict, runs, settings that differ, differences and the losses by step."""
    letters = [run.letter for run in comparison.runs]
    first, *reasons = comparison.lines
    parts = [notebook.verdict(first, comparison.tone)]
    parts += [Markup("<p>{}</p>").format(reason) for reason in reasons]
    names = ("name", *(run.name for run in comparison.runs))
    costs = [(name, *cells) for name, cells in _costs(comparison.runs)]
    settings = [(row.key, *map(_value, row.values)) for row in comparison.settings]
    parts.append(notebook.table(["", *letters], [names, *costs, *settings]))
    parts += [_forest(letters[0], side) for side in comparison.sides]
    curves = [chart for chart in _charts(comparison.runs) if chart]
    by_step = Markup("").join(chart for chart in curves if "by step" in chart)
    parts.append(Markup('<div class="grid">{}</div>').format(by_step))
    parts.append(notebook.soft(f"page: {comparison.out / PAGE}"))
    return Markup("").join(parts)


def _forest(first: str, side: RunAgainstFirst) -> Markup:
    """The differences of the headlines, right of the line if the run is better."""
    rows = differences([score for pair in side.pairs for score in _headlines(pair)])
    rows = [
        row._replace(about=row.about.replace("improved", "better").replace("regressed", "worse"))
        for row in rows
    ]
    return charts.forest(rows, head=f"{side.run.letter} − {first}")


# Markdown


def markdown(comparison: RunComparison) -> str:
    """The same for a terminal, a pull request or a reader without a browser."""
    lines = [f"<!-- {MARK} -->", "", "# Runs compared", "", *verdict(comparison.lines), ""]
    for head, section in _sections(comparison):
        lines += [f"## {head}", "", *section, ""]
    return "\n".join(lines) + "\n"


def _sections(comparison: RunComparison) -> Iterator[tuple[str, list[str]]]:
    letters = [run.letter for run in comparison.runs]
    names = ["name", *(run.name for run in comparison.runs)]
    costs = [[name, *cells] for name, cells in _costs(comparison.runs)]
    lead = f"The others are compared with {letters[0]}."
    yield "Runs", [lead, "", *table(["", *letters], [names, *costs])]
    for side in comparison.sides:
        lines = [side.verdict, *(reason.line for reason in side.reasons)]
        head = [*verdict(lines), ""] if len(comparison.sides) > 1 else []
        yield f"{side.run.letter} against {letters[0]}", [*head, *_side(letters[0], side)]
    differing = (("Settings that differ", comparison.settings), ("What else differs", comparison.others))
    for head, rows in differing:
        cells = ([row.key, *_values(row)] for row in rows)
        yield head, table(["what", *letters], cells) if rows else ["None."]
    for name in ("training", "validation"):
        yield f"{name.capitalize()} loss", _curve(comparison.runs, name)
    yield "How to make this again", fence(_again(comparison), "sh")


def _side(first: str, side: RunAgainstFirst) -> Iterator[str]:
    letter = side.run.letter
    rows = [
        [
            label(score),
            line.first,
            line.second,
            line.difference,
            line.p,
            SAID.get(line.verdict or "", "not judged"),
            line.prompts,
            line.n,
        ]
        for pair in side.pairs
        for score in _headlines(pair)
        for line in [_line(pair, score)]
    ]
    if rows:
        head = ["what", first, letter, f"{letter} − {first}, 95 % interval", "p, corrected", "verdict"]
        yield from [*table([*head, "rows better / same / worse", "n"], rows), ""]
    yield from (f"- {cell(pair.note)}" for pair in side.pairs if pair.note)
    if side.uncompared:
        yield from ["", "Not compared:", "", *table(["what", "why", "command"], side.uncompared), ""]
    for pair in side.pairs:
        for kind, examples, more in read_side_by_side(pair, LISTED):
            if kind in ("better", "worse"):
                shown = f" (the first {len(examples)} of {len(examples) + more})" if more else ""
                yield from ["", f"### {cell(pair.second.task)}: {kind} in {letter}{shown}", ""]
                for example in examples:
                    yield from _reading(example, first, letter)


def _reading(example: PairedExample, first: str, second: str) -> Iterator[str]:
    texts = {"prompt": example.prompt, "reference": example.reference}
    texts |= {first: example.first_answer, second: example.second_answer}
    for name, text in texts.items():
        if text is not None:
            yield from [f"{name}:", "", *fence(words.cut(text, SHORT) or ""), ""]


def _values(row: DifferingRow) -> list[str]:
    return [
        _value(value) + (f" ({origin})" if origin else "")
        for value, origin in zip(row.values, row.origins, strict=True)
    ]


def _curve(runs: Sequence[ComparedRun], name: str) -> list[str]:
    """Ten points of each curve."""
    head = ["run", "unit", *(f"{share} %" for share in range(10, 101, 10))]
    rows: list[list[str]] = []
    for run in runs:
        if points := _points(run, name):
            last = points[-1].step
            nearest = [
                min(points, key=lambda point: abs(point.step - last * tenth / 10)) for tenth in range(1, 11)
            ]
            cells = (f"{words.number(point.loss)} (step {point.step:,})" for point in nearest)
            rows.append([run.letter, run.unit, *cells])
    return ["At tenths of each run.", "", *table(head, rows)] if rows else ["None was recorded."]
