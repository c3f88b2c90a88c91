"""How long do requests take while others are under way?

Requests begin at random moments, as independent users send them (a Poisson process), whether earlier ones
were answered or not. A server that falls behind therefore shows it in its times, which a fixed number of
clients that wait for their answers would hide. The client knows HTTP/1.1 and server-sent events, so that any
server that speaks OpenAI's protocol can be measured."""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections import Counter
from collections.abc import AsyncGenerator, AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from typing import Any, TypedDict

from tunesmith.settings.config import JSON

PERCENTILES = (50, 95, 99)
CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
TOPICS = ("rivers", "bridges", "bread", "clocks", "maps", "storms", "gardens", "letters", "ships", "songs")


@dataclass(frozen=True)
class ServerAddress:
    """Where a server listens. ``key``: None if it needs none."""

    host: str
    port: int
    key: str | None = None


@dataclass(frozen=True)
class HttpCall:
    """One request: the JSON ``body`` that is sent to ``path``."""

    path: str
    body: Mapping[str, JSON]


@dataclass(frozen=True)
class CallTimes:
    """Times of one request in seconds, from when it was due. ``first_s``: to the first token. ``error``: why
    it was not answered in full, or None."""

    total_s: float
    first_s: float | None = None
    n_tokens: int = 0
    text: str = ""
    error: str | None = None

    @property
    def token_s(self) -> float | None:
        """Mean time between two tokens."""
        if self.first_s is None or self.n_tokens < 2:
            return None
        return (self.total_s - self.first_s) / (self.n_tokens - 1)


class LoadReport(TypedDict):
    """``first_s``, ``token_s``, ``total_s``: percentile, such as ``p95``, → seconds. ``errors``: reason →
    number of requests."""

    requests: int
    answered: int
    errors: dict[str, int]
    seconds: float
    requests_per_second: float
    tokens_per_second: float
    first_s: dict[str, float]
    token_s: dict[str, float]
    total_s: dict[str, float]


@dataclass
class HttpReply:
    """A response, of which the body is read as it comes."""

    status: int
    headers: Mapping[str, str]
    reader: asyncio.StreamReader

    async def parts(self) -> AsyncIterator[bytes]:
        """The body. Raises ConnectionError if it ends early."""
        if self.headers.get("transfer-encoding", "").lower() == "chunked":
            while size := int((await self._line()).split(b";")[0], 16):
                yield await self._exactly(size)
                await self._line()
        elif "content-length" in self.headers:
            yield await self._exactly(int(self.headers["content-length"]))
        else:
            while part := await self.reader.read(65536):
                yield part

    async def body(self) -> bytes:
        return b"".join([part async for part in self.parts()])

    async def events(self) -> AsyncIterator[dict[str, Any]]:
        """The objects of server-sent events, until the word that ends them. Raises ConnectionError if it does
        not come, and ValueError if an event is not a JSON object."""
        rest = b""
        async for part in self.parts():
            *lines, rest = (rest + part).split(b"\n")
            for line in lines:
                if line.startswith(b"data:"):
                    data = line.removeprefix(b"data:").strip()
                    if data == b"[DONE]":
                        return
                    event = json.loads(data)
                    if not isinstance(event, dict):
                        raise ValueError("an event is not an object")
                    yield event
        raise ConnectionError("the events broke off")

    async def _line(self) -> bytes:
        line = await self.reader.readline()
        if not line.endswith(b"\n"):
            raise ConnectionError("the response broke off")
        return line

    async def _exactly(self, size: int) -> bytes:
        try:
            return await self.reader.readexactly(size)
        except asyncio.IncompleteReadError as error:
            raise ConnectionError("the response broke off") from error


@asynccontextmanager
async def sent(address: ServerAddress, call: HttpCall) -> AsyncGenerator[HttpReply]:
    """The reply to ``call``. Leaving the context closes the connection, so that an answer under way is
    cancelled. Raises OSError if there is no reply."""
    content = json.dumps(call.body).encode()
    host = f"[{address.host}]" if ":" in address.host else address.host
    head = [f"POST {call.path} HTTP/1.1", f"Host: {host}:{address.port}", "Connection: close"]
    head += ["Content-Type: application/json", f"Content-Length: {len(content)}"]
    if address.key is not None:
        head.append(f"Authorization: Bearer {address.key}")
    reader, writer = await asyncio.open_connection(address.host, address.port)
    try:
        writer.write("\r\n".join([*head, "", ""]).encode() + content)
        await writer.drain()
        status = (await reader.readline()).split()
        if len(status) < 2:
            raise ConnectionError("the server closed the connection without a reply")
        headers: dict[str, str] = {}
        while line := (await reader.readline()).strip():
            name, _, value = line.decode("latin-1").partition(":")
            headers[name.lower()] = value.strip()
        yield HttpReply(int(status[1]), headers, reader)
    finally:
        writer.close()
        with suppress(OSError):
            await writer.wait_closed()


async def timed(address: ServerAddress, call: HttpCall, due: float | None = None) -> CallTimes:
    """Send ``call``, whose body must ask for a stream with its usage, and read the answer. due: when it
    should have been sent, on the clock of `time.perf_counter`; None: now."""
    begun = time.perf_counter() if due is None else due
    first: float | None = None
    texts: list[str] = []
    n_tokens, error = 0, None
    try:
        async with sent(address, call) as reply:
            if reply.status != 200:
                error = f"HTTP {reply.status}"
            else:
                async for event in reply.events():
                    if "error" in event:
                        error = str(event["error"].get("code") or event["error"].get("type"))
                    if new := _new_text(event):
                        first = first or time.perf_counter() - begun
                        texts.append(new)
                    n_tokens = (event.get("usage") or {}).get("completion_tokens", n_tokens)
    except (OSError, ValueError, TypeError, AttributeError) as failure:
        # All but OSError: a length, a chunk or an event of another form than the protocol's.
        error = type(failure).__name__
    return CallTimes(time.perf_counter() - begun, first, n_tokens, "".join(texts), error)


def _new_text(event: Mapping[str, Any]) -> str:
    """What an event adds to the answer."""
    for choice in event.get("choices", ()):
        delta = choice.get("delta", choice)
        for field in ("content", "reasoning_content", "text"):
            if delta.get(field):
                return delta[field]
        if delta.get("tool_calls"):
            return json.dumps(delta["tool_calls"])
    return ""


def calls(
    names: Sequence[str], n_calls: int, max_tokens: int, *, chat: bool = True, seed: int = 0
) -> list[HttpCall]:
    """Greedy requests to the models ``names`` in turn. No two have the same prompt, so that none is answered
    from the cache of another."""
    draw = random.Random(seed)
    made: list[HttpCall] = []
    for number in range(n_calls):
        topics = " and ".join(draw.sample(TOPICS, 3))
        text = f"Number {draw.randrange(10**6)}: write a long story about {topics}."
        body: dict[str, JSON] = {
            "model": names[number % len(names)],
            "max_tokens": max_tokens,
            "temperature": 0,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        body |= {"messages": [{"role": "user", "content": text}]} if chat else {"prompt": text}
        made.append(HttpCall(CHAT if chat else COMPLETIONS, body))
    return made


async def at_once(address: ServerAddress, together: Sequence[HttpCall]) -> LoadReport:
    """Send all calls at the same moment."""
    begun = time.perf_counter()
    times = await asyncio.gather(*(timed(address, call) for call in together))
    return report(times, time.perf_counter() - begun)


async def open_loop(
    address: ServerAddress, arriving: Sequence[HttpCall], rate: float, seed: int = 0
) -> LoadReport:
    """Send ``rate`` calls a second on average, independently of each other, and wait for their answers."""
    draw, begun = random.Random(seed), time.perf_counter()
    due, tasks = begun, []
    for call in arriving:
        due += draw.expovariate(rate)
        await asyncio.sleep(max(0.0, due - time.perf_counter()))
        tasks.append(asyncio.create_task(timed(address, call, due)))
    times = await asyncio.gather(*tasks)
    return report(times, time.perf_counter() - begun)


def report(times: Sequence[CallTimes], seconds: float) -> LoadReport:
    """The percentiles of ``times``, of which only whole answers count."""
    whole = [call for call in times if call.error is None]
    return LoadReport(
        requests=len(times),
        answered=len(whole),
        errors=dict(Counter(call.error for call in times if call.error is not None)),
        seconds=seconds,
        requests_per_second=len(whole) / seconds,
        tokens_per_second=sum(call.n_tokens for call in whole) / seconds,
        first_s=_percentiles([call.first_s for call in whole]),
        token_s=_percentiles([call.token_s for call in whole]),
        total_s=_percentiles([call.total_s for call in whole]),
    )


def _percentiles(values: Sequence[float | None]) -> dict[str, float]:
    """By the nearest rank, so that each is a time that was measured; empty if there is none."""
    known = sorted(value for value in values if value is not None)
    if not known:
        return {}
    return {f"p{share}": known[max(0, -(-share * len(known) // 100) - 1)] for share in PERCENTILES}


def described(report: LoadReport) -> str:
    """The report for a terminal."""
    failed = "".join(f", {count} {reason}" for reason, count in report["errors"].items())
    counts = f"{report['answered']} of {report['requests']} requests were answered"
    lines = [
        f"{counts} in {report['seconds']:.1f} s{failed}",
        f"{report['requests_per_second']:.2f} requests and {report['tokens_per_second']:.1f} tokens a second",
        "",
        f"{'seconds':12}" + "".join(f"{f'p{share}':>10}" for share in PERCENTILES),
    ]
    rows = {
        "first token": report["first_s"],
        "next token": report["token_s"],
        "whole answer": report["total_s"],
    }
    for name, times in rows.items():
        lines.append(
            f"{name:12}" + "".join(f"{times[f'p{share}'] if times else 0:10.3f}" for share in PERCENTILES)
        )
    return "\n".join(lines)
