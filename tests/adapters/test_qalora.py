"""QA-LoRA: LoRA on sums over quantisation groups, merged into the biases of the base without loss."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from adapters import mixtures
from adapters.test_attachment import state
from adapters.test_layers import IDS, close, fresh, gradients, move
from mlx_lm.utils import load_adapters
from safetensors.numpy import load_file

import tiny
import tunesmith
from tunesmith import adapters
from tunesmith.adapters import LoRA, QALoRA, QALoRALinear, composition, merging, routing
from tunesmith.adapters.composition import Recipe
from tunesmith.adapters.layers import dense, group_size
from tunesmith.errors import ConfigError, ExportError, ModelError
from tunesmith.model import loading, quantisation
from tunesmith.model.loading import ModelSpec
from tunesmith.runs import opening

SPEC = QALoRA(rank=2, targets=("q_proj", "v_proj", "up_proj"))


def adapted(spec=SPEC, seed: int = 0, *, expanded: bool = False, **options):
    net = fresh(4, **options)
    net = quantisation.expand(net) if expanded else net
    spec.attach(net, seed)
    return move(net)


def lora_like(net):
    """The same base with the LoRA adapter that has the expanded A."""
    other = fresh(4)
    LoRA(rank=2, targets=SPEC.targets).attach(other, 0)
    for name, layer in adapters.adapted(other).items():
        layer.lora_a = adapters.adapted(net)[name].expanded_a()
        layer.lora_b = adapters.adapted(net)[name].lora_b
    return other


@pytest.mark.parametrize("expanded", [False, True])
def test_it_computes_lora_whose_a_is_constant_in_each_group(expanded):
    net = adapted(expanded=expanded)
    other = lora_like(net)
    close(net(IDS), other(IDS))
    value, slopes = gradients(net)
    expected, of_lora = gradients(other)
    assert value == pytest.approx(expected, rel=1e-5)
    for name, slope in slopes.items():
        if name.endswith("lora_a"):  # the chain rule through A_full = repeat(A) / √g
            pooled = of_lora[name].reshape(len(slope), 32, -1).sum(axis=1) * 32**-0.5
            close(slope, pooled)
        else:
            close(slope, of_lora[name])


def test_it_starts_equal_to_its_base_and_with_the_spread_of_lora():
    net = fresh(4)
    SPEC.attach(net, 0)
    assert mx.array_equal(net(IDS), fresh(4)(IDS))
    wide = nn.QuantizedLinear(4096, 8, bias=False, group_size=64)
    layers = [kind._layer(wide, 8, 1.0, 0.0, mx.random.key(0)) for kind in (LoRA, QALoRA)]
    x = mx.random.normal((64, 4096), key=mx.random.key(1))
    for layer in layers:
        layer.lora_b = mx.concatenate([mx.eye(8)], axis=1)
    spreads = [float(mx.std(layer.branch(x))) for layer in layers]
    assert spreads[1] == pytest.approx(spreads[0], rel=0.1)
    assert layers[1].lora_a.shape == (64, 8)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16])
def test_merged_the_codes_and_scales_stay_and_the_biases_hold_the_update(bits, dtype):
    net = fresh(bits, dtype=dtype)
    SPEC.attach(net, 0)
    move(net)
    layers = adapters.adapted(net)
    before = {name: layer.linear for name, layer in layers.items()}
    assert merging.merge(net) == len(before) == 9
    modules = dict(net.named_modules())
    for name, linear in before.items():
        assert type(modules[name]) is nn.QuantizedLinear
        assert mx.array_equal(modules[name].weight, linear.weight)
        assert mx.array_equal(modules[name].scales, linear.scales)
        assert not mx.array_equal(modules[name].biases, linear.biases)
        close(dense(modules[name]), layers[name].merged_weight(), 1e-6 if dtype == mx.float32 else 2**-8)
    assert not adapters.trainable(net)


def test_merged_into_an_expanded_base_it_is_the_same(tmp_path):
    net = adapted(expanded=True)
    expected = net(IDS)
    merging.merge(net)
    close(net(IDS), expected)


def test_saved_and_read_it_is_the_same_and_detached_leaves_no_trace(tmp_path):
    alone = adapted().eval()
    adapters.save(alone, SPEC, tmp_path)
    net = fresh(4)
    before, outputs = state(net), net(IDS)
    with adapters.attached(net, tmp_path) as adapter:
        assert adapter.spec == SPEC and mx.array_equal(net(IDS), alone(IDS))
    assert state(net) == before and mx.array_equal(net(IDS), outputs)
    assert json.loads((tmp_path / adapters.CONFIG).read_text())["fine_tune_type"] == "qalora"
    with pytest.raises(ValueError, match=r"(?i)shape|mismatch"):  # never silently another function
        load_adapters(fresh(4), str(tmp_path))


def test_mlx_lm_reads_it_written_as_lora(tmp_path):
    net = adapted().eval()
    adapters.files.save_as_lora(net, SPEC, tmp_path)
    close(load_adapters(fresh(4), str(tmp_path))(IDS), net(IDS))


def test_it_is_routed_and_composed_with_other_kinds(tmp_path):
    specs = {"qalora": SPEC, "lora": LoRA(rank=3, targets="all-linear")}
    folders, outputs, deltas = {}, {}, []
    for number, (name, spec) in enumerate(specs.items()):
        net = adapted(spec, seed=number).eval()
        adapters.save(net, spec, tmp_path / name)
        folders[name], outputs[name] = adapters.read(tmp_path / name), net(IDS)
        deltas.append(
            {
                key: np.array(layer.merged_weight() - dense(layer.linear))
                for key, layer in adapters.adapted(net).items()
            }
        )
    net = fresh(4)
    with routing.routed(net, folders) as chosen:
        chosen.select(["qalora", "lora"])
        both = net(IDS)
        for row, name in enumerate(specs):
            close(both[row], outputs[name][row], 1e-4)
    updates = [composition.read_updates(net, adapter) for adapter in folders.values()]
    result = composition.compose(updates, [1, 1], [2, 3], Recipe.model_validate({}))
    for name, change in deltas[0].items():
        made = composition.form(result.factors[name][0])
        np.testing.assert_allclose(made.T, change + deltas[1][name], atol=1e-5)


def test_layers_without_groups_are_refused_by_name():
    for net, words in [
        (fresh(), r"model.layers.0.self_attn.q_proj \(width 64\): it is not quantised"),
        (mixtures.fresh("qwen3_moe", bits=4), "layer of routed experts"),
    ]:
        before = state(net)
        with pytest.raises(ConfigError, match=words) as raised:
            QALoRA(rank=2, targets="all-linear").attach(net, 0)
        assert "model.quantize" in str(raised.value)
        assert state(net) == before
    spec = QALoRA(rank=20, targets="q_proj")
    with pytest.raises(ConfigError, match=r"rank 20 is more than .*q_proj \(in, out = \(2, 64\)\) can hold"):
        spec.attach(fresh(4), 0)
    mixed = fresh()
    nn.quantize(mixed, 32, 4, class_predicate=lambda name, module: name.endswith("q_proj"))
    with pytest.raises(ConfigError, match="qalora cannot adapt 3 of 6 layers"):
        QALoRA(rank=2, targets=("q_proj", "v_proj")).attach(mixed, 0)


def test_modes_without_biases_are_refused():
    assert group_size(nn.QuantizedLinear(64, 8, group_size=32, bits=4, mode="mxfp4")) is None
    assert group_size(nn.Linear(64, 8)) is None
    assert group_size(nn.QuantizedLinear(64, 8, group_size=32, bits=4)) == 32


# --- a run


def quantised(folder: Path, model: Path, bits: int = 4) -> Path:
    """``model`` as mlx-lm's conversion would quantise it."""
    from mlx_lm import utils

    shutil.copytree(model, folder)
    net, config = utils.load_model(model)
    net, config = utils.quantize_model(net, config, 32, bits)
    utils.save_model(folder, net)
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def train(folder: Path, model: Path, *sets: str) -> Path:
    rows = tiny.write_rows(folder / "rows.jsonl", tiny.conversations(24))
    quick = ["loop.steps=12", "optimizer.learning_rate=0.01", "adapter.kind=qalora", "adapter.rank=2"]
    config = tunesmith.configure(
        model=str(model), data=[str(rows)], sets=[*quick, "adapter.targets=all-linear", *sets]
    )
    tunesmith.train(config, out=folder / "run")
    return folder / "run"


@pytest.mark.parametrize("stored", [True, False])
def test_exported_at_4_bits_only_the_biases_of_the_base_change(stored, tmp_path, tiny_model):
    base = quantised(tmp_path / "base", tiny_model)
    settings = [] if stored else ["model.quantize=4", "model.group_size=32"]
    run = train(tmp_path, base if stored else tiny_model, *settings, "adapter.dropout=0.1")
    exported = tunesmith.export(run, to="mlx-4bit", rows=4)
    assert exported.distances.mean < 1e-6 and exported.distances.base > 0.01
    before, after = (load_file(folder / "model.safetensors") for folder in (base, exported.path))
    assert before.keys() == after.keys()
    changed = {name for name in before if not np.array_equal(before[name], after[name])}
    layers = {name.removesuffix(".lora_a") for name in adapters.read(opening.find(run).checkpoint).tensors}
    layers = {name for name in layers if not name.endswith("lora_b")}
    assert changed == {f"{name}.biases" for name in layers} and len(changed) == 14
    sizes = [(folder / "model.safetensors").stat().st_size for folder in (base, exported.path)]
    assert abs(sizes[0] - sizes[1]) < 1000
    configs = [json.loads((folder / "config.json").read_text()) for folder in (base, exported.path)]
    assert configs[0]["quantization"] == configs[1]["quantization"]


def test_other_kinds_write_what_it_computes(tmp_path, tiny_model):
    run = train(tmp_path, quantised(tmp_path / "base", tiny_model))
    for to in ("mlx", "mlx-merged", "gguf-lora"):
        assert tunesmith.export(run, to=to, rows=2).distances.mean < 1e-6
    for to in ("peft", "cluster"):  # its base is always quantised, which transformers cannot load
        with pytest.raises(ExportError, match="quantised by MLX, and transformers cannot load it"):
            tunesmith.export(run, to=to, rows=2)
    eight = tunesmith.export(run, to="mlx-8bit", rows=2)
    assert eight.distances.mean < 1e-3
    assert json.loads((eight.path / "config.json").read_text())["quantization"]["bits"] == 8


def test_a_run_resumes_to_the_same_bytes_and_is_started_from(tmp_path, tiny_model):
    packed = ["model.quantize=4", "model.group_size=32", "loop.save_every=5"]
    (tmp_path / "straight").mkdir()
    run = train(tmp_path / "straight", tiny_model, *packed)
    again = shutil.copytree(run, tmp_path / "again")
    shutil.rmtree(again / "checkpoints" / "000012")
    manifest = json.loads((again / "manifest.json").read_text())
    (again / "manifest.json").write_text(json.dumps({**manifest, "status": "interrupted"}))
    tunesmith.train(resume=again)
    files = [folder / "checkpoints" / "000012" / adapters.WEIGHTS for folder in (run, again)]
    assert files[0].read_bytes() == files[1].read_bytes()
    (tmp_path / "further").mkdir()
    further = train(tmp_path / "further", tiny_model, *packed, f"adapter.start={run}", "loop.steps=1")
    assert json.loads((further / "manifest.json").read_text())["lineage"]["start"]["run"] == "run"
    (tmp_path / "merged").mkdir()
    merged = train(tmp_path / "merged", tiny_model, *packed, f"model.adapter={run}", "loop.steps=1")
    text = (merged / "training.log").read_text()
    assert "an adapter is merged into 14 layers of the base" in text and "become dense" not in text


def test_a_base_without_quantisation_says_what_to_set(tmp_path, tiny_model):
    with pytest.raises(ConfigError, match="qalora cannot adapt 14 of 14 layers"):
        train(tmp_path, tiny_model)


def test_an_adapter_for_groups_of_another_size_does_not_fit(tmp_path):
    adapters.save(adapted(), SPEC, tmp_path)
    net = fresh()
    nn.quantize(net, 64, 4, class_predicate=lambda name, _: name.endswith(SPEC.targets))
    with pytest.raises(ModelError, match="do not fit the model"):
        adapters.read(tmp_path).attach(net)


def test_a_quantised_base_is_expanded_to_the_same_numbers(tmp_path, tiny_model):
    base = quantised(tmp_path / "base", tiny_model)
    packed = loading.load_packed(ModelSpec(path=str(base))).net
    held = loading.load(ModelSpec(path=str(base))).net
    modules = dict(packed.named_modules())
    layers = {name: layer for name, layer in held.named_modules() if group_size(layer) is not None}
    assert len(layers) == 14
    for name, layer in layers.items():
        assert group_size(layer) == 32 and mx.array_equal(layer.weight, dense(modules[name]))
    assert isinstance(QALoRALinear(layers[name], 2, 1.0, 0.0, mx.random.key(0)), QALoRALinear)
