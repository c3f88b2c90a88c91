"""Whether the rows of a model may share passes: it is tried on a few tokens, in the batches of the engine."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import mlx.core as mx
import mlx.nn as nn

from tunesmith.engine import caches
from tunesmith.engine.requests import Request
from tunesmith.engine.rows import Decoding, EngineRow, RowBatch
from tunesmith.model import abilities, kernels

PADDED = {mx.float32: 5e-5, mx.float16: 1e-2, mx.bfloat16: 5e-2}
"""Largest difference between batched and single log-probabilities, as a share of the largest value, by dtype.
In float32 rounding gives 5e-7, and padding that Nemotron-H reads as little as 5e-4; in half precision so
small an error is below rounding."""
PROMPTS = ([3, 1, 4, 1, 5, 9, 2, 6, 5], [2, 7], [1, 8, 2, 8, 1])
"""Of several lengths, so that padding is tried."""
NEW_TOKENS = (2, 4, 3)
"""How many tokens follow each of them, so that rows leave at several times."""
CHUNK = 3
"""Most tokens of each prompt in one pass: the first prompt is read in several."""


@abilities.once
def batches(net: nn.Module) -> bool:
    """Whether prompts of several lengths, read and continued in batches that rows join and leave, get the
    probabilities that each gets alone."""

    def both() -> tuple[mx.array, mx.array]:
        together = _together(net)
        alone = [_alone(net, prompt, tokens) for prompt, (tokens, _) in zip(PROMPTS, together, strict=True)]
        return mx.concatenate([logprobs for _, logprobs in together]), mx.concatenate(alone)

    return abilities.agree(net, both, PADDED[net(mx.zeros((1, 1), mx.int32)).dtype])


def _together(net: nn.Module) -> list[tuple[list[int], mx.array]]:
    """The new tokens of each of `PROMPTS` and their log-probabilities (T, V)."""
    rows = [
        EngineRow(number, Request(prompt), count)
        for number, (prompt, count) in enumerate(zip(PROMPTS, NEW_TOKENS, strict=True))
    ]
    logits: list[list[mx.array]] = [[] for _ in rows]

    def read(rows: Sequence[EngineRow], tokens: mx.array, layers: list[Any]) -> mx.array:
        return cast(Any, net)(tokens, cache=layers)

    def decode(rows: Sequence[EngineRow], tokens: mx.array, layers: list[Any]) -> mx.array:
        values = read(rows, tokens, layers)
        for place, row in enumerate(rows):
            logits[row.number].append(values[place, -1])
        return values

    reading = RowBatch.of(rows[:2], [caches.new_cache(net, None) for _ in range(2)], alone=False)
    late = RowBatch.of(rows[2:], [caches.new_cache(net, None)], alone=False)
    reading.read(read, CHUNK)
    decoding = Decoding(reading.take([1]), None)
    decoding.advance(decode)
    reading.join(late)
    while any(row.unread for row in reading.rows):
        reading.read(read, CHUNK)
        decoding.advance(decode)
    decoding.add(reading)
    while decoding.rows:
        decoding.advance(decode)
    return [
        (row.tokens[len(row.request.ids) :], _logprobs(own)) for row, own in zip(rows, logits, strict=True)
    ]


def _alone(net: nn.Module, prompt: list[int], tokens: list[int]) -> mx.array:
    """(T, V): log-probabilities at the ``tokens`` that follow ``prompt``, one row with a cache of its own."""
    model, layers = cast(Any, net), caches.new_cache(net, None)
    logits = [model(mx.array([prompt]), cache=layers)[0, -1]]
    return _logprobs(logits + [model(mx.array([[token]]), cache=layers)[0, -1] for token in tokens[:-1]])


def _logprobs(logits: Sequence[mx.array]) -> mx.array:
    """(T, V). MLX's own sum over a long vocabulary is not exact on a CPU."""
    stacked = mx.stack(list(logits))
    return stacked - kernels.log_sums(stacked)[..., None]
