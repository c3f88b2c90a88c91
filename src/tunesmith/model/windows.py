"""Sliding windows that mlx-lm's models ignore: the layers that have one get a mask of their own.

A query at position i sees the keys of positions j with i - j < window, as in transformers. The cache keeps
all keys, so that a window saves no memory. Models whose windows mlx-lm computes itself are left alone."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from tunesmith.model import wrap
from tunesmith.model.kernels import Packed

Config = dict[str, Any]
Rule = Callable[[Config, int], bool]
"""(settings, number of a layer) → whether it has a window."""
Within = Callable[[int, int], mx.array]
"""(queries, keys) → (queries, keys) bool: which keys the last queries see."""


def install(net: nn.Module, config: Config) -> None:
    """Let the layers of ``net`` attend through the windows that ``config`` gives them."""
    numbers, window = windowed_layers(config)
    if not numbers:
        return
    within = functools.lru_cache(maxsize=2)(functools.partial(_within, window))
    blocks: Any = net.layers
    attention = [blocks[number].self_attn for number in numbers]
    wrap.replace(attention, lambda kind: _call(kind, window, within))


def windowed_layers(config: Config) -> tuple[list[int], int]:
    """The numbers of the layers whose window mlx-lm ignores, and the size of that window."""
    text = config.get("text_config")
    settings = {**config, **text} if isinstance(text, dict) else config
    kind = str(settings.get("model_type"))
    window = settings.get("sliding_window", DEFAULT if kind in _WITH_DEFAULT else None)
    if kind not in _RULES or not isinstance(window, int) or window < 1:
        return [], 0
    layers = range(settings["num_hidden_layers"])
    return [number for number in layers if _RULES[kind](settings, number)], window


def _every(config: Config, number: int) -> bool:
    return True


def _listed(config: Config, number: int, otherwise: bool) -> bool:
    """Whether `layer_types` gives the layer a window; ``otherwise`` if it is not there."""
    types = config.get("layer_types")
    return types[number] == "sliding_attention" if isinstance(types, list) else otherwise


def _gemma2(config: Config, number: int) -> bool:
    return _listed(config, number, number % 2 == 0)


def _beyond(first: int) -> Rule:
    """The layers from `max_window_layers` on, by default from ``first`` on."""
    return lambda config, number: _listed(config, number, number >= config.get("max_window_layers", first))


def _if_used(rule: Rule) -> Rule:
    """``rule``, if `use_sliding_window` is set."""
    return lambda config, number: bool(config.get("use_sliding_window")) and rule(config, number)


def _qwen2_moe(config: Config, number: int) -> bool:
    below = number < config.get("max_window_layers", 28)
    return _listed(config, number, below and number % 2 == 0)


def _smollm3(config: Config, number: int) -> bool:
    """By default the layers without rotary embeddings: every fourth."""
    rotary, interval = config.get("no_rope_layers"), config.get("no_rope_layer_interval", 4)
    without = not rotary[number] if isinstance(rotary, list) else (number + 1) % interval == 0
    return _listed(config, number, without)


_RULES: dict[str, Rule] = {
    "dots1": _beyond(62),
    "gemma2": _gemma2,
    "minimax": _every,
    "mistral": _every,
    "mistral3": _every,
    "mixtral": _every,
    "phi3": _every,
    "phimoe": _every,
    "qwen2": _if_used(_beyond(28)),
    "qwen2_5_vl": _if_used(_beyond(80)),
    "qwen2_5_vl_text": _if_used(_beyond(80)),
    "qwen2_moe": _if_used(_qwen2_moe),
    "qwen2_vl": _if_used(_beyond(80)),
    "qwen2_vl_text": _if_used(_beyond(80)),
    "qwen3": _if_used(_beyond(28)),
    "qwen3_moe": _if_used(_every),
    "smollm3": _if_used(_smollm3),
    "starcoder2": _every,
}
"""Which layers transformers gives a window, by model type of the text model; mlx-lm gives them none."""
_WITH_DEFAULT = _RULES.keys() - {"minimax", "mixtral", "phi3", "phimoe", "smollm3", "starcoder2"}
DEFAULT = 4096
"""The window of these models if config.json does not have the key."""


def _within(window: int, n_queries: int, n_keys: int) -> mx.array:
    keys = np.arange(n_keys)
    queries = keys[n_keys - n_queries :, None]
    seen: Any = (keys <= queries) & (queries < keys + window)
    return mx.array(seen)


def _call(kind: type[nn.Module], window: int, within: Within) -> wrap.Call:
    def call(layer: nn.Module, x: mx.array, mask: Any = None, cache: Any = None) -> mx.array:
        return kind.__call__(layer, x, _narrowed(mask, x.shape[1], cache, window, within), cache)

    return call


def _narrowed(mask: Any, n_queries: int, cache: Any, window: int, within: Within) -> Any:
    """``mask`` without what is outside of the window; as it is if no query has so many keys."""
    if isinstance(mask, Packed):
        return _narrowed_rows(mask, window, within)
    if isinstance(mask, mx.array):
        n_keys = mask.shape[-1]
        return mask if n_keys <= window else mask & within(n_queries, n_keys)
    n_keys = n_queries + (0 if cache is None else cache.offset)
    return mask if n_keys <= window else within(n_queries, n_keys)


def _narrowed_rows(rows: Packed, window: int, within: Within) -> Packed | mx.array:
    lengths = np.diff(rows.ends, prepend=0)
    if lengths.max() <= window:
        return rows
    row_of = np.repeat(np.arange(len(lengths)), lengths)
    same_row: Any = row_of[:, None] == row_of
    return mx.array(same_row) & within(len(row_of), len(row_of))
