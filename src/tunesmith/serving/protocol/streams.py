"""Server-sent events: an answer while it is made."""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import aclosing
from typing import Any, NamedTuple, Protocol
from urllib.parse import quote

from starlette.responses import Response, StreamingResponse
from starlette.types import Send

from tunesmith.serving import access, entrance
from tunesmith.serving.answering import Delivery
from tunesmith.serving.rejections import Rejection

IN_HEADERS = "/:@+=,()[] "
"""What stands in a header as it is, beside letters, digits and ``_.-~``."""


class ServerEvent(NamedTuple):
    """``data``: an object, or a word. ``name``: the kind of event, or None if the protocol names none."""

    data: Mapping[str, Any] | str
    name: str | None = None

    @property
    def line(self) -> bytes:
        text = self.data if isinstance(self.data, str) else json.dumps(self.data, ensure_ascii=False)
        name = f"event: {self.name}\n" if self.name else ""
        return f"{name}data: {text}\n\n".encode()


class EventStream(StreamingResponse):
    """Cannot be kept, and no proxy may hold it back."""

    def __init__(self, lines: AsyncGenerator[bytes], headers: Mapping[str, str]) -> None:
        own = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
        super().__init__(lines, headers={**own, **headers}, media_type="text/event-stream")
        self._lines = lines

    async def stream_response(self, send: Send) -> None:
        """``lines`` end with the response, also if the client has gone while it was sent a line."""
        async with aclosing(self._lines):
            await super().stream_response(send)


class Exchange(Protocol):
    """Questions and their answers, in the shape of one protocol."""

    @property
    def headers(self) -> dict[str, str]: ...

    async def whole(self) -> Response:
        """The complete answers. Raises what `rejection_of` understands."""
        ...

    def events(self) -> AsyncGenerator[ServerEvent]:
        """The answers while they are made. Raises what `rejection_of` understands."""
        ...

    def broken_off(self, rejection: Rejection) -> ServerEvent:
        """The last event of answers that break off."""
        ...


async def respond(exchange: Exchange, stream: bool | None) -> Response:
    """The answers, as a stream of events or as one body. Raises what `rejection_of` understands."""
    if not stream:
        return await exchange.whole()
    return EventStream(_lines(await _begun(exchange.events()), exchange), exchange.headers)


async def _begun(events: AsyncGenerator[ServerEvent]) -> AsyncGenerator[ServerEvent]:
    """``events``, of which the first has come: what goes wrong before it is an error of the request, with a
    status. Raises what ``events`` raises."""
    first = await anext(events)

    async def all_of_them() -> AsyncGenerator[ServerEvent]:
        async with aclosing(events):
            yield first
            async for event in events:
                yield event

    return all_of_them()


async def _lines(events: AsyncGenerator[ServerEvent], exchange: Exchange) -> AsyncGenerator[bytes]:
    """The bytes of ``events``. An error ends them with an event that tells of it."""
    try:
        async with aclosing(events):
            async for event in events:
                yield event.line
    except Exception as error:
        yield exchange.broken_off(entrance.failure(error)).line


def fallback_headers(deliveries: Sequence[Delivery]) -> dict[str, str]:
    """Says which model answered instead of the one that was asked, and why. The name is percent-encoded,
    since a header holds ASCII only."""
    instead = [
        f"{quote(delivery.served.name, safe=IN_HEADERS)}; {delivery.fallback}"
        for delivery in deliveries
        if delivery.fallback
    ]
    return {"X-Tunesmith-Fallback": instead[0]} if instead else {}


def fallback_fields(deliveries: Sequence[Delivery]) -> dict[str, Any]:
    """The same within a body; and what guardrails did, each once."""
    instead = [
        {"index": index, "model": delivery.served.name, "reason": delivery.fallback}
        for index, delivery in enumerate(deliveries)
        if delivery.fallback
    ]
    detected = list(dict.fromkeys(access.current().guardrails))
    return {**({"fallback": instead} if instead else {}), **({"guardrails": detected} if detected else {})}
