"""Gradients with recomputed layers are those without, also where layers take more than hidden states."""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten
from model.families import SIZES, made

from tunesmith import adapters
from tunesmith.training import gradients

IDS = mx.array([[3, 1, 4, 1, 5, 9, 2, 6], [2, 7, 1, 8, 2, 8, 1, 8]])
SHARED = {
    "num_kv_shared_layers": 2,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
    "hidden_size_per_layer_input": 8,
    "vocab_size_per_layer_input": SIZES["vocab_size"],
}


def slopes(net: nn.Module) -> dict[str, np.ndarray]:
    def loss(net: nn.Module) -> mx.array:
        return nn.losses.cross_entropy(net(IDS)[:, :-1], IDS[:, 1:], reduction="sum")

    return {name: np.array(value) for name, value in tree_flatten(nn.value_and_grad(net, loss)(net)[1])}


@pytest.mark.parametrize("targets", ["*.v_proj", "embed_tokens_per_layer", "*"])
def test_keys_values_and_layer_inputs_get_their_gradient(targets):
    """Gemma 4: the last layers take keys and values of earlier ones, and each layer rows of a second
    embedding."""
    net = made("gemma4", **SHARED)
    adapters.Full(targets=(targets,)).attach(net, 0)
    net.train()
    plain = slopes(net)
    with gradients.checkpointed(net):
        recomputed = slopes(net)
    assert plain.keys() == recomputed.keys() and max(np.abs(value).max() for value in plain.values()) > 0
    for name, value in plain.items():
        np.testing.assert_allclose(recomputed[name], value, atol=1e-5 * np.abs(value).max(), err_msg=name)


class Named(nn.Module):
    """A block that its model calls by the names of all arguments, as GPT-J does."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(4, 4)

    def __call__(self, hidden_states: mx.array, scale: float) -> mx.array:
        return scale * self.inner(hidden_states)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = [Named(), Named()]

    def __call__(self, x: mx.array) -> mx.array:
        for layer in self.layers:
            x = layer(hidden_states=x, scale=2.0)
        return x


def test_layers_that_are_called_by_the_names_of_their_arguments_are_recomputed():
    net, x = Net(), mx.arange(4.0)[None]
    plain = nn.value_and_grad(net, lambda net: net(x).sum())(net)[1]
    with gradients.checkpointed(net):
        recomputed = nn.value_and_grad(net, lambda net: net(x).sum())(net)[1]
    pairs = zip(tree_flatten(plain), tree_flatten(recomputed), strict=True)
    assert all(np.array_equal(value, again) for (_, value), (_, again) in pairs)
