"""What a task is, and how its per-example scores become a number with an interval.

A task never touches a model, only what was measured of one, so base and tuned are scored by the same code. Intervals:
percentile bootstrap (Efron and Tibshirani 1993, chapter 13) over *sources*. Turns of one conversation share a source and are
drawn together, since they are not independent.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from itertools import zip_longest
from typing import Protocol, TypeVar

import numpy as np

from tunesmith.errors import EvaluationError, listing
from tunesmith.formats import JSON

TAIL = 0.025  # left out on each side of a 95 % interval
RESAMPLES = 2000

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
    """One statistic of the tuned model. ``low``, ``high``: its 95 % interval, None where one example allows none. ``n``: sources.

    ``delta``: tuned − base on the same examples, None without a base; its interval is paired. ``note``: says so where an interval
    is not a bootstrap interval.
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
    """``finish`` (elementwise) of Σ of·units / Σ units over the examples where ``of`` is a number. ``share``: all are 0 or 1."""

    name: str
    of: Callable[[ExampleScore], float | None]
    finish: Callable[[np.ndarray], np.ndarray] = np.asarray
    share: bool = False


Measured = TypeVar("Measured", contravariant=True)


class Task(Protocol[Measured]):
    """``score``: one ExampleScore a measurement, order kept. ``version`` changes whenever a score could change."""

    name: str
    version: str
    statistics: tuple[Statistic, ...]

    def score(self, items: Sequence[Measured]) -> list[ExampleScore]: ...


def summarise(task: Task, base: Sequence[ExampleScore] | None, tuned: Sequence[ExampleScore], seed: int) -> list[Score]:
    """One Score for each statistic of ``task`` that any example has, in order.

    Raises EvaluationError where there is none, or where base and tuned are not the same examples with the same weights, in order.
    """
    if not tuned:
        raise EvaluationError(f"{task.name}: no example was scored", hint="give data with at least one usable row")
    sides = [tuned] if base is None else [tuned, base]
    pairs = zip_longest(*([(score.source, score.units) for score in side] for side in sides))
    odd = [f"tuned {pair[0]}, base {pair[-1]}" for pair in pairs if pair[0] != pair[-1]]
    if odd:
        what = f"{task.name}: base and tuned were not scored on the same examples (source, units)\n{listing(odd)}"
        raise EvaluationError(what, hint="score both on one list of rows, in one order")
    found = [(statistic, np.array([_sums(statistic, side) for side in sides])) for statistic in task.statistics]
    return [_score(task, statistic, sums, seed) for statistic, sums in found if sums.size]


def _sums(statistic: Statistic, scores: Sequence[ExampleScore]) -> list[np.ndarray]:
    """Σ value·units and Σ units of each source, in order of first appearance."""
    sums: dict[str, np.ndarray] = {}
    for score in scores:
        value = statistic.of(score)
        if value is not None:
            sums[score.source] = sums.get(score.source, 0.0) + np.array([value * score.units, score.units])
    return list(sums.values())


def _score(task: Task, statistic: Statistic, sums: np.ndarray, seed: int) -> Score:
    """``sums``: (1 or 2, n, 2), the tuned model's and, where there is one, the base's."""
    n = sums.shape[1]
    chance = np.random.default_rng(seed)
    draws = [sums.sum(axis=1), *(sums[:, chance.integers(n, size=n)].sum(axis=1) for _ in range(RESAMPLES))]
    totals, units = np.array(draws).T  # the data as they are, then the resamples; (1 or 2, 1 + RESAMPLES) each
    values = statistic.finish(totals / units)
    alike = np.ptp(sums[..., 0] / sums[..., 1], axis=1) == 0

    def interval(found: np.ndarray, alike: bool) -> tuple[float | None, float | None, str | None]:
        if n == 1:
            return None, None, ONE
        low, high = found[[0, 0]] if alike else np.quantile(found[1:], [TAIL, 1 - TAIL])
        return float(low), float(high), ALIKE if alike else None

    value = float(values[0, 0])
    low, high, note = interval(values[0], alike[0])
    if statistic.share and alike[0] and value in (0.0, 1.0):
        # Clopper and Pearson's interval of 0 or n of n: a bootstrap only sees ties.
        edge = TAIL ** (1 / n)
        low, high, note = (edge, 1.0, ALIKE_SHARE) if value else (0.0, 1 - edge, ALIKE_SHARE)
    score = Score(task.name, task.version, statistic.name, value, low, high, n, note=note)
    if len(values) == 1:
        return score
    gain = values[0] - values[1]
    low, high, other = interval(gain, all(alike))
    note = "; ".join(filter(None, [note, other and f"difference: {other}"])) or None
    return replace(score, delta=float(gain[0]), delta_low=low, delta_high=high, note=note)
