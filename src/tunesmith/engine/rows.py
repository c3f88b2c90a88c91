"""Rows that share passes of the model: how prompts are read, and how each row gets a token further.

Keys and values of the rows of a batch lie in one cache for each layer (mlx-lm's), padded on the left."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx
import numpy as np

from tunesmith.engine import caches
from tunesmith.engine.requests import Finish, NewToken, Request, TokenConstraint
from tunesmith.engine.sampling import Draws, Edits, Scores, choose


@dataclass(eq=False)
class EngineRow:
    """One request under way. ``tokens``: its prompt and what was generated; ``read``: how many
    of them the cache holds; during a pass it already holds the next one too. ``most``: how many may be
    generated. ``cached``: how many tokens of the prompt came from the prefix cache. ``read_first``: the
    prompt but for its last token, which is read by the pass that chooses the first token. ``reader``: the row
    whose prefix this one waits for. ``ended``: whether it has all its tokens; it may stay in its batch for a
    while."""

    number: int
    request: Request
    most: int
    tokens: list[int] = field(init=False)
    read: int = 0
    cached: int = 0
    reader: EngineRow | None = None
    ended: bool = False
    draws: Draws | None = field(init=False)
    edits: Edits | None = field(init=False)
    ends: frozenset[int] = field(init=False)
    read_first: np.ndarray = field(init=False)

    def __post_init__(self) -> None:
        request = self.request
        self.tokens = [int(token) for token in request.ids]
        self.draws = Draws(request) if request.temperature > 0 else None
        self.edits = Edits(request) if Edits.wanted(request) else None
        self.ends = frozenset(request.end_ids)
        self.read_first = np.array(self.tokens[:-1], np.int32)

    @property
    def unread(self) -> int:
        """How many of ``read_first`` are still to be read."""
        return len(self.read_first) - self.read

    @property
    def n_chosen(self) -> int:
        """Tokens that passes have chosen: the newest may not be given out yet."""
        return max(0, self.read - len(self.read_first))

    @property
    def n_given(self) -> int:
        """Tokens that were given out."""
        return len(self.tokens) - len(self.request.ids)

    def finish(self, token: int) -> Finish | None:
        """Why ``token``, which is the newest, ends the row."""
        return "stop" if token in self.ends else "length" if self.n_given >= self.most else None


Forward = Callable[[Sequence[EngineRow], mx.array, list[Any]], mx.array]
"""(rows, their next tokens (B, T), their cache) → (B, T, V) logits; the cache then holds these tokens too."""


class RowBatch:
    """``layers``: the cache of all rows, one object for each layer of the model. ``alone``: one row whose
    cache is not made for batches."""

    def __init__(self, rows: list[EngineRow], layers: list[Any], alone: bool = False) -> None:
        self.rows, self.layers, self.alone = rows, layers, alone

    @classmethod
    def of(cls, rows: Sequence[EngineRow], caches_of: Sequence[list[Any]], alone: bool) -> RowBatch:
        """``caches_of``: the cache of each row, made for one row."""
        return cls([*rows], caches_of[0] if alone else caches.batched(caches_of), alone)

    def join(self, other: RowBatch) -> None:
        for layer, more in zip(self.layers, other.layers, strict=True):
            layer.extend(more)
        self.rows = self.rows + other.rows

    def keep(self, places: Sequence[int]) -> None:
        """Leave only these rows here."""
        if len(places) == len(self.rows):
            return
        self.rows = [self.rows[place] for place in places]
        if not places:
            self.layers = []
        for layer in self.layers:
            layer.filter(list(places))

    def take(self, places: Sequence[int]) -> RowBatch:
        """These rows as a batch of their own; they leave this one."""
        others = [place for place in range(len(self.rows)) if place not in set(places)]
        taken = RowBatch(self.rows, copy.deepcopy(self.layers) if others else self.layers, self.alone)
        taken.keep(places)
        self.keep(others)
        return taken

    def extract(self, place: int) -> list[Any]:
        """The cache of one row, which stays here too, and which holds no memory of the other rows."""
        if self.alone:
            return copy.deepcopy(self.layers)
        return caches.without_shared_buffers([layer.extract(place) for layer in self.layers])

    def read(self, forward: Forward, most: int) -> None:
        """Read at most ``most`` further tokens of each prompt, in one pass."""
        counts = [min(most, row.unread) for row in self.rows]
        width = max(counts)
        padding = [width - count for count in counts]
        ids = [
            row.tokens[row.read : row.read + count] + [0] * missing
            for row, count, missing in zip(self.rows, counts, padding, strict=True)
        ]
        if any(padding):
            for layer in self.layers:
                layer.prepare(lengths=counts, right_padding=padding)
        forward(self.rows, mx.array(ids), self.layers)
        if any(padding):
            for layer in self.layers:
                layer.finalize()
        mx.eval([layer.state for layer in self.layers])  # not the logits: nobody reads them
        mx.clear_cache()
        for row, count in zip(self.rows, counts, strict=True):
            row.read += count


class Decoding(RowBatch):
    """Rows whose prompts were read but for the last token. The pass that chooses the next tokens is begun
    before the last ones are given out, so that the device does not wait."""

    def __init__(
        self, batch: RowBatch, on_ended: Callable[[EngineRow, list[Any]], None] | None, idle: float = 0.0
    ) -> None:
        """``on_ended``: called with each row that finishes and has a digest, and its cache. ``idle``: the
        share of rows that may stay after their end: each time that some leave, all keys and values are
        copied."""
        super().__init__(batch.rows, batch.layers, batch.alone)
        self._on_ended, self._idle = on_ended, idle
        self._next = mx.array([row.tokens[-1] for row in batch.rows], mx.uint32)
        self._scores = Scores(mx.zeros((0, 1)), self._next, [])

    @property
    def under_way(self) -> int:
        """Rows that are to get further tokens."""
        return sum(not row.ended for row in self.rows)

    def add(self, batch: RowBatch) -> None:
        """Let rows join whose prompts were read but for the last token."""
        self.keep([place for place, row in enumerate(self.rows) if not row.ended])
        super().join(batch)
        last = mx.array([row.tokens[-1] for row in batch.rows], mx.uint32)
        self._next = mx.concatenate([self._next, last])

    def keep(self, places: Sequence[int]) -> None:
        if len(places) < len(self.rows):
            self._next = self._next[mx.array(list(places), mx.int32)]
            self._scores = self._scores.kept(places)
        super().keep(places)

    def advance(self, forward: Forward) -> list[NewToken]:
        """The tokens that the last pass chose, none for rows that have just joined; begins the next pass."""
        rows, chosen, scores = self.rows, self._next, self._scores
        known = [row.n_chosen > 0 and not row.ended for row in rows]
        last = [place for place, row in enumerate(rows) if row.n_chosen >= row.most and not row.ended]
        layers = self._extracted(last)
        self._end(last)
        if self.rows:
            self._pass(forward)
        tokens: list[NewToken] = []
        for place, token in enumerate(np.array(chosen).tolist()):
            if known[place]:
                row = rows[place]
                row.tokens.append(token)
                cached = row.cached if row.n_given == 1 else 0
                tokens.append(NewToken(row.number, token, row.finish(token), *scores.of(place), cached))
        stopped = {token.request for token in tokens if token.finish is not None}
        places = [place for place, row in enumerate(self.rows) if row.number in stopped and not row.ended]
        layers |= self._extracted(places)
        if self._on_ended is not None:
            for row, row_layers in layers.items():
                self._on_ended(row, row_layers)
        self._end(places)
        return tokens

    def _end(self, places: Sequence[int]) -> None:
        """These rows get no further token. Those that have ended leave if they are too many."""
        for place in places:
            self.rows[place].ended = True
        n_ended = len(self.rows) - self.under_way
        if n_ended == len(self.rows) or n_ended > self._idle * len(self.rows):
            self.keep([place for place, row in enumerate(self.rows) if not row.ended])

    def _extracted(self, places: Sequence[int]) -> dict[EngineRow, list[Any]]:
        """The caches of these rows that are kept."""
        if self._on_ended is None:
            return {}
        rows = {place: self.rows[place] for place in places}
        return {row: self.extract(place) for place, row in rows.items() if row.request.digest is not None}

    def _pass(self, forward: Forward) -> None:
        """Read the tokens that were chosen last, and choose the next ones. Nothing waits for the result."""
        rows, inputs = self.rows, self._next
        logits = raw = forward(rows, inputs[:, None], self.layers)[:, -1]
        if any(row.edits for row in rows):
            logits = mx.stack(
                [
                    row.edits(logits[place], inputs[place : place + 1] if row.n_chosen else None)
                    if row.edits
                    else logits[place].astype(mx.float32)
                    for place, row in enumerate(rows)
                ]
            )
        if any(row.request.constraint for row in rows):
            mx.async_eval(logits)  # the device computes while the masks are made
            logits = self._masked(logits, np.array(inputs).tolist())
        keys = [row.draws.key(row.n_chosen) if row.draws else None for row in rows]
        requests = [row.request for row in rows]
        self._next = choose(logits, requests, keys).astype(mx.uint32)
        self._scores = Scores(raw, self._next, requests)
        mx.async_eval(self._next, *self._scores.arrays)
        for row in rows:
            row.read += not row.ended

    def _masked(self, logits: mx.array, tokens: Sequence[int]) -> mx.array:
        """(B, V) with −inf where the constraint of the row forbids. ``tokens``: what was generated last."""
        logits = mx.array(logits)  # the raw logits stay as they are
        places: list[int] = []
        masks: list[np.ndarray] = []
        for place, row in enumerate(self.rows):
            if (constraint := row.request.constraint) is None or row.ended:
                continue
            if row.n_chosen and tokens[place] in row.ends:
                continue  # it has ended: what this pass chooses for it is dropped
            if row.n_chosen:
                constraint.advance(tokens[place])
            if (mask := _mask(constraint, logits.shape[-1])) is not None:
                places.append(place)
                masks.append(mask)
        if places:
            rows = mx.array(places)
            logits[rows] = mx.where(mx.array(np.stack(masks)), logits[rows], -mx.inf)
        return logits


def _mask(constraint: TokenConstraint, size: int) -> np.ndarray | None:
    """(V,) bool: what may follow."""
    allowed = constraint.allowed()
    if allowed is None or len(allowed) == size:
        return allowed
    mask = np.zeros(size, bool)  # a head may have more rows than the tokenizer has tokens
    mask[: len(allowed)] = allowed[:size]
    return mask
