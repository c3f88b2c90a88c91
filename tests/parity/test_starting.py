"""Adapters that PEFT saved give its logits on torch, merged and before they are trained further."""

from __future__ import annotations

from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

import tiny
from tunesmith.adapters import merging
from tunesmith.model.loading import ModelSpec
from tunesmith.runs.config import RunConfig
from tunesmith.training import preparation, story

pytestmark = [pytest.mark.parity, pytest.mark.filterwarnings("ignore")]

IDS = [[5, 9, 33, 2, 8, 7, 60, 21]]
TARGETS = ["q_proj", "v_proj", "down_proj"]


def saved_by_peft(folder: Path, base: Path, **settings) -> np.ndarray:
    """An adapter with random values; returns the logits of PEFT."""
    import torch
    from peft import LoraConfig, PeftModel, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    config = LoraConfig(**{"r": 4, "lora_alpha": 12, "target_modules": TARGETS} | settings)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), config)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.1 * torch.randn_like(parameter)
    model.save_pretrained(folder)
    again = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), folder).eval()
    with torch.no_grad():
        return again(torch.tensor(IDS)).logits.numpy()


def close(net, expected: np.ndarray) -> bool:
    logits = np.array(net(mx.array(IDS)))
    return bool(np.abs(logits - expected).max() < 1e-5 * np.abs(expected).max())


@pytest.mark.parametrize(
    ("settings", "adapter"),
    [
        ({}, {}),
        ({"use_rslora": True}, {"rank_stabilised": True}),
        ({"use_dora": True}, {"kind": "dora"}),
        ({"layers_to_transform": [1]}, {"layers": 1}),
        ({"modules_to_save": ["input_layernorm"]}, {"full_modules": ["input_layernorm"]}),
        ({"rank_pattern": {"v_proj": 2}, "alpha_pattern": {"layers.1.*down_proj": 1}}, None),
        ({"rank_pattern": {"^model.layers.0.self_attn.q_proj": 8}, "use_rslora": True}, None),
        ({"init_lora_weights": "gaussian", "lora_dropout": 0.1}, {"dropout": 0.1}),
    ],
    ids=lambda value: ",".join(value) if value else "none",
)
def test_peft_and_tunesmith_read_the_same_adapter(settings, adapter, tmp_path, tiny_model):
    expected = saved_by_peft(tmp_path / "peft", tiny_model, **settings)
    spec = ModelSpec(path=str(tiny_model))
    assert not close(merging.load(spec).net, expected)
    folder = str(tmp_path / "peft")
    assert close(merging.load(ModelSpec(path=str(tiny_model), adapter=folder)).net, expected)
    if adapter is None:
        return
    rows = tiny.write_rows(tmp_path / "rows.jsonl", tiny.conversations(12))
    shape = {"rank": 4, "alpha": 12.0, "targets": TARGETS, "start": folder} | adapter
    config = RunConfig(model={"path": str(tiny_model)}, data={"train": str(rows)}, adapter=shape)
    rows = preparation.prepare(config).train
    assert close(story.open_model(config, rows, lambda event: None).net, expected)
