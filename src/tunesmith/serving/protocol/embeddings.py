"""``POST /v1/embeddings``: the mean of the last layer's hidden states over a text's tokens, of length 1. A
model that was trained to answer is not one that was trained to embed: the vectors compare texts roughly."""

from __future__ import annotations

import asyncio
import base64
from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from tunesmith.auditing import embeddings
from tunesmith.errors import ModelError, TemplateError
from tunesmith.model import abilities, vocabulary
from tunesmith.serving import access, answering
from tunesmith.serving.protocol.bodies import Body, Count, Ids, TextsOrIds, listed, read
from tunesmith.serving.rejections import Rejection, TimedOut
from tunesmith.serving.served import Served
from tunesmith.serving.service import Service

PATH = "/v1/embeddings"
MOST_TEXTS = 256


class EmbeddingBody(Body):
    """``input``: a text, ids, or a list of either. ``dimensions``: only as many as the model has."""

    model: str | None = None
    input: TextsOrIds
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: Count | None = None
    user: str | None = None


def routes(service: Service) -> list[Route]:
    async def embed(request: Request) -> Response:
        body = await read(request, EmbeddingBody)
        served = service.served(body.model or None)
        texts = listed(body.input)
        size = sum(map(len, texts))
        sequences = await answering.off_loop(size, _sequences, service, served, texts)
        vectors = await _vectors(service, served, sequences)
        if body.dimensions not in (None, vectors.shape[1]):
            message = f"dimensions: the model has {vectors.shape[1]}, and they are not cut"
            raise Rejection(400, message, "dimensions", "unsupported_value")
        record = access.current()
        record.model, record.adapter = served.name, served.adapter
        record.prompt_tokens = total = sum(map(len, sequences))
        data = [
            {"object": "embedding", "index": index, "embedding": _encoded(vector, body.encoding_format)}
            for index, vector in enumerate(vectors)
        ]
        usage = {"prompt_tokens": total, "total_tokens": total}
        return JSONResponse(
            {"object": "list", "model": body.model or served.name, "data": data, "usage": usage}
        )

    return [Route(PATH, embed, methods=["POST"])]


def _sequences(service: Service, served: Served, texts: Sequence[str | Ids]) -> list[list[int]]:
    """The ids of the texts, as guardrails let them through. Raises Rejection if there are too many of them,
    or one has none or is too long."""
    if not 0 < len(texts) <= MOST_TEXTS:
        message = f"input: {len(texts)} texts, from 1 to {MOST_TEXTS} are possible"
        raise Rejection(400, message, "input", "limit_exceeded")
    for place, text in enumerate(texts):
        answering.require_readable(service, len(text), f"input[{place}]")
    sequences: list[list[int]] = []
    for place, text in enumerate([service.guard.screen_text(text) for text in texts]):
        try:
            ids = served.renderer.text_prompt(text) if isinstance(text, str) else list(text)
        except TemplateError as error:
            raise Rejection(400, str(error), f"input[{place}]", "invalid_value") from error
        if not ids:
            raise Rejection(400, f"input[{place}] has no tokens", f"input[{place}]", "invalid_value")
        answering.require_short(service, ids, f"input[{place}]")
        sequences.append(ids)
    return sequences


async def _vectors(service: Service, served: Served, sequences: Sequence[Sequence[int]]) -> np.ndarray:
    """(n, D) float32, each of length 1. Between two batches the engine goes on with its answers. Raises as
    `Worker.ask` does."""
    worker = service.worker
    vectors: dict[int, np.ndarray] = {}
    each = await worker.run(lambda: _position_bytes(service))
    batches = embeddings.batches(sequences)
    costs = [each * len(batch) * max(len(sequences[place]) for place in batch) for batch in batches]
    worker.admit(max(costs))
    try:
        async with asyncio.timeout(service.limits.total_s):
            for batch, cost in zip(batches, costs, strict=True):
                rows = {place: sequences[place] for place in batch}
                means = await worker.run(lambda rows=rows: _means(service, served, rows), cost)
                vectors |= dict(zip(batch, means, strict=True))
    except TimeoutError:
        raise TimedOut(f"the vectors took longer than {service.limits.total_s:g} s") from None
    stacked = np.stack([vectors[place] for place in range(len(sequences))])
    return stacked / np.maximum(np.linalg.norm(stacked, axis=1, keepdims=True), 1e-12)


def _position_bytes(service: Service) -> int:
    """On MLX's thread. Raises ModelError if the model does not expose its hidden states."""
    net = service.models.loaded.net
    if not abilities.splits(net):
        raise ModelError("this model does not expose its hidden states", hint="ask for answers, not vectors")
    return embeddings.position_bytes(net)


def _means(service: Service, served: Served, by_place: Mapping[int, Sequence[int]]) -> np.ndarray:
    """On MLX's thread. ``by_place``: place in the input → ids. Raises ModelError if the model does not know
    an id."""
    net, routing = service.models.loaded.net, service.models.routing
    vocabulary.require_known(net, [(f"input[{place}]", row) for place, row in by_place.items()])
    rows = list(by_place.values())
    if routing is None:
        return embeddings.means(net, rows)
    routing.require([served.adapter])
    routing.select(served.adapter)
    try:
        return embeddings.means(net, rows)
    finally:
        routing.select(None)


def _encoded(vector: np.ndarray, encoding: str | None) -> list[float] | str:
    if encoding == "base64":
        return base64.b64encode(vector.astype("<f4").tobytes()).decode()
    return vector.astype(float).tolist()
