"""The protocols that clients speak, one file each: a body becomes a `Question`, and pieces become JSON or
events."""

from starlette.routing import Route

from tunesmith.serving.protocol import chat, completions, embeddings, messages, responses
from tunesmith.serving.service import Service


def routes(service: Service) -> list[Route]:
    """Those of all protocols."""
    return [
        route
        for module in (chat, completions, responses, messages, embeddings)
        for route in module.routes(service)
    ]
