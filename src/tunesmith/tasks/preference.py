"""Does the tuned model tell good answers from bad better than the base did?

r = log p(answer | prompt) by the tuned model − the same by the base, in nats over the learned tokens: what KTO and DPO call the
reward, without β. ``accuracy``: the share of pairs of a good and a bad answer in which the good one has the larger r: of given
pairs, or of all combinations where rows are judged alone (as Mann and Whitney 1947 count). A model that was not trained has 0.5.
``ratio_margin``: mean r of the good less mean r of the bad. Intervals: bootstrap over the sources of good and of bad rows, each
among its kind; where the good rows win always or never, the exact binomial one of the kind with fewer sources.

The base is the model without any adapter, also where training went on from one and compared with that.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from tunesmith.objectives import won
from tunesmith.tasks import ALIKE_SHARE, RESAMPLES, TAIL, ExampleScore, Score

NAME, VERSION = "preference", "1"
CHANCE = {"accuracy": 0.5, "ratio_margin": 0.0, "ratio_good": 0.0, "ratio_bad": 0.0}
"""What the base itself scores."""


@dataclass(frozen=True, slots=True)
class Compared:
    """One answer. ``pair``: number of the pair that it belongs to, None where it is judged alone."""

    source: str
    good: bool
    base: float
    tuned: float
    tokens: float
    pair: int | None = None

    @property
    def ratio(self) -> float:
        return self.tuned - self.base


def examples(items: Sequence[Compared]) -> list[ExampleScore]:
    """One line an answer: ``value`` is r in nats."""
    facts = ({"good": one.good, "base_nats": one.base, "tuned_nats": one.tuned, "tokens": one.tokens} for one in items)
    return [ExampleScore(one.source, one.ratio, 1.0, dict(fact)) for one, fact in zip(items, facts, strict=True)]


def scores(items: Sequence[Compared], seed: int) -> list[Score]:
    """accuracy, margin and the mean r of good and of bad, with 95 % intervals; none where a kind is missing."""
    good = np.array([one.ratio for one in items if one.good])
    bad = np.array([one.ratio for one in items if not one.good])
    if not len(good) or not len(bad):
        return []
    paired = all(one.pair is not None for one in items) and len(good) == len(bad)
    chance = np.random.default_rng(seed)
    up, n_good = _draws([one.source for one in items if one.good], chance)
    down, n_bad = (up, 0) if paired else _draws([one.source for one in items if not one.good], chance)
    wins = won(good - bad) if paired else won(good[:, None] - bad[None, :])
    shares = up @ wins / up.sum(axis=1) if paired else (up @ wins * down).sum(axis=1) / (up.sum(axis=1) * down.sum(axis=1))
    means = up @ good / up.sum(axis=1), down @ bad / down.sum(axis=1)
    found = {
        "accuracy": (wins.mean(), shares),
        "ratio_margin": (good.mean() - bad.mean(), means[0] - means[1]),
        "ratio_good": (good.mean(), means[0]),
        "ratio_bad": (bad.mean(), means[1]),
    }
    made: list[Score] = []
    for name, (value, draws) in found.items():
        low, high = (float(edge) for edge in np.quantile(draws, [TAIL, 1 - TAIL]))
        fewest = n_good if paired else min(n_good, n_bad)
        note = None if fewest > 1 else "one row of a kind: the interval does not hold its chance"
        if name == "accuracy" and value in (0.0, 1.0):  # a bootstrap only sees ties
            edge, note = TAIL ** (1 / fewest), ALIKE_SHARE
            low, high = (edge, 1.0) if value else (0.0, 1 - edge)
        base, n = CHANCE[name], n_good + n_bad
        made.append(
            Score(NAME, VERSION, name, float(value), low, high, n, float(value) - base, low - base, high - base, note)
        )  # fmt: skip
    return made


def _draws(sources: Sequence[str], chance: np.random.Generator) -> tuple[np.ndarray, int]:
    """(RESAMPLES, rows) how often each row is in each resample of the sources, and how many sources there are."""
    names, at = np.unique(np.array(sources), return_inverse=True)
    counts = chance.multinomial(len(names), np.full(len(names), 1 / len(names)), size=RESAMPLES)
    return counts[:, at].astype(np.float64), len(names)
