"""A comparison of runs as one HTML file that needs no network, as Markdown, and as JSON.

How it looks is in ``compare.html`` and ``base.html``; curves differ by dash as well as by colour, and every
chart has its table. Texts of the data are only ever text (`page.render`, `markdown.cell`, `markdown.fence`).
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import Any

from tunesmith.display import charts, words
from tunesmith.display.console import duration, size
from tunesmith.errors import ConfigError
from tunesmith.evaluation.pairing import PairedExample, PairedRecords
from tunesmith.files import write_text
from tunesmith.reports import page
from tunesmith.reports import verdict as evidence
from tunesmith.reports.compare import (
    MACHINE,
    MARK,
    PAGE,
    SAID,
    TEXT,
    Against,
    Comparison,
    Ran,
    Row,
    probable,
    read_side_by_side,
)
from tunesmith.reports.markdown import cell, fence, table
from tunesmith.runs.records import Score

READ, SHORT = 20, 4_000
"""Prompts of each kind and task that are shown, and letters of each text; compare.json has all of them."""
LISTED = 3
"""Prompts of each kind in the Markdown file."""
STYLES = ("line", "dash", "dot")


def write(found: Comparison) -> None:
    """The three files, each whole or not at all. Raises ConfigError where they cannot be written."""
    try:
        found.out.mkdir(parents=True, exist_ok=True)
        told = json.dumps(found.to_json(), indent=1, ensure_ascii=False) + "\n"
        write_text(
            found.out / MACHINE, told.encode("utf-8", "backslashreplace").decode()
        )  # half a pair as \\udc00
        write_text(found.out / TEXT, markdown(found))
        write_text(found.out / PAGE, html(found))
    except OSError as error:
        what = f"the comparison cannot be written: {error.strerror}"
        raise ConfigError(what, where=str(found.out), hint="name another folder with --out") from error


def html(found: Comparison) -> str:
    """The whole page. The same comparison gives the same letters."""
    named = [{"letter": run.letter, "name": run.name} for run in found.runs]
    differing = [("Settings that differ", found.settings), ("What else differs", found.others)]
    shown = [
        (
            head,
            [
                (row.key, [(_value(one), where) for one, where in zip(row.told, row.origins, strict=True)])
                for row in rows
            ],
        )
        for head, rows in differing
    ]
    return page.render(
        "compare.html",
        {},
        verb="compare",
        tone=found.tone,
        verdict=found.verdict,
        tests=found.tests,
        runs=named,
        costs=_costs(found.runs),
        sides=[_view(found.runs[0].letter, side) for side in found.against],
        drawn=list(_charts(found.runs)),
        differing=shown,
        again=_again(found),
        short=SHORT,
        said=SAID,
    )


def _view(first: str, side: Against) -> dict[str, Any]:
    """One run against the first, as the page shows it."""
    held = [
        {
            "task": each.second.task,
            "note": each.note,
            "pairs": len(each.examples),
            "about": f"version {each.second.version}{each.second.variant}, checkpoints "
            f"{each.first.checkpoint} and {each.second.checkpoint}",
            "headlines": [_line(each, score) for score in _headlines(each)],
            "scores": [_line(each, score) for score in each.scores],
            "reading": list(read_side_by_side(each, READ)),
        }
        for each in side.held
    ]
    forest = _forest(first, side)
    return {
        "letter": side.run.letter,
        "sentence": side.sentence,
        "forest": forest,
        "held": held,
        "refused": side.refused,
    }


def _line(held: PairedRecords, score: Score) -> dict[str, Any]:
    """A line of a table: each run's own number, the difference, and what it is worth."""
    p = "–" if score.p_corrected is None else probable(score.p_corrected)
    return {
        "title": words.title(asdict(score)),
        "one": _told(held, score, "one"),
        "other": _told(held, score, "other"),
        "difference": words.interval(asdict(score), of="delta"),
        "p": p,
        "verdict": score.verdict,
        "n": score.n,
        "note": score.note or "",
        "prompts": " / ".join(f"{count:,}" for count in score.sources) if score.sources else "–",
    }


def _again(found: Comparison) -> str:
    """The command that makes these files."""
    return " ".join(
        [
            "tunesmith compare",
            *(shlex.quote(str(run.path)) for run in found.runs),
            "--out",
            shlex.quote(str(found.out)),
        ]
    )


def _value(value: Any) -> str:
    """A setting as it would be typed."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _costs(runs: Sequence[Ran]) -> list[tuple[str, list[str]]]:
    """What each run was and took; a line that no run has a number for is left out."""

    def told(of: Any, form: Any) -> list[str]:
        found: list[str] = []
        for run in runs:
            try:
                value = of(run.found)
            except (KeyError, TypeError, IndexError):
                value = None
            found.append("–" if value is None else form(value))
        return found

    number = words.number
    rows = [
        ("status", told(lambda one: one["status"], str)),
        ("objective", [str(run.settings.get("objective.kind", "–")) for run in runs]),
        ("updates", told(lambda one: one["updates"]["done"], lambda n: f"{n:,}")),
        ("trainable weights", told(lambda one: one["weights"]["trainable"], lambda n: f"{n:,}")),
        ("loss of the last updates", told(lambda one: one["training_loss"]["last"], number)),
        ("validation loss, first", told(lambda one: one["validation"][0]["loss"], number)),
        ("validation loss, last", told(lambda one: one["validation"][-1]["loss"], number)),
        (
            "checkpoint evaluated",
            [", ".join(sorted({str(each.checkpoint) for each in run.evaluations})) or "–" for run in runs],
        ),
        ("updates took", told(lambda one: one["time"]["training_s"] or None, duration)),
        ("whole run took", told(lambda one: one["time"]["seconds"], duration)),
        ("tokens a second", told(lambda one: one["tokens_per_second"]["all"], lambda n: f"{n:,.0f}")),
        ("most memory of MLX", told(lambda one: one["memory_peak"]["peak"], size)),
        ("most memory of the process", told(lambda one: one["memory_peak"]["resident"], size)),
    ]
    return [row for row in rows if set(row[1]) != {"–"}]


def _charts(runs: Sequence[Ran]) -> Iterator[Any]:
    """Training and validation loss, by step and by tokens; runs whose losses are of other kinds have charts
    of their own."""
    kinds: dict[tuple[str, str], list[Ran]] = {}
    for run in runs:
        kinds.setdefault((str(run.settings.get("objective.kind", "")), run.unit), []).append(run)
    for (objective, unit), some in kinds.items():
        of = f" of {objective}" if len(kinds) > 1 else ""
        apart = len({run.held_out for run in some}) > 1
        other = "The runs hold out other rows: one line cannot be read against another." if apart else ""
        for what, note in (
            ("training", "Each point is a mean over the last twentieth of the updates."),
            ("validation", other),
        ):
            for at, x in ((0, "step"), (1, "tokens")):
                found = [
                    charts.Line(
                        run.letter,
                        [one[at] for one in points],
                        [one[2] for one in points],
                        STYLES[number % 3],
                        number % 5,
                    )
                    for number, run in enumerate(runs)
                    if run in some and (points := run.training if what == "training" else run.validation)
                ]
                yield charts.lines(f"{what.capitalize()} loss{of} by {x}", found, x=x, y=unit, note=note)


def _headlines(held: PairedRecords) -> list[Score]:
    """The scores that are shown first: headlines, or where there are none the first."""
    whole = [score for score in held.scores if score.part is None]
    return [score for score in whole if score.headline] or whole[:1]


def _told(held: PairedRecords, score: Score, side: str) -> str:
    """A run's own value with its interval, as its report has it."""
    of = held.first if side == "one" else held.second
    own = next((each for each in of.scores if (each.name, each.part) == (score.name, score.part)), None)
    return (
        words.interval(asdict(own))
        if own
        else words.interval(asdict(score), of="base" if side == "one" else "value")
    )


def _forest(first: str, side: Against) -> Any:
    """Its headline differences, right of the line where it is better."""
    scores = [score for held in side.held for score in _headlines(held)]
    rows = [{**asdict(score), "answer": SAID.get(score.verdict or "", "not judged")} for score in scores]
    return charts.forest(evidence.differences({"answers": rows}), head=f"{side.run.letter} − {first}")


# Markdown


def markdown(found: Comparison) -> str:
    """The same for a terminal, a pull request or a colleague without a browser."""
    lines = [f"<!-- {MARK} -->", "", "# Runs compared", "", f"**{cell(found.verdict)}**", ""]
    for head, section in _sections(found):
        lines += [f"## {head}", "", *section, ""]
    return "\n".join(lines) + "\n"


def _sections(found: Comparison) -> Iterator[tuple[str, list[str]]]:
    letters = [run.letter for run in found.runs]
    runs = [
        ["name", *(run.name for run in found.runs)],
        *([name, *told] for name, told in _costs(found.runs)),
    ]
    yield (
        "Runs",
        [f"{letters[0]} is the one that the others are held against.", "", *table(["", *letters], runs)],
    )
    for side in found.against:
        yield f"{side.run.letter} against {letters[0]}", list(_side(found, side))
    for head, rows in (("Settings that differ", found.settings), ("What else differs", found.others)):
        yield (
            head,
            table(["what", *letters], ([row.key, *_values(row)] for row in rows)) if rows else ["None."],
        )
    for name in ("training", "validation"):
        yield f"{name.capitalize()} loss", _curve(found.runs, name)
    yield "How to make this again", fence(_again(found), "sh")


def _side(found: Comparison, side: Against) -> Iterator[str]:
    first = found.runs[0].letter
    yield from [f"{cell(side.sentence[0].upper() + side.sentence[1:])}", ""]
    rows = [
        [
            line["title"],
            line["one"],
            line["other"],
            line["difference"],
            line["p"],
            SAID.get(line["verdict"], "not judged"),
            line["prompts"],
            line["n"],
        ]
        for held in side.held
        for line in (_line(held, score) for score in _headlines(held))
    ]
    if rows:
        head = [
            "what",
            first,
            side.run.letter,
            f"{side.run.letter} − {first}, 95 % interval",
            "p, corrected",
            "verdict",
        ]
        yield from [*table([*head, "rows better / same / worse", "n"], rows), ""]
    yield from [*(f"- {cell(held.note)}" for held in side.held if held.note)]
    if side.refused:
        yield from ["", "Not compared:", "", *table(["what", "why", "command"], side.refused), ""]
    for held in side.held:
        for kind, pairs, more in read_side_by_side(held, LISTED):
            if kind in ("better", "worse"):
                told = f" (the first {len(pairs)} of {len(pairs) + more})" if more else ""
                yield from ["", f"### {cell(held.second.task)}: {kind} in {side.run.letter}{told}", ""]
                for pair in pairs:
                    yield from _reading(pair, first, side.run.letter)


def _reading(pair: PairedExample, one: str, other: str) -> Iterator[str]:
    for name, text in (
        ("prompt", pair.prompt),
        ("reference", pair.reference),
        (one, pair.first_answer),
        (other, pair.second_answer),
    ):
        if text is not None:
            yield from [f"{name}:", "", *fence(words.cut(text, SHORT) or ""), ""]


def _values(row: Row) -> list[str]:
    return [
        _value(value) + (f" ({where})" if where else "")
        for value, where in zip(row.told, row.origins, strict=True)
    ]


def _curve(runs: Sequence[Ran], name: str) -> list[str]:
    """Ten points of each curve."""
    head = ["run", "unit", *(f"{share} %" for share in range(10, 101, 10))]
    rows = []
    for run in runs:
        points = run.training if name == "training" else run.validation
        if points:
            last = points[-1][0]
            at = [min(points, key=lambda one: abs(one[0] - last * share / 10)) for share in range(1, 11)]
            rows.append([run.letter, run.unit, *(f"{words.number(one[2])} (step {one[0]:,})" for one in at)])
    return ["Along the way of each run.", "", *table(head, rows)] if rows else ["None was recorded."]
