"""Updates are combined as ΔW, never A and B apart, and factored again as well as the rank allows."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest
from adapters import mixtures
from adapters.test_layers import IDS, adapted, close, fresh, move

from tunesmith import adapters
from tunesmith.adapters import DoRA, LoRA, composition
from tunesmith.adapters.composition import Factors, Recipe
from tunesmith.adapters.layers import dense
from tunesmith.errors import ConfigError, ModelError

RANDOM = np.random.Generator(np.random.PCG64(5))


def factors(rank: int, inputs: int = 24, outputs: int = 18) -> Factors:
    return Factors(RANDOM.normal(size=(inputs, rank)), RANDOM.normal(size=(rank, outputs)))


def recipe(**settings) -> Recipe:
    return Recipe.model_validate(settings)


def composed(updates: list, weights: list[float], **settings):
    ranks = [update.a.shape[1] if isinstance(update, Factors) else 4 for update in updates]
    result = composition.compose(
        [{"layer": [update]} for update in updates], weights, ranks, recipe(**settings)
    )
    return composition.form(result.factors["layer"][0]), result


def changes(net, base) -> dict[str, np.ndarray]:
    """By layer, what the adapter of ``net`` adds to the weight of ``base``."""
    modules = dict(base.named_modules())
    return {
        name: np.array(layer.merged_weight() - dense(modules[name]))
        for name, layer in adapters.adapted(net).items()
    }


def mixture(sources: list, specs: list, weights: list[float], tmp_path, **settings):
    """The net with the mixture of adapters that were saved from ``sources``, as read from the disk again."""
    base = fresh()
    updates = []
    for number, (net, spec) in enumerate(zip(sources, specs, strict=True)):
        adapters.save(net, spec, tmp_path / str(number))
        updates.append(composition.read_updates(base, adapters.read(tmp_path / str(number))))
    result = composition.compose(updates, weights, [spec.rank for spec in specs], recipe(**settings))
    spec = composition.spec_of(result, specs)
    composition.install(base, spec, result)
    adapters.save(base, spec, tmp_path / "mixture")
    net = fresh()
    adapters.load(net, tmp_path / "mixture")
    return net.eval(), result


def test_a_linear_mixture_is_the_exact_sum_for_other_ranks_scales_and_targets(tmp_path):
    specs = [
        LoRA(rank=4, alpha=8, targets=("q_proj", "v_proj")),
        LoRA(rank=3, alpha=2, targets="all-linear", rank_stabilised=True),
        LoRA(rank=2, targets=("down_proj", "lm_head"), layers=2),
    ]
    nets = [adapted(spec, seed=number) for number, spec in enumerate(specs)]
    weights = [0.7, 0.3, -1.5]
    net, result = mixture(nets, specs, weights, tmp_path)
    expected: dict[str, np.ndarray] = {}
    for source, weight in zip(nets, weights, strict=True):
        for name, change in changes(source, fresh()).items():
            expected[name] = expected.get(name, 0) + weight * change
    after = changes(net, fresh())
    assert after.keys() == expected.keys() and len(after) == 22
    for name, change in expected.items():
        close(after[name], change)
    assert result.rank == 9
    assert all(layer.retained == pytest.approx(1) for layer in result.layers)


def test_a_rank_that_the_narrowest_layer_does_not_allow_is_said():
    sources = [{"wide": [factors(12, 40, 40)], "narrow": [factors(2, 40, 10)]} for _ in range(2)]
    result = composition.compose(sources, [1, 1], [12, 12], recipe())
    assert (result.rank, result.wanted_rank) == (16, 24)
    assert {layer.name: layer.retained < 0.999 for layer in result.layers} == {"wide": True, "narrow": False}
    assert composed([factors(4), factors(4)], [1, 1])[1].wanted_rank == 8


def test_an_adapter_less_itself_is_the_base(tmp_path):
    spec = LoRA(rank=4, targets="all-linear")
    net = adapted(spec)
    mixed, result = mixture([net, net], [spec, spec], [1, -1], tmp_path)
    close(mixed(IDS), fresh()(IDS))
    assert all(layer.overlaps[0].cosine == pytest.approx(1) for layer in result.layers)
    assert all(layer.overlaps[0].inputs == pytest.approx(1) for layer in result.layers)
    assert all(layer.overlaps[0].angle == pytest.approx(0, abs=1e-3) for layer in result.layers)


def test_factors_are_never_combined_apart():
    """peft 3004: (A₁ + A₂)·(B₁ + B₂) has the cross-terms A₁·B₂ and A₂·B₁."""
    one, other = factors(3), factors(3)
    mixed, _ = composed([one, other], [1, 1])
    np.testing.assert_allclose(mixed, one.a @ one.b + other.a @ other.b, atol=1e-12)


def test_the_scale_of_rslora_counts_once(tmp_path):
    """peft 3449: alpha / sqrt(rank) was applied again to the mixture. peft 3111: svd scaled twice."""
    spec = LoRA(rank=4, alpha=16, rank_stabilised=True)
    net = adapted(spec)
    for method in ("linear", "svd"):
        mixed, _ = mixture([net], [spec], [1], tmp_path / method, method=method)
        close(mixed(IDS), net.eval()(IDS))


def test_sources_of_other_ranks_are_saved_and_read_again(tmp_path):
    """peft 3737: a mixture with a rank for each layer could not be loaded again."""
    specs = [LoRA(rank=2, targets=("q_proj",)), LoRA(rank=5, targets=("q_proj", "up_proj"))]
    nets = [adapted(spec, seed=number) for number, spec in enumerate(specs)]
    net, result = mixture(nets, specs, [1, 1], tmp_path)
    assert adapters.read_spec(tmp_path / "mixture").rank == result.rank == 7
    assert {layer.lora_a.shape[1] for layer in adapters.adapted(net).values()} == {7}


def test_dora_is_composed_by_what_it_does_to_the_weight(tmp_path):
    """peft 3761: magnitudes were left out without a word."""
    spec = DoRA(rank=2, targets=("q_proj",))
    net = adapted(spec)
    mixed, result = mixture([net], [spec], [0.5], tmp_path, rank=64)
    for name, change in changes(net, fresh()).items():
        close(changes(mixed, fresh())[name], 0.5 * change)
    low, low_result = mixture([net], [spec], [0.5], tmp_path / "low", rank=2)
    assert low_result.layers[0].retained < 0.9 < result.layers[0].retained
    assert adapters.adapted(low)["model.layers.0.self_attn.q_proj"].lora_a.shape == (64, 2)


def test_the_lower_rank_is_the_nearest_and_says_what_it_retains():
    updates = [factors(6), factors(5)]
    whole = 0.7 * composition.form(updates[0]) - 0.4 * composition.form(updates[1])
    values = np.linalg.svd(whole, compute_uv=False)
    mixed, result = composed(updates, [0.7, -0.4], method="svd", rank=3)
    assert np.linalg.matrix_rank(mixed) == 3
    assert np.linalg.norm(mixed - whole) ** 2 == pytest.approx(np.square(values[3:]).sum())
    assert result.layers[0].retained == pytest.approx(np.square(values[:3]).sum() / np.square(values).sum())
    assert composed(updates, [0.7, -0.4], method="svd")[1].rank == 6


def test_of_a_large_matrix_only_the_wanted_directions_are_computed():
    update = RANDOM.normal(size=(700, 600)) + composition.form(factors(5, 700, 600))
    found = composition.directions(update, 8)
    inputs, values, outputs = np.linalg.svd(update, full_matrices=False)
    np.testing.assert_allclose(found.values, values[:8], rtol=1e-9)
    made = (found.inputs * found.values) @ found.outputs
    np.testing.assert_allclose(made, (inputs[:, :8] * values[:8]) @ outputs[:8], atol=1e-6)


def test_ties_is_the_papers_formula():
    """Trim, elect, disjoint mean (arXiv 2306.01708, algorithm 1), entry by entry."""
    dense_updates = [composition.form(factors(4)) for _ in range(3)]
    weights, density = [1.0, 0.5, -0.8], 0.3
    trimmed = []
    for update, weight in zip(dense_updates, weights, strict=True):
        threshold = np.sort(np.abs(update).ravel())[::-1][int(density * update.size) - 1]
        trimmed.append(weight * np.where(np.abs(update) >= threshold, update, 0))
    expected = np.zeros_like(dense_updates[0])
    for place in np.ndindex(expected.shape):
        values = np.array([update[place] for update in trimmed])
        sign = np.sign(values.sum())
        agreeing = [value for value in values if value and np.sign(value) == sign]
        expected[place] = np.mean(agreeing) if agreeing else 0
    np.testing.assert_allclose(composition.ties(dense_updates, weights, density), expected, atol=1e-12)
    mixed, _ = composed(dense_updates, weights, method="ties", density=density, rank=18)
    np.testing.assert_allclose(mixed, expected, atol=1e-12)


def test_dare_drops_and_rescales_each_update_by_itself():
    """arXiv 2311.03099, equation 2: its expectation is the plain sum."""
    update = np.ones((200, 150))
    once = composition.dare([update], [2.0], 0.25, ["a"])
    assert set(np.unique(once)) == {0.0, 8.0}
    assert once.mean() == pytest.approx(2, abs=0.05)
    assert np.array_equal(once, composition.dare([update], [2.0], 0.25, ["a"]))
    both = composition.dare([update, update], [1.0, 1.0], 0.25, ["a", "b"])
    assert set(np.unique(both)) == {0.0, 4.0, 8.0}
    updates = [factors(4), factors(4)]
    seeds = [composed(updates, [1, 1], method="dare", seed=seed, rank=18)[0] for seed in (0, 0, 1)]
    assert np.array_equal(seeds[0], seeds[1]) and not np.allclose(seeds[0], seeds[2])
    expected = composition.dare(
        [composition.form(update) for update in updates], [1, 1], 0.5, ["0 layer 0 0", "0 layer 0 1"]
    )
    np.testing.assert_allclose(seeds[0], expected, atol=1e-12)


def test_overlaps_are_those_of_the_subspaces():
    basis, _ = np.linalg.qr(RANDOM.normal(size=(24, 24)))
    other, _ = np.linalg.qr(RANDOM.normal(size=(18, 18)))
    mixing = [RANDOM.normal(size=(4, 4)) for _ in range(2)]
    first = Factors(basis[:, :4] @ mixing[0], other[:4])
    tilted = np.cos(0.3) * basis[:, :2] + np.sin(0.3) * basis[:, 10:12]
    second = Factors(np.concatenate([tilted, basis[:, 12:14]], axis=1), other[4:8])
    _, result = composed([first, second], [1, 1])
    overlap = result.layers[0].overlaps[0]
    assert overlap.inputs == pytest.approx(np.cos(0.3) ** 2 / 2)  # two of four directions
    assert overlap.outputs == pytest.approx(0, abs=1e-9)
    assert overlap.angle == pytest.approx(np.degrees(0.3))
    assert overlap.cosine == pytest.approx(0, abs=1e-9)
    third = factors(2)
    _, result = composed([first, third], [1, 1])
    one, two = composition.form(first), composition.form(third)
    expected = np.sum(one * two) / np.linalg.norm(one) / np.linalg.norm(two)
    assert result.layers[0].overlaps[0].cosine == pytest.approx(expected)


def test_updates_that_cancel_have_the_cosine_of_minus_one():
    one = factors(3)
    _, result = composed([one, Factors(-2 * one.a, one.b)], [1, 1])
    assert result.layers[0].overlaps[0].cosine == pytest.approx(-1)


def test_what_cannot_be_composed_is_refused_by_name(tmp_path):
    net = fresh()
    for spec, words in [
        (LoRA(rank=2, full_modules=("input_layernorm",)), "input_layernorm"),
        (adapters.Full(targets=("mlp",)), "trained in full"),
    ]:
        adapters.save(adapted(spec), spec, tmp_path)
        with pytest.raises(ModelError, match=words):
            composition.read_updates(net, adapters.read(tmp_path))
    with pytest.raises(ConfigError, match="uses all entries"):
        composed([factors(2)], [1], density=0.5)
    assert mx.array_equal(net(IDS), fresh()(IDS))


def test_a_mixture_can_be_trained_in_all_its_directions(tmp_path):
    """A layer that needs fewer directions than the rank keeps those of a new adapter, not zeros."""
    specs = [LoRA(rank=2, targets=("q_proj",)), LoRA(rank=5, targets=("up_proj",))]
    nets = [adapted(spec, seed=number) for number, spec in enumerate(specs)]
    net, _ = mixture(nets, specs, [1, 1], tmp_path, rank=5)
    for layer in adapters.adapted(net).values():
        assert np.abs(np.array(layer.lora_a)).max(axis=0).min() > 0


def test_a_mixture_of_adapters_on_experts_is_the_sum_for_each_expert(tmp_path):
    specs = [LoRA(rank=2, targets="all-linear"), LoRA(rank=3, targets=("up_proj", "q_proj"))]
    updates, nets = [], []
    for number, spec in enumerate(specs):
        net = mixtures.fresh("qwen3_moe")
        spec.attach(net, number)
        nets.append(move(net))
        adapters.save(net, spec, tmp_path / str(number))
        updates.append(
            composition.read_updates(mixtures.fresh("qwen3_moe"), adapters.read(tmp_path / str(number)))
        )
    result = composition.compose(updates, [1, -2], [2, 3], recipe())
    mixed = mixtures.fresh("qwen3_moe")
    composition.install(mixed, composition.spec_of(result, specs), result)
    name = "model.layers.1.mlp.switch_mlp.up_proj"
    parts = [list(adapters.adapted(net)[name].parts()) for net in (*nets, mixed)]
    assert len(parts[2]) == 4
    for one, other, both in zip(*parts, strict=True):
        base = dense(both.linear)
        expected = one.merged_weight() - base - 2 * (other.merged_weight() - base)
        close(both.merged_weight() - base, expected, 1e-4)
