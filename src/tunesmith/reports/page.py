"""A run's report as one HTML file that needs no network: what was learned, kept and lost, how sure that is,
and why.

Texts of the data are only ever text: the template escapes them, the script sets them as text, and a content
policy in the page forbids every other script and every request. What the page says is in ``page.html``; how
pages look is in `display.page`."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import zip_longest
from pathlib import Path
from typing import Any, NamedTuple

from tunesmith import events
from tunesmith.display import charts, page, words
from tunesmith.evaluation.tasks import QUESTIONS, about
from tunesmith.reports import artefacts, curves, glossary, markdown, measures
from tunesmith.reports.facts import EvaluationFacts, Facts, PromptSamples, SampledAnswer, evenly
from tunesmith.reports.measures import Measure, elsewhere, subset
from tunesmith.reports.summary import Summary
from tunesmith.reports.verdict import counting
from tunesmith.runs.records import ExampleRecord, Record
from tunesmith.settings.config import flat

BYTES = 1_500_000
"""Of prompts with their answers, over all evaluations."""
LETTERS, SAMPLES, GRID, STEPS = 1_500, 12, 40, 8
TITLES = {
    "answers": "What came of it",
    "next": "Limits, and what to try next",
    "differences": "Differences",
    "scores-task": "The task",
    "scores-retention": "Retention",
    "scores-safety": "Safety",
    "scores-benchmarks": "Benchmarks",
    "scores-other": "Other tasks",
    "prompts": "Every prompt",
    "samples": "Samples along the way",
    "curves": "Curves",
    "growth": "Growth of the adapter",
    "rows": "Rows of the training data",
    "the-data": "Data",
    "scores-efficiency": "Efficiency",
    "exports": "Exports",
    "cost": "Time and memory",
    "scores-beside": "Measured, not in the verdict",
    "configuration": "Settings",
    "notices": "Notices",
    "words": "What the words mean",
    "reproduce": "How to repeat it",
}

FILTERS: dict[str, Callable[..., Any]] = {
    "number": words.number,
    "interval": measures.interval,
    "identified": measures.identifier,
    "titled": measures.title,
    "met": measures.met,
    "missed": measures.missed,
    "reached": measures.reached,
    "subset": subset,
    "quoted": shlex.quote,
    "cut": words.cut,
    "setting": words.setting,
}
"""What templates of this package use besides the filters of `display.page`."""


class ScoreTable(NamedTuple):
    """The numbers of one evaluation. ``parts``: by the key that divides its examples, the lowest value
    first."""

    title: str
    about: str
    scores: list[Measure]
    parts: dict[str, list[Measure]]


class GridRow(NamedTuple):
    """A prompt of the user with its answer at each step of the grid, or None if it was not asked there."""

    prompt: str
    answers: list[str | None]


class ShownSamples(NamedTuple):
    """``steps`` and ``grid``: the user's own prompts by step. ``rows``: the first held-out prompts. ``more``:
    prompts left out. ``thinned``: the most steps left out of one."""

    steps: list[int]
    grid: list[GridRow]
    rows: list[PromptSamples]
    more: int
    thinned: int


@dataclass(frozen=True)
class ShownExamples:
    """The examples of one evaluation that fit into the page. ``rows``: source, change, prompt, reference,
    answers and scores of base and tuned. ``columns``: which of the two have answers."""

    folder: str
    counts: Mapping[str, int] | None
    total: int
    rows: list[list[str | None]] = field(default_factory=list)
    columns: tuple[str, ...] = ()


def render(template: str, data: Mapping[str, Any], *, verb: str, tone: str, **facts: Any) -> str:
    """``template``, a file of this package, filled by `display.page.render`."""
    signs = {"signs": words.SIGNS, "tones": words.TONES}
    return page.render(
        template,
        data,
        package="tunesmith.reports",
        verb=verb,
        tone=tone,
        filters=FILTERS,
        facts=facts | signs,
    )


def html(summary: Summary, log: Sequence[events.Event]) -> str:
    """The page of a run. log: its events."""
    facts, examples = summary.facts, _examples(summary)
    counts, meanings = list(flat(facts.counts).items()), glossary.meanings(summary)
    drawn = {
        "forest": charts.forest(measures.differences([row.score for row in summary.answers])),
        "curves": curves.training(log),
        "stages": curves.stages(facts.stages),
        "modules": curves.modules(facts.gradients),
        "growth": curves.growth(facts.growth) if facts.growth else [],
        "samples": _samples(facts.samples),
        "tables": _tables(facts),
    }
    present = dict.fromkeys(("answers", "configuration", "cost", "notices", "next", "reproduce"), True)
    present |= {
        "differences": bool(drawn["forest"]),
        "curves": bool(drawn["curves"]),
        "samples": bool(facts.samples),
        **dict.fromkeys(drawn["tables"], True),
        "prompts": bool(examples),
        "growth": bool(drawn["growth"]),
        "rows": bool(facts.rows),
        "exports": bool(facts.artefacts),
        "the-data": bool(facts.audit or counts or facts.dropped.first),
        "words": bool(meanings),
    }
    return render(
        "page.html",
        {
            "examples": [{"columns": shown.columns, "rows": shown.rows} for shown in examples],
            "signs": words.SIGNS,
            "tones": words.TONES,
        },
        verb="report",
        tone=summary.tone,
        summary=summary,
        reasons=summary.judgement.reasons,
        run=facts,
        model=Path(str(facts.settings.get("model.path"))).name,
        sections=[(anchor, TITLES[anchor]) for anchor in TITLES if present.get(anchor)],
        questions=QUESTIONS,
        examples=examples,
        meanings=meanings,
        costs=[*markdown.costs(facts)],
        exports=artefacts,
        counts=counts,
        commands=markdown.commands(facts),
        states=words.STATES,
        checkpoints=markdown.checkpoints(facts),
        made=[*flat(facts.manifest).items()],
        **drawn,
    )


def _records(facts: Facts) -> list[Record]:
    """Those that count first, in the order of the questions."""
    by_name: dict[str, Record] = {}
    for measure in counting(facts):
        by_name.setdefault(measure.record.name, measure.record)
    for evaluation in facts.evaluations:
        by_name.setdefault(evaluation.record.name, evaluation.record)
    return list(by_name.values())


def _tables(facts: Facts) -> dict[str, list[ScoreTable]]:
    """By section: each evaluation that counts with all its numbers; then all others."""
    chosen = {measure.record.name for measure in counting(facts)}
    tables: dict[str, list[ScoreTable]] = {}
    for record in _records(facts):
        if record.scores:
            question = about(record.scores[0].task).question
            section = f"scores-{question}" if record.name in chosen else "scores-beside"
            tables.setdefault(section, []).append(_table(record))
    return tables


def _table(record: Record) -> ScoreTable:
    rows = [Measure(score, record) for score in record.scores]
    parts: dict[str, list[Measure]] = {}
    for row in rows:
        if row.score.part:
            parts.setdefault(row.score.part.partition("=")[0], []).append(row)
    first = record.scores[0]
    line = f"{first.task}, version {first.version}, checkpoint {record.checkpoint}"
    line += f", on {elsewhere(record) or record.data}" if rows[0].question == "task" else ""
    line += f", {subset(record)}" if subset(record) else ""
    return ScoreTable(
        about(first.task).title,
        f"{line}.",
        [row for row in rows if not row.score.part],
        {key: sorted(part, key=lambda row: row.score.value) for key, part in parts.items()},
    )


def _samples(sampled: Sequence[PromptSamples]) -> ShownSamples:
    """The user's own prompts as a grid; of the held-out ones the first, each with its answers: the first, the
    last, and evenly between."""
    own = [samples for samples in sampled if samples.reference is None]
    held_out = [samples for samples in sampled if samples.reference is not None]
    all_steps = sorted({answer.step for samples in own for answer in samples.answers})
    steps = evenly(all_steps, STEPS)
    thinned = len(all_steps) - len(steps)
    rows: list[PromptSamples] = []
    for samples in held_out[:SAMPLES]:
        chosen = evenly(samples.answers, STEPS)
        thinned = max(thinned, len(samples.answers) - len(chosen))
        shown = tuple(
            SampledAnswer(answer.step, words.cut(answer.answer, LETTERS) or "") for answer in chosen
        )
        prompt, reference = words.cut(samples.prompt, LETTERS) or "", words.cut(samples.reference, LETTERS)
        rows.append(PromptSamples(prompt, reference, shown[0], shown[-1], shown))
    grid = [_grid_row(samples, steps) for samples in own[:GRID]]
    more = max(0, len(held_out) - SAMPLES) + max(0, len(own) - GRID)
    return ShownSamples(steps, grid, rows, more, thinned)


def _grid_row(samples: PromptSamples, steps: Sequence[int]) -> GridRow:
    answers = {answer.step: words.cut(answer.answer, LETTERS) for answer in samples.answers}
    return GridRow(words.cut(samples.prompt, LETTERS) or "", [answers.get(step) for step in steps])


def _examples(summary: Summary) -> list[ShownExamples]:
    """Evaluations with answers come first, then those that count."""
    order = {record.name: place for place, record in enumerate(_records(summary.facts))}
    evaluations = [evaluation for evaluation in summary.facts.evaluations if evaluation.examples]
    shown = [_fitting(evaluation, BYTES // len(evaluations)) for evaluation in evaluations]
    return sorted(shown, key=lambda examples: (not examples.columns, order[examples.folder]))


def _fitting(evaluation: EvaluationFacts, n_bytes: int) -> ShownExamples:
    """The rows that fit into ``n_bytes``, taken in turn from those that regressed, improved and stayed."""
    classes: dict[str | None, list[tuple[int, list[str | None]]]] = {
        "regressed": [],
        "improved": [],
        "unchanged": [],
        None: [],
    }
    for number, example in enumerate(evaluation.record.examples()):
        classes.setdefault(example.change, []).append((number, _texts(example)))
    left, fitting = n_bytes, []
    for turn in zip_longest(*classes.values()):
        for numbered in filter(None, turn):
            left -= len(json.dumps(numbered[1], ensure_ascii=False).encode("utf-8", "replace"))
            fitting += [numbered] if left >= 0 else []
        if left < 0:
            break
    rows = [texts for _, texts in sorted(fitting, key=lambda numbered: numbered[0])]
    columns = tuple(_answered(rows, (("base", 4), ("tuned", 5))))
    return ShownExamples(evaluation.record.name, evaluation.changes, evaluation.examples, rows, columns)


def _texts(example: ExampleRecord) -> list[str | None]:
    texts = (example.prompt, example.reference, example.base_answer, example.tuned_answer)
    return [
        words.cut(example.source, 300),
        example.change,
        *(words.cut(text, LETTERS) for text in texts),
        None if example.base is None else words.number(example.base),
        words.number(example.tuned),
    ]


def _answered(rows: Sequence[Sequence[str | None]], columns: Iterable[tuple[str, int]]) -> list[str]:
    return [name for name, index in columns if any(row[index] is not None for row in rows)]
