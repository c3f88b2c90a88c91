"""Keys and values of rows: how their caches are made, batched and trimmed, and how many bytes they need."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, cast

import mlx.core as mx
import mlx.nn as nn
import numpy as np

STEP = 256
"""Positions by which mlx-lm's caches grow."""


def new_cache(net: nn.Module, kv_bits: int | None) -> list[Any]:
    """An empty cache of one row. Raises ModelError if a layer cannot keep keys and values in ``kv_bits``."""
    from mlx_lm.models.cache import make_prompt_cache

    layers = make_prompt_cache(net)
    if kv_bits is None:
        return layers
    from tunesmith.engine.quantised import quantised  # loads transformers

    filled = _after_one_token(net, make_prompt_cache(net))
    return [quantised(layer, after_one, kv_bits) for layer, after_one in zip(layers, filled, strict=True)]


def batched(rows: Sequence[Sequence[Any]]) -> list[Any]:
    """The caches of ``rows``, one each, as that of a batch, which other rows can join."""
    from mlx_lm.models.cache import QuantizedKVCache

    layers = list(zip(*rows, strict=True))
    if not any(isinstance(layer, QuantizedKVCache) for row in rows for layer in row):
        return [layer[0].merge(list(layer)) for layer in layers]
    from tunesmith.engine.quantised import QuantisedRows

    together = [[QuantisedRows.of(row) for row in layer] for layer in layers]
    for first, *others in together:
        for other in others:
            first.extend(other)
    return [layer[0] for layer in together]


def without_shared_buffers(layers: list[Any]) -> list[Any]:
    """``layers`` without slices of larger buffers, which mlx-lm extracts from a recurrent state and which
    would hold on to the states of the whole batch."""
    from mlx_lm.models.cache import ArraysCache, CacheList

    for layer in layers:
        if isinstance(layer, CacheList):
            without_shared_buffers(list(layer.caches))
        elif isinstance(layer, ArraysCache):
            arrays: list[mx.array | None] = layer.cache
            layer.cache = [None if array is None else mx.contiguous(array) for array in arrays]
    return layers


def read(net: nn.Module, ids: Sequence[int] | np.ndarray, layers: list[Any], chunk: int) -> None:
    """Let the cache ``layers`` of one row hold ``ids`` too. A pass reads at most ``chunk`` of them."""
    for start in range(0, len(ids), chunk):
        part = np.asarray(ids[start : start + chunk], np.int32)
        cast(Any, net)(mx.array(part)[None], cache=layers)
        mx.eval([layer.state for layer in layers])


def fit(layers: Sequence[Any]) -> None:
    """Give back the room of plain caches for further positions: it would be copied with each copy."""
    from mlx_lm.models.cache import KVCache

    for layer in layers:
        if type(layer) is KVCache and not layer.empty():
            plain: Any = layer  # isinstance narrows, and mlx-lm's attributes begin as None
            plain.keys = mx.contiguous(plain.keys[..., : plain.offset, :])
            plain.values = mx.contiguous(plain.values[..., : plain.offset, :])


def trim(layers: Sequence[Any], count: int) -> None:
    """Take away the last ``count`` positions."""
    for layer in layers if count else ():
        layer.trim(count)


def trimmable(layers: Sequence[Any]) -> bool:
    """Whether any number of the last positions can be taken away."""
    from mlx_lm.models.cache import CacheList, ChunkedKVCache

    for layer in layers:
        if isinstance(layer, CacheList) and not trimmable(layer.caches):
            return False
        # mlx-lm trims it also if what would come back to its chunk was dropped.
        if isinstance(layer, ChunkedKVCache) and layer.offset > layer.chunk_size:
            return False
        if not layer.is_trimmable():
            return False
    return True


class CacheGrowth(NamedTuple):
    """Bytes of one layer's cache: ``fixed``, and ``each`` for each of at most ``most`` positions."""

    fixed: int
    each: int
    most: int | None

    def bytes(self, positions: int, chunk: int) -> int:
        """``chunk``: positions that are read at once, which a window holds besides its own."""
        whole = -(-positions // STEP) * STEP
        held = whole if self.most is None else min(whole, self.most + max(STEP, chunk))
        return self.fixed + self.each * held

    def trimmable(self, positions: int) -> bool:
        """Whether the last positions can be taken away again after so many."""
        return self.each > 0 and (self.most is None or positions < self.most)


def always_trimmable(growth: Sequence[CacheGrowth]) -> bool:
    """Whether the last positions can be taken away after however many."""
    return all(part.each > 0 and part.most is None for part in growth)


def growth(net: nn.Module, kv_bits: int | None) -> list[CacheGrowth]:
    """What the cache of one row of ``net`` needs, from the shapes after a pass that is never computed."""
    layers = _after_one_token(net, new_cache(net, kv_bits))
    return [part for layer in layers for part in _growth(layer)]


def _growth(layer: Any) -> list[CacheGrowth]:
    from mlx_lm.models import cache

    if isinstance(layer, cache.CacheList):
        return [part for inner in layer.caches for part in _growth(inner)]
    full: Any = layer  # isinstance narrows, and mlx-lm's attributes begin as None
    most: int | None = None
    if isinstance(layer, cache.RotatingKVCache):
        most = layer.max_size
    elif isinstance(layer, cache.ChunkedKVCache):
        most = layer.chunk_size
    elif not isinstance(layer, cache.KVCache | cache.ConcatenateKVCache | cache.QuantizedKVCache):
        return [CacheGrowth(layer.nbytes, 0, None)]
    keys: Any = full.keys
    positions = (keys[0] if isinstance(keys, tuple | list) else keys).shape[2]
    return [CacheGrowth(0, full.nbytes // positions, most)]


def _after_one_token(net: nn.Module, layers: list[Any]) -> list[Any]:
    """``layers`` after one token, which is never computed: for their shapes."""
    cast(Any, net)(mx.zeros((1, 1), mx.int32), cache=layers)
    return layers
