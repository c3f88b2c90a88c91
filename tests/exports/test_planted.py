"""Faults of the field that need a model of their own: a head that is left out, a change that rounding erases,
a second BOS. Each is planted into what was written, and the gate names it. In test_export: untransposed
factors, alpha forgotten, names that match nothing, a template without end token."""

from __future__ import annotations

import json
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import tiny
import tunesmith
from tunesmith.errors import ExportError
from tunesmith.exports.kinds.hf import Merged
from tunesmith.exports.kinds.ollama import Ollama


def train(folder: Path, model: Path, *sets: str) -> Path:
    rows = tiny.write_rows(folder / "rows.jsonl", tiny.conversations(24))
    sets = ("loop.steps=12", "optimizer.learning_rate=0.01", *sets)
    config = tunesmith.configure(model=str(model), data=[str(rows)], sets=list(sets))
    tunesmith.train(config, out=folder / "run")
    return folder / "run"


def reasons(run: Path, kind: str) -> list[str]:
    """Why the artefact is rejected."""
    with pytest.raises(ExportError, match="rejected"):
        tunesmith.export(run, to=kind, rows=3)
    record = json.loads((run / "exports" / f"{kind}.rejected" / "export.json").read_text())
    return record["reasons"]


def test_a_head_that_is_left_out_is_named(tmp_path, monkeypatch):
    model = tmp_path / "model"
    model.mkdir()
    tiny.write_model(model, tiny.write_tokenizer(model), tied=False)
    run = train(tmp_path, model, "adapter.targets=[q_proj]", "adapter.full_modules=[lm_head]")
    head = load_file(model / "model.safetensors")["lm_head.weight"]
    write = Merged.write

    def spoiled(self, tuned, folder, notify):
        notes = write(self, tuned, folder, notify)
        tensors = load_file(folder / "model.safetensors")
        assert not np.array_equal(tensors["lm_head.weight"], head)
        save_file(tensors | {"lm_head.weight": head}, folder / "model.safetensors")
        return notes

    monkeypatch.setattr(Merged, "write", spoiled)
    assert "1 of 3 changed tensors do not hold the change: lm_head.weight" in reasons(run, "hf")


def test_a_change_that_rounding_erases_is_named(tmp_path):
    """The base is in bfloat16, and the change is smaller than its steps."""
    model = tiny.write_llama(tmp_path / "model")
    tensors = {name: mx.array(value) for name, value in load_file(model / "model.safetensors").items()}
    rounded = {name: value.astype(mx.bfloat16) for name, value in tensors.items()}
    mx.save_safetensors(str(model / "model.safetensors"), rounded, metadata={"format": "mlx"})
    run = train(tmp_path, model, "optimizer.learning_rate=2e-5", "loop.steps=6", "adapter.targets=all-linear")
    assert any("rounding to the dtype of the base left" in reason for reason in reasons(run, "hf"))


def test_a_second_bos_is_named(tmp_path, monkeypatch):
    """llama.cpp writes the tokenizer's BOS before every prompt, and the template writes it again."""
    model = tiny.write_llama(tmp_path / "model")
    bos = "<|endoftext|>"
    tokenizer = json.loads((model / "tokenizer.json").read_text())
    opened = [{"SpecialToken": {"id": bos, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]
    tokenizer["post_processor"] = {
        "type": "TemplateProcessing",
        "single": opened,
        "pair": [*opened, {"Sequence": {"id": "B", "type_id": 0}}],
        "special_tokens": {bos: {"id": bos, "ids": [0], "tokens": [bos]}},
    }
    (model / "tokenizer.json").write_text(json.dumps(tokenizer))
    settings = json.loads((model / "tokenizer_config.json").read_text())
    settings |= {"bos_token": bos, "chat_template": "{{ bos_token }}" + tiny.CHATML}
    (model / "tokenizer_config.json").write_text(json.dumps(settings))
    run = train(tmp_path, model)
    exported = tunesmith.export(run, to="ollama", out=tmp_path / "good", rows=3)
    assert exported.accepted and bos not in (tmp_path / "good" / "Modelfile").read_text()
    write = Ollama.write

    def spoiled(self, tuned, folder, notify):
        notes = write(self, tuned, folder, notify)
        text = (folder / "Modelfile").read_text()
        (folder / "Modelfile").write_text(text.replace('TEMPLATE """', f'TEMPLATE """{bos}'))
        return notes

    monkeypatch.setattr(Ollama, "write", spoiled)
    (reason,) = reasons(run, "ollama")
    assert "begins with the token that Ollama writes already" in reason
