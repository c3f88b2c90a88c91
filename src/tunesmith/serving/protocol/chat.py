"""``POST /v1/chat/completions``, as OpenAI's clients speak it."""

from __future__ import annotations

import time
import uuid
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from typing import Annotated, Any, Literal, cast

from pydantic import Field, JsonValue, model_validator
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
    WholeAnswer,
    Words,
)
from tunesmith.serving.protocol.bodies import (
    MOST_LOGPROBS,
    Body,
    Count,
    Drawing,
    Text,
    Unsupported,
    call_of,
    declared,
    read,
    require_answerable,
    require_tool,
    strict_tools,
    with_reasoning,
)
from tunesmith.serving.protocol.streams import ServerEvent, fallback_fields, fallback_headers, respond
from tunesmith.serving.question import AnswerFormat, Question, ToolChoice
from tunesmith.serving.rejections import Rejection
from tunesmith.serving.service import Service

PATH = "/v1/chat/completions"
LOWEST = -9999.0
"""Log-probabilities are shown down to this one: JSON has no infinity."""


class CalledFunction(Body):
    name: str = Field(min_length=1)
    arguments: str


class EarlierCall(Body):
    """A call in the history. ``index``: of streams, which some clients send back."""

    id: str | None = None
    type: Literal["function"] = "function"
    function: CalledFunction
    index: int | None = None


class ChatMessage(Body):
    """One message of the history. ``name``: of the tool, if it is a result."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Text | None = None
    name: str | None = None
    tool_calls: tuple[EarlierCall, ...] | None = None
    tool_call_id: str | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None
    refusal: Unsupported = None
    audio: Unsupported = None
    function_call: Unsupported = None
    annotations: Unsupported = None

    @model_validator(mode="after")
    def _fits_its_role(self) -> ChatMessage:
        mine = self.role == "assistant"
        if not mine and (self.tool_calls or self.reasoning_content or self.reasoning):
            raise ValueError(f"calls and reasoning belong to the assistant, not to the role {self.role}")
        if self.content is None and not (mine and self.tool_calls):
            raise ValueError("content is missing")
        if (self.tool_call_id is not None or self.name is not None) and self.role != "tool":
            raise ValueError("name and tool_call_id belong to results of tools: no template writes them here")
        return self

    def message(self, place: int) -> Message:
        calls = tuple(
            call_of(call.function.name, call.function.arguments, call.id, f"messages[{place}].tool_calls")
            for call in self.tool_calls or ()
        )
        role = "system" if self.role == "developer" else self.role
        content = with_reasoning(self.content or "", self.reasoning_content or self.reasoning)
        return Message(role, content, calls, self.tool_call_id, self.name)


class DeclaredTool(Body):
    type: Literal["function"]
    function: dict[str, JsonValue]


class NamedFunction(Body):
    name: str


class NamedTool(Body):
    type: Literal["function"]
    function: NamedFunction


class NamedSchema(Body):
    """``name``, ``description``: for whoever reads the request. ``strict``: schemas are always enforced."""

    name: str | None = None
    description: str | None = None
    schema_: dict[str, JsonValue] | bool | None = Field(None, alias="schema")
    strict: bool | None = None


class ResponseFormat(Body):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: NamedSchema | None = None

    @model_validator(mode="after")
    def _has_its_schema(self) -> ResponseFormat:
        schema = None if self.json_schema is None else self.json_schema.schema_
        if (self.type == "json_schema") != (schema is not None):
            raise ValueError("json_schema.schema is for the type json_schema, and needed there")
        return self

    @property
    def format(self) -> AnswerFormat | None:
        if self.type == "text":
            return None
        return AnswerFormat(None if self.json_schema is None else cast(JSON, self.json_schema.schema_))


class TemplateOptions(Body):
    """Variables of the chat template that a request may set."""

    enable_thinking: bool | None = None
    thinking: bool | None = None


class ChatBody(Drawing):
    """``reasoning_effort``: only ``none``, since templates have no levels."""

    messages: tuple[ChatMessage, ...] = Field(min_length=1)
    max_tokens: Count | None = None
    max_completion_tokens: Count | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MOST_LOGPROBS)] | None = None
    response_format: ResponseFormat | None = None
    tools: tuple[DeclaredTool, ...] | None = None
    tool_choice: ToolChoice | NamedTool | None = None
    parallel_tool_calls: bool | None = None
    reasoning_effort: Literal["none"] | None = None
    chat_template_kwargs: TemplateOptions | None = None
    modalities: tuple[Literal["text"]] | None = None
    verbosity: Literal["medium"] | None = None
    prediction: Unsupported = None
    audio: Unsupported = None
    web_search_options: Unsupported = None
    functions: Unsupported = None
    function_call: Unsupported = None

    @model_validator(mode="after")
    def _agrees_on_reasoning(self) -> ChatBody:
        options = self.chat_template_kwargs or TemplateOptions()
        switches = {options.enable_thinking, options.thinking} - {None}
        if len(switches) > 1:
            raise ValueError("chat_template_kwargs: enable_thinking and thinking differ: give one of them")
        if self.reasoning_effort == "none" and True in switches:
            raise ValueError("reasoning_effort: none and enable_thinking: true differ: give one of them")
        return self

    @model_validator(mode="after")
    def _agrees(self) -> ChatBody:
        limits = {self.max_tokens, self.max_completion_tokens} - {None}
        if len(limits) > 1:
            raise ValueError("max_tokens and max_completion_tokens differ: give one of them")
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs needs logprobs: true")
        return self

    def question(self) -> Question:
        """Raises Rejection if a message or a tool is not valid."""
        messages = [message.message(place) for place, message in enumerate(self.messages)]
        messages = [message for message in messages if message.role != "system" or message.content.strip()]
        require_answerable(messages, "messages")
        tools = [
            declared(tool.function, f"tools[{place}].function") for place, tool in enumerate(self.tools or ())
        ]
        choice, named = self.tool_choice or "auto", None
        if isinstance(choice, NamedTool):
            choice, named = "required", choice.function.name
        require_tool(choice, named, [tool.function for tool in self.tools or ()])
        asked = Question(
            self.model or "",
            Conversation(tuple(messages), () if choice == "none" else tuple(tools)),
            max_tokens=self.max_completion_tokens or self.max_tokens,
            logprobs=(self.top_logprobs or 0) if self.logprobs else None,
            tool_choice=choice,
            named_tool=named,
            one_call=self.parallel_tool_calls is False,
            strict_tools=strict_tools(tool.function for tool in self.tools or ()),
            format=None if self.response_format is None else self.response_format.format,
            thinking=self._thinking,
        )
        return self.drawn(asked)

    @property
    def _thinking(self) -> bool | None:
        if self.reasoning_effort == "none":
            return False
        options = self.chat_template_kwargs
        if options is None:
            return None
        return options.thinking if options.enable_thinking is None else options.enable_thinking


def routes(service: Service) -> list[Route]:
    async def complete(request: Request) -> Response:
        body = await read(request, ChatBody)
        asked = await answering.ask(service, body.question())
        return await respond(ChatExchange(service, asked, body.include_usage), body.stream)

    return [Route(PATH, complete, methods=["POST"])]


class ChatExchange:
    """One question and its answers, as JSON."""

    def __init__(self, service: Service, asked: AskedOnce, include_usage: bool = False) -> None:
        self._lexicon = service.lexicons.of(asked.prepared.renderer)
        self._asked, self._include_usage = asked, include_usage
        answer_id = f"chatcmpl-{uuid.uuid4().hex}"
        self._deliveries = answering.deliveries(asked, answer_id)
        self._streams = [
            answering.answer(service, asked, index, delivery)
            for index, delivery in enumerate(self._deliveries)
        ]
        self._head = {
            "id": answer_id,
            "created": int(time.time()),
            "model": asked.question.model or asked.served.name,
            "system_fingerprint": asked.fingerprint,
        }

    @property
    def headers(self) -> dict[str, str]:
        return fallback_headers(self._deliveries)

    async def whole(self) -> Response:
        answers = await answering.whole(self._streams)
        content = {
            **self._head,
            "object": "chat.completion",
            "choices": [self._choice(index, answer) for index, answer in enumerate(answers)],
            "usage": usage_of([answer.ended.usage for answer in answers]),
            **fallback_fields(self._deliveries),
        }
        return JSONResponse(content, headers=self.headers)

    def _choice(self, index: int, answer: WholeAnswer) -> dict[str, Any]:
        calls = [
            {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}
            for call in answer.calls
        ]
        message: dict[str, Any] = {
            "role": "assistant",
            "content": None if calls and not answer.words else answer.words,
            "refusal": None,
        }
        if answer.reasoning:
            message["reasoning_content"] = answer.reasoning
        if calls:
            message["tool_calls"] = calls
        return {
            "index": index,
            "message": message,
            "logprobs": self._logprobs(answer.logprobs),
            "finish_reason": answer.ended.reason,
        }

    def _logprobs(self, entries: Sequence[TokenLogprob]) -> dict[str, Any] | None:
        if self._asked.question.logprobs is None:
            return None
        return {"content": [logprob_of(entry, self._lexicon) for entry in entries], "refusal": None}

    def broken_off(self, rejection: Rejection) -> ServerEvent:
        return ServerEvent(rejection.body)

    async def events(self) -> AsyncGenerator[ServerEvent]:
        """Chunks, and the word that ends them."""
        used: dict[int, Usage] = {}
        waiting: dict[int, tuple[TokenLogprob, ...]] = {}
        begun_choices: set[int] = set()
        async with aclosing(answering.merged(self._streams)) as pieces:
            async for index, piece in pieces:
                if index not in begun_choices:
                    begun_choices.add(index)
                    yield self._chunk(index, {"role": "assistant", "content": ""})
                if isinstance(piece, Logprobs):
                    waiting[index] = waiting.get(index, ()) + piece.tokens
                    continue
                entries = waiting.pop(index, ())
                if isinstance(piece, AnswerEnded):
                    used[index] = piece.usage
                yield self._chunk(index, delta_of(piece), entries, piece)
        if self._include_usage:
            usage = usage_of([used[index] for index in sorted(used)])
            yield ServerEvent({**self._chunk_head, "choices": [], "usage": usage})
        yield ServerEvent("[DONE]")

    @property
    def _chunk_head(self) -> dict[str, Any]:
        return {**self._head, "object": "chat.completion.chunk", **fallback_fields(self._deliveries)}

    def _chunk(
        self,
        index: int,
        delta: dict[str, Any],
        entries: Sequence[TokenLogprob] = (),
        piece: Piece | None = None,
    ) -> ServerEvent:
        choice = {
            "index": index,
            "delta": delta,
            "logprobs": self._logprobs(entries) if entries else None,
            "finish_reason": piece.reason if isinstance(piece, AnswerEnded) else None,
        }
        usage = {"usage": None} if self._include_usage else {}
        return ServerEvent({**self._chunk_head, "choices": [choice], **usage})


def delta_of(piece: Piece) -> dict[str, Any]:
    """What a piece adds to the message."""
    match piece:
        case Words(text):
            return {"content": text}
        case Reasoned(text):
            return {"reasoning_content": text}
        case CallBegun(index, call_id, name):
            function = {"name": name, "arguments": ""}
            return {"tool_calls": [{"index": index, "id": call_id, "type": "function", "function": function}]}
        case CallArguments(index, text):
            return {"tool_calls": [{"index": index, "function": {"arguments": text}}]}
        case _:
            return {}


def logprob_of(entry: TokenLogprob, lexicon: Lexicon) -> dict[str, Any]:
    top = [_shown(token, logprob, lexicon) for token, logprob in entry.top]
    return {**_shown(entry.token, entry.logprob, lexicon), "top_logprobs": top}


def _shown(token: int, logprob: float, lexicon: Lexicon) -> dict[str, Any]:
    text, content = lexicon.token(token)
    return {"token": text, "logprob": max(logprob, LOWEST), "bytes": content}


def usage_of(usages: Sequence[Usage]) -> dict[str, Any]:
    """Of the answers to one prompt, which is counted once."""
    prompt, answer = usages[0].prompt, sum(usage.answer for usage in usages)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": answer,
        "total_tokens": prompt + answer,
        "prompt_tokens_details": {"cached_tokens": usages[0].cached},
        "completion_tokens_details": {"reasoning_tokens": sum(usage.reasoning for usage in usages)},
    }
