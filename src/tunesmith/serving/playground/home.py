"""The page at ``/``: the same for everyone; what is served is asked by its script."""

from __future__ import annotations

from functools import cache

from starlette.requests import Request
from starlette.responses import HTMLResponse, Response
from starlette.routing import Route

from tunesmith.display import page


@cache
def playground() -> str:
    return page.render(
        "page.html",
        {},
        package="tunesmith.serving.playground",
        verb="serve",
        tone="note",
        filters={},
        facts={},
    )


def routes() -> list[Route]:
    async def home(request: Request) -> Response:
        """A page to talk with two models side by side."""
        return HTMLResponse(playground())

    return [Route("/", home)]
