"""transformers and PEFT on torch load what is exported and give the logits of the live adapter, to 1e-5."""

from __future__ import annotations

from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

import tiny
import tunesmith
from tunesmith.runs import opening

pytestmark = [pytest.mark.parity, pytest.mark.filterwarnings("ignore")]

IDS = [[5, 9, 33, 2, 8, 7, 60, 21]]


def trained(folder: Path, model: Path, *sets: str) -> Path:
    rows = tiny.write_rows(folder / "rows.jsonl", tiny.conversations(24))
    quick = ["loop.steps=10", "adapter.rank=4", "optimizer.learning_rate=0.01", "adapter.targets=all-linear"]
    config = tunesmith.configure(model=str(model), data=[str(rows)], sets=[*quick, *sets])
    tunesmith.train(config, out=folder / "run")
    return folder / "run"


def live(run: Path) -> np.ndarray:
    opened = opening.find(run).open()
    opened.attach()
    return np.array(opened.loaded.net(mx.array(IDS)))


def of_torch(model) -> np.ndarray:
    import torch

    with torch.no_grad():
        return model.eval()(torch.tensor(IDS)).logits.numpy()


def close(logits: np.ndarray, expected: np.ndarray) -> bool:
    return bool(np.abs(logits - expected).max() < 1e-5 * np.abs(expected).max())


def test_transformers_loads_a_merged_model(tmp_path, tiny_model):
    from transformers import AutoModelForCausalLM, GenerationConfig

    run = trained(tmp_path, tiny_model)
    out = tunesmith.export(run, to="hf", rows=2).path
    assert close(of_torch(AutoModelForCausalLM.from_pretrained(out)), live(run))
    assert GenerationConfig.from_pretrained(out).eos_token_id == [2]


@pytest.mark.parametrize(
    "setting", ["adapter.kind=lora", "adapter.kind=dora", "adapter.rank_stabilised=true"]
)
def test_peft_loads_an_adapter(setting, tmp_path, tiny_model):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    run = trained(tmp_path, tiny_model, setting)
    out = tunesmith.export(run, to="peft", rows=2).path
    base = AutoModelForCausalLM.from_pretrained(tiny_model)
    plain = of_torch(base)
    assert not close(plain, live(run))
    assert close(of_torch(PeftModel.from_pretrained(base, out)), live(run))
