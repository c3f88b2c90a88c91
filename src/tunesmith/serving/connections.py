"""How long may a connection be idle, and how many may there be? What uvicorn leaves without a limit."""

from __future__ import annotations

import asyncio
from functools import partial
from typing import Any, cast

from uvicorn.protocols.http.h11_impl import H11Protocol

from tunesmith.serving.limits import ServerLimits

LATER_S = 1.0
"""Added to ``stall_s``, so that `Entrance` notes the client in the log before its connection is closed."""


class LimitedConnection(H11Protocol):
    """One connection. It is closed at once, with what was not sent yet, if there are too many, if the head of
    a request does not arrive in time, or if the client does not read."""

    def __init__(self, limits: ServerLimits, **options: Any) -> None:
        super().__init__(**options)
        self._limits = limits
        self._head: asyncio.TimerHandle | None = None
        self._stall: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(cast("asyncio.Transport", transport))
        if len(self.connections) > self._limits.connections:
            self.transport.abort()
        else:
            self._await_head()

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self._head, self._stall = _cancelled(self._head), _cancelled(self._stall)

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self.cycle is not None and not self.cycle.response_complete:
            self._head = _cancelled(self._head)
        elif self._head is None:
            self._await_head()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._stall = self.loop.call_later(self._limits.stall_s + LATER_S, self.transport.abort)

    def resume_writing(self) -> None:
        super().resume_writing()
        self._stall = _cancelled(self._stall)

    def timeout_keep_alive_handler(self) -> None:
        super().timeout_keep_alive_handler()  # it waits until the client has read everything
        self._stall = _cancelled(self._stall)
        self._stall = self.loop.call_later(self._limits.stall_s, self.transport.abort)

    def _await_head(self) -> None:
        self._head = self.loop.call_later(self._limits.body_s, self.transport.abort)


def _cancelled(timer: asyncio.TimerHandle | None) -> None:
    """Cancel ``timer``. The result is what its attribute holds from then on."""
    if timer is not None:
        timer.cancel()


def connection_class(limits: ServerLimits) -> type[asyncio.Protocol]:
    """What uvicorn makes of each connection."""
    return cast("type[asyncio.Protocol]", partial(LimitedConnection, limits))
