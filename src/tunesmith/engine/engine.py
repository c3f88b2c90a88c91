"""One batch of continuations: requests join while others are under way, and leave when they end or are
cancelled.

mlx-lm's BatchGenerator schedules prompts and tokens, or `SeparateRows` where it gives other answers. With a
`Routing` each row has an adapter of its own: its name lies beside the row's keys and values as one more
layer of its cache, so that it follows the row when prompts are read, rows join, and rows leave; the adapters
are selected from it just before each pass. The engine knows no HTTP and no runs, and MLX is used on the
caller's thread only."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from contextlib import ExitStack
from types import TracebackType
from typing import Any, cast

import mlx.core as mx
import mlx.nn as nn

from tunesmith.adapters.routing import Routing
from tunesmith.engine.prefixes import Prefixes
from tunesmith.engine.requests import Finish, NewToken, Request, sampler
from tunesmith.engine.separate import SeparateRows
from tunesmith.errors import ModelError
from tunesmith.events import Notice, Sink
from tunesmith.model import abilities, kernels, vocabulary
from tunesmith.model.loading import evaluating

PREFILL = 8
"""Most prompts that are read in one pass."""


def notify_if_separate(net: nn.Module, notify: Sink) -> None:
    """Notice that ``net`` generates each answer in passes of its own, if it does."""
    if not abilities.batches(net):
        text = "answers are generated one by one, which is slower: batched, this model would give others"
        notify(Notice(text, where="model"))


class _Exact:
    """`mlx.core` for mlx-lm's generator: its sum over the vocabulary is `kernels.log_sums`."""

    def __getattr__(self, name: str) -> Any:
        return getattr(mx, name)

    def logsumexp(self, logits: mx.array, axis: int = -1, keepdims: bool = False) -> mx.array:
        sums = kernels.log_sums(logits).astype(logits.dtype)
        return sums[..., None] if keepdims else sums


_EXACT = _Exact()


class RowAdapters:
    """The adapters of the rows of a batch, in the shape of one more layer of their cache."""

    def __init__(self, names: Sequence[str | None]) -> None:
        self.names = list(names)

    @classmethod
    def merge(cls, rows: Sequence[RowAdapters]) -> RowAdapters:
        return cls([name for row in rows for name in row.names])

    def extend(self, other: RowAdapters) -> None:
        self.names += other.names

    def filter(self, keep: Sequence[int]) -> None:
        self.names = [self.names[place] for place in keep]

    def extract(self, place: int) -> RowAdapters:
        return RowAdapters([self.names[place]])

    def prepare(self, **padding: object) -> None:
        """Names need no padding."""

    def finalize(self) -> None:
        """Names were not padded."""

    @property
    def state(self) -> list[mx.array]:
        return []

    @property
    def nbytes(self) -> int:
        return 0


class Engine:
    """A context manager: inside, dropout of ``net`` is off; leaving it drops what is not finished.

    ``batch_size``: most continuations under way at once; the others wait. ``routing``: adapters on ``net``
    that requests may name; without it no request may name one. Where batched answers differ from single ones
    (`abilities.batches`), each continuation has passes of its own."""

    def __init__(
        self,
        net: nn.Module,
        batch_size: int = 16,
        routing: Routing | None = None,
        *,
        prefill_tokens: int = 512,
        prefixes: Prefixes | None = None,
        kv_bits: int | None = None,
    ) -> None:
        self._net, self._routing, self._batch_size = net, routing, batch_size
        self._inside = ExitStack()
        self._batch: Any = None
        self._stops: dict[tuple[int, ...], Any] = {}

    def __enter__(self) -> Engine:
        generator: Any = importlib.import_module("mlx_lm.generate")
        generator.mx = _EXACT
        with ExitStack() as inside:
            inside.enter_context(evaluating(self._net))
            if self._routing is not None:
                inside.callback(self._routing.select, None)  # later passes meet the base alone
            model = self._net if self._routing is None else cast("nn.Module", self._routed)
            if abilities.batches(self._net):
                self._batch = generator.BatchGenerator(
                    model,
                    completion_batch_size=self._batch_size,
                    prefill_batch_size=min(PREFILL, self._batch_size),
                    stream=mx.default_stream(mx.default_device()),
                )
            else:
                self._batch = SeparateRows(model, self._net, self._batch_size)
            inside.callback(self._batch.close)  # gives the process its wired limit back
            self._inside = inside.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._inside.close()

    def submit(self, requests: Sequence[Request]) -> list[int]:
        """A number for each request, in their order; the longest prompts begin first. Raises ModelError, and
        takes none of them, if one is empty, allows no token, has an id that the model does not know, or
        names an adapter that is not here."""
        from mlx_lm.models.cache import make_prompt_cache

        for place, request in enumerate(requests):
            request.require(place)
            if self._routing is None and request.adapter is not None:
                raise ModelError(f"there is no adapter {request.adapter!r}", hint="the engine has no routing")
        prompts = [(f"prompt {place}", request.ids) for place, request in enumerate(requests)]
        vocabulary.require_known(self._net, prompts)
        if self._routing is not None:
            self._routing.require([request.adapter for request in requests])
        order = sorted(range(len(requests)), key=lambda place: -len(requests[place].ids))
        ordered = [requests[place] for place in order]
        caches = None
        if self._routing is not None:
            caches = [[*make_prompt_cache(self._net), RowAdapters([request.adapter])] for request in ordered]
        samplers = [sampler(request) for request in ordered]
        numbers = self._batch.insert(
            [[*map(int, request.ids)] for request in ordered],
            [self._most(request) for request in ordered],
            caches=caches,
            samplers=samplers if any(samplers) else None,
            stop_sequences=[self._stop(request.end_ids) for request in ordered],
        )
        by_place = dict(zip(order, numbers, strict=True))
        return [by_place[place] for place in range(len(requests))]

    def step(self) -> list[NewToken]:
        """At most one new token for each request under way; empty when none is left."""
        return [
            NewToken(response.uid, response.token, cast("Finish | None", response.finish_reason))
            for response in self._batch.next_generated()
        ]

    def cancel(self, numbers: Sequence[int]) -> None:
        """Free the rows of these requests; those that have finished already are passed over."""
        self._batch.remove(list(numbers))

    def _most(self, request: Request) -> int:
        """Tokens that ``request`` may have: a model with a longest sequence stops there."""
        positions = vocabulary.limits(self._net).positions
        if positions is None:
            return request.max_tokens
        return min(request.max_tokens, positions - len(request.ids) + 1)  # the last token is not read

    def _routed(self, tokens: mx.array, cache: list[Any]) -> mx.array:
        """(B, T) → (B, T, V) logits, each row with its own adapter."""
        assert self._routing is not None
        self._routing.select(cache[-1].names)
        return self._net(tokens, cache=cache[:-1])

    def _stop(self, end_ids: Sequence[int]) -> Any:
        from mlx_lm.generate import StopSequences

        ends = tuple(end_ids)
        if ends not in self._stops:
            self._stops[ends] = StopSequences([[end] for end in ends] or None)
        return self._stops[ends]
