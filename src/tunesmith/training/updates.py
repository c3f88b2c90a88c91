"""One optimizer update: gradients over micro-batches and ranks, the optimizer's step, and its events."""

from __future__ import annotations

import math
import threading
from collections.abc import Sequence
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_map

from tunesmith import events
from tunesmith.errors import Diverged
from tunesmith.events import Notice, Sink
from tunesmith.learning import optimizer
from tunesmith.machine import backend
from tunesmith.machine.ranks import Ranks
from tunesmith.runs.checkpoints import Cursor
from tunesmith.runs.config import SKIPS_BEFORE_STOP, RunConfig
from tunesmith.tokens.batches import Group
from tunesmith.training import frozen, gradients, reference
from tunesmith.training.frozen import Lower
from tunesmith.training.gradients import Accumulation, Gradients
from tunesmith.training.instruments import Measured, Stages, due, row_losses
from tunesmith.training.preparation import Prepared
from tunesmith.training.validation import Validation


class Totals(NamedTuple):
    """What an update sums over its micro-batches and all ranks.

    ``loss``: mean a unit. ``norm``: of the mean gradients. ``logps`` (S,): of the sequences. ``stopping``:
    whether any rank was asked to stop."""

    loss: float
    norm: mx.array
    units: float
    logps: np.ndarray
    stopping: bool


class Updates:
    """Makes the updates of a plan. ``stop``: set once the run is asked to end. ``lower``: the frozen layers
    with their cache."""

    def __init__(
        self,
        net: nn.Module,
        config: RunConfig,
        prepared: Prepared,
        state: Any,
        emit: Sink,
        stop: threading.Event,
        ranks: Ranks,
        lower: Lower | None,
    ) -> None:
        self._net, self._config, self._prepared, self._optimizer = net, config, prepared, state
        self._emit, self._stop, self._ranks = emit, stop, ranks
        self._validation = Validation(net, config, prepared, ranks, emit)
        rows, plan = prepared.train, prepared.plan
        frequent = (
            gradients.frequent_shapes(plan, rows, ranks.rank, ranks.size) if plan.cut.bucket else frozenset()
        )
        shared = None if lower else frozen.shared(net, rows, config)
        gradients_of = Gradients(net, config, frequent, lower, prepared.objective, shared)
        self.accumulation = Accumulation(gradients_of, net, rows, plan, config, ranks, emit)

    def make(self, step: int, cursor: Cursor) -> tuple[bool, dict[str, float]]:
        """Make one optimizer update, or skip it if it is not finite: whether any rank was asked to stop, and
        the objective's metrics (none of an update that was skipped)."""
        clock, spec, plan = Stages(), self._config.optimizer, self._prepared.plan
        groups = [self._prepared.train[member] for member in plan.members(step)]
        pairs = reference.twins(self._prepared, self._config, step)
        baseline, metrics = self._prepared.objective.baseline(pairs, self._validation.logps(pairs, cursor))
        clock("reference")
        means, totals = self._totals(step, cursor, baseline, groups, clock)
        norm, rate = float(np.array(totals.norm)), spec.rate(step, plan.steps)
        if not (math.isfinite(totals.loss) and math.isfinite(norm)):
            self._skip(step, cursor, groups, totals.loss, norm)
            return totals.stopping, {}
        cursor.skipped = 0
        clock("optimizer")
        measured = Measured(self._net, means) if due(self._config.loop, step + 1, plan.steps) else None
        clock("other")
        if spec.max_norm is not None:
            means = optimizer.clip(means, totals.norm, spec.max_norm)
        (measured.apply if measured else optimizer.apply)(self._optimizer, self._net, means, rate)
        clock("optimizer")
        metrics |= self._prepared.objective.metrics(groups, totals.logps)
        mixed_loss, mixed_units = self._mixed(groups, totals.logps, baseline)
        further = (measured.event(step + 1),) if measured else ()
        padding, memory = self.accumulation.padding(step, cursor), backend.memory()
        clock("other")
        self._emit(
            events.StepDone(
                step + 1,
                (step + 1) / plan.steps_per_epoch,
                totals.loss,
                totals.units,
                sum(group.tokens for group in groups),
                rate,
                norm,
                spec.max_norm is not None and norm > spec.max_norm,
                sum(clock.seconds.values()),
                memory,
                self.accumulation.shapes,
                sum(group.n_learned for group in groups),
                metrics,
                padding,
                clock.seconds,
                mixed_loss,
                mixed_units,
            )
        )
        epoch = step // plan.steps_per_epoch + 1
        for event in (row_losses(step + 1, epoch, groups, totals.logps), *further):
            self._emit(event)
        return totals.stopping, metrics

    def _mixed(
        self, groups: Sequence[Group], logps: np.ndarray, baseline: float
    ) -> tuple[float | None, float]:
        """(loss, units) of the rows of ``data.mix`` alone; loss is None if there are none. logps (S,): of all
        sequences of ``groups``."""
        objective, members = self._prepared.objective, [group for group in groups if group.mixed]
        if not members:
            return None, 0.0
        chosen = np.array([group.mixed for group in groups for _ in group.sequences])
        fields = mx.array(objective.fields(members, baseline), mx.float32)
        losses = objective.losses(mx.array(logps[chosen], mx.float32), fields)
        units = sum(objective.units(group) for group in members)
        return float(np.array(losses, dtype=np.float64).sum()) / units, units

    def _totals(
        self, step: int, cursor: Cursor, baseline: float, groups: Sequence[Group], clock: Stages
    ) -> tuple[dict, Totals]:
        """Mean gradients and totals: sums over micro-batches and ranks, divided by the units once."""
        units = sum(self._prepared.objective.units(group) for group in groups)
        before = cursor.tokens
        loss, sums, logps = self.accumulation.sums(step, cursor, baseline)
        clock("gradients")
        budgets = mx.array(
            [float(cursor.tokens or 0) * (rank == self._ranks.rank) for rank in range(self._ranks.size)]
        )
        # Each log-probability comes from one rank, unrounded.
        loss, stop, budgets, logps, sums = self._ranks.total(
            [loss, mx.array(float(self._stop.is_set())), budgets, mx.array(logps, mx.float32), sums]
        )
        clock("reduce")
        cursor.tokens = min((int(tokens) for tokens in np.array(budgets) if tokens), default=None)
        if cursor.tokens != before:
            limit = f"from step {step + 1} on, at most {cursor.tokens} tokens at once"
            hint = f"for the next run: batch.tokens={cursor.tokens}"
            self._emit(Notice(f"the device ran out of memory: {limit}", level="warning", hint=hint))
        means = tree_map(lambda leaf: leaf / units, sums)
        del sums
        norm = optimizer.global_norm(means)
        mx.eval(loss, means, norm)
        rows = np.array(logps, dtype=np.float64)
        return means, Totals(float(np.array(loss)) / units, norm, units, rows, bool(np.array(stop)))

    def _skip(self, step: int, cursor: Cursor, groups: Sequence[Group], loss: float, norm: float) -> None:
        """Count an update that is not finite. Raises Diverged after SKIPS_BEFORE_STOP in a row."""
        cursor.skipped += 1
        rows = [group.source for group in groups]
        self._emit(events.StepSkipped(step + 1, str(loss), str(norm), rows, cursor.skipped))
        if cursor.skipped >= SKIPS_BEFORE_STOP:
            raise Diverged(
                f"{cursor.skipped} updates in a row were not finite (loss {loss}, gradient norm {norm})",
                where=", ".join(rows),
                hint="look at these rows with `tunesmith show`; else lower optimizer.learning_rate",
            )
