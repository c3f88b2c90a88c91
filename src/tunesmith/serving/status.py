"""``/health``, ``/metrics`` with a board for Grafana, and ``/v1/models``: how the server is, and what it
serves."""

from __future__ import annotations

from importlib import resources

from prometheus_client import CONTENT_TYPE_LATEST
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from tunesmith.serving.served import Served
from tunesmith.serving.service import Service
from tunesmith.settings.config import JSON

BOARD = resources.files("tunesmith.serving") / "grafana.json"


def routes(service: Service) -> list[Route]:
    async def health(request: Request) -> Response:
        """Whether the server is ready, still starting, or ending."""
        worker = service.worker
        state = "draining" if worker.draining else "ok" if worker.healthy else "starting"
        body = {"status": state, "under_way": worker.n_rows, "waiting": worker.n_waiting}
        return JSONResponse(body, 200 if state == "ok" else 503)

    async def metrics(request: Request) -> Response:
        """Counters and times in the text format of Prometheus."""
        return Response(service.metrics.text(), media_type=CONTENT_TYPE_LATEST)

    async def board(request: Request) -> Response:
        """A board for Grafana that shows the metrics."""
        return Response(BOARD.read_bytes(), media_type="application/json")

    async def models(request: Request) -> Response:
        """The models that are served, and the A/B tests."""
        allowed = [served for served in service.models.entries if service.allows_names(served.names)]
        listed = [entry for served in allowed for entry in _entries(served)] + _tests(service)
        return JSONResponse({"object": "list", "data": listed})

    async def model(request: Request) -> Response:
        """One model."""
        name = request.path_params["name"]
        if name in service.ab.names:
            for entry in _tests(service):
                if entry["id"] == name:
                    return JSONResponse(entry)
        served = service.served(name)
        by_name = {str(entry["id"]): entry for entry in _entries(served)}
        return JSONResponse(by_name.get(name, by_name[served.name]))  # it may be named by its run directory

    return [
        Route("/health", health),
        Route("/metrics", metrics),
        Route("/metrics/grafana.json", board),
        Route("/v1/models", models),
        Route("/v1/models/{name:path}", model),
    ]


def _tests(service: Service) -> list[dict[str, JSON]]:
    """The A/B tests, with the models behind each."""
    return [
        {
            "id": name,
            "object": "model",
            "created": service.models.entries[0].created,
            "owned_by": "tunesmith",
            "root": name,
            "ab": list(service.ab.models(name)),
        }
        for name in service.ab.names
        if service.allows_names((name,))
    ]


def _entries(served: Served) -> list[dict[str, JSON]]:
    """One for each name."""
    return [
        {
            "id": name,
            "object": "model",
            "created": served.created,
            "owned_by": "tunesmith",
            "root": served.name,
            "digest": served.digest,
        }
        for name in served.names
    ]
