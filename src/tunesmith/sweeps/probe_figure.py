"""The picture of a probe: held-out loss against rate after each round, and the loss of every update."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol


class TrialCurves(Protocol):
    """What is drawn of a rate."""

    rate: float
    losses: list[float]
    held_out: list[tuple[int, float]]
    status: str


def draw(trials: Sequence[TrialCurves], chosen: float, before: float, path: Path) -> None:
    """Write a PNG. Line styles distinguish the rates without colour; crosses are rates that diverged."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.6), dpi=110, layout="constrained")
    left, right = figure.subplots(1, 2)
    _against_rate(left, trials, chosen, before)
    for number, trial in enumerate(trials):
        finite = [(index + 1, loss) for index, loss in enumerate(trial.losses) if math.isfinite(loss)]
        style = ("-", "--", "-.", ":")[number % 4]
        label = f"{trial.rate:g}" + (" (diverged)" if trial.status == "diverged" else "")
        right.plot([place for place, _ in finite], [loss for _, loss in finite], style, label=label, lw=1.4)
    right.set_xlabel("update: the same rows for all rates")
    right.set_ylabel("loss of the update")
    right.legend(fontsize=8, title="learning rate")
    for panel in (left, right):
        panel.grid(alpha=0.3)
    FigureCanvasAgg(figure).print_png(path)


def _against_rate(panel: Any, trials: Sequence[TrialCurves], chosen: float, before: float) -> None:
    rounds = sorted({updates for trial in trials for updates, _ in trial.held_out})
    for number, updates in enumerate(rounds):
        by_rate = {trial.rate: dict(trial.held_out) for trial in trials}
        points = [(rate, losses[updates]) for rate, losses in by_rate.items() if updates in losses]
        style = ("o-", "s--", "^-.", "d:")[number % 4]
        places, heights = [place for place, _ in points], [loss for _, loss in points]
        panel.plot(places, heights, style, label=f"after {updates} updates")
    panel.axhline(before, color="k", lw=1, ls=":", label="before training")
    panel.axvline(chosen, color="k", lw=1, alpha=0.5, label=f"chosen: {chosen:g}")
    diverged = [trial.rate for trial in trials if trial.status == "diverged"]
    panel.plot(diverged, [before] * len(diverged), "kx", ms=9, label="diverged" if diverged else None)
    panel.set_xscale("log")
    panel.set_xlabel("learning rate")
    panel.set_ylabel("held-out loss")
    panel.legend(fontsize=8)
