"""Which evaluations of two runs may be held against each other, and what the same prompts say of the
difference.

Only what was asked alike is compared: the same task and version, the same items and settings (the task's
identity), the same base. All else is refused with the reason. Examples are paired by what they ask, not by
where they stand, so neither the order of rows nor the folder of a run matters. Everything is read from
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

SEED = 0  # of the bootstrap: the same whichever run comes first
_FINISHES: tuple[Callable[[np.ndarray], np.ndarray], ...] = (
    np.asarray,
    lambda logp: np.exp(-logp),
    lambda logp: -logp / math.log(2),
)
"""What a benchmark's mean can still become: nothing else, a perplexity, bits."""


def scored(record: Record, *, ratios: bool = False) -> list[ExampleScore]:
    """What the tuned model scored; ratios: less what the base did. Raises EvaluationError if an example
    cannot be read, or some are missing."""
    hint = f"measure it again: {command(record)}"
    path = record.folder / EXAMPLES
    try:
        examples = list(record.examples())
    except EvaluationError as error:
        raise EvaluationError(error.what, where=error.where, hint=hint) from error
    if len(examples) != record.n:
        what = f"has {len(examples):,} examples, and {record.n:,} were scored"
        raise EvaluationError(what, where=str(path), hint=hint)
    scores = [example.score() for example in examples]
    if ratios:
        bases = [example.base for example in examples]
        if None in bases:
            raise EvaluationError("has examples without the base's score", where=str(path), hint=hint)
        pairs = zip(scores, bases, strict=True)
        scores = [replace(score, value=score.value - (base or 0.0)) for score, base in pairs]
    return scores


class Pair(NamedTuple):
    """One prompt, answered by both runs; ``change``: of the task's leading statistic, from ``one`` to
    ``other``."""

    source: str
    prompt: str | None
    reference: str | None
    one: float | None
    other: float | None
    one_answer: str | None
    other_answer: str | None
    change: Movement | None


@dataclass(frozen=True)
class Held:
    """Two evaluations of the same things. ``scores``: of ``other``, with deltas other − one. ``note``: what
    limits them."""

    one: Record
    other: Record
    scores: list[Score]
    pairs: list[Pair]
    note: str | None = None


class Refused(NamedTuple):
    """``of``: what has no like. ``lacks``: which side was not evaluated on it; None where both were, yet not
    alike."""

    of: Record
    why: str
    lacks: Literal["one", "other"] | None = None


def command(record: Record, run_dir: Path | None = None) -> str:
    """The command that makes a run (the record's own, or ``run_dir``) evaluate what ``record`` did: rows,
    task, and every setting that decides."""
    settings, group = record.settings or {}, tasks.about(record.task).group
    benchmarks = _texts(settings.get("benchmarks"))
    if record.task in benchmarks or group == "benchmarks":
        title, group = record.task.removeprefix("benchmark."), "benchmarks"
        title = next((name for name in benchmarks if name.replace(":", "_") == title), title)
        words = ["--task", group, "--benchmark", title]
    else:
        words = ["--task", group]
    for path in record.data if isinstance(record.data, tuple) else ():
        words += ["--data", path]
    refused = {"batch_size", "benchmarks"}
    for other in tasks.groups().values():
        refused |= {*other.opt_in} if other.name != group else set()
    for key, usual in EvaluationSpec().model_dump(mode="json").items():
        value, option = settings.get(key, usual), key.replace("_", "-")
        if key in refused or value == usual:
            continue
        if isinstance(value, bool):
            words.append(f"--{'' if value else 'no-'}{option}")
        else:
            values = value if isinstance(value, list) else [value]
            words += [word for each in values for word in (f"--{option}", str(each))]
    words += ["--no-base"] if "tuned" in (record.family or ()) else []
    return shlex.join(["tunesmith", "evaluate", str(run_dir or record.run_dir), *words])


def _texts(value: JSON) -> list[str]:
    return [str(item) for item in value] if isinstance(value, list) else []


def recorded(run_dir: Path) -> tuple[list[Record], list[Record]]:
    """The evaluations of a run, and those that an earlier release wrote without saying what was asked. Raises
    EvaluationError if one cannot be read."""
    found, unreadable = records.read(run_dir)
    if unreadable:
        raise unreadable[0]
    return [each for each in found if each.comparable], [each for each in found if not each.comparable]


def hold(one: Sequence[Record], other: Sequence[Record]) -> tuple[list[Held], list[Refused]]:
    """What both runs evaluated alike, by the newest version that they share; and all else, with the
    reason."""
    held: list[Held] = []
    refused: list[Refused] = []
    left = _distinct(other)
    for mine in _distinct(one):
        near = [its for its in left if its.task == mine.task]
        near.sort(key=lambda its: (bool(differences(mine, its)), its.variant != mine.variant))
        if not near or (differences(mine, near[0]) and near[0].variant != mine.variant):
            refused.append(Refused(mine, "not evaluated", "other"))
            continue
        left.remove(near[0])
        found = "; ".join(differences(mine, near[0])) or _held(mine, near[0])
        if isinstance(found, str):
            refused.append(Refused(mine, found))
        else:
            held.append(found)
    refused += [Refused(its, "not evaluated", "one") for its in left]
    done = {(each.one.task, each.one.variant) for each in held}  # another version of the same is no loss
    return held, [
        each for each in refused if each.lacks is None or (each.of.task, each.of.variant) not in done
    ]


def _distinct(found: Sequence[Record]) -> list[Record]:
    """Of those that asked the same, that of the best checkpoint, with the base, with the shorter name."""

    def worth(each: Record) -> tuple[bool, bool, int]:
        family = each.family or ()
        return not any(part.startswith("step") for part in family), "tuned" not in family, -len(each.variant)

    worst_first = sorted(found, key=worth)
    kept = {(each.task, each.version, each.identity): each for each in worst_first}
    newest_first = sorted(kept.values(), key=lambda each: (len(each.version), each.version), reverse=True)
    return sorted(newest_first, key=lambda each: (each.task, each.variant))


def differences(one: Record, other: Record) -> list[str]:
    """Why two evaluations of a task may not be compared, in words; none where they may."""
    if one.version != other.version:
        return [f"version {one.version} and {other.version}"]
    why: list[str] = []
    if one.base != other.base:
        why.append(f"other bases ({(one.base or '')[:12]} and {(other.base or '')[:12]})")
    if one.identity != other.identity:
        mine, its = dict(one.settings or {}), dict(other.settings or {})
        keys = [key for key in mine | its if mine.get(key) != its.get(key) and key != "batch_size"]
        told = [f"{key} {json.dumps(mine.get(key))} and {json.dumps(its.get(key))}" for key in keys]
        identities = f"identity {one.identity} and {other.identity}"
        why.append(f"other rows, prompts or settings ({'; '.join([*told, identities])})")
    return why


def _held(one: Record, other: Record) -> Held | str:
    """The comparison, or why there is none."""
    kind = tasks.known(one.task, one.version)
    pairing = kind.pairing if kind else tasks.Pairing()
    mine, its = scored(one, ratios=pairing.gains), scored(other, ratios=pairing.gains)
    pairs = paired(mine, its)
    if pairs is None:
        return f"the examples are not the same: {len(mine):,} and {len(its):,}, and some have no counterpart"
    if kind and pairing.scores and pairing.leading:
        scores = pairing.scores(pairs, SEED)
        return Held(one, other, scores, [_pair(pairing.leading, *both) for both in pairs])
    if kind:
        measured, note = TaskStatistics(kind.name, kind.version, kind.statistics, kind.parts), None
    else:
        measured, note = _restored(one, other, pairs)
    if not measured.statistics:
        return "its numbers are of base and tuned together: a run is compared with its base only"
    before, after = [pair[0] for pair in pairs], [replace(pair[1], source=pair[0].source) for pair in pairs]
    try:
        scores = summarise(measured, before, after, SEED)
    except EvaluationError as error:
        return error.what
    leading = next((each for each in measured.statistics if each.headline), measured.statistics[0])
    examples = [_pair(leading, *both) for both in zip(before, after, strict=True)]
    return Held(one, other, [replace(score, target=None, met=None) for score in scores], examples, note)


def _pair(leading: Statistic, one: ExampleScore, other: ExampleScore) -> Pair:
    values = leading.of(one), leading.of(other)
    return Pair(
        one.source, one.prompt, one.reference, *values, one.answer, other.answer, change(leading, *values)
    )


def paired(one: Sequence[ExampleScore], other: Sequence[ExampleScore]) -> list[ExamplePair] | None:
    """Like with like, in an order that depends on neither's; None where an example has none.

    By file, line, prompt, reference and weight; where lines differ, without these.
    """
    for placed in (True, False):
        if not placed and any(each.prompt is None for each in (*one, *other)):
            return None
        sides: list[dict[str, list[ExampleScore]]] = []
        for side in (one, other):
            found: dict[str, list[ExampleScore]] = defaultdict(list)
            for each in side:
                place = (
                    PurePath(each.source).name if placed else None
                )  # the folder is the run's, or where the user stood
                found[json.dumps([place, each.prompt, each.reference, each.units])].append(each)
            sides.append(found)
        mine, its = sides
        if {key: len(some) for key, some in mine.items()} == {key: len(some) for key, some in its.items()}:
            return [pair for key in sorted(mine) for pair in zip(mine[key], its[key], strict=True)]
    return None


def _restored(one: Record, other: Record, pairs: Sequence[ExamplePair]) -> tuple[TaskStatistics, str | None]:
    """The statistics of a task that this release does not have: those that give its recorded scores again
    from its examples; and what is lost."""
    sides = [*zip(*pairs, strict=True)]
    whole = [score for score in one.scores if score.part is None]
    found = [statistic for score in whole if (statistic := _rebuilt(score, other, sides)) is not None]
    if len(found) == len(whole):
        parts = dict.fromkeys(score.part.partition("=")[0] for score in one.scores if score.part)
        return TaskStatistics(one.task, one.version, found, tuple(parts)), None
    note = f"{one.task} {one.version} is not known to this version of tunesmith: "
    if any(statistic.headline for statistic in found):
        names = ", ".join(statistic.name for statistic in found)
        note += f"of its numbers only {names} can be compared"
        return TaskStatistics(one.task, one.version, found), note
    note += "the mean value of its examples is compared, and which direction is better is not known"
    share = all(example.value in (0.0, 1.0) for side in sides for example in side)
    mean = Statistic("value", _value, share=share, headline=True)
    return TaskStatistics(one.task, one.version, [mean]), note


def _rebuilt(score: Score, other: Record, sides: Sequence[Sequence[ExampleScore]]) -> Statistic | None:
    """A statistic that gives on both sides what was scored there, from the number of that name in the
    details, or the value."""

    def detail(each: ExampleScore) -> float | None:
        value = each.detail.get(score.name)
        return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None

    told = [
        score.value,
        *(each.value for each in other.scores if (each.name, each.part) == (score.name, None)),
    ]
    readers: list[Callable[[ExampleScore], float | None]] = [detail, *([_value] if score.headline else [])]
    for of, finish in product(readers, _FINISHES):
        some = [[(value, each.units) for each in side if (value := of(each)) is not None] for side in sides]
        if len(told) == len(some) and all(
            side
            and math.isclose(
                finish(np.array(sum(map(math.prod, side)) / sum(units for _, units in side))),
                value,
                rel_tol=1e-6,
                abs_tol=1e-9,
            )
            for side, value in zip(some, told, strict=True)
        ):
            share = score.unit == "%" and {value for side in some for value, _ in side} <= {0.0, 1.0}
            return Statistic(score.name, of, finish, share, score.better, score.headline, unit=score.unit)
    return None


def _value(score: ExampleScore) -> float:
    return score.value
