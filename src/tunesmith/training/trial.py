"""What do the longest micro-batches need, measured? Two updates on the real model, which are thrown away."""

from __future__ import annotations

import gc
import threading
from collections import defaultdict
from contextlib import nullcontext
from dataclasses import replace

import mlx.core as mx

from tunesmith import events
from tunesmith.errors import TrainingError
from tunesmith.events import Event, Sink, StepDone
from tunesmith.learning import optimizer
from tunesmith.machine.ranks import ONE
from tunesmith.runs.checkpoints import Cursor
from tunesmith.training import gradients
from tunesmith.training.forecast import Calibration, Needs, product_rate
from tunesmith.training.preparation import Prepared
from tunesmith.training.reference import Reference
from tunesmith.training.story import Trainable
from tunesmith.training.updates import Updates


def calibrated(needs: Needs, model: Trainable, notify: Sink = events.silent) -> tuple[Needs, float]:
    """``needs`` corrected by two updates of ``model``, and the rate of products at which they were measured.
    The weights of ``model`` are changed. Raises OutOfMemory, or TrainingError if an update is not finite."""
    rate = product_rate()
    prepared = _with_neutral_reference(needs.prepared)
    state = optimizer.build(needs.config.optimizer, model.net)
    heard: list[Event] = []
    updates = Updates(
        model.net, needs.config, prepared, state, heard.append, threading.Event(), ONE, lower=None
    )
    tick, steps = events.ticker(notify, "updates to measure"), _longest(needs)
    gc.collect()  # what this process held before is not the run's
    mx.eval(state.state)
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    with gradients.checkpointed(model.net) if needs.recomputed else nullcontext():
        for done, step in enumerate(steps, start=1):
            updates.make(step, Cursor())
            tick(done, len(steps))
    last = _last(heard)
    computed_s = needs.step_s(needs.pace(rate), steps[-1])
    computed = max(needs.training_moment.total, needs.stepping_moment.total)
    above = mx.get_peak_memory() - before
    calibration = Calibration(above / computed, last.seconds / computed_s)
    return replace(needs, calibration=calibration), rate


def _longest(needs: Needs) -> list[int]:
    """The two updates with the largest micro-batches; the last is the one to time."""
    sizes = {micro: needs.moment_of(micro).total for update in needs.updates for micro, _ in update}
    largest = [max(sizes[micro] for micro, _ in update) for update in needs.updates]
    steps = sorted(range(len(largest)), key=lambda step: -largest[step])
    return [steps[0], steps[min(1, len(steps) - 1)]]


def _with_neutral_reference(prepared: Prepared) -> Prepared:
    """Log-probabilities of 0 before training, if the objective compares with them: cost does not depend on
    them."""
    if not prepared.objective.needs_reference:
        return prepared
    neutral = Reference("", defaultdict(float))
    return replace(prepared, train=neutral.fill(prepared.train), reference=neutral)


def _last(heard: list[Event]) -> StepDone:
    steps = [event for event in heard if isinstance(event, StepDone)]
    if not steps:
        raise TrainingError("the measured updates are not finite", hint="lower optimizer.learning_rate")
    return steps[-1]
