"""Adapters of PEFT and mlx-lm are trained further and merged as they were meant, or refused by name."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten
from mlx_lm.tuner.utils import linear_to_lora_layers, load_adapters
from safetensors.numpy import load_file, save_file

import tiny
import tunesmith
from tunesmith.adapters import merging
from tunesmith.errors import ConfigError, ModelError
from tunesmith.model import loading
from tunesmith.model.loading import ModelSpec
from tunesmith.runs import opening
from tunesmith.runs.config import RunConfig
from tunesmith.training import preparation, story

IDS = mx.array([[5, 9, 33, 2, 8, 7, 60, 21]])
PREFIX = "base_model.model."


@pytest.fixture
def random():
    return np.random.Generator(np.random.PCG64(3))


def logits(net) -> np.ndarray:
    return np.array(net(IDS))


def close(one: np.ndarray, other: np.ndarray) -> bool:
    return bool(np.abs(one - other).max() < 2e-5 * np.abs(other).max())


def write_peft(folder: Path, model: Path, random, modules, *, ranks=(4,), dora=False, **settings) -> Path:
    """An adapter in PEFT's layout with random values on ``modules``, whose ranks take turns."""
    folder.mkdir(parents=True)
    base, tensors = load_file(model / "model.safetensors"), {}
    for number, module in enumerate(modules):
        outputs, inputs = base[f"{module}.weight"].shape
        rank = ranks[number % len(ranks)]
        tensors[f"{PREFIX}{module}.lora_A.weight"] = random.normal(0, 0.2, (rank, inputs)).astype(np.float32)
        tensors[f"{PREFIX}{module}.lora_B.weight"] = random.normal(0, 0.2, (outputs, rank)).astype(np.float32)
        if dora:
            norms = np.linalg.norm(base[f"{module}.weight"], axis=1) * random.uniform(0.5, 2, outputs)
            tensors[f"{PREFIX}{module}.lora_magnitude_vector"] = norms.astype(np.float32)
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    config = {"peft_type": "LORA", "r": ranks[0], "lora_alpha": 8, "use_dora": dora, "bias": "none"}
    config |= {"base_model_name_or_path": str(model), "target_modules": sorted(modules)} | settings
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def edited(folder: Path, **settings) -> Path:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))
    return folder


ALL = [
    f"model.layers.{layer}.{name}"
    for layer in (0, 1)
    for name in ("self_attn.q_proj", "self_attn.v_proj", "mlp.down_proj")
]
LIKE_ALL = {"rank": 4, "alpha": 8.0, "targets": ["q_proj", "v_proj", "down_proj"]}


def with_updates(model: Path, folder: Path, scale_of, dora: bool) -> np.ndarray:
    """The logits of the base with the updates added to its weights, by PEFT's formulas."""
    net = loading.load(ModelSpec(path=str(model))).net
    tensors = load_file(folder / "adapter_model.safetensors")
    for name, a in tensors.items():
        if not name.endswith(".lora_A.weight"):
            continue
        module = name.removesuffix(".lora_A.weight")
        layer = dict(net.named_modules())[module.removeprefix(PREFIX)]
        update = scale_of(module.removeprefix(PREFIX), len(a)) * tensors[f"{module}.lora_B.weight"] @ a
        weight = np.array(layer.weight) + update
        if dora:
            magnitude = tensors[f"{module}.lora_magnitude_vector"] / np.linalg.norm(weight, axis=1)
            weight = magnitude[:, None] * weight
        layer.weight = mx.array(weight)
    return logits(net)


@pytest.fixture
def train(tmp_path, tiny_model):
    """Open the model that a run with these settings would train, before its first update."""

    def opened(model: Path = tiny_model, merged: Path | None = None, heard=lambda event: None, **adapter):
        rows = tiny.write_rows(tmp_path / "rows.jsonl", tiny.conversations(12))
        base = {"path": str(model)} | ({} if merged is None else {"adapter": str(merged)})
        config = RunConfig(model=base, data={"train": str(rows)}, adapter=adapter, loop={"steps": 2})
        return story.open_model(config, preparation.prepare(config).train, heard)

    return opened


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("stabilised", [False, True])
def test_an_adapter_of_peft_says_the_same_when_it_is_trained_further_or_merged(
    dora, stabilised, tmp_path, tiny_model, random, train
):
    folder = write_peft(tmp_path / "peft", tiny_model, random, ALL, dora=dora, use_rslora=stabilised)
    expected = with_updates(tiny_model, folder, lambda _, rank: 8 / (2.0 if stabilised else 4.0), dora)
    plain = logits(loading.load(ModelSpec(path=str(tiny_model))).net)
    assert not close(plain, expected)
    kind = "dora" if dora else "lora"
    opened = train(kind=kind, start=str(folder), rank_stabilised=stabilised, **LIKE_ALL)
    assert close(logits(opened.net), expected)
    assert opened.ancestors["start"]["saved_by"] == "PEFT"
    merged = merging.load(ModelSpec(path=str(tiny_model), adapter=str(folder)))
    assert close(logits(merged.net), expected)


def test_ranks_and_scales_by_pattern_are_merged_and_not_trained_further(tmp_path, tiny_model, random, train):
    patterns = {
        "rank_pattern": {"v_proj": 2, r"model\.layers\.1\.mlp\.down_proj": 2},
        "alpha_pattern": {"^model.layers.0.self_attn.q_proj": 16, "down_proj": 1},
    }
    ranks = (4, 2, 4, 4, 2, 2)
    folder = write_peft(tmp_path / "peft", tiny_model, random, ALL, ranks=ranks, **patterns)

    def scale(module: str, rank: int) -> float:
        return (16 if module == ALL[0] else 1 if "down_proj" in module else 8) / rank

    merged = merging.load(ModelSpec(path=str(tiny_model), adapter=str(folder)))
    assert close(logits(merged.net), with_updates(tiny_model, folder, scale, False))
    with pytest.raises(ConfigError, match=r"several ranks or scales.*rank 2 with scale 0\.5"):
        train(start=str(folder), **LIKE_ALL)


def test_the_scale_is_part_of_what_a_merged_base_is(tmp_path, tiny_model, random):
    folder = write_peft(tmp_path / "peft", tiny_model, random, ALL)
    spec = ModelSpec(path=str(tiny_model), adapter=str(folder))
    before = merging.load(spec).fingerprint
    edited(folder, lora_alpha=9)
    assert merging.load(spec).fingerprint != before


def test_modules_that_peft_trained_in_full_are_full_modules(tmp_path, tiny_model, random, train):
    folder = write_peft(tmp_path / "peft", tiny_model, random, ALL, modules_to_save=["input_layernorm"])
    tensors = load_file(folder / "adapter_model.safetensors")
    names = [f"model.layers.{layer}.input_layernorm.weight" for layer in (0, 1)]
    norms = {name: random.uniform(0.5, 2, 64).astype(np.float32) for name in names}
    save_file(
        tensors | {PREFIX + name: value for name, value in norms.items()},
        folder / "adapter_model.safetensors",
    )
    with_norms = shutil.copytree(tiny_model, tmp_path / "normed")
    base = load_file(tiny_model / "model.safetensors")
    save_file(base | norms, with_norms / "model.safetensors", metadata={"format": "mlx"})
    expected = with_updates(with_norms, folder, lambda _, rank: 2.0, False)
    merged = merging.load(ModelSpec(path=str(tiny_model), adapter=str(folder)))
    assert close(logits(merged.net), expected)
    opened = train(start=str(folder), full_modules=["input_layernorm"], **LIKE_ALL)
    assert close(logits(opened.net), expected)
    with pytest.raises(ConfigError, match="trained in full are no modules, there model"):
        train(start=str(folder), **LIKE_ALL)


def test_another_shape_is_an_error_whose_settings_work(tmp_path, tiny_model, random, train):
    folder = write_peft(tmp_path / "peft", tiny_model, random, ALL)
    with pytest.raises(ConfigError) as refused:
        train(start=str(folder))
    assert "adapter.rank is 16, there 4" in refused.value.what
    assert "4 layers are adapted, there 6, 4 in both" in refused.value.what
    given = [words.strip('"') for words in refused.value.hint.split("; ")[0].split("--set ")[1:]]
    sets = [words.strip().strip('"') for words in given]
    config = tunesmith.configure(model=str(tiny_model), data=["rows.jsonl"], sets=sets)
    assert config.spec.adapter.rank == 4 and config.spec.adapter.alpha == 8
    assert set(config.spec.adapter.targets) == {"q_proj", "v_proj", "down_proj"}
    with pytest.raises(ConfigError, match="scaled by 4, there by 2"):
        train(start=str(folder), **LIKE_ALL | {"alpha": 16.0})
    with pytest.raises(ConfigError, match=r"adapter\.kind is dora, there lora"):
        train(start=str(folder), kind="dora", **LIKE_ALL)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"peft_type": "IA3"}, "type IA3"),
        ({"bias": "lora_only"}, "bias: lora_only"),
        ({"lora_bias": True}, "lora_bias: True"),
        ({"trainable_token_indices": [1, 2]}, "trainable_token_indices"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights: pissa"),
        ({"layer_replication": [[0, 1], [0, 1]]}, "layer_replication"),
        ({"target_parameters": ["experts.gate_up_proj"]}, "target_parameters"),
        ({"r": 8}, "are not of rank 8"),
        ({"rank_pattern": {"q_proj": 2}}, "are not of rank 2"),
        ({"use_dora": True}, "no magnitude"),
        ({"r": "many"}, "r: must be a valid integer"),
    ],
)
def test_settings_of_peft_that_cannot_be_expressed_are_refused(
    settings, message, tmp_path, tiny_model, random
):
    folder = edited(write_peft(tmp_path / "peft", tiny_model, random, ALL), **settings)
    with pytest.raises(ModelError, match=message):
        merging.load(ModelSpec(path=str(tiny_model), adapter=str(folder)))


def renamed(tensors):
    return {name.replace("q_proj", "query"): value for name, value in tensors.items()}


def without_b(tensors):
    return {name: value for name, value in tensors.items() if "layers.1.mlp.down_proj.lora_B" not in name}


def another_shape(tensors):
    return {
        name: np.ascontiguousarray(value[:, :-8]) if "v_proj.lora_A" in name else value
        for name, value in tensors.items()
    }


def of_an_embedding(tensors):
    return tensors | {f"{PREFIX}model.embed_tokens.lora_embedding_A": np.ones((4, 8), np.float32)}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (renamed, r"query is not a layer of the base"),
        (without_b, "has lora_A and no lora_B"),
        (another_shape, r"v_proj.lora_a: \(56, 4\) in the file, \(64, 4\) in the model"),
        (of_an_embedding, "lora_embedding_A is not a tensor that is read"),
        (lambda tensors: {"other": np.ones(3, np.float32)}, "other is not a tensor"),
    ],
)
def test_tensors_of_peft_that_match_nothing_are_an_error(change, message, tmp_path, tiny_model, random):
    folder = write_peft(tmp_path / "peft", tiny_model, random, ALL)
    path = folder / "adapter_model.safetensors"
    save_file(change(load_file(path)), path)
    with pytest.raises(ModelError, match=message):
        merging.load(ModelSpec(path=str(tiny_model), adapter=str(folder)))


def test_another_base_and_unknown_settings_are_told(tmp_path, tiny_model, random):
    folder = write_peft(tmp_path / "peft", tiny_model, random, ALL)
    spec, heard = ModelSpec(path=str(tiny_model), adapter=str(folder)), []
    merging.load(spec, heard.append)
    assert not [event for event in heard if event.level == "warning"]
    edited(folder, base_model_name_or_path="Qwen/Qwen3-0.6B", use_newest=True)
    merging.load(spec, heard.append)
    texts = [event.what for event in heard if event.level == "warning"]
    assert any("names another base: Qwen/Qwen3-0.6B" in text for text in texts)
    assert any("ignored: use_newest" in text for text in texts)


def test_pickled_weights_of_peft_are_refused_with_the_cure(tmp_path, tiny_model, random):
    folder = write_peft(tmp_path / "peft", tiny_model, random, ALL)
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")
    rows = tiny.write_rows(tmp_path / "rows.jsonl", tiny.conversations(12))
    sets = [f"adapter.start={folder}"]
    config = tunesmith.configure(model=str(tiny_model), data=[str(rows)], sets=sets)
    with pytest.raises(ModelError) as refused:
        tunesmith.train(config, out=tmp_path / "run")
    assert "save it in PEFT as safetensors" in refused.value.hint


# mlx-lm


def write_mlx(folder: Path, model: Path, kind: str, keys: list[str] | None, layers: int = 2) -> Path:
    """An adapter as mlx-lm saves it, with random values."""
    folder.mkdir()
    net = loading.load(ModelSpec(path=str(model))).net
    parameters = {"rank": 4, "scale": 2.5, "dropout": 0.0} | ({} if keys is None else {"keys": keys})
    if kind == "full":
        for block in net.layers[-layers:]:
            block.unfreeze()
    else:
        linear_to_lora_layers(net, layers, parameters, use_dora=kind == "dora")
        net.freeze()
        for _, module in net.named_modules():
            if "lora_a" in module:
                module.unfreeze(
                    keys=[key for key in ("lora_a", "lora_b", "m") if key in module], recurse=False
                )
    random = np.random.Generator(np.random.PCG64(1))
    tensors = {
        name: np.array(value) + random.normal(0, 0.1, value.shape).astype(np.float32)
        for name, value in tree_flatten(net.trainable_parameters())
    }
    save_file(tensors, folder / "adapters.safetensors", metadata={"format": "mlx"})
    config = {"fine_tune_type": kind, "num_layers": layers, "model": str(model), "iters": 100}
    config |= {"lora_parameters": parameters}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize(
    ("kind", "keys", "layers", "adapter"),
    [
        ("lora", ["self_attn.q_proj", "self_attn.v_proj"], 2, {"targets": ["q_proj", "v_proj"]}),
        ("lora", None, 1, {"targets": ["all-linear"], "layers": 1}),
        ("dora", ["mlp.up_proj"], 2, {"targets": ["up_proj"]}),
        ("full", None, 1, {"targets": ["*"], "layers": 1}),
    ],
)
def test_an_adapter_of_mlx_lm_says_what_mlx_lm_makes_of_it(
    kind, keys, layers, adapter, tmp_path, tiny_model, train
):
    folder = write_mlx(tmp_path / "mlx", tiny_model, kind, keys, layers)
    oracle = loading.load(ModelSpec(path=str(tiny_model))).net
    load_adapters(oracle, str(folder))
    expected = logits(oracle)
    assert not close(logits(loading.load(ModelSpec(path=str(tiny_model))).net), expected)
    merged = merging.load(ModelSpec(path=str(tiny_model), adapter=str(folder)))
    assert close(logits(merged.net), expected)
    low_rank = {} if kind == "full" else {"rank": 4, "alpha": 10.0}
    if kind == "full":
        adapter = {"targets": ["model.layers.1"]}
    opened = train(kind=kind, start=str(folder), **adapter, **low_rank)
    assert close(logits(opened.net), expected)


def test_tensors_of_mlx_lm_that_do_not_belong_are_an_error(tmp_path, tiny_model):
    folder = write_mlx(tmp_path / "mlx", tiny_model, "lora", ["self_attn.q_proj"])
    path, spec = folder / "adapters.safetensors", ModelSpec(path=str(tiny_model), adapter=str(folder))
    tensors = load_file(path)
    save_file({name.replace("q_proj", "query"): value for name, value in tensors.items()}, path)
    with pytest.raises(ModelError, match=r"self_attn\.query' matches no linear layer"):
        merging.load(spec)
    save_file(tensors | {"model.norm.weight": np.ones(64, np.float32)}, path)
    with pytest.raises(ModelError, match="1 tensors are not those of lora:\n  model"):
        merging.load(spec)
    save_file(tensors, path)
    edited(folder, lora_parameters={"scale": 1.0})
    with pytest.raises(ModelError, match=r"lora_parameters\.rank is missing"):
        merging.load(spec)


# There and back


@pytest.mark.parametrize("to", ["peft", "mlx"])
def test_what_is_exported_is_trained_further_and_merged(to, tmp_path, tiny_model, train):
    rows = tiny.write_rows(tmp_path / "rows.jsonl", tiny.conversations(12))
    shape = ["adapter.rank=4", "adapter.targets=[q_proj,up_proj]", "adapter.kind=dora"]
    quick = ["loop.steps=8", "optimizer.learning_rate=0.01"]
    config = tunesmith.configure(model=str(tiny_model), data=[str(rows)], sets=[*quick, *shape])
    run = tunesmith.train(config, out=tmp_path / "run")
    folder = tunesmith.export(run.path, to=to, rows=2, out=tmp_path / "exported").path
    live = opening.find(run.path).open()
    live.attach()
    opened = train(start=str(folder), kind="dora", rank=4, targets=["q_proj", "up_proj"])
    assert np.array_equal(logits(opened.net), logits(live.loaded.net))
    merged = merging.load(ModelSpec(path=str(tiny_model), adapter=str(folder)))
    assert close(logits(merged.net), logits(live.loaded.net))
    further = tunesmith.configure(
        model=str(tiny_model), data=[str(rows)], sets=[*quick, *shape, f"adapter.start={folder}"]
    )
    again = tunesmith.train(further, out=tmp_path / "again")
    manifest = json.loads((again.path / "manifest.json").read_text())
    assert manifest["lineage"]["start"]["checkpoint"] == str(folder)
    assert tunesmith.evaluate(again.path, tasks=["perplexity"]).scores
