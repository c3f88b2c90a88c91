"""In multimodal wrappers the text model is found, and all that is done with a plain model can be done."""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten
from model.families import FAMILIES, WRAPPERS, made, moved

from tunesmith.adapters import LoRA
from tunesmith.model import abilities, bodies, logprobs
from tunesmith.tokens.batches import Batch, Group, collate
from tunesmith.tokens.template import Tokens


def batch(*lengths: int) -> Batch:
    random = np.random.Generator(np.random.PCG64(1))
    rows = [Tokens(random.integers(0, 96, n).astype(np.int32), np.ones(n, np.float32)) for n in lengths]
    return collate([Group((row,), "") for row in rows])


def gradients(net: nn.Module, gather: bool) -> dict[str, mx.array]:
    """Of the sum of log-probabilities of two rows."""
    rows = batch(9, 14)

    def total(weights: dict) -> mx.array:
        net.update(weights)
        return logprobs.learned_logprobs(net, rows, gather=gather).sum()

    slopes = mx.grad(total)(net.trainable_parameters())
    return dict(tree_flatten(slopes))


@pytest.mark.parametrize("name", WRAPPERS)
def test_the_text_model_in_a_wrapper_is_found_and_its_head_split(name):
    net = made(name)
    text = bodies.text_model(net)
    assert text is net.language_model and bodies.body(net) is text.model
    assert bodies.block_prefixes(net) == ("model.layers.",)
    assert abilities.splits(net)


@pytest.mark.parametrize("name", FAMILIES)
def test_the_head_of_every_family_is_split(name):
    assert abilities.splits(made(name))


@pytest.mark.parametrize("name", ["mistral3", "qwen3_vl", "gemma3", "gemma4", "llama4"])
@pytest.mark.parametrize("targets", ["all-linear", ("v_proj", "lm_head")])
def test_gradients_with_a_split_head_are_those_of_all_logits(name, targets):
    if "lm_head" in targets and "lm_head" not in bodies.text_model(made(name)):
        pytest.skip("the head is tied")
    net = made(name)
    attached = LoRA(rank=1, targets=targets).attach(net, 0)
    net.update(moved(net.trainable_parameters()))
    net.train()
    split, whole = gradients(net, gather=True), gradients(net, gather=False)
    assert split.keys() == whole.keys() and len(split) == len(attached.tensors)
    for tensor, slope in whole.items():
        assert mx.abs(split[tensor] - slope).max() <= 1e-3 * mx.abs(slope).max(), tensor
