"""Adapters merged into the weights of the base, after which the model has none."""

from __future__ import annotations

import contextlib
import hashlib
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_unflatten

from tunesmith import events
from tunesmith.adapters import files, starting
from tunesmith.adapters.experts import LoRAExperts, dense_experts
from tunesmith.adapters.layers import AdapterLayer, adapted, trainable
from tunesmith.events import Notice, Sink
from tunesmith.model import loading
from tunesmith.model.loading import Loaded, ModelSpec


def load(spec: ModelSpec, notify: Sink = events.silent) -> Loaded:
    """The base model as `loading.load` gives it, with the adapter that ``spec`` names merged into it. Raises
    ModelError if either cannot be read or they do not fit."""
    loaded = loading.load(spec, notify)
    if spec.adapter is None:
        return loaded
    net, folder = loaded.net, Path(spec.adapter)
    n_full = n_layers = 0
    for part in starting.read(folder, loaded, spec.path, notify):
        part.install(net)
        n_full += len(trainable(net))
        n_layers += merge(net)
        net.freeze()
    net.eval()
    changed = f"{n_layers} layers" if n_layers else f"{n_full} tensors"
    dense = "; their quantised weights become dense" if n_layers and "quantization" in loaded.config else ""
    notify(Notice(f"an adapter is merged into {changed} of the base{dense}", where=str(folder)))
    deciding = [files.weights_file(folder)]
    if files.layout(folder) != "tunesmith":  # where the settings alone can change the scale
        deciding.append(folder / files.CONFIG)
    hashes = " ".join(hashlib.sha256(file.read_bytes()).hexdigest() for file in deciding)
    fingerprint = hashlib.sha256(f"{loaded.files} {hashes}".encode()).hexdigest()
    return loaded._replace(fingerprint=fingerprint)


def merge(net: nn.Module) -> int:
    """Put a dense frozen layer in place of each adapter layer, since quantising again would erase the update;
    returns how many."""
    layers = adapted(net)
    for name, layer in layers.items():
        net.update_modules(tree_unflatten([(name, _merged(layer))]))
    return len(layers)


def _merged(layer: AdapterLayer) -> nn.Module:
    """nn.Linear, or a dense layer of experts, in the dtype of the base."""
    base = layer.linear
    dtype = (base.scales if "scales" in base else base.weight).dtype
    if not mx.issubdtype(dtype, mx.floating):
        dtype = mx.bfloat16
    weights: list[mx.array] = []
    for part in layer.parts():
        weights.append(part.merged_weight().astype(dtype))
        mx.eval(weights)  # one weight at a time in float32
    plain: Any = dense_experts() if isinstance(layer, LoRAExperts) else nn.Linear(1, 1, bias=False)
    plain.weight = mx.stack(weights) if isinstance(layer, LoRAExperts) else weights[0]
    if "bias" in base:
        plain.bias = base.bias
    mx.eval(plain.parameters())
    plain.freeze().train(base.training)
    return plain


def save_dense(
    net: nn.Module,
    config: dict[str, Any],
    dtype_of: Callable[[str], mx.Dtype],
    folder: Path,
    bits: int | None,
) -> dict[str, Any]:
    """Write the weights of ``net`` in mlx-lm's layout with its adapters merged, and return the settings for
    config.json. Changes ``net``.

    dtype_of: the dtype of a tensor, to which it is rounded once. bits: quantise after that, 64 weights a
    scale. config: config.json without quantisation."""
    from mlx_lm import utils

    merge(net)
    net = utils.dequantize_model(net)
    flat: Any = tree_flatten(net.parameters())
    for name, value in flat:
        if mx.issubdtype(value.dtype, mx.floating):
            net.update(tree_unflatten([(name, value.astype(dtype_of(name)))]))
    mx.eval(net.parameters())
    if bits is not None:
        with contextlib.redirect_stdout(io.StringIO()):  # it prints
            net, config = utils.quantize_model(net, config, 64, bits)
        config["quantization_config"] = config["quantization"]
    utils.save_model(folder, net)
    return config
