"""The loop: updates, validations, samples and checkpoints, until the plan ends.

State is arithmetic: the order of rows and every dropout mask are functions of (seed, step). A checkpoint is
thus the adapter, the optimizer and a small cursor, and a resumed run ends in the same bytes as one that was
never stopped."""

from __future__ import annotations

import math
import threading
import time
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import mlx.nn as nn

from tunesmith import events
from tunesmith.errors import TrainingError
from tunesmith.events import Sink
from tunesmith.machine.ranks import Ranks
from tunesmith.runs import checkpoints
from tunesmith.runs.checkpoints import Cursor
from tunesmith.runs.config import RunConfig
from tunesmith.runs.directory import FROZEN, Run
from tunesmith.training import frozen, gradients, saving
from tunesmith.training.caution import Watch
from tunesmith.training.instruments import Grown, activations
from tunesmith.training.interruption import Ending, explained
from tunesmith.training.preparation import Prepared
from tunesmith.training.updates import Updates
from tunesmith.training.validation import Validation


@dataclass
class Loop:
    """One run in progress: what the steps share."""

    run: Run | None  # None on all ranks but the first
    config: RunConfig
    net: nn.Module
    optimizer: Any
    prepared: Prepared
    emit: Sink
    stop: threading.Event
    ranks: Ranks

    def __post_init__(self) -> None:
        self.grown, self.watch = Grown(self.net), Watch(self.prepared.objective.needs_reference)
        self.validation = Validation(self.net, self.config, self.prepared, self.ranks, self.emit)
        self.cache: frozen.Lower | None = None

    @property
    def hint(self) -> str:
        return self.run.hint if self.run else "start all ranks again with --resume"

    def finish(self, cursor: Cursor) -> None:
        """Train from ``cursor`` to the end of the plan, an early stop or an interruption; then save."""
        started = time.perf_counter() - cursor.elapsed_s
        recomputing = (
            gradients.checkpointed(self.net) if self.config.loop.checkpoint_gradients else nullcontext()
        )
        ending = Ending()
        try:
            with explained(ending, cursor, self.hint), recomputing:
                ending.status, ending.reason = self._fit(cursor, started)
        finally:
            seconds = time.perf_counter() - started
            self.emit(events.RunEnded(ending.status, cursor.step, seconds, ending.reason))
            if self.cache and ending.status in ("completed", "stopped_early"):
                self.cache.close()
            if self.run:
                self.run.mark(ending.status)

    def _fit(self, cursor: Cursor, started: float) -> tuple[str, str | None]:
        """(status, reason) after the last update. Every save holds the cursor of its update."""
        spec, plan = self.config.loop, self.prepared.plan
        updates = self._updates()
        updates.accumulation.probe(cursor)
        if cursor.step == 0:
            self._validate(cursor)
            self.validation.sample(0)
        ended = self._stopped_early(cursor)
        if ended or cursor.step == plan.steps:  # the process died between the last save and the end
            if self.run:
                checkpoints.retain(self.run, cursor, spec)
            return ended or ("completed", None)
        for step in range(cursor.step, plan.steps):
            stopping, metrics = updates.make(step, cursor)
            self.watch.step(metrics, self.emit)
            cursor.step = done = step + 1
            cursor.elapsed_s = time.perf_counter() - started
            last = done == plan.steps
            best = False
            if last or (spec.validate_every and done % spec.validate_every == 0):
                best = self._validate(cursor)
            ended = self._stopped_early(cursor)
            stopping = stopping or (self.ranks.size == 1 and self.stop.is_set())
            due = bool(last or ended or (spec.save_every and done % spec.save_every == 0))
            due |= best and spec.keep_best is not False
            if last or ended or (spec.sample_every and done % spec.sample_every == 0):
                self.validation.sample(done)
            elif due:
                self.validation.sample_own(done)
            if due or stopping:
                self._save(cursor)
            if ended:
                return ended
            if stopping and not last:
                return "interrupted", f"go on with: {self.hint}"
        return "completed", None

    def _updates(self) -> Updates:
        """The updates of the plan, with the frozen layers' hidden states cached on disk if asked."""
        if self.config.loop.cache_frozen:
            folder = self.run.path / FROZEN if self.run else None
            self.cache = frozen.opened(self.net, self.prepared.train, folder, self.emit)
        return Updates(
            self.net, self.config, self.prepared, self.optimizer, self.emit, self.stop, self.ranks, self.cache
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
            if cursor.step == 0 and not math.isfinite(validated.loss):
                message = f"the loss of the held-out rows is {validated.loss} before the first update"
                hint = (
                    "all weights of the base are finite: in half precision a product may have overflowed "
                    "(try model.dtype=float32), or the adapter of adapter.start is not finite"
                )
                raise TrainingError(message, where="model.dtype", hint=hint)
            self.watch.validation(validated.metrics, self.emit)
            best = validated.best
        if self.run:
            self.emit(self.grown.event(cursor.step))
            if self.config.loop.activations:
                self.emit(activations(self.net, self.prepared.valid or self.prepared.train, cursor.step))
        return best

    def _save(self, cursor: Cursor) -> None:
        if self.run is None:
            return
        start = time.perf_counter()
        size = saving.save(self.run, self.config, self.net, self.optimizer, cursor)
        path = self.run.checkpoint(cursor.step)
        self.emit(events.Saved(cursor.step, str(path), size, time.perf_counter() - start))
