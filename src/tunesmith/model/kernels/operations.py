"""e^x, causal attention, SwiGLU and cross-entropy for a Linux CPU as chains of MLX's operations, where the
compiled kernels are missing; and the products of routed experts.

The wheel has no vectorised exponential on x86 (10 to 20 ns an element, where a multiplication takes 0.2), and
its attention builds all scores at once. Here e^x is a polynomial in plain MLX operations, and attention runs
over blocks of queries that use only the keys before them, with scores recomputed in the backward pass instead
of kept (FlashAttention, arXiv 2205.14135). On a GPU MLX's own kernels are used."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar

import mlx.core as mx

F = TypeVar("F", bound=Callable[..., Any])
PART = 256  # weights added up at once
BLOCK = 128  # queries at once: their scores against 2,048 keys stay in the cache of one core

_LOG2_E = 1.4426950408889634
_ROUND = 12582912.0  # 1.5 · 2^23: adding it leaves the rounded value in the low bits of the mantissa
# 2^f on [−1/2, 1/2], lowest power first; relative error 7.5e-8 in exact arithmetic.
_POWERS = (1.000000072, 0.6931469671, 0.2402211972, 0.05550713278, 0.009675541324, 0.001327647069)


def _exp(x: mx.array) -> mx.array:
    """e^x in float32, relative error under 1e-6 for |x| < 10; about 1e-38 instead of 0 below −87."""
    y = mx.minimum(mx.maximum(x * _LOG2_E, -126.0), 128.0)  # beyond, the exponent would run into the sign
    shifted = y + _ROUND
    f = y - (shifted - _ROUND)
    power = f * _POWERS[-1] + _POWERS[-2]
    for coefficient in _POWERS[-3::-1]:
        power = power * f + coefficient
    scale = mx.left_shift(shifted.view(mx.int32), 23) + (127 << 23)
    return power * scale.view(mx.float32)


def with_gradient(function: F, vjp: Callable[..., Any]) -> F:
    """``function``, whose gradient is ``vjp`` (primals, cotangents, results)."""
    differentiable: Any = mx.custom_function(function)
    differentiable.vjp(vjp)
    return differentiable


def _exp_vjp(x: mx.array, cotangent: mx.array, output: mx.array) -> mx.array:
    return cotangent * output


exp = with_gradient(_exp, _exp_vjp)


def _swiglu(gate: mx.array, x: mx.array) -> mx.array:
    return gate * x / (1 + exp(-gate))


def _swiglu_vjp(
    primals: tuple[mx.array, mx.array], cotangent: mx.array, output: mx.array
) -> tuple[mx.array, mx.array]:
    gate, x = primals
    share = 1 / (1 + exp(-gate))
    silu = gate * share
    return cotangent * x * (share + silu * (1 - share)), cotangent * silu


swiglu = with_gradient(_swiglu, _swiglu_vjp)


@mx.compile  # one pass over a block too large for the cache; without a compiler MLX runs it as it is
def _above(x: mx.array, highest: mx.array) -> mx.array:
    return _exp(x - highest)


def row_sums(weights: mx.array) -> mx.array:
    """(K, V) → (K, 1), first in parts: MLX's CPU adds one after the other, which costs 2e-4 nats at 49,152
    logits."""
    whole = weights.shape[-1] // PART * PART
    parts = weights[:, :whole].reshape(len(weights), -1, PART).sum(axis=-1).sum(axis=-1, keepdims=True)
    return parts + weights[:, whole:].sum(axis=-1, keepdims=True) if whole < weights.shape[-1] else parts


def _cross(logits: mx.array, targets: mx.array) -> tuple[mx.array, mx.array, mx.array]:
    """(K,) log p of the target; e^(logit − highest) (K, V) and its sum (K, 1), for the gradient."""
    highest = logits.max(axis=-1, keepdims=True)
    weights = _above(logits, highest)
    total = row_sums(weights)
    taken = mx.take_along_axis(logits, targets[:, None], axis=-1)
    return (taken - highest - mx.log(total))[:, 0], weights, total


def _cross_vjp(
    primals: tuple[mx.array, mx.array],
    cotangents: tuple[mx.array, ...],
    results: tuple[mx.array, mx.array, mx.array],
) -> tuple[mx.array, mx.array]:
    targets = primals[1]
    _, weights, total = results
    slope = (-cotangents[0][:, None] / total) * weights
    return slope.at[mx.arange(len(targets)), targets].add(cotangents[0]), mx.zeros_like(targets)


_logprobs = with_gradient(_cross, _cross_vjp)


def token_logprobs(logits: mx.array, targets: mx.array) -> mx.array:
    """(K, V), (K,) → (K,) float32: log p of each target."""
    return _logprobs(logits, targets)[0]


def _sums(logits: mx.array) -> tuple[mx.array, mx.array, mx.array]:
    """(K,) log Σ e^logit; e^(logit − highest) (K, V) and its sum (K, 1), for the gradient."""
    highest = logits.max(axis=-1, keepdims=True)
    weights = _above(logits, highest)
    total = row_sums(weights)
    return (highest + mx.log(total))[:, 0], weights, total


def _sums_vjp(
    logits: mx.array, cotangents: tuple[mx.array, ...], results: tuple[mx.array, mx.array, mx.array]
) -> mx.array:
    _, weights, total = results
    return (cotangents[0][:, None] / total) * weights


_log_sums = with_gradient(_sums, _sums_vjp)


def log_sums(logits: mx.array) -> mx.array:
    """(..., V) → (...) log Σ e^logit."""
    return _log_sums(logits.reshape(-1, logits.shape[-1]))[0].reshape(logits.shape[:-1])


def causal(queries: mx.array, keys: mx.array, values: mx.array, scale: float) -> mx.array:
    """(B, H, T, D) attention of each position to itself and those before it; keys and values (B, K, T, D)
    with K dividing H."""
    return _causal(scale)(queries, keys, values)[0]


@functools.cache
def _causal(scale: float) -> Callable[[mx.array, mx.array, mx.array], tuple[mx.array, mx.array]]:
    """queries, keys, values → output (B, H, T, D) and the log of each row's normaliser (B, K, G, T, 1), G = H
    / K."""

    def scores(queries: mx.array, keys: mx.array, start: int, end: int) -> mx.array:
        """(B, K, G, end − start, end): the scores of one block, with later positions at −1e9."""
        batch, heads, groups, _, width = queries.shape
        block = queries[:, :, :, start:end].reshape(batch, heads, -1, width) * scale
        products = (block @ keys[:, :, :end].swapaxes(-1, -2)).reshape(batch, heads, groups, end - start, end)
        ahead = mx.arange(end)[None] > mx.arange(start, end)[:, None]
        return products + ahead * -1e9

    def split(queries: mx.array, keys: mx.array) -> mx.array:
        batch, heads, length, width = queries.shape
        return queries.reshape(batch, keys.shape[1], heads // keys.shape[1], length, width)

    def attend(queries: mx.array, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        shape, length = queries.shape, queries.shape[2]
        queries = split(queries, keys)
        batch, heads, groups = queries.shape[:3]
        outputs, normalisers = [], []
        for start in range(0, length, BLOCK):
            end = min(start + BLOCK, length)
            products = scores(queries, keys, start, end)
            highest = products.max(axis=-1, keepdims=True)
            weights = exp(products - highest)
            total = weights.sum(axis=-1, keepdims=True)
            mixed = weights.reshape(batch, heads, -1, end) @ values[:, :, :end]
            outputs.append(mixed.reshape(batch, heads, groups, end - start, -1) / total)
            normalisers.append(highest + mx.log(total))
        return mx.concatenate(outputs, axis=3).reshape(*shape[:3], -1), mx.concatenate(normalisers, axis=3)

    def attend_vjp(
        primals: tuple[mx.array, mx.array, mx.array],
        cotangents: tuple[mx.array, mx.array],
        results: tuple[mx.array, mx.array],
    ) -> tuple[mx.array, mx.array, mx.array]:
        queries, keys, values = primals
        shape, length = queries.shape, queries.shape[2]
        queries, cotangent, output = split(queries, keys), split(cotangents[0], keys), split(results[0], keys)
        batch, heads, groups, _, width = queries.shape
        inner = (cotangent * output).sum(axis=-1, keepdims=True)
        of_queries, of_keys, of_values = [], mx.zeros_like(keys), mx.zeros_like(values)
        for end in range(length, 0, -BLOCK):
            start = max(0, end - BLOCK)
            rows = slice(start, end)
            weights = exp(scores(queries, keys, start, end) - results[1][:, :, :, rows])
            block = cotangent[:, :, :, rows].reshape(batch, heads, -1, cotangent.shape[-1])
            change = (block @ values[:, :, :end].swapaxes(-1, -2)).reshape(weights.shape)
            change = (weights * (change - inner[:, :, :, rows]) * scale).reshape(batch, heads, -1, end)
            weights = weights.reshape(change.shape)
            of_queries.append((change @ keys[:, :, :end]).reshape(batch, heads, groups, end - start, width))
            block_queries = queries[:, :, :, rows].reshape(batch, heads, -1, width)
            of_keys = _add(of_keys, change.swapaxes(-1, -2) @ block_queries, end)
            of_values = _add(of_values, weights.swapaxes(-1, -2) @ block, end)
        return mx.concatenate(of_queries[::-1], axis=3).reshape(shape), of_keys, of_values

    return with_gradient(attend, attend_vjp)


def _add(total: mx.array, part: mx.array, end: int) -> mx.array:
    """``total`` (B, K, T, D) with ``part`` (B, K, end, D) added to its front."""
    return (
        mx.concatenate([total[:, :, :end] + part, total[:, :, end:]], axis=2)
        if end < total.shape[2]
        else total + part
    )


ROWS_OF_EXPERT = 32
"""Most rows of a block in `routed`: larger blocks are padded more, smaller ones read the weights more
often."""


def routed(x: mx.array, weight: mx.array, experts: mx.array) -> mx.array:
    """(N, in), (E, out, in), (N,) → (N, out): each row times the transposed matrix of its expert; ``experts``
    is sorted, with 8 rows for each expert on average or more.

    On the CPU MLX multiplies gathered matrices one row at a time, which reads an expert's weights for each of
    its rows. Here each expert's rows are padded to blocks, which a BLAS multiplies 4 to 9 times as fast. The
    number of blocks depends on the shapes alone, so nothing is computed before it is needed."""
    n_rows, n_experts = len(x), len(weight)
    block = min(ROWS_OF_EXPERT, n_rows // n_experts)
    counts = (experts[:, None] == mx.arange(n_experts)).sum(axis=0)
    blocks = (counts + (block - 1)) // block  # of each expert
    ends = mx.cumsum(blocks)
    shift = (ends - blocks) * block - (mx.cumsum(counts) - counts)
    places = mx.arange(n_rows) + shift[experts]
    n_blocks = n_rows // block + n_experts  # at most so many are used
    owners = (mx.arange(n_blocks)[:, None] >= ends).sum(axis=1)
    owners = mx.minimum(owners, n_experts - 1)
    padded = mx.zeros((n_blocks * block, x.shape[-1]), x.dtype).at[places].add(x)
    rows = padded.reshape(n_blocks, block, -1)
    products = mx.gather_mm(rows, weight.swapaxes(-1, -2), rhs_indices=owners, sorted_indices=True)
    return products.reshape(n_blocks * block, -1)[places]
