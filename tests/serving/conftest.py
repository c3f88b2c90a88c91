"""A server with a tiny base and two adapters, on a free port; and the means to talk with it."""

from __future__ import annotations

import asyncio
import io
import threading
from collections.abc import Callable, Coroutine, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

import httpx
import pytest
from serving.scripted import write_model

import tiny
import tunesmith
from tunesmith.serving import starting
from tunesmith.serving.served import NamedRun
from tunesmith.serving.service import Service
from tunesmith.serving.starting import HttpServer, ServerSettings

T = TypeVar("T")
LORA, DORA = "writer", "caller"
"""Names of the two runs."""


@dataclass
class Server:
    """A server that runs in a thread of its own. ``log``: its access log, JSON lines."""

    settings: ServerSettings
    service: Service = field(init=False)
    url: str = ""
    loop: asyncio.AbstractEventLoop = field(init=False)
    http: HttpServer = field(init=False)
    log: io.StringIO = field(default_factory=io.StringIO)
    error: BaseException | None = None
    notices: list[Any] = field(default_factory=list)

    def start(self) -> Server:
        self._started = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self._thread.start()
        assert self._started.wait(120)
        if self.error is not None:
            raise self.error
        return self

    def _run(self) -> None:
        try:
            asyncio.run(self._main())
        except BaseException as error:
            self.error = error
            self._started.set()

    async def _main(self) -> None:
        self.loop = asyncio.get_running_loop()
        settings = replace(self.settings, log=self.log)
        self.service = await starting.start(settings, self.notices.append)
        listener = starting.listen("127.0.0.1", 0)
        self.url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        self.http = HttpServer(self.service)
        self.loop.call_later(0.1, self._started.set)
        await self.http.listen(listener)

    def client(self, **options: Any) -> httpx.Client:
        return httpx.Client(base_url=self.url, timeout=60, **options)

    def call(self, work: Coroutine[Any, Any, T]) -> T:
        """The result of a coroutine that runs in the server's event loop."""
        return asyncio.run_coroutine_threadsafe(work, self.loop).result(60)

    def stop(self) -> None:
        if self._thread.is_alive():
            self.loop.call_soon_threadsafe(self.http.drain)
            self._thread.join(30)
        assert not self._thread.is_alive()


@pytest.fixture(scope="session")
def served_runs(tmp_path_factory, tiny_model) -> dict[str, Path]:
    """Two short runs on the tiny model, LoRA and DoRA, by name. The learning rate is so high that each
    answers in its own way."""
    folder = tmp_path_factory.mktemp("served")
    data = tiny.write_rows(folder / "rows.jsonl", tiny.conversations(24))
    sets = ["loop.steps=4", "audit.before_training=false", "optimizer.learning_rate=0.02", "adapter.rank=4"]
    runs: dict[str, Path] = {}
    for name, kind in ((LORA, "lora"), (DORA, "dora")):
        config = tunesmith.configure(
            model=str(tiny_model), data=[str(data)], sets=[*sets, f"adapter.kind={kind}", "loop.samples=0"]
        )
        tunesmith.train(config, out=folder / name)
        runs[name] = folder / name
    return runs


@pytest.fixture(scope="session")
def settings(served_runs) -> ServerSettings:
    targets = [NamedRun(str(path)) for path in served_runs.values()]
    return ServerSettings(targets, batch_size=8)


@pytest.fixture(scope="module")
def start_server() -> Iterator[Callable[[ServerSettings], Server]]:
    """``start_server(settings)``: a server of its own, which is stopped after the module."""
    servers: list[Server] = []

    def start(settings: ServerSettings) -> Server:
        servers.append(Server(settings).start())
        return servers[-1]

    yield start
    for server in servers:
        server.stop()


@pytest.fixture(scope="module")
def server(start_server, settings) -> Server:
    """The base and both adapters."""
    return start_server(settings)


@pytest.fixture(scope="module")
def speaker(start_server, tmp_path_factory) -> Server:
    """A plain model whose template takes tools and reasoning; see `scripted`."""
    folder = write_model(tmp_path_factory.mktemp("speaker") / "speaker")
    return start_server(ServerSettings([NamedRun(str(folder))], batch_size=4))
