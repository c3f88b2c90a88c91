"""How per-example scores become numbers with intervals, paired differences, and verdicts.

Intervals: percentile bootstrap (Efron and Tibshirani 1993, chapter 13) over *sources*: examples of one source
are drawn together, since they are not independent. Percentiles are widened as Student's t is wider than the
normal (Hesterberg 2015, "What teachers should know about the bootstrap", section 4.1); otherwise intervals of
few sources would be too narrow. A difference uses the same sources on both sides; its p value inverts its
interval. For yes-or-no examples, one a source, the interval is Bonett and Price's (2012, "Adjusted Wald
confidence interval for a difference of binomial proportions based on paired data") and p is from McNemar's
exact test (1947). Verdicts are corrected for their number by Holm (1979)."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import zip_longest
from typing import NamedTuple

import numpy as np

from tunesmith.errors import EvaluationError, listing
from tunesmith.runs.records import Better, ExampleScore, Movement, Score, Verdict

LEVEL = 0.05
"""Significance level of a verdict, after correction."""
TAIL = LEVEL / 2
"""Left out on each side of a 95 % interval."""
RESAMPLES = 4000
DRAWN = 1 << 22
"""Numbers drawn at a time, which bounds memory."""
RARE, ENOUGH, FAR = 0.002, 20, 8.0
"""If less than the share RARE of the draws lies beyond zero, and there are ENOUGH sources, p is taken from
the tail of a normal distribution, up to FAR standard deviations."""

ALIKE = "all examples score alike: the interval is a point"
ALIKE_SHARE = "all examples score alike: exact binomial interval"
PAIRED = "all examples moved alike: Bonett and Price's interval"
ONE = "one example: no interval"
MCNEMAR, BOOTSTRAP = "McNemar, exact", "paired bootstrap"


@dataclass(frozen=True, slots=True)
class Target:
    """What a tuned model must keep: at least ``share`` of the base's value (0.95), or a change of less than
    ``change`` (0.05: 5 points)."""

    share: float | None = None
    change: float | None = None

    def __str__(self) -> str:
        return (
            f"at least {self.share:.0%} of the base"
            if self.share is not None
            else f"change under {100 * (self.change or 0):g} points"
        )

    def gap(self, tuned: np.ndarray, base: np.ndarray) -> np.ndarray:
        """The quantity that `met` judges: tuned less the share of the base, or less the base."""
        return tuned - base * (1.0 if self.share is None else self.share)

    def met(self, low: float, high: float) -> bool | None:
        """Whether the interval of `gap` shows that the target holds; None if it shows neither."""
        if self.share is not None:
            return True if low >= 0 else False if high < 0 else None
        bound = self.change or 0.0
        return True if -bound < low and high < bound else False if low >= bound or high <= -bound else None


@dataclass(frozen=True, slots=True)
class Statistic:
    """``finish`` (elementwise) of Σ of·units / Σ units, over the examples for which ``of`` is not None.

    ``share``: all values are 0 or 1. ``better``: the good direction, None if there is none. ``headline``: the
    task's answer in one number. ``change``: a source whose value moved by this or less is unchanged.
    ``unit``: as "%", "nats", "points"; shares are shown in per cent."""

    name: str
    of: Callable[[ExampleScore], float | None]
    finish: Callable[[np.ndarray], np.ndarray] = np.asarray
    share: bool = False
    better: Better | None = None
    headline: bool = False
    change: float = 0.0
    unit: str = ""
    target: Target | None = None


class TaskStatistics(NamedTuple):
    """The statistics of a task. ``parts``: keys of the details by whose values they are also shown."""

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
    task: TaskStatistics, base: Sequence[ExampleScore] | None, tuned: Sequence[ExampleScore], seed: int
) -> list[Score]:
    """One Score for each statistic of ``task`` that any example has, in order, then its headlines by each of
    its parts.

    Raises EvaluationError if there are no examples, or if base and tuned are not the same examples with the
    same weights in the same order."""
    if not tuned:
        raise EvaluationError(
            f"{task.name}: no example was scored", hint="give data with at least one usable row"
        )
    sides = [tuned] if base is None else [tuned, base]
    pairs = zip_longest(*([(score.source, score.units) for score in side] for side in sides))
    odd = [f"tuned {pair[0]}, base {pair[-1]}" for pair in pairs if pair[0] != pair[-1]]
    if odd:
        message = f"{task.name}: base and tuned were not scored on the same examples (source, units)"
        raise EvaluationError(
            f"{message}\n{listing(odd)}", hint="score both on the same rows in the same order"
        )
    scores = list(_scores(task, task.statistics, sides, None, seed))
    headlines = [statistic for statistic in task.statistics if statistic.headline]
    for key in task.parts:
        values = {str(example.detail[key]) for example in tuned if example.detail.get(key) is not None}
        for value in sorted(values) if len(values) > 1 else ():
            places = [index for index, example in enumerate(tuned) if str(example.detail.get(key)) == value]
            part = [[side[index] for index in places] for side in sides]
            of_part = _scores(task, headlines, part, f"{key}={value}", seed)
            scores += (replace(score, headline=False) for score in of_part)
    return scores


def judge(scores: Sequence[Score]) -> list[Score]:
    """``scores`` with verdicts, corrected for their number: headlines as one family, all others as
    another."""
    judged = list(scores)
    for headline in (True, False):
        family = [
            (index, score, score.p)
            for index, score in enumerate(scores)
            if score.headline is headline and score.p is not None and score.better
        ]
        corrected = holm([p for *_, p in family])
        for (index, score, _), p in zip(family, corrected, strict=True):
            gain = (score.delta or 0.0) * (1 if score.better == "higher" else -1)
            moved: Verdict = "improved" if gain > 0 else "regressed"
            verdict = moved if gain and p < LEVEL else "no difference shown"
            judged[index] = replace(score, p_corrected=p, verdict=verdict)
    return judged


def holm(ps: Sequence[float]) -> list[float]:
    """Holm's step-down adjusted p values, in the order given."""
    adjusted, highest = [1.0] * len(ps), 0.0
    for rank, index in enumerate(sorted(range(len(ps)), key=lambda index: ps[index])):
        highest = adjusted[index] = max(highest, min(1.0, (len(ps) - rank) * ps[index]))
    return adjusted


def mcnemar(gained: int, lost: int) -> float:
    """McNemar's two-sided exact p, of ``gained`` and ``lost`` yes-or-no answers; 1 if none changed."""
    from scipy.stats import binomtest

    return float(binomtest(min(gained, lost), gained + lost, 0.5).pvalue) if gained + lost else 1.0


def paired(gained: int, lost: int, n: int) -> tuple[float, float]:
    """Bonett and Price's 95 % interval of (gained − lost) / n."""
    from scipy.special import ndtri

    up, down = (gained + 1) / (n + 2), (lost + 1) / (n + 2)
    half = -float(ndtri(TAIL)) * math.sqrt((up + down - (up - down) ** 2) / (n + 2))
    return max(-1.0, up - down - half), min(1.0, up - down + half)


def edges(n: int) -> tuple[float, float]:
    """The percentiles of bootstrap draws over ``n`` sources that bound a 95 % interval: wider for fewer
    sources."""
    from scipy.special import ndtr, stdtrit

    low = float(ndtr(math.sqrt(n / (n - 1)) * stdtrit(n - 1, TAIL)))
    return low, 1 - low


def inverted(draws: np.ndarray, n: int) -> float:
    """Two-sided p of zero: the level at which the interval of ``draws`` would first exclude it."""
    from scipy.special import ndtri, stdtr

    ties = float((draws == 0).sum()) / 2
    below = min(float((draws < 0).sum()) + ties, float((draws > 0).sum()) + ties)
    z = ndtri((below + 1) / (len(draws) + 2))
    if below < RARE * len(draws) and n >= ENOUGH:  # 4,000 draws alone cannot give p small enough for Holm
        middle = abs(float(draws.mean()))
        z = min(z, -middle / max(float(draws.std()), middle / FAR))
    return float(min(1.0, 2 * stdtr(n - 1, z / math.sqrt(n / (n - 1)))))


def _scores(
    task: TaskStatistics,
    statistics: Sequence[Statistic],
    sides: Sequence[Sequence[ExampleScore]],
    part: str | None,
    seed: int,
) -> Iterator[Score]:
    for statistic in statistics:
        by_source = [_sums(statistic, side) for side in sides]
        if not all(by_source):
            continue
        if odd := sorted(by_source[0].keys() ^ by_source[-1].keys()):
            message = f"{task.name}: {statistic.name} has a number on one side only\n{listing(odd)}"
            raise EvaluationError(message, hint="whether an example has one may depend on the question alone")
        once = all(count == 1 for *_, count in by_source[0].values())
        sums = np.array([[side[source][:2] for source in sorted(side)] for side in by_source])
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
    rng = np.random.default_rng(seed)
    size = max(1, DRAWN // (n * sums.shape[0] * sums.shape[2]))
    draws = (rng.integers(n, size=(min(size, RESAMPLES - done), n)) for done in range(0, RESAMPLES, size))
    totals = np.concatenate([np.take(lines, indices, axis=2).sum(axis=3) for indices in draws], axis=2)
    return totals.transpose(0, 2, 1)


def _score(task: TaskStatistics, statistic: Statistic, sums: np.ndarray, once: bool, seed: int) -> Score:
    """``sums``: (1 or 2, n, 2), of the tuned model and, if measured, the base. ``once``: each source is one
    example."""
    n = sums.shape[1]
    totals = np.concatenate([sums.sum(axis=1)[:, None], resampled(sums, seed)], axis=1)
    values = statistic.finish(totals[..., 0] / totals[..., 1])  # the data as they are, then the resamples
    of_source = sums[..., 0] / sums[..., 1]
    alike = bool(np.ptp(of_source[0]) == 0)
    value = float(values[0, 0])
    low, high, note = _interval(values[0], n, alike)
    if statistic.share and alike and value in (0.0, 1.0):
        # Clopper and Pearson's interval of 0 or n of n, as all resamples are equal.
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
    exact = statistic.share and once and n > 1 and bool(np.ptp(sums[0, :, 1]) == 0)
    return score if len(values) == 1 else _with_base(score, statistic, values, of_source, exact)


def _with_base(
    score: Score, statistic: Statistic, values: np.ndarray, of_source: np.ndarray, exact: bool
) -> Score:
    """``score`` with its difference from the base.

    values: (2, 1 + RESAMPLES) of tuned and base. of_source: (2, n). exact: each source is a yes or no."""
    n, gain, moved = score.n, values[0] - values[1], of_source[0] - of_source[1]
    flips = int((moved > 0).sum()), int((moved < 0).sum())
    moved_alike = bool(np.ptp(moved) == 0) and (not np.ptp(of_source, axis=1).any() or not moved[0])
    low, high, note = _interval(gain, n, moved_alike)
    if exact or (statistic.share and note == ALIKE):
        low, high, note = *paired(*flips, n), PAIRED if note == ALIKE else None
    changes = [change(statistic, base, tuned) for tuned, base in of_source.T.tolist()]
    improved, unchanged, regressed = map(changes.count, ("improved", "unchanged", "regressed"))
    p = None if n == 1 else mcnemar(*flips) if exact else inverted(gain[1:], n)
    met: bool | None = None
    if statistic.target is not None and low is not None and high is not None:
        gap = statistic.target.gap(values[0], values[1])
        shifted = gap[0] - gain[0] + np.array([low, high])
        bounds = shifted if exact or note else np.quantile(gap[1:], edges(n))
        met = statistic.target.met(*bounds.tolist())
    return replace(
        score,
        delta=float(gain[0]),
        delta_low=low,
        delta_high=high,
        note="; ".join(filter(None, [score.note, note and f"difference: {note}"])) or None,
        p=p,
        test=None if p is None else MCNEMAR if exact else BOOTSTRAP,
        sources=(improved, unchanged, regressed) if statistic.better else None,
        target=None if statistic.target is None else str(statistic.target),
        met=met,
    )


def _interval(values: np.ndarray, n: int, alike: bool) -> tuple[float | None, float | None, str | None]:
    """Low, high and a note, from (1 + RESAMPLES,) the value and its draws. alike: all sources agree."""
    if n == 1:
        return None, None, ONE
    low, high = values[[0, 0]] if alike else np.quantile(values[1:], edges(n))
    return float(low), float(high), ALIKE if alike else None
