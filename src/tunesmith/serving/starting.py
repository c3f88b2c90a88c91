"""From settings to a server that listens, and from SIGTERM to its end."""

from __future__ import annotations

import asyncio
import math
import re
import socket
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import TextIO

import uvicorn

from tunesmith import events
from tunesmith.engine.engine import Engine
from tunesmith.errors import ConfigError, ServeError
from tunesmith.events import Notice, Sink
from tunesmith.serving import app, served, votes
from tunesmith.serving.ab import EXAMPLE, Routes, SplitRoute
from tunesmith.serving.access import AccessLog
from tunesmith.serving.connections import connection_class
from tunesmith.serving.drafting import PROMPT, speculation_maker
from tunesmith.serving.guardrails import Guard, Guardrail
from tunesmith.serving.keys import Doorkeeper, Key
from tunesmith.serving.limits import ServerLimits
from tunesmith.serving.metrics import Metrics
from tunesmith.serving.rejections import UnknownModel
from tunesmith.serving.served import Models, NamedRun
from tunesmith.serving.service import Service
from tunesmith.serving.worker import Worker

SHUTDOWN_S = 2
"""Shortest time in which clients can read the rest of their answers, after `ServerLimits.drain_s`."""


@dataclass(frozen=True)
class ServerSettings:
    """Everything that decides a server. ``memory``: bytes that it may use; None: nine tenths of the
    machine's. ``prefix_bytes``: of these, for prompts that were read; None: a tenth. ``prefix_folder``: where
    those that leave the memory are kept, also for later servers. ``loopback``: whether only this machine can
    connect. ``votes_file``: None: ``votes.jsonl`` in the folder of the first run, or in the current one.
    ``draft``: as `speculation_maker` takes it."""

    targets: Sequence[NamedRun] = ()
    model: str | None = None
    checkpoint: str = "best"
    keys: tuple[Key, ...] = ()
    fallback: tuple[str, ...] = ()
    guardrails: tuple[Guardrail, ...] = ()
    ab: tuple[SplitRoute, ...] = ()
    votes_file: Path | None = None
    batch_size: int = 16
    memory: int | None = None
    prefix_bytes: int | None = None
    prefix_folder: Path | None = None
    kv_bits: int | None = None
    draft: str = PROMPT
    limits: ServerLimits = field(default_factory=ServerLimits)
    log: TextIO | None = None
    log_contents: bool = False
    loopback: bool = True


async def start(settings: ServerSettings, notify: Sink = events.silent) -> Service:
    """Load what is served and start its engine. Raises what `served.open_models` raises, and
    ServeError if the file for votes or the folder for prefixes cannot be written to."""
    if settings.votes_file is not None:
        votes.require_writable(settings.votes_file)
    if settings.prefix_folder is not None:
        _require_folder(settings.prefix_folder)
    worker = Worker(
        settings.limits,
        batch_size=settings.batch_size,
        memory=settings.memory,
        prefix_bytes=settings.prefix_bytes,
        notify=notify,
    )
    await worker.start()
    try:
        models = await worker.run(
            lambda: served.open_models(
                settings.targets, model=settings.model, checkpoint=settings.checkpoint, notify=notify
            )
        )
        for name in settings.fallback:
            models.resolve(name)
        tests = _ab_tests(settings.ab, models)
        speculation = await worker.run(lambda: speculation_maker(settings.draft, models, notify))
        folder = settings.prefix_folder
        await worker.serve(
            lambda batch_size, prefixes: Engine(
                models.loaded.net,
                batch_size,
                models.routing,
                prefixes=prefixes,
                kv_bits=settings.kv_bits,
                speculation=speculation(),
            ),
            None if folder is None else folder / models.held_as,
        )
    except BaseException:
        await worker.stop()
        raise
    _tell_unknown(settings.keys, models, tests, notify)
    metrics = Metrics(worker)
    guard = Guard(settings.guardrails, metrics.detected)
    return Service(
        models,
        worker,
        settings.limits,
        metrics,
        Doorkeeper(settings.keys),
        guard,
        settings.fallback,
        AccessLog(settings.log, settings.log_contents),
        settings.loopback,
        notify,
        ab=tests,
        votes_file=settings.votes_file or _votes_file(models),
    )


def _require_folder(folder: Path) -> None:
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)  # what it will hold tells what was asked
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        message = f"cannot be written: {error.strerror}"
        raise ServeError(message, where=str(folder), hint="choose another --prefix-folder") from error


def _ab_tests(routes: Sequence[SplitRoute], models: Models) -> Routes:
    """The A/B tests, their models by the names under which they are served: `--ab` may give the folder of a
    run. Raises ConfigError if a name is taken, or UnknownModel."""

    def name(model: str) -> str:
        for served_model in models.entries:
            if served_model.run is not None and served_model.run.resolve() == Path(model).resolve():
                return served_model.name
        try:
            return models.resolve(model).name
        except UnknownModel as error:
            if not re.fullmatch(r".+:\d+", model):
                raise
            raise UnknownModel(error.what, hint=f"a share has a decimal point, {EXAMPLE}") from error

    taken = {name for served_model in models.entries for name in served_model.names}
    for route in routes:
        if route.name in taken:
            hint = "give the test another name"
            raise ConfigError(f"{route.name} is already the name of a model", where="--ab", hint=hint)
    return Routes([route.renamed(name) for route in routes])


def _tell_unknown(keys: Sequence[Key], models: Models, tests: Routes, notify: Sink) -> None:
    """Tell of names in ``keys`` that nothing has. They may be loaded later, so they are not refused."""
    known = {*tests.names, *(name for served_model in models.entries for name in served_model.names)}
    for key in keys:
        if unknown := sorted(set(key.models) - known):
            text = f"the key {key.name} may ask {', '.join(unknown)}, which this server does not have"
            notify(
                Notice(text, level="warning", where="--keys", hint=f"served are: {', '.join(sorted(known))}")
            )


def _votes_file(models: Models) -> Path:
    runs = [served_model.run for served_model in models.entries if served_model.run is not None]
    return (runs[0] if runs else Path()) / votes.VOTES


def listen(host: str, port: int) -> socket.socket:
    """A socket that is bound to ``host`` and ``port`` (0: a free one). Raises ServeError if it cannot be."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
    except OSError as error:
        listener.close()
        raise _cannot_listen(f"{host}:{port}", error) from error
    return listener


async def admit_clients(listener: socket.socket, service: Service) -> None:
    """Let clients connect; their requests wait until the server takes them. Raises ServeError, and stops the
    engine, if another server that was started at the same time has the port."""
    try:
        listener.listen()
    except OSError as error:
        await service.worker.stop()
        host, port = listener.getsockname()[:2]
        raise _cannot_listen(f"{host}:{port}", error) from error


def _cannot_listen(where: str, error: OSError) -> ServeError:
    message = f"cannot listen: {error.strerror or error}"
    return ServeError(message, where=where, hint="choose another --host or --port")


class HttpServer(uvicorn.Server):
    """Serves ``service`` until SIGTERM or Ctrl-C. The first signal drains: new requests are refused, and
    those that were taken are finished, for as long as the limits allow; a second signal ends at once."""

    def __init__(self, service: Service) -> None:
        config = uvicorn.Config(
            app.build(service),
            lifespan="off",
            access_log=False,
            log_config=None,
            log_level="critical",
            server_header=False,
            ws="none",
            http=connection_class(service.limits),
            proxy_headers=False,  # any program on this machine could name another client
            timeout_graceful_shutdown=SHUTDOWN_S,
        )
        super().__init__(config)
        self._service = service
        self._loop: asyncio.AbstractEventLoop | None = None
        self._draining: asyncio.Task[None] | None = None

    async def listen(self, listener: socket.socket) -> None:
        self._loop = asyncio.get_running_loop()
        try:
            await self.serve(sockets=[listener])
        finally:
            await self._service.worker.stop()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if self._service.worker.draining or self._loop is None:
            self.should_exit = self.force_exit = True
        else:
            self._service.worker.draining = True
            self._loop.call_soon_threadsafe(self.drain)

    def drain(self) -> None:
        """Finish what is under way, then end. Called on the event loop."""
        self._draining = asyncio.ensure_future(self._drain())

    async def _drain(self) -> None:
        service = self._service
        service.worker.draining = True
        end = time.monotonic() + service.limits.drain_s
        while (service.exchanges or service.worker.busy) and time.monotonic() < end:
            await asyncio.sleep(0.05)
        # In what is left, clients can read what was sent to them.
        self.config.timeout_graceful_shutdown = max(SHUTDOWN_S, math.ceil(end - time.monotonic()))
        self.should_exit = True
