"""``POST /v1/responses``, OpenAI's newer protocol. Nothing is stored: each request brings its history."""

from __future__ import annotations

import time
import uuid
from collections.abc import AsyncGenerator, Iterator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field, replace
from typing import Annotated, Any, Literal, TypeAlias, cast

from pydantic import BeforeValidator, Field, JsonValue, model_validator
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from tunesmith.data.formats import JSON, Conversation, Message
from tunesmith.serving import answering
from tunesmith.serving.answering import AskedOnce
from tunesmith.serving.lexicon import Lexicon
from tunesmith.serving.pieces import (
    AnswerEnded,
    CallArguments,
    CallBegun,
    Logprobs,
    Piece,
    Reasoned,
    TokenLogprob,
    Usage,
    Words,
    begins_part,
    part_of,
)
from tunesmith.serving.protocol.bodies import (
    MOST_LOGPROBS,
    Body,
    Count,
    Labels,
    Temperature,
    Text,
    TopP,
    Unsupported,
    call_of,
    declared,
    read,
    require_answerable,
    require_tool,
    strict_tools,
    text_of,
    with_reasoning,
)
from tunesmith.serving.protocol.chat import logprob_of
from tunesmith.serving.protocol.streams import ServerEvent, fallback_fields, fallback_headers, respond
from tunesmith.serving.question import AnswerFormat, Question, ToolChoice
from tunesmith.serving.rejections import Rejection
from tunesmith.serving.service import Service

PATH = "/v1/responses"
LOGPROBS = "message.output_text.logprobs"
CAUSES = {"length": "max_output_tokens", "content_filter": "content_filter"}
"""Why an answer ended → why the response is incomplete."""
Status: TypeAlias = Literal["in_progress", "completed", "incomplete"] | None


class ReasoningText(Body):
    type: Literal["reasoning_text"]
    text: str


def _content(value: object) -> object:
    """The reasoning of an item, or its text."""
    parts = cast("list[Any]", value) if isinstance(value, list) else []
    if parts and all(isinstance(part, dict) and part.get("type") == "reasoning_text" for part in parts):
        return tuple(parts)
    return text_of(value)


class InputItem(Body):
    """One item of the history: a message, a call, its result, or reasoning. ``id``, ``status``: as an earlier
    answer had them."""

    type: Literal["message", "function_call", "function_call_output", "reasoning"] = "message"
    role: Literal["system", "developer", "user", "assistant"] | None = None
    content: Annotated[str | tuple[ReasoningText, ...] | None, BeforeValidator(_content)] = None
    call_id: str | None = None
    name: str | None = None
    arguments: str | None = None
    output: Text | None = None
    summary: Unsupported = None
    encrypted_content: Unsupported = None
    phase: Unsupported = None
    namespace: Unsupported = None
    id: str | None = None
    status: Status = None

    @model_validator(mode="after")
    def _is_whole(self) -> InputItem:
        needed = {
            "message": (self.role, self.content),
            "function_call": (self.call_id, self.name, self.arguments),
            "function_call_output": (self.call_id, self.output),
            "reasoning": (),
        }[self.type]
        if None in needed or (self.type == "message" and not isinstance(self.content, str)):
            raise ValueError(f"an item of type {self.type} lacks a field")
        return self


def _items(value: object) -> object:
    if isinstance(value, str):
        return ({"role": "user", "content": value},)
    return tuple(value) if isinstance(value, list) else value


class FlatTool(Body):
    type: Literal["function"]
    name: str
    description: str | None = None
    parameters: dict[str, JsonValue] | None = None
    strict: bool | None = None


class FlatNamedTool(Body):
    type: Literal["function"]
    name: str


class TextFormat(Body):
    """``name``, ``description``: for whoever reads the request. ``strict``: schemas are always enforced."""

    type: Literal["text", "json_object", "json_schema"]
    name: str | None = None
    description: str | None = None
    schema_: dict[str, JsonValue] | None = Field(None, alias="schema")
    strict: bool | None = None

    @model_validator(mode="after")
    def _has_its_schema(self) -> TextFormat:
        if (self.type == "json_schema") != (self.schema_ is not None):
            raise ValueError("schema is for the type json_schema, and needed there")
        return self


class TextSettings(Body):
    format: TextFormat | None = None
    verbosity: Literal["medium"] | None = None


class ReasoningSettings(Body):
    """``effort``: only ``none``, since templates have no levels."""

    effort: Literal["none"] | None = None
    summary: Unsupported = None
    generate_summary: Unsupported = None


class ResponseBody(Body):
    model: str | None = None
    input: Annotated[tuple[InputItem, ...], BeforeValidator(_items), Field(min_length=1)]
    instructions: str | None = None
    max_output_tokens: Count | None = None
    temperature: Temperature | None = None
    top_p: TopP | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MOST_LOGPROBS)] | None = None
    include: tuple[Literal["message.output_text.logprobs"], ...] | None = None
    text: TextSettings | None = None
    tools: tuple[FlatTool, ...] | None = None
    tool_choice: ToolChoice | FlatNamedTool | None = None
    parallel_tool_calls: bool | None = None
    reasoning: ReasoningSettings | None = None
    stream: bool | None = None
    user: str | None = None
    metadata: Labels = None
    service_tier: Literal["auto", "default"] | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    truncation: Literal["disabled"] | None = None
    store: Unsupported = None
    background: Unsupported = None
    previous_response_id: Unsupported = None
    conversation: Unsupported = None
    prompt: Unsupported = None
    max_tool_calls: Unsupported = None
    stream_options: Unsupported = None

    def question(self) -> Question:
        """Raises Rejection if an item or a tool is not valid."""
        instructions = self.instructions or ""
        system = [Message("system", instructions)] if instructions.strip() else []
        messages = [*system, *_messages(self.input)]
        require_answerable(messages, "input")
        functions = [
            {key: value for key, value in tool.model_dump(exclude_unset=True).items() if key != "type"}
            for tool in self.tools or ()
        ]
        tools = tuple(declared(function, f"tools[{place}]") for place, function in enumerate(functions))
        choice, named = self.tool_choice or "auto", None
        if isinstance(choice, FlatNamedTool):
            choice, named = "required", choice.name
        require_tool(choice, named, functions)
        wants_logprobs = LOGPROBS in (self.include or ())
        return Question(
            self.model or "",
            Conversation(tuple(messages), () if choice == "none" else tools),
            max_tokens=self.max_output_tokens,
            **self.how_to_draw(),
            logprobs=(self.top_logprobs or 0) if wants_logprobs else None,
            tool_choice=choice,
            named_tool=named,
            one_call=self.parallel_tool_calls is False,
            strict_tools=strict_tools(functions),
            format=self._format,
            thinking=False if self.reasoning is not None and self.reasoning.effort == "none" else None,
            stream=bool(self.stream),
            user=self.user,
        )

    @model_validator(mode="after")
    def _agrees(self) -> ResponseBody:
        if self.top_logprobs is not None and LOGPROBS not in (self.include or ()):
            raise ValueError(f"top_logprobs needs include: {LOGPROBS}")
        return self

    @property
    def _format(self) -> AnswerFormat | None:
        form = None if self.text is None else self.text.format
        if form is None or form.type == "text":
            return None
        return AnswerFormat(cast(JSON, form.schema_), "text.format")


def _messages(items: Sequence[InputItem]) -> list[Message]:
    """The history as messages: reasoning, words and calls that follow each other are one answer, whose
    reasoning stands first, as templates write it."""
    messages: list[Message] = []
    thought = ""
    words = reasoning = ""  # of the newest answer
    for place, item in enumerate(items):
        param = f"input[{place}]"
        earlier = messages[-1] if messages and messages[-1].role == "assistant" else None
        if item.type == "reasoning":
            parts = item.content if isinstance(item.content, tuple) else ()
            thought += "".join(part.text for part in parts)
        elif item.type == "function_call":
            call = call_of(item.name or "", item.arguments or "", item.call_id, param)
            if earlier is None:
                words, reasoning = "", thought
                messages.append(Message("assistant", with_reasoning("", thought), (call,)))
            else:
                reasoning += thought
                content = with_reasoning(words, reasoning)
                messages[-1] = replace(earlier, content=content, calls=(*earlier.calls, call))
            thought = ""
        elif item.type == "function_call_output":
            messages.append(Message("tool", item.output or "", call_id=item.call_id))
        elif item.role == "assistant":
            words, reasoning, thought = str(item.content), thought, ""
            messages.append(Message("assistant", with_reasoning(words, reasoning)))
        else:
            role = "system" if item.role == "developer" else str(item.role)
            if role != "system" or str(item.content).strip():
                messages.append(Message(role, str(item.content)))
    return messages


def routes(service: Service) -> list[Route]:
    async def create(request: Request) -> Response:
        body = await read(request, ResponseBody)
        asked = await answering.ask(service, body.question())
        return await respond(ResponseExchange(service, asked, body), body.stream)

    return [Route(PATH, create, methods=["POST"])]


@dataclass
class OutputItem:
    """A part of the answer, as one item of the output. ``end``: its status when no more of it follows."""

    index: int
    first: Piece
    texts: list[str] = field(default_factory=list)
    logprobs: list[dict[str, Any]] = field(default_factory=list)
    id: str = ""
    end: Literal["completed", "incomplete"] = "completed"

    def __post_init__(self) -> None:
        prefix = {"reasoning": "rs", "words": "msg", "call": "fc"}[part_of(self.first)]
        self.id = f"{prefix}_{uuid.uuid4().hex}"

    @property
    def text(self) -> str:
        return "".join(self.texts)

    @property
    def part(self) -> dict[str, Any]:
        """The only part of its content."""
        if isinstance(self.first, Reasoned):
            return {"type": "reasoning_text", "text": self.text}
        return {"type": "output_text", "text": self.text, "annotations": [], "logprobs": self.logprobs}

    def shown(self, status: str) -> dict[str, Any]:
        """The item; while it is ``in_progress``, it has no content yet."""
        content = [] if status == "in_progress" else [self.part]
        head = {"id": self.id, "status": status}
        match self.first:
            case CallBegun(_, call_id, name):
                call = {"call_id": call_id, "name": name, "arguments": self.text}
                return {**head, "type": "function_call", **call}
            case Reasoned():
                return {**head, "type": "reasoning", "summary": [], "content": content}
            case _:
                return {**head, "type": "message", "role": "assistant", "content": content}

    @property
    def place(self) -> dict[str, Any]:
        """Where a delta belongs."""
        where = {"item_id": self.id, "output_index": self.index}
        return where if isinstance(self.first, CallBegun) else {**where, "content_index": 0}

    def began(self) -> Iterator[tuple[str, dict[str, Any]]]:
        """Kinds and fields of the events that tell of it."""
        item = self.shown("in_progress")
        yield "response.output_item.added", {"output_index": self.index, "item": item}
        if not isinstance(self.first, CallBegun):
            yield "response.content_part.added", {**self.place, "part": self.part}

    def grew(self, piece: Piece, logprobs: list[dict[str, Any]]) -> Iterator[tuple[str, dict[str, Any]]]:
        self.logprobs += logprobs
        match piece:
            case Words(text):
                self.texts.append(text)
                fields = {**self.place, "delta": text, "logprobs": logprobs}
                yield "response.output_text.delta", fields
            case Reasoned(text):
                self.texts.append(text)
                yield "response.reasoning_text.delta", {**self.place, "delta": text}
            case CallArguments(_, text):
                self.texts.append(text)
                yield "response.function_call_arguments.delta", {**self.place, "delta": text}
            case _:
                pass

    def ended(self) -> Iterator[tuple[str, dict[str, Any]]]:
        match self.first:
            case CallBegun(_, _, name):
                fields = {**self.place, "name": name, "arguments": self.text}
                yield "response.function_call_arguments.done", fields
            case Reasoned():
                yield "response.reasoning_text.done", {**self.place, "text": self.text}
                yield "response.content_part.done", {**self.place, "part": self.part}
            case _:
                fields = {**self.place, "text": self.text, "logprobs": self.logprobs}
                yield "response.output_text.done", fields
                yield "response.content_part.done", {**self.place, "part": self.part}
        item = self.shown(self.end)
        yield "response.output_item.done", {"output_index": self.index, "item": item}


class ResponseExchange:
    """One question and its answer, as JSON."""

    def __init__(self, service: Service, asked: AskedOnce, body: ResponseBody) -> None:
        self._id, self._made = f"resp_{uuid.uuid4().hex}", int(time.time())
        self._asked, self._body = asked, body
        self._lexicon = service.lexicons.of(asked.prepared.renderer)
        self._deliveries = answering.deliveries(asked, self._id)
        self._stream = answering.answer(service, asked, 0, self._deliveries[0])
        self._number = 0
        self._items: list[OutputItem] = []

    @property
    def headers(self) -> dict[str, str]:
        return fallback_headers(self._deliveries)

    async def whole(self) -> Response:
        async with aclosing(self.events()) as events:
            data = [event.data async for event in events][-1]
        assert isinstance(data, dict)
        return JSONResponse(data["response"], headers=self.headers)

    async def events(self) -> AsyncGenerator[ServerEvent]:
        """The events of a response; the last holds all of it."""
        item: OutputItem | None = None
        entries: list[dict[str, Any]] = []
        has_begun = False
        async with aclosing(self._stream) as pieces:
            async for piece in pieces:
                if not has_begun:
                    has_begun = True
                    yield self._event("response.created", {"response": self._response(None)})
                    yield self._event("response.in_progress", {"response": self._response(None)})
                if isinstance(piece, Logprobs):
                    entries += self._logprobs(piece.tokens, self._lexicon)
                    continue
                if item is not None and begins_part(piece, part_of(item.first)):
                    if _is_cut(item, piece):
                        item.end = "incomplete"
                    for kind, fields in item.ended():
                        yield self._event(kind, fields)
                    item = None
                if isinstance(piece, AnswerEnded):
                    response = self._response(piece)
                    yield self._event(f"response.{response['status']}", {"response": response})
                    return
                if item is None:
                    item = OutputItem(len(self._items), piece)
                    self._items.append(item)
                    for kind, fields in item.began():
                        yield self._event(kind, fields)
                for kind, fields in item.grew(piece, entries):
                    yield self._event(kind, fields)
                entries = []

    def broken_off(self, rejection: Rejection) -> ServerEvent:
        return self._event(
            "error", {"code": rejection.code, "message": rejection.message, "param": rejection.param}
        )

    def _logprobs(self, tokens: Sequence[TokenLogprob], lexicon: Lexicon) -> list[dict[str, Any]]:
        return [logprob_of(entry, lexicon) for entry in tokens]

    def _event(self, kind: str, fields: dict[str, Any]) -> ServerEvent:
        number, self._number = self._number, self._number + 1
        return ServerEvent({"type": kind, "sequence_number": number, **fields}, kind)

    def _response(self, ended: AnswerEnded | None) -> dict[str, Any]:
        """The response as far as it is there; ``ended``: None while it is in progress."""
        reason = None if ended is None else CAUSES.get(ended.reason)
        status = "in_progress" if ended is None else "incomplete" if reason else "completed"
        body, question = self._body, self._asked.question
        return {
            "id": self._id,
            "object": "response",
            "created_at": self._made,
            "status": status,
            "error": None,
            "incomplete_details": {"reason": reason} if reason else None,
            "instructions": body.instructions,
            "max_output_tokens": body.max_output_tokens,
            "model": question.model or self._asked.served.name,
            "output": [item.shown(item.end) for item in self._items] if ended else [],
            "parallel_tool_calls": not question.one_call,
            "previous_response_id": None,
            "reasoning": {"effort": body.reasoning.effort if body.reasoning else None, "summary": None},
            "store": False,
            "temperature": question.temperature,
            "text": self._text_settings(),
            "tool_choice": self._tool_choice(),
            "tools": [tool.model_dump() for tool in body.tools or ()],
            "top_p": question.top_p,
            "truncation": "disabled",
            "usage": None if ended is None else _usage(ended.usage),
            "user": body.user,
            "metadata": body.metadata or {},
            **fallback_fields(self._deliveries),
        }

    def _text_settings(self) -> dict[str, Any]:
        text = self._body.text
        if text is None or text.format is None:
            return {"format": {"type": "text"}}
        return {"format": text.format.model_dump(by_alias=True, exclude_none=True)}

    def _tool_choice(self) -> str | dict[str, Any]:
        choice = self._body.tool_choice or "auto"
        return choice.model_dump() if isinstance(choice, FlatNamedTool) else choice


def _is_cut(item: OutputItem, piece: Piece) -> bool:
    """Whether ``piece`` ends ``item`` before its end. Calls are delivered when they are complete."""
    ended_early = isinstance(piece, AnswerEnded) and piece.reason in CAUSES
    return ended_early and not isinstance(item.first, CallBegun)


def _usage(usage: Usage) -> dict[str, Any]:
    return {
        "input_tokens": usage.prompt,
        "input_tokens_details": {"cached_tokens": usage.cached},
        "output_tokens": usage.answer,
        "output_tokens_details": {"reasoning_tokens": usage.reasoning},
        "total_tokens": usage.prompt + usage.answer,
    }
