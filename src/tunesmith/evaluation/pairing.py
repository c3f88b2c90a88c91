"""Which evaluations of two runs can be compared, and how do the runs differ on the same prompts?

Two records are compared if they asked the same: the same task and version, the same items and settings (the
task's identity), the same base. All others are listed with the reason. Examples are paired by what they ask,
not by their position, so neither the order of rows nor the folder of a run matters. Everything is read from
``evals/``; no model is loaded."""

from __future__ import annotations

import json
import math
import shlex
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path, PurePath
from typing import Literal, NamedTuple

import numpy as np

from tunesmith.errors import EvaluationError
from tunesmith.evaluation import tasks
from tunesmith.evaluation.statistics import Statistic, TaskStatistics, change, summarise
from tunesmith.evaluation.tasks import EvaluationSpec, ExamplePair
from tunesmith.runs import records
from tunesmith.runs.records import EXAMPLES, ExampleScore, Movement, Record, Score
from tunesmith.settings.config import JSON

SEED = 0
"""Of the bootstrap; it does not depend on which run comes first."""
_FINISHES: tuple[Callable[[np.ndarray], np.ndarray], ...] = (
    np.asarray,
    lambda logp: np.exp(-logp),
    lambda logp: -logp / math.log(2),
)
"""How a benchmark's mean can be reported: as it is, as a perplexity, in bits."""


def scored(record: Record, *, gains: bool = False) -> list[ExampleScore]:
    """The tuned model's scores; gains: tuned − base. Raises EvaluationError if an example cannot be read, or
    some are missing."""
    hint = f"measure it again: {command(record)}"
    path = record.folder / EXAMPLES
    try:
        examples = list(record.examples())
    except EvaluationError as error:
        raise EvaluationError(error.what, where=error.where, hint=hint) from error
    if len(examples) != record.n:
        message = f"has {len(examples):,} examples, and {record.n:,} were scored"
        raise EvaluationError(message, where=str(path), hint=hint)
    scores = [example.score() for example in examples]
    if gains:
        bases = [example.base for example in examples]
        if None in bases:
            raise EvaluationError("has examples without the base's score", where=str(path), hint=hint)
        pairs = zip(scores, bases, strict=True)
        scores = [replace(score, value=score.value - (base or 0.0)) for score, base in pairs]
    return scores


class PairedExample(NamedTuple):
    """One prompt, answered by both runs; ``change``: from the first to the second, by the task's leading
    statistic."""

    source: str
    prompt: str | None
    reference: str | None
    first: float | None
    second: float | None
    first_answer: str | None
    second_answer: str | None
    change: Movement | None


@dataclass(frozen=True)
class PairedRecords:
    """Two runs' evaluations of the same. ``scores``: of the second, with deltas second − first. ``note``: a
    limitation."""

    first: Record
    second: Record
    scores: list[Score]
    examples: list[PairedExample]
    note: str | None = None


class UnpairedRecord(NamedTuple):
    """An evaluation without a counterpart. ``missing_in``: the run that was not evaluated on it; None if both
    were, but differently."""

    record: Record
    reason: str
    missing_in: Literal["first", "second"] | None = None


def command(record: Record, run_dir: Path | None = None) -> str:
    """The command that makes a run (the record's own, or ``run_dir``) evaluate what ``record`` did: rows,
    task, and every setting that decides."""
    return _command([record], run_dir or record.run_dir)


def commands(records: Sequence[Record], run_dir: Path) -> list[str]:
    """The fewest commands that make a run evaluate what ``records`` did: one for all that have the same rows
    and settings."""
    alike: dict[str, list[Record]] = {}
    for record in records:
        key = json.dumps([record.data, record.settings, "tuned" in (record.family or ())], sort_keys=True)
        alike.setdefault(key, []).append(record)
    return [_command(same, run_dir) for same in alike.values()]


def _command(alike: Sequence[Record], run_dir: Path) -> str:
    """``alike``: records with the same rows and settings."""
    record = alike[0]
    settings = record.settings or {}
    chosen = [_group(other, _texts(settings.get("benchmarks"))) for other in alike]
    groups = {group for group, _ in chosen}
    words = [word for group in dict.fromkeys(group for group, _ in chosen) for word in ("--task", group)]
    words += [word for _, benchmark in chosen if benchmark for word in ("--benchmark", benchmark)]
    for path in record.data if isinstance(record.data, tuple) else ():
        words += ["--data", path]
    refused = {"batch_size", "benchmarks"}
    for other in tasks.groups().values():
        refused |= {*other.opt_in} if other.name not in groups else set()
    for key, default in EvaluationSpec().model_dump(mode="json").items():
        value, option = settings.get(key, default), key.replace("_", "-")
        if key in refused or value == default:
            continue
        if isinstance(value, bool):
            words.append(f"--{'' if value else 'no-'}{option}")
        else:
            values = value if isinstance(value, list) else [value]
            words += [word for item in values for word in (f"--{option}", str(item))]
    words += ["--no-base"] if "tuned" in (record.family or ()) else []
    return shlex.join(["tunesmith", "evaluate", str(run_dir), *words])


def _group(record: Record, benchmarks: Sequence[str]) -> tuple[str, str | None]:
    """The group of the record's task, and the name of the benchmark if it is one."""
    group = tasks.about(record.task).group
    if record.task not in benchmarks and group != "benchmarks":
        return group, None
    title = record.task.removeprefix("benchmark.")
    return "benchmarks", next((name for name in benchmarks if name.replace(":", "_") == title), title)


def _texts(value: JSON) -> list[str]:
    return [str(item) for item in value] if isinstance(value, list) else []


def recorded(run_dir: Path) -> tuple[list[Record], list[Record]]:
    """The evaluations of a run, and those that an earlier release wrote without stating what was asked.
    Raises EvaluationError if one cannot be read."""
    every, unreadable = records.read(run_dir)
    if unreadable:
        raise unreadable[0]
    return [record for record in every if record.comparable], [
        record for record in every if not record.comparable
    ]


def pair(
    first: Sequence[Record], second: Sequence[Record]
) -> tuple[list[PairedRecords], list[UnpairedRecord]]:
    """What both runs evaluated alike, by the newest version that they share; and all else, with the
    reason."""
    pairs: list[PairedRecords] = []
    unpaired: list[UnpairedRecord] = []
    left = _distinct(second)
    for record in _distinct(first):
        candidates = [other for other in left if other.task == record.task]
        candidates.sort(key=lambda other: (bool(differences(record, other)), other.variant != record.variant))
        other = next(iter(candidates), None)
        if other is None or (differences(record, other) and other.variant != record.variant):
            unpaired.append(UnpairedRecord(record, "not evaluated", "second"))
            continue
        left.remove(other)
        compared = "; ".join(differences(record, other)) or _compared(record, other)
        if isinstance(compared, str):
            unpaired.append(UnpairedRecord(record, compared))
        else:
            pairs.append(compared)
    unpaired += [UnpairedRecord(record, "not evaluated", "first") for record in left]
    done = {(paired.first.task, paired.first.variant) for paired in pairs}  # by another version
    return pairs, [
        missing
        for missing in unpaired
        if missing.missing_in is None or (missing.record.task, missing.record.variant) not in done
    ]


def _distinct(every: Sequence[Record]) -> list[Record]:
    """Of the records that asked the same, the one of the best checkpoint, with a base, with the shorter
    name."""

    def worth(record: Record) -> tuple[bool, bool, int]:
        family = record.family or ()
        return (
            not any(part.startswith("step") for part in family),
            "tuned" not in family,
            -len(record.variant),
        )

    best = {(record.task, record.version, record.identity): record for record in sorted(every, key=worth)}
    newest_first = sorted(
        best.values(), key=lambda record: (len(record.version), record.version), reverse=True
    )
    return sorted(newest_first, key=lambda record: (record.task, record.variant))


def differences(first: Record, second: Record) -> list[str]:
    """Why two evaluations of a task may not be compared, in words; empty if they may."""
    if first.version != second.version:
        return [f"version {first.version} and {second.version}"]
    reasons: list[str] = []
    if first.base != second.base:
        reasons.append(f"other bases ({(first.base or '')[:12]} and {(second.base or '')[:12]})")
    if first.identity != second.identity:
        own, other = dict(first.settings or {}), dict(second.settings or {})
        keys = [key for key in own | other if own.get(key) != other.get(key) and key != "batch_size"]
        parts = [f"{key} {json.dumps(own.get(key))} and {json.dumps(other.get(key))}" for key in keys]
        parts.append(f"identity {first.identity} and {second.identity}")
        reasons.append(f"other rows, prompts or settings ({'; '.join(parts)})")
    return reasons


def _compared(first: Record, second: Record) -> PairedRecords | str:
    """The comparison, or why there is none."""
    kind = tasks.known(first.task, first.version)
    pairing = kind.pairing if kind else tasks.Pairing()
    sides = [scored(record, gains=pairing.gains) for record in (first, second)]
    pairs = paired(*sides)
    if pairs is None:
        counts = " and ".join(f"{len(side):,}" for side in sides)
        return f"the examples are not the same: {counts}, and some have no counterpart"
    if kind and pairing.scores and pairing.leading:
        scores = pairing.scores(pairs, SEED)
        return PairedRecords(first, second, scores, [_example(pairing.leading, *both) for both in pairs])
    if kind:
        known, note = TaskStatistics(kind.name, kind.version, kind.statistics, kind.parts), None
    else:
        known, note = _restored(first, second, pairs)
    if not known.statistics:
        return "its numbers are of base and tuned together: a run is compared with its base only"
    before = [score for score, _ in pairs]
    after = [replace(score, source=other.source) for other, score in pairs]
    try:
        scores = summarise(known, before, after, SEED)
    except EvaluationError as error:
        return error.what
    headlines = [statistic for statistic in known.statistics if statistic.headline]
    leading = [*headlines, *known.statistics][0]
    examples = [_example(leading, *both) for both in zip(before, after, strict=True)]
    scores = [replace(score, target=None, met=None) for score in scores]
    return PairedRecords(first, second, scores, examples, note)


def _example(leading: Statistic, first: ExampleScore, second: ExampleScore) -> PairedExample:
    values = leading.of(first), leading.of(second)
    moved = change(leading, *values)
    return PairedExample(
        first.source, first.prompt, first.reference, *values, first.answer, second.answer, moved
    )


def paired(first: Sequence[ExampleScore], second: Sequence[ExampleScore]) -> list[ExamplePair] | None:
    """The examples in pairs, in an order that depends on neither side's; None if one has no counterpart.

    Paired by file, line, prompt, reference and weight; if lines differ, without file and line."""
    for by_line in (True, False):
        if not by_line and any(example.prompt is None for example in (*first, *second)):
            return None
        one, other = (_by_question(side, by_line) for side in (first, second))
        if {key: len(same) for key, same in one.items()} == {key: len(same) for key, same in other.items()}:
            return [both for key in sorted(one) for both in zip(one[key], other[key], strict=True)]
    return None


def _by_question(examples: Sequence[ExampleScore], by_line: bool) -> dict[str, list[ExampleScore]]:
    """The examples that ask the same. by_line: from the same line of a file of the same name, since folders
    differ from run to run."""
    groups: dict[str, list[ExampleScore]] = defaultdict(list)
    for example in examples:
        place = PurePath(example.source).name if by_line else None
        groups[json.dumps([place, example.prompt, example.reference, example.units])].append(example)
    return groups


def _restored(
    first: Record, second: Record, pairs: Sequence[ExamplePair]
) -> tuple[TaskStatistics, str | None]:
    """The statistics of a task that this release does not have, as far as they reproduce its recorded scores
    from its examples; and a note on what is lost."""
    sides = [*zip(*pairs, strict=True)]
    whole = [score for score in first.scores if score.part is None]
    statistics = [found for score in whole if (found := _rebuilt(score, second, sides)) is not None]
    if len(statistics) == len(whole):
        parts = dict.fromkeys(score.part.partition("=")[0] for score in first.scores if score.part)
        return TaskStatistics(first.task, first.version, statistics, tuple(parts)), None
    note = f"{first.task} {first.version} is not known to this version of tunesmith: "
    if any(statistic.headline for statistic in statistics):
        names = ", ".join(statistic.name for statistic in statistics)
        note += f"of its numbers only {names} can be compared"
        return TaskStatistics(first.task, first.version, statistics), note
    note += "the mean value of its examples is compared, and which direction is better is not known"
    share = all(example.value in (0.0, 1.0) for side in sides for example in side)
    mean = Statistic("value", _value, share=share, headline=True)
    return TaskStatistics(first.task, first.version, [mean]), note


def _rebuilt(score: Score, second: Record, sides: Sequence[Sequence[ExampleScore]]) -> Statistic | None:
    """A statistic that reproduces what both sides recorded, from the number of that name in the details, or
    from the value."""

    def detail(example: ExampleScore) -> float | None:
        value = example.detail.get(score.name)
        return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None

    recorded = [score.value]
    recorded += (other.value for other in second.scores if (other.name, other.part) == (score.name, None))
    readers: list[Callable[[ExampleScore], float | None]] = [detail, *([_value] if score.headline else [])]
    for of, finish in product(readers, _FINISHES):
        values = [
            [(value, example.units) for example in side if (value := of(example)) is not None]
            for side in sides
        ]
        if len(recorded) == len(values) and all(
            side and math.isclose(_mean(side, finish), value, rel_tol=1e-6, abs_tol=1e-9)
            for side, value in zip(values, recorded, strict=True)
        ):
            share = score.unit == "%" and {value for side in values for value, _ in side} <= {0.0, 1.0}
            return Statistic(score.name, of, finish, share, score.better, score.headline, unit=score.unit)
    return None


def _mean(values: Sequence[tuple[float, float]], finish: Callable[[np.ndarray], np.ndarray]) -> float:
    """``finish`` of the mean of (value, units)."""
    return float(finish(np.array(sum(map(math.prod, values)) / sum(units for _, units in values))))


def _value(score: ExampleScore) -> float:
    return score.value
