"""The HTTP side: routes, and what every request passes on its way to one."""

from __future__ import annotations

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from tunesmith.errors import TunesmithError
from tunesmith.serving.rejections import Rejection, rejection_of
from tunesmith.serving.service import Service


def routes(service: Service) -> list[Route]:
    """Every route. A module with handlers exports a function of this name, and has one line here."""
    return []


def build(service: Service) -> Starlette:
    """The application, for uvicorn or a test client."""
    handlers = {
        HTTPException: _unrouted,
        TunesmithError: _rejected,
        Rejection: _rejected,
        Exception: _rejected,
    }
    return Starlette(routes=routes(service), exception_handlers=handlers)


async def _unrouted(request: Request, error: Exception) -> Response:
    """No route has the path, or it does not take the method."""
    assert isinstance(error, HTTPException)
    message = f"{request.method} {request.url.path}: {error.detail.lower()}"
    return await _rejected(request, Rejection(error.status_code, message))


async def _rejected(request: Request, error: Exception) -> Response:
    rejection = rejection_of(error)
    return JSONResponse(rejection.body, rejection.status, headers=dict(rejection.headers))
