"""Faults of other exporters. docs/museum.md lists all, also those that stand beside what they concern."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from adapters.test_qalora import quantised
from safetensors.numpy import load_file, save_file

import tiny
import tunesmith
from tunesmith.errors import ExportError
from tunesmith.model.gguf import tokenizer_header


def train(folder: Path, model: Path, *sets: str) -> Path:
    rows = tiny.write_rows(folder / "rows.jsonl", tiny.conversations(24))
    quick = ["loop.steps=6", "loop.samples=0", "optimizer.learning_rate=0.01"]
    config = tunesmith.configure(model=str(model), data=[str(rows)], sets=[*quick, *sets])
    tunesmith.train(config, out=folder / "run")
    return folder / "run"


def test_museum_a_change_that_4_bits_erase_is_rejected(tmp_path, tiny_model):
    """mlx-lm PR 1564, mflux 668, mlx-tune 15: fused into a 4-bit base and quantised again, the model is the
    base."""
    base = quantised(tmp_path / "base", tiny_model)
    run = train(tmp_path, base, "optimizer.learning_rate=0.0005", "adapter.targets=all-linear")
    with pytest.raises(ExportError, match="rejected") as caught:
        tunesmith.export(run, to="mlx-4bit", rows=4)
    assert "of the adapter's effect" in str(caught.value) or "nearer to the base" in str(caught.value)
    assert "--to mlx" in str(caught.value.hint)


def test_museum_merges_are_readable_in_both_spellings(tmp_path):
    """ollama 7167: tokenizer.json holds merges as pairs or as texts."""
    size = tiny.write_tokenizer(tmp_path)
    file = tmp_path / "tokenizer.json"
    content = json.loads(file.read_text())
    pairs = [merge if isinstance(merge, list) else merge.split(" ") for merge in content["model"]["merges"]]
    headers = []
    for merges in (pairs, [" ".join(pair) for pair in pairs]):
        content["model"]["merges"] = merges
        file.write_text(json.dumps(content))
        headers.append(tokenizer_header.tokenizer_values(tmp_path, size, (2,)))
    assert headers[0] == headers[1]
    assert headers[0]["tokenizer.ggml.merges"] == [" ".join(pair) for pair in pairs] != []


def test_museum_a_tied_head_that_is_stored_too_is_changed_with_its_embedding(tmp_path):
    """transformers 45127: tied embeddings overwrite the head, or the head stays as it was."""
    model = tiny.write_llama(tmp_path / "model")
    tensors = load_file(model / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].copy()
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    run = train(tmp_path, model, "adapter.full_modules=[embed_tokens]")
    after = load_file(tunesmith.export(run, to="hf", rows=2).path / "model.safetensors")
    embedding = after["model.embed_tokens.weight"]
    assert not np.array_equal(embedding, tensors["model.embed_tokens.weight"])
    np.testing.assert_array_equal(after["lm_head.weight"], embedding)


def test_museum_a_merged_folder_holds_no_adapter(tmp_path):
    """peft 1381: the adapter lies beside the merged weights, and is applied a second time."""
    model = tiny.write_llama(tmp_path / "model")
    (model / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    save_file({"a": np.zeros(1, np.float32)}, model / "adapter_model.safetensors")
    out = tunesmith.export(train(tmp_path, model), to="hf", rows=2).path
    assert not [path.name for path in out.iterdir() if path.name.startswith("adapter")]
