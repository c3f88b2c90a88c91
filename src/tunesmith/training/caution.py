"""Warnings for objectives that compare good with bad answers, each given once, when its condition first
holds."""

from __future__ import annotations

import statistics
from collections import deque
from collections.abc import Sequence

from tunesmith.events import Notice, Sink
from tunesmith.tokens.batches import Group, Plan

WINDOW = 10  # updates
RUNAWAY_KL = 30.0
"""Nats of z0 from which on σ(β(r − z0)) with the usual β = 0.1 is saturated for a row that did not move
(σ(−3) = 0.05)."""


class Watch:
    """What was seen so far, and which warnings were given. ``compared``: rewards are ratios to the model
    before training."""

    def __init__(self, compared: bool = True) -> None:
        self._compared = compared
        self._recent: deque[dict[str, float]] = deque(maxlen=WINDOW)
        self._said: set[str] = set()

    def step(self, metrics: dict[str, float], emit: Sink) -> None:
        """After an update: means over the last WINDOW of them."""
        if not metrics:
            return
        self._recent.append(metrics)
        if len(self._recent) == WINDOW:
            means = {
                key: statistics.fmean(update[key] for update in self._recent if key in update)
                for key in metrics
            }
            self._look(means, f"over the last {WINDOW} updates", emit)

    def validation(self, metrics: dict[str, float], emit: Sink) -> None:
        if metrics:
            self._look(metrics, "on the held-out rows", emit)

    def _look(self, metrics: dict[str, float], where: str, emit: Sink) -> None:
        good = next((key for key in ("reward_desirable", "reward_chosen") if key in metrics), None)
        name = (good or "").removeprefix("reward_")
        if good and self._compared and metrics[good] < -1e-3:
            text = (
                f"{name} answers became less likely than before training {where}: {good} {metrics[good]:.3g}"
            )
            hint = "raise objective.beta, lower optimizer.learning_rate, or "
            hint += (
                "set objective.sft_weight"
                if name == "desirable"
                else "try objective=orpo, which also imitates the chosen answers"
            )
            self._say(f"falling {name}", text, hint, emit)
        if metrics.get("kl", 0.0) > RUNAWAY_KL:
            text = f"the model moves far from the reference {where}: kl {metrics['kl']:.3g} nats a row"
            self._say("kl", text, "lower optimizer.learning_rate, or raise objective.beta", emit)
        if self._compared and metrics.get("margin", 0.0) < 0 and self._recent:
            text = f"bad answers gained more than good ones {where}: margin {metrics['margin']:.3g}"
            self._say("margin", text, "look at the labels with `tunesmith show`", emit)

    def _say(self, key: str, text: str, hint: str, emit: Sink) -> None:
        if key not in self._said:
            self._said.add(key)
            emit(Notice(text, level="warning", hint=hint))


def lonely(plan: Plan, groups: Sequence[Group]) -> int:
    """How many of the updates that are looked at hold rows of one class only."""
    if all(group.label is None for group in groups):
        return 0
    return sum(len({groups[member].label for member in plan.members(step)}) < 2 for step in plan.looked_at)
