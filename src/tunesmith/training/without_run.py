"""Optimizer updates one at a time, as a run makes them but without a run directory; for ``doctor`` and the
benchmarks."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import mlx.nn as nn

from tunesmith import events
from tunesmith.errors import TrainingError
from tunesmith.events import Event, StepDone
from tunesmith.learning import optimizer
from tunesmith.machine import backend
from tunesmith.machine.ranks import ONE
from tunesmith.model import vocabulary
from tunesmith.model.loading import evaluating
from tunesmith.runs.checkpoints import Cursor
from tunesmith.runs.config import RunConfig
from tunesmith.tokens.batches import Cut, Group, Plan
from tunesmith.training import frozen, gradients
from tunesmith.training.preparation import Prepared
from tunesmith.training.updates import Updates


class UpdatesWithoutRun:
    """Each call makes the next update over ``rows`` and returns its event, with loss and seconds. Raises
    TrainingError if the update is not finite, and on creation ModelError for an id that the model does not
    know.

    net: with its adapter attached. ``plan``: which rows an update learns, in which micro-batches."""

    def __init__(self, net: nn.Module, config: RunConfig, rows: Sequence[Group]) -> None:
        with evaluating(net):  # no dropout, which has no key yet
            vocabulary.require_rows(net, rows)
        lengths = tuple(group.length for group in rows)
        cut = Cut.of(config.batch, lengths, backend.setup().kind == "gpu")
        spec = config.loop
        distilled = tuple(row.distilled for row in rows) if any(row.distilled for row in rows) else ()
        self.plan = Plan(
            lengths, config.batch.sequences, cut, spec.seed, max_steps=spec.steps, distilled=distilled
        )
        self._net, self._recomputed = net, spec.checkpoint_gradients
        self._events: list[Event] = []
        nobody: Any = None  # neither samples nor validation rows are rendered
        prepared = Prepared(
            objective=config.objective,
            renderer=nobody,
            valid_examples=[],
            held_out=[],
            train=list(rows),
            valid=[],
            plan=self.plan,
            dropped=[],
            counts={},
            hashes={},
            rendered=[],
        )
        state, emit = optimizer.build(config.optimizer, net), self._events.append
        lower = frozen.opened(net, prepared.train, None, emit) if config.loop.cache_frozen else None
        self._updates = Updates(net, config, prepared, state, emit, threading.Event(), ONE, lower)
        self._cursor = Cursor()

    def __call__(self) -> StepDone:
        self._events.clear()
        with gradients.checkpointed(self._net) if self._recomputed else nullcontext():
            self._updates.make(self._cursor.step, self._cursor)
        self._cursor.step += 1
        for event in self._events:
            if isinstance(event, events.StepDone):
                return event
            if isinstance(event, events.StepSkipped):
                message = f"the update is not finite: loss {event.loss}, gradient norm {event.gradient_norm}"
                raise TrainingError(
                    message, where=", ".join(event.rows), hint="lower optimizer.learning_rate"
                )
        raise AssertionError("an update ends with one of the two events")
