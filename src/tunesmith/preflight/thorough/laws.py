"""How far are attention, norms, activations, products and the loss from float64? Values and gradients of
each, relative to the largest sum of absolute terms in it, in which every rounding counts."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import mlx.core as mx
import numpy as np

from tunesmith.machine import backend
from tunesmith.model import kernels

Exact = tuple[list[np.ndarray], list[float]]
"""The value and the gradient of each input in float64, and for each its largest sum of absolute terms."""

LIMITS = {mx.float32: 1e-5, mx.float16: 4e-3, mx.bfloat16: 3e-2}
"""About 80 times the distance of float32 to 1, and 4 times that of the 16-bit types."""


class Law(NamedTuple):
    """``exact``: of the inputs and the cotangent of the value, in float64."""

    name: str
    inputs: tuple[np.ndarray, ...]
    computed: Callable[..., mx.array]
    exact: Callable[..., Exact]


def exact_attention(
    q: np.ndarray, k: np.ndarray, v: np.ndarray, scale: float, allowed: np.ndarray, cotangent: np.ndarray
) -> Exact:
    """Attention where ``allowed`` (B, H, T, S) or broadcast to it. A query without keys gives zero."""
    q, k, v = (array.astype(np.float64) for array in (q, k, v))
    sharing = q.shape[1] // k.shape[1]
    keys, values = np.repeat(k, sharing, axis=1), np.repeat(v, sharing, axis=1)
    scores = np.where(allowed, q @ keys.swapaxes(-1, -2) * scale, -np.inf)
    highest = scores.max(-1, keepdims=True)
    weights = np.exp(scores - np.where(np.isfinite(highest), highest, 0))
    weights /= np.maximum(weights.sum(-1, keepdims=True), 1e-300)
    output = weights @ values
    change = cotangent @ values.swapaxes(-1, -2)
    inner = (cotangent * output).sum(-1, keepdims=True)
    size = weights * (np.abs(cotangent) @ np.abs(values).swapaxes(-1, -2) + np.abs(inner)) * scale
    change = weights * (change - inner) * scale

    def shared(array: np.ndarray) -> np.ndarray:
        return array.reshape(*k.shape[:2], sharing, *array.shape[2:]).sum(axis=2)

    results = [
        output,
        change @ keys,
        shared(change.swapaxes(-1, -2) @ q),
        shared(weights.swapaxes(-1, -2) @ cotangent),
    ]
    sizes = [
        weights @ np.abs(values),
        size @ np.abs(keys),
        shared(size.swapaxes(-1, -2) @ np.abs(q)),
        shared(weights.swapaxes(-1, -2) @ np.abs(cotangent)),
    ]
    return results, [float(array.max()) for array in sizes]


def _exact_norm(x: np.ndarray, weight: np.ndarray, cotangent: np.ndarray) -> Exact:
    inverse = 1 / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-5)
    along = (cotangent * weight * x).mean(-1, keepdims=True) * inverse**3
    results = [x * inverse * weight, cotangent * weight * inverse - x * along]
    results.append((cotangent * x * inverse).sum(0))
    sizes = [np.abs(results[0]), np.abs(cotangent * weight * inverse), np.abs(cotangent * x * inverse).sum(0)]
    return results, [float(size.max()) for size in sizes]


def _exact_swiglu(gate: np.ndarray, x: np.ndarray, cotangent: np.ndarray) -> Exact:
    share = 1 / (1 + np.exp(-gate))
    slope = cotangent * x * (share + gate * share * (1 - share))
    results = [gate * share * x, slope, cotangent * gate * share]
    return results, [float(np.abs(result).max()) for result in results]


def _exact_product(x: np.ndarray, weight: np.ndarray, cotangent: np.ndarray) -> Exact:
    results = [x @ weight.T, cotangent @ weight, cotangent.T @ x]
    a, b, c = np.abs(x), np.abs(weight), np.abs(cotangent)
    return results, [float(size.max()) for size in (a @ b.T, c @ b, c.T @ a)]


def _loss(targets: np.ndarray) -> Callable[..., Exact]:
    def exact(logits: np.ndarray, cotangent: np.ndarray) -> Exact:
        highest = logits.max(1, keepdims=True)
        exponentials = np.exp(logits - highest)
        sums = np.log(exponentials.sum(1)) + highest[:, 0]
        onehot = np.arange(logits.shape[1])[None] == targets[:, None]
        softmax = exponentials / exponentials.sum(1, keepdims=True)
        value = logits[np.arange(len(logits)), targets] - sums
        slope = cotangent[:, None] * (onehot - softmax)
        return [value, slope], [float(np.abs(value).max()), float(np.abs(slope).max())]

    return exact


def _attention(mask: str | np.ndarray, allowed: np.ndarray, width: int) -> Law:
    random = np.random.Generator(np.random.PCG64(1))
    scale, keys = width**-0.5, allowed.shape[-1]
    inputs = tuple(random.normal(0, 1, (2, heads, keys, width)) for heads in (6, 2, 2))
    given = mask if isinstance(mask, str) else mx.array(mask)

    def computed(q: mx.array, k: mx.array, v: mx.array) -> mx.array:
        return kernels.attention(q, k, v, cache=None, scale=scale, mask=given)

    def exact(q: np.ndarray, k: np.ndarray, v: np.ndarray, cotangent: np.ndarray) -> Exact:
        return exact_attention(q, k, v, scale, allowed, cotangent)

    return Law(
        "causal attention" if isinstance(mask, str) else "attention with a mask", inputs, computed, exact
    )


def laws() -> list[Law]:
    random = np.random.Generator(np.random.PCG64(0))

    def normal(*shape: int, scale: float = 1.0) -> np.ndarray:
        return random.normal(0, scale, shape)

    places = np.arange(193)
    causal = places[None] <= places[:, None]
    window = causal & (places[:, None] - places[None] < 50)
    targets = random.integers(49152, size=9)
    return [
        _attention("causal", causal, 64),
        _attention(window, window, 64),
        Law(
            "RMSNorm",
            (normal(70, 576, scale=3), normal(576)),
            lambda x, weight: kernels.rms_norm(x, weight, 1e-5),
            _exact_norm,
        ),
        Law("SwiGLU", (normal(70, 300, scale=4), normal(70, 300)), kernels.swiglu, _exact_swiglu),
        Law("products", (normal(200, 576), normal(300, 576)), lambda x, w: x @ w.T, _exact_product),
        Law("products of few rows", (normal(9, 576), normal(300, 576)), kernels.linear, _exact_product),
        Law(
            "loss",
            (normal(9, 49152, scale=3),),
            lambda logits: kernels.token_logprobs(logits, mx.array(targets)),
            _loss(targets),
        ),
    ]


def deviations() -> Iterator[tuple[str, str, float, float]]:
    """(law, dtype, error, limit): in float32, and on a GPU in the 16-bit types too."""
    types = [mx.float32, mx.float16, mx.bfloat16] if backend.setup().kind == "gpu" else [mx.float32]
    for dtype in types:
        name = str(dtype).removeprefix("mlx.core.")
        for law in laws():
            yield law.name, name, error(law, dtype), LIMITS[dtype]


def error(law: Law, dtype: mx.Dtype) -> float:
    """Of the value and every gradient, the largest relative one. Inputs are rounded to ``dtype`` first."""
    given = [mx.array(array.astype(np.float32)).astype(dtype) for array in law.inputs]
    value = law.computed(*given)
    random = np.random.Generator(np.random.PCG64(2))
    cotangent = mx.array(random.normal(0, 1, value.shape).astype(np.float32)).astype(value.dtype)
    values, slopes = mx.vjp(law.computed, given, [cotangent])
    expected, sizes = law.exact(*map(_doubled, given), _doubled(cotangent))
    return _largest([*values, *slopes], expected, sizes)


def _doubled(array: mx.array) -> np.ndarray:
    return np.array(array.astype(mx.float32)).astype(np.float64)


def _largest(results: Sequence[mx.array], expected: Sequence[np.ndarray], sizes: Sequence[float]) -> float:
    errors = [
        float(np.abs(_doubled(result) - exact).max()) / size
        for result, exact, size in zip(results, expected, sizes, strict=True)
    ]
    return max(errors) if all(map(np.isfinite, errors)) else float("nan")
