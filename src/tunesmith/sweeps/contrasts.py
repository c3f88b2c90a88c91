"""Which settings differ, by more than rows and seeds explain?

A contrast is Σ c·mean over settings with Σ c = 0, of the values of the same rows under the same seeds, so
that rows and seeds that are hard for all settings cancel. Its variance is clustered both by row and by seed
(Cameron, Gelbach and Miller 2011, "Robust inference with multiway clustering"), whether all seeds hold out
the same rows or each its own. What they subtract as counted twice is subtracted for rows of a single seed
only: with few seeds it is too much for the others. The part of the seeds is at least that of the interaction
of settings and seeds over all settings (a two-way analysis of variance), since two or three seeds alone tell
little. Interval and p are Student's; the quantiles for rows and for seeds are weighted by their parts of the
variance (Cochran and Cox 1957), since Satterthwaite's degrees of freedom claim too much with few seeds. With
one seed the variance between seeds is unknown, and intervals cover the rows only.

All pairs of settings and all levels of each key are one family, corrected by Holm: the best setting is chosen
by the same numbers, so comparisons with it alone would find a difference too often."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from typing import NamedTuple

import numpy as np

from tunesmith.evaluation.statistics import LEVEL, TAIL, holm

TINY = 1e-200
"""The least p that is searched for."""
ENOUGH_ROWS = 20
"""With fewer rows, Student's distribution is a poor guide far out in its tail."""


class RowValues(NamedTuple):
    """What one trial scored: row → value and row → weight, of the same rows."""

    values: Mapping[str, float]
    weights: Mapping[str, float]

    @property
    def finite(self) -> bool:
        return all(map(math.isfinite, self.values.values()))


@dataclass(frozen=True)
class Panel:
    """The values of all settings. ``values``: (settings, seeds, rows), NaN where a setting has none.
    ``weights``: (seeds, rows), 0 where a seed does not hold out a row. ``share``: values are 0 or 1."""

    values: np.ndarray
    weights: np.ndarray
    share: bool = False

    @property
    def done(self) -> np.ndarray:
        """(settings, seeds) whether a setting has values with this seed; no setting has one of a seed that
        was not begun, whose rows are not known."""
        missing = np.isnan(np.where(self.weights > 0, self.values, 0.0))
        return np.logical_not(missing.any(axis=2)) & (self.weights.sum(axis=1) > 0)

    def means(self) -> np.ndarray:
        """(settings, seeds) weighted mean over the rows, NaN where there are no values."""
        values = np.where(self.weights > 0, self.values, 0.0)
        with np.errstate(invalid="ignore"):
            return (values * self.weights).sum(axis=2) / self.weights.sum(axis=1)


def panel(trials: Sequence[Sequence[RowValues | None]], share: bool = False) -> Panel:
    """``trials``: by setting, by seed. Raises ValueError if two settings have other rows or weights with one
    seed; see `misfits`."""
    rows = {row: None for by_seed in trials for trial in by_seed if trial for row in trial.values}
    place = {row: index for index, row in enumerate(rows)}
    n_seeds = max(map(len, trials))
    values = np.full((len(trials), n_seeds, len(rows)), np.nan)
    weights = np.zeros((n_seeds, len(rows)))
    for setting, by_seed in enumerate(trials):
        for seed, trial in enumerate(by_seed):
            if trial is not None:
                places = [place[row] for row in trial.values]
                values[setting, seed, places] = list(trial.values.values())
                weights[seed, places] = [trial.weights[row] for row in trial.values]
    return Panel(values, weights, share)


def misfits(trials: Sequence[Sequence[RowValues | None]]) -> set[int]:
    """The settings that have other rows or weights with a seed than most have, so that they cannot be
    compared."""
    odd: set[int] = set()
    for by_setting in zip(*trials, strict=True):
        alike: dict[frozenset[tuple[str, float]], list[int]] = {}
        for setting, trial in enumerate(by_setting):
            if trial is not None:
                alike.setdefault(frozenset(trial.weights.items()), []).append(setting)
        groups = sorted(alike.values(), key=len, reverse=True)
        odd |= {setting for group in groups[1:] for setting in group}
    return odd


class MixedStudent(NamedTuple):
    """Whose quantiles are the weighted mean of Student's for rows and for seeds. ``rows``, ``seeds``: degrees
    of freedom. ``share``: of the seeds in the variance."""

    rows: float
    seeds: float = 1.0
    share: float = 0.0

    def quantile(self, tail: float) -> float:
        """What is exceeded with probability ``tail``."""
        from scipy.special import stdtrit

        rows = -float(stdtrit(self.rows, tail)) if self.share < 1 else 0.0
        seeds = -float(stdtrit(self.seeds, tail)) if self.share > 0 else 0.0
        return (1 - self.share) * rows + self.share * seeds

    def two_sided(self, ratio: float) -> float:
        """The probability of a ratio at least as far from zero."""
        from scipy.special import stdtr

        low, high = sorted(2 * float(stdtr(freedom, -abs(ratio))) for freedom in (self.rows, self.seeds))
        if self.share in (0, 1) or low == high:
            return 2 * float(stdtr(self.seeds if self.share else self.rows, -abs(ratio)))
        low = max(low, TINY)
        for _ in range(50):  # the quantile falls as the probability grows
            middle = math.sqrt(low * high)
            low, high = (middle, high) if self.quantile(middle / 2) > abs(ratio) else (low, middle)
        return high


@dataclass(frozen=True)
class Contrast:
    """``value``: its estimate. ``error``: its standard error; None if there are too few rows. ``p``:
    two-sided; ``p_corrected``: by Holm over the family. ``student``: the distribution of value / error."""

    value: float
    error: float | None
    student: MixedStudent
    p: float | None
    p_corrected: float | None = None

    @property
    def interval(self) -> tuple[float, float] | None:
        """95 %, not corrected for the size of the family."""
        if self.error is None:
            return None
        half = self.student.quantile(TAIL) * self.error
        return self.value - half, self.value + half

    @property
    def shown(self) -> bool:
        """Whether a difference is shown."""
        return self.p_corrected is not None and self.p_corrected < LEVEL

    def scaled(self, slope: float) -> Contrast:
        """In other units."""
        error = None if self.error is None else abs(slope) * self.error
        return replace(self, value=slope * self.value, error=error)

    def above(self) -> float:
        """One-sided p of a value at or below zero; 1 without a standard error."""
        if self.p is None:
            return 1.0
        return self.p / 2 if self.value > 0 else 1 - self.p / 2


@dataclass(frozen=True)
class SeedVariance:
    """Of the interaction of settings and seeds, over all settings. ``freedom``: 0 if it is unknown."""

    variance: float = 0.0
    freedom: int = 0


def seed_variance(means: np.ndarray) -> SeedVariance:
    """``means``: (settings, seeds); seeds that no setting has, and settings that lack another, are left
    out."""
    begun = means[:, np.isfinite(means).any(axis=0)]
    whole = begun[np.isfinite(begun).all(axis=1)]
    settings, seeds = whole.shape
    if settings < 2 or seeds < 2:
        return SeedVariance()
    rest = whole - whole.mean(axis=1, keepdims=True) - whole.mean(axis=0) + whole.mean()
    freedom = (settings - 1) * (seeds - 1)
    return SeedVariance(float((rest**2).sum()) / freedom, freedom)


def contrast(panel: Panel, coefficients: np.ndarray, pooled: SeedVariance) -> Contrast | None:
    """Of the seeds that all settings with a coefficient have; None if there is none.

    coefficients: (settings,). pooled: of all settings, by `seed_variance`."""
    used = np.flatnonzero(coefficients)
    common = panel.done[used].all(axis=0)
    if not common.any():
        return None
    weights = panel.weights[common]
    weights = weights / weights.sum()
    values = np.where(weights > 0, panel.values[used][:, common], 0.0)
    combined = np.tensordot(coefficients[used], values, axes=1)  # (seeds, rows)
    value = float((weights * combined).sum())
    influence = weights * (combined - value)
    by_row = weights.sum(axis=0)
    n_rows = 1.0 / float((by_row**2).sum())  # as many rows of equal weight tell as much
    if n_rows < 1.5:
        return Contrast(value, None, MixedStudent(1.0), None)
    rows = n_rows / (n_rows - 1) * float((influence.sum(axis=0) ** 2).sum())
    if panel.share:  # two more rows, one of them gained and one lost: Bonett and Price
        rows += 2 / (n_rows + 2) ** 2
    n_seeds = int(common.sum())
    variance, student = rows, MixedStudent(n_rows - 1)
    if n_seeds > 1:
        own = n_seeds / (n_seeds - 1) * float((influence.sum(axis=1) ** 2).sum())
        common_part = pooled.variance * float((coefficients**2).sum()) / n_seeds
        seeds = max(own, common_part)
        seed_freedom = pooled.freedom if pooled.freedom > 0 else n_seeds - 1
        once = (weights > 0).sum(axis=0) == 1  # a row of one seed is counted by its seed already
        variance = max(rows, seeds, rows + seeds - float((influence[:, once] ** 2).sum()))
        if variance > 0:
            student = MixedStudent(n_rows - 1, seed_freedom, min(1.0, seeds / variance))
    return _tested(value, variance, student, n_rows)


def _tested(value: float, variance: float, student: MixedStudent, n_rows: float) -> Contrast:
    if variance > (1e-12 * value) ** 2:
        error = math.sqrt(variance)
        return Contrast(value, error, student, min(1.0, student.two_sided(value / error)))
    # All rows moved alike: the sign test.
    return Contrast(value, 0.0, student, min(1.0, 2 * 0.5**n_rows) if value else 1.0)


class SettingPair(NamedTuple):
    """Two settings by their places; the contrast is second − first."""

    first: int
    second: int


class LevelPair(NamedTuple):
    """Two values of a key by their places in its levels; the contrast is second − first, over all pairs of
    settings that differ in the key only."""

    key: str
    first: int
    second: int


@dataclass(frozen=True)
class SweptKey:
    """``levels``: the place of the key's value by setting, as in ``values``."""

    key: str
    values: tuple[object, ...]
    levels: tuple[int, ...]


@dataclass(frozen=True)
class Compared:
    """All contrasts of a sweep, corrected together. ``means``: by setting over its seeds. ``tests``: how many
    there are; where only one key is varied, its levels are the settings."""

    means: np.ndarray
    pairs: Mapping[SettingPair, Contrast]
    levels: Mapping[LevelPair, Contrast]
    tests: int

    def scaled(self, slope: float) -> Compared:
        """The contrasts in the units of a metric that changes by ``slope`` with the mean over rows."""
        pairs = {pair: result.scaled(slope) for pair, result in self.pairs.items()}
        levels = {pair: result.scaled(slope) for pair, result in self.levels.items()}
        return replace(self, pairs=pairs, levels=levels)

    def between(self, first: int, second: int) -> Contrast | None:
        """second − first."""
        if (known := self.pairs.get(SettingPair(first, second))) is not None:
            return known
        other = self.pairs.get(SettingPair(second, first))
        return None if other is None else replace(other, value=-other.value)


def compare(panel: Panel, keys: Sequence[SweptKey]) -> Compared:
    """Every pair of settings, and every pair of levels of each key."""
    count = len(panel.values)
    by_seed = panel.means()
    pooled = seed_variance(by_seed)
    asked: dict[SettingPair | LevelPair, np.ndarray] = {}
    for first, second in combinations(range(count), 2):
        asked[SettingPair(first, second)] = _difference(count, [(first, second)])
    for key in keys:
        for first, second in combinations(range(len(key.values)), 2):
            if matched := _matched(keys, key, first, second):
                asked[LevelPair(key.key, first, second)] = _difference(count, matched)
    tested: dict[SettingPair | LevelPair, Contrast] = {}
    for question, coefficients in asked.items():
        if (result := contrast(panel, coefficients, pooled)) is not None:
            tested[question] = result
    corrected = _corrected(tested, asked)
    return Compared(
        adjusted(by_seed),
        {pair: result for pair, result in corrected.items() if isinstance(pair, SettingPair)},
        {pair: result for pair, result in corrected.items() if isinstance(pair, LevelPair)},
        len({asked[question].tobytes() for question in tested}),
    )


def adjusted(by_seed: np.ndarray) -> np.ndarray:
    """(settings,) the mean of each setting over all seeds, from the (settings, seeds) that there are: what a
    setting lacks is the seed's effect on the others (least squares). NaN for one without values."""
    places, seeds = np.nonzero(np.isfinite(by_seed))
    count, n_seeds = by_seed.shape
    design = np.zeros((len(places), count + n_seeds - 1))
    design[np.arange(len(places)), places] = 1.0
    for column in range(n_seeds - 1):  # effects of seeds add up to zero
        design[:, count + column] = (seeds == column).astype(float) - (seeds == n_seeds - 1)
    effects = np.linalg.lstsq(design, by_seed[places, seeds], rcond=None)[0][:count]
    return np.where(np.isin(np.arange(count), places), effects, np.nan)


def _difference(count: int, pairs: Sequence[tuple[int, int]]) -> np.ndarray:
    """(settings,) the mean of the second settings less that of the first."""
    coefficients = np.zeros(count)
    for first, second in pairs:
        coefficients[first] -= 1 / len(pairs)
        coefficients[second] += 1 / len(pairs)
    return coefficients


def _matched(keys: Sequence[SweptKey], key: SweptKey, first: int, second: int) -> list[tuple[int, int]]:
    """The pairs of settings with these two levels of ``key`` that agree in all other keys."""
    others = [other for other in keys if other is not key]
    by_rest: dict[tuple[int, ...], dict[int, int]] = {}
    for setting, level in enumerate(key.levels):
        by_rest.setdefault(tuple(other.levels[setting] for other in others), {})[level] = setting
    return [
        (levels[first], levels[second]) for levels in by_rest.values() if first in levels and second in levels
    ]


def _corrected(
    tested: Mapping[SettingPair | LevelPair, Contrast], asked: Mapping[SettingPair | LevelPair, np.ndarray]
) -> dict[SettingPair | LevelPair, Contrast]:
    """With p corrected by Holm; the same contrast, asked of settings and of levels, is one test."""
    distinct: dict[bytes, float] = {}
    for question, result in tested.items():
        if result.p is not None:
            distinct[asked[question].tobytes()] = result.p
    adjusted = dict(zip(distinct, holm(list(distinct.values())), strict=True))
    return {
        question: replace(result, p_corrected=adjusted.get(asked[question].tobytes()))
        for question, result in tested.items()
    }
