"""A storm of requests on one server: whole and streamed, broken, cancelled, read slowly, while its engine is
killed. Each that can be answered must be, with the answer that it gets on a quiet server."""

from __future__ import annotations

import asyncio
import ctypes
import gc
import json
import os
import random
import threading
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

import psutil

from tunesmith.serving import load
from tunesmith.serving.load import HttpCall, HttpReply, ServerAddress

PATH = "/v1/chat/completions"
AGAIN = (429, 503)
"""Statuses that ask the client to come back."""
LONGEST_PAUSE_S = 2.0
"""Before a client comes back, if the server does not name a shorter one."""
LIMIT_S = 600.0
"""Whatever takes longer hangs: a busy machine needs time for so many."""
NAMES = ("base", "writer", "caller")


@dataclass
class Outcome:
    """``counts``: requests by kind and how they ended. ``wrong``: what must not happen, in words."""

    counts: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    n_refused: int = 0
    """Times that a client was asked to come back."""
    resident: list[int] = field(default_factory=list)
    """Bytes of the process, after each tenth of the requests."""


@dataclass
class Storm:
    """``answers``: body of a request, as text → the answer on a quiet server."""

    server: Any
    address: ServerAddress
    answers: Mapping[str, str]
    random: random.Random
    outcome: Outcome = field(default_factory=Outcome)

    async def send(self, number: int) -> None:
        """One request; of three, one is broken, cancelled or read slowly."""
        kind = self.random.choice([self.whole, self.streamed] if number % 3 else self.troubles)
        body = json.loads(self.random.choice(list(self.answers)))
        try:
            async with asyncio.timeout(LIMIT_S):
                ended = await kind(body)
        except TimeoutError:
            ended = "lost"
            self.outcome.wrong.append(f"{kind.__name__}: no end after {LIMIT_S:.0f} s")
        except (OSError, ValueError) as error:
            ended = "broke off"
            self.outcome.wrong.append(f"{kind.__name__}: {type(error).__name__}: {error}")
        self.outcome.counts[f"{kind.__name__}: {ended}"] += 1

    @property
    def troubles(self) -> list[Callable[[Mapping[str, Any]], Awaitable[str]]]:
        left = [self.left_early, self.left_at_once, self.half]
        return [self.slowly_read, *left, self.no_json, self.unknown_field, self.unknown_model]

    async def whole(self, body: Mapping[str, Any]) -> str:
        while True:
            async with load.sent(self.address, HttpCall(PATH, body)) as reply:
                content = json.loads(await reply.body())
                if reply.status == 200:
                    return self.compared(body, content["choices"][0]["message"]["content"])
                if reply.status not in AGAIN:
                    self.outcome.wrong.append(f"whole: {reply.status} {content}")
                    return "refused"
            await asyncio.sleep(self.pause(reply))

    async def streamed(self, body: Mapping[str, Any], pause: float = 0.0) -> str:
        while True:
            async with load.sent(self.address, HttpCall(PATH, {**body, "stream": True})) as reply:
                if reply.status == 200:
                    text, error = await read(reply, pause)
                    if error is None:
                        return self.compared(body, text)
                    if error != "engine_died":
                        self.outcome.wrong.append(f"streamed: {error}")
                    if not self.answers[json.dumps(body)].startswith(text):
                        self.outcome.wrong.append("streamed: the beginning of another answer")
                    return error
                if reply.status not in AGAIN:
                    self.outcome.wrong.append(f"streamed: {reply.status}")
                    return "refused"
            await asyncio.sleep(self.pause(reply))

    def pause(self, reply: HttpReply) -> float:
        """Seconds until a client comes back that was refused."""
        self.outcome.n_refused += 1
        return min(LONGEST_PAUSE_S, float(reply.headers["retry-after"])) * self.random.uniform(0.5, 1.0)

    def compared(self, body: Mapping[str, Any], text: str) -> str:
        if text == self.answers[json.dumps(body)]:
            return "answered"
        owners = [asked for asked, answer in self.answers.items() if answer == text]
        self.outcome.wrong.append(f"{body}: {text!r}, which is the answer to {owners}")
        return "wrong answer"

    async def slowly_read(self, body: Mapping[str, Any]) -> str:
        return await self.streamed(body, pause=0.05)

    async def left_early(self, body: Mapping[str, Any]) -> str:
        """The client goes after the first event."""
        async with load.sent(
            self.address, HttpCall(PATH, {**body, "stream": True, "max_tokens": 400})
        ) as reply:
            if reply.status == 200:
                async for _ in reply.parts():
                    break
        return "left"

    async def left_at_once(self, body: Mapping[str, Any]) -> str:
        """The client goes before the answer begins."""
        await self.raw(json.dumps({**body, "max_tokens": 400}).encode(), answered=False)
        return "left"

    async def half(self, body: Mapping[str, Any]) -> str:
        """The client goes within its own body."""
        content = json.dumps(body).encode()
        await self.raw(content[: len(content) // 2], len(content), answered=False)
        return "left"

    async def no_json(self, body: Mapping[str, Any]) -> str:
        return await self.refused(json.dumps(body).encode()[:-3], 400)

    async def unknown_field(self, body: Mapping[str, Any]) -> str:
        return await self.refused(json.dumps({**body, "nonsense": 1}).encode(), 400)

    async def unknown_model(self, body: Mapping[str, Any]) -> str:
        return await self.refused(json.dumps({**body, "model": "nobody"}).encode(), 404)

    async def refused(self, content: bytes, status: int) -> str:
        given = await self.raw(content)
        if given != status:
            self.outcome.wrong.append(f"{status} was due, not {given}: {content[:80]!r}")
        return f"refused with {given}"

    async def raw(self, content: bytes, length: int | None = None, *, answered: bool = True) -> int | None:
        """Send a body as it is. The status of the answer, or None if it is not waited for."""
        reader, writer = await asyncio.open_connection(self.address.host, self.address.port)
        try:
            head = f"POST {PATH} HTTP/1.1\r\nHost: localhost\r\nContent-Length: {length or len(content)}\r\n"
            writer.write(head.encode() + b"Connection: close\r\n\r\n" + content)
            await writer.drain()
            return int((await reader.readline()).split()[1]) if answered else None
        finally:
            writer.close()


async def read(reply: HttpReply, pause: float) -> tuple[str, str | None]:
    """(words, code of the error or None) of a stream."""
    texts: list[str] = []
    async for event in reply.events():
        if "error" in event:
            return "".join(texts), event["error"]["code"]
        texts += [choice["delta"].get("content") or "" for choice in event["choices"]]
        await asyncio.sleep(pause)
    return "".join(texts), None


def bodies(prompts: int) -> list[dict[str, Any]]:
    """To every model, greedy and drawn with a seed."""
    return [
        {
            "model": name,
            "messages": [{"role": "user", "content": f"{number} words"}],
            "max_tokens": 12,
            **draw,
        }
        for name in NAMES
        for number in range(prompts)
        for draw in ({"temperature": 0}, {"temperature": 1, "seed": number})
    ]


async def quiet_answers(address: ServerAddress, asked: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """Body → answer, one after the other."""
    answers: dict[str, str] = {}
    for body in asked:
        async with load.sent(address, HttpCall(PATH, body)) as reply:
            content = json.loads(await reply.body())
            answers[json.dumps(body)] = content["choices"][0]["message"]["content"]
    return answers


async def storm(server: Any, n_requests: int, n_at_once: int, n_kills: int, seed: int = 0) -> Outcome:
    """``n_requests``, so many of them at once, while the engine is killed ``n_kills`` times."""
    parts = urlsplit(server.url)
    address = ServerAddress(str(parts.hostname), int(parts.port or 0))
    answers = await quiet_answers(address, bodies(6))
    made = Storm(server, address, answers, random.Random(seed))
    numbers = iter(range(n_requests))
    kills = {n_requests * (kill + 1) // (n_kills + 1) for kill in range(n_kills)}
    tenths = {n_requests * tenth // 10 for tenth in range(1, 11)}
    n_ended = 0

    async def client() -> None:
        nonlocal n_ended
        for number in numbers:
            await made.send(number)
            n_ended += 1
            if n_ended in kills:
                kill_engine(server)
            if n_ended in tenths:
                made.outcome.resident.append(psutil.Process().memory_info().rss)

    await asyncio.gather(*(client() for _ in range(n_at_once)))
    return made.outcome


def kill_engine(server: Any) -> None:
    thread = server.service.worker._life.thread
    if thread is not None and thread.ident is not None:
        death = ctypes.py_object(SystemExit)
        ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread.ident), death)


def open_things() -> tuple[set[str], int]:
    """Names of threads, and the number of open files."""
    gc.collect()
    names = {thread.name for thread in threading.enumerate()}
    return names, len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else 0
