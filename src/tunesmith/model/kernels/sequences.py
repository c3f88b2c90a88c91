"""How rows lie in a sequence: several end to end, or after prompts that are computed once.

Both are passed to a model as the cache of its layers, and reach attention as mask or cache."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import mlx.core as mx
import mlx.nn as nn


class Packed:
    """Passed to a model as the cache of each layer: its one sequence holds several rows, which end at
    ``ends``, and each row attends only to itself.

    Positions continue through the sequence, since rotary embeddings depend only on differences of positions;
    `forbid_packing` is for the architectures that scale by the position itself. No mask of T × T is ever
    made."""

    offset = 0

    def __init__(self, ends: tuple[int, ...]) -> None:
        self.ends = ends

    def make_mask(self, length: int, **options: Any) -> Packed:
        if options.get("window_size") is not None:
            raise ValueError("layers with a sliding window cannot take packed rows")
        return self

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        return keys, values


def forbid_packing(net: nn.Module) -> None:
    """Let `packed` raise for ``net``, where the position of a token matters, not only its distances."""
    vars(net)["_depends_on_positions"] = True


def packed(net: nn.Module, ends: tuple[int, ...]) -> list[Packed]:
    """What to pass to ``net`` as its cache, for one row of rows that end at ``ends``. Raises ValueError after
    `forbid_packing`."""
    if "_depends_on_positions" in vars(net):
        raise ValueError("layers that scale by the position cannot take packed rows")
    layers: Any = net.layers
    return [Packed(ends)] * len(layers)


class PromptCache:
    """Passed to a model as the cache of a layer: keeps the keys and values of the first pass, the prompts,
    and puts them before those of each later pass.

    Keys and values of later passes are not kept, so any number of answers can follow a prompt, each by
    itself. ``rows`` (N,): which prompt each row of a later pass follows; None: all follow the only one."""

    def __init__(self, kept: tuple[mx.array, mx.array] | None = None, rows: mx.array | None = None) -> None:
        self._kept, self._rows = kept, rows

    @property
    def offset(self) -> int:
        return 0 if self._kept is None else self._kept[0].shape[2]

    def make_mask(self, length: int, **options: Any) -> str | None:
        if options.get("window_size") is not None:
            raise ValueError("layers with a sliding window cannot keep a prompt")
        return "causal" if length > 1 else None

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        if self._kept is None:
            self._kept = keys, values
            return keys, values
        before = [self._of_each_row(array, len(keys)) for array in self._kept]
        return mx.concatenate([before[0], keys], axis=2), mx.concatenate([before[1], values], axis=2)

    def _of_each_row(self, array: mx.array, count: int) -> mx.array:
        if self._rows is None:
            return mx.broadcast_to(array, (count, *array.shape[1:]))
        return array[self._rows]

    def before(self, rows: mx.array) -> PromptCache:
        """The cache for answers that follow the prompts ``rows`` (N,)."""
        return PromptCache(self._kept, rows)

    def state(self) -> list[mx.array]:
        return list(self._kept or ())


def prompt(net: nn.Module, ids: mx.array) -> list[PromptCache]:
    """What to pass to ``net`` as its cache for sequences that go on after ``ids`` (1, P). Evaluated.

    For several prompts, ``ids`` (B, P), it says by `each_after` which of them each sequence follows."""
    layers: Any = net.layers
    caches = [PromptCache() for _ in layers]
    net(ids, cache=caches)
    mx.eval([cache.state() for cache in caches])
    return caches


def each_after(prompts: list[PromptCache], rows: Sequence[int]) -> list[PromptCache]:
    """``prompts`` for a pass of len(rows) sequences: which of them each sequence goes on after."""
    chosen = mx.array(list(rows), dtype=mx.int32)
    return [cache.before(chosen) for cache in prompts]
