"""The sums of an update over its micro-batches hold one set of gradients."""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from tunesmith import events
from tunesmith.machine.ranks import ONE
from tunesmith.runs.checkpoints import Cursor
from tunesmith.runs.config import RunConfig
from tunesmith.tokens.batches import Cut, Group, Plan
from tunesmith.tokens.template import Tokens
from tunesmith.training.gradients import Accumulation, Gradients

SIZE = 1 << 22


class Constant(Gradients):
    """Gradients of one array of ``SIZE`` numbers. ``held``: bytes of all arrays when each is asked for."""

    def __init__(self) -> None:
        self.held: list[int] = []
        self.before = mx.get_active_memory()

    def __call__(self, groups, key, baseline=0.0):
        mx.synchronize()  # the last sum is computed
        self.held.append(mx.get_active_memory() - self.before)
        return (mx.array(1.0), mx.zeros(len(groups))), {"weight": mx.full((SIZE,), 2.0)}


def test_the_gradients_of_a_micro_batch_are_freed_before_those_of_the_next():
    rows = [Group((Tokens(np.arange(5, dtype=np.int32), np.ones(5, np.float32)),), "")] * 4
    config = RunConfig.model_validate({"model": {"path": "m"}, "data": {"train": ("rows",)}})
    plan = Plan((4,) * 4, 4, Cut(4), seed=0)
    gradients_of = Constant()
    sums = Accumulation(gradients_of, nn.Linear(2, 2), rows, plan, config, ONE, events.silent)
    loss, total, logps = sums.sums(0, Cursor())
    assert loss.item() == 4 and logps.shape == (4,)
    assert total["weight"][0].item() == 8
    assert len(gradients_of.held) == 4
    assert max(gradients_of.held) < 1.5 * 4 * SIZE
