"""What is asked of the engine, and what comes back: one request is one continuation of one prompt."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple, Protocol

import numpy as np

from tunesmith.errors import ModelError

MOST_ANSWER_TOKENS = 1 << 16
"""An answer of more is not asked for: it would take hours, and more memory than the model."""
MOST_PENALTY = 1000.0
"""Largest penalty or bias: beyond it nothing more changes, and float16 overflows."""
Finish = Literal["stop", "length"]
"""Why a continuation ended: an end token, or as many tokens as were allowed."""


class TokenConstraint(Protocol):
    """The tokens that one continuation may take next. It belongs to one request and follows its tokens."""

    def allowed(self) -> np.ndarray | None:
        """(V,) bool, at least one of them True, or None if any token may follow."""
        ...

    def advance(self, token: int) -> None:
        """``token`` was generated. Never called with an end token."""
        ...


@dataclass(frozen=True)
class Request:
    """``ids``: the prompt. ``end_ids``: tokens that end the continuation. ``adapter``: a name of the engine's
    routing, or None for the model as it is. ``digest``: a digest of the weights that answer (base and
    adapter); requests share cached prefixes only if theirs are equal, and None shares nothing.

    ``temperature`` 0 is greedy, otherwise the draws are a function of (``seed``, ``stream``) alone, whatever
    else is in the batch. ``top_k`` keeps that many of the likeliest tokens (0: all), ``top_p`` the likeliest
    of that total share, ``min_p`` those of at least that share of the likeliest token's probability.

    ``repetition_penalty`` divides positive logits of tokens that the prompt or the continuation has, and
    multiplies negative ones (arXiv 1909.05858). ``presence_penalty`` is subtracted once from the logits of
    tokens of the continuation, ``frequency_penalty`` once for each time. ``logit_bias`` is added to the
    logits of its tokens.

    ``logprobs``: None, or how many of the likeliest tokens are given with each new token; their
    log-probabilities are the model's own, before anything above. ``draft``: whether speculation is
    allowed."""

    ids: Sequence[int]
    end_ids: Sequence[int] = ()
    max_tokens: int = 256
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0
    stream: int = 0
    adapter: str | None = None
    top_k: int = field(default=0, kw_only=True)
    min_p: float = field(default=0.0, kw_only=True)
    repetition_penalty: float = field(default=1.0, kw_only=True)
    presence_penalty: float = field(default=0.0, kw_only=True)
    frequency_penalty: float = field(default=0.0, kw_only=True)
    logit_bias: Mapping[int, float] = field(default_factory=dict, kw_only=True)
    logprobs: int | None = field(default=None, kw_only=True)
    constraint: TokenConstraint | None = field(default=None, kw_only=True)
    draft: bool = field(default=True, kw_only=True)
    digest: str | None = field(default=None, kw_only=True)

    def require(self, place: int) -> None:
        """Raises ModelError if there is nothing to continue, no token to be made, or an option out of its
        range."""
        where = f"prompt {place}"
        if len(self.ids) == 0:
            hint = "give at least one token"
            raise ModelError("cannot continue an empty prompt", where=where, hint=hint)
        if self.max_tokens < 1:
            raise ModelError(f"max_tokens is {self.max_tokens}", hint="at least 1")
        # Comparisons that are False for NaN.
        ranges = {
            "temperature": (self.temperature >= 0, "at least 0"),
            "top_p": (0 < self.top_p <= 1, "above 0, at most 1"),
            "top_k": (self.top_k >= 0, "at least 1, or 0 for all tokens"),
            "min_p": (0 <= self.min_p <= 1, "from 0 to 1"),
            "repetition_penalty": (self.repetition_penalty > 0, "above 0; 1 changes nothing"),
            "presence_penalty": (abs(self.presence_penalty) <= MOST_PENALTY, f"at most ±{MOST_PENALTY}"),
            "frequency_penalty": (abs(self.frequency_penalty) <= MOST_PENALTY, f"at most ±{MOST_PENALTY}"),
            "logprobs": (self.logprobs is None or self.logprobs >= 0, "at least 0"),
        }
        for name, (valid, hint) in ranges.items():
            if not valid:
                raise ModelError(f"{name} is {getattr(self, name)}", where=where, hint=hint)
        for token, bias in self.logit_bias.items():
            if not abs(bias) <= MOST_PENALTY:
                message = f"logit_bias of token {token} is {bias}"
                raise ModelError(message, where=where, hint=f"at most ±{MOST_PENALTY}")
        if self.constraint is not None and not self.end_ids:
            hint = "give end_ids: a constrained answer ends with one of them"
            raise ModelError("a constraint without an end token", where=where, hint=hint)


class NewToken(NamedTuple):
    """``request``: the number that `Engine.submit` gave. If ``finish`` is stop, ``token`` is the end token.
    ``logprob`` of the token, and ``top``: (token, logprob) of the likeliest, if the request wants them.
    ``cached``: on the first token, how many tokens of the prompt were taken from the prefix cache."""

    request: int
    token: int
    finish: Finish | None
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()
    cached: int = 0
