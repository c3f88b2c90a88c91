"""What is asked of the engine, and what comes back: one request is one continuation of one prompt."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import mlx.core as mx
import numpy as np

from tunesmith.errors import ModelError

MOST_ANSWER_TOKENS = 1 << 16
"""An answer of more is not asked for: it would take hours, and more memory than the model."""
Finish = Literal["stop", "length"]
"""Why a continuation ended: an end token, or as many tokens as were allowed."""


@dataclass(frozen=True)
class Request:
    """``ids``: the prompt. ``end_ids``: tokens that end the continuation. ``adapter``: a name of the engine's
    routing; None: the model as it is. ``temperature`` 0 is greedy, otherwise the draws are a function of
    (``seed``, ``stream``) alone, whatever else is in the batch; ``top_p`` keeps the likeliest tokens of that
    total share."""

    ids: Sequence[int]
    end_ids: Sequence[int] = ()
    max_tokens: int = 256
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0
    stream: int = 0
    adapter: str | None = None

    def require(self, place: int) -> None:
        """Raises ModelError if there is nothing to continue or no token to be made."""
        if len(self.ids) == 0:
            hint = "give at least one token"
            raise ModelError("cannot continue an empty prompt", where=f"prompt {place}", hint=hint)
        if self.max_tokens < 1:
            raise ModelError(f"max_tokens is {self.max_tokens}", hint="at least 1")


class NewToken(NamedTuple):
    """``request``: the number that `Engine.submit` gave. If ``finish`` is stop, ``token`` is the end
    token."""

    request: int
    token: int
    finish: Finish | None


def sampler(request: Request) -> Callable[[mx.array], mx.array] | None:
    """(1, V) log-probabilities → (1,) token; None if the request is greedy."""
    if request.temperature == 0:
        return None
    entropy = np.random.SeedSequence([request.seed, request.stream])
    key = mx.random.key(int(entropy.generate_state(1, np.uint32)[0]))

    def draw(logprobs: mx.array) -> mx.array:
        nonlocal key
        key, now = mx.random.split(key)
        logits = logprobs.astype(mx.float32) / request.temperature
        if request.top_p < 1:
            ranked = -mx.sort(-logits, axis=-1)
            shares = mx.softmax(ranked, axis=-1)
            # The likeliest token always, and all that tie with the last.
            inside = mx.cumsum(shares, axis=-1) - shares < request.top_p
            logits = mx.where(logits >= mx.where(inside, ranked, mx.inf).min(), logits, -mx.inf)
        return mx.random.categorical(logits, key=now)

    return draw
