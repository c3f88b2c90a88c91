"""What a task is, and how its per-example scores become a number with an interval.

A task turns measurements of a model (losses of rows, generated answers) into one ``ExampleScore`` an example. It never
touches a model, so base and tuned are scored by the same code. ``summarise`` takes the scores of both and gives each
statistic of the task with its 95 % interval and, where the base is there, the paired difference tuned − base.

Intervals: percentile bootstrap (Efron and Tibshirani 1993, chapter 13) over *sources*. Turns of one conversation share
a source and are drawn together, since they are not independent.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from itertools import zip_longest
from typing import Protocol, TypeVar

import numpy as np

from tunesmith.errors import EvaluationError, listing
from tunesmith.formats import JSON

CONFIDENCE = 0.95
RESAMPLES = 2000
DRAWS_AT_ONCE = 100  # resamples held in memory together: 100 · n · 8 bytes an array

ALIKE = "all examples score alike: the interval is a point"
ALIKE_SHARE = "all examples score alike: exact binomial interval"
ONE = "one example: no interval"


@dataclass(frozen=True, slots=True)
class ExampleScore:
    """One example's score. ``value``: mean over its units; ``units``: its weight (learned tokens, or 1)."""

    source: str
    value: float
    units: float = 1.0
    detail: dict[str, JSON] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Score:
    """One statistic of the tuned model (of the only model, where there is no base).

    ``low``, ``high``: 95 % interval of ``value``; None where one example allows none. ``n``: sources it rests on.
    ``delta``: tuned − base on the same examples, None without a base; its interval is paired.
    ``note``: says so where an interval is not a bootstrap interval.
    """

    task: str
    version: str
    name: str
    value: float
    low: float | None
    high: float | None
    n: int
    delta: float | None = None
    delta_low: float | None = None
    delta_high: float | None = None
    note: str | None = None


@dataclass(frozen=True, slots=True)
class Statistic:
    """``finish`` (elementwise) of the weighted mean Σ value·units / Σ units over the examples where ``of`` is a number.

    ``share``: every value is 0 or 1, which gives an interval even where all are alike.
    """

    name: str
    of: Callable[[ExampleScore], float | None]
    finish: Callable[[np.ndarray], np.ndarray] = np.asarray
    share: bool = False


_Sums = dict[str, tuple[float, float]]  # source -> (Σ value·units, Σ units), in order of first appearance
Measured = TypeVar("Measured", contravariant=True)


class Task(Protocol[Measured]):
    """``score``: one ExampleScore a measurement, order kept. ``statistics``: the first is the one to look at.

    ``version`` changes whenever a score could change, so that numbers of two versions are never compared.
    """

    @property
    def name(self) -> str: ...
    @property
    def version(self) -> str: ...
    @property
    def statistics(self) -> tuple[Statistic, ...]: ...
    def score(self, items: Sequence[Measured]) -> list[ExampleScore]: ...


def summarise(task: Task, base: Sequence[ExampleScore] | None, tuned: Sequence[ExampleScore], seed: int) -> list[Score]:
    """One Score for each statistic of ``task`` that any example has, in the order of ``task.statistics``.

    Raises EvaluationError where there is nothing to summarise, or where base and tuned are not the same examples in the
    same order with the same weights.
    """
    if not tuned:
        raise EvaluationError(f"{task.name}: no example was scored", hint="give data with at least one usable row")
    if base is not None:
        _require_paired(task.name, base, tuned)
    scores = []
    for statistic in task.statistics:
        new, old = _sums(statistic, tuned), None if base is None else _sums(statistic, base)
        if not new:
            continue
        if old is not None and list(old) != list(new):
            raise EvaluationError(f"{task.name}: {statistic.name} exists for other examples in base than in tuned")
        scores.append(_score(task, statistic, old, new, seed))
    return scores


def _require_paired(name: str, base: Sequence[ExampleScore], tuned: Sequence[ExampleScore]) -> None:
    pairs = zip_longest(*([(score.source, score.units) for score in side] for side in (base, tuned)))
    odd = [f"base {one}, tuned {other}" for one, other in pairs if one != other]
    if odd:
        raise EvaluationError(
            f"{name}: base and tuned were not scored on the same examples (source, units)\n{listing(odd)}",
            hint="score both on one list of rows, in one order",
        )


def _sums(statistic: Statistic, scores: Sequence[ExampleScore]) -> _Sums:
    sums: _Sums = {}
    for score in scores:
        value = statistic.of(score)
        if value is not None:
            total, units = sums.get(score.source, (0.0, 0.0))
            sums[score.source] = (total + value * score.units, units + score.units)
    return sums


def _score(task: Task, statistic: Statistic, base: _Sums | None, tuned: _Sums, seed: int) -> Score:
    totals, units = np.array(list(tuned.values()), np.float64).T  # (n,) each

    def value(totals: np.ndarray, units: np.ndarray, axis: int = -1) -> np.ndarray:
        return statistic.finish(totals.sum(axis=axis) / units.sum(axis=axis))

    def delta(totals: np.ndarray, before: np.ndarray, units: np.ndarray, axis: int = -1) -> np.ndarray:
        return value(totals, units, axis) - value(before, units, axis)

    low, high, note = _interval(value, (totals, units), [totals / units], seed)
    if statistic.share and note is not None and totals[0] in (0.0, units[0]):
        from scipy.stats import binomtest

        # Clopper and Pearson's interval of 0 or n of n: a bootstrap only sees ties.
        exact = binomtest(len(tuned) if totals[0] else 0, len(tuned)).proportion_ci(CONFIDENCE, method="exact")
        low, high, note = float(exact.low), float(exact.high), ALIKE_SHARE
    found = Score(task.name, task.version, statistic.name, float(value(totals, units)), low, high, len(tuned), note=note)
    if base is None:
        return found
    before = np.array([total for total, _ in base.values()], np.float64)
    low, high, other = _interval(delta, (totals, before, units), [totals / units, before / units], seed)
    note = "; ".join(filter(None, [note, other and f"difference: {other}"])) or None
    difference = float(delta(totals, before, units))
    return replace(found, delta=difference, delta_low=low, delta_high=high, note=note)


def _interval(
    statistic: Callable[..., np.ndarray], data: tuple[np.ndarray, ...], means: Sequence[np.ndarray], seed: int
) -> tuple[float | None, float | None, str | None]:
    """(low, high, note). ``data``: arrays (n,) drawn together; ``means``: where all are constant there is no spread."""
    if len(data[0]) == 1:
        return None, None, ONE
    if all(np.ptp(mean) == 0 for mean in means):
        point = float(statistic(*data))
        return point, point, ALIKE
    from scipy.stats import bootstrap

    # The percentile method: BCa needs n² work for its jackknife and is undefined where most examples are tied.
    interval = bootstrap(
        data, statistic, n_resamples=RESAMPLES, batch=DRAWS_AT_ONCE, paired=True, vectorized=True,
        confidence_level=CONFIDENCE, method="percentile", rng=np.random.default_rng(seed),
    ).confidence_interval  # fmt: skip
    return float(interval.low), float(interval.high), None
