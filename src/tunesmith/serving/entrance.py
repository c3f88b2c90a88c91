"""What every HTTP request passes on its way to a handler: its sender, its key, the size of its body; and what
is noted when it has ended.

When the client goes, the handler is cancelled, and with it what the engine does for it."""

from __future__ import annotations

import asyncio
import os
import time
import traceback
from contextlib import suppress
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from tunesmith.events import Notice
from tunesmith.serving import access
from tunesmith.serving.access import AccessRecord
from tunesmith.serving.rejections import Rejection, rejection_of
from tunesmith.serving.service import Service

OPEN_PATHS = ("/", "/health")
"""Paths for which no key is needed. They take no body: anyone could fill the memory with it."""
LOOPBACK = ("127.0.0.1", "localhost", "::1")
ADMIN = "/admin/"


class Entrance:
    """``app`` behind the checks of ``service``."""

    def __init__(self, app: ASGIApp, service: Service) -> None:
        self._app, self._service = app, service

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers, begun = Headers(scope=scope), time.monotonic()
        record = AccessRecord(method=scope["method"], path=scope["path"])
        if scope.get("client"):
            record.client = scope["client"][0]
        access.begin(record)
        exchange = _Exchange(record, self._service.limits.stall_s, send, self._service.log.contents)
        try:
            self._admit(headers, record)
            with self._service.exchange(record):
                body = await self._body(headers, receive, record.path)
                exchange.asked(body)
                await self._while_connected(scope, body, receive, exchange)
        except Rejection as rejection:
            record.error = rejection.code or rejection.kind
            if not exchange.begun:
                response = JSONResponse(
                    rejection.body_for(record.path), rejection.status, headers=dict(rejection.headers)
                )
                await response(scope, receive, exchange.send)
        except ClientGone:
            record.error = "stalled"
        except Exception as error:  # the app has told the client that it failed
            record.error = record.error or "failed"
            text = f"a request could not be answered: {type(error).__name__}: {error}"
            self._service.notify(Notice(text, level="warning", where=record.path, hint=f"id {record.id}"))
            if os.environ.get("TUNESMITH_DEBUG"):
                traceback.print_exception(error)
        finally:
            record.seconds = round(time.monotonic() - begun, 6)
            exchange.answered()
            self._service.note(record, endpoint(scope))

    def _admit(self, headers: Headers, record: AccessRecord) -> None:
        """Raises Rejection if the sender may not ask."""
        service = self._service
        if service.loopback:
            _require_local(headers)
        if origin := headers.get("origin"):
            if _netloc(origin) != headers.get("host", ""):
                message = f"pages of {origin[:200]} may not ask this server"
                raise Rejection(403, message, code="foreign_origin")
        if record.path in OPEN_PATHS:
            return
        key = service.doorkeeper.require(headers)
        if key is not None:
            record.key = key.name
            service.doorkeeper.count(key)
        if record.path.startswith(ADMIN) and not (key and key.admin):
            message = 'needs a key with "admin": true in the server\'s --keys file'
            raise Rejection(403, f"{record.path} {message}", code="admin_only")
        if service.worker.draining and record.method == "POST":
            headers_ = {"Retry-After": "5", "Connection": "close"}
            raise Rejection(503, "the server is ending", code="draining", headers=headers_)

    async def _body(self, headers: Headers, receive: Receive, path: str) -> bytes:
        """All of the body. Raises Rejection if it is too large, or does not arrive in time."""
        limits = self._service.limits
        most, text = int(limits.body_mb * 1e6), f"the body has more than {limits.body_mb:g} MB"
        if path in OPEN_PATHS:
            most, text = 0, f"{path} takes no body"
        too_large = Rejection(413, text, code="body_too_large")
        if int(headers.get("content-length", 0)) > most:  # h11 lets only digits through
            raise too_large
        parts, size = [], 0
        try:
            async with asyncio.timeout(limits.body_s):
                while True:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        raise Rejection(400, "the client went", code="disconnected")
                    parts.append(message.get("body", b""))
                    size += len(parts[-1])
                    if size > most:
                        raise too_large
                    if not message.get("more_body", False):
                        return b"".join(parts)
        except TimeoutError:
            text = f"the body did not arrive within {limits.body_s:g} s"
            raise Rejection(408, text, code="body_too_slow") from None

    async def _while_connected(
        self, scope: Scope, body: bytes, receive: Receive, exchange: _Exchange
    ) -> None:
        """Let the app answer, and cancel it when the client goes."""
        # With this version, starlette leaves it to others to notice that the client has gone.
        scope["asgi"] = {**scope["asgi"], "spec_version": "2.4"}
        handler = asyncio.ensure_future(self._app(scope, exchange.receiver(body), exchange.send))
        watcher = asyncio.create_task(_gone(receive))
        try:
            await asyncio.wait({handler, watcher}, return_when=asyncio.FIRST_COMPLETED)
            if not handler.done() and not exchange.complete:
                exchange.record.ended = "cancelled"
                handler.cancel()
            with suppress(asyncio.CancelledError):
                await handler
        finally:
            watcher.cancel()
            handler.cancel()


class ClientGone(Exception):
    """The client has not read its answer for too long."""


class _Exchange:
    """One request and its response, as the app sees them. ``keeps``: whether their contents are logged."""

    def __init__(self, record: AccessRecord, stall_s: float, send: Send, keeps: bool) -> None:
        self.record, self._stall_s, self._send, self._keeps = record, stall_s, send, keeps
        self.begun = self.complete = False
        self._parts: list[bytes] = []

    def asked(self, body: bytes) -> None:
        """Note ``body`` for the log."""
        if self._keeps and body:
            self.record.contents["request"] = body.decode("utf-8", "replace")

    def answered(self) -> None:
        """Note what was sent for the log."""
        if self._keeps and self._parts:
            self.record.contents["response"] = b"".join(self._parts).decode("utf-8", "replace")

    def receiver(self, body: bytes) -> Receive:
        """Gives the app the body, once; then it waits for ever: `Entrance` cancels the app when the client
        goes."""
        messages: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

        async def receive() -> Message:
            if messages:
                return messages.pop()
            return await asyncio.get_running_loop().create_future()

        return receive

    async def send(self, message: Message) -> None:
        """Pass ``message`` on. Raises ClientGone if the client does not read for too long."""
        if message["type"] == "http.response.start":
            self.begun = True
            self.record.status = message["status"]
            header = (b"x-request-id", self.record.id.encode())
            message = {**message, "headers": [*message.get("headers", []), header]}
        try:
            async with asyncio.timeout(self._stall_s):
                await self._send(message)
        except TimeoutError:
            raise ClientGone from None
        if message["type"] == "http.response.body":
            self.complete = not message.get("more_body", False)
            if self._keeps:
                self._parts.append(message.get("body", b""))


async def _gone(receive: Receive) -> None:
    """Wait until the client has gone."""
    while (await receive())["type"] != "http.disconnect":
        pass


def _require_local(headers: Headers) -> None:
    """Raises Rejection for a request that a page of another site made under a name that it had led here."""
    named = headers.get("host", "")
    try:
        host = urlsplit(f"//{named}").hostname or ""
    except ValueError:  # a bracket that is not closed
        host = named
    if host not in LOOPBACK:
        raise Rejection(403, f"this server does not answer for the host {host[:200]!r}", code="foreign_host")


def _netloc(origin: str) -> str | None:
    """Host and port of ``origin``, or None if it is not a URL."""
    try:
        return urlsplit(origin).netloc
    except ValueError:
        return None


def endpoint(scope: Scope) -> str:
    """The path of the route that answered; ``other`` if there is none, so that clients cannot make up
    names."""
    route = scope.get("route")
    return route.path if route is not None else "other"


def failure(error: Exception) -> Rejection:
    """The answer to a request that ended with ``error``; its code goes into the access log."""
    rejection = rejection_of(error)
    access.current().error = rejection.code or rejection.kind
    return rejection
