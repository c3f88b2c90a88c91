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
from tunesmith.adapters.layers import AdapterLayer, QALoRALinear, adapted, trainable
from tunesmith.adapters.specs import QALoRA
from tunesmith.events import Notice, Sink
from tunesmith.model import loading
from tunesmith.model.loading import Loaded, ModelSpec
from tunesmith.model.quantisation import ExpandedLinear

GROUP = 64
"""Weights that share a scale where a merged model is quantised."""


def load(spec: ModelSpec, notify: Sink = events.silent, *, lazily: bool = False) -> Loaded:
    """The base model as `loading.load` gives it, with the adapter that ``spec`` names merged into it. Raises
    ModelError if either cannot be read or they do not fit. lazily: each tensor is computed when it is first
    used."""
    loaded = loading.load(spec, notify, lazily=lazily)
    if spec.adapter is None:
        return loaded
    net, folder = loaded.net, Path(spec.adapter)
    n_full = n_layers = n_dense = 0
    for part in starting.read(folder, loaded, spec.path, notify):
        part.install(net, lazily=lazily)
        n_full += len(trainable(net))
        merged = merge(net, lazily=lazily)
        n_layers += merged
        n_dense += 0 if isinstance(part.spec, QALoRA) else merged
        net.freeze()
    net.eval()
    changed = f"{n_layers} layers" if n_layers else f"{n_full} tensors"
    dense = "; their quantised weights become dense" if n_dense and "quantization" in loaded.config else ""
    notify(Notice(f"an adapter is merged into {changed} of the base{dense}", where=str(folder)))
    deciding = [files.weights_file(folder)]
    if files.layout(folder) != "tunesmith":  # where the settings alone can change the scale
        deciding.append(folder / files.CONFIG)
    hashes = " ".join(hashlib.sha256(file.read_bytes()).hexdigest() for file in deciding)
    fingerprint = hashlib.sha256(f"{loaded.files} {hashes}".encode()).hexdigest()
    return loaded._replace(fingerprint=fingerprint)


def merge(net: nn.Module, *, lazily: bool = False) -> int:
    """Put a frozen layer in place of each adapter layer, and return how many. It is dense, since quantising
    again would erase the update; that of QA-LoRA stays quantised. lazily: each weight is computed when it is
    first used."""
    layers = adapted(net)
    for name, layer in layers.items():
        net.update_modules(tree_unflatten([(name, _merged(layer, lazily))]))
    return len(layers)


def _merged(layer: AdapterLayer, lazily: bool) -> nn.Module:
    """nn.Linear, or a dense layer of experts, in the dtype of the base."""
    base = layer.linear
    if isinstance(layer, QALoRALinear) and isinstance(base, nn.QuantizedLinear):
        return rebiased(base, layer)
    dtype = (base.scales if "scales" in base else base.weight).dtype
    if not mx.issubdtype(dtype, mx.floating):
        dtype = mx.bfloat16
    weights: list[mx.array] = []
    for part in layer.parts():
        weights.append(part.merged_weight().astype(dtype))
        if not lazily:
            mx.eval(weights)  # one weight at a time in float32
    plain: Any = dense_experts() if isinstance(layer, LoRAExperts) else nn.Linear(1, 1, bias=False)
    plain.weight = mx.stack(weights) if isinstance(layer, LoRAExperts) else weights[0]
    if isinstance(layer, QALoRALinear):  # it can be adapted so again
        plain.__class__, plain.group_size = ExpandedLinear, layer.group_size
    if "bias" in base:
        plain.bias = base.bias
    if not lazily:
        mx.eval(plain.parameters())
    plain.freeze().train(base.training)
    return plain


def rebiased(packed: nn.QuantizedLinear, layer: QALoRALinear) -> nn.QuantizedLinear:
    """The quantised layer ``packed`` with the update of ``layer`` in its biases; codes and scales stay."""
    module: Any = nn.QuantizedLinear.__new__(nn.QuantizedLinear)
    nn.Module.__init__(module)
    dict.update(module, packed)
    module.group_size, module.bits, module.mode = packed.group_size, packed.bits, packed.mode
    biases: Any = packed["biases"]
    module.biases = layer.changed_biases(biases).astype(biases.dtype)
    mx.eval(module.biases)
    module.freeze().train(layer.linear.training)
    return module


def save_packed(
    net: nn.Module, packed: nn.Module, dtype_of: Callable[[str], mx.Dtype], folder: Path
) -> float | None:
    """Write ``packed``, the quantised base of ``net``, with the QA-LoRA adapter of ``net`` in its biases, in
    mlx-lm's layout; returns the share of the biases' change that rounding left. Changes ``packed``.

    dtype_of: the dtype of a tensor; scales and biases are rounded once to that of their weight."""
    from mlx_lm import utils

    change = error = 0.0
    modules: dict[str, Any] = dict(packed.named_modules())
    packed.set_dtype(mx.float32)
    for name, layer in adapted(net).items():
        assert isinstance(layer, QALoRALinear)
        base = modules[name]
        fused = rebiased(base, layer)
        rounded = fused["biases"].astype(dtype_of(f"{name}.weight")).astype(mx.float32)
        change += float(mx.square(fused["biases"] - base["biases"]).sum())
        error += float(mx.square(rounded - fused["biases"]).sum())
        packed.update_modules(tree_unflatten([(name, fused)]))
    flat: Any = tree_flatten(packed.parameters())
    for name, value in flat:
        if mx.issubdtype(value.dtype, mx.floating):
            module = name.rpartition(".")[0]
            tensor = f"{module}.weight" if name.endswith((".scales", ".biases")) else name
            packed.update(tree_unflatten([(name, value.astype(dtype_of(tensor)))]))
    mx.eval(packed.parameters())
    utils.save_model(folder, packed)
    return max(0.0, 1 - error / change) if change else None


def save_dense(
    net: nn.Module,
    config: dict[str, Any],
    dtype_of: Callable[[str], mx.Dtype],
    folder: Path,
    bits: int | None,
) -> tuple[dict[str, Any], int]:
    """Write the weights of ``net`` in mlx-lm's layout with its adapters merged, and return the settings for
    config.json and the number of layers that were left unquantised since their width is not a multiple of
    the group. Changes ``net``.

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
            net, config = utils.quantize_model(net, config, GROUP, bits)
        config["quantization_config"] = config["quantization"]
    utils.save_model(folder, net)
    narrow = (nn.Linear, nn.Embedding)
    modules = [module for _, module in net.named_modules() if isinstance(module, narrow)]
    n_dense = sum(module.weight.shape[-1] % GROUP != 0 for module in modules) if bits is not None else 0
    return config, n_dense
