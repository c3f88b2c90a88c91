"""From settings to a server that listens, and from SIGTERM to its end."""

from __future__ import annotations

import asyncio
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
from serving.scripted import answering
from serving.test_answering import HI, PATH, Late
from serving.test_worker import wait_until

from tunesmith.errors import ServeError
from tunesmith.serving import starting


def test_what_was_admitted_is_finished_before_the_end(start_server, settings):
    """A job, such as embeddings; and a fallback that is asked while the server drains."""
    server = start_server(replace(settings, fallback=("base",)))
    service = server.service
    body = {"model": "writer", "input": "the cat"}
    slow_job = service.worker.run

    async def drain() -> None:
        server.http.drain()
        await asyncio.sleep(0.3)

    class LateInTheEnd(Late):
        async def __anext__(self):
            await drain()
            return await super().__anext__()

    def run(function, cost=0):
        return slow_job(lambda: (time.sleep(2.0), function())[1], cost)

    service.worker.run = run
    with ThreadPoolExecutor(1) as pool, server.client() as client, server.client() as other:
        embedded = pool.submit(client.post, "/v1/embeddings", json=body)
        wait_until(lambda: service.worker._life.job is not None)
        asked = type(service).ask
        type(service).ask = lambda self, served, request: (
            LateInTheEnd([]) if served.name == "writer" else asked(self, served, request)
        )
        try:
            late = other.post(PATH, json={"model": "writer", "messages": HI, "max_tokens": 3})
        finally:
            type(service).ask = asked
        assert late.status_code == 200 and "x-tunesmith-fallback" in late.headers, late.text
        assert embedded.result(30).status_code == 200
    server._thread.join(20)
    assert not server._thread.is_alive() and server.error is None


def test_two_servers_at_once_on_one_port_are_told(server):
    """Both are bound while they load; only one can listen."""

    class Stopped:
        def __init__(self) -> None:
            self.worker, self.n = self, 0

        async def stop(self) -> None:
            self.n += 1

    first = starting.listen("127.0.0.1", 0)
    second, stopped = starting.listen("127.0.0.1", first.getsockname()[1]), Stopped()
    with first, second:
        first.listen()
        with pytest.raises(ServeError, match="cannot listen"):
            asyncio.run(starting.admit_clients(second, stopped))
    assert stopped.n == 1


def test_an_adapter_that_is_dropped_stays_for_what_was_admitted(server):
    """Its prompt may be read in a thread meanwhile."""
    service, seen = server.service, []

    with answering(server, "x"), server.client() as client:
        scripted = type(service).ask

        def look(self, served, request):
            seen.append((served.adapter, self.in_use))
            return scripted(self, served, request)

        type(service).ask = look
        assert client.post(PATH, json={"model": "writer", "messages": HI}).status_code == 200
    ((adapter, in_use),) = seen
    assert in_use == {adapter}
    wait_until(lambda: not service.in_use)
