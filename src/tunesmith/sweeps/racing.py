"""When can a trial be stopped, since it will not be the best?

At each validation after the first part of a run, its held-out loss is compared with that of the leader at the
same update, row by row. The setting is stopped if the one-sided interval of the difference lies above zero.
The error is shared equally between all looks and all other settings (Bonferroni), so that the setting whose
loss is truly the lowest at every look is stopped with at most the stated probability, whichever the leader.
Curves that cross later are not covered: a setting that learns slowly can be stopped before it would have
overtaken, which is why nothing is stopped in the first part (`IntervalRacing.after`), but for a setting whose
loss is not finite.

With several seeds a setting is judged by all seeds that have come so far, from the second on, by the variance
between seeds; with one seed the rows alone decide."""

from __future__ import annotations

import numpy as np

from tunesmith.sweeps.contrasts import ENOUGH_ROWS, Panel, contrast, seed_variance


def looks(steps: int, every: int, after: float) -> list[int]:
    """The updates after which a run of ``steps`` updates is looked at; not the last, where nothing is
    saved."""
    return [step for step in range(every, steps, every) if step >= after * steps] if every else []


def level(error: float, n_settings: int, n_looks: int, n_seeds: int) -> float:
    """What one comparison may err, so that all together err by at most ``error``."""
    comparisons = (n_settings - 1) * n_looks * max(1, n_seeds - 1)
    return error / max(1, comparisons)


def judge(panel: Panel, setting: int, n_seeds: int, allowed: float) -> tuple[int, float, float] | None:
    """(leader, difference, p) if ``setting`` is shown to be worse than the leader at this look; else None.

    panel: what all settings scored at this update. n_seeds: how many seeds the sweep has."""
    done = panel.done
    candidates = [
        other
        for other in range(len(panel.values))
        if other != setting and _enough(panel, done[other] & done[setting], n_seeds)
    ]
    if not candidates:
        return None
    pooled = seed_variance(panel.means())
    differences = {other: _behind(panel, setting, other) for other in candidates}
    leader = max(candidates, key=lambda other: differences[other])
    coefficients = np.zeros(len(panel.values))
    coefficients[setting], coefficients[leader] = 1.0, -1.0
    tested = contrast(panel, coefficients, pooled)
    if tested is None or tested.value <= 0 or (p := tested.above()) >= allowed:
        return None
    return leader, tested.value, p


def _enough(panel: Panel, common: np.ndarray, n_seeds: int) -> bool:
    """Whether the seeds that two settings share tell enough: two of several, and enough rows."""
    rows = int((panel.weights[common] > 0).any(axis=0).sum()) if common.any() else 0
    return rows >= ENOUGH_ROWS and int(common.sum()) >= min(2, n_seeds)


def _behind(panel: Panel, setting: int, other: int) -> float:
    """By how much ``setting`` lies above ``other`` on the seeds that both have."""
    means = panel.means()
    common = np.isfinite(means[setting]) & np.isfinite(means[other])
    return float((means[setting] - means[other])[common].mean())
