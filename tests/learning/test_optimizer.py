"""Schedule, refusals, weight decay on matrices only, and a state that comes back."""

from __future__ import annotations

import math

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten, tree_map, tree_unflatten
from pydantic import ValidationError

from tunesmith.learning import optimizer
from tunesmith.learning.optimizer import OptimizerSpec

KINDS = ("adamw", "adam", "adamax", "adagrad", "adadelta", "rmsprop", "adafactor", "lion", "sgd", "muon")


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = [nn.Linear(3, 4), nn.Linear(4, 2)]
        self.layers[0].freeze()
        self.norm = nn.RMSNorm(2)


def net() -> Net:
    built = Net()
    built.update(tree_map(lambda p: mx.ones(p.shape), built.parameters()))
    return built


def steps(state, model, count, start=0):
    for step in range(start, start + count):
        gradients = tree_map(lambda p, step=step: mx.cos(p * (step + 1)), model.trainable_parameters())
        optimizer.apply(state, model, gradients, 1e-2)


@pytest.mark.parametrize("kind", KINDS)
def test_state_restored_into_a_fresh_optimizer_goes_on_the_same(kind):
    spec = OptimizerSpec(
        kind=kind, weight_decay=0.1 if kind in ("adamw", "adafactor", "lion", "sgd", "muon") else None
    )
    straight, model = optimizer.build(spec, net := Net()), net
    model.update(tree_map(lambda p: mx.ones(p.shape), model.parameters()))
    steps(straight, model, 3)
    saved, weights = optimizer.state(straight), dict(tree_flatten(model.parameters()))
    other = Net()
    other.update(tree_map(mx.array, tree_unflatten(list(weights.items()))))
    fresh = optimizer.build(spec, other)
    optimizer.restore(fresh, saved)
    steps(straight, model, 2, 3)
    steps(fresh, other, 2, 3)
    for (name, a), (_, b) in zip(*(tree_flatten(m.parameters()) for m in (model, other)), strict=True):
        assert np.array_equal(np.array(a), np.array(b)), name
    assert mx.array_equal(model.layers[0].weight, mx.ones((4, 3))), "a frozen tensor moved"
    with pytest.raises(KeyError, match="extra"):
        optimizer.restore(fresh, saved | {"extra": np.zeros(1)})


def test_weight_decay_falls_on_matrices_only():
    model = net()
    state = optimizer.build(OptimizerSpec(weight_decay=0.5), model)
    optimizer.apply(state, model, tree_map(mx.zeros_like, model.trainable_parameters()), 0.1)
    assert model.layers[1].weight[0, 0].item() == pytest.approx(0.95)
    assert model.layers[1].bias[0].item() == model.norm.weight[0].item() == 1.0


def test_schedules_start_peak_and_end_where_they_should():
    cosine = OptimizerSpec(learning_rate=1.0, warmup_steps=4, final_share=0.1)
    assert [cosine.rate(step, 20) for step in (0, 1, 3, 4)] == [0.25, 0.5, 1.0, 1.0]
    assert cosine.rate(12, 20) == pytest.approx(0.55) and cosine.rate(20, 20) == pytest.approx(0.1)
    linear = OptimizerSpec(learning_rate=1.0, schedule="linear", warmup_share=0.2)
    assert linear.warmup(10) == 2 and linear.rate(6, 10) == pytest.approx(0.5)
    assert OptimizerSpec(learning_rate=0.3, schedule="constant").rate(99, 100) == 0.3
    assert all(math.isfinite(cosine.rate(step, 1)) for step in range(3))


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"kind": "sgd", "betas": (0.9, 0.99)}, "sgd takes no betas"),
        ({"kind": "adam", "weight_decay": 0.1}, "adam takes no weight_decay"),
        ({"warmup_steps": 1, "warmup_share": 0.1}, "both given"),
        ({"learning_rate": 0.0}, "greater than 0"),
    ],
)
def test_an_option_that_would_be_ignored_is_refused(settings, told):
    with pytest.raises(ValidationError, match=told):
        OptimizerSpec(**settings)
