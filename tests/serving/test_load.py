"""The generator of load: it sends at random moments, counts what is not answered, and reads any server."""

from __future__ import annotations

import asyncio
import itertools
import json
import statistics
from urllib.parse import urlsplit

import pytest

from tunesmith.serving import load
from tunesmith.serving.load import CallTimes, HttpCall, ServerAddress


def address_of(server) -> ServerAddress:
    parts = urlsplit(server.url)
    return ServerAddress(parts.hostname, parts.port)


def test_every_call_is_answered_and_counted(server):
    calls = load.calls(["base", "writer", "nobody"], 12, 5)
    report = asyncio.run(load.open_loop(address_of(server), calls, rate=200.0))
    assert report["requests"] == 12 and report["answered"] == 8 and report["errors"] == {"HTTP 404": 4}
    assert 0 < report["first_s"]["p50"] <= report["first_s"]["p99"] <= report["total_s"]["p99"]
    assert report["tokens_per_second"] * report["seconds"] == pytest.approx(8 * 5)


def test_what_is_read_is_what_the_server_answers_at_once(server):
    [call] = load.calls(["caller"], 1, 30)
    whole = {key: value for key, value in call.body.items() if not key.startswith("stream")}
    times = asyncio.run(load.timed(address_of(server), call))
    with server.client() as client:
        answer = client.post(call.path, json=whole).json()
    assert times.error is None and times.text == answer["choices"][0]["message"]["content"]
    assert times.n_tokens == answer["usage"]["completion_tokens"]


@pytest.mark.parametrize(("host", "shown"), [("127.0.0.1", "127.0.0.1"), ("::1", "[::1]")])
def test_the_host_is_named_as_in_an_address(host, shown):
    async def asked() -> bytes:
        """The header that a server gets."""
        heads: asyncio.Queue[bytes] = asyncio.Queue()

        async def answer(reader, writer):
            heads.put_nowait(await reader.readuntil(b"\r\n\r\n"))
            writer.close()

        server = await asyncio.start_server(answer, host, 0)
        port = server.sockets[0].getsockname()[1]
        async with server:
            await load.timed(ServerAddress(host, port), HttpCall("/", {}))
        return await heads.get()

    assert f"Host: {shown}:".encode() in asyncio.run(asked())


def test_prompts_differ_so_that_no_cache_answers():
    calls = load.calls(["a", "b"], 50, 8)
    assert len({json.dumps(call.body["messages"]) for call in calls}) == 50
    assert [call.body["model"] for call in calls[:3]] == ["a", "b", "a"]
    assert calls == load.calls(["a", "b"], 50, 8) != load.calls(["a", "b"], 50, 8, seed=1)


def test_calls_arrive_as_a_poisson_process_whether_earlier_ones_are_answered_or_not(monkeypatch):
    """Gaps between arrivals are exponential: their standard deviation is their mean."""
    arrivals: list[float] = []

    async def never_answered(address, call, due):
        arrivals.append(due)
        await asyncio.sleep(0.3)
        return CallTimes(0.3)

    monkeypatch.setattr(load, "timed", never_answered)
    calls = load.calls(["a"], 400, 1)
    report = asyncio.run(load.open_loop(ServerAddress("", 0), calls, rate=2000.0))
    gaps = [later - earlier for earlier, later in itertools.pairwise(arrivals)]
    assert statistics.mean(gaps) == pytest.approx(1 / 2000, rel=0.15)
    assert statistics.stdev(gaps) == pytest.approx(1 / 2000, rel=0.2)
    assert report["seconds"] < 10


def test_percentiles_are_times_that_were_measured():
    report = load.report([CallTimes(float(n), n / 2, 11) for n in range(1, 101)], 10.0)
    assert report["total_s"] == {"p50": 50.0, "p95": 95.0, "p99": 99.0}
    assert report["token_s"]["p50"] == pytest.approx(2.5)
    assert report["tokens_per_second"] == 110.0
    assert load.report([CallTimes(7.0)], 7.0)["first_s"] == {}


BROKEN = {
    "nothing": b"",
    "half of a chunk": b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nff\r\ndata: {}",
    "events without an end": b'HTTP/1.1 200 OK\r\n\r\ndata: {"choices": []}\n\n',
    "a chunk without a size": b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\ndata: {}",
    "an event that is not JSON": b"HTTP/1.1 200 OK\r\n\r\ndata: {half\n\n",
    "an event that is not an object": b"HTTP/1.1 200 OK\r\n\r\ndata: 5\n\n",
    "an error without fields": b'HTTP/1.1 200 OK\r\n\r\ndata: {"error": "overloaded"}\n\n',
    "choices that are null": b'HTTP/1.1 200 OK\r\n\r\ndata: {"choices": null}\n\n',
    "half of a body": b"HTTP/1.1 200 OK\r\nContent-Length: 50\r\n\r\ndata: {}\n\n",
}


@pytest.mark.parametrize("reply", BROKEN)
def test_an_answer_that_breaks_off_is_an_error(reply):
    async def answered() -> CallTimes:
        async def reply_to(reader, writer):
            await reader.readuntil(b"\r\n\r\n")
            writer.write(BROKEN[reply])
            await writer.drain()
            writer.close()

        async with await asyncio.start_server(reply_to, "127.0.0.1", 0) as broken:
            port = broken.sockets[0].getsockname()[1]
            return await load.timed(ServerAddress("127.0.0.1", port), HttpCall("/", {}))

    malformed = {
        "a chunk without a size": "ValueError",
        "an event that is not JSON": "JSONDecodeError",
        "an event that is not an object": "ValueError",
        "an error without fields": "AttributeError",
        "choices that are null": "TypeError",
    }
    assert asyncio.run(answered()).error in (malformed.get(reply, "ConnectionError"), "ConnectionResetError")
