"""The HTTP side: routes, and what every request passes on its way to one."""

from __future__ import annotations

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp

from tunesmith.errors import TunesmithError
from tunesmith.serving import admin, entrance, feedback, protocol, status
from tunesmith.serving.entrance import Entrance
from tunesmith.serving.playground import home
from tunesmith.serving.rejections import Rejection
from tunesmith.serving.service import Service


def routes(service: Service) -> list[Route]:
    """Every route. A module with handlers exports a function of this name, and has one line here."""
    modules = (status, admin, feedback, protocol)
    return [*(route for module in modules for route in module.routes(service)), *home.routes()]


def build(service: Service) -> ASGIApp:
    """The application, for uvicorn or a test client."""
    handlers = {
        HTTPException: _unrouted,
        TunesmithError: _rejected,
        Rejection: _rejected,
        Exception: _rejected,
    }
    return Entrance(Starlette(routes=routes(service), exception_handlers=handlers), service)


async def _unrouted(request: Request, error: Exception) -> Response:
    """No route has the path, or it does not take the method."""
    assert isinstance(error, HTTPException)
    message = f"{request.method} {request.url.path}: {error.detail.lower()}"
    return await _rejected(request, Rejection(error.status_code, message))


async def _rejected(request: Request, error: Exception) -> Response:
    rejection = entrance.failure(error)
    body = rejection.body_for(request.url.path)
    return JSONResponse(body, rejection.status, headers=dict(rejection.headers))
