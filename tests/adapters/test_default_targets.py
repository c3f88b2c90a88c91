"""The default targets: q_proj and v_proj where every block has both, else every linear layer."""

from __future__ import annotations

import pytest
from model.families import FAMILIES, WRAPPERS, made

from tunesmith.adapters import DoRA, Full, LoRA
from tunesmith.adapters.specs import blocks_of

HYBRIDS = {"qwen3_5", "lfm2", "nemotron_h", "granitemoehybrid", "recurrent_gemma", "jamba"}
OTHER_NAMES = {"mamba", "phi3"}


@pytest.mark.parametrize("name", [*FAMILIES, *WRAPPERS])
@pytest.mark.parametrize("kind", [LoRA, DoRA])
def test_the_default_reaches_every_block_that_can_be_reached(name, kind):
    net = made(name)
    settled = kind(rank=1).settled(net)
    everywhere = name not in HYBRIDS | OTHER_NAMES
    assert settled.targets == (("q_proj", "v_proj") if everywhere else ("all-linear",))
    tensors = settled.attach(net, 0).tensors
    assert all(any(tensor.startswith(block) for tensor in tensors) for block in blocks_of(net))
    again = made(name)
    assert kind(rank=1).attach(again, 0).tensors == tensors, "attach settles by itself"


def test_named_targets_stay():
    net = made("lfm2")
    assert LoRA(targets="q_proj").settled(net).targets == ("q_proj",)
    assert Full.model_validate({}).settled(net).targets == ("*",)
