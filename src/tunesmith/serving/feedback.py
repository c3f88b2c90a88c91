"""``/v1/feedback``: votes on answers, written to the server's ``votes.jsonl``.

``{"id": ANSWER, "thumb": "up"}`` or ``{"first": ANSWER, "second": ANSWER, "preferred": "first"}``, with
``"user"`` for the one who votes, and ``"blind": false`` if they know which model answered. The id of choice
``i`` of several is ``ANSWER/i``. ``GET`` says which model gave an answer, which a blind comparison does not
show before."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import Literal

from pydantic import Field, model_validator
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from tunesmith.errors import ServeError
from tunesmith.serving import votes
from tunesmith.serving.protocol.bodies import Body, read
from tunesmith.serving.rejections import Rejection
from tunesmith.serving.service import Service
from tunesmith.serving.votes import RememberedAnswer, UnknownAnswer, Vote


class Feedback(Body):
    """A vote."""

    id: str | None = None
    thumb: Literal["up", "down"] | None = None
    first: str | None = None
    second: str | None = None
    preferred: Literal["first", "second", "tie"] | None = None
    user: str | None = Field(default=None, max_length=512)
    blind: bool = True

    @model_validator(mode="after")
    def _one_vote(self) -> Feedback:
        single, pair = (self.id, self.thumb), (self.first, self.second, self.preferred)
        if not ((None not in single and pair == (None,) * 3) or (None not in pair and single == (None,) * 2)):
            raise ValueError("give id and thumb, or first, second and preferred")
        return self


def routes(service: Service) -> list[Route]:
    async def vote(request: Request) -> Response:
        """Vote on one answer, or between two."""
        feedback = await read(request, Feedback)
        given = _vote(service, feedback)
        given = replace(given, blind=given.blind and feedback.blind)
        try:
            # Votes are rare, and the lock of the file may be held by another process.
            await asyncio.to_thread(votes.append, service.votes_file, given)
        except ServeError as error:
            # The path is none of the client's business.
            raise Rejection(500, error.what, None, "failed") from error
        return JSONResponse({"object": "feedback", "recorded": True})

    async def answered_by(request: Request) -> Response:
        """Which model gave an answer."""
        answer = _remembered(service, request.path_params["answer"], None)
        body = {"id": answer.id, "model": answer.model, "digest": answer.digest, "test": answer.test}
        return JSONResponse(body)

    return [Route("/v1/feedback", vote, methods=["POST"]), Route("/v1/feedback/{answer:path}", answered_by)]


def _vote(service: Service, feedback: Feedback) -> Vote:
    if feedback.preferred is None:
        answer = _remembered(service, feedback.id or "", "id")
        return votes.thumb(answer, feedback.thumb == "up", feedback.user)
    first = _remembered(service, feedback.first or "", "first")
    second = _remembered(service, feedback.second or "", "second")
    try:
        return votes.preference(first, second, feedback.preferred, feedback.user)
    except ServeError as error:
        raise Rejection(400, str(error), "second", "invalid_value") from error


def _remembered(service: Service, answer_id: str, param: str | None) -> RememberedAnswer:
    try:
        return service.answers.get(answer_id)
    except UnknownAnswer as error:
        raise Rejection(404, str(error), param, "unknown_answer") from error
