"""LoRA, DoRA and QA-LoRA layers: what they compute, DoRA's magnitudes, dropout, and the merged weight.

LoRA (arXiv 2106.09685) adds s·(x·A)·B to a frozen linear layer; DoRA (arXiv 2402.09353) also gives each
output row a learned magnitude; `experts` has both for routed experts. QA-LoRA (arXiv 2309.14717) reads sums
over the groups of inputs whose weights share a scale, so that the update can be added to their biases.

A and B are float32 whatever the base is, or 16-bit if the settings say so (`held_in`); everything is computed
from them in float32. Activations keep the base's dtype. Initial values and dropout masks come from keys,
never from the global random state."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten

from tunesmith.errors import TrainingError
from tunesmith.model import kernels, wrap
from tunesmith.model.quantisation import ExpandedLinear

Linear = nn.Linear | nn.QuantizedLinear


class AdapterLayer(nn.Module):
    """A frozen layer, ``linear``, with a low-rank update beside it.

    ``dropout`` acts on the input of the update; its mask is a function of the key that ``seed_dropout`` sets,
    as a recomputed forward pass needs."""

    linear: Any
    lora_a: mx.array
    lora_b: mx.array

    def __init__(self, linear: nn.Module, scale: float, dropout: float) -> None:
        super().__init__()
        self.linear, self.scale, self.dropout = linear, scale, dropout
        self._key: mx.array | None = None

    def dropped(self, x: mx.array) -> mx.array:
        """``x`` after dropout. Raises TrainingError if a mask is needed and no key was set."""
        key = self.mask_key()
        return x if key is None else kernels.dropout(x, self.dropout, key)

    def mask_key(self) -> mx.array | None:
        """(2,) uint32: what this pass draws its mask from; None without dropout. Raises TrainingError if no
        key was set."""
        if not self.training or self.dropout == 0:
            return None
        if self._key is None:
            hint = "call adapters.seed_dropout(net, key) first, or net.eval()"
            raise TrainingError("adapter dropout has no key to draw its mask from", hint=hint)
        return self._key

    def held_in(self, dtype: mx.Dtype) -> None:
        """Round A and B to ``dtype``, in which they are trained and saved."""
        self.lora_a, self.lora_b = self.lora_a.astype(dtype), self.lora_b.astype(dtype)

    @property
    def factors(self) -> tuple[mx.array, mx.array]:
        """A and B in float32."""
        return self.lora_a.astype(mx.float32), self.lora_b.astype(mx.float32)

    def parts(self) -> Iterator[LoRALinear]:
        """The layer as layers of one matrix each."""
        raise NotImplementedError


class LoRALinear(AdapterLayer):
    """y = W·x + b + s·(x·A)·B beside a frozen linear layer, quantised or not.

    ``lora_a`` (in, r) is uniform within ±1/sqrt(in), drawn from ``key`` alone; ``lora_b`` (r, out) is
    zero."""

    def __init__(self, linear: Linear, rank: int, scale: float, dropout: float, key: mx.array) -> None:
        super().__init__(linear, scale, dropout)
        inputs, outputs = self.sides(linear)
        bound = inputs**-0.5
        self.lora_a = mx.random.uniform(-bound, bound, (inputs, rank), key=key)
        self.lora_b = mx.zeros((rank, outputs))
        self.train(linear.training)

    @staticmethod
    def sides(linear: Any) -> tuple[int, int]:
        """(in, out) of the update; of each expert's in a layer of experts."""
        return dims(linear)

    def expanded_a(self) -> mx.array:
        """(in, r) float32 A as it acts on each input."""
        return self.factors[0]

    def branch(self, x: mx.array) -> mx.array:
        """(..., out) s·(dropout(x)·A)·B. Raises TrainingError if dropout needs a mask and no key was set."""
        a, b = self.factors
        return ((self.dropped(x) @ a) * self.scale) @ b

    def __call__(self, x: mx.array) -> mx.array:
        """(..., in) → (..., out) in the dtype of the frozen layer's output."""
        if computes_float32(self.linear, x):
            if self.training:
                return self._trained(x)
            a, b = self.factors
            return kernels.add_product(self.linear(x), (x @ a) * self.scale, b)
        y = self.linear(x)
        return y + self.branch(x).astype(y.dtype)

    def _trained(self, x: mx.array) -> mx.array:
        """The same by the compiled kernels: no pass over ``x`` or the result but those of the products and
        dropout, and only the (..., r) between A and B is kept for the gradient."""
        key, rate = self.mask_key(), self.dropout
        linear, scale = self.linear, self.scale

        def dropped(x: mx.array) -> mx.array:
            return x if key is None else kernels.dropout(x, rate, key)

        def forward(x: mx.array, a: mx.array, b: mx.array) -> tuple[mx.array, mx.array]:
            inner = (dropped(x) @ a) * scale
            return kernels.add_product(linear(x), inner, b), inner

        def backward(
            primals: tuple[mx.array, ...], cotangents: tuple[mx.array, ...], results: tuple[mx.array, ...]
        ) -> tuple[mx.array, ...]:
            x, a, b = primals
            slope, inner = cotangents[0], results[1]
            of_inner = (slope @ b.T) * scale
            of_base = product(linear, slope, transposed=True)
            if key is None:
                of_x = kernels.add_product(of_base, of_inner, a.T)
            else:
                of_x = kernels.dropout(of_inner @ a.T, rate, key, onto=of_base)
            return of_x, _rows(dropped(x)).T @ _rows(of_inner), _rows(inner).T @ _rows(slope)

        return kernels.with_gradient(forward, backward)(x, *self.factors)[0]

    def parts(self) -> Iterator[LoRALinear]:
        yield self

    def merged_weight(self) -> mx.array:
        """(out, in) the weight of the plain layer that computes the same, float32."""
        return dense(self.linear) + self.scale * (self.expanded_a() @ self.factors[1]).T


class DoRALinear(LoRALinear):
    """y = m·(V·x)/‖V‖ + b with V = W + Δ, norms by row; ‖V‖ is held constant in the gradient (paper, section
    4.3)."""

    def __init__(self, linear: Linear, rank: int, scale: float, dropout: float, key: mx.array) -> None:
        super().__init__(linear, rank, scale, dropout, key)
        self._rows = mx.square(dense(linear)).sum(axis=1)
        self.m = self.lengths()  # (out,) so that the layer starts equal to its base

    def lengths(self) -> mx.array:
        """(out,) ‖V‖ per row from ‖W‖² + 2·W·Δ + ‖Δ‖²: neither W nor Δ is formed. No gradient."""
        a, b = map(mx.stop_gradient, self.factors)
        across = 2 * self.scale * (b * product(self.linear, a.T)).sum(axis=0)
        own = self.scale**2 * (b * ((a.T @ a) @ b)).sum(axis=0)
        # The floor keeps rows of zeros (a padded vocabulary) at zero, not 0/0.
        return mx.sqrt(mx.maximum(self._rows + across + own, 1e-24))

    def __call__(self, x: mx.array) -> mx.array:
        y = product(self.linear, x)
        # In float32 up to the end: in half precision m/‖V‖ could not move by less than 0.4 %.
        out = ((self.m / self.lengths()) * (y.astype(mx.float32) + self.branch(x))).astype(y.dtype)
        return out + self.linear.bias if "bias" in self.linear else out

    def merged_weight(self) -> mx.array:
        return (self.m / self.lengths())[:, None] * super().merged_weight()


class QALoRALinear(LoRALinear):
    """y = W·x + b + s·(P·x·A)·B beside a quantised layer. P·x is the sum of x over each quantisation group,
    divided by the root of the group's size g: A then starts and learns as LoRA's does.

    ``lora_a`` (in / g, r), ``lora_b`` (r, out). ΔW is constant within a group. Dropout acts on P·x."""

    def __init__(self, linear: Linear, rank: int, scale: float, dropout: float, key: mx.array) -> None:
        super().__init__(linear, rank, scale, dropout, key)
        self.group_size = _required_group_size(linear)

    @staticmethod
    def sides(linear: Any) -> tuple[int, int]:
        inputs, outputs = dims(linear)
        return inputs // _required_group_size(linear), outputs

    def expanded_a(self) -> mx.array:
        return mx.repeat(self.factors[0], self.group_size, axis=0) * self.group_size**-0.5

    def branch(self, x: mx.array) -> mx.array:
        groups = x.astype(mx.float32).reshape(*x.shape[:-1], -1, self.group_size)
        pooled = groups.sum(axis=-1) * self.group_size**-0.5
        a, b = self.factors
        return ((self.dropped(pooled) @ a) * self.scale) @ b

    def __call__(self, x: mx.array) -> mx.array:
        y = self.linear(x)
        return y + self.branch(x).astype(y.dtype)

    def changed_biases(self, biases: mx.array) -> mx.array:
        """(out, in / g) float32: the quantisation's ``biases`` with the update in them."""
        a, b = self.factors
        change = (self.scale * self.group_size**-0.5) * (a @ b).T
        return biases.astype(mx.float32) + change


def group_size(linear: Any) -> int | None:
    """How many inputs share a bias of the quantisation; None if the layer is not quantised with biases. On a
    CPU a quantised layer is held expanded, and remembers it."""
    if isinstance(linear, ExpandedLinear):
        return linear.group_size
    if isinstance(linear, nn.QuantizedLinear) and linear.mode == "affine":
        return linear.group_size
    return None


def _required_group_size(linear: Any) -> int:
    size = group_size(linear)
    assert size is not None  # the spec has checked it
    return size


def dims(linear: Any) -> tuple[int, int]:
    """(in, out) of a linear layer, or of each expert in a layer of experts."""
    outputs, inputs = linear["weight"].shape[-2:]
    return (inputs * 32 // linear.bits if "scales" in linear else inputs), outputs


def product(linear: Linear, x: mx.array, transposed: bool = False) -> mx.array:
    """(..., in) → (..., out) x·Wᵀ without the bias; a quantised weight stays packed. ``transposed``:
    (..., out) → (..., in) x·W."""
    if not isinstance(linear, nn.QuantizedLinear):
        return x @ (linear.weight if transposed else linear.weight.T)
    packing: Any = {"group_size": linear.group_size, "bits": linear.bits, "mode": linear.mode}
    biases = linear.get("biases")
    return mx.quantized_matmul(x, linear.weight, linear.scales, biases, transpose=not transposed, **packing)


def computes_float32(linear: Linear, x: mx.array) -> bool:
    """Whether the compiled kernels serve an adapter of ``linear`` on ``x``."""
    held = linear.scales if isinstance(linear, nn.QuantizedLinear) else linear.weight
    return x.dtype == held.dtype == mx.float32 and kernels.choice() == "compiled"


def _rows(x: mx.array) -> mx.array:
    return x.reshape(-1, x.shape[-1])


def dense(linear: Linear) -> mx.array:
    """(out, in) the weight in float32."""
    if not isinstance(linear, nn.QuantizedLinear):
        return linear.weight.astype(mx.float32)
    held: Any = [linear.scales, linear.get("biases")]
    if linear.mode == "affine":
        # The result has the dtype of the scales; in float32 it is exactly what quantized_matmul multiplies
        # with.
        held = [value.astype(mx.float32) for value in held]
    packing: Any = {"group_size": linear.group_size, "bits": linear.bits, "mode": linear.mode}
    packing["global_scale"] = linear.get("global_scale")
    return mx.dequantize(linear.weight, *held, **packing).astype(mx.float32)


def key_from(*parts: object) -> mx.array:
    """(2,) uint32: a random key that is a function of ``parts``."""
    digest = hashlib.sha256("\0".join(map(str, parts)).encode()).digest()
    return mx.array(np.frombuffer(digest[:8], dtype="<u4"))


def adapted(net: nn.Module) -> dict[str, AdapterLayer]:
    """The adapter layers of ``net`` by name, sorted."""
    layers = [(name, layer) for name, layer in net.named_modules() if isinstance(layer, AdapterLayer)]
    return dict(sorted(layers))


def trainable(net: nn.Module) -> dict[str, mx.array]:
    """The parameters that receive gradient, sorted by name."""
    flat: Any = tree_flatten(net.trainable_parameters())
    return dict(sorted(flat))


@contextmanager
def bypassed(net: nn.Module) -> Iterator[None]:
    """Inside, the adapter layers of ``net`` compute what their frozen layers do: ``net`` is its base."""
    with wrap.replaced(adapted(net).values(), lambda kind: _frozen_alone):
        yield


def _frozen_alone(layer: Any, *args: Any, **options: Any) -> mx.array:
    return layer.linear(*args, **options)


def seed_dropout(net: nn.Module, key: mx.array) -> None:
    """Give each adapter layer its mask key for the next pass: a function of ``key`` (2,) uint32, traced or
    not, and its name."""
    for name, layer in adapted(net).items():
        # Past nn.Module's own __setattr__, so that the key is no part of the module's parameters or state.
        object.__setattr__(layer, "_key", mx.bitwise_xor(key, key_from("dropout", name)))
