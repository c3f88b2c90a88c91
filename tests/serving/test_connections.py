"""What a connection may cost that sends nothing, or does not read."""

from __future__ import annotations

import asyncio
import socket
from dataclasses import replace
from unittest.mock import Mock

import pytest
from serving.test_app import logged
from serving.test_worker import wait_until
from uvicorn.server import ServerState

from tunesmith.serving import connections
from tunesmith.serving.keys import Doorkeeper, Key, digest_of
from tunesmith.serving.limits import ServerLimits


def connected(server) -> socket.socket:
    host, port = server.url.removeprefix("http://").split(":")
    return socket.create_connection((host, int(port)), timeout=10)


@pytest.fixture(scope="module")
def strict(start_server, settings):
    return start_server(replace(settings, limits=ServerLimits(body_s=0.5, connections=3, stall_s=0.5)))


@pytest.mark.parametrize(
    "sent", [b"", b"GET /health HT", b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\nG"]
)
def test_a_head_that_never_arrives_closes_the_connection(strict, sent):
    with connected(strict) as connection:
        connection.sendall(sent)
        while connection.recv(1000):
            pass


def test_further_connections_are_closed(strict):
    first = [connected(strict) for _ in range(3)]
    with connected(strict) as further:
        further.settimeout(0.4)
        try:
            assert further.recv(10) == b""
        except ConnectionResetError:
            pass
    for connection in first:
        connection.close()


@pytest.mark.parametrize("happens", ["nothing", "it reads later", "its answer has ended"])
def test_the_connection_of_a_client_that_does_not_read_is_closed(strict, monkeypatch, happens):
    """It would stay until everything is flushed, which is never."""
    monkeypatch.setattr(connections, "LATER_S", 0.0)
    config = strict.http.config

    async def stall() -> bool:
        transport = Mock()
        made = config.http_protocol_class(config=config, server_state=ServerState(), app_state={})
        made.connection_made(transport)
        made._head.cancel()
        if happens == "its answer has ended":
            made.timeout_keep_alive_handler()
        else:
            made.pause_writing()
        if happens == "it reads later":
            made.resume_writing()
        await asyncio.sleep(0.6)
        return transport.abort.called

    assert strict.call(stall()) is (happens != "it reads later")


def test_who_asks_is_the_address_of_the_connection(strict):
    wait_until(lambda: not strict.http.server_state.connections)
    with strict.client() as client:
        listed = client.get("/v1/models", headers={"X-Forwarded-For": "made up"})
    assert logged(strict, listed)["client"] == "127.0.0.1"


@pytest.mark.parametrize("path", ["/", "/health"])
def test_paths_without_a_key_take_no_body(strict, path):
    wait_until(lambda: not strict.http.server_state.connections)
    with strict.client() as client:
        assert client.request("GET", path, content=b"x").status_code == 413
        assert client.get(path).status_code == 200


def test_nothing_is_open_beside_the_page_and_its_health(server):
    read: list[int] = []

    async def ask() -> list[int]:
        """The body of a path that does not exist is not read without a key."""
        scope = {"type": "http", "method": "POST", "path": "/playground/x", "query_string": b""}
        scope |= {"headers": [(b"host", b"localhost")], "asgi": {"version": "3.0"}}
        statuses: list[int] = []

        async def receive():
            read.append(1)
            return await asyncio.sleep(60)

        async def send(message) -> None:
            statuses.append(message.get("status", 0))

        await server.http.config.app(scope, receive, send)
        return statuses

    service = server.service
    before = service.doorkeeper
    service.doorkeeper = Doorkeeper((Key("me", digest_of("secret-of-mine-only")),))
    try:
        assert server.call(ask())[0] == 401 and not read
    finally:
        service.doorkeeper = before


@pytest.mark.parametrize("headers", [{"Host": "[::1"}, {"Origin": "http://["}])
def test_a_header_that_is_no_address_is_refused(server, headers):
    with server.client() as client:
        assert client.get("/v1/models", headers=headers).status_code == 403
