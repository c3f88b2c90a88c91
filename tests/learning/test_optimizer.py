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


@pytest.mark.parametrize(
    ("kind", "option"),
    [
        ("adamw", {"betas": (0.9, 0.98)}),
        ("adamw", {"betas": (0.8, 0.999)}),
        ("adamw", {"weight_decay": 0.01}),
        ("adamw", {"eps": 1e-3}),
        ("lion", {"betas": (0.5, 0.99)}),
        ("sgd", {"momentum": 0.9}),
        ("muon", {"weight_decay": 0.1}),
    ],
)
def test_every_option_has_an_effect(kind, option):
    random = np.random.default_rng(0)
    start = net()
    start.update(tree_map(lambda p: mx.array(random.normal(size=p.shape), mx.float32), start.parameters()))
    moved: list[np.ndarray] = []
    for options in ({}, option):
        model = net()
        model.update(tree_map(mx.array, start.parameters()))
        steps(optimizer.build(OptimizerSpec(kind=kind, **options), model), model, 12)
        moved.append(np.array(model.layers[1].weight))
    assert np.abs(moved[0] - moved[1]).max() > 1e-5


def test_betas_and_decay_are_those_of_adamw_by_hand():
    """Loshchilov and Hutter, algorithm 2, with the blueprint's betas and decay, over three updates."""
    first, second, decay, rate, eps = 0.9, 0.98, 0.01, 1e-2, 1e-8
    model = net()
    state = optimizer.build(OptimizerSpec(betas=(first, second), weight_decay=decay), model)
    weight, m, v = 1.0, 0.0, 0.0
    for step in range(3):
        gradient = math.cos(weight * (step + 1))
        steps(state, model, 1, step)
        m = first * m + (1 - first) * gradient
        v = second * v + (1 - second) * gradient**2
        mean, square = m / (1 - first ** (step + 1)), v / (1 - second ** (step + 1))
        weight = weight * (1 - rate * decay) - rate * mean / (math.sqrt(square) + eps)
    assert model.layers[1].weight[0, 0].item() == pytest.approx(weight, rel=1e-5)


@pytest.mark.parametrize("dtype", [mx.bfloat16, mx.float16])
def test_a_16_bit_weight_is_the_rounded_float32_update(dtype):
    """The moments are those of float32, and the weight is rounded after each update."""
    model = net()
    model.layers[1].weight = model.layers[1].weight.astype(dtype)
    state = optimizer.build(OptimizerSpec(), model)
    weight, m, v = 1.0, 0.0, 0.0
    for step in range(3):
        gradient = 0.3 + 0.1 * step
        gradients = tree_map(lambda p, g=gradient: mx.full(p.shape, g), model.trainable_parameters())
        optimizer.apply(state, model, gradients, 0.05)
        m, v = 0.9 * m + 0.1 * gradient, 0.999 * v + 0.001 * gradient**2
        change = m / (1 - 0.9 ** (step + 1)) / (math.sqrt(v / (1 - 0.999 ** (step + 1))) + 1e-8)
        weight = mx.array(weight - 0.05 * change).astype(dtype).item()
    assert model.layers[1].weight.dtype == dtype
    assert model.layers[1].weight[0, 0].item() == pytest.approx(weight, rel=1e-6)
    moments = [value for value in optimizer.state(state).values() if value.shape == (2, 4)]
    assert len(moments) == 2 and {value.dtype for value in moments} == {np.dtype(np.float32)}
