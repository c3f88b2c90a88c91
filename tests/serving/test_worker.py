"""The thread that owns the engine: what it answers, and what keeps it going."""

from __future__ import annotations

from tunesmith.engine.requests import Request


async def answer(service, name, ids, **options):
    served = service.served(name)
    request = Request(ids, served.renderer.eos_ids, **options)
    return [token.token async for token in service.ask(served, request)]


def test_tokens_are_those_of_the_engine_alone(server):
    ids = [5, 6, 7, 8]
    for name in (None, "base", "writer", "caller"):
        tokens = server.call(answer(server.service, name, ids, max_tokens=6))
        assert tokens
