"""Every fast path equals the plain one: loss and every gradient, over random shapes, adapters, heads and
cuts."""

from __future__ import annotations

import functools
import shutil
from contextlib import ExitStack
from pathlib import Path
from unittest import mock

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from mlx.utils import tree_flatten
from safetensors.numpy import load_file

import tiny
from tunesmith import adapters, errors, events
from tunesmith.engine import generation
from tunesmith.model import abilities, kernels, logprobs
from tunesmith.model import loading as model
from tunesmith.model.kernels import operations
from tunesmith.runs import checkpoints
from tunesmith.runs.config import RunConfig
from tunesmith.runs.directory import Run
from tunesmith.tokens.batches import Cut, Group, Plan
from tunesmith.tokens.template import Tokens
from tunesmith.training import frozen, gradients, story, updates

ADAPTERS = {
    "lora": adapters.LoRA(rank=4, dropout=0.3),
    "dora": adapters.DoRA(rank=4, targets="all-linear"),
    "head": adapters.LoRA(rank=4, targets=("all-linear", "lm_head")),
    "bare": adapters.LoRA(rank=4),
    "upper": adapters.LoRA(rank=4, targets="all-linear", layers=1),
    "full": adapters.Full.model_validate({}),
}
OFF = {"TUNESMITH_KERNELS": "off"}


class Recurrent(nn.Module):
    """Mixes all rows before."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = [nn.Identity()]

    def __call__(self, ids: mx.array, cache: object = None) -> mx.array:
        return mx.cumsum(ids.astype(mx.float32), axis=1)[..., None]


def config(**batch: object) -> RunConfig:
    return RunConfig(model={"path": "x"}, data={"train": "x"}, batch=batch)


def plain(net: nn.Module, groups: list[Group], key: mx.array):
    """The textbook's way, row by row: MLX's own attention and SwiGLU, all logits, cross-entropy of each
    learned token."""

    def total(weights: dict) -> mx.array:
        net.update(weights)
        adapters.seed_dropout(net, key)
        loss = mx.array(0.0)
        for sequence in (
            sequence for group in groups for sequence in group.sequences if len(sequence.ids) > 1
        ):
            ids = mx.array(sequence.ids)[None]
            logits = net(ids[:, :-1])[0].astype(mx.float32)
            each = mx.logsumexp(logits, axis=-1) - mx.take_along_axis(logits, ids[0, 1:, None], axis=-1)[:, 0]
            loss = loss + (each * mx.array(sequence.targets[1:])).sum()
        return loss

    weights = net.trainable_parameters()
    with mock.patch.dict("os.environ", OFF):
        found = mx.value_and_grad(total)(weights)
        mx.eval(found)
    net.update(weights)
    return found


def rows(seed: int, lengths: list[int], vocabulary: int = 300) -> list[Group]:
    random = np.random.Generator(np.random.PCG64(seed))
    groups = []
    for length in lengths:
        targets = (random.random(length) < 0.6) * random.choice([1.0, 0.5], length)
        tokens = Tokens(random.integers(0, vocabulary, length).astype(np.int32), targets.astype(np.float32))
        groups.append(Group((tokens,), "x:1"))
    return groups


@functools.cache
def net_of(folder: Path, adapter: str, quantised: int | None, kernels_too: bool) -> nn.Module:
    with mock.patch.dict("os.environ", {} if kernels_too else OFF):
        net = model.load(model.ModelSpec(path=str(folder))).net
    if quantised:
        nn.quantize(net, group_size=32, bits=quantised)
    ADAPTERS[adapter].attach(net, 0)
    if adapter != "full":  # B starts at zero, which would leave A without a gradient
        keys = mx.random.split(mx.random.key(7), 99)
        drawn = [
            (name, value + 0.05 * mx.random.normal(value.shape, key=key))
            for (name, value), key in zip(adapters.trainable(net).items(), keys, strict=False)
        ]
        net.load_weights(drawn, strict=False)
    mx.eval(net.parameters())
    return net.train()


def assert_equal(found, expected, tolerance: float = 1e-5) -> None:
    losses = [one[0][0] if isinstance(one[0], tuple) else one[0] for one in (found, expected)]
    assert losses[0].item() == pytest.approx(losses[1].item(), rel=tolerance, abs=1e-6)
    left, right = dict(tree_flatten(found[1])), dict(tree_flatten(expected[1]))
    assert left.keys() == right.keys() and left
    largest = max(float(mx.abs(value).max()) for value in right.values())
    for name, value in right.items():
        scale = max(
            float(mx.abs(value).max()), 0.05 * largest, 1e-12
        )  # of what is exactly zero in one way only rounding is seen
        np.testing.assert_allclose(
            np.array(left[name]) / scale, np.array(value) / scale, rtol=0, atol=tolerance, err_msg=name
        )


CASES = [
    ("tiny_model", "lora", None),
    ("tiny_model", "bare", None),
    ("tiny_model", "dora", None),
    ("tiny_model", "full", None),
    ("tiny_model", "upper", None),
    ("tiny_mistral", "bare", 4),
    ("tiny_mistral", "lora", 4),
    ("tiny_mistral", "head", None),
    ("tiny_mistral", "head", 8),
    ("tiny_mistral", "full", None),
]


@pytest.mark.parametrize(("kind", "adapter", "quantised"), CASES)
@settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@example(
    lengths=[3], seed=3, way="padded", recomputed=False, chunk=2100
)  # q of a single place has no gradient
@given(
    lengths=st.lists(st.integers(1, 40) | st.integers(120, 300), min_size=1, max_size=4),
    seed=st.integers(0, 9),
    way=st.sampled_from(["padded", "packed", "rounded"]),
    recomputed=st.booleans(),
    chunk=st.sampled_from([300 * 7, 1 << 23]),
)
def test_every_way_equals_the_plain_one(
    kind, adapter, quantised, request, lengths, seed, way, recomputed, chunk
):
    folder = request.getfixturevalue(kind)
    net = net_of(folder, adapter, quantised, True)
    if adapter == "lora":  # a mask of dropout has the shape of its micro-batch: one row, as in the plain way
        lengths, way = [max(2, *lengths)], "padded"
    if quantised:  # its products are slow on a CPU
        lengths = [min(length, 50) for length in lengths]
    groups, key = rows(seed, lengths), mx.random.key(seed)
    step = gradients.Gradients(
        net, config(pack=way == "packed"), frozenset({(0, 0, 0)} if way == "rounded" else ())
    )
    with (
        gradients.checkpointed(net) if recomputed else ExitStack(),
        mock.patch.object(logprobs, "CHUNK", chunk),
    ):
        found = step(groups, key)
        mx.eval(found)
    assert_equal(found, plain(net_of(folder, adapter, quantised, False), groups, key))


@pytest.mark.parametrize("adapter", ["lora", "full"])
def test_the_compiled_step_equals_the_plain_one_and_is_traced_once_a_shape(tiny_model, adapter):
    net = net_of(tiny_model, adapter, None, True)
    groups = rows(1, [30, 60, 31, 58])
    plan = Plan((30, 60, 31, 58), 1, Cut(60, bucket=True), 0)
    shapes = gradients.frequent_shapes(plan, groups)
    step, uncompiled = (gradients.Gradients(net, config(), use) for use in (shapes, frozenset({(0, 0, 0)})))
    for seed, group in enumerate([*groups, *groups]):
        key = mx.random.key(seed)
        assert_equal(step([group], key), uncompiled([group], key))
    assert step.plain == 0 and 2 <= len(step.traces) == len(shapes) <= 4


def test_no_more_shapes_are_compiled_than_allowed(tiny_model):
    groups = rows(0, list(range(8, 1600, 8)))
    shapes = gradients.frequent_shapes(
        Plan(tuple(group.length for group in groups), 1, Cut(8, bucket=True), 0), groups
    )
    assert len(shapes) == gradients.COMPILED_SHAPES


@pytest.mark.parametrize("kind", ["tiny_model", "tiny_mistral"])
def test_head_of_features_is_the_model(kind, request):
    net = model.load(model.ModelSpec(path=str(request.getfixturevalue(kind)))).net
    ids = mx.array([[5, 6, 7, 8, 9, 10, 11, 12]])
    assert abilities.splits(net)
    np.testing.assert_allclose(logprobs.head(net, logprobs.features(net, ids)[0]), net(ids)[0], atol=1e-6)


def test_what_a_model_does_after_its_head_is_done_here_too_or_refused(tiny_model):
    class Capped(nn.Module):
        """As Gemma 2: logits through a soft cap."""

        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.model = inner["model"]

        def __call__(self, ids: mx.array) -> mx.array:
            return 0.5 * mx.tanh(self.model.embed_tokens.as_linear(self.model(ids)) / 0.5)

    class Looking(Capped):
        """Its logits depend on more than the hidden states."""

        def __call__(self, ids: mx.array) -> mx.array:
            return super().__call__(ids) + ids[..., None]

    inner = model.load(model.ModelSpec(path=str(tiny_model))).net
    capped = Capped(inner)
    assert abilities.splits(capped)
    hidden, targets = mx.random.normal((9, 64), key=mx.random.key(0)), mx.arange(9)
    wanted = 0.5 * mx.tanh(inner.model.embed_tokens.as_linear(hidden) / 0.5)
    wanted = mx.take_along_axis(
        wanted - mx.logsumexp(wanted, axis=-1, keepdims=True), targets[:, None], axis=-1
    )[:, 0]
    capped.freeze()
    np.testing.assert_allclose(logprobs.chosen(capped, hidden, targets), wanted, atol=1e-6)
    assert not abilities.splits(Looking(inner))
    assert not abilities.splits(nn.Linear(3, 3))


def test_a_model_that_mixes_packed_rows_is_refused_by_name(tiny_model):
    assert abilities.packs(model.load(model.ModelSpec(path=str(tiny_model))).net)
    assert not abilities.packs(Recurrent())
    with pytest.raises(errors.ConfigError, match=r"batch\.pack: test_speed_laws models mix packed rows"):
        gradients.require(Recurrent(), config(pack=True), [], print)


# The CPU's own kernels


@given(st.lists(st.floats(-80, 80, width=32), min_size=1, max_size=50))
def test_exp_is_exp(values):
    x = mx.array(values)
    np.testing.assert_allclose(np.array(operations.exp(x)), np.exp(np.array(x, dtype=np.float64)), rtol=6e-6)
    small = mx.clip(x, -8, 8)
    np.testing.assert_allclose(
        np.array(operations.exp(small)), np.exp(np.array(small, dtype=np.float64)), rtol=1e-6
    )


@pytest.mark.parametrize("vocabulary", [7, 256, 49152, 50257])
def test_a_large_vocabulary_costs_no_digits(vocabulary):
    """MLX's CPU adds one term after the other: its own cross-entropy is 2.5e-4 nats off at 49,152 logits."""
    random = np.random.default_rng(0)
    logits = (random.normal(size=(64, vocabulary)) * 2.5).astype(np.float32)
    targets = random.integers(vocabulary, size=64)
    exact = logits.astype(np.float64) - np.log(np.exp(logits.astype(np.float64)).sum(axis=1, keepdims=True))
    found = np.array(kernels.token_logprobs(mx.array(logits), mx.array(targets)))
    np.testing.assert_allclose(found, exact[np.arange(64), targets], atol=6e-6)


def test_swiglu_at_the_ends():
    gate = mx.array([-1e4, -200.0, -90.0, -88.5, -87.0, -30.0, 30.0, 88.0, 90.0, 1e4])
    for found, expected in zip(
        *(
            mx.vjp(call, [gate, mx.ones(10)], [mx.ones(10)])[1]
            for call in (kernels.swiglu, lambda g, x: nn.silu(g) * x)
        ),
        strict=True,
    ):
        np.testing.assert_allclose(np.array(found), np.array(expected), rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16])
def test_half_precision_takes_mlx_own_ways(tiny_model, dtype):
    net = model.load(model.ModelSpec(path=str(tiny_model))).net
    net.set_dtype(dtype)
    ids = mx.array([[5, 6, 7, 8]])
    found = net(ids)
    with mock.patch.dict("os.environ", OFF):
        expected = net(ids)
    assert found.dtype == dtype == kernels.swiglu(mx.ones(4, dtype), mx.ones(4, dtype)).dtype
    np.testing.assert_array_equal(np.array(found.astype(mx.float32)), np.array(expected.astype(mx.float32)))


def test_exp_far_below_is_nothing():
    assert operations.exp(mx.array([-1e9, -mx.inf, -200.0])).max().item() < 2e-38


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 300), st.sampled_from([(4, 4), (6, 2), (3, 1)]), st.integers(1, 2), st.integers(0, 9))
def test_causal_attention_in_blocks_is_causal_attention(length, heads, batch, seed):
    def draw(n_heads: int, index: int) -> mx.array:
        return mx.random.normal((batch, n_heads, length, 16), key=mx.random.key(100 * seed + index))

    given = [draw(heads[0], 0), draw(heads[1], 1), draw(heads[1], 2)]
    cotangent = draw(heads[0], 3)
    ours = mx.vjp(lambda q, k, v: operations.causal(q, k, v, 0.25), given, [cotangent])
    theirs = mx.vjp(
        lambda q, k, v: mx.fast.scaled_dot_product_attention(q, k, v, scale=0.25, mask="causal"),
        given,
        [cotangent],
    )
    for found, expected in zip(ours[0] + ours[1], theirs[0] + theirs[1], strict=True):
        np.testing.assert_allclose(np.array(found), np.array(expected), atol=2e-5)


def test_without_a_compiler_the_kernels_serve_whole_causal_passes_only(tiny_model):
    """Generation, with its cache and its single queries, keeps MLX's own attention."""
    asked: list[tuple[int, ...]] = []
    real = operations.causal

    def spy(queries, *rest):
        asked.append(queries.shape)
        return real(queries, *rest)

    net = model.load(model.ModelSpec(path=str(tiny_model))).net
    without = mock.patch.dict("os.environ", {"TUNESMITH_KERNELS": "operations"})
    with mock.patch.object(operations, "causal", spy), without:
        net(mx.array([[1, 2, 3]]))
        assert len(asked) == 2
        generation.generate(net, [[1, 2, 3]], max_tokens=3, eos_ids=[0])
    assert len(asked) == 2


def test_installing_leaves_other_models_as_they_are(tiny_model):
    from mlx_lm.models import llama

    before = llama.Attention.__call__, llama.MLP.__call__
    net = model.load(model.ModelSpec(path=str(tiny_model))).net
    kinds = {type(module) for module in net.modules()}
    assert llama.Attention not in kinds and any(issubclass(kind, llama.Attention) for kind in kinds)
    assert (llama.Attention.__call__, llama.MLP.__call__) == before


def test_no_gradient_is_computed_below_the_lowest_adapted_layer(tiny_model):
    """Not even the input of the lowest adapted layer gets a gradient; with all weights trained each layer's
    does."""
    backward: list[int] = []

    @functools.cache
    def spied(kind: type[nn.Module], number: int) -> type[nn.Module]:
        @mx.custom_function
        def through(x):
            return x * 1.0

        @through.vjp
        def _(x, cotangent, output):
            backward.append(number)
            return cotangent

        return type(
            kind.__name__,
            (kind,),
            {"__call__": lambda self, x, *rest: kind.__call__(self, through(x), *rest)},
        )

    for adapter, expected in (("upper", set()), ("full", {0, 1})):
        net = model.load(model.ModelSpec(path=str(tiny_model))).net
        ADAPTERS[adapter].attach(net, 0)
        for number, layer in enumerate(net.layers):
            layer.self_attn.__class__ = spied(type(layer.self_attn), number)
        backward.clear()
        mx.eval(gradients.Gradients(net.train(), config())(rows(0, [20]), mx.random.key(0)))
        assert set(backward) == expected


# Want of memory


class Small(gradients.Gradients):
    """A device that holds ``most`` tokens, once ``after`` micro-batches were taken."""

    most, after = 10**9, 0

    def __call__(self, groups, key, baseline=0.0):
        type(self).after -= 1
        if self.after < 0 and sum(group.tokens for group in groups) > self.most:
            raise RuntimeError("[malloc] Unable to allocate 123 bytes.")
        return super().__call__(groups, key, baseline)


@pytest.fixture
def small(monkeypatch, tmp_path, tiny_model):
    """(most, after, settings) → the run and its events."""

    def train(most: int, after: int, out: str, **batch: object):
        monkeypatch.setattr(updates, "Gradients", type("Small", (Small,), {"most": most, "after": after}))
        said: list[events.Event] = []
        data = tiny.write_rows(tmp_path / "rows.jsonl", tiny.conversations(24))
        asked = RunConfig(
            model={"path": str(tiny_model)},
            data={"train": str(data), "valid": 0},
            batch={"sequences": 6, **batch},
            adapter={"dropout": 0.1},
            loop={"steps": 4, "samples": 0, "save_every": 1, "keep_last": 9},
            optimizer={"learning_rate": 1e-2},
        )
        return story.train(asked, out=tmp_path / out, notify=said.append), said

    return train


def test_want_of_memory_shows_before_the_first_step(small):
    with pytest.raises(
        errors.OutOfMemory, match="before step 1: the device ran out of memory with 6 rows"
    ) as caught:
        small(100, 0, "run", tokens=1000, pack=True)
    assert (
        caught.value.hint
        == "lower batch.tokens, set loop.checkpoint_gradients=true, or model.quantize=4, in a new run"
    )
    with pytest.raises(errors.OutOfMemory, match="with 1 rows") as caught:
        small(10, 0, "other", micro=1)
    assert caught.value.hint is not None and "lower batch.length" in caught.value.hint


def test_want_of_memory_later_halves_the_budget_and_says_so(small):
    run, said = small(220, 2, "run", tokens=1000, pack=True)
    notices = [event.what for event in said if isinstance(event, events.Notice) and "ran out" in event.what]
    left = checkpoints.read(run, 4).tokens
    assert 100 <= left <= 250 and checkpoints.read(run, 1).tokens is None
    assert "from step 2 on" in notices[0] and notices[-1].endswith(f"at most {left} tokens at once")
    assert [event.step for event in said if isinstance(event, events.StepDone)] == [1, 2, 3, 4]
    # A run that goes on from there keeps the budget, and ends in the same bytes.
    expected = (run.checkpoint(4) / "adapters.safetensors").read_bytes()
    for step in (3, 4):
        shutil.rmtree(run.checkpoint(step))
    story.train(run.config, resume=run, notify=said.append)
    assert (run.checkpoint(4) / "adapters.safetensors").read_bytes() == expected
    assert len(
        [event for event in said if isinstance(event, events.Notice) and "ran out" in event.what]
    ) == len(notices)


def test_one_row_that_does_not_fit_ends_the_run(small, tmp_path):
    with pytest.raises(errors.OutOfMemory, match="step 2: the device ran out of memory with 1 rows"):
        small(10, 7, "run", micro=1)
    assert Run.open(tmp_path / "run").checkpoints() == [1]


# Frozen lower layers


@pytest.mark.parametrize("pack", [False, True])
def test_kept_lower_layers_change_nothing_and_are_computed_once(tmp_path, tiny_model, pack):
    net = net_of(tiny_model, "upper", None, True)
    groups, key = rows(3, [1, 20, 150, 20, 31]), mx.random.key(0)
    lower = frozen.Lower(net, tmp_path / "kept")
    lower.require(groups)
    assert lower.depth == 1 and lower.open(groups) == 222 * 64 * 4
    step = gradients.Gradients(net, config(pack=pack), lower=lower)
    first = step(groups, key)
    mx.eval(first)
    assert (lower.computed, lower.read) == (4, 0)
    again = frozen.Lower(net, tmp_path / "kept")
    second = gradients.Gradients(net, config(pack=pack), lower=again)(groups, key)
    mx.eval(second)
    assert (again.computed, again.read) == (0, 4)
    expected = gradients.Gradients(net, config(pack=pack))(groups, key)
    for found in (first, second):
        assert_equal(found, expected)
    lower.close()
    assert not (tmp_path / "kept").exists()


@pytest.mark.parametrize("left", [0, 5, 40, -1])
def test_a_torn_file_of_kept_layers_is_computed_again(tmp_path, tiny_model, left):
    net, groups, key = net_of(tiny_model, "upper", None, True), rows(3, [20, 31]), mx.random.key(0)
    lower = frozen.Lower(net, tmp_path / "kept")
    lower.open(groups)
    mx.eval(gradients.Gradients(net, config(), lower=lower)(groups, key))
    torn = sorted((tmp_path / "kept").iterdir())[0]
    torn.write_bytes(torn.read_bytes()[:left])
    again = frozen.Lower(net, tmp_path / "kept")
    found = gradients.Gradients(net, config(), lower=again)(groups, key)
    assert_equal(found, gradients.Gradients(net, config())(groups, key))
    assert (again.computed, again.read) == (1, 1)


def test_a_run_with_kept_lower_layers_is_the_run_without(tmp_path, tiny_model):
    data = tiny.write_rows(tmp_path / "rows.jsonl", tiny.conversations(24))
    said: list[events.Event] = []

    def train(out: str, **loop: object) -> dict:
        asked = RunConfig(
            model={"path": str(tiny_model)},
            data={"train": str(data), "valid": 0.2},
            batch={"sequences": 6},
            adapter={"layers": 1, "dropout": 0.1},
            loop={"epochs": 2, "samples": 0, **loop},
            optimizer={"learning_rate": 1e-2},
        )
        run = story.train(asked, out=tmp_path / out, notify=said.append)
        assert not (run.path / "frozen").exists()
        return load_file(checkpoints.choose(run, "last") / "adapters.safetensors")

    plain_run, kept = train("plain"), train("kept", cache_frozen=True)
    for name, value in plain_run.items():
        np.testing.assert_allclose(kept[name], value, rtol=0, atol=2e-5 * abs(value).max())
    assert any(
        "1 layers below the adapter" in event.what for event in said if isinstance(event, events.Notice)
    )


def test_keeping_lower_layers_where_none_is_frozen_is_refused(tmp_path, tiny_model):
    for adapter in ("lora", "full"):
        net = net_of(tiny_model, adapter, None, True)
        assert frozen.depth(net) == 0 and frozen.saving(net, 3, False) == 0
        with pytest.raises(errors.ConfigError, match=r"loop\.cache_frozen: no layer lies below"):
            frozen.Lower(net, tmp_path / "kept").require(rows(0, [9]))
    assert frozen.saving(net_of(tiny_model, "upper", None, True), 3, False) == pytest.approx((2 / 3) / 3)
