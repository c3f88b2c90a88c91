"""The weights of a model as plain tensors: adapters merged, quantised weights expanded, in float32.

Also a sketch of each of them, a product with a fixed random vector: enough to say of two models which tensors
differ and by how much, without holding both."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from functools import partial
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten

from tunesmith.adapters.experts import LoRAExperts
from tunesmith.adapters.layers import AdapterLayer
from tunesmith.model.vocabulary import ExtendedEmbedding, ExtendedHead

INSIDE = "language_model."
"""Where a model for several media holds its text model."""
Tensors = dict[str, Callable[[], mx.array]]
"""Name → function that computes the tensor. A function holds what it computes from: drop it to free that."""


def dense(net: nn.Module) -> Tensors:
    """The tensors of ``net`` by the names that they have without adapters and quantisation."""
    special = {
        name: module
        for name, module in net.named_modules()
        if isinstance(module, AdapterLayer | ExtendedEmbedding | ExtendedHead)
    }
    tensors: Tensors = {}
    flat: Any = tree_flatten(net.parameters())
    packed = {name for name, module in net.named_modules() if "scales" in module}
    packed -= {name for name in packed if _inside(name, special)}
    for name, value in flat:
        owner, _, tensor = name.rpartition(".")
        if _inside(name, special) or (owner in packed and tensor in ("scales", "biases", "global_scale")):
            continue
        tensors[name] = partial(_float32, value)
    modules = dict(net.named_modules())
    for name in packed:
        tensors[f"{name}.weight"] = partial(_expanded, modules[name])
    for name, module in special.items():
        tensors |= {f"{name}.{tensor}": make for tensor, make in _of_special(module).items()}
    return dict(sorted(tensors.items()))


def _inside(name: str, special: dict[str, Any]) -> bool:
    parts = name.split(".")
    return any(".".join(parts[:length]) in special for length in range(1, len(parts)))


def _float32(value: mx.array) -> mx.array:
    return value.astype(mx.float32) if mx.issubdtype(value.dtype, mx.floating) else value


def _of_special(module: Any) -> Tensors:
    if isinstance(module, AdapterLayer):
        bias = module.linear.get("bias")
        tensors: Tensors = {"weight": partial(_merged, module)}
    elif isinstance(module, ExtendedHead):
        tensors = {"weight": lambda: mx.concatenate([_expanded(module.base), module.rows])}
        bias = module.base.get("bias")
        if bias is not None:
            bias = mx.concatenate([bias, module["row_biases"]])
    else:
        tensors, bias = {"weight": lambda: mx.concatenate([_expanded(module.base), module.rows])}, None
    return tensors if bias is None else tensors | {"bias": partial(_float32, bias)}


def _merged(layer: AdapterLayer) -> mx.array:
    if not isinstance(layer, LoRAExperts):
        return next(iter(layer.parts())).merged_weight()
    return mx.stack([part.merged_weight() for part in layer.parts()])


def _expanded(module: Any) -> mx.array:
    """The weight of a linear layer, embedding or layer of experts, expanded if it is quantised."""
    if "scales" not in module:
        return module.weight.astype(mx.float32)
    held: list[Any] = [module.scales, module.get("biases")]
    if module.mode == "affine":
        held = [value.astype(mx.float32) for value in held]
    packing: Any = {"group_size": module.group_size, "bits": module.bits, "mode": module.mode}
    packing["global_scale"] = module.get("global_scale")
    return mx.dequantize(module.weight, *held, **packing).astype(mx.float32)


def sketch(net: nn.Module, tick: Callable[[int, int], None]) -> dict[str, np.ndarray]:
    """For each floating-point tensor W of ``net``: W·v with a random v that is a function of the tensor's
    name and width; a tensor of one dimension as it is. Names are those of the text model, also if it lies
    inside one for several media: some kinds write the text model alone. tick: called with the number of
    tensors that are done, and of all."""
    sketches: dict[str, np.ndarray] = {}
    tensors = dense(net)
    for done, (full_name, make) in enumerate(tensors.items(), start=1):
        tick(done, len(tensors))
        name, value = full_name.removeprefix(INSIDE), make()
        if not mx.issubdtype(value.dtype, mx.floating):
            continue
        if value.ndim > 1:
            seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "little")
            vector = np.random.Generator(np.random.PCG64(seed)).normal(size=value.shape[-1])
            value = value.reshape(-1, value.shape[-1]) @ mx.array(vector.astype(np.float32))
        sketches[name] = np.array(value)
    return sketches
