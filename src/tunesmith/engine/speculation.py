"""Several tokens of one request from one pass: cheap guesses are read together with the next token.

The answer is the one without speculation, token for token, greedy or drawn: each position is chosen as it
always is, with the request's own random numbers, penalties and constraint, and a guess counts only if it is
the token that was chosen (cf. arXiv 2211.17192, which keeps the distribution only). What can differ is
rounding: a pass over several tokens adds in another order than passes over one, so a token may change where
two logits differ by less than about 1e-5 of their size.

A request is guessed for while it is under way alone. Its cache must be one from whose end tokens can be taken
away. For each adapter it is measured whether guessing is faster, and it stops where it is not."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, Protocol

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from tunesmith.engine import caches
from tunesmith.engine.prefixes import common_length
from tunesmith.engine.rows import EngineRow, Forward
from tunesmith.errors import ModelError
from tunesmith.model import vocabulary
from tunesmith.tokens.template import Renderer

ENOUGH = 8
"""Passes with guesses, and without, that are measured before it is decided whether guessing is faster."""
RECENT = 64
"""Passes that the measurement remembers. So many are enough, even if hardly any had a guess."""
START, STAY = 1.05, 1.0
"""Guessing begins if a trial finds it so many times as fast, and goes on while it is as fast as this."""
AGAIN = 1024
"""Tokens after which the pass without guesses is measured again."""
REST, LONGEST_REST = 256, 1 << 12
"""Tokens without guesses until the next trial: so many after the first that failed, and twice as many after
each further one."""
OUTLIER = 4.0
"""A pass that takes so many times the median was interrupted by something else, and counts as that."""
FIRST_GUESSES, MOST_GUESSES = 4, 10
"""Guesses of one pass: at first, and at most. On two CPU cores a pass over 8 tokens of a model of 135M
parameters takes as long as one over 1, and one over 16 more than three times as long."""
TOKENS_OF_A_PASS = 512
"""Most tokens that a draft model reads in one pass."""
CACHE_FORGETS = "tokens cannot be taken away from the end of its cache"


class Guesser(Protocol):
    """Guesses how a text goes on. It is asked about one text at a time, which mostly grows."""

    def guess(self, tokens: Sequence[int], most: int) -> list[int]:
        """At most ``most`` tokens after ``tokens``; empty if it has no guess."""
        ...


class PromptLookup:
    """Guesses that what once followed the last tokens of the text follows again (prompt lookup decoding)."""

    def __init__(self, longest: int = 4, shortest: int = 2) -> None:
        """The last ``longest`` tokens are looked up, then fewer, down to ``shortest``."""
        self._sizes = range(longest, shortest - 1, -1)
        self._tokens: list[int] = []
        self._ends: dict[tuple[int, ...], int] = {}  # where the newest of each run of tokens ended

    def guess(self, tokens: Sequence[int], most: int) -> list[int]:
        last: dict[int, int] = self._follow(tokens)
        for size in self._sizes:
            if (end := last.get(size)) is not None:
                following = [*tokens[end:]]
                # A text that repeats itself goes on doing so.
                repeated = following * (most // len(following) + 1)
                return repeated[:most]
        return []

    def _follow(self, tokens: Sequence[int]) -> dict[int, int]:
        """Learn the new end of the text. Returns where the last tokens stood before, by how many they are."""
        known = len(self._tokens)
        if len(tokens) < known or [*tokens[:known]] != self._tokens:
            self._tokens, self._ends, known = [], {}, 0
        before: dict[int, int] = {}
        for end in range(known + 1, len(tokens) + 1):
            before = {}
            for size in self._sizes:
                if size <= end:
                    run = tuple(tokens[end - size : end])
                    if run in self._ends:
                        before[size] = self._ends[run]
                    self._ends[run] = end
        self._tokens = [*tokens]
        return before


class DraftModel:
    """Guesses the likeliest tokens of a smaller model, which has the same vocabulary."""

    def __init__(self, net: nn.Module, n_ids: int) -> None:
        """n_ids: how many the model knows for which ``net`` guesses. Either may have more rows of the
        embedding than the vocabulary has tokens."""
        if not takes_guesses(net):
            raise ModelError(f"this draft model cannot be used: {CACHE_FORGETS}")
        self._net, self._layers, self._tokens = net, caches.new_cache(net, None), list[int]()
        self._n_readable = vocabulary.limits(net).ids
        self._n_known = min(n_ids, self._n_readable)

    def guess(self, tokens: Sequence[int], most: int) -> list[int]:
        if max(tokens) >= self._n_readable:
            return []
        try:
            return self._guesses(tokens, most)
        except BaseException:  # the cache may hold anything
            self._layers, self._tokens = caches.new_cache(self._net, None), []
            raise

    def _guesses(self, tokens: Sequence[int], most: int) -> list[int]:
        common = common_length(np.asarray(self._tokens, np.int32), np.asarray(tokens, np.int32))
        n_read = min(common, len(tokens) - 1)  # the last token is read again: its logits are wanted
        caches.trim(self._layers, len(self._tokens) - n_read)
        caches.read(self._net, tokens[n_read:-1], self._layers, TOKENS_OF_A_PASS)
        guesses = [self._next(tokens[-1])]
        while len(guesses) < most:
            guesses.append(self._next(guesses[-1]))
        self._tokens = [*tokens, *guesses[:-1]]
        return guesses

    def _next(self, token: int) -> int:
        net: Any = self._net
        logits = net(mx.array([[token]]), cache=self._layers)
        return int(np.array(mx.argmax(logits[0, -1, : self._n_known])))


def require_same_tokens(renderer: Renderer, draft: Renderer) -> None:
    """Raises ModelError if the tokens of a draft model are others."""
    if renderer.token_bytes() != draft.token_bytes():
        raise ModelError("the draft model has another vocabulary", hint="take one of the same family")


def takes_guesses(net: nn.Module) -> bool:
    """Whether guesses that are not chosen can be taken out of the cache of ``net`` again."""
    return caches.always_trimmable(caches.growth(net, None))


class TimedPass(NamedTuple):
    """One pass: how many ``tokens`` it gave, what it took until the next one began, and how many ``guesses``
    it had."""

    tokens: int
    seconds: float
    guesses: int


def speed(plain: Sequence[float], passes: Sequence[TimedPass]) -> float | None:
    """Tokens a second with guesses ÷ without. ``plain``: seconds a token without. None if too few passes were
    measured."""
    guessed = sum(reading.guesses > 0 for reading in passes)
    if len(plain) < ENOUGH or (guessed < ENOUGH and len(passes) < RECENT):
        return None
    most = OUTLIER * float(np.median([reading.seconds for reading in passes]))
    seconds = sum(min(reading.seconds, most) for reading in passes)
    tokens = sum(reading.tokens for reading in passes)
    return tokens * float(np.median(plain)) / seconds if seconds else None


Phase = Literal["measuring", "trying", "guessing", "resting"]
"""Measuring passes without guesses, then trying with them; after that guessing, or resting until the next
trial."""


def next_phase(phase: Phase, plain: int, faster: float | None, tokens: int, rest: int) -> Phase:
    """The phase after a pass. ``plain``: passes without guesses that were measured. ``faster``: as `speed`
    says. ``tokens``: given in this phase. ``rest``: tokens of a rest."""
    if phase == "measuring":
        return "trying" if plain >= ENOUGH else phase
    if phase == "resting":
        return "measuring" if tokens >= rest else phase
    if faster is not None and faster < (START if phase == "trying" else STAY):
        return "resting"
    if phase == "guessing" and tokens >= AGAIN:
        return "measuring"
    return phase if faster is None else "guessing"


@dataclass
class Pace:
    """The measurements of one adapter."""

    phase: Phase = "measuring"
    plain: deque[float] = field(default_factory=lambda: deque(maxlen=ENOUGH))
    passes: deque[TimedPass] = field(default_factory=lambda: deque(maxlen=RECENT))
    tokens: int = 0
    rest: int = 0
    guessed: int = 0
    accepted: int = 0

    @property
    def faster(self) -> float | None:
        """Tokens a second with guesses ÷ without, or None if that is not known yet."""
        return speed(self.plain, self.passes)

    def advance(self, tokens: int) -> None:
        """Count ``tokens`` of a pass, and go on to the next phase if it is time."""
        self.tokens += tokens
        phase = next_phase(self.phase, len(self.plain), self.faster, self.tokens, self.rest)
        if phase == self.phase:
            return
        if phase == "resting":
            self.rest = min(2 * self.rest, LONGEST_REST) if self.rest else REST
        if phase == "guessing":
            self.rest = 0
        if phase == "measuring":
            self.plain.clear()
        if phase == "trying":
            self.passes.clear()
        self.phase, self.tokens = phase, 0


@dataclass
class _Ahead:
    """The last pass over ``row``. ``guesses``: those that were not chosen yet, whose keys and values the
    cache holds. ``logits``: (1, T, V); those at ``place`` were given out last."""

    row: EngineRow
    layers: list[Any]
    guesses: list[int]
    logits: mx.array
    place: int
    began: float
    is_plain: bool


class Speculation:
    """Guesses for the row that is under way alone. One belongs to one engine."""

    def __init__(self, guesser: Guesser) -> None:
        self._guesser = guesser
        self._ahead: _Ahead | None = None
        self._most = FIRST_GUESSES
        self.paces: dict[str | None, Pace] = {}
        """By the digest of the weights that answer, or by the name of the adapter if there is no digest."""

    def over(self, forward: Forward) -> Forward:
        """``forward`` for one row, with guesses."""

        def ahead(rows: Sequence[EngineRow], tokens: mx.array, layers: list[Any]) -> mx.array:
            row = rows[0]
            if not row.request.draft:
                return forward(rows, tokens, layers)
            pace = self.paces.setdefault(row.request.digest or row.request.adapter, Pace())
            if pace.phase in ("measuring", "resting"):
                return self._plain(forward, pace, rows, tokens, layers)
            return self._guessed(forward, pace, rows, tokens, layers)

        return ahead

    def surplus(self, row: EngineRow) -> int:
        """Tokens at the end of the cache of ``row`` that are guesses."""
        return len(self._ahead.guesses) if self._ahead is not None and self._ahead.row is row else 0

    def settle(self) -> None:
        """Take guesses out of the cache: something else is going to use it."""
        if self._ahead is not None:
            caches.trim(self._ahead.layers, len(self._ahead.guesses))
        self._ahead = None

    def _plain(
        self, forward: Forward, pace: Pace, rows: Sequence[EngineRow], tokens: mx.array, layers: list[Any]
    ) -> mx.array:
        """A pass without guesses. Nothing waits for its tokens, as if there were no speculation."""
        now, last = time.perf_counter(), self._ahead
        self.settle()
        if last is not None and last.row is rows[0] and last.is_plain and pace.phase == "measuring":
            pace.plain.append(now - last.began)
        pace.advance(1)
        logits = forward(rows, tokens, layers)
        self._ahead = _Ahead(rows[0], layers, [], logits, 0, now, is_plain=True)
        return logits

    def _guessed(
        self, forward: Forward, pace: Pace, rows: Sequence[EngineRow], tokens: mx.array, layers: list[Any]
    ) -> mx.array:
        row, token = rows[0], int(np.array(tokens).item())
        now, last = time.perf_counter(), self._ahead
        if last is not None and last.row is row and last.guesses[:1] == [token]:
            last.guesses, last.place = last.guesses[1:], last.place + 1
            return last.logits[:, last.place : last.place + 1]
        if last is not None and last.row is row and not last.is_plain:
            self._finish(pace, last, now)
        self.settle()
        text = [*row.tokens, token] if row.n_chosen else row.tokens
        most = min(self._most, row.most - row.n_chosen - 1)
        guesses = self._guesser.guess(text, most) if most > 0 else []
        logits = forward(rows, mx.array([[token, *guesses]]), layers)
        self._ahead = _Ahead(row, layers, guesses, logits, 0, now, is_plain=False)
        return logits[:, :1]

    def _finish(self, pace: Pace, last: _Ahead, now: float) -> None:
        """Count the pass ``last``: no more of its guesses are accepted."""
        guesses = last.place + len(last.guesses)
        pace.passes.append(TimedPass(last.place + 1, now - last.began, guesses))
        pace.guessed += guesses
        pace.accepted += last.place
        if guesses:
            self._most = min(2 * self._most, MOST_GUESSES) if not last.guesses else max(1, last.place + 1)
        pace.advance(last.place + 1)
