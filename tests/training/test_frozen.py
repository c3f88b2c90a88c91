"""The cached hidden states of the frozen layers change no gradient, whatever the architecture: wrappers,
masks and scales that depend on a layer's number, layers that return more than hidden states."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten
from model.families import FAMILIES, WRAPPERS, made, moved

from tunesmith.adapters import Full, LoRA
from tunesmith.runs.config import RunConfig
from tunesmith.tokens.batches import Group
from tunesmith.tokens.template import Tokens
from tunesmith.training import frozen, gradients


def rows(*lengths: int) -> list[Group]:
    random = np.random.Generator(np.random.PCG64(0))
    tokens = [Tokens(random.integers(0, 96, n).astype(np.int32), np.ones(n, np.float32)) for n in lengths]
    return [Group((sequence,), "") for sequence in tokens]


@pytest.mark.parametrize("name", [*WRAPPERS, *FAMILIES])
def test_cached_lower_layers_change_no_gradient(name, tmp_path):
    net, groups, key = made(name), rows(7, 12), mx.random.key(0)
    LoRA(rank=1, targets="all-linear", layers=2).attach(net, 0)
    net.update(moved(net.trainable_parameters()))
    net.train()
    config = RunConfig(model={"path": "x"}, data={"train": "x"})
    expected = gradients.Gradients(net, config)(groups, key)
    lower = frozen.Lower(net, tmp_path / "kept")
    lower.require(groups)
    assert lower.depth == 2
    lower.open(groups)
    for computed in (2, 0):
        lower.computed = 0
        (loss, logps), slopes = gradients.Gradients(net, config, lower=lower)(groups, key)
        mx.eval(loss, logps, slopes)
        assert lower.computed == computed
        assert mx.allclose(logps, expected[0][1], rtol=1e-4)
        plain = dict(tree_flatten(expected[1]))
        for tensor, slope in tree_flatten(slopes):
            assert mx.abs(slope - plain[tensor]).max() <= 1e-3 * mx.abs(plain[tensor]).max()


@pytest.mark.parametrize(("targets", "below"), [("norm", 2), ("embed_tokens", 0)])
def test_what_feeds_the_blocks_must_not_be_trained(targets, below):
    net = made("mistral3")
    Full.model_validate({"targets": [targets, "layers.2.*", "layers.3.*"]}).attach(net, 0)
    assert frozen.depth(net) == below
