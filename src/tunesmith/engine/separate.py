"""Continuations of a model whose rows cannot share a pass: each request has a cache and passes of its own.

`SeparateRows` has the part of the interface of mlx-lm's BatchGenerator that `Engine` uses. As many requests
are under way at once, each a token further at every step."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from tunesmith.engine.requests import Finish
from tunesmith.model import kernels

PREFILL_TOKENS = 2048
"""Most tokens of a prompt that are read in one pass."""


class Response(NamedTuple):
    """One new token, with the names that BatchGenerator gives them."""

    uid: int
    token: int
    finish_reason: Finish | None


@dataclass
class _Sequence:
    """``ids``: tokens that were not read yet. ``left``: how many may still be made."""

    uid: int
    ids: list[int]
    left: int
    cache: list[Any]
    sampler: Callable[[mx.array], mx.array] | None
    matcher: Any


class SeparateRows:
    """``model``: (1, T) tokens and a cache → (1, T, V) logits. ``net``: makes the caches that are not given.
    ``size``: most requests under way at once."""

    def __init__(self, model: Callable[..., mx.array], net: nn.Module, size: int) -> None:
        self._model, self._net, self._size = model, net, size
        self._waiting: deque[_Sequence] = deque()
        self._rows: list[_Sequence] = []
        self._count = 0

    def insert(
        self,
        prompts: Sequence[list[int]],
        max_tokens: Sequence[int],
        *,
        caches: Sequence[list[Any]] | None,
        samplers: Sequence[Callable[[mx.array], mx.array] | None] | None,
        stop_sequences: Sequence[Any],
    ) -> list[int]:
        from mlx_lm.models.cache import make_prompt_cache

        numbers = list(range(self._count, self._count + len(prompts)))
        self._count += len(prompts)
        for place, uid in enumerate(numbers):
            cache = caches[place] if caches else make_prompt_cache(self._net)
            sampler = samplers[place] if samplers else None
            matcher = stop_sequences[place].matcher()
            self._waiting.append(_Sequence(uid, prompts[place], max_tokens[place], cache, sampler, matcher))
        return numbers

    def next_generated(self) -> list[Response]:
        while self._waiting and len(self._rows) < self._size:
            self._rows.append(self._waiting.popleft())
        responses = [self._advance(row) for row in self._rows]
        ended = {response.uid for response in responses if response.finish_reason is not None}
        self.remove(ended)
        return responses

    def remove(self, uids: Sequence[int] | set[int]) -> None:
        self._rows = [row for row in self._rows if row.uid not in uids]
        self._waiting = deque(row for row in self._waiting if row.uid not in uids)

    def close(self) -> None:
        self._rows, self._waiting = [], deque()

    def _advance(self, row: _Sequence) -> Response:
        while len(row.ids) > 1:
            part = row.ids[: min(PREFILL_TOKENS, len(row.ids) - 1)]
            self._model(mx.array([part]), cache=row.cache)
            mx.eval([layer.state for layer in row.cache])  # not the logits: nobody reads them
            row.ids = row.ids[len(part) :]
        logits = self._model(mx.array([row.ids]), cache=row.cache)[:, -1]
        logprobs = logits - kernels.log_sums(logits)[..., None]
        drawn = mx.argmax(logprobs, axis=-1) if row.sampler is None else row.sampler(logprobs)
        token = int(np.array(drawn).item())
        row.ids, row.left = [token], row.left - 1
        finish: Finish | None = "length" if row.left == 0 else None
        return Response(row.uid, token, "stop" if row.matcher.advance(token) else finish)
