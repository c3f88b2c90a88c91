"""``POST /v1/completions``: plain text, or ids, to be continued; no chat template."""

from __future__ import annotations

import time
import uuid
from collections.abc import AsyncGenerator, Iterator, Sequence
from contextlib import aclosing
from typing import Annotated, Any

from pydantic import Field, model_validator
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from tunesmith.serving import answering
from tunesmith.serving.answering import AskedOnce
from tunesmith.serving.lexicon import Lexicon
from tunesmith.serving.pieces import AnswerEnded, Logprobs, TokenLogprob, Usage, Words
from tunesmith.serving.protocol.bodies import (
    MOST_LOGPROBS,
    Count,
    Drawing,
    TextsOrIds,
    Unsupported,
    listed,
    read,
)
from tunesmith.serving.protocol.chat import LOWEST, usage_of
from tunesmith.serving.protocol.streams import ServerEvent, fallback_fields, fallback_headers, respond
from tunesmith.serving.question import Question
from tunesmith.serving.rejections import Rejection
from tunesmith.serving.service import Service

PATH = "/v1/completions"


class CompletionBody(Drawing):
    """``prompt``: a text, ids, or a list of either. ``echo``: the prompt before its continuation.
    ``best_of``: only as many as ``n``."""

    prompt: TextsOrIds
    max_tokens: Count | None = None
    logprobs: Annotated[int, Field(ge=0, le=MOST_LOGPROBS)] | None = None
    echo: bool | None = None
    best_of: Count | None = None
    suffix: Unsupported = None

    @model_validator(mode="after")
    def _can_be_done(self) -> CompletionBody:
        if self.best_of is not None and self.best_of != (self.n or 1):
            raise ValueError("best_of must be n: no answers are made that are not delivered")
        if self.echo and self.logprobs is not None:
            raise ValueError("echo with logprobs: those of the prompt are not computed")
        if len(self.prompt) == 0:
            raise ValueError("prompt is empty")
        return self

    def questions(self) -> list[Question]:
        return [
            self.drawn(Question(self.model or "", prompt, max_tokens=self.max_tokens, logprobs=self.logprobs))
            for prompt in listed(self.prompt)
        ]


def routes(service: Service) -> list[Route]:
    async def complete(request: Request) -> Response:
        body = await read(request, CompletionBody)
        questions = body.questions()
        if len(questions) * questions[0].n > service.limits.choices:
            message = f"n: {len(questions)} prompts, {questions[0].n} answers each, are more than "
            message += f"{service.limits.choices}, which this server allows"
            raise Rejection(400, message, "n", "limit_exceeded")
        asked = [await answering.ask(service, question) for question in questions]
        return await respond(CompletionExchange(service, asked, body), body.stream)

    return [Route(PATH, complete, methods=["POST"])]


class CompletionExchange:
    """Prompts and their continuations, as JSON."""

    def __init__(self, service: Service, prompts: Sequence[AskedOnce], body: CompletionBody) -> None:
        first = prompts[0]
        answer_id = f"cmpl-{uuid.uuid4().hex}"
        self._prompts, self._n, self._include_usage = prompts, first.question.n, body.include_usage
        self._lexicon = service.lexicons.of(first.prepared.renderer)
        self._deliveries = [
            delivery for asked in prompts for delivery in answering.deliveries(asked, answer_id)
        ]
        self._streams = [
            answering.answer(service, self._asked(place), place % self._n, delivery)
            for place, delivery in enumerate(self._deliveries)
        ]
        self._echoes = [self._prompt_text(place) if body.echo else "" for place in range(len(self._streams))]
        self._head = {
            "id": answer_id,
            "object": "text_completion",
            "created": int(time.time()),
            "model": first.question.model or first.served.name,
            "system_fingerprint": first.fingerprint,
        }

    def _asked(self, place: int) -> AskedOnce:
        return self._prompts[place // self._n]

    def _prompt_text(self, place: int) -> str:
        asked = self._asked(place)
        prompt = asked.question.prompt
        if isinstance(prompt, str):
            return prompt
        return asked.prepared.renderer.decode(asked.prepared.request.ids)

    @property
    def headers(self) -> dict[str, str]:
        return fallback_headers(self._deliveries)

    async def whole(self) -> Response:
        answers = await answering.whole(self._streams)
        choices = [
            self._choice(place, self._echoes[place] + answer.words, answer.logprobs, answer.ended.reason)
            for place, answer in enumerate(answers)
        ]
        usage = self._usage([answer.ended.usage for answer in answers])
        content = {**self._head, "choices": choices, "usage": usage, **fallback_fields(self._deliveries)}
        return JSONResponse(content, headers=self.headers)

    def _choice(
        self, place: int, text: str, entries: Sequence[TokenLogprob], reason: str | None, begin: int = 0
    ) -> dict[str, Any]:
        wanted = self._asked(place).question.logprobs is not None
        return {
            "index": place,
            "text": text,
            "logprobs": logprobs_of(entries, self._lexicon, begin) if wanted else None,
            "finish_reason": reason,
        }

    def _usage(self, usages: Sequence[Usage]) -> dict[str, Any]:
        """Each prompt is counted once."""
        parts = [usage_of(usages[start : start + self._n]) for start in range(0, len(usages), self._n)]
        return {
            name: {key: sum(part[name][key] for part in parts) for key in value}
            if isinstance(value, dict)
            else sum(part[name] for part in parts)
            for name, value in parts[0].items()
        }

    def broken_off(self, rejection: Rejection) -> ServerEvent:
        return ServerEvent(rejection.body)

    async def events(self) -> AsyncGenerator[ServerEvent]:
        used: dict[int, Usage] = {}
        waiting: dict[int, tuple[TokenLogprob, ...]] = {}
        lengths = [0] * len(self._streams)  # of the texts of the tokens so far
        extra = {"usage": None} if self._include_usage else {}
        for place, echo in enumerate(self._echoes):
            if echo:
                yield self._chunk([self._choice(place, echo, (), None)], extra)
        async with aclosing(answering.merged(self._streams)) as pieces:
            async for place, piece in pieces:
                if isinstance(piece, Logprobs):
                    waiting[place] = waiting.get(place, ()) + piece.tokens
                    continue
                reason = piece.reason if isinstance(piece, AnswerEnded) else None
                if isinstance(piece, AnswerEnded):
                    used[place] = piece.usage
                text = piece.text if isinstance(piece, Words) else ""
                entries = waiting.pop(place, ())
                yield self._chunk([self._choice(place, text, entries, reason, lengths[place])], extra)
                lengths[place] += sum(len(self._lexicon.token(entry.token)[0]) for entry in entries)
        if self._include_usage:
            yield self._chunk([], {"usage": self._usage([used[place] for place in sorted(used)])})
        yield ServerEvent("[DONE]")

    def _chunk(self, choices: list[dict[str, Any]], extra: dict[str, Any]) -> ServerEvent:
        return ServerEvent({**self._head, "choices": choices, **extra, **fallback_fields(self._deliveries)})


def logprobs_of(entries: Sequence[TokenLogprob], lexicon: Lexicon, begin: int = 0) -> dict[str, Any]:
    """Lists with one entry a token. ``text_offset`` of the first is ``begin``."""
    texts = [lexicon.token(entry.token)[0] for entry in entries]
    return {
        "tokens": texts,
        "token_logprobs": [max(entry.logprob, LOWEST) for entry in entries],
        "top_logprobs": [
            {lexicon.token(token)[0]: max(logprob, LOWEST) for token, logprob in entry.top}
            for entry in entries
        ],
        "text_offset": list(_offsets(texts, begin)),
    }


def _offsets(texts: Sequence[str], offset: int) -> Iterator[int]:
    for text in texts:
        yield offset
        offset += len(text)
