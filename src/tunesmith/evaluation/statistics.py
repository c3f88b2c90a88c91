"""How per-example scores become numbers with intervals, paired differences, and verdicts.

Intervals: percentile bootstrap (Efron and Tibshirani 1993, chapter 13) over *sources*: examples of one source
are drawn together, since they are not independent. Percentiles are widened as Student's t is wider than the
normal (Hesterberg 2015, "What teachers should know about the bootstrap", section 4.1), or few sources would
look surer than they are. A difference is of the same sources on both sides. Its p value inverts that
interval. For yes or no, one of each source, the interval is Bonett and Price's (2012, "Adjusted Wald
confidence interval for a difference of binomial proportions based on paired data") and p is McNemar's exact
one (1947). Verdicts are corrected for their number by Holm (1979)."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import zip_longest
from typing import NamedTuple, Protocol

import numpy as np

from tunesmith.errors import EvaluationError, listing
from tunesmith.runs.records import Better, ExampleScore, Movement, Score, Verdict

LEVEL = 0.05  # of a verdict, after correction
TAIL = LEVEL / 2  # left out on each side of a 95 % interval
RESAMPLES = 4000
DRAWN = 1 << 22  # numbers at once
FEW, ENOUGH, FAR = (
    0.002,
    20,
    8.0,
)  # a smaller share of draws, of so many sources, is a normal tail's, to so many deviations

ALIKE = "all examples score alike: the interval is a point"
ALIKE_SHARE = "all examples score alike: exact binomial interval"
PAIRED = "all examples moved alike: Bonett and Price's interval"
ONE = "one example: no interval"
MCNEMAR, BOOTSTRAP = "McNemar, exact", "paired bootstrap"


@dataclass(frozen=True, slots=True)
class Target:
    """What a tuned model is to keep: a ``share`` of the base's value (0.95), or of a share a change under
    ``change`` (0.05)."""

    share: float | None = None
    change: float | None = None

    def __str__(self) -> str:
        return (
            f"at least {self.share:.0%} of the base"
            if self.share is not None
            else f"change under {100 * (self.change or 0):g} points"
        )

    def gap(self, tuned: np.ndarray, base: np.ndarray) -> np.ndarray:
        """What `met` judges: how far above the share, or how far from the base."""
        return tuned - base * (1.0 if self.share is None else self.share)

    def met(self, low: float, high: float) -> bool | None:
        """True or False where the interval of `gap` says so, None where it is not shown."""
        if self.share is not None:
            return True if low >= 0 else False if high < 0 else None
        bound = self.change or 0.0
        return True if -bound < low and high < bound else False if low >= bound or high <= -bound else None


@dataclass(frozen=True, slots=True)
class Statistic:
    """``finish`` (elementwise) of Σ of·units / Σ units over the examples where ``of`` is a number. ``share``:
    all are 0 or 1.

    ``better``: which way is good, None where neither is. ``headline``: a task's answer in one number.
    ``change``: a source whose ``of`` moved by this or less is unchanged. ``unit``: as "%", "nats", "points";
    shares are shown in per cent."""

    name: str
    of: Callable[[ExampleScore], float | None]
    finish: Callable[[np.ndarray], np.ndarray] = np.asarray
    share: bool = False
    better: Better | None = None
    headline: bool = False
    change: float = 0.0
    unit: str = ""
    target: Target | None = None


class HasStatistics(Protocol):
    """What `summarise` needs to know of a task."""

    @property
    def name(self) -> str: ...

    @property
    def version(self) -> str: ...

    @property
    def statistics(self) -> Sequence[Statistic]: ...

    @property
    def parts(self) -> Sequence[str]: ...


class TaskStatistics(NamedTuple):
    """The statistics of a recorded task. ``parts``: keys of the details by whose values they are also
    shown."""

    name: str
    version: str
    statistics: Sequence[Statistic]
    parts: Sequence[str] = ()


def change(statistic: Statistic, base: float | None, tuned: float | None) -> Movement | None:
    """How one example moved; None if either side has no number, or if neither direction is better."""
    if base is None or tuned is None or statistic.better is None:
        return None
    gain = (tuned - base) * (1 if statistic.better == "higher" else -1)
    return "unchanged" if abs(gain) <= statistic.change else "improved" if gain > 0 else "regressed"


def summarise(
    task: HasStatistics, base: Sequence[ExampleScore] | None, tuned: Sequence[ExampleScore], seed: int
) -> list[Score]:
    """One Score for each statistic of ``task`` that any example has, in order, then its headlines by each of
    its parts.

    Raises EvaluationError where there is none, or where base and tuned are not the same examples with the
    same weights, in order."""
    if not tuned:
        raise EvaluationError(
            f"{task.name}: no example was scored", hint="give data with at least one usable row"
        )
    sides = [tuned] if base is None else [tuned, base]
    pairs = zip_longest(*([(score.source, score.units) for score in side] for side in sides))
    odd = [f"tuned {pair[0]}, base {pair[-1]}" for pair in pairs if pair[0] != pair[-1]]
    if odd:
        what = f"{task.name}: base and tuned were not scored on the same examples (source, units)\n{listing(odd)}"
        raise EvaluationError(what, hint="score both on one list of rows, in one order")
    found = list(_scores(task, task.statistics, sides, None, seed))
    headlines = [statistic for statistic in task.statistics if statistic.headline]
    for key in task.parts:
        values = list(dict.fromkeys(str(one.detail[key]) for one in tuned if one.detail.get(key) is not None))
        for value in sorted(values) if len(values) > 1 else ():
            kept = [index for index, one in enumerate(tuned) if str(one.detail.get(key)) == value]
            part = [[side[index] for index in kept] for side in sides]
            found += (
                replace(score, headline=False)
                for score in _scores(task, headlines, part, f"{key}={value}", seed)
            )
    return found


def judge(scores: Sequence[Score]) -> list[Score]:
    """``scores`` with verdicts, corrected for how many there are: headlines as one family, all others as
    another."""
    verdicts: dict[int, Score] = {}
    for headline in (True, False):
        family = [
            (at, one)
            for at, one in enumerate(scores)
            if one.headline is headline and one.p is not None and one.better
        ]
        corrected = holm([one.p for _, one in family if one.p is not None])
        for (at, one), p in zip(family, corrected, strict=True):
            gain = (one.delta or 0.0) * (1 if one.better == "higher" else -1)
            verdict: Verdict = (
                "no difference shown" if p >= LEVEL or not gain else "improved" if gain > 0 else "regressed"
            )
            verdicts[at] = replace(one, p_corrected=p, verdict=verdict)
    return [verdicts.get(at, one) for at, one in enumerate(scores)]


def holm(ps: Sequence[float]) -> list[float]:
    """Holm's step-down adjusted p values, in the order given."""
    order = sorted(range(len(ps)), key=lambda at: ps[at])
    adjusted, highest = [1.0] * len(ps), 0.0
    for place, at in enumerate(order):
        highest = adjusted[at] = max(highest, min(1.0, (len(ps) - place) * ps[at]))
    return adjusted


def mcnemar(gained: int, lost: int) -> float:
    """Two-sided exact p of as many changes each way, of ``gained`` and ``lost`` yes-or-no answers; 1 where
    none changed."""
    from scipy.stats import binomtest

    return float(binomtest(min(gained, lost), gained + lost, 0.5).pvalue) if gained + lost else 1.0


def paired(gained: int, lost: int, n: int) -> tuple[float, float]:
    """Bonett and Price's 95 % interval of (gained − lost) / n."""
    from scipy.special import ndtri

    up, down = (gained + 1) / (n + 2), (lost + 1) / (n + 2)
    half = -float(ndtri(TAIL)) * math.sqrt((up + down - (up - down) ** 2) / (n + 2))
    return max(-1.0, up - down - half), min(1.0, up - down + half)


def edges(n: int) -> tuple[float, float]:
    """The percentiles of ``n`` sources' bootstrap draws between which a 95 % interval lies: wider for
    fewer."""
    from scipy.special import ndtr, stdtrit

    low = float(ndtr(math.sqrt(n / (n - 1)) * stdtrit(n - 1, TAIL)))
    return low, 1 - low


def inverted(draws: np.ndarray, n: int) -> float:
    """Two-sided p of zero: the level at which the interval of ``draws`` would first leave it out."""
    from scipy.special import ndtri, stdtr

    ties = float((draws == 0).sum()) / 2
    below = min(float((draws < 0).sum()) + ties, float((draws > 0).sum()) + ties)
    z = ndtri((below + 1) / (len(draws) + 2))
    if below < FEW * len(draws) and n >= ENOUGH:  # else what is corrected for many tests could never be shown
        middle = abs(float(draws.mean()))
        z = min(z, -middle / max(float(draws.std()), middle / FAR))
    return float(min(1.0, 2 * stdtr(n - 1, z / math.sqrt(n / (n - 1)))))


def _scores(
    task: HasStatistics,
    statistics: Sequence[Statistic],
    sides: Sequence[Sequence[ExampleScore]],
    part: str | None,
    seed: int,
) -> Iterator[Score]:
    for statistic in statistics:
        found = [_sums(statistic, side) for side in sides]
        if not all(found):
            continue
        if odd := sorted(found[0].keys() ^ found[-1].keys()):
            what = f"{task.name}: {statistic.name} has a number on one side only\n{listing(odd)}"
            raise EvaluationError(what, hint="whether an example has one may depend on the question alone")
        once = all(count == 1 for *_, count in found[0].values())
        sums = np.array(
            [[found[side][source][:2] for source in sorted(found[0])] for side in range(len(found))]
        )
        yield replace(_score(task, statistic, sums, once, seed), part=part)


def _sums(statistic: Statistic, scores: Sequence[ExampleScore]) -> dict[str, tuple[float, float, int]]:
    """Σ value·units, Σ units and the number of examples of each source, in order of first appearance."""
    sums: dict[str, tuple[float, float, int]] = {}
    for score in scores:
        value = statistic.of(score)
        if value is not None:
            total, units, count = sums.get(score.source, (0.0, 0.0, 0))
            sums[score.source] = total + value * score.units, units + score.units, count + 1
    return sums


def resampled(sums: np.ndarray, seed: int) -> np.ndarray:
    """``sums``: (sides, n, k). (sides, RESAMPLES, k) totals over n of the n, drawn with replacement, the same
    for all sides."""
    n = sums.shape[1]
    lines = np.ascontiguousarray(sums.transpose(0, 2, 1))  # ten times as fast to draw from
    chance = np.random.default_rng(seed)
    size = max(1, DRAWN // (n * sums.shape[0] * sums.shape[2]))
    drawn = (chance.integers(n, size=(min(size, RESAMPLES - at), n)) for at in range(0, RESAMPLES, size))
    return np.concatenate([np.take(lines, one, axis=2).sum(axis=3) for one in drawn], axis=2).transpose(
        0, 2, 1
    )


def _score(task: HasStatistics, statistic: Statistic, sums: np.ndarray, once: bool, seed: int) -> Score:
    """``sums``: (1 or 2, n, 2), the tuned model's and, where there is one, the base's. ``once``: a source is
    one example."""
    n = sums.shape[1]
    drawn = np.concatenate([sums.sum(axis=1)[:, None], resampled(sums, seed)], axis=1)
    values = statistic.finish(drawn[..., 0] / drawn[..., 1])  # the data as they are, then the resamples
    of = sums[..., 0] / sums[..., 1]  # each source's
    alike = np.ptp(of, axis=1) == 0

    def interval(found: np.ndarray, alike: bool) -> tuple[float | None, float | None, str | None]:
        if n == 1:
            return None, None, ONE
        low, high = found[[0, 0]] if alike else np.quantile(found[1:], edges(n))
        return float(low), float(high), ALIKE if alike else None

    value = float(values[0, 0])
    low, high, note = interval(values[0], alike[0])
    if statistic.share and alike[0] and value in (0.0, 1.0):
        # Clopper and Pearson's interval of 0 or n of n: a bootstrap only sees ties.
        edge = TAIL ** (1 / n)
        low, high, note = (edge, 1.0, ALIKE_SHARE) if value else (0.0, 1 - edge, ALIKE_SHARE)
    score = Score(
        task.name,
        task.version,
        statistic.name,
        value,
        low,
        high,
        n,
        note=note,
        better=statistic.better,
        headline=statistic.headline,
        unit=statistic.unit or ("%" if statistic.share else ""),
    )
    if len(values) == 1:
        return score
    gain, moved = values[0] - values[1], of[0] - of[1]
    flips = int((moved > 0).sum()), int((moved < 0).sum())
    low, high, other = interval(gain, bool(np.ptp(moved) == 0) and (all(alike) or not moved[0]))
    exact = statistic.share and once and n > 1 and bool(np.ptp(sums[0, :, 1]) == 0)
    if exact or (statistic.share and other == ALIKE):
        low, high, other = *paired(*flips, n), PAIRED if other == ALIKE else None
    note = "; ".join(filter(None, [note, other and f"difference: {other}"])) or None
    changes = [change(statistic, *pair[::-1]) for pair in of.T.tolist()]
    counted = [changes.count(one) for one in ("improved", "unchanged", "regressed")]
    p = None if n == 1 else mcnemar(*flips) if exact else inverted(gain[1:], n)
    met: bool | None = None
    if statistic.target is not None and low is not None and high is not None:
        gap = statistic.target.gap(values[0], values[1])
        ends = gap[0] - gain[0] + np.array([low, high]) if exact or other else np.quantile(gap[1:], edges(n))
        met = statistic.target.met(*ends.tolist())
    return replace(
        score,
        delta=float(gain[0]),
        delta_low=low,
        delta_high=high,
        note=note,
        p=p,
        test=None if p is None else MCNEMAR if exact else BOOTSTRAP,
        sources=(counted[0], counted[1], counted[2]) if statistic.better else None,
        target=None if statistic.target is None else str(statistic.target),
        met=met,
    )
