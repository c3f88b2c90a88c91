"""What computes attention, norms, rotary embeddings, activations and cross-entropy?

On a GPU, and for half precision, MLX's own kernels. On a Linux CPU those of `cpp`, compiled for the machine
(`extension`); without a compiler the chains of MLX's operations in `operations`. ``TUNESMITH_KERNELS``
chooses: ``on`` (the default), ``operations`` or ``off``."""

from __future__ import annotations

import types
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

import mlx.core as mx
import mlx.nn as nn

from tunesmith.events import Sink, silent
from tunesmith.machine import backend
from tunesmith.model import wrap
from tunesmith.model.kernels import extension, operations
from tunesmith.model.kernels.operations import with_gradient
from tunesmith.model.kernels.sequences import Packed, PromptCache, each_after, forbid_packing, packed, prompt
from tunesmith.model.quantisation import ExpandedLinear

__all__ = [
    "Choice",
    "Packed",
    "PromptCache",
    "add_product",
    "attention",
    "begin",
    "choice",
    "described",
    "divergences",
    "dropout",
    "each_after",
    "forbid_packing",
    "gelu_approx",
    "install",
    "linear",
    "log_sums",
    "missing",
    "packed",
    "prompt",
    "recorded",
    "rms_norm",
    "rope",
    "routed",
    "swiglu",
    "token_logprobs",
    "watched",
    "with_gradient",
]

Choice = Literal["compiled", "operations", "mlx"]


def choice() -> Choice:
    """What computes here. The first call compiles the kernels."""
    if not backend.own_kernels():
        return "mlx"
    wanted = backend.wanted_kernels() == "on"
    return "compiled" if wanted and extension.load().module is not None else "operations"


def described() -> str:
    """`choice` in words, with the reason if it is not the compiled kernels."""
    if backend.setup().kind != "cpu" or not backend.on_linux():
        return "MLX's"
    if choice() == "compiled":
        return "compiled for this CPU"
    words = {"operations": "as operations of MLX", "mlx": "MLX's"}[choice()]
    if backend.wanted_kernels() != "on":
        return f"{words} (TUNESMITH_KERNELS={backend.wanted_kernels()})"
    return f"{words} ({extension.load().missing})"


def recorded() -> str:
    """What a manifest says of `choice`: what computed decides the last digits. Empty on a GPU."""
    if backend.setup().kind != "cpu" or not backend.on_linux():
        return ""
    own = "attention and e^x of our own"
    off = "attention and e^x of MLX (TUNESMITH_KERNELS=off)"
    return {"compiled": "compiled kernels", "operations": own, "mlx": off}[choice()]


def begin(notify: Sink = silent) -> None:
    """Start to compile the kernels, if they are wanted here and were not compiled before."""
    if backend.own_kernels() and backend.wanted_kernels() == "on":
        extension.begin(notify)


def missing(notify: Sink = silent) -> extension.Extension | None:
    """Why the compiled kernels cannot be had; None if they compute, or are not wanted here. If they must be
    compiled first, ``notify`` is told."""
    if not backend.own_kernels() or backend.wanted_kernels() != "on":
        return None
    compiled = extension.load(notify)
    return compiled if compiled.module is None else None


def _compiled(kernel: str, *arrays: mx.array | None) -> Any:
    """The extension if it computes this, else None. ``kernel`` is counted for `watched`."""
    float32 = all(array is None or array.dtype == mx.float32 for array in arrays)
    module = extension.load().module if float32 and choice() == "compiled" else None
    if _calls is not None:
        _calls[kernel, module is not None] += 1
    return module


_calls: Counter[tuple[str, bool]] | None = None


@contextmanager
def watched() -> Iterator[Counter[tuple[str, bool]]]:
    """Counts of (kernel, whether it was the compiled one) of all calls inside."""
    global _calls
    before, _calls = _calls, Counter()
    try:
        yield _calls
    finally:
        _calls = before


def swiglu(gate: mx.array, x: mx.array) -> mx.array:
    """gate · σ(gate) · x"""
    if gate.shape == x.shape and (module := _compiled("SwiGLU", gate, x)):
        return module.swiglu(gate, x)
    if gate.dtype == mx.float32 == x.dtype and backend.own_kernels():
        return operations.swiglu(gate, x)
    return nn.silu(gate) * x


def gelu_approx(x: mx.array) -> mx.array:
    """GELU by its tanh approximation (arXiv 1606.08415)."""
    return module.gelu(x) if (module := _compiled("GELU", x)) else nn.gelu_approx(x)


def rms_norm(x: mx.array, weight: mx.array | None, eps: float) -> mx.array:
    """x / sqrt(mean(x²) + eps) · weight along the last axis."""
    if module := _compiled("RMSNorm", x, weight):
        return module.rms_norm(x, weight, eps)
    return mx.fast.rms_norm(x, weight, eps)


def rope(
    x: mx.array,
    dims: int,
    *,
    traditional: bool,
    base: float | None,
    scale: float,
    offset: int | mx.array,
    freqs: mx.array | None = None,
) -> mx.array:
    """Rotary embeddings of (B, H, T, D), as `mlx.core.fast.rope` computes them."""
    if x.ndim == 4 and dims % 2 == 0 and (module := _compiled("rotary", x)):
        first = offset if isinstance(offset, mx.array) else mx.array([offset])
        return module.rotary(x, dims, traditional, base, scale, first, freqs)
    given: Any = {"traditional": traditional, "base": base, "scale": scale, "offset": offset, "freqs": freqs}
    return mx.fast.rope(x, dims, **given)


FEW_ROWS = 32
"""Largest number of rows that the compiled kernel multiplies with a weight."""
FEW_ANSWERS = 64
"""The same of a step of generation, (B, 1, in): the kernel is faster than a BLAS up to here. Other products
keep the lower bound, so that runs that began with it keep their last digits."""


def _few(x: mx.array) -> bool:
    is_step = x.ndim == 3 and x.shape[1] == 1
    return 0 < x.size // max(1, x.shape[-1]) <= (FEW_ANSWERS if is_step else FEW_ROWS)


def linear(x: mx.array, weight: mx.array) -> mx.array:
    """(..., in), (out, in) → (..., out) x·Wᵀ"""
    if _few(x) and (module := _compiled("few rows", x, weight)):
        return module.linear(x, weight)
    return x @ weight.T


def add_product(y: mx.array, h: mx.array, b: mx.array) -> mx.array:
    """(..., out), (..., r), (r, out) → (..., out) y + h·b, in one pass over y where kernels are compiled."""
    if module := _compiled("low rank", y, h, b):
        return module.add_product(y, h, b)
    return y + h @ b


def dropout(x: mx.array, rate: float, key: mx.array, onto: mx.array | None = None) -> mx.array:
    """x / (1 − rate) where the mask drawn from ``key`` (2,) uint32 keeps it, else 0; plus ``onto``. The mask
    is the same wherever it is computed."""
    if module := _compiled("dropout", x, onto):
        return module.dropout(x, key, 1 - rate, 1 / (1 - rate), onto)
    kept = mx.where(mx.random.bernoulli(1 - rate, x.shape, key=key), x * (1 / (1 - rate)), 0)
    return kept if onto is None else onto + kept


ROUTED_ROWS = 8
"""Fewest rows for each expert, on average, that are multiplied in blocks."""


def routed(x: mx.array, weight: mx.array, experts: mx.array, sorted_indices: bool) -> mx.array:
    """(..., n, in), (E, out, in), (...) → (..., n, out) x·Wᵀ with the matrix of the expert of each entry."""
    one_each = sorted_indices and x.ndim == 3 and x.shape[1] == 1 and experts.ndim == 1
    float32 = x.dtype == mx.float32 == weight.dtype
    # Only where kernels are compiled: runs that began without them keep their last digits.
    if one_each and float32 and len(x) >= ROUTED_ROWS * len(weight) and choice() == "compiled":
        return operations.routed(x[:, 0], weight, experts)[:, None]
    gathered: Any = {"rhs_indices": experts, "sorted_indices": sorted_indices}
    return mx.gather_mm(x, weight.swapaxes(-1, -2), **gathered)


def token_logprobs(logits: mx.array, targets: mx.array) -> mx.array:
    """(K, V), (K,) → (K,) float32: log p of each target."""
    logits = logits.astype(mx.float32)
    if module := _compiled("cross-entropy", logits):
        return module.logprobs(logits, targets)
    if backend.own_kernels():
        return operations.token_logprobs(logits, targets)
    return -mx.fast.cross_entropy(logits, targets)


def log_sums(logits: mx.array) -> mx.array:
    """(..., V) → (...) float32: log Σ e^logit.

    MLX's own sum over a long row errs by 2e-4 on the CPU, and its ``logsumexp`` with it."""
    logits = logits.astype(mx.float32)
    if module := _compiled("cross-entropy", logits):
        return module.log_sums(logits)
    return operations.log_sums(logits) if backend.own_kernels() else mx.logsumexp(logits, axis=-1)


def divergences(base: mx.array, logits: mx.array) -> mx.array:
    """(K, V), (K, V) logits → (K,) float32: the Kullback-Leibler divergence KL(base‖model) of each row, in
    nats. ``base`` gets no gradient."""
    base, logits = mx.stop_gradient(base.astype(mx.float32)), logits.astype(mx.float32)
    if module := _compiled("divergence", base, logits):
        return module.divergences(base, logits)
    of_base = log_sums(base)
    shares = (operations.exp if backend.own_kernels() else mx.exp)(base - of_base[:, None])
    return operations.row_sums(shares * (base - logits))[:, 0] - of_base + log_sums(logits)


def attention(
    queries: mx.array,
    keys: mx.array,
    values: mx.array,
    cache: Any,
    scale: float,
    mask: Any,
    sinks: mx.array | None = None,
) -> mx.array:
    """What mlx-lm's layers call: queries (B, H, T, D), keys and values (B, K, S, D) → (B, H, T, D)."""
    rows = isinstance(mask, Packed)
    if rows and sinks is not None:
        raise ValueError("layers with attention sinks cannot take packed rows")
    simple = _boolean(mask) if isinstance(mask, mx.array) else rows or mask in (None, "causal")
    if simple and sinks is None and isinstance(keys, mx.array):  # a tuple where they are quantised
        if module := _compiled("attention", queries, keys, values):
            allowed = mask if isinstance(mask, mx.array) else None
            ends = list(mask.ends) if isinstance(mask, Packed) else []
            causal = mask is not None and allowed is None
            return module.attention(queries, keys, values, scale, causal, ends, allowed)
    elif _calls is not None:
        _calls["attention", False] += 1
    if isinstance(mask, Packed):
        return _row_by_row(queries, keys, values, scale, mask.ends)
    whole = queries.shape[2] == keys.shape[2] if isinstance(cache, PromptCache) else cache is None
    if whole and sinks is None and isinstance(mask, str) and mask == "causal":
        return _one_row(queries, keys, values, scale)
    from mlx_lm.models import base  # loads transformers, which reading settings or rows does not need

    theirs: Any = base.scaled_dot_product_attention
    return theirs(queries, keys, values, cache=cache, scale=scale, mask=mask, sinks=sinks)


def _boolean(mask: mx.array) -> bool:
    return mask.dtype == mx.bool_ and mask.ndim <= 4


def _row_by_row(
    queries: mx.array, keys: mx.array, values: mx.array, scale: float, ends: tuple[int, ...]
) -> mx.array:
    """(1, H, T, D) attention inside each row."""
    parts = [
        _one_row(queries[:, :, start:end], keys[:, :, start:end], values[:, :, start:end], scale)
        for start, end in zip((0, *ends), ends, strict=False)
        if end > start
    ]
    return mx.concatenate(parts, axis=2)


def _one_row(queries: mx.array, keys: mx.array, values: mx.array, scale: float) -> mx.array:
    if queries.dtype == mx.float32 and backend.own_kernels():
        return operations.causal(queries, keys, values, scale)
    return mx.fast.scaled_dot_product_attention(queries, keys, values, scale=scale, mask="causal")


_FAST = types.SimpleNamespace(**(vars(mx.fast) | {"rms_norm": rms_norm, "rope": rope}))
_CORE = types.SimpleNamespace(**(vars(mx) | {"fast": _FAST}))
_NN = types.SimpleNamespace(**(vars(nn) | {"gelu_approx": gelu_approx}))
_Binding = tuple[str, Any, frozenset[str]]
_ATTENTION: tuple[_Binding, ...] = (("scaled_dot_product_attention", attention, frozenset()),)
_ON_A_CPU: tuple[_Binding, ...] = (
    *_ATTENTION,
    ("swiglu", swiglu, frozenset()),
    ("mx", _CORE, frozenset({"rms_norm", "rope"})),
    ("nn", _NN, frozenset({"gelu_approx"})),
)
"""A global name in the code of a layer, what stands for it, and the names of which that code must also use
one (or none). A GPU needs attention only, for packed rows and prompts."""


def _bindings(kind: type[nn.Module]) -> dict[str, Any]:
    """What the code of ``kind`` has to call instead of what it names."""
    call: Any = kind.__call__
    if not isinstance(call, types.FunctionType):
        return {}
    names = set(call.__code__.co_names)
    ours = _ON_A_CPU if backend.own_kernels() else _ATTENTION
    return {name: stand for name, stand, any_of in ours if name in names and (not any_of or names & any_of)}


def install(net: nn.Module) -> int:
    """Let the layers of ``net`` call the functions above; returns how many do.

    Each such layer becomes an object of a subclass whose ``__call__`` is its own code with these names bound
    anew, so every architecture keeps its own arithmetic, and other models in the process stay as they
    were."""

    modules = [module for module in net.modules() if _bindings(type(module))]
    wrap.replace(modules, lambda kind: wrap.rebound(kind.__call__, _bindings(kind)))
    if backend.own_kernels():
        from mlx_lm.models.switch_layers import SwitchLinear  # loads transformers

        plain = nn.Linear, ExpandedLinear
        linear_layers = [module for module in net.modules() if type(module) in plain]
        wrap.replace(linear_layers, lambda kind: _linear)
        layers_of_experts = [module for module in net.modules() if type(module) is SwitchLinear]
        wrap.replace(layers_of_experts, lambda kind: _experts)
        tables = [module for module in net.modules() if type(module) is nn.Embedding]
        wrap.replace(tables, lambda kind: _as_linear, method="as_linear")
    return len(modules)


def _linear(layer: nn.Module, x: mx.array) -> mx.array:
    if "bias" in layer and not _few(x):
        return mx.addmm(layer["bias"], x, layer["weight"].T)
    y = linear(x, layer["weight"])
    return y + layer["bias"] if "bias" in layer else y


def _experts(layer: nn.Module, x: mx.array, indices: mx.array, sorted_indices: bool = False) -> mx.array:
    if layer.trainable_parameters():  # in blocks, its gradient would hold a matrix for each block
        gathered: Any = {"rhs_indices": indices, "sorted_indices": sorted_indices}
        y = mx.gather_mm(x, layer["weight"].swapaxes(-1, -2), **gathered)
    else:
        y = routed(x, layer["weight"], indices, sorted_indices)
    return y + mx.expand_dims(layer["bias"][indices], -2) if "bias" in layer else y


def _as_linear(table: nn.Module, x: mx.array) -> mx.array:
    return linear(x, table["weight"])
