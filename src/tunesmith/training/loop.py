"""The loop: updates, validations, samples and checkpoints, until the plan ends.

State is arithmetic: the order of rows and every dropout mask are functions of (seed, step). A checkpoint is
thus the adapter, the optimizer and a small cursor, and a resumed run ends in the same bytes as one that was
never stopped."""

from __future__ import annotations

import math
import tempfile
import threading
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_map

from tunesmith import events
from tunesmith.errors import Diverged, OutOfMemory, TunesmithError
from tunesmith.events import Notice, Sink
from tunesmith.learning import optimizer
from tunesmith.machine import backend
from tunesmith.machine.ranks import ONE, Ranks
from tunesmith.runs.checkpoints import Cursor
from tunesmith.runs.config import SKIPS_BEFORE_STOP, RunConfig
from tunesmith.runs.directory import FROZEN, Run
from tunesmith.tokens.batches import Group
from tunesmith.training import gradients, reference, saving
from tunesmith.training.caution import Watch
from tunesmith.training.frozen import Lower
from tunesmith.training.gradients import Accumulation, Gradients
from tunesmith.training.instruments import Grown, Measured, Stages, activations, due, row_losses
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


@dataclass
class Loop:
    """One run in progress: what the steps share."""

    run: Run | None  # None on ranks that do not write
    config: RunConfig
    net: nn.Module
    optimizer: Any
    prepared: Prepared
    emit: Sink
    stop: threading.Event
    ranks: Ranks = ONE
    lower: Lower | None = None

    def __post_init__(self) -> None:
        self.grown, self.watch = Grown(self.net), Watch(self.prepared.objective.needs_reference)
        self.validation = Validation(self.net, self.config, self.prepared, self.ranks, self.emit)

    @property
    def hint(self) -> str:
        return self.run.hint if self.run else "start all ranks again with --resume"

    def finish(self, cursor: Cursor) -> None:
        """Train from ``cursor`` to the end of the plan, an early stop or an interruption; then save."""
        started = time.perf_counter() - cursor.elapsed_s
        status, reason = "failed", None
        try:
            with gradients.checkpointed(self.net) if self.config.loop.checkpoint_gradients else ExitStack():
                status, reason = self._fit(cursor, started)
        except TunesmithError as error:
            reason = error.what
            raise
        except KeyboardInterrupt:
            status, reason = "interrupted", f"at once, before the step was finished; go on with: {self.hint}"
            raise
        except (RuntimeError, MemoryError) as error:
            reason = f"{type(error).__name__}: {error}"
            if not backend.is_out_of_memory(error):
                raise
            raise OutOfMemory(
                f"the device ran out of memory: {error}",
                where=f"after step {cursor.step}",
                hint=f"lower batch.tokens or loop.sample_tokens, in a new run; or try: {self.hint}",
            ) from error
        finally:
            self.emit(events.RunEnded(status, cursor.step, time.perf_counter() - started, reason))
            if self.lower and (not self.ranks.writes or status in ("completed", "stopped_early")):
                self.lower.close()
            if self.run and self.ranks.writes:
                self.run.mark(status)

    def _fit(self, cursor: Cursor, started: float) -> tuple[str, str | None]:
        """(status, reason) after the last update. Every save holds the cursor of its update."""
        spec, plan = self.config.loop, self.prepared.plan
        accumulation = self.accumulation()
        accumulation.probe(cursor)
        if cursor.step == 0:
            self._validate(cursor)
            self.validation.sample(0)
        if ended := self._stopped_early(cursor):  # the process died between the last save and the end
            return ended
        for step in range(cursor.step, plan.steps):
            stopping = self.update(step, cursor, accumulation)
            cursor.step = done = step + 1
            cursor.elapsed_s = time.perf_counter() - started
            last = done == plan.steps
            best = False
            if last or (spec.validate_every and done % spec.validate_every == 0):
                best = self._validate(cursor)
            ended = self._stopped_early(cursor)
            stopping = stopping or (self.ranks.size == 1 and self.stop.is_set())
            if last or ended or (spec.sample_every and done % spec.sample_every == 0):
                self.validation.sample(done)
            due = spec.save_every and done % spec.save_every == 0
            if last or ended or due or (best and spec.keep_best is not False) or stopping:
                self._save(cursor)
            if ended:
                return ended
            if stopping and not last:
                return "interrupted", f"go on with: {self.hint}"
        return "completed", None

    def accumulation(self) -> Accumulation:
        """The source of an update's sums, with the frozen layers' hidden states cached on disk if asked."""
        config, rows, plan, ranks = self.config, self.prepared.train, self.prepared.plan, self.ranks
        if config.loop.cache_frozen:
            shared = self.run.path / FROZEN if self.run and ranks.writes else None
            self.lower = Lower(self.net, shared or Path(tempfile.mkdtemp(prefix="tunesmith-")))
            size = self.lower.open(rows) / 1e9
            layers = f"{self.lower.depth} layers below the adapter"
            text = f"the hidden states of the {layers} are cached on disk: {size:.2f} GB"
            self.emit(Notice(text))
        frequent = (
            gradients.frequent_shapes(plan, rows, ranks.rank, ranks.size) if plan.cut.bucket else frozenset()
        )
        gradients_of = Gradients(self.net, config, frequent, self.lower, self.prepared.objective)
        return Accumulation(gradients_of, self.net, rows, plan, config, ranks, self.emit)

    def update(self, step: int, cursor: Cursor, accumulation: Accumulation) -> bool:
        """Make one optimizer update, or skip it if it is not finite. True if any rank was asked to stop."""
        clock, spec, plan = Stages(), self.config.optimizer, self.prepared.plan
        groups = [self.prepared.train[member] for member in plan.members(step)]
        pairs = reference.twins(self.prepared, self.config, step)
        baseline, metrics = reference.baseline(pairs, self.validation.logps(pairs, cursor))
        clock("reference")
        means, totals = self._totals(step, cursor, accumulation, baseline, groups, clock)
        norm, rate = float(np.array(totals.norm)), spec.rate(step, plan.steps)
        if not (math.isfinite(totals.loss) and math.isfinite(norm)):
            self._skip(step, cursor, groups, totals.loss, norm)
            return totals.stopping
        cursor.skipped = 0
        clock("optimizer")
        measured = Measured(self.net, means) if due(self.config.loop, step + 1, plan.steps) else None
        clock("other")
        if spec.max_norm is not None:
            means = optimizer.clip(means, totals.norm, spec.max_norm)
        (measured.apply if measured else optimizer.apply)(self.optimizer, self.net, means, rate)
        clock("optimizer")
        metrics |= self.prepared.objective.metrics(groups, totals.logps)
        further = (measured.event(step + 1),) if measured else ()
        padding, memory = accumulation.padding(step, cursor), backend.memory()
        clock("other")
        self.emit(
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
                accumulation.shapes,
                sum(group.units for group in groups),
                metrics,
                padding,
                clock.seconds,
            )
        )
        epoch = step // plan.steps_per_epoch + 1
        for event in (row_losses(step + 1, epoch, groups, totals.logps), *further):
            self.emit(event)
        self.watch.step(metrics, self.emit)
        return totals.stopping

    def _totals(
        self,
        step: int,
        cursor: Cursor,
        accumulation: Accumulation,
        baseline: float,
        groups: Sequence[Group],
        clock: Stages,
    ) -> tuple[dict, Totals]:
        """Mean gradients and totals: sums over micro-batches and ranks, divided by the units once."""
        units = sum(self.prepared.objective.units(group) for group in groups)
        before = cursor.tokens
        loss, sums, logps = accumulation.sums(step, cursor, baseline)
        clock("gradients")
        budgets = mx.array(
            [float(cursor.tokens or 0) * (rank == self.ranks.rank) for rank in range(self.ranks.size)]
        )
        # Each log-probability comes from one rank, unrounded.
        loss, stop, budgets, logps, sums = self.ranks.total(
            [loss, mx.array(float(self.stop.is_set())), budgets, mx.array(logps, mx.float32), sums]
        )
        clock("reduce")
        cursor.tokens = min((int(tokens) for tokens in np.array(budgets) if tokens), default=None)
        if cursor.tokens != before:
            limit = f"from step {step + 1} on, at most {cursor.tokens} tokens at once"
            hint = f"for the next run: batch.tokens={cursor.tokens}"
            self.emit(Notice(f"the device ran out of memory: {limit}", level="warning", hint=hint))
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
        self.emit(events.StepSkipped(step + 1, str(loss), str(norm), rows, cursor.skipped))
        if cursor.skipped >= SKIPS_BEFORE_STOP:
            raise Diverged(
                f"{cursor.skipped} updates in a row were not finite (loss {loss}, gradient norm {norm})",
                where=", ".join(rows),
                hint="look at these rows with `tunesmith show`; else lower optimizer.learning_rate",
            )

    def _stopped_early(self, cursor: Cursor) -> tuple[str, str] | None:
        patience = self.config.loop.early_stop
        if patience is None or cursor.stale < patience:
            return None
        return "stopped_early", f"no better validation {self.config.loop.best} in {cursor.stale} validations"

    def _validate(self, cursor: Cursor) -> bool:
        """Validate on the held-out rows, if any, and measure the weights. True if it is the best so far."""
        best = False
        if self.prepared.valid:
            validated = self.validation.held_out(cursor)
            self.emit(validated)
            self.watch.validation(validated.metrics, self.emit)
            best = validated.best
        if self.ranks.writes:
            self.emit(self.grown.event(cursor.step))
            if self.config.loop.activations:
                self.emit(activations(self.net, self.prepared.valid or self.prepared.train, cursor.step))
        return best

    def _save(self, cursor: Cursor) -> None:
        if self.run is None or not self.ranks.writes:
            return
        start = time.perf_counter()
        size = saving.save(self.run, self.config, self.net, self.optimizer, cursor)
        path = self.run.checkpoint(cursor.step)
        self.emit(events.Saved(cursor.step, str(path), size, time.perf_counter() - start))
