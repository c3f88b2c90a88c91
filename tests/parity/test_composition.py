"""PEFT's ``add_weighted_adapter``, where it is right, gives the same mixture."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

import tiny
import tunesmith
from tunesmith.adapters import composition
from tunesmith.adapters.layers import adapted, dense
from tunesmith.runs import opening

pytestmark = [pytest.mark.parity, pytest.mark.filterwarnings("ignore")]


def trained(folder: Path, model: Path, seed: int, *sets: str) -> Path:
    folder.mkdir()
    rows = tiny.write_rows(folder / "rows.jsonl", tiny.conversations(24, seed))
    quick = ["loop.steps=10", "optimizer.learning_rate=0.01", "adapter.targets=[q_proj,down_proj]"]
    config = tunesmith.configure(model=str(model), data=[str(rows)], sets=[*quick, *sets])
    tunesmith.train(config, out=folder / "run")
    return folder / "run"


def changes(run: Path) -> dict[str, np.ndarray]:
    opened = opening.find(run).open()
    opened.attach()
    layers = adapted(opened.loaded.net)
    return {name: np.array(layer.merged_weight() - dense(layer.linear)) for name, layer in layers.items()}


def test_svd_gives_the_mixture_of_peft(tmp_path, tiny_model):
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    runs = [
        trained(tmp_path / "one", tiny_model, 0, "adapter.rank=4", "adapter.alpha=8"),
        trained(tmp_path / "two", tiny_model, 1, "adapter.rank=3", "adapter.rank_stabilised=true"),
    ]
    folders = [tunesmith.export(run, to="peft", rows=2).path for run in runs]
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_model), folders[0], "one")
    model.load_adapter(folders[1], "two")
    weights = [0.7, -0.4]
    model.add_weighted_adapter(["one", "two"], weights, "mixed", combination_type="svd", svd_rank=3)
    sources = {str(run): weight for run, weight in zip(runs, weights, strict=True)}
    made = tunesmith.compose(sources, out=tmp_path / "mixed", method="svd", rank=3)
    ours = changes(made.composed.run.path)
    assert json.loads((tmp_path / "mixed" / "composition.json").read_text())["rank"] == 3
    for name, change in ours.items():
        layer = model.get_submodule(f"base_model.model.{name}")
        with torch.no_grad():
            theirs = layer.get_delta_weight("mixed").numpy()
        np.testing.assert_allclose(change, theirs, atol=1e-5 * np.abs(theirs).max())
    assert len(ours) == 4


def test_ties_gives_the_mixture_of_peft_for_equal_weights():
    import torch
    from peft.utils.merge_utils import ties

    random = np.random.Generator(np.random.PCG64(0))
    updates = [random.normal(size=(30, 20)) for _ in range(3)]
    theirs = ties([torch.tensor(update) for update in updates], torch.full((3,), 0.5), 0.3).numpy()
    np.testing.assert_allclose(composition.ties(updates, [0.5] * 3, 0.3), theirs, atol=1e-12)
