"""Adapters: equal to PEFT and to mlx-lm, exact at the start, the same masks twice, loaded whole or not at
all."""

from __future__ import annotations

import json
import os
import re

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mlx.utils import tree_flatten, tree_map
from mlx_lm.models import llama
from mlx_lm.utils import load_adapters
from pydantic import ValidationError
from safetensors.numpy import load_file

from goldens import make_adapters
from tunesmith import adapters
from tunesmith.adapters import DoRA, Full, LoRA
from tunesmith.errors import ConfigError, ModelError, TrainingError
from tunesmith.training import instruments

IDS = mx.array([[1, 5, 9, 33, 2, 8], [7, 7, 3, 60, 21, 4]])
KINDS = {"lora": LoRA, "dora": DoRA}


def fresh(
    bits: int | None = None, *, layers: int = 3, bias: bool = False, tied: bool = False, dtype=mx.float32
):
    """A random llama; all but the adapter is the same each time."""
    sizes = llama.ModelArgs(
        model_type="llama",
        hidden_size=64,
        num_hidden_layers=layers,
        intermediate_size=96,
        num_attention_heads=4,
        rms_norm_eps=1e-5,
        vocab_size=64,
        num_key_value_heads=2,
        attention_bias=bias,
        tie_word_embeddings=tied,
    )
    net = llama.Model(sizes)
    random = np.random.Generator(np.random.PCG64(3))
    net.update(
        tree_map(
            lambda p: mx.array(random.normal(0, 0.2, p.shape).astype(np.float32) + (p.ndim == 1)),
            net.parameters(),
        )
    )
    net.set_dtype(dtype)
    if bits is not None:
        nn.quantize(net, group_size=32, bits=bits)
    mx.eval(net.parameters())
    return net.eval()


def move(net, seed: int = 0):
    """Every trainable tensor is moved off its start, so that the adapter acts and every gradient is
    non-zero."""
    random = np.random.Generator(np.random.PCG64(seed))
    for name, value in adapters.trainable(net).items():
        net.load_weights(
            [(name, value + mx.array(random.normal(0, 0.1, value.shape).astype(np.float32)))], strict=False
        )
    return net


def adapted(spec, seed: int = 0, **options):
    net = fresh(**options)
    spec.attach(net, seed)
    return move(net)


def gradients(net, ids=IDS, compile: bool = False):
    def loss(tree, ids):
        net.update(tree)
        return mx.square(net(ids).astype(mx.float32)).mean()

    step = mx.value_and_grad(loss)
    value, tree = (mx.compile(step) if compile else step)(net.trainable_parameters(), ids)
    found = dict(tree_flatten(tree))
    mx.eval(value, found)
    return value.item(), found


def close(found, expected, tolerance: float = 1e-5):
    expected = np.array(expected.astype(mx.float32) if isinstance(expected, mx.array) else expected)
    found = np.array(found.astype(mx.float32) if isinstance(found, mx.array) else found)
    np.testing.assert_allclose(
        found, expected, atol=tolerance * max(1.0, float(np.abs(expected).max())), rtol=0
    )


# --- parity with PEFT


def check_parity(golden: dict[str, np.ndarray]) -> None:
    values = {name: mx.array(value) for name, value in make_adapters.values().items()}
    assert len({name.split("/")[0] for name in golden}) == len(make_adapters.CASES) == 8
    for case, (kind, bias, stabilised) in make_adapters.CASES.items():
        spec = KINDS[kind](rank=make_adapters.RANK, alpha=make_adapters.ALPHA, rank_stabilised=stabilised)
        linear = nn.Linear(make_adapters.INPUTS, make_adapters.OUTPUTS, bias=bias)
        linear.weight = values["weight"]
        if bias:
            linear.bias = values["bias"]
        linear.freeze()
        layer = spec._layer(linear, spec.rank, spec.scale, 0.0, mx.random.key(0))
        names = [name for name in ("lora_a", "lora_b", "m") if name in layer]
        layer.update({name: values[name] for name in names})

        def loss(tree, x, layer=layer):
            layer.update(tree)
            return (layer(x) * values["cotangent"]).sum()

        tree, dx = mx.grad(loss, argnums=(0, 1))({name: values[name] for name in names}, values["x"])
        layer.update({name: values[name] for name in names})
        assert len(tree) == {"lora": 2, "dora": 3}[kind] and names == list(adapters.trainable(layer))
        for name, found in {"y": layer(values["x"]), "x": dx, **tree}.items():
            close(found, golden[f"{case}/{name}"])


def test_output_and_gradients_equal_peft():
    check_parity(load_file(make_adapters.GOLDEN))


@pytest.mark.parity
@pytest.mark.filterwarnings("ignore")
def test_output_and_gradients_equal_peft_live():
    golden = make_adapters.reference()[0]
    check_parity(golden)
    assert golden.keys() == load_file(make_adapters.GOLDEN).keys()


# --- the start


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bits", [None, 2, 3, 4, 5, 6, 8])
def test_museum_08_starts_equal_to_its_base_at_every_bit_width(kind, bits):
    """mlx-lm's DoRA has the wrong shape at 3, 5 and 6 bits (tuner/dora.py: ``input_dims *= 32 // bits``; in
    LoRA: mlx-lm 165)."""
    net = fresh(bits, layers=1, bias=True)
    before = net(IDS)
    KINDS[kind](rank=4, targets="all-linear").attach(net, 0)
    close(net(IDS), before, 2e-6)


def test_initial_values_depend_on_seed_and_name_only():
    nets = [fresh(), fresh(), fresh()]
    mx.random.seed(1)
    LoRA(rank=4).attach(nets[0], 5)
    mx.random.seed(2)
    LoRA(rank=4, targets="all-linear").attach(nets[1], 5)
    LoRA(rank=4).attach(nets[2], 6)
    state = mx.random.uniform(shape=(3,)).tolist()
    mx.random.seed(2)
    assert mx.random.uniform(shape=(3,)).tolist() == state, "attach drew from the global random state"
    one, wider, other = (adapters.trainable(net) for net in nets)
    first = [name for name in one if name.endswith("lora_a")]
    assert len(first) == 6 and len({str(one[name].tolist()) for name in first}) == 6
    for name in first:
        assert mx.array_equal(one[name], wider[name]) and not mx.array_equal(one[name], other[name])
        assert 0.9 * 64**-0.5 < mx.abs(one[name]).max().item() <= 64**-0.5
    assert all(not one[name].any() for name in one if name.endswith("lora_b"))


def test_rows_of_zeros_stay_zero_in_dora():
    linear = nn.Linear(8, 6, bias=False)
    linear.weight = linear.weight * (mx.arange(6) != 2)[:, None]
    layer = adapters.DoRALinear(linear, 2, 2.0, 0.0, mx.random.key(0))
    y = layer(mx.ones((1, 8)))
    assert mx.isfinite(y).all() and y[0, 2].item() == 0
    close(y, linear(mx.ones((1, 8))), 1e-6)


# --- DoRA never expands the base


@pytest.mark.parametrize("bits", [None, 3, 4, 6])
def test_dora_lengths_equal_those_of_the_formed_matrix(bits):
    net = adapted(DoRA(rank=4, targets="all-linear"), bits=bits, layers=1)
    layers = [layer for _, layer in net.named_modules() if isinstance(layer, adapters.DoRALinear)]
    assert len(layers) == 7
    for layer in layers:
        formed = adapters.dense(layer.linear) + layer.scale * (layer.lora_a @ layer.lora_b).T
        close(layer.lengths(), mx.linalg.norm(formed, axis=1))


def test_museum_08_forward_pass_keeps_the_quantised_base_packed(monkeypatch):
    net = adapted(DoRA(rank=4, targets="all-linear"), bits=4, layers=1)

    def refuse(*args, **options):
        raise AssertionError("the base was expanded")

    monkeypatch.setattr(mx, "dequantize", refuse)
    assert mx.isfinite(net.model.layers[0](mx.ones((1, 3, 64)))).all()


def test_parameters_are_float32_and_activations_keep_the_dtype_of_the_base():
    specs = (
        LoRA(rank=4, full_modules=("input_layernorm",)),
        DoRA(rank=4, full_modules=("norm", "embed_tokens")),
        Full(),
    )
    for spec in specs:
        net = fresh(dtype=mx.bfloat16)
        spec.attach(net, 0)
        assert {value.dtype for value in adapters.trainable(net).values()} == {mx.float32}
        assert move(net).model(IDS).dtype == mx.bfloat16
        assert type(fresh(dtype=mx.bfloat16).model.norm) is nn.RMSNorm


# --- dropout


def test_dropout_is_a_function_of_key_and_layer():
    net = adapted(LoRA(rank=4, dropout=0.5)).train()
    outputs = []
    for seed in (1, 2, 1):
        adapters.seed_dropout(net, mx.random.key(seed))
        outputs += [net(IDS), net(IDS)]
    assert mx.array_equal(outputs[0], outputs[1]) and mx.array_equal(outputs[0], outputs[4])
    assert not mx.array_equal(outputs[0], outputs[2])
    keys = [layer._key.tolist() for _, layer in net.named_modules() if isinstance(layer, adapters.LoRALinear)]
    assert len(keys) == len({tuple(key) for key in keys}) == 6
    assert not [name for name, _ in tree_flatten(net) if "_key" in name]


def test_dropout_keeps_the_mean_and_its_share():
    layer = adapters.LoRALinear(nn.Linear(1000, 1, bias=False), 1, 1.0, 0.25, mx.random.key(0))
    layer.linear.weight, layer.lora_a, layer.lora_b = mx.zeros((1, 1000)), mx.ones((1000, 1)), mx.ones((1, 1))
    object.__setattr__(layer, "_key", mx.random.key(3))
    kept = layer.train()(mx.ones((64, 1000))).sum().item() * 0.75 / 64000
    assert abs(kept - 0.75) < 5 * (0.75 * 0.25 / 64000) ** 0.5


def test_dropout_is_off_in_eval_mode_and_refuses_to_be_skipped():
    net = adapted(DoRA(rank=4, dropout=0.5))
    plain = adapted(DoRA(rank=4))
    assert mx.array_equal(net(IDS), plain(IDS)) and mx.array_equal(plain.train()(IDS), plain.eval()(IDS))
    with pytest.raises(TrainingError, match="seed_dropout"):
        net.train()(IDS)
    adapters.seed_dropout(net, mx.random.key(0))
    assert not mx.array_equal(net(IDS), plain(IDS))
    assert mx.array_equal(net.eval()(IDS), plain(IDS))


@pytest.mark.parametrize("base", ["plain", "bias", "4 bits"])
@pytest.mark.parametrize("dropout", [0, 0.3])
def test_the_kernels_of_training_compute_what_the_operations_do(base, dropout, monkeypatch):
    linear = nn.Linear(96, 64, bias=base == "bias")
    if base == "4 bits":
        linear = nn.QuantizedLinear.from_linear(linear, 32, 4)
    linear.freeze()
    layer = adapters.LoRALinear(linear, 8, 2.0, dropout, mx.random.key(3)).train()
    weights = {"lora_a": layer.lora_a, "lora_b": mx.random.normal((8, 64), key=mx.random.key(1))}
    object.__setattr__(layer, "_key", mx.random.key(5))
    x = mx.random.normal((2, 7, 96), key=mx.random.key(2))

    def value(x: mx.array, weights: dict[str, mx.array]) -> mx.array:
        layer.update(weights)
        return mx.sin(layer(x)).sum()

    def gradients_of() -> list[np.ndarray]:
        total, (of_x, by_name) = mx.value_and_grad(value, argnums=(0, 1))(x, weights)
        return [np.array(array) for array in (total, of_x, by_name["lora_a"], by_name["lora_b"])]

    fused = gradients_of()
    monkeypatch.setattr("tunesmith.adapters.layers.computes_float32", lambda linear, x: False)
    for ours, plain in zip(fused, gradients_of(), strict=True):
        assert np.abs(ours - plain).max() <= 2e-6 * max(1, np.abs(plain).max())


@pytest.mark.parametrize("kind", KINDS)
def test_museum_06_checkpointed_gradients_with_dropout(kind):
    """nn.Dropout under mx.checkpoint draws another mask in the second pass, as in guided-diffusion 167."""
    spec = KINDS[kind](rank=4, dropout=0.4, targets="all-linear")
    net = adapted(spec).train()
    adapters.seed_dropout(net, mx.random.key(9))
    value, plain = gradients(net)
    for layer in net.model.layers:
        layer.__class__ = type("Again", (type(layer),), {"__call__": _again(type(layer))})
    again_value, again = gradients(net)
    assert value == pytest.approx(again_value, rel=1e-6) and len(plain) == {"lora": 42, "dora": 63}[kind]
    for name in plain:
        assert mx.abs(plain[name]).max() > 0
        close(again[name], plain[name], 1e-6)


def _again(kind):
    def call(self, x, *rest, **options):
        def run(parameters, x):
            self.update(parameters)
            return kind.__call__(self, x, *rest, **options)

        return mx.checkpoint(run)(self.trainable_parameters(), x)

    return call


@pytest.mark.parametrize("captured", [False, True])
def test_key_may_be_an_argument_of_a_compiled_function(captured):
    net = adapted(DoRA(rank=4, dropout=0.4, targets="all-linear"), layers=1).train()
    state = {"inputs": [net.state], "outputs": [net.state]} if captured else {}

    def forward(ids, key):
        adapters.seed_dropout(net, key)
        return net(ids)

    compiled = mx.compile(forward, **state)
    outputs = []
    for seed in (1, 2, 1):
        expected = forward(IDS, mx.random.key(seed))
        outputs.append(compiled(IDS, mx.random.key(seed)))
        close(outputs[-1], expected, 2e-6)
    assert mx.array_equal(outputs[0], outputs[2]) and not mx.array_equal(outputs[0], outputs[1])


# --- targets


ATTENTION = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj")
MLP = ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")


@pytest.mark.parametrize(
    ("targets", "layers", "names", "blocks"),
    [
        ("all-linear", None, ATTENTION + MLP, (0, 1, 2)),
        (("all-linear", "lm_head"), 2, (*ATTENTION, *MLP, "lm_head"), (1, 2)),
        (["q_proj", "v_proj"], None, ("self_attn.q_proj", "self_attn.v_proj"), (0, 1, 2)),
        ("self_attn.q_proj", 1, ("self_attn.q_proj",), (2,)),
        (("*_proj",), 2, ATTENTION + MLP, (1, 2)),
        (("mlp.*",), None, MLP, (0, 1, 2)),
        (("layers.1.*.[qk]_proj",), None, ("self_attn.q_proj", "self_attn.k_proj"), (1,)),
        (("model.layers.0.mlp.up_proj", "lm_head"), None, ("mlp.up_proj", "lm_head"), (0,)),
        ("*", None, (*ATTENTION, *MLP, "lm_head"), (0, 1, 2)),
        ("*", 1, ATTENTION + MLP, (2,)),
    ],
)
def test_targets(targets, layers, names, blocks, tmp_path):
    """And mlx-lm reads each choice back: the same tensors, the same logits."""
    expected = {f"model.layers.{block}.{name}" for block in blocks for name in names if name != "lm_head"}
    expected |= {"lm_head"} & set(names)
    spec = LoRA(rank=4, alpha=6.0, targets=targets, layers=layers)
    net = fresh()
    attached = spec.attach(net, 0)
    assert {name.rsplit(".", 1)[0] for name in attached.tensors} == expected
    assert attached.tensors == tuple(sorted(attached.tensors)) == tuple(adapters.trainable(net))
    move(net)
    adapters.save(net, spec, tmp_path)
    theirs = load_adapters(fresh(), str(tmp_path)).eval()
    ours = {name for name, _ in tree_flatten(net.parameters())}
    assert ours == {name for name, _ in tree_flatten(theirs.parameters())}
    close(net(IDS), theirs(IDS))


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (LoRA(rank=4, targets="q_prj"), "did you mean 'q_proj'.*down_proj, gate_proj, k_proj, lm_head"),
        (LoRA(rank=4, targets=("v_proj", "embed_tokens")), "'embed_tokens' matches no linear layer"),
        (LoRA(rank=4, targets="proj"), "'proj' matches no linear layer"),
        (LoRA(rank=4, targets="layers.0.*", layers=1), "in the last 1 blocks"),
        (LoRA(rank=4, layers=4), "adapter.layers: 4 is more than the model's 3 blocks"),
        (LoRA(rank=33), "adapter.rank: rank 33 is more than model.layers.0.self_attn.v_proj .*64, 32"),
        (
            LoRA(rank=4, full_modules=("input_layernrm",)),
            "adapter.full_modules.*did you mean 'input_layernorm'",
        ),
        (LoRA(rank=4, full_modules=("self_attn",)), "both adapted and trained in full"),
        (Full(targets=("mpl",)), "did you mean 'mlp'"),
    ],
)
def test_what_cannot_be_attached_is_refused_and_leaves_the_net_alone(spec, message):
    net = fresh()
    names = [name for name, _ in tree_flatten(net.parameters())]
    with pytest.raises(ConfigError) as caught:
        spec.attach(net, 0)
    assert re.search(message, str(caught.value), re.S), str(caught.value)
    assert names == [name for name, _ in tree_flatten(net.parameters())]


def test_quantised_weights_and_a_second_adapter_are_refused():
    for spec in (Full(), LoRA(rank=4, full_modules=("lm_head",))):
        with pytest.raises(ConfigError, match="quantised"):
            spec.attach(fresh(bits=4), 0)
    net = adapted(LoRA(rank=4))
    with pytest.raises(ConfigError, match="already"):
        DoRA(rank=4).attach(net, 0)


@pytest.mark.parametrize(
    "values", [{"rank": 0}, {"alpha": 0.0}, {"dropout": 1.0}, {"targets": ()}, {"layers": 0}, {"r": 8}]
)
def test_ranges(values):
    with pytest.raises(ValidationError):
        LoRA(**values)


# --- what is trained


@pytest.mark.parametrize(
    ("spec", "bits"),
    [
        (LoRA(rank=4, targets="all-linear"), None),
        (LoRA(rank=4, targets="all-linear", layers=2, full_modules=("input_layernorm", "norm")), 4),
        (DoRA(rank=4, targets=("q_proj", "lm_head")), 3),
        (Full(), None),
        (Full(targets=("mlp", "embed_tokens"), layers=1), None),
    ],
)
def test_gradient_reaches_every_trainable_tensor_and_none_other(spec, bits):
    net = adapted(spec, bits=bits, bias=True)
    before = dict(tree_flatten(net.parameters()))
    names = list(adapters.trainable(net))
    _, found = gradients(net)
    assert sorted(found) == names
    for name, value in found.items():
        # A bias on the keys shifts all scores of a query alike: softmax does not see it.
        assert "k_proj.bias" in name or mx.abs(value).max() > 1e-9, name
    after = dict(tree_flatten(net.parameters()))
    assert all(mx.array_equal(after[name], value) for name, value in before.items())
    kept = {name for name in before if name not in names}
    assert all(before[name].dtype == mx.float32 for name in names)
    assert {"lora_a" in name or "lora_b" in name or name.endswith(".m") for name in kept} <= {False}


def test_trainable_names():
    net = fresh()
    attached = LoRA(rank=4, targets="q_proj", layers=2, full_modules=("input_layernorm", "norm")).attach(
        net, 0
    )
    assert attached.tensors == (
        "model.layers.1.input_layernorm.weight",
        "model.layers.1.self_attn.q_proj.lora_a",
        "model.layers.1.self_attn.q_proj.lora_b",
        "model.layers.2.input_layernorm.weight",
        "model.layers.2.self_attn.q_proj.lora_a",
        "model.layers.2.self_attn.q_proj.lora_b",
        "model.norm.weight",
    )
    assert attached.trainable == 3 * 64 + 2 * (64 * 4 + 4 * 64)
    full = Full(targets=("mlp",), layers=1).attach(fresh(), 0)
    assert full.tensors == tuple(f"model.layers.2.mlp.{name}_proj.weight" for name in ("down", "gate", "up"))


@pytest.mark.parametrize("bits", [None, 3, 4])
def test_counts(bits):
    size = sum(value.size for _, value in tree_flatten(fresh().parameters()))
    attached = LoRA(rank=4, targets="q_proj").attach(fresh(bits), 0)
    assert attached[:2] == (3 * 2 * 4 * 64, size + 3 * 2 * 4 * 64)
    if bits is None:
        assert Full().attach(fresh(), 0)[:2] == (size, size)


# --- files


@pytest.mark.parametrize("bits", [None, 4, 3])
@pytest.mark.parametrize("kind", KINDS)
def test_load_of_save_is_the_same_and_mlx_lm_agrees(kind, bits, tmp_path):
    spec = KINDS[kind](
        rank=4, alpha=6.0, dropout=0.1, targets=("q_proj", "mlp.*"), layers=2, rank_stabilised=True
    )
    net = adapted(spec, bits=bits)
    adapters.save(net, spec, tmp_path)
    other = fresh(bits)
    assert adapters.load(other, tmp_path) == spec
    assert adapters.trainable(other).keys() == adapters.trainable(net).keys()
    assert all(
        mx.array_equal(value, adapters.trainable(net)[name])
        for name, value in adapters.trainable(other).items()
    )
    assert mx.array_equal(net(IDS), other(IDS)) and not mx.allclose(net(IDS), fresh(bits)(IDS), atol=0.1)
    if kind == "dora" and bits == 3:  # mlx-lm cannot build it
        return
    close(load_adapters(fresh(bits), str(tmp_path)).eval()(IDS), net(IDS), 2e-5)


@given(
    values=st.fixed_dictionaries(
        {
            "rank": st.integers(1, 32),
            "alpha": st.floats(0.1, 100),
            "dropout": st.floats(0, 0.9),
            "rank_stabilised": st.booleans(),
            "layers": st.sampled_from([None, 1, 3]),
            "full_modules": st.sampled_from([(), ("norm",)]),
            "targets": st.sampled_from(["all-linear", ("v_proj",), ("lm_head", "*.1.mlp.*")]),
        }
    ),
    kind=st.sampled_from([LoRA, DoRA]),
)
@settings(max_examples=8, deadline=None)
def test_any_spec_comes_back(values, kind, tmp_path_factory):
    if values["layers"] == 1:
        values["targets"] = "all-linear"
    folder, spec, net = tmp_path_factory.mktemp("adapter"), kind(**values), fresh()
    spec.attach(net, 1)
    adapters.save(net, spec, folder)
    assert adapters.load(fresh(), folder) == spec


def test_same_values_same_bytes(tmp_path):
    for folder in ("a", "b"):
        spec = DoRA(rank=4)
        adapters.save(adapted(spec), spec, tmp_path / folder)
    for name in ("adapters.safetensors", "adapter_config.json"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_files_have_the_usual_mode(tmp_path):
    spec, before = LoRA(rank=4), os.umask(0o022)
    try:
        adapters.save(adapted(spec), spec, tmp_path)
    finally:
        os.umask(before)
    assert [path.stat().st_mode & 0o777 for path in tmp_path.iterdir()] == [0o644, 0o644]


def test_full_weights_are_saved_and_read_by_mlx_lm(tmp_path):
    spec = Full(layers=2)
    net = adapted(spec)
    adapters.save(net, spec, tmp_path)
    other = fresh()
    assert adapters.load(other, tmp_path) == spec and mx.array_equal(other(IDS), net(IDS))
    close(load_adapters(fresh(), str(tmp_path)).eval()(IDS), net(IDS))


def test_hybrid_comes_back_and_mlx_lm_refuses_it_by_name(tmp_path):
    spec = LoRA(rank=4, full_modules=("input_layernorm",))
    net = adapted(spec, bits=4)
    adapters.save(net, spec, tmp_path)
    other = fresh(4)
    adapters.load(other, tmp_path)
    assert mx.array_equal(other(IDS), net(IDS))
    with pytest.raises(ValueError, match="input_layernorm"):
        load_adapters(fresh(4), str(tmp_path))


def test_museum_22_an_adapter_that_would_be_inert_is_refused(tmp_path):
    """vLLM (34591) and mlx-forge load names that match nothing and go on with the base."""
    spec = LoRA(rank=4)
    net = adapted(spec)
    adapters.save(net, spec, tmp_path)
    path = tmp_path / "adapters.safetensors"
    saved = {name: mx.array(value) for name, value in load_file(path).items()}
    renamed = {f"base_model.{name}" if "layers.1" in name else name: value for name, value in saved.items()}
    renamed["model.layers.0.self_attn.q_proj.lora_a"] = mx.zeros((64, 8))
    mx.save_safetensors(str(path), renamed)
    other = fresh()
    spec.attach(other, 7)
    before = other(IDS)
    with pytest.raises(ModelError) as caught:
        adapters.load_tensors(other, tmp_path)
    text = str(caught.value)
    assert text.count("missing") == 4 and text.count("not in the model") == 4 and "9 tensors" in text
    assert "model.layers.0.self_attn.q_proj.lora_a: (64, 8) in the file, (64, 4) in the model" in text
    assert mx.array_equal(other(IDS), before), "a refused adapter was loaded in part"
    with pytest.raises(ModelError, match="do not fit"):
        adapters.load(fresh(), tmp_path)


@pytest.mark.parametrize(
    "damage", ["no folder", "no config", "not json", "not ours", "kind", "target", "torn", "no weights"]
)
def test_an_adapter_that_cannot_be_read_is_a_model_error(damage, tmp_path):
    spec = LoRA(rank=4)
    net = adapted(spec)
    adapters.save(net, spec, tmp_path)
    config, weights = tmp_path / "adapter_config.json", tmp_path / "adapters.safetensors"
    theirs = {
        "fine_tune_type": "lora",
        "num_layers": 2,
        "lora_parameters": {"rank": 4, "scale": 2.0, "dropout": 0.0},
    }
    match damage:
        case "no folder":
            tmp_path = tmp_path / "nowhere"
        case "no config":
            config.unlink()
        case "not json":
            config.write_text("{")
        case "not ours":
            config.write_text(json.dumps(theirs))
        case "kind":
            config.write_text(json.dumps({"tunesmith": {"adapter": {"kind": "lokr"}}}))
        case "target":
            config.write_text(json.dumps({"tunesmith": {"adapter": {"kind": "lora", "targets": ["c_attn"]}}}))
        case "torn":
            weights.write_bytes(weights.read_bytes()[:-100])
        case "no weights":
            weights.unlink()
    with pytest.raises(ModelError) as caught:
        adapters.load(fresh(), tmp_path)
    assert str(tmp_path) in str(caught.value)


# --- measured and merged


@pytest.mark.parametrize("bits", [None, 3, 4])
@pytest.mark.parametrize("kind", KINDS)
def test_growth_is_the_norm_of_the_change(kind, bits):
    net = fresh(bits, bias=True)
    weights = {name: module for name, module in net.named_modules() if "weight" in module}
    spec = KINDS[kind](rank=4, targets="all-linear")
    spec.attach(net, 0)
    grown = instruments.Grown(net)
    still = grown.event(0)
    assert {*still.norms.values(), *still.relative.values()} == {0.0}
    move(net)
    found = grown.event(1)
    assert len(found.norms) == 21
    adapters.merge(net)
    merged = dict(net.named_modules())
    for name, change in found.norms.items():
        base = adapters.dense(weights[name])
        assert change == pytest.approx(mx.linalg.norm(merged[name].weight - base).item(), rel=1e-4)
        assert found.relative[name] == pytest.approx(change / mx.linalg.norm(base).item(), rel=1e-5)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bits", [None, 2, 3, 4, 5, 6, 8])
def test_museum_09_merged_equals_unmerged(kind, bits):
    """Fusing into a 4-bit base again erases the update (mlx-lm's default): the merged weight is dense."""
    net = adapted(
        KINDS[kind](rank=4, targets=("all-linear", "lm_head"), full_modules=("norm",)),
        bits=bits,
        bias=True,
        layers=2,
    )
    unmerged = net(IDS)
    assert adapters.merge(net) == 15
    assert not [name for name, _ in tree_flatten(net.parameters()) if "lora" in name]
    assert not [name for name in adapters.trainable(net) if "norm" not in name]
    close(net(IDS), unmerged, 2e-5)
    assert {type(module) for name, module in net.named_modules() if name.endswith("_proj")} == {nn.Linear}
    assert adapters.merge(net) == 0


@pytest.mark.parametrize("bits", [None, 4])
def test_merged_weight_has_the_dtype_of_its_base_and_is_rounded_once(bits):
    net = adapted(LoRA(rank=4), bits=bits, dtype=mx.bfloat16)
    layer = net.model.layers[0].self_attn.q_proj
    base = layer.linear
    if bits is not None:
        scales, biases = base.scales.astype(mx.float32), base.biases.astype(mx.float32)
        exact = mx.dequantize(base.weight, scales, biases, group_size=base.group_size, bits=bits)
    else:
        exact = base.weight.astype(mx.float32)
    exact = exact + 8.0 * (layer.lora_a @ layer.lora_b).T  # alpha 32 / rank 4
    adapters.merge(net)
    assert mx.array_equal(net.model.layers[0].self_attn.q_proj.weight, exact.astype(mx.bfloat16))
    assert net(IDS).dtype == mx.bfloat16
