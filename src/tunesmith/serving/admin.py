"""``/admin/adapters``: put an adapter on the base, replace it, or drop it, while requests are answered.

An answer that is under way ends with the adapter that it began with."""

from __future__ import annotations

import asyncio
import functools

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from tunesmith.adapters import WEIGHTS
from tunesmith.errors import ConfigError, TunesmithError
from tunesmith.runs import opening
from tunesmith.runs.opening import Source
from tunesmith.serving.protocol.bodies import Body, read
from tunesmith.serving.rejections import Rejection, TooLarge, UnknownModel
from tunesmith.serving.served import NamedRun, Served
from tunesmith.serving.service import Service
from tunesmith.settings.config import JSON

COPIES = 2
"""Times that an adapter's weights are in memory: as they were read, and in the engine's stacks."""
LOOK_S = 0.5


class AdapterChange(Body):
    """``load``: ``[NAME=]RUN``, the adapter to put on the base, or in the place of the
    one that has its name (``checkpoint``: best, last or a step); or ``drop``: the name of one."""

    load: str | None = None
    checkpoint: str | None = None
    drop: str | None = None


def routes(service: Service) -> list[Route]:
    alone = asyncio.Lock()

    async def adapters(request: Request) -> Response:
        """The models that are served: names, tags, run and digest."""
        return JSONResponse({"data": [_described(served) for served in service.models.by_name.values()]})

    async def change(request: Request) -> Response:
        """Put an adapter on the base, replace it, or drop it; needs a key with `admin`."""
        wanted = await read(request, AdapterChange)
        if (wanted.load is None) == (wanted.drop is None):
            raise Rejection(400, "give either load or drop", "load", "invalid_value")
        if wanted.drop is not None and wanted.checkpoint is not None:
            raise Rejection(400, "checkpoint is for load", "checkpoint", "invalid_value")
        async with alone:
            try:
                if wanted.load is not None:
                    served = await _load(service, NamedRun.parse(wanted.load), wanted.checkpoint or "best")
                else:
                    served = await _drop(service, str(wanted.drop))
            except (TooLarge, UnknownModel):
                raise
            except TunesmithError as error:
                raise Rejection(400, str(error), "load" if wanted.load else "drop", "refused") from error
        service.background(_forget(service, alone))
        return JSONResponse(_described(served))

    return [
        Route("/admin/adapters", adapters, methods=["GET"]),
        Route("/admin/adapters", change, methods=["POST"]),
    ]


async def _load(service: Service, target: NamedRun, checkpoint: str) -> Served:
    models, worker = service.models, service.worker
    source = await asyncio.to_thread(opening.find, target.path, checkpoint)

    def load() -> Served:
        served, adapter = models.read(target, source)
        if tests := {*service.ab.names} & {*served.names}:
            hint = "give the adapter another name: NAME=RUN"
            raise ConfigError(f"{min(tests)} is the name of an A/B test", where=target.path, hint=hint)
        models.add(served, adapter, service.in_use)
        return served

    with worker.reserve(_bytes(source)):
        return await worker.run(load)


async def _drop(service: Service, name: str) -> Served:
    served = service.models.resolve(name)
    if (needed_by := service.needed(name)) is not None:
        raise ConfigError(f"{needed_by} needs {name}", hint="load another adapter under its name instead")
    await service.worker.run(lambda: service.models.drop(name, service.in_use))
    return served


async def _forget(service: Service, alone: asyncio.Lock) -> None:
    """Free the adapters that were replaced or dropped, once no answer needs them."""
    models, worker = service.models, service.worker
    while True:
        async with alone:
            named = {served.adapter for served in models.by_name.values()}
            unnamed = set(models.contents) - named
            if not unnamed:
                return
            if not unnamed & service.in_use:
                await worker.run(functools.partial(_free, service, unnamed))
        await asyncio.sleep(LOOK_S)


def _free(service: Service, unnamed: set[str]) -> None:
    service.models.forget_unused(service.in_use)
    for digest in unnamed:
        service.worker.forget(digest)


def _bytes(source: Source) -> int:
    """Memory for the adapter of ``source``."""
    if source.checkpoint is None:
        return 0
    weights = source.checkpoint / WEIGHTS
    return COPIES * weights.stat().st_size if weights.is_file() else 0


def _described(served: Served) -> dict[str, JSON]:
    run = None if served.run is None else str(served.run)
    return {"name": served.name, "tags": list(served.tags), "run": run, "digest": served.digest}
