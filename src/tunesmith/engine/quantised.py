"""Keys and values of a batch in 8 or 4 bits.

mlx-lm quantises the cache of one sequence only. Each position is quantised for itself, along the width of a
head, so padding, joining and leaving are the same operations on the packed codes, the scales and the biases.
Imports mlx-lm, so it is imported where bits are asked for only."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import mlx.core as mx
import numpy as np
from mlx_lm.models.base import create_causal_mask
from mlx_lm.models.cache import KVCache, QuantizedKVCache, dynamic_roll

from tunesmith.errors import ModelError

BITS = (8, 4)
GROUPS = (64, 32)
"""Inputs that share a scale: the first that divides the width of a head."""
Parts = tuple[mx.array, ...]
"""Codes, scales and biases, each (B, H, T, ...)."""


def quantised(layer: Any, after_one: Any, bits: int) -> QuantizedKVCache:
    """An empty cache in place of ``layer``. ``after_one``: the cache of this layer after one token. Raises
    ModelError if keys and values of the layer cannot be quantised."""
    hint = "leave kv_bits out"
    if bits not in BITS:
        raise ModelError(f"kv_bits is {bits}", hint="8 or 4")
    if type(layer) is not KVCache:
        message = f"a layer of this model has a {type(layer).__name__}, which cannot be kept in {bits} bits"
        raise ModelError(message, hint=hint)
    widths = after_one.keys.shape[-1], after_one.values.shape[-1]
    for group in GROUPS:
        if all(width and width % group == 0 for width in widths):
            return QuantizedKVCache(group_size=group, bits=bits)
    message = f"heads of {widths[0]} and {widths[1]} values cannot be kept in {bits} bits"
    raise ModelError(message, hint=f"a multiple of {GROUPS[-1]} is needed; {hint}")


class QuantisedRows:
    """Several rows, padded on the left, with the interface of mlx-lm's BatchKVCache. ``offset`` (B,): the
    position of each row's next token."""

    keys: Parts | None
    values: Parts | None
    offset: mx.array
    left_padding: mx.array

    def __init__(self, left_padding: Sequence[int], group_size: int, bits: int) -> None:
        self.group_size, self.bits = group_size, bits
        self.keys = self.values = None
        self.left_padding = mx.array(list(left_padding))
        self.offset = -self.left_padding
        self._end = 0
        self._right_padding: mx.array | None = None

    @classmethod
    def of(cls, row: QuantizedKVCache) -> QuantisedRows:
        """A batch of one row."""
        rows = cls([0], row.group_size, row.bits)
        rows.offset, rows._end = mx.array([row.offset]), row.offset
        if row.keys is not None and row.values is not None:
            rows.keys, rows.values = _mapped(lambda part: part[..., : row.offset, :], row.keys, row.values)
        return rows

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[Parts, Parts]:
        start, self._end = self._end, self._end + keys.shape[2]
        self.offset = self.offset + keys.shape[2]
        packing: Any = {"group_size": self.group_size, "bits": self.bits}
        self.keys = self._written(self.keys, mx.quantize(keys, **packing), start)
        self.values = self._written(self.values, mx.quantize(values, **packing), start)
        return self.keys_and_values()

    def keys_and_values(self) -> tuple[Parts, Parts]:
        assert self.keys is not None and self.values is not None
        return _mapped(lambda part: part[..., : self._end, :], self.keys, self.values)

    def make_mask(self, length: int, return_array: bool = False, **options: Any) -> mx.array:
        return create_causal_mask(length, offset=self._end, left_padding=self.left_padding, **options)

    def prepare(self, *, lengths: Sequence[int], right_padding: Sequence[int]) -> None:
        self._right_padding = mx.array(list(right_padding))

    def finalize(self) -> None:
        if self._right_padding is None:
            return
        padding, self._right_padding = self._right_padding, None
        shifts = mx.expand_dims(padding, 1)
        self.keys, self.values = _mapped(
            lambda part: dynamic_roll(part, shifts, axis=2), *self.keys_and_values()
        )
        self.offset = self.offset - padding
        self.left_padding = self.left_padding + padding

    def filter(self, places: Sequence[int]) -> None:
        rows = mx.array(list(places))
        self.offset, self.left_padding = self.offset[rows], self.left_padding[rows]
        unused = min(np.array(self.left_padding).tolist())
        if self.keys is not None and self.values is not None:
            self.keys, self.values = _mapped(
                lambda part: mx.take(part, rows, axis=0)[..., unused:, :], self.keys, self.values
            )
        self._end -= unused
        self.left_padding = self.left_padding - unused

    def extend(self, other: QuantisedRows) -> None:
        end = max(self._end, other._end)
        for rows in (self, other):
            rows.left_padding = rows.left_padding + (end - rows._end)
        filled = self if self.keys is not None else other
        if end:
            missing = [end - self._end, end - other._end]
            parts = [_keys_and_values(rows, filled) for rows in (self, other)]
            keys, values = [own for own, _ in parts], [own for _, own in parts]
            self.keys, self.values = _together(keys, missing), _together(values, missing)
        self.offset = mx.concatenate([self.offset, other.offset])
        self.left_padding = mx.concatenate([self.left_padding, other.left_padding])
        self._end = end

    def extract(self, place: int) -> QuantizedKVCache:
        row = QuantizedKVCache(self.group_size, self.bits)
        padding, end = np.array(self.left_padding).tolist()[place], self._end
        row.keys, row.values = _mapped(
            lambda part: mx.contiguous(part[place : place + 1, :, padding:end]), *self.keys_and_values()
        )
        row.offset = self._end - padding
        return row

    def size(self) -> int:
        return self._end

    def is_trimmable(self) -> bool:
        return True

    def trim(self, count: int) -> int:
        count = min(self._end, count)
        self._end -= count
        self.offset = self.offset - count
        return count

    @property
    def nbytes(self) -> int:
        return sum(part.nbytes for parts in (self.keys, self.values) for part in parts or ())

    @property
    def state(self) -> list[Any]:
        return [self.keys, self.values, self.offset, self.left_padding]

    def _written(self, parts: Parts | None, new: Sequence[mx.array], start: int) -> Parts:
        """``parts`` with ``new`` from ``start`` on; room is made in steps."""
        if parts is None or self._end > parts[0].shape[2]:
            room = -(-new[0].shape[2] // QuantizedKVCache.step) * QuantizedKVCache.step
            more = tuple(mx.zeros((*part.shape[:2], room, part.shape[3]), part.dtype) for part in new)
            if parts is not None:
                more = tuple(
                    mx.concatenate([part[:, :, :start], added], axis=2)
                    for part, added in zip(parts, more, strict=True)
                )
            parts = more
        for part, added in zip(parts, new, strict=True):
            part[:, :, start : self._end] = added
        return parts


def _mapped(change: Callable[[mx.array], mx.array], keys: Parts, values: Parts) -> tuple[Parts, Parts]:
    return tuple(change(part) for part in keys), tuple(change(part) for part in values)


def _keys_and_values(rows: QuantisedRows, filled: QuantisedRows) -> tuple[Parts, Parts]:
    """Those of ``rows`` up to their end; of no position, in the shape of ``filled``'s, if they are empty."""
    if rows.keys is not None:
        return rows.keys_and_values()
    assert filled.keys is not None and filled.values is not None
    n_rows = rows.left_padding.size
    return _mapped(
        lambda part: mx.zeros((n_rows, part.shape[1], 0, part.shape[3]), part.dtype),
        filled.keys,
        filled.values,
    )


def _together(rows: Sequence[Parts], padding: Sequence[int]) -> Parts:
    """Several of (B, H, T, ...) as one, each padded on the left."""
    padded = [
        [mx.pad(part, [(0, 0), (0, 0), (missing, 0), (0, 0)]) for part in parts]
        for parts, missing in zip(rows, padding, strict=True)
    ]
    return tuple(mx.concatenate(list(parts)) for parts in zip(*padded, strict=True))
