"""LoRA and DoRA on routed experts: what they compute on mlx-lm's stacked layers, plain or quantised.

One layer of a mixture holds the matrices of all experts, (experts, out, in), and multiplies each token with
those that the router chose. Each expert has a low-rank update of its own, of the same rank. The tensors have
the layout of mlx-lm's LoRA on such layers; DoRA there is ours alone."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from tunesmith.adapters.layers import AdapterLayer, DoRALinear, LoRALinear, dense, dims
from tunesmith.model import kernels


@functools.cache
def _stacked() -> tuple[Any, ...]:
    from mlx_lm.models.switch_layers import QuantizedSwitchLinear, SwitchLinear  # loads transformers

    return SwitchLinear, QuantizedSwitchLinear


def is_experts(module: nn.Module) -> bool:
    """Whether ``module`` holds one linear layer for each expert."""
    return isinstance(module, _stacked())


def is_mixture(module: nn.Module) -> bool:
    """Whether ``module`` sends tokens to the layers of experts in it: (..., in), (..., choices) →
    (..., choices, out)."""
    from mlx_lm.models.switch_layers import SwitchGLU, SwitchMLP  # loads transformers

    return isinstance(module, SwitchGLU | SwitchMLP)


def dense_experts() -> nn.Module:
    """A layer of experts without quantisation, whose weight and bias the caller sets."""
    return _stacked()[0](1, 1, 1, bias=False)


class LoRAExperts(AdapterLayer):
    """y = W·x + b + s·(x·Aᵀ)·Bᵀ with W, b, A and B of the expert that each token was sent to.

    ``lora_a`` (experts, r, in) is uniform within ±1/sqrt(in), drawn from ``key`` alone; ``lora_b`` (experts,
    out, r) is zero."""

    def __init__(self, linear: nn.Module, rank: int, scale: float, dropout: float, key: mx.array) -> None:
        super().__init__(linear, scale, dropout)
        experts, (inputs, outputs) = len(linear["weight"]), dims(linear)
        bound = inputs**-0.5
        self.lora_a = mx.random.uniform(-bound, bound, (experts, rank, inputs), key=key)
        self.lora_b = mx.zeros((experts, outputs, rank))
        self.train(linear.training)

    def branch(self, x: mx.array, indices: mx.array, sorted_indices: bool) -> mx.array:
        """(..., 1, out) float32: s·(dropout(x)·Aᵀ)·Bᵀ. Raises TrainingError as `LoRALinear.branch` does."""
        gathered: Any = {"rhs_indices": indices, "sorted_indices": sorted_indices}
        x = self.dropped(x).astype(mx.float32)
        a, b = self.factors
        inner = mx.gather_mm(x, a.swapaxes(-1, -2), **gathered) * self.scale
        return mx.gather_mm(inner, b.swapaxes(-1, -2), **gathered)

    def updated(self, y: mx.array, x: mx.array, indices: mx.array, sorted_indices: bool) -> mx.array:
        """(..., 1, out): ``y``, which the frozen layer makes of ``x``, with the update, in its dtype."""
        return y + self.branch(x, indices, sorted_indices).astype(y.dtype)

    def __call__(self, x: mx.array, indices: mx.array, sorted_indices: bool = False) -> mx.array:
        """(..., 1, in), (...) → (..., 1, out) in the dtype of the frozen layer's output."""
        y = self.linear(x, indices, sorted_indices=sorted_indices)
        return self.updated(y, x, indices, sorted_indices)

    def parts(self) -> Iterator[LoRALinear]:
        """The layer of each expert alone. Its arrays are slices of those of all."""
        for expert in range(len(self.lora_a)):
            yield self._fill(_bare(LoRALinear), expert)

    def _fill(self, part: Any, expert: int) -> LoRALinear:
        part.linear, part.scale, part.dropout = _one_expert(self.linear, expert), self.scale, self.dropout
        part.lora_a, part.lora_b = self.lora_a[expert].T, self.lora_b[expert].T
        return part


class DoRAExperts(LoRAExperts):
    """y = m·(V·x)/‖V‖ + b with V = W + Δ of the chosen expert, norms by row of each expert; ‖V‖ is held
    constant in the gradient."""

    def __init__(self, linear: nn.Module, rank: int, scale: float, dropout: float, key: mx.array) -> None:
        super().__init__(linear, rank, scale, dropout, key)
        rows: list[mx.array] = []
        for expert in range(len(self.lora_a)):
            rows.append(mx.square(dense(_one_expert(linear, expert))).sum(axis=1))
            mx.eval(rows)  # one expanded weight at a time
        self._rows = mx.stack(rows)
        self.m = self.lengths()  # (experts, out) so that the layer starts equal to its base
        mx.eval(self._rows, self.m)

    def lengths(self) -> mx.array:
        """(experts, out) ‖V‖ per row, as `DoRALinear.lengths`. No gradient."""
        a, b = map(mx.stop_gradient, self.factors)
        through = routed_product(self.linear, a, mx.arange(len(a)), sorted_indices=True).swapaxes(-1, -2)
        across = 2 * self.scale * (b * through).sum(axis=-1)
        own = self.scale**2 * (b * (b @ (a @ a.swapaxes(-1, -2)))).sum(axis=-1)
        return mx.sqrt(mx.maximum(self._rows + across + own, 1e-24))

    def updated(self, y: mx.array, x: mx.array, indices: mx.array, sorted_indices: bool) -> mx.array:
        """As `LoRAExperts.updated`; ``y`` is without the bias."""
        factor = (self.m / self.lengths())[indices][..., None, :]
        return (factor * (y.astype(mx.float32) + self.branch(x, indices, sorted_indices))).astype(y.dtype)

    def __call__(self, x: mx.array, indices: mx.array, sorted_indices: bool = False) -> mx.array:
        y = self.updated(routed_product(self.linear, x, indices, sorted_indices), x, indices, sorted_indices)
        return with_bias(self.linear, y, indices)

    def parts(self) -> Iterator[LoRALinear]:
        for expert in range(len(self.lora_a)):
            part = _bare(DoRALinear)
            part._rows, part.m = self._rows[expert], self.m[expert]
            yield self._fill(part, expert)


def routed_product(experts: nn.Module, x: mx.array, indices: mx.array, sorted_indices: bool) -> mx.array:
    """(..., n, in), (...) → (..., n, out) x·Wᵀ without the bias; quantised weights stay packed."""
    if "scales" not in experts:
        return kernels.routed(x, experts["weight"], indices, sorted_indices)
    gathered: Any = {"rhs_indices": indices, "sorted_indices": sorted_indices}
    settings: Any = experts
    packing: Any = {"group_size": settings.group_size, "bits": settings.bits, "mode": settings.mode}
    packing["global_scale"] = experts.get("global_scale")
    return mx.gather_qmm(
        x, experts["weight"], experts["scales"], experts.get("biases"), **gathered, **packing
    )


def with_bias(experts: nn.Module, y: mx.array, indices: mx.array) -> mx.array:
    """``y`` (..., 1, out) with the bias of the expert of each entry, if there is one."""
    return y + experts["bias"][indices][..., None, :] if "bias" in experts else y


def _one_expert(experts: Any, expert: int) -> Any:
    """The linear layer of one expert."""
    quantised = "scales" in experts
    part: Any = _bare(nn.QuantizedLinear if quantised else nn.Linear)
    dict.update(part, {name: value[expert] for name, value in experts.items() if isinstance(value, mx.array)})
    if quantised:
        part.group_size, part.bits, part.mode = experts.group_size, experts.bits, experts.mode
    return part


def _bare(kind: type[nn.Module]) -> Any:
    """A module without parameters: no random number is drawn for values that are replaced."""
    module = kind.__new__(kind)
    nn.Module.__init__(module)
    return module
