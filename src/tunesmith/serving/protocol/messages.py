"""``POST /v1/messages`` and ``/v1/messages/count_tokens``, as Anthropic's clients speak it."""

from __future__ import annotations

import json
import uuid
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import replace
from typing import Annotated, Any, Literal, TypeAlias, cast

from pydantic import BeforeValidator, Discriminator, Field, JsonValue, model_validator
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from tunesmith.data.formats import JSON, Call, Conversation, Message
from tunesmith.serving import answering
from tunesmith.serving.answering import AskedOnce
from tunesmith.serving.pieces import (
    AnswerEnded,
    CallArguments,
    CallBegun,
    Logprobs,
    PartKind,
    Piece,
    Reasoned,
    Usage,
    Words,
    begins_part,
    joined,
    part_of,
    parts,
    text_in,
)
from tunesmith.serving.protocol.bodies import (
    Body,
    Count,
    Stops,
    Temperature,
    Text,
    TopP,
    Unsupported,
    declared,
    read,
    require_answerable,
    require_tool,
    strict_tools,
    with_reasoning,
)
from tunesmith.serving.protocol.streams import ServerEvent, fallback_fields, fallback_headers, respond
from tunesmith.serving.question import Question, ToolChoice
from tunesmith.serving.rejections import ANTHROPIC, Rejection
from tunesmith.serving.service import Service

PATH = ANTHROPIC
REASONS = {"stop": "end_turn", "length": "max_tokens", "tool_calls": "tool_use", "content_filter": "refusal"}
FAILED = "Error: "
"""Stands before the result of a tool that failed: templates have no other mark for it."""


class CacheControl(Body):
    """Asks for a cache of prefixes, which is there for every prompt."""

    type: Literal["ephemeral"]
    ttl: str | None = None


class Block(Body):
    """Base of parts of a message."""

    cache_control: CacheControl | None = None


class TextBlock(Block):
    type: Literal["text"]
    text: str
    citations: Unsupported = None


class ThinkingBlock(Block):
    """``signature``: not checked."""

    type: Literal["thinking"]
    thinking: str
    signature: str | None = None


class ToolUse(Block):
    type: Literal["tool_use"]
    id: str
    name: str
    input: dict[str, JsonValue]


class ToolResult(Block):
    type: Literal["tool_result"]
    tool_use_id: str
    content: Text | None = None
    is_error: bool | None = None


AnyBlock: TypeAlias = Annotated[TextBlock | ThinkingBlock | ToolUse | ToolResult, Discriminator("type")]


def _blocks(value: object) -> object:
    if isinstance(value, str):
        return ({"type": "text", "text": value},)
    return tuple(value) if isinstance(value, list) else value


class AnthropicTurn(Body):
    role: Literal["user", "assistant"]
    content: Annotated[tuple[AnyBlock, ...], BeforeValidator(_blocks)]

    def messages(self) -> list[Message]:
        """The results of tools first, each a message of its own, then the words."""
        texts = [block.text for block in self.content if isinstance(block, TextBlock)]
        if self.role == "assistant":
            thoughts = [block.thinking for block in self.content if isinstance(block, ThinkingBlock)]
            calls = tuple(
                Call(block.name, cast(JSON, block.input), block.id)
                for block in self.content
                if isinstance(block, ToolUse)
            )
            return [Message("assistant", with_reasoning("".join(texts), "".join(thoughts)), calls)]
        results = [
            Message("tool", FAILED * bool(block.is_error) + (block.content or ""), call_id=block.tool_use_id)
            for block in self.content
            if isinstance(block, ToolResult)
        ]
        return [*results, *([Message("user", "".join(texts))] if texts or not results else [])]

    @model_validator(mode="after")
    def _fits_its_role(self) -> AnthropicTurn:
        wrong = ToolResult if self.role == "assistant" else (ToolUse, ThinkingBlock)
        for block in self.content:
            if isinstance(block, wrong):
                raise ValueError(f"{block.type} does not belong to the role {self.role}")
        return self


class CustomTool(Body):
    type: Literal["custom"] | None = None
    name: str
    description: str | None = None
    input_schema: dict[str, JsonValue]
    cache_control: CacheControl | None = None
    strict: bool | None = None

    def function(self) -> dict[str, Any]:
        described = {} if self.description is None else {"description": self.description}
        strict = {} if self.strict is None else {"strict": self.strict}
        return {"name": self.name, **described, "parameters": self.input_schema, **strict}


class AnthropicChoice(Body):
    type: Literal["auto", "any", "tool", "none"]
    name: str | None = None
    disable_parallel_tool_use: bool | None = None

    @model_validator(mode="after")
    def _names_its_tool(self) -> AnthropicChoice:
        if (self.type == "tool") != (self.name is not None):
            raise ValueError("name is for the type tool, and needed there")
        return self


class AnthropicThinking(Body):
    """``budget_tokens``: not possible, since nothing ends reasoning in time."""

    type: Literal["enabled", "disabled", "adaptive"]
    budget_tokens: Unsupported = None
    display: Unsupported = None


class AnthropicMetadata(Body):
    user_id: str | None = None


class CountBody(Body):
    """What decides the prompt."""

    model: str | None = None
    messages: tuple[AnthropicTurn, ...] = Field(min_length=1)
    system: Text | None = None
    tools: tuple[CustomTool, ...] | None = None
    tool_choice: AnthropicChoice | None = None
    thinking: AnthropicThinking | None = None

    @property
    def _choice(self) -> tuple[ToolChoice, str | None]:
        """The choice of tools, and the only tool that may be called."""
        choice = self.tool_choice
        if choice is None or choice.type == "auto":
            return "auto", None
        return ("none" if choice.type == "none" else "required"), choice.name

    def prompted(self) -> Question:
        """The question without how to draw. Raises Rejection if a message or a tool is not valid."""
        system = [Message("system", self.system)] if self.system and self.system.strip() else []
        messages = [*system, *(message for turn in self.messages for message in turn.messages())]
        require_answerable(messages, "messages")
        functions = [tool.function() for tool in self.tools or ()]
        tools = tuple(declared(function, f"tools[{place}]") for place, function in enumerate(functions))
        choice, named = self._choice
        require_tool(choice, named, functions)
        thinking = self.thinking
        return Question(
            self.model or "",
            Conversation(tuple(messages), () if choice == "none" else tools),
            tool_choice=choice,
            named_tool=named,
            one_call=bool(self.tool_choice and self.tool_choice.disable_parallel_tool_use),
            strict_tools=strict_tools(functions),
            thinking=None if thinking is None or thinking.type == "adaptive" else thinking.type == "enabled",
        )


class MessagesBody(CountBody):
    """``temperature``: 0 if none is given, as answers are evaluated."""

    max_tokens: Count
    temperature: Annotated[Temperature, Field(le=1)] | None = None
    top_p: TopP | None = None
    top_k: Annotated[int, Field(ge=0)] | None = None
    stop_sequences: Stops | None = None
    stream: bool | None = None
    metadata: AnthropicMetadata | None = None
    service_tier: Literal["auto", "standard_only"] | None = None
    container: Unsupported = None
    context_management: Unsupported = None
    mcp_servers: Unsupported = None

    def question(self) -> Question:
        """Raises Rejection if a message or a tool is not valid."""
        return replace(
            self.prompted(),
            max_tokens=self.max_tokens,
            **self.how_to_draw(),
            stop=self.stop_sequences or (),
            stream=bool(self.stream),
            user=None if self.metadata is None else self.metadata.user_id,
        )


def routes(service: Service) -> list[Route]:
    async def create(request: Request) -> Response:
        """An answer, as Anthropic's clients ask for it."""
        body = await read(request, MessagesBody)
        asked = await answering.ask(service, body.question())
        return await respond(MessageExchange(service, asked), body.stream)

    async def count(request: Request) -> Response:
        """How many tokens the prompt of a request has."""
        body = await read(request, CountBody)
        asked = await answering.ask(service, body.prompted())
        return JSONResponse({"input_tokens": len(asked.prepared.request.ids)})

    return [Route(PATH, create, methods=["POST"]), Route(f"{PATH}/count_tokens", count, methods=["POST"])]


class MessageExchange:
    """One question and its answer, as JSON."""

    def __init__(self, service: Service, asked: AskedOnce) -> None:
        self._id = f"msg_{uuid.uuid4().hex}"
        self._model = asked.question.model or asked.served.name
        self._deliveries = answering.deliveries(asked, self._id)
        self._prompt_tokens = len(asked.prepared.request.ids)
        self._stream = answering.answer(service, asked, 0, self._deliveries[0])

    @property
    def headers(self) -> dict[str, str]:
        return fallback_headers(self._deliveries)

    def _message(self, content: list[dict[str, Any]], ended: AnswerEnded | None) -> dict[str, Any]:
        usage = Usage(self._prompt_tokens) if ended is None else ended.usage
        return {
            "id": self._id,
            "type": "message",
            "role": "assistant",
            "model": self._model,
            "content": content,
            **_end(ended),
            "usage": _usage(usage),
            **fallback_fields(self._deliveries),
        }

    async def whole(self) -> Response:
        pieces = [piece async for piece in self._stream]
        content = [_content(run) for run in parts(pieces)]
        return JSONResponse(self._message(content, joined(pieces).ended), headers=self.headers)

    def broken_off(self, rejection: Rejection) -> ServerEvent:
        return ServerEvent(rejection.anthropic_body, "error")

    async def events(self) -> AsyncGenerator[ServerEvent]:
        async with aclosing(self._stream) as pieces:
            async for event in self._events(pieces):
                yield event

    async def _events(self, pieces: AsyncGenerator[Piece]) -> AsyncGenerator[ServerEvent]:
        """The events of one message. A block opens with its first piece, and closes when another begins."""
        place, is_open, has_begun = 0, False, False
        kind: PartKind = ""
        async for piece in pieces:
            if not has_begun:
                has_begun = True
                yield _event("message_start", message=self._message([], None))
            if isinstance(piece, Logprobs):
                continue
            if is_open and begins_part(piece, kind):
                if kind == "reasoning":
                    signature = {"type": "signature_delta", "signature": ""}
                    yield _event("content_block_delta", index=place, delta=signature)
                yield _event("content_block_stop", index=place)
                place, is_open = place + 1, False
            if isinstance(piece, AnswerEnded):
                yield _event("message_delta", delta=_end(piece), usage=_usage(piece.usage))
                yield _event("message_stop")
                return
            if not is_open:
                is_open, kind = True, part_of(piece)
                yield _event("content_block_start", index=place, content_block=_opened(piece))
            if delta := _delta(piece):
                yield _event("content_block_delta", index=place, delta=delta)


def _event(name: str, **fields: Any) -> ServerEvent:
    return ServerEvent({"type": name, **fields}, name)


def _end(ended: AnswerEnded | None) -> dict[str, Any]:
    if ended is None:
        return {"stop_reason": None, "stop_sequence": None}
    stopped = ended.reason == "stop" and ended.stop is not None
    reason = "stop_sequence" if stopped else REASONS[ended.reason]
    return {"stop_reason": reason, "stop_sequence": ended.stop if stopped else None}


def _usage(usage: Usage) -> dict[str, Any]:
    """Anthropic counts the cached part of the prompt apart."""
    return {
        "input_tokens": usage.prompt - usage.cached,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": usage.cached,
        "output_tokens": usage.answer,
    }


def _content(run: list[Piece]) -> dict[str, Any]:
    """A block that is complete."""
    block, text = _opened(run[0]), text_in(run)
    if block["type"] == "tool_use":
        return {**block, "input": json.loads(text)}
    return {**block, block["type"]: text}


def _opened(piece: Piece) -> dict[str, Any]:
    """A block that has just begun."""
    match piece:
        case CallBegun(_, call_id, name):
            return {"type": "tool_use", "id": call_id, "name": name, "input": {}}
        case Reasoned():
            return {"type": "thinking", "thinking": "", "signature": ""}
        case _:
            return {"type": "text", "text": ""}


def _delta(piece: Piece) -> dict[str, Any] | None:
    match piece:
        case Words(text):
            return {"type": "text_delta", "text": text}
        case Reasoned(text):
            return {"type": "thinking_delta", "thinking": text}
        case CallArguments(_, text):
            return {"type": "input_json_delta", "partial_json": text}
        case _:
            return None
