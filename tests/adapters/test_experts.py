"""Adapters on routed experts: equal to a loop over the experts, exact at the start, read by mlx-lm, merged
and detached without a trace."""

from __future__ import annotations

import json

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from adapters.mixtures import FAMILIES, expert_layers, fresh
from adapters.test_attachment import state
from adapters.test_layers import _again, close, gradients, move
from mlx.utils import tree_flatten
from mlx_lm.models.switch_layers import QuantizedSwitchLinear, SwitchLinear
from mlx_lm.utils import load_adapters

from tunesmith import adapters
from tunesmith.adapters import DoRA, DoRAExperts, LoRA, LoRAExperts, routing
from tunesmith.engine.engine import Engine
from tunesmith.engine.requests import Request
from tunesmith.errors import ConfigError, ModelError, TrainingError
from tunesmith.training import instruments

KINDS = {"lora": LoRA, "dora": DoRA}
IDS = mx.array([[1, 5, 9, 33, 2, 8], [7, 7, 3, 60, 21, 4]])
LONG = (mx.arange(80).reshape(2, 40) * 37 + 11) % 64
"""Enough tokens for mlx-lm to sort them by expert."""


def adapted(spec, seed: int = 0, family: str = "qwen3_moe", **options):
    net = fresh(family, **options)
    spec.attach(net, seed)
    return move(net)


def layer_of(kind: str, bits: int | None, *, bias: bool, dtype=mx.float32):
    """An adapted layer of 5 experts, moved off its start."""
    random = np.random.Generator(np.random.PCG64(2))
    plain = SwitchLinear(32, 48, 5, bias=bias)
    plain.weight = mx.array(random.normal(0, 0.3, plain.weight.shape).astype(np.float32)).astype(dtype)
    if bias:
        plain.bias = mx.array(random.normal(0, 0.3, plain.bias.shape).astype(np.float32)).astype(dtype)
    base = plain if bits is None else plain.to_quantized(32, bits)
    made = {"lora": LoRAExperts, "dora": DoRAExperts}[kind](base, 4, 1.5, 0.0, mx.random.key(0))
    base.freeze()
    return move(made)


def loop(layer, tree, x: mx.array, indices: mx.array) -> mx.array:
    """(N, 1, in), (N,) → (N, 1, out), one token and its expert at a time, by the papers' formulas."""
    base, rows = layer.linear, []
    weight = base.weight
    if isinstance(base, QuantizedSwitchLinear):
        weight = mx.dequantize(base.weight, base.scales, base.biases, base.group_size, base.bits)
    for token, expert in enumerate(indices.tolist()):
        changed = weight[expert].astype(mx.float32)
        changed = changed + layer.scale * tree["lora_b"][expert] @ tree["lora_a"][expert]
        if "m" in tree:
            length = mx.stop_gradient(mx.linalg.norm(changed, axis=1))
            changed = (tree["m"][expert] / length)[:, None] * changed
        y = x[token].astype(mx.float32) @ changed.T
        rows.append(y + base.bias[expert] if "bias" in base else y)
    return mx.stack(rows)


@pytest.mark.parametrize("ordered", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("bits", [None, 3, 4, 8])
@pytest.mark.parametrize("kind", KINDS)
def test_output_and_gradients_equal_a_loop_over_the_experts(kind, bits, bias, ordered):
    """One expert gets no token: its gradient is zero."""
    layer = layer_of(kind, bits, bias=bias)
    random = np.random.Generator(np.random.PCG64(7))
    x, cotangent = (mx.array(random.normal(size=(12, 1, n)).astype(np.float32)) for n in (32, 48))
    indices = mx.array([4, 0, 1, 1, 3, 0, 4, 4, 1, 0, 3, 3])
    indices = mx.sort(indices) if ordered else indices

    def ours(tree, x):
        layer.update(tree)
        y = layer(x, indices, sorted_indices=ordered)
        return (y * cotangent).sum(), y

    def plain(tree, x):
        y = loop(layer, tree, x, indices)
        return (y * cotangent).sum(), y

    tree = dict(adapters.trainable(layer))
    assert list(tree) == {"lora": ["lora_a", "lora_b"], "dora": ["lora_a", "lora_b", "m"]}[kind]
    (_, y), slopes = mx.value_and_grad(ours, argnums=(0, 1))(tree, x)
    layer.update(tree)
    (_, expected), expected_slopes = mx.value_and_grad(plain, argnums=(0, 1))(tree, x)
    close(y, expected)
    close(slopes[1], expected_slopes[1], 1e-5)
    for name, slope in slopes[0].items():
        close(slope, expected_slopes[0][name], 1e-5)
        assert not slope[2].any() and slope[1].any()


@pytest.mark.parametrize("ids", [IDS, LONG], ids=["unsorted", "sorted"])
@pytest.mark.parametrize("kind", KINDS)
def test_gradients_equal_finite_differences(kind, ids):
    """Along a random direction in each tensor of the experts of the last block, after which no router
    follows: another choice of experts is a jump. For DoRA the norms are constant in the gradient, so that
    only the magnitudes are tried."""
    net = adapted(KINDS[kind](rank=3, targets="all-linear", layers=1))
    _, slopes = gradients(net, ids)
    names = [name for name in slopes if "switch_mlp" in name]
    names = [name for name in names if kind == "lora" or name.endswith(".m")]
    assert len(names) == {"lora": 6, "dora": 3}[kind]
    random = np.random.Generator(np.random.PCG64(1))

    def loss(name, value) -> float:
        net.load_weights([(name, value)], strict=False)
        return mx.square(net(ids).astype(mx.float32)).mean().item()

    for name in names:
        start = adapters.trainable(net)[name]
        direction = mx.array(random.normal(size=start.shape).astype(np.float32))
        direction = direction / mx.linalg.norm(direction)
        step = 3e-3
        ahead, behind = (loss(name, start + sign * step * direction) for sign in (1, -1))
        loss(name, start)
        along = (slopes[name] * direction).sum().item()
        scale = mx.linalg.norm(slopes[name]).item()
        assert (ahead - behind) / (2 * step) == pytest.approx(along, abs=0.02 * scale + 1e-4), name


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bits", [None, 4, 8])
def test_starts_equal_to_its_base(kind, bits, family):
    net = fresh(family, bits)
    before = net(IDS), net(LONG)
    KINDS[kind](rank=4, targets="all-linear").attach(net, 0)
    assert {name for name in adapters.adapted(net) if "self_attn" not in name} >= {*expert_layers(family)}
    close(net(IDS), before[0], 5e-6)
    close(net(LONG), before[1], 5e-6)


@pytest.mark.parametrize("bits", [None, 4])
@pytest.mark.parametrize("kind", KINDS)
def test_parameters_are_float32_and_activations_keep_the_dtype_of_the_base(kind, bits):
    if bits is None and mx.default_device().type == mx.DeviceType.cpu:
        pytest.skip("MLX has gathered products of half precision on a GPU only")
    net = adapted(KINDS[kind](rank=4, targets="all-linear"), bits=bits, dtype=mx.bfloat16)
    assert {value.dtype for value in adapters.trainable(net).values()} == {mx.float32}
    assert net.model(IDS).dtype == mx.bfloat16 and mx.isfinite(net(LONG)).all()


def test_initial_values_depend_on_seed_and_name_only():
    spec = LoRA(rank=4, targets="all-linear")
    nets = [fresh(), fresh(), fresh()]
    for net, seed in zip(nets, (5, 5, 6), strict=True):
        mx.random.seed(seed + id(net) % 100)
        spec.attach(net, seed)
    first, second, other = (adapters.trainable(net) for net in nets)
    names = [name for name in first if "switch_mlp" in name and name.endswith("lora_a")]
    assert len(names) == 6
    for name in names:
        assert mx.array_equal(first[name], second[name]) and not mx.array_equal(first[name], other[name])
        assert not mx.array_equal(first[name][0], first[name][1]), "experts start equal"
        assert 0.9 < mx.abs(first[name]).max().item() * first[name].shape[-1] ** 0.5 <= 1


# --- targets


def coverage(family: str, **settings) -> str:
    return LoRA(rank=1, **settings).attach(fresh(family), 0).coverage


def test_all_linear_takes_experts_and_leaves_routers_and_narrow_layers():
    net = fresh("qwen2_moe")
    attached = LoRA(targets="all-linear").attach(net, 0)
    layers = set(adapters.adapted(net))
    assert {*expert_layers("qwen2_moe")} < layers
    assert not {name for name in layers if name.endswith(("mlp.gate", "shared_expert_gate"))}
    assert {type(layer) for layer in adapters.adapted(net).values()} == {LoRAExperts, adapters.LoRALinear}
    assert attached.coverage == (
        "14 layers adapted (down_proj, gate_proj, k_proj, o_proj, q_proj, up_proj, v_proj); "
        "4 routed experts adapted in each of 6 layers (down_proj, gate_proj, up_proj); "
        "2 layers that are routers not adapted (gate); "
        "2 layers one output wide not adapted (shared_expert_gate)"
    )
    assert [notice.what for notice in attached.notices] == [attached.coverage]


def test_what_is_left_out_is_said():
    assert coverage("mixtral") == (
        "4 layers adapted (q_proj, v_proj); "
        "6 layers of routed experts not adapted (down_proj, gate_proj, up_proj); "
        "2 layers that are routers not adapted (gate)"
    )


@pytest.mark.parametrize(("family", "router"), [("qwen3_moe", "gate"), ("gpt_oss", "router")])
@pytest.mark.parametrize("target", ["{}", "mlp.{}", "model.layers.0.*.{}", "*", "*.mlp.*", "all-linear"])
def test_a_router_is_adapted_only_if_it_is_named_and_with_a_warning(family, router, target):
    net = fresh(family)
    target = target.format(router)
    attached = LoRA(rank=2, targets=("q_proj", target)).attach(net, 0)
    routers = [name for name in adapters.adapted(net) if name.endswith(f"mlp.{router}")]
    warnings = [notice for notice in attached.notices if notice.level == "warning"]
    expected = {"*": 0, "*.mlp.*": 0, "all-linear": 0, f"model.layers.0.*.{router}": 1}.get(target, 2)
    assert len(routers) == expected and [notice.count for notice in warnings] == [expected] * bool(expected)
    assert all("routers are adapted" in notice.what for notice in warnings)


def test_only_layers_that_cannot_be_adapted_is_an_error():
    net = fresh("qwen2_moe")
    for targets in ("shared_expert_gate", "*_gate", "*.gat?"):
        before = state(net)
        with pytest.raises(ConfigError, match=r"adapter.targets.*only routers, or layers one output wide"):
            LoRA(rank=1, targets=targets).attach(net, 0)
        assert state(net) == before


def test_the_default_rank_is_not_refused_but_said():
    """A router of 4 outputs holds rank 4. A larger rank that somebody set is refused, as for other layers."""
    net = fresh()
    attached = LoRA(targets=("q_proj", "gate")).attach(net, 0)
    texts = [notice.what for notice in attached.notices]
    assert any("rank 16 is more than" in text and "mlp.gate (in, out = (32, 4))" in text for text in texts)
    assert adapters.trainable(net)["model.layers.0.mlp.gate.lora_b"].shape == (16, 4)
    with pytest.raises(ConfigError, match="rank 33 is more than"):
        LoRA(rank=33, targets="all-linear").attach(fresh(), 0)


def test_counts():
    size = sum(value.size for _, value in tree_flatten(fresh().parameters()))
    attached = LoRA(rank=3, targets=("mlp.switch_mlp.*",)).attach(fresh(), 0)
    each_layer = 4 * 3 * (32 + 96)
    assert attached[:2] == (6 * each_layer, size + 6 * each_layer)
    for bits in (4, 8):
        assert LoRA(rank=3, targets=("mlp.switch_mlp.*",)).attach(fresh(bits=bits), 0)[:2] == attached[:2]
    dora = DoRA(rank=3, targets=("up_proj",)).attach(fresh(), 0)
    assert dora.trainable == 2 * (each_layer + 4 * 96)


# --- files


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("bits", [None, 4])
@pytest.mark.parametrize("kind", KINDS)
def test_load_of_save_is_the_same_and_mlx_lm_agrees(kind, bits, family, tmp_path):
    spec = KINDS[kind](rank=4, alpha=6.0, targets="all-linear", layers=1)
    net = adapted(spec, family=family, bits=bits)
    adapters.save(net, spec, tmp_path)
    other = fresh(family, bits)
    assert adapters.load(other, tmp_path) == spec
    ours, loaded = adapters.trainable(net), adapters.trainable(other)
    assert ours.keys() == loaded.keys() and all(mx.array_equal(ours[name], loaded[name]) for name in ours)
    assert mx.array_equal(net(LONG), other(LONG))
    assert not mx.allclose(net(LONG), fresh(family, bits)(LONG), atol=0.1)
    if kind == "lora":
        theirs = load_adapters(fresh(family, bits), str(tmp_path)).eval()
        close(theirs(IDS), net(IDS), 2e-5)
        close(theirs(LONG), net(LONG), 2e-5)
        return
    with pytest.raises(ValueError, match="doesn't support DoRA yet"):
        load_adapters(fresh(family, bits), str(tmp_path))


def test_mlx_lms_lack_of_dora_on_experts_is_said():
    notices = DoRA(rank=2, targets="all-linear").attach(fresh(), 0).notices
    assert [notice.count for notice in notices if "mlx-lm has no DoRA" in notice.what] == [6]
    assert not [n for n in DoRA(rank=2).attach(fresh(), 0).notices if "mlx-lm" in n.what]


@pytest.mark.parametrize("kind", KINDS)
def test_an_adapter_from_before_experts_were_adapted_keeps_its_layers(kind, tmp_path):
    """With all-linear, releases up to 0.1.0 adapted routers and layers one output wide, and no experts."""
    spec = KINDS[kind](rank=1, targets="all-linear")
    net = fresh("qwen2_moe")
    linear = {
        name
        for name, module in net.named_modules()
        if isinstance(module, nn.Linear) and name.startswith("model.layers")
    }
    assert any(name.endswith("mlp.gate") for name in linear)
    spec.attach(net, 3, recorded=linear)
    assert set(adapters.adapted(net)) == linear
    adapters.save(move(net), spec, tmp_path)
    assert set(json.loads((tmp_path / adapters.CONFIG).read_text())["lora_parameters"]["keys"]) == linear
    other = fresh("qwen2_moe")
    adapters.load(other, tmp_path)
    assert set(adapters.adapted(other)) == linear and mx.array_equal(other(LONG), net(LONG))


def test_detached_leaves_the_same_modules_arrays_and_outputs(tmp_path):
    spec = DoRA(rank=2, targets="all-linear")
    adapters.save(adapted(spec, bits=4), spec, tmp_path)
    net = fresh(bits=4)
    before, outputs = state(net), net(IDS)
    with adapters.attached(net, tmp_path):
        assert not mx.array_equal(net(IDS), outputs)
    assert state(net) == before and mx.array_equal(net(IDS), outputs)


# --- merged and measured


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"])
@pytest.mark.parametrize("bits", [None, 3, 4])
@pytest.mark.parametrize("kind", KINDS)
def test_merged_equals_unmerged(kind, bits, family):
    net = adapted(KINDS[kind](rank=4, targets="all-linear"), family=family, bits=bits)
    unmerged = net(IDS), net(LONG)
    assert adapters.merge(net) == 14
    assert not [name for name, _ in tree_flatten(net.parameters()) if "lora" in name]
    close(net(IDS), unmerged[0], 2e-5)
    close(net(LONG), unmerged[1], 2e-5)
    layers = dict(net.named_modules())
    assert {type(layers[name]) for name in expert_layers(family)} == {SwitchLinear}
    assert not adapters.trainable(net) and adapters.merge(net) == 0


def test_merged_weights_have_the_dtype_of_their_base():
    net = adapted(LoRA(rank=4, targets="all-linear"), bits=4, dtype=mx.bfloat16)
    adapters.merge(net)
    assert net(IDS).dtype == mx.bfloat16


@pytest.mark.parametrize("bits", [None, 4])
@pytest.mark.parametrize("kind", KINDS)
def test_growth_is_the_norm_of_the_change_of_all_experts(kind, bits):
    net = fresh(bits=bits)
    bases = {name: module for name, module in net.named_modules() if name in expert_layers("qwen3_moe")}
    weights = {
        name: base.weight
        if bits is None
        else mx.dequantize(base.weight, base.scales, base.biases, base.group_size, base.bits)
        for name, base in bases.items()
    }
    KINDS[kind](rank=4, targets="switch_mlp.*").attach(net, 0)
    grown = instruments.Grown(net)
    assert set(grown.event(0).norms.values()) == {0.0}
    move(net)
    measured = grown.event(1)
    adapters.merge(net)
    merged = dict(net.named_modules())
    assert set(measured.norms) == set(weights)
    for name, weight in weights.items():
        change = mx.linalg.norm((merged[name].weight - weight).reshape(-1)).item()
        assert measured.norms[name] == pytest.approx(change, rel=1e-4)
        relative = change / mx.linalg.norm(weight.reshape(-1)).item()
        assert measured.relative[name] == pytest.approx(relative, rel=1e-4)
        assert 1 < measured.effective_rank[name] <= 4


def test_growth_of_many_experts_is_measured_on_some():
    net = fresh(num_experts=21)
    LoRA(rank=2, targets="up_proj").attach(net, 0)
    layer = next(iter(adapters.adapted(net).values()))
    measured = instruments._measured(layer)
    assert len(measured) == instruments.MEASURED_EXPERTS
    assert [mx.array_equal(part.lora_a.T, layer.lora_a[number]) for number, part in [(0, measured[0])]]
    assert mx.array_equal(measured[-1].lora_a.T, layer.lora_a[7 * 21 // 8])


# --- training


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("ids", [IDS, LONG], ids=["unsorted", "sorted"])
def test_checkpointed_and_compiled_gradients_with_dropout(kind, ids):
    net = adapted(KINDS[kind](rank=4, dropout=0.4, targets="all-linear")).train()
    with pytest.raises(TrainingError, match="seed_dropout"):
        net(ids)
    adapters.seed_dropout(net, mx.random.key(9))
    value, plain = gradients(net, ids)
    weights = net.trainable_parameters()
    compiled_value, compiled = gradients(net, ids, compile=True)
    net.update(weights)  # tracing leaves its placeholders behind
    adapters.seed_dropout(net, mx.random.key(8))
    assert gradients(net, ids)[0] != value
    adapters.seed_dropout(net, mx.random.key(9))
    for layer in net.model.layers:
        layer.__class__ = type("Again", (type(layer),), {"__call__": _again(type(layer))})
    again_value, again = gradients(net, ids)
    assert value == pytest.approx(again_value, rel=1e-6) == pytest.approx(compiled_value, rel=1e-5)
    for name in plain:
        close(again[name], plain[name], 1e-6)
        close(compiled[name], plain[name], 1e-5)


def test_gradient_reaches_every_expert_and_nothing_else():
    net = adapted(LoRA(rank=4, targets="all-linear"), bits=4)
    before = dict(tree_flatten(net.parameters()))
    _, slopes = gradients(net, LONG)
    assert sorted(slopes) == list(adapters.trainable(net))
    for name, slope in slopes.items():
        assert (mx.abs(slope).reshape(len(slope), -1).max(axis=1) > 0).all(), name
    after = dict(tree_flatten(net.parameters()))
    assert all(mx.array_equal(after[name], value) for name, value in before.items())


# --- several adapters

ROUTED = {
    "lora": LoRA(rank=4, dropout=0.2, targets="all-linear"),
    "dora": DoRA(rank=3, targets="all-linear"),
    "upper": LoRA(rank=2, layers=1, targets=("up_proj",)),
    "attention": LoRA(rank=2),
}


@pytest.fixture(scope="module")
def values(tmp_path_factory):
    """Adapter values by family and name."""
    folder = tmp_path_factory.mktemp("adapters")
    read = {}
    for family in FAMILIES:
        for seed, (name, spec) in enumerate(ROUTED.items()):
            adapters.save(adapted(spec, seed, family), spec, folder / family / name)
            read[family, name] = adapters.read(folder / family / name)
    return read


@pytest.mark.parametrize("names", [[None, *ROUTED], ["dora", "lora", "dora"], ["upper", None]])
@pytest.mark.parametrize("length", [3, 40])
@pytest.mark.parametrize("bits", [None, 4])
@pytest.mark.parametrize("family", FAMILIES)
def test_each_row_of_a_mixed_batch_is_what_it_is_alone(family, bits, length, names, values):
    """Few choices of experts go to them in the order of the tokens, many sorted by expert."""
    ids = (mx.arange(len(names) * length).reshape(len(names), length) * 37 + 11) % 64
    net = fresh(family, bits)
    before = state(net)
    with adapters.routed(net, {name: values[family, name] for name in ROUTED}) as lanes:
        lanes.select(names)
        logits = net(ids)
        for row, name in enumerate(names):
            lanes.select(name)
            close(logits[row], net(ids[row : row + 1])[0], 2e-5)
    assert state(net) == before
    for row, name in enumerate(names):
        handle = values[family, name].attach(net) if name else None
        close(logits[row], net(ids[row : row + 1])[0], 2e-5)
        if handle:
            handle.detach()


def test_dropout_is_off_in_a_net_that_is_in_training(values):
    net = fresh().train()
    with adapters.routed(net, {"lora": values["qwen3_moe", "lora"]}) as lanes:
        lanes.select(["lora", None])
        logits = net(LONG)
    net.eval()
    with adapters.routed(net, {"lora": values["qwen3_moe", "lora"]}) as lanes:
        lanes.select(["lora", None])
        close(logits, net(LONG), 1e-6)


def test_a_pass_of_other_rows_than_were_selected_is_refused(values):
    net = fresh()
    chosen = {name: values["qwen3_moe", name] for name in ("lora", "upper")}
    with adapters.routed(net, {"upper": chosen["upper"]}) as lanes:
        lanes.select(["upper", None, None, None, None])
        with pytest.raises(ModelError, match="24 choices of experts for 5 rows"):
            net(IDS)
    with adapters.routed(net, chosen) as lanes:
        lanes.select(["upper", None, "lora"])
        with pytest.raises(ModelError, match="a pass of 2 rows"):
            net(IDS)


def test_experts_outside_of_a_mixture_have_one_adapter_for_all_rows(values, monkeypatch):
    monkeypatch.setattr(routing, "is_mixture", lambda module: False)
    net = fresh()
    with adapters.routed(net, {"lora": values["qwen3_moe", "lora"]}) as lanes:
        lanes.select(["lora", "lora"])
        with pytest.raises(ModelError, match="one adapter at a time"):
            lanes.select(["lora", None])


def test_requests_whose_adapters_cannot_share_a_pass_are_refused_before_they_begin(values, monkeypatch):
    monkeypatch.setattr(routing, "is_mixture", lambda module: False)
    net = fresh()
    adapted_request, base = Request([1, 2, 3], max_tokens=2, adapter="lora"), Request([1, 2], max_tokens=2)
    with adapters.routed(net, {"lora": values["qwen3_moe", "lora"]}) as lanes:
        with Engine(net, routing=lanes) as engine:
            with pytest.raises(ModelError, match="one adapter at a time"):
                engine.submit([adapted_request, base])
            engine.submit([adapted_request])
            for _ in range(2):
                with pytest.raises(ModelError, match="one adapter at a time"):
                    engine.submit([base])
                engine.step()
            while engine.step():
                pass
            engine.submit([base])
            assert len(engine.step()) == 1
