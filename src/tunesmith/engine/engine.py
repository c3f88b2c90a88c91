"""One batch of continuations: requests join while others are under way, and leave when they end or are
cancelled.

Each step gives every row that is under way its next token, in one pass, and then reads one chunk of the
prompts that wait. With a `Routing` each row has an adapter of its own. Where batched answers differ from
single ones (`batching.batches`), each row has passes of its own. The engine knows no HTTP and no runs, and
MLX is used on the caller's thread only."""

from __future__ import annotations

import copy
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from types import TracebackType
from typing import Any, cast

import mlx.core as mx
import mlx.nn as nn

from tunesmith.adapters.routing import Routing
from tunesmith.engine import batching, caches
from tunesmith.engine.prefixes import Prefixes, common_length
from tunesmith.engine.requests import NewToken, Request
from tunesmith.engine.rows import Decoding, EngineRow, Forward, RowBatch
from tunesmith.engine.speculation import Speculation
from tunesmith.errors import ModelError
from tunesmith.events import Notice, Sink
from tunesmith.model import vocabulary
from tunesmith.model.loading import evaluating

PROMPTS_OF_A_PASS = 8
"""Most prompts that are read in one pass."""
READ_AT_ONCE = 2048
"""Most tokens of one prompt that a pass reads when no answer is being streamed."""
UNLIMITED = PROMPTS_OF_A_PASS * READ_AT_ONCE
"""Chunk size when no answer is being streamed: positions, padding included."""
WORTH_WAITING = 64
"""Fewest tokens that a prompt has in common with one that is being read, for it to wait for them."""
STEPS_BETWEEN_CLEARING = 512
"""Decode steps between two times that MLX's unused buffers are given back."""


def notify_if_separate(net: nn.Module, notify: Sink) -> None:
    """Notice that ``net`` generates each answer in passes of its own, if it does."""
    if not batching.batches(net):
        text = "answers are generated one by one, which is slower: batched, this model would give others"
        notify(Notice(text, where="model"))


class Engine:
    """A context manager: inside, dropout of ``net`` is off; leaving it drops what is not finished.

    ``batch_size``: most continuations under way at once; the others wait. ``routing``: adapters on ``net``
    that requests may name; without it no request may name one. ``prefill_tokens``: most positions, padding
    included, that one chunk of prompts has, so that a long prompt delays nobody's next token by more.
    ``prefixes``: where prompts that were read are kept for later ones. ``kv_bits``: 8 or 4 keeps keys and
    values in so many bits. ``speculation``: guesses tokens of a request that is under way alone, if the cache
    of the model is always trimmable. ``idle``: the share of the batch that may be rows that have ended,
    whose further tokens are dropped: letting rows leave or join copies all keys and values."""

    def __init__(
        self,
        net: nn.Module,
        batch_size: int = 16,
        routing: Routing | None = None,
        *,
        prefill_tokens: int = 512,
        prefixes: Prefixes | None = None,
        kv_bits: int | None = None,
        speculation: Speculation | None = None,
        idle: float = 0.0,
    ) -> None:
        self._net, self._routing, self._batch_size = net, routing, batch_size
        self._prefill_tokens, self._prefixes, self._kv_bits = max(1, prefill_tokens), prefixes, kv_bits
        self._grows = prefixes is not None and prefixes.grows
        self._speculation, self._idle = speculation, idle
        self._inside = ExitStack()
        self._together = True
        self._waiting: deque[EngineRow] = deque()
        self._reading: RowBatch | None = None
        self._decoding: list[Decoding] = []
        self._count = self._steps = 0
        self._empty: list[Any] = []
        self._growth: list[caches.CacheGrowth] = []
        self._longest: int | None = None

    def __enter__(self) -> Engine:
        """Raises ModelError if the model's keys and values cannot be kept in ``kv_bits``."""
        with ExitStack() as inside:
            inside.enter_context(evaluating(self._net))
            if self._routing is not None:
                inside.callback(self._routing.select, None)  # later passes meet the base alone
            self._together = batching.batches(self._net)
            self._empty = caches.new_cache(self._net, self._kv_bits)
            self._growth = caches.growth(self._net, self._kv_bits)
            if not caches.always_trimmable(self._growth):
                self._speculation = None  # guesses that are not chosen could not be taken back
            self._longest = vocabulary.limits(self._net).positions
            if self._longest is not None:
                self._idle = 0.0  # a row that stays after its end would pass the last position
            if (limit := _wired_limit()) is not None:
                inside.callback(mx.set_wired_limit, limit)
                inside.callback(mx.synchronize)
            inside.callback(self._drop)
            self._inside = inside.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._inside.close()

    @property
    def busy(self) -> bool:
        """Whether a request waits or is under way."""
        return bool(self._waiting or self._reading or self._decoding)

    def cost(self, request: Request) -> int:
        """Bytes of keys and values that ``request`` needs if it gets all the tokens that it may have. Rows of
        a batch are padded to the longest of them. May be called from another thread."""
        positions = len(request.ids) + self._most(request)
        return self._cache_bytes(positions)

    def submit(self, requests: Sequence[Request]) -> list[int]:
        """A number for each request, in their order; the longest prompts begin first. Raises ModelError, and
        takes none of them, if one is empty, allows no token, has an option out of its range, has an id that
        the model does not know, names an adapter that is not here, or names another one than the unfinished
        requests if a pass can have only one."""
        for place, request in enumerate(requests):
            request.require(place)
            if self._routing is None and request.adapter is not None:
                raise ModelError(f"there is no adapter {request.adapter!r}", hint="the engine has no routing")
        prompts = [(f"prompt {place}", request.ids) for place, request in enumerate(requests)]
        biased = [
            (f"logit_bias of prompt {place}", list(request.logit_bias))
            for place, request in enumerate(requests)
        ]
        vocabulary.require_known(self._net, prompts)
        vocabulary.require(vocabulary.limits(self._net).ids, biased)
        if self._routing is not None:
            self._routing.require([request.adapter for request in requests])
            if self._together:
                unfinished = [*(row.request for row in self._rows()), *requests]
                self._routing.require_one_pass(request.adapter for request in unfinished)
        numbers = list(range(self._count, self._count + len(requests)))
        self._count += len(requests)
        rows = [
            EngineRow(number, request, self._most(request))
            for number, request in zip(numbers, requests, strict=True)
        ]
        self._waiting.extend(sorted(rows, key=lambda row: -len(row.request.ids)))
        return numbers

    def _rows(self) -> Iterator[EngineRow]:
        """Those that wait or are under way."""
        yield from self._waiting
        for batch in [self._reading, *self._decoding]:
            yield from batch.rows if batch is not None else ()

    def step(self) -> list[NewToken]:
        """At most one new token for each request under way; empty if none is left. Reads as many chunks of
        prompts as it takes until there is a token."""
        while self.busy:
            if tokens := self.advance():
                return tokens
        return []

    def advance(self) -> list[NewToken]:
        """Like `step`, but reads one chunk of prompts at most (with ``idle`` as many as fill the batch), so
        it may be empty while the engine is `busy`: a server takes up what was submitted and cancelled
        meanwhile."""
        forward = self._decode_forward()
        tokens = [token for batch in self._decoding for token in batch.advance(forward)]
        self._decoding = [batch for batch in self._decoding if batch.rows]
        if self._speculation is not None and not self._decoding:
            self._speculation.settle()
        self._steps += 1
        if self._steps % STEPS_BETWEEN_CLEARING == 0:
            mx.clear_cache()
        self._admit()
        while self._reading is not None:
            self._read(self._reading)
            if not self._idle:
                break
            self._admit(filling=True)  # nobody waits for a token: first the batch is filled
        return tokens

    def cancel(self, numbers: Sequence[int]) -> None:
        """Free the rows of these requests; those that have finished already are passed over."""
        if self._speculation is not None:
            self._speculation.settle()
        cancelled = set(numbers)
        self._waiting = deque(row for row in self._waiting if row.number not in cancelled)
        batches = [*self._decoding, *([self._reading] if self._reading else [])]
        for batch in batches:
            batch.keep([place for place, row in enumerate(batch.rows) if row.number not in cancelled])
        self._decoding = [batch for batch in self._decoding if batch.rows]
        if self._reading is not None and not self._reading.rows:
            self._reading = None

    def _admit(self, filling: bool = False) -> None:
        """Let waiting rows begin while there is room: their prompts are read next."""
        # At least two tokens of each: mlx-lm's cache of a sliding window goes wrong where a pass over several
        # tokens of several rows follows one over single tokens.
        most = max(PROMPTS_OF_A_PASS, int(self._idle * self._batch_size))
        at_once = max(1, min(most, self._prefill_tokens // 2)) if self._together else 1
        later: list[EngineRow] = []
        begun: dict[EngineRow, list[Any]] = {}
        decoding = sum(batch.under_way for batch in self._decoding)
        worth = min(len(self._waiting), int(self._idle * self._batch_size))
        if not filling and self._reading is None and decoding and self._batch_size - decoding < worth:
            return
        while self._waiting:
            reading = [*(self._reading.rows if self._reading is not None else []), *begun]
            under_way = len(reading) + sum(batch.under_way for batch in self._decoding)
            if under_way >= self._batch_size or (len(reading) >= at_once and not self._short(reading)):
                break
            row = self._waiting.popleft()
            if row.reader is None or row.reader not in reading:
                row.reader = self._reader_for(row, reading)
            if row.reader is not None:
                later.append(row)
                continue
            layers = self._cache_of(row)
            if row.unread:
                begun[row] = layers
            else:
                self._begin(RowBatch.of([row], [layers], not self._together))
        self._waiting.extendleft(reversed(later))
        if begun:
            batch = RowBatch.of([*begun], [*begun.values()], not self._together)
            if self._reading is None:
                self._reading = batch
            else:
                self._reading.join(batch)

    def _short(self, reading: Sequence[EngineRow]) -> bool:
        """Whether one prompt more can be read in the same pass, of `READ_AT_ONCE` positions, while nobody
        waits for a token: rows that join others later have all keys and values copied."""
        longest = max(row.unread for row in reading)  # the longest prompts begin first
        return self._idle > 0 and self._together and (len(reading) + 1) * longest <= READ_AT_ONCE

    def _reader_for(self, row: EngineRow, reading: Sequence[EngineRow]) -> EngineRow | None:
        """The row among ``reading`` whose prefix is worth waiting for."""
        if self._prefixes is None or not self._grows or row.request.digest is None:
            return None
        digest = row.request.digest
        shared = [
            (self._shared(row, other), place)
            for place, other in enumerate(reading)
            if other.request.digest == digest
        ]
        longest, place = max(shared, default=(0, 0))
        if longest < WORTH_WAITING:
            return None
        known = self._prefixes.length(self._key(digest), row.read_first)
        return reading[place] if longest >= WORTH_WAITING + known else None

    def _shared(self, row: EngineRow, other: EngineRow) -> int:
        """Tokens at the beginning of ``row`` that the prefix of ``other`` will serve for."""
        assert self._prefixes is not None
        length = len(other.read_first)
        common = common_length(row.read_first, other.read_first)
        if common < length and not all(layer.trimmable(length) for layer in self._growth):
            return 0
        return common if self._cache_bytes(length) <= self._prefixes.limit else 0

    def _cache_bytes(self, positions: int) -> int:
        return sum(layer.bytes(positions, self._prefill_tokens) for layer in self._growth)

    def _cache_of(self, row: EngineRow) -> list[Any]:
        """The cache that ``row`` begins with: of the longest known beginning of its prompt, or empty."""
        if self._prefixes is not None and row.request.digest is not None:
            known = self._prefixes.find(self._key(row.request.digest), row.read_first)
            if known is not None:
                layers, row.cached = known
                row.read = row.cached
                return layers
        return copy.deepcopy(self._empty)

    def _keep(self, row: EngineRow, layers: list[Any]) -> None:
        """Keep what ``row`` has read for later prompts."""
        assert self._prefixes is not None and row.request.digest is not None
        if self._speculation is not None:
            caches.trim(layers, self._speculation.surplus(row))
        self._prefixes.add(self._key(row.request.digest), row.tokens[: row.read], layers)

    def _key(self, digest: str) -> str:
        return digest if self._kv_bits is None else f"{digest} in {self._kv_bits} bits"

    def _read(self, batch: RowBatch) -> None:
        """Read one chunk of the prompts of ``batch``; what is read but for its last token begins."""
        batch.read(self._forward, max(1, self._prefill_tokens // len(batch.rows)))
        done = [place for place, row in enumerate(batch.rows) if not row.unread]
        if not done:
            return
        for place in done:
            row = batch.rows[place]
            if self._grows and row.request.digest is not None:
                self._keep(row, batch.extract(place))
        ready = batch.take(done)
        if not batch.rows:
            self._reading = None
        self._begin(ready)

    def _begin(self, batch: RowBatch) -> None:
        if self._together and self._decoding:
            self._decoding[0].add(batch)
        else:
            self._decoding.append(Decoding(batch, self._keep if self._grows else None, self._idle))

    def _decode_forward(self) -> Forward:
        """How the next tokens are computed: with guesses if one row is under way and none waits."""
        if self._speculation is None:
            return self._forward
        others = len(self._waiting) + (len(self._reading.rows) if self._reading is not None else 0)
        if others + sum(len(batch.rows) for batch in self._decoding) == 1 and self._decoding:
            return self._speculation.over(self._forward)
        self._speculation.settle()
        return self._forward

    def _forward(self, rows: Sequence[EngineRow], tokens: mx.array, layers: list[Any]) -> mx.array:
        """(B, T) → (B, T, V) logits, each row with its own adapter."""
        if self._routing is not None:
            self._routing.select([row.request.adapter for row in rows])
        return cast(Any, self._net)(tokens, cache=layers)

    def _most(self, request: Request) -> int:
        """Tokens that ``request`` may have: a model with a longest sequence stops there."""
        if self._longest is None:
            return request.max_tokens
        return min(request.max_tokens, self._longest - len(request.ids) + 1)  # the last token is not read

    def _drop(self) -> None:
        self._waiting, self._reading, self._decoding = deque(), None, []
        if self._speculation is not None:
            self._speculation.settle()


def _wired_limit() -> int | None:
    """Let Metal wire as much memory as it recommends. Returns the limit before, or None off Metal."""
    recommended = mx.device_info().get("max_recommended_working_set_size")
    return None if recommended is None else mx.set_wired_limit(int(recommended))
