"""Quantise the weights of a model when it is loaded, as mlx-lm's conversion does.

A layer whose width is not a multiple of the group size stays as it is, and is said by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import mlx.core as mx
import mlx.nn as nn

from tunesmith.errors import ModelError
from tunesmith.events import Notice

GROUP_SIZES = (128, 64, 32)
"""Numbers of weights that can share a scale."""
SHOWN = 3
"""Layers that a message names."""


class ExpandedLinear(nn.Linear):
    """A quantised layer whose weight is held in float32. ``group_size``: weights that shared a scale and a
    bias."""

    group_size: int


def expand(net: nn.Module) -> nn.Module:
    """Hold the quantised weights of ``net`` in float32: the same numbers. Linear layers remember their
    groups."""
    from mlx_lm import utils

    groups = {
        name: module.group_size
        for name, module in net.named_modules()
        if isinstance(module, nn.QuantizedLinear) and module.mode == "affine"
    }
    net = utils.dequantize_model(net)
    net.set_dtype(mx.float32)
    for name, module in net.named_modules():
        if name in groups and type(module) is nn.Linear:
            module.__class__ = ExpandedLinear
            cast(ExpandedLinear, module).group_size = groups[name]
    return net


def quantise(net: nn.Module, bits: int, group_size: int) -> tuple[dict[str, Any], list[Notice]]:
    """Quantise ``net`` in place; returns the value of `quantization` in its config, and what to tell the
    user. Raises ModelError, and leaves ``net`` as it was, if no layer can be quantised."""
    default = {"group_size": group_size, "bits": bits, "mode": "affine"}
    settings, left = _planned(net, default)
    text = f"the width of {_shown(left)} is not a multiple of {group_size}" if left else ""
    fitting = [size for size in GROUP_SIZES if size < group_size and not any(w % size for w in left.values())]
    hint = f"model.group_size={fitting[0]}" if fitting else None
    if not settings:
        message = f"no layer can be quantised: {text or 'the model has no such layers'}"
        raise ModelError(message, where="model.quantize", hint=hint or "leave out model.quantize")
    nn.quantize(net, group_size, bits, class_predicate=lambda name, _: settings.get(name, False))
    notices = [Notice(f"quantised to {bits} bits, one scale for {group_size} weights", where="model")]
    if left:
        text = f"not quantised: {text}"
        notices.append(Notice(text, level="warning", count=len(left), where="model.group_size", hint=hint))
    return default | {name: own for name, own in settings.items() if own != default}, notices


def _planned(net: nn.Module, default: dict[str, Any]) -> tuple[dict[str, dict[str, Any]], dict[str, int]]:
    """By name, the settings of each layer to quantise, and the widths of those that the group size of
    ``default`` does not divide."""
    # Some of mlx-lm's models leave layers out, or quantise them by settings of their own.
    by_model = cast(Any, net).quant_predicate if "quant_predicate" in dir(net) else None
    choose: Callable[[str, nn.Module], Any] = by_model or (lambda name, module: True)
    settings: dict[str, dict[str, Any]] = {}
    left: dict[str, int] = {}
    for name, module in sorted(net.named_modules(), key=lambda pair: pair[0]):
        if "to_quantized" not in dir(module):
            continue
        width, choice = cast(mx.array, module["weight"]).shape[-1], choose(name, module)
        if width % default["group_size"]:
            left |= {name: width} if choice else {}
        elif choice:
            own = default | (choice if isinstance(choice, dict) else {})
            fits = width % own["group_size"] == 0
            settings[name] = own if fits else own | {"group_size": default["group_size"]}
    return settings, left


def _shown(widths: dict[str, int]) -> str:
    names = [f"{name} ({width})" for name, width in widths.items()]
    more = f" and {len(names) - SHOWN} more layers" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more
