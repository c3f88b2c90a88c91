"""The compiled kernels equal float64 within roundings of float32, values and gradients, at every shape."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
import sysconfig
import time
from concurrent.futures import ThreadPoolExecutor

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mlx_lm.models.switch_layers import SwitchLinear

from tunesmith import events
from tunesmith.engine import generation
from tunesmith.model import kernels, loading
from tunesmith.model.kernels import extension, operations
from tunesmith.preflight.thorough.laws import exact_attention

pytestmark = pytest.mark.skipif(
    extension.load().module is None, reason=f"no compiled kernels: {extension.load().missing}"
)
NUMBERS = np.random.default_rng(0)


@pytest.fixture(autouse=True)
def same_numbers() -> None:
    """Each test draws its own, whichever tests run before it."""
    NUMBERS.bit_generator.state = np.random.default_rng(0).bit_generator.state


def normal(*shape: int, scale: float = 1.0) -> np.ndarray:
    return (NUMBERS.normal(size=shape) * scale).astype(np.float32)


def assert_close(
    result: mx.array, expected: np.ndarray, tolerance: float = 1e-6, terms: float = 1e-30
) -> None:
    """Equal within ``tolerance`` of the largest value, or of ``terms``: the largest sum of absolute terms, in
    which each rounding of float32 counts."""
    difference = np.abs(np.array(result, dtype=np.float64) - expected).max(initial=0)
    allowed = tolerance * max(np.abs(expected).max(initial=0), terms)
    assert difference <= allowed, f"{difference:.2g} where {allowed:.2g} is allowed"


def both(function, *arrays: np.ndarray) -> tuple[mx.array, list[mx.array], np.ndarray]:
    """(value, gradient of each array, the cotangent that they were made with)"""
    given_arrays = [mx.array(array) for array in arrays]
    value = function(*given_arrays)
    cotangent = normal(*value.shape)
    (value,), slopes = mx.vjp(lambda *inputs: function(*inputs), given_arrays, [mx.array(cotangent)])
    return value, slopes, cotangent.astype(np.float64)


# Attention --------------------


def check_attention(q, k, v, mask, allowed, cache=None) -> None:
    scale = q.shape[-1] ** -0.5
    with kernels.watched() as calls:
        value, slopes, cotangent = both(
            lambda *arrays: kernels.attention(*arrays, cache=cache, scale=scale, mask=mask), q, k, v
        )
    assert set(calls) == {("attention", True)}
    allowed = np.broadcast_to(allowed, (*q.shape[:3], k.shape[2]))
    (expected, *gradients), sizes = exact_attention(q, k, v, scale, allowed, cotangent)
    assert_close(value, expected, terms=sizes[0])
    for slope, gradient, size in zip(slopes, gradients, sizes[1:], strict=True):
        assert_close(slope, gradient, 2e-6, terms=size)  # three products, one after the other


def lower(queries: int, keys: int) -> np.ndarray:
    return np.arange(keys)[None] <= np.arange(queries)[:, None] + keys - queries


HEADS = [(1, 1), (4, 4), (6, 2), (8, 1), (9, 3)]


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 400), st.sampled_from(HEADS), st.integers(1, 2), st.sampled_from([1, 8, 20, 64]))
def test_causal_attention(length, heads, batch, width):
    q, k, v = (normal(batch, count, length, width) for count in (heads[0], heads[1], heads[1]))
    check_attention(q, k, v, "causal", lower(length, length))


@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize(("queries", "keys"), [(1, 1), (1, 300), (7, 150), (130, 259), (256, 256)])
def test_queries_behind_a_prompt(heads, queries, keys):
    q = normal(2, heads[0], queries, 16)
    k, v = normal(2, heads[1], keys, 16), normal(2, heads[1], keys, 24)  # values of another width
    check_attention(q, k, v, "causal", lower(queries, keys))
    check_attention(q, k, v, None, np.ones((queries, keys), bool))


@settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(1, 150), min_size=1, max_size=6), st.sampled_from(HEADS))
def test_packed_rows_do_not_see_each_other(lengths, heads):
    ends = np.cumsum(lengths)
    owner = np.repeat(np.arange(len(lengths)), lengths)
    q, k, v = (normal(1, count, int(ends[-1]), 16) for count in (heads[0], heads[1], heads[1]))
    allowed = lower(len(owner), len(owner)) & (owner[:, None] == owner[None])
    check_attention(q, k, v, kernels.Packed(tuple(map(int, ends))), allowed)


@pytest.mark.parametrize("window", [1, 5, 31, 64, 200, 500])
@pytest.mark.parametrize("length", [1, 33, 300])
def test_a_window_shorter_than_a_block(window, length):
    q, k, v = (normal(2, heads, length, 16) for heads in (6, 2, 2))
    distance = np.arange(length)[:, None] - np.arange(length)[None]
    allowed = (distance >= 0) & (distance < window)
    check_attention(q, k, v, mx.array(allowed), allowed)


@pytest.mark.parametrize("queries", [1, 40])
def test_masks_with_gaps_padding_and_rows_without_keys(queries):
    q, k, v = normal(3, 4, queries, 16), normal(3, 2, 90, 16), normal(3, 2, 90, 16)
    by_row = (np.arange(90)[None] >= np.array([0, 30, 90])[:, None])[:, None, None]  # the last sees no key
    check_attention(q, k, v, mx.array(by_row), by_row)
    gaps = NUMBERS.random((3, 1, queries, 90)) < 0.3
    gaps[1, :, 0] = False
    check_attention(q, k, v, mx.array(gaps), gaps)
    by_head = NUMBERS.random((1, 4, 1, 90)) < 0.5
    check_attention(q, k, v, mx.array(by_head), by_head)


def test_arrays_are_taken_as_they_lie():
    """Heads side by side, as layers make them, cut from a larger array, or with the last dimension apart."""
    q = normal(2, 50, 4, 16).swapaxes(1, 2)
    k = normal(2, 50, 6, 16)[:, :, 2:4].swapaxes(1, 2)
    v = normal(2, 2, 16, 50).swapaxes(2, 3)
    given_arrays = [
        mx.contiguous(mx.array(q.swapaxes(1, 2))).transpose(0, 2, 1, 3),
        mx.array(np.ascontiguousarray(normal(2, 50, 6, 16))),
        mx.contiguous(mx.array(v.swapaxes(2, 3))).swapaxes(2, 3),
    ]
    whole = np.array(given_arrays[1])
    k = whole[:, :, 2:4].swapaxes(1, 2)
    given_arrays[1] = given_arrays[1][:, :, 2:4].swapaxes(1, 2)
    result = kernels.attention(*given_arrays, cache=None, scale=0.25, mask="causal")
    (expected, *_), _ = exact_attention(q, k, v, 0.25, lower(50, 50), np.zeros((2, 4, 50, 16)))
    assert_close(result, expected)
    assert_close(result.transpose(0, 2, 1, 3).reshape(2, 50, -1), expected.swapaxes(1, 2).reshape(2, 50, -1))


def test_gradients_by_finite_differences():
    q, k, v = (normal(1, heads, 9, 4) for heads in (4, 2, 2))
    cotangent = normal(1, 4, 9, 4)

    def value(q, k, v):
        return exact_attention(q, k, v, 0.5, lower(9, 9), cotangent)[0][0]

    _, slopes = mx.vjp(
        lambda *arrays: kernels.attention(*arrays, cache=None, scale=0.5, mask="causal"),
        [mx.array(q), mx.array(k), mx.array(v)],
        [mx.array(cotangent)],
    )
    for which, array in enumerate((q, k, v)):
        numbers = np.zeros(array.shape)
        for place in np.ndindex(array.shape):
            moved = [[given_array.astype(np.float64) for given_array in (q, k, v)] for _ in range(2)]
            moved[0][which][place] += 1e-6
            moved[1][which][place] -= 1e-6
            numbers[place] = ((value(*moved[0]) - value(*moved[1])) * cotangent).sum() / 2e-6
        assert_close(slopes[which], numbers, 2e-6)


@pytest.mark.parametrize("bad", ["sinks", "float16", "additive"])
def test_what_the_kernels_do_not_cover_is_mlx_s(bad):
    dtype = mx.float16 if bad == "float16" else mx.float32
    q, k, v = (mx.array(normal(1, 2, 5, 8)).astype(dtype) for _ in range(3))
    sinks = mx.zeros((2,)) if bad == "sinks" else None
    mask = mx.zeros((5, 5)) if bad == "additive" else "causal"
    with kernels.watched() as calls:
        result = kernels.attention(q, k, v, cache=None, scale=0.5, mask=mask, sinks=sinks)
    assert set(calls) == {("attention", False)}
    expected = mx.fast.scaled_dot_product_attention(q, k, v, scale=0.5, mask=mask, sinks=sinks)
    np.testing.assert_allclose(np.array(result), np.array(expected), atol=1e-3)


def test_rows_that_repeat_or_run_backwards_are_copied_first():
    q, k, v = (mx.array(normal(1, 2, 9, 8)) for _ in range(3))

    def attend(q, k, v):
        return kernels.attention(q, k, v, cache=None, scale=0.5, mask="causal")

    def total(q, k, v):  # its cotangent repeats one row
        return (attend(q, k, v).sum(axis=2) ** 2).sum()

    def exact(q, k, v):
        mixed = mx.fast.scaled_dot_product_attention(q, k, v, scale=0.5, mask="causal")
        return (mixed.sum(axis=2) ** 2).sum()

    for ours, theirs in zip(
        mx.grad(total, (0, 1, 2))(q, k, v), mx.grad(exact, (0, 1, 2))(q, k, v), strict=True
    ):
        np.testing.assert_allclose(np.array(ours), np.array(theirs), atol=1e-4)
    back = attend(q, k[:, :, ::-1], v[:, :, ::-1])
    copied = attend(q, *(mx.array(np.ascontiguousarray(np.array(x)[:, :, ::-1])) for x in (k, v)))
    np.testing.assert_allclose(np.array(back), np.array(copied), atol=1e-6)
    lone = [x[:, :, 0][:, :, None] for x in (q, k, v)]
    np.testing.assert_allclose(np.array(attend(*lone)), np.array(lone[2]), atol=1e-6)


def test_arrays_without_elements():
    assert kernels.linear(mx.zeros((0, 4)), mx.zeros((3, 4))).shape == (0, 3)
    assert kernels.rms_norm(mx.zeros((2, 0)), None, 1e-5).shape == (2, 0)
    nothing = mx.zeros((0, 2, 3, 8))
    result = kernels.rope(nothing, 8, traditional=False, base=1e4, scale=1.0, offset=0)
    assert result.shape == kernels.attention(*[nothing] * 3, cache=None, scale=1.0, mask=None).shape
    mx.eval(result)
    q, none = mx.ones((1, 2, 3, 8)), mx.zeros((1, 2, 0, 8))
    assert not np.array(kernels.attention(q, none, none, cache=None, scale=1.0, mask=None)).any()
    assert kernels.swiglu(mx.zeros((0, 4)), mx.zeros((0, 4))).shape == (0, 4)
    assert kernels.token_logprobs(mx.zeros((0, 5)), mx.zeros((0,), mx.int32)).shape == (0,)


def test_shapes_that_do_not_fit_are_refused():
    module = extension.load().module
    with pytest.raises(ValueError, match="do not fit"):  # a row that ends beyond the sequence
        module.attention(*[mx.zeros((1, 2, 4, 8))] * 3, 1.0, True, [2, 5], None)
    with pytest.raises(ValueError, match="do not fit"):
        module.attention(mx.zeros((1, 3, 4, 8)), *[mx.zeros((1, 2, 4, 8))] * 2, 1.0, True, [], None)
    with pytest.raises(ValueError, match="do not fit"):  # rows end to end, and a mask
        module.attention(*[mx.zeros((1, 2, 4, 8))] * 3, 1.0, True, [2, 4], mx.ones((4, 4), mx.bool_))
    with pytest.raises(ValueError, match="must be"):
        module.log_sums(mx.array(1.0))
    with pytest.raises(ValueError, match="float32"):
        module.gelu(mx.zeros((3,), mx.bfloat16))


# Cross-entropy --------------------


@pytest.mark.parametrize("vocabulary", [1, 7, 1024, 49152, 152064])
def test_cross_entropy(vocabulary):
    logits, targets = normal(9, vocabulary, scale=3), NUMBERS.integers(vocabulary, size=9)
    value, (slope,), cotangent = both(lambda x: kernels.token_logprobs(x, mx.array(targets)), logits)
    exact = logits.astype(np.float64)
    normaliser = np.log(np.exp(exact).sum(axis=1))
    np.testing.assert_allclose(
        np.array(value), exact[np.arange(9), targets] - normaliser, rtol=4e-7, atol=1e-6
    )
    softmax = np.exp(exact - normaliser[:, None])
    onehot = np.arange(vocabulary)[None] == targets[:, None]
    np.testing.assert_allclose(np.array(slope), cotangent[:, None] * (onehot - softmax), rtol=1e-6, atol=4e-7)


@pytest.mark.parametrize("vocabulary", [1, 7, 1024, 49152, 152064])
@pytest.mark.parametrize("log_sums", [kernels.log_sums, operations.log_sums], ids=["compiled", "operations"])
def test_log_sums(vocabulary, log_sums):
    logits = normal(3, 2, vocabulary, scale=3)
    value, (slope,), cotangent = both(log_sums, logits)
    exact = logits.astype(np.float64)
    normaliser = np.log(np.exp(exact).sum(axis=-1))
    np.testing.assert_allclose(np.array(value), normaliser, rtol=4e-7)
    softmax = np.exp(exact - normaliser[..., None])
    np.testing.assert_allclose(np.array(slope), cotangent[..., None] * softmax, rtol=1e-6, atol=1e-9)


def test_cross_entropy_at_the_ends():
    logits = mx.array([[0.0, -mx.inf, 3.0], [3e38, 0.0, -3e38], [mx.nan, 0.0, 1.0]])
    values = np.array(kernels.token_logprobs(logits, mx.array([2, 0, 1])))
    np.testing.assert_allclose(values[:2], [-np.log1p(np.exp(-3)), 0], rtol=1e-6)
    assert np.isnan(values[2])
    assert np.isnan(np.array(kernels.token_logprobs(mx.zeros((1, 3)), mx.array([3])))).all()


# Activations, norms, rotary embeddings --------------------


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


@pytest.mark.parametrize("shape", [(1,), (3, 17), (2, 129, 300)])
def test_swiglu(shape):
    gate, up = normal(*shape, scale=4), normal(*shape)
    value, slopes, cotangent = both(kernels.swiglu, gate, up)
    g, u = gate.astype(np.float64), up.astype(np.float64)
    assert_close(value, g * sigmoid(g) * u)
    share = sigmoid(g)
    assert_close(slopes[0], cotangent * u * (share + g * share * (1 - share)))
    assert_close(slopes[1], cotangent * g * share)


@pytest.mark.parametrize("shape", [(1,), (3, 17), (2, 129, 300)])
def test_gelu(shape):
    x = normal(*shape, scale=3)
    value, (slope,), cotangent = both(kernels.gelu_approx, x)
    z = x.astype(np.float64)
    tanh = np.tanh(np.sqrt(2 / np.pi) * (z + 0.044715 * z**3))
    assert_close(value, 0.5 * z * (1 + tanh))
    inner = np.sqrt(2 / np.pi) * (1 + 3 * 0.044715 * z**2)
    assert_close(slope, cotangent * (0.5 * (1 + tanh) + 0.5 * z * (1 - tanh**2) * inner))


@pytest.mark.parametrize("rows", [1, 2, 3, 4, 8, 15, 16, 23, 32])
@pytest.mark.parametrize(("inputs", "outputs"), [(1, 1), (37, 65), (576, 1000)])
def test_products_of_few_rows(rows, inputs, outputs):
    x, weight = normal(rows, inputs), normal(outputs, inputs)
    with kernels.watched() as calls:
        value, slopes, cotangent = both(kernels.linear, x, weight)
    assert set(calls) == {("few rows", True)}
    a, w = x.astype(np.float64), weight.astype(np.float64)
    assert_close(value, a @ w.T, terms=(np.abs(a) @ np.abs(w).T).max())
    assert_close(slopes[0], cotangent @ w, terms=(np.abs(cotangent) @ np.abs(w)).max())
    assert_close(slopes[1], cotangent.T @ a, terms=(np.abs(cotangent).T @ np.abs(a)).max())
    pairs = [kernels.linear(mx.array(np.stack([row, row])), mx.array(weight))[:1] for row in x]
    same = np.array_equal(np.array(value), np.array(mx.concatenate(pairs)))
    assert rows == 1 or same, "whatever the other rows are"


@pytest.mark.parametrize("rows", [33, 47, 64])
def test_a_step_of_many_answers_gives_each_what_it_gets_beside_one_other(rows):
    x, weight = normal(rows, 1, 576), normal(1000, 576)
    with kernels.watched() as calls:
        value = kernels.linear(mx.array(x), mx.array(weight))
        kernels.linear(mx.array(x[:, 0]), mx.array(weight))  # not a step: a BLAS computes it
    assert calls == {("few rows", True): 1}
    pairs = [kernels.linear(mx.array(np.stack([row, row])), mx.array(weight))[:1] for row in x]
    assert np.array_equal(np.array(value), np.array(mx.concatenate(pairs)))


@pytest.mark.parametrize("per_expert", [8, 11, 40])
@pytest.mark.parametrize("skewed", [False, True])
@pytest.mark.parametrize(("experts", "inputs", "outputs"), [(1, 5, 3), (6, 37, 65), (32, 64, 16)])
def test_products_of_routed_experts(experts, inputs, outputs, per_expert, skewed):
    """Skewed: the last expert has nearly all rows, and some have none."""
    rows = experts * per_expert
    chosen = NUMBERS.integers(0, experts, rows)
    chosen = np.sort(np.where(NUMBERS.random(rows) < 0.9, experts - 1, chosen) if skewed else chosen)
    x, weight = normal(rows, 1, inputs), normal(experts, outputs, inputs)
    indices = mx.array(chosen.astype(np.uint32))
    value, slopes, cotangent = both(lambda x, w: kernels.routed(x, w, indices, True), x, weight)
    compiled = mx.compile(lambda x, w: kernels.routed(x, w, indices, True))
    a, w = x.astype(np.float64), weight.astype(np.float64)[chosen]
    expected = a @ w.swapaxes(1, 2)
    assert_close(value, expected)
    assert_close(compiled(mx.array(x), mx.array(weight)), expected)
    assert_close(slopes[0], cotangent @ w)
    by_expert = np.zeros_like(weight, dtype=np.float64)
    np.add.at(by_expert, chosen, cotangent.swapaxes(1, 2) @ a)
    assert_close(slopes[1], by_expert)


@pytest.mark.parametrize("bias", [False, True])
def test_layers_of_experts_multiply_in_blocks(bias, monkeypatch):
    """And those that are trained do not: the gradient of each block would be as large as a matrix."""
    layer = SwitchLinear(16, 24, 4, bias=bias)
    net = nn.Sequential(layer)
    x, indices = mx.array(normal(80, 1, 16)), mx.sort(mx.array(NUMBERS.integers(0, 4, 80)))
    expected = layer(x, indices, sorted_indices=True)
    kernels.install(net)
    asked: list[int] = []
    blocks = operations.routed
    monkeypatch.setattr(operations, "routed", lambda *arrays: asked.append(1) or blocks(*arrays))
    assert_close(layer(x, indices, sorted_indices=True), np.array(expected))
    assert not asked, "a trained layer"
    layer.freeze()
    assert_close(layer(x, indices, sorted_indices=True), np.array(expected))
    assert asked == [1]
    layer(x[:20], indices[:20], sorted_indices=True)
    layer(x, indices)
    assert asked == [1], "few rows, or rows in no order"


def test_activations_at_the_ends():
    ends = mx.array([-mx.inf, -3e38, -1e4, -89.0, 0.0, 89.0, 1e4, mx.nan])
    for kernel in (lambda x: kernels.swiglu(x, mx.ones(x.shape)), kernels.gelu_approx):
        result = np.array(kernel(ends[1:]))
        np.testing.assert_allclose(result[:-1], [0, 0, 0, 0, 89, 1e4], atol=1e-30, rtol=1e-6)
        assert np.isnan(result[-1])


@pytest.mark.parametrize("shape", [(1, 1), (70, 576), (2, 3, 5, 33), (3, 8192)])
@pytest.mark.parametrize("weighted", [True, False])
def test_rms_norm(shape, weighted):
    x, weight = normal(*shape, scale=3), normal(shape[-1])
    weights = (weight,) if weighted else ()
    value, slopes, cotangent = both(
        lambda x, *w: kernels.rms_norm(x, w[0] if weighted else None, 1e-5), x, *weights
    )
    a, w = x.astype(np.float64), weight.astype(np.float64) if weighted else np.ones(shape[-1])
    inverse = 1 / np.sqrt((a**2).mean(-1, keepdims=True) + 1e-5)
    assert_close(value, a * inverse * w)
    along = (cotangent * w * a).mean(-1, keepdims=True) * inverse**3
    assert_close(slopes[0], cotangent * w * inverse - a * along, terms=np.abs(cotangent * w * inverse).max())
    if weighted:
        assert_close(slopes[1], (cotangent * a * inverse).reshape(-1, shape[-1]).sum(0))


@pytest.mark.parametrize("traditional", [True, False])
@pytest.mark.parametrize("dims", [64, 32, 2])
@pytest.mark.parametrize("given_by", ["base", "wavelengths"])
@pytest.mark.parametrize("offset", [0, 5000, -60, [3, -7]])
def test_rotary_embeddings(traditional, dims, given_by, offset):
    x = normal(2, 3, 40, 64)
    base = 1e4 if given_by == "base" else None
    waves = None if base else np.exp(NUMBERS.random(dims // 2) * 8).astype(np.float32)
    first = mx.array(offset) if isinstance(offset, list) else offset
    value, (slope,), cotangent = both(
        lambda x: kernels.rope(
            x,
            dims,
            traditional=traditional,
            base=base,
            scale=0.5,
            offset=first,
            freqs=None if waves is None else mx.array(waves),
        ),
        x,
    )
    frequencies = (1e4 ** (-2.0 * np.arange(dims // 2) / dims)).astype(np.float32) if base else 1 / waves
    places = (np.array(offset).reshape(-1, 1) + np.arange(40)).astype(np.float32) * np.float32(0.5)
    # Models are trained with angles that were rounded to float32.
    angles = (places[..., None] * frequencies).astype(np.float64)[:, None]

    def turned(array, sign):
        rest, array = array[..., dims:], array[..., :dims].astype(np.float64)
        if traditional:
            a, b = array[..., ::2], array[..., 1::2]
        else:
            a, b = array[..., : dims // 2], array[..., dims // 2 :]
        c, s = np.cos(angles), sign * np.sin(angles)
        first_half, second_half = a * c - b * s, b * c + a * s
        if traditional:
            array = np.stack([first_half, second_half], axis=-1).reshape(array.shape)
        else:
            array = np.concatenate([first_half, second_half], axis=-1)
        return np.concatenate([array, rest], axis=-1)

    assert_close(value, turned(x, 1))
    assert_close(slope, turned(cotangent, -1))


# Dropout, and low-rank updates --------------------


@pytest.mark.parametrize("size", [0, 1, 2, 3, 7, 100, 16384, 16385, 49155, 1_000_003])
@pytest.mark.parametrize("rate", [1e-9, 0.05, 0.1, 0.5, 0.9, 0.999999])
def test_the_mask_of_dropout_is_mlx_s_bit_for_bit(size, rate):
    x, key = mx.array(normal(size)), mx.array([size * 7 + 1, 99], dtype=mx.uint32)
    scaled = mx.where(mx.random.bernoulli(1 - rate, x.shape, key=key), x * (1 / (1 - rate)), 0)
    value, (slope,) = mx.vjp(lambda x: kernels.dropout(x, rate, key), [x], [x])
    assert np.array_equal(np.array(value[0]), np.array(scaled))
    assert np.array_equal(np.array(slope), np.array(scaled))


def test_dropout_onto_another_array_leaves_that_as_it_was():
    x, key = mx.array(normal(3, 5, 7)), mx.random.key(4)
    dropped = np.array(kernels.dropout(x, 0.3, key)).astype(np.float64)
    held = mx.array(normal(3, 5, 7))
    before = np.array(held).astype(np.float64)
    slopes = mx.grad(lambda x, onto: (kernels.dropout(x, 0.3, key, onto=onto) ** 2).sum(), argnums=(0, 1))(
        x, held
    )
    assert_close(kernels.dropout(x, 0.3, key, onto=held), before + dropped)
    assert_close(kernels.dropout(x, 0.3, key, onto=held[:, :, ::-1]), before[:, :, ::-1] + dropped)
    assert_close(kernels.dropout(x, 0.3, key, onto=held * 2), 2 * before + dropped)
    assert np.array_equal(np.array(held), before)
    mask = np.where(dropped != 0, 1 / 0.7, 0)
    assert_close(slopes[1], 2 * (before + dropped))
    assert_close(slopes[0], 2 * (before + dropped) * mask, tolerance=2e-6)
    with pytest.raises(ValueError, match="shape of x"):
        kernels.dropout(x, 0.3, key, onto=held[0])


@pytest.mark.parametrize("rows", [(1,), (3, 5), (0,), (130,)])
def test_a_low_rank_product_is_added_in_place(rows):
    y, h, b = normal(*rows, 70), normal(*rows, 4), normal(4, 70)
    value, slopes, c = both(kernels.add_product, y, h, b)
    wide = [array.astype(np.float64) for array in (y, h, b)]
    terms = (np.abs(wide[1]) @ np.abs(wide[2])).max(initial=1)
    assert_close(value, wide[0] + wide[1] @ wide[2], terms=terms)
    assert_close(slopes[0], c)
    assert_close(slopes[1], c @ wide[2].T, terms=(np.abs(c) @ np.abs(wide[2].T)).max(initial=1))
    flat = [array.reshape(-1, array.shape[-1]) for array in (wide[1], c)]
    assert_close(slopes[2], flat[0].T @ flat[1], terms=(np.abs(flat[0]).T @ np.abs(flat[1])).max(initial=1))
    held = mx.array(y) + 0
    sums = kernels.add_product(held, mx.array(h), mx.array(b)), held * 1
    mx.eval(*sums)
    assert np.array_equal(np.array(held), y) and np.array_equal(np.array(sums[1]), y)
    assert_close(sums[0], wide[0] + wide[1] @ wide[2], terms=terms)
    with pytest.raises(ValueError, match="do not fit"):
        kernels.add_product(mx.array(y), mx.array(h), mx.array(b.T))


# Threads, processes, and machines without them --------------------

DIGEST = """
import hashlib, os, sys
from tunesmith.machine import backend
backend.setup()
import mlx.core as mx, numpy as np
from tunesmith.model import kernels
from tunesmith.model.kernels import extension, operations
from tunesmith.preflight.thorough.laws import exact_attention
extension.load().module.set_threads(int(sys.argv[1]))
def draw(*shape, seed=[0]):
    seed[0] += 1
    return mx.random.normal(shape, key=mx.random.key(seed[0]))
def values():
    q, k, v, c = draw(2, 9, 300, 64), draw(2, 3, 300, 64), draw(2, 3, 300, 64), draw(2, 9, 300, 64)
    attend = lambda q, k, v: kernels.attention(q, k, v, cache=None, scale=0.125, mask="causal")
    norm = lambda x, w: kernels.rms_norm(x, w, 1e-5)
    x, w, d = draw(500, 576), draw(576), draw(500, 576)
    logits, targets = draw(64, 5000), mx.arange(64)
    parts = [mx.vjp(attend, [q, k, v], [c]), mx.vjp(norm, [x, w], [d]),
             mx.vjp(lambda x: kernels.token_logprobs(x, targets), [logits], [draw(64)]),
             mx.vjp(kernels.swiglu, [x, d], [d]),
             mx.vjp(lambda x: kernels.dropout(x, 0.1, mx.random.key(1)), [x], [d])]
    arrays = [array for part in parts for side in part for array in side]
    return hashlib.sha256(b"".join(np.array(array).tobytes() for array in arrays)).hexdigest()
print(values())
"""


def run(*arguments: str, **environment: str) -> list[str]:
    environ = os.environ | environment
    command = [sys.executable, "-c", DIGEST, *arguments]
    return subprocess.run(
        command, env=environ, timeout=300, capture_output=True, text=True, check=True
    ).stdout.split()


def test_the_number_of_threads_changes_no_bit():
    assert len({run(threads)[0] for threads in ("1", "2", "3", "7")}) == 1


def test_generation_and_training_meet_only_compiled_kernels(tiny_model):
    net = loading.load(loading.ModelSpec(path=str(tiny_model))).net
    with kernels.watched() as calls:
        net(mx.array([[1, 2, 3]]))
        trained = set(calls)
        generation.generate(net, [[1, 2, 3], [4, 5]], max_tokens=3, eos_ids=[0])
    expected = {(name, True) for name in ("attention", "SwiGLU", "RMSNorm", "rotary")}
    few, sums = {("few rows", True)}, {("cross-entropy", True)}  # over the vocabulary, of each new token
    assert trained - few == expected
    assert set(calls) - few == expected | sums


def run_code(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """``code`` in another process, after MLX and the kernels are imported."""
    start = """
from tunesmith.machine import backend
backend.setup()
import mlx.core as mx, numpy as np
from tunesmith.model import kernels
from tunesmith.model.kernels import extension
"""
    command = [sys.executable, "-c", start + code]
    return subprocess.run(
        command, env=os.environ | environment, timeout=300, capture_output=True, text=True, check=True
    )


def test_streams_take_turns():
    """Two threads with a stream each, at positions that make the tables of rotary embeddings grow."""
    arrays = [mx.array(normal(1, heads, 200, 32)) for heads in (8, 2, 2)]

    def value(stream: mx.Stream, offset: int) -> np.ndarray:
        def total(q, k, v):
            q = kernels.rope(q, 32, traditional=False, base=1e4, scale=1.0, offset=offset)
            return (kernels.attention(q, k, v, cache=None, scale=0.2, mask="causal") ** 2).sum()

        with mx.stream(stream):
            return np.array(mx.grad(total)(*arrays))

    def values() -> list[bytes]:
        stream = mx.new_stream(mx.cpu)
        return [value(stream, offset).tobytes() for offset in range(0, 6000, 300)]

    expected = values()
    with ThreadPoolExecutor(2) as threads:
        assert [task.result() for task in [threads.submit(values) for _ in range(2)]] == [expected] * 2


OUT_OF_MEMORY = """
import resource, psutil
def slopes(width):
    q, k, v = (mx.ones((1, heads, 16, width)) for heads in (32, 1, 1))
    attend = lambda q, k, v: kernels.attention(q, k, v, cache=None, scale=1e-3, mask="causal")
    value, slopes = mx.vjp(attend, [q, k, v], [q])
    mx.eval(q, k, v, value)
    return slopes
mx.eval(slopes(4096))
mx.reset_peak_memory()
mx.eval(slopes(4096))
print(mx.get_peak_memory())
arrays = slopes(65536)
limit = psutil.Process().memory_info().vms + 200_000_000
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
try:
    mx.eval(arrays)
except (RuntimeError, MemoryError) as error:
    print(backend.is_out_of_memory(error), error)
"""


def test_what_the_backward_pass_of_attention_allocates_is_counted_and_may_be_missing():
    peak, message = run_code(OUT_OF_MEMORY).stdout.splitlines()
    queries, keys = 32 * 16 * 4096, 16 * 4096
    # Queries, output and slope; slopes of keys and values for each query head.
    assert int(peak) > 4 * (3 * queries + 2 * 32 * keys)
    assert message == f"True [malloc] Unable to allocate {4 * 2 * 32 * 16 * 65536} bytes."


REASONS = {
    "no C++ compiler": ({"PATH": "/nowhere"}, "no C++ compiler (g++)"),
    "a broken compiler": ({"TUNESMITH_CXXFLAGS": "-nonsense"}, "g++ cannot compile the kernels"),
    "an open quote": ({"TUNESMITH_CXXFLAGS": "'"}, "TUNESMITH_CXXFLAGS cannot be read"),
    "inexact arithmetic": (
        {"TUNESMITH_CXXFLAGS": "-O2 -ffast-math"},
        "TUNESMITH_CXXFLAGS has -ffast-math, which makes the results inexact",
    ),
}


@pytest.mark.parametrize("case", REASONS)
def test_without_a_compiler_mlx_s_operations_compute(case, tmp_path):
    environment, reason = REASONS[case]
    code = """
print(kernels.choice(), kernels.described())
print(kernels.swiglu(mx.array([2.0]), mx.array([1.0])).item())
"""
    result = run_code(code, TUNESMITH_CACHE=str(tmp_path), **environment).stdout.splitlines()
    assert result[0].startswith(f"operations as operations of MLX ({reason}")
    assert float(result[1]) == pytest.approx(1.7615942)


def test_missing_headers_are_named_with_their_packages(monkeypatch, tmp_path):
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path))
    absent = extension._load(events.silent)
    assert absent.module is None and absent.missing == f"Python's headers are not in {tmp_path}"
    assert absent.hint == "apt-get install python3-dev (Fedora: dnf install python3-devel)"


COMPILE_BESIDE_ANOTHER = """
print("missing", kernels.missing(lambda notice: print("notice", notice.what)))
x = np.linspace(-80, 80, 100_001).astype(np.float32)
exact = x.astype(np.float64)
sums = np.array(kernels.log_sums(mx.array(np.stack([x, np.zeros_like(x)], axis=-1))))
print("error", np.abs(sums - np.logaddexp(exact, 0)).max())
gate = np.array(kernels.swiglu(mx.array(x), mx.array(1 / x)))
print("error", np.abs(gate * (1 + np.exp(-exact)) - 1).max())
"""


def test_two_processes_compile_once(tmp_path):
    """And the second finds what the first has compiled. CXXFLAGS are for other programs. On x86 the kernels
    are those of a CPU that cannot multiply and add at once: e^x is as exact there."""
    flags = "-O1 -march=x86-64-v2" if platform.machine() == "x86_64" else "-O1"
    environment = {"TUNESMITH_CACHE": str(tmp_path), "TUNESMITH_CXXFLAGS": flags, "CXXFLAGS": "-nonsense"}
    with ThreadPoolExecutor(2) as threads:
        tasks = [threads.submit(run_code, COMPILE_BESIDE_ANOTHER, **environment) for _ in range(2)]
        lines = [line for task in tasks for line in task.result().stdout.splitlines()]
    assert lines.count("missing None") == 2
    notices = [line for line in lines if line.startswith("notice")]
    assert notices == ["notice compiling the kernels for this CPU, once: 10 to 30 seconds"]
    errors = [float(line.removeprefix("error ")) for line in lines if line.startswith("error")]
    assert len(errors) == 4 and max(errors) < 8e-6
    (library,) = tmp_path.glob("kernels/*/*.so")
    os.utime(library, (0, 0))
    assert run_code("print(kernels.missing())", **environment).stdout == "None\n"
    assert library.stat().st_mtime > time.time() - 3600, "when it was last loaded"


BEGIN = """
notices = []
kernels.begin(notices.append)
print(len(notices), *cache.glob("kernels/*/*.so"))
print(kernels.missing(notices.append), len(notices), len([*cache.glob("kernels/*/*.so")]))
kernels.begin(notices.append)
print(len(notices), kernels.swiglu(mx.array([2.0]), mx.array([1.0])).item())
"""


def test_kernels_are_compiled_while_other_work_goes_on(tmp_path):
    code = f"from pathlib import Path\ncache = Path({str(tmp_path)!r})\n{BEGIN}"
    environment = {"TUNESMITH_CACHE": str(tmp_path), "TUNESMITH_CXXFLAGS": "-O1"}
    first, second, third = run_code(code, **environment).stdout.splitlines()
    assert first == "1", "a notice, and no library yet"
    assert second == "None 1 1", "waited for, not compiled again"
    assert third.startswith("1 1.7615")
    assert run_code(code, **environment).stdout.startswith("0 /"), "compiled before"


@pytest.mark.parametrize("case", REASONS)
def test_what_cannot_be_compiled_is_told_where_it_is_loaded(case, tmp_path):
    environment, reason = REASONS[case]
    code = "kernels.begin(print)\nprint(kernels.missing().missing)"
    said = run_code(code, TUNESMITH_CACHE=str(tmp_path), **environment).stdout.splitlines()
    assert said[-1].startswith(reason)


def test_kernels_that_nobody_loads_are_deleted(tmp_path):
    now = time.time()
    for name, days in (("new", 0), ("used", 29), ("unused", 31), ("own", 90)):
        library = tmp_path / name / "kernels.so"
        library.parent.mkdir()
        library.touch()
        for path in (library, library.parent):
            os.utime(path, (now, now - days * 86_400))
    os.utime(tmp_path / "used", (now, now - 90 * 86_400))  # compiled long ago, loaded since
    extension._delete_unused(tmp_path / "own")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["new", "own", "used"]
