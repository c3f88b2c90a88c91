"""``tunesmith serve``: answer over HTTP until SIGTERM or Ctrl-C."""

from __future__ import annotations

import asyncio
import contextlib
import json
import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TextIO

from tunesmith import events
from tunesmith.errors import ConfigError, DataError, ServeError
from tunesmith.events import Sink
from tunesmith.runs import tags
from tunesmith.serving import drafting, load, starting
from tunesmith.serving import guardrails as screening
from tunesmith.serving import keys as keys_file
from tunesmith.serving.ab import parse_route
from tunesmith.serving.entrance import LOOPBACK
from tunesmith.serving.limits import ServerLimits
from tunesmith.serving.load import LoadReport, ServerAddress
from tunesmith.serving.served import NamedRun
from tunesmith.serving.service import Service
from tunesmith.serving.starting import HttpServer, ServerSettings
from tunesmith.settings import config

BENCH_TOKENS = 64
"""Longest answer to a request of the benchmark."""


def serve(
    runs: Sequence[str] = (),
    *,
    model: str | None = None,
    checkpoint: str = "best",
    host: str = "127.0.0.1",
    port: int = 8080,
    keys: str | Path | None = None,
    fallback: Sequence[str] = (),
    guardrails: str | Path | None = None,
    ab: Sequence[str] = (),
    votes: str | Path | None = None,
    batch_size: int = 16,
    memory_gb: float | None = None,
    prefix_gb: float | None = None,
    prefix_folder: str | Path | None = None,
    kv_bits: int | None = None,
    draft: str = drafting.PROMPT,
    limits: Sequence[str] = (),
    log: str | Path | None = None,
    log_contents: bool = False,
    bench: float | None = None,
    bench_seconds: float = 30.0,
    announce: Callable[[str], None] = print,
    notify: Sink = events.silent,
) -> LoadReport | None:
    """Serve the base of ``runs`` and each of their adapters, or a plain model, until SIGTERM or Ctrl-C.

    runs: folders, tags or ``NAME=RUN``. model: where the base lies, or a plain model. keys: a JSON file;
    needed if other machines can connect. fallback: models that answer if the one that was asked cannot.
    guardrails: a YAML file. ab: names for several models, as ``writer=runs/a:0.5,runs/b:0.5``; their runs are
    served too. votes: file of the votes; None: ``votes.jsonl`` of the first run. prefix_folder: where prompts
    that were read are kept for later servers. limits: assignments such as ``queue=64``. log: file of the
    access log; None: stderr. bench: measure instead: requests a second, for ``bench_seconds``. Raises
    ServeError if the port is taken, and what `served.open_models` raises."""
    _require_possible(host, keys, bench, prefix_folder, prefix_gb)
    with contextlib.ExitStack() as inside:
        settings = ServerSettings(
            [NamedRun.parse(run) for run in [*runs, *_compared(ab, runs)]],
            model=model,
            checkpoint=checkpoint,
            keys=() if keys is None else keys_file.read(Path(keys)),
            fallback=tuple(fallback),
            guardrails=() if guardrails is None else screening.load_guardrails([Path(guardrails)]),
            ab=tuple(map(parse_route, ab)),
            votes_file=None if votes is None else Path(votes),
            batch_size=batch_size,
            memory=None if memory_gb is None else int(memory_gb * 1e9),
            prefix_bytes=None if prefix_gb is None else int(prefix_gb * 1e9),
            prefix_folder=None if prefix_folder is None else Path(prefix_folder),
            kv_bits=kv_bits,
            draft=draft,
            limits=config.load(ServerLimits, sets=limits, example="--limit queue=64").spec,
            log=_log(log, inside) if log or bench is None else None,
            log_contents=log_contents,
            loopback=host in LOOPBACK,
        )
        if bench is None:
            return asyncio.run(_answering(settings, host, port, announce, notify))
        return asyncio.run(_measured(settings, host, port, bench, bench_seconds, notify))


def _require_possible(
    host: str,
    keys: str | Path | None,
    bench: float | None,
    prefix_folder: str | Path | None,
    prefix_gb: float | None,
) -> None:
    """Raises ConfigError if others could ask without a key, the server cannot ask itself, or nothing could
    come into the folder of prefixes."""
    if host not in LOOPBACK and keys is None:
        message = "other machines can connect, so a key is needed"
        hint = 'write keys.json: [{"name": "me", "key": "…"}], and add --keys keys.json'
        raise ConfigError(message, where=f"--host {host}", hint=hint)
    if bench is not None and keys is not None:
        hint = "measure without --keys: nobody else can connect meanwhile"
        raise ConfigError("the server has no key to ask itself with", where="--bench", hint=hint)
    if prefix_folder is not None and prefix_gb == 0:
        hint = "leave out --prefix-memory 0"
        message = "prompts come there from memory, and none is for them"
        raise ConfigError(message, where="--prefix-folder", hint=hint)


async def _answering(
    settings: ServerSettings, host: str, port: int, announce: Callable[[str], None], notify: Sink
) -> None:
    """Serve until a signal."""
    with starting.listen(host, port) as listener:
        service = await starting.start(settings, notify)
        await starting.admit_clients(listener, service)  # who reads the announcement may connect at once
        announce(greeting(service, host, listener.getsockname()[1]))
        await HttpServer(service).listen(listener)


async def _measured(
    settings: ServerSettings, host: str, port: int, rate: float, seconds: float, notify: Sink
) -> LoadReport:
    """The report of ``rate`` requests a second, to each of the models in turn."""
    with starting.listen(host, port) as listener:
        service = await starting.start(settings, notify)
        await starting.admit_clients(listener, service)
        http = HttpServer(service)
        listening = asyncio.create_task(http.listen(listener))
        try:
            return await _load(service, ServerAddress(*listener.getsockname()[:2]), rate, seconds)
        finally:
            http.drain()
            await listening


async def _load(service: Service, address: ServerAddress, rate: float, seconds: float) -> LoadReport:
    entries = service.models.entries
    calls = load.calls(
        [served.name for served in entries],
        1 + max(1, round(rate * seconds)),
        BENCH_TOKENS,
        chat=all(served.asked_as == "chat" for served in entries),
    )
    await load.timed(address, calls[0])  # what the first request compiles counts for none
    return await load.open_loop(address, calls[1:], rate)


def _compared(ab: Sequence[str], runs: Sequence[str]) -> list[str]:
    """The runs that A/B tests name by folder or tag, and that are not served otherwise."""
    given = {_folder(NamedRun.parse(run).path) for run in runs}
    models = dict.fromkeys(arm.model for test in map(parse_route, ab) for arm in test.arms)
    return [model for model in models if (folder := _folder(model)) is not None and folder not in given]


def _folder(run: str) -> Path | None:
    """The folder of a run, or None if there is none with this path or tag."""
    try:
        folder = tags.find(run)
    except DataError:
        return None
    return folder.absolute() if folder.is_dir() else None


def _log(file: str | Path | None, inside: contextlib.ExitStack) -> TextIO:
    if file is None:
        return sys.stderr
    try:
        return inside.enter_context(Path(file).open("a", encoding="utf-8"))
    except OSError as error:
        message = f"cannot be written: {error.strerror}"
        raise ServeError(message, where=str(file), hint="choose another --log") from error


def greeting(service: Service, host: str, port: int) -> str:
    """What is served, and how to ask it."""
    url = f"http://{f'[{host}]' if ':' in host else host}:{port}"
    lines = [f"serving at {url}", ""]
    for served in service.models.entries:
        what = "the base" if served is service.models.base else f"{served.run}"
        others = f", also {', '.join(served.tags)}" if served.tags else ""
        lines.append(f"  {served.name}: {what}{others}")
    for name in service.ab.names:
        lines.append(f"  {name}: A/B test of {' and '.join(service.ab.models(name))}")
    first = service.models.entries[0]
    body: dict[str, object] = {"model": first.name}
    if first.asked_as == "chat":
        path, body["messages"] = "chat/completions", [{"role": "user", "content": "Hello"}]
    else:
        path, body["prompt"] = "completions", "Hello"
    command = f"curl {url}/v1/{path} -H 'Content-Type: application/json'"
    command += ' -H "Authorization: Bearer $KEY"' if service.doorkeeper.keys else ""
    lines += ["", f"{command} -d {shlex.quote(json.dumps(body))}"]
    lines += [
        "",
        f"in a browser: {url}",
        f"votes: {service.votes_file}",
        "Ctrl-C ends it: what is under way is finished first",
    ]
    return "\n".join(lines)
