"""The tokens of one request, on their way from the engine's thread to the task that waits for them."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable
from typing import Protocol

from tunesmith.engine.requests import NewToken, Request
from tunesmith.errors import TunesmithError


class Observer(Protocol):
    """Gets, on the event loop, the tokens of one request."""

    def token(self, token: NewToken) -> None: ...


class TokenStream:
    """Is used on the event loop. ``cost``: bytes of keys and values. ``over``: no token follows."""

    def __init__(self, request: Request, cost: int, observer: Observer | None) -> None:
        self.request, self.cost, self._observer = request, cost, observer
        self.tokens: deque[NewToken] = deque()
        self.sent: list[int] = []
        """Of the engine's thread: tokens that were sent here."""
        self.n_repeated = 0
        """Of the engine's thread: how many tokens the request has made, less than were sent if it was asked
        again."""
        self.begun = time.monotonic()
        self.error: TunesmithError | None = None
        self.over = False
        self.timers: list[asyncio.TimerHandle] = []
        self.changed = asyncio.Event()
        """Set by a token or an error."""

    def put(self, token: NewToken) -> None:
        if self.over:
            return
        if len(self.timers) == 2:
            self.timers.pop(0).cancel()  # of the first token
        self.tokens.append(token)
        if self._observer is not None:
            self._observer.token(token)
        if token.finish is not None:
            self.end()
        self.changed.set()

    def fail(self, error: TunesmithError) -> None:
        if not self.over:
            self.error = error
            self.end()
            self.changed.set()

    def end(self) -> None:
        """No token follows."""
        self.over = True
        for timer in self.timers:
            timer.cancel()
        self.timers = []


class Answering:
    """An async iterator over the tokens of one request. It raises EngineDied, TimedOut or Draining if the
    answer cannot be finished. If the task that waits for a token is cancelled, or nobody holds this object
    any more, the request is cancelled."""

    def __init__(self, stream: TokenStream, cancel: Callable[[TokenStream], None]) -> None:
        self._stream, self._cancel = stream, cancel

    def __aiter__(self) -> Answering:
        return self

    async def __anext__(self) -> NewToken:
        stream = self._stream
        while not stream.tokens:
            if stream.error is not None:
                raise stream.error
            if stream.over:
                raise StopAsyncIteration
            stream.changed.clear()
            try:
                await stream.changed.wait()
            except asyncio.CancelledError:
                self.cancel()
                raise
        return stream.tokens.popleft()

    def cancel(self) -> None:
        """Free the request's row; tokens that were made already can still be read. Does nothing if it has
        ended."""
        self._cancel(self._stream)

    def __del__(self) -> None:
        if not self._stream.over:
            self._cancel(self._stream)
