"""GGUF files of the llama family as folders, and files that are refused; other architectures in
test_architectures.py."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from gguf import GGMLQuantizationType, GGUFWriter, quants
from safetensors.numpy import load_file, save_file

import tiny
from gguf_files import write_gguf
from tunesmith.errors import ModelError
from tunesmith.events import Notice
from tunesmith.model import kernels, loading
from tunesmith.model.gguf import conversion

IDS = mx.array([[5, 77, 130, 9, 262, 33, 71, 12]])


@pytest.fixture(autouse=True)
def _cache(tmp_path, monkeypatch):
    kernels.missing()  # compiled before, in the cache of all tests
    monkeypatch.setenv("TUNESMITH_CACHE", str(tmp_path / "cache"))


def load(path: Path, **values) -> loading.Loaded:
    return loading.load(loading.ModelSpec(path=str(path), **values))


def copied(source: Path, target: Path, **config) -> Path:
    shutil.copytree(source, target)
    (target / "config.json").write_text(json.dumps(json.loads((target / "config.json").read_text()) | config))
    return target


def logits(net: nn.Module) -> np.ndarray:
    return np.array(net(IDS).astype(mx.float32))


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("kind", ["F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0"])
def test_a_converted_gguf_computes_what_its_source_computes(tmp_path, kind, tied):
    source = tmp_path / "source"
    source.mkdir()
    tiny.write_model(source, tiny.write_tokenizer(source), tied=tied)
    got = load(write_gguf(tmp_path / "m.gguf", source, kind))
    # Rows are quantised by themselves, so the source with quantised matrices is the same model, exactly.
    stored = load_file(source / "model.safetensors")
    to = GGMLQuantizationType[kind]
    rounded = {
        n: quants.dequantize(quants.quantize(v, to), to) if v.ndim > 1 else v for n, v in stored.items()
    }
    save_file(rounded, source / "model.safetensors")
    np.testing.assert_allclose(logits(got.net), logits(load(source).net), atol=1e-5)
    assert got.config["tie_word_embeddings"] is tied and got.config["eos_token_id"] == [2]


@pytest.mark.parametrize(("arch", "biased"), [("llama", "qkvo"), ("qwen2", "qkv")])
def test_biases_come_along_and_only_llama_is_interleaved(tiny_model, tmp_path, arch, biased):
    source = copied(tiny_model, tmp_path / "source", model_type=arch, attention_bias=True)
    stored = load_file(source / "model.safetensors")
    random = np.random.Generator(np.random.PCG64(5))
    for name in [name for name in stored if any(f".{part}_proj.weight" in name for part in biased)]:
        rows = stored[name].shape[0]
        stored[name.replace("weight", "bias")] = random.normal(0, 0.5, rows).astype(np.float32)
    save_file(stored, source / "model.safetensors")
    got = load(write_gguf(tmp_path / "m.gguf", source, arch=arch))
    assert got.config["model_type"] == arch
    np.testing.assert_allclose(logits(got.net), logits(load(source).net), atol=1e-5)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_a_conversion_has_the_dtype_asked_for(tiny_model, tmp_path, dtype):
    folder = conversion.convert(write_gguf(tmp_path / "m.gguf", tiny_model), dtype)
    stored = mx.load(str(folder / "model.safetensors"))
    assert isinstance(stored, dict)
    for name, value in load_file(tiny_model / "model.safetensors").items():
        if dtype == "bfloat16":
            to = GGMLQuantizationType.BF16
            value = quants.dequantize(quants.quantize(value, to), to)
        assert str(stored[name].dtype) == f"mlx.core.{dtype}"
        np.testing.assert_array_equal(
            np.array(stored[name].astype(mx.float32)),
            value.astype(np.float16 if dtype == "float16" else np.float32),
        )


def test_the_tokenizer_comes_along(tiny_model, tmp_path):
    from transformers import AutoTokenizer

    source = AutoTokenizer.from_pretrained(tiny_model)
    got = AutoTokenizer.from_pretrained(
        conversion.convert(write_gguf(tmp_path / "m.gguf", tiny_model), "float32")
    )
    chat = [
        {"role": "user", "content": "the cat, 12 timers\n\n  naïve 🙂"},
        {"role": "assistant", "content": "note"},
    ]
    assert got.apply_chat_template(chat, tokenize=False) == source.apply_chat_template(chat, tokenize=False)
    assert got.apply_chat_template(chat)["input_ids"] == source.apply_chat_template(chat)["input_ids"]
    assert (got.eos_token, got.bos_token, len(got)) == ("<|im_end|>", "<|im_start|>", len(source))


def test_a_conversion_is_kept_and_made_again_for_another_file_or_dtype(tiny_model, tmp_path):
    path = write_gguf(tmp_path / "m.gguf", tiny_model)
    notices: list[Notice] = []
    first = loading.resolve(str(path), dtype="float32", notify=notices.append)  # type: ignore[arg-type]
    stamp = (first / "model.safetensors").stat().st_mtime_ns
    assert loading.resolve(str(path), dtype="float32", notify=notices.append) == first  # type: ignore[arg-type]
    assert (first / "model.safetensors").stat().st_mtime_ns == stamp
    assert "converted to" in notices[0].what and "converted before" in notices[1].what
    assert loading.resolve(str(path), dtype="float16") != first
    with path.open("r+b") as stream:
        stream.seek(-1, os.SEEK_END)
        stream.write(b"\x00")
    assert loading.resolve(str(path), dtype="float32") != first
    assert len(list((tmp_path / "cache" / "gguf").iterdir())) == 3


def test_a_cut_file_is_refused_wherever_it_is_cut(tiny_model, tmp_path):
    path = write_gguf(tmp_path / "m.gguf", tiny_model)
    size = path.stat().st_size
    for length in (size - 1, size // 2, 9000, 3000, 200, 24, 6, 4):
        os.truncate(path, length)
        with pytest.raises(ModelError, match="not a complete, readable GGUF file"):
            loading.resolve(str(path), dtype="float32")
    path.write_bytes(b"")
    with pytest.raises(ModelError, match="is not a GGUF file"):
        loading.resolve(str(path), dtype="float32")
    assert list((tmp_path / "cache" / "gguf").iterdir()) == []


def spoil_key(writer, tensors):
    writer.add_uint32("llama.expert_count", 8)
    writer.add_float32("llama.logit_scale", 0.5)


def spoil_tensors(writer, tensors):
    tensors["blk.0.attn_q_norm.weight"] = np.ones(16, np.float32)
    tensors["blk.1.ffn_gate_inp.weight"] = np.ones((2, 64), np.float32)


def spoil_type(writer, tensors):
    writer.add_tensor("output.weight", np.zeros((320, 64), np.int8), raw_dtype=GGMLQuantizationType.I8)


def spoil_value(writer, tensors):
    tensors["blk.1.ffn_up.weight"] = np.full((128, 64), np.nan, np.float32)


def spoil_rows(writer, tensors):
    tensors["blk.0.attn_k.weight"] = np.ones((30, 64), np.float32)


def spoil_rope(writer, tensors):
    tensors["rope_freqs.weight"] = np.linspace(1, 9, 8).astype(np.float32)


def spoil_scaling(writer, tensors):
    writer.add_string("llama.rope.scaling.type", "longrope")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"pre": "chatglm-bpe"}, ["tokenizer.ggml.pre is 'chatglm-bpe'", "smollm"]),
        ({"change": spoil_key}, ["llama.expert_count = 8", "llama.logit_scale = 0.5"]),
        ({"change": spoil_tensors}, ["blk.0.attn_q_norm.weight", "blk.1.ffn_gate_inp.weight"]),
        ({"change": spoil_type}, ["output.weight has type I8"]),
        ({"change": spoil_value}, ["not finite", "blk.1.ffn_up.weight"]),
        ({"change": spoil_rows}, ["blk.0.attn_k.weight has 30 rows, 2 heads of 16 expected"]),
        ({"change": spoil_rope}, ["rope_freqs.weight does not follow"]),
        ({"change": spoil_scaling}, ["llama.rope.scaling.type = 'longrope'"]),
    ],
)
def test_what_cannot_be_read_is_refused_by_name(tiny_model, tmp_path, options, words):
    path = write_gguf(tmp_path / "m.gguf", tiny_model, **options)
    with pytest.raises(ModelError) as caught:
        loading.resolve(str(path), dtype="float32")
    assert str(caught.value).startswith(str(path)) and all(word in str(caught.value) for word in words)
    assert list((tmp_path / "cache" / "gguf").iterdir()) == []  # nothing half-made stays


def test_rope_scaling_of_llama_3_is_recovered(tiny_model, tmp_path):
    wanted = {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    from mlx_lm.models.rope_utils import Llama3RoPE

    factors = Llama3RoPE(16, 4096, False, 10000.0, wanted)._freqs / 10000.0 ** (mx.arange(0, 16, 2) / 16)

    def change(writer, tensors):
        tensors["rope_freqs.weight"] = np.array(factors)

    got = load(write_gguf(tmp_path / "m.gguf", tiny_model, change=change))
    assert got.config["rope_scaling"] == wanted
    np.testing.assert_allclose(
        logits(got.net), logits(load(copied(tiny_model, tmp_path / "x", rope_scaling=wanted)).net), atol=1e-5
    )


def test_an_architecture_that_is_not_supported_is_refused_by_its_name(tmp_path):
    path = tmp_path / "m.gguf"
    writer = GGUFWriter(path, "starcoder2")
    writer.add_tensor("token_embd.weight", np.zeros((4, 4), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(ModelError) as caught:
        loading.resolve(str(path), dtype="float32")
    assert str(caught.value).startswith(
        f"{path}: general.architecture is 'starcoder2', which is not supported"
    )
    assert "these can be read: llama, qwen2, qwen3, " in str(caught.value)
