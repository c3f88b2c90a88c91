"""Bodies of requests: strict, and every field has an effect, asks for nothing, or is refused by name."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Annotated, Any, Literal, TypeAlias, TypeVar, cast

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    JsonValue,
    ValidationError,
    model_validator,
)
from pydantic_core import ErrorDetails
from starlette.requests import Request

from tunesmith.checks import schemas
from tunesmith.checks.parsers import STRICT
from tunesmith.data.formats import JSON, Call, Message
from tunesmith.serving.question import Question, ToolChoice
from tunesmith.serving.rejections import Rejection

MOST_STOPS = 16
MOST_LOGPROBS = 20
CODES = {
    "missing": "missing_required_parameter",
    "extra_forbidden": "unknown_parameter",
    "json_invalid": "invalid_json",
}
"""Kinds of pydantic's errors → codes of errors; any other is ``invalid_value``."""


DRAWN = "temperature top_p top_k min_p repetition_penalty presence_penalty frequency_penalty seed n".split()
"""Fields of bodies that are fields of `Question` too."""


class Body(BaseModel):
    """Base of everything that clients send."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)

    def how_to_draw(self) -> dict[str, Any]:
        """Those of the fields `DRAWN` that are given."""
        return self.model_dump(include=set(DRAWN), exclude_none=True)


B = TypeVar("B", bound=Body)


async def read(request: Request, kind: type[B]) -> B:
    """The body of ``request``. Raises Rejection, which names the first field that is wrong."""
    body = await request.body()
    try:
        return kind.model_validate_json(body)
    except ValidationError as error:
        problems = error.errors(include_url=False)
    nulls = [
        problem["loc"]
        for problem in problems
        if problem["type"] == "extra_forbidden" and problem["input"] is None
    ]
    if nulls:
        try:
            return kind.model_validate_json(_without(body, nulls))
        except ValidationError as error:
            problems = error.errors(include_url=False)
    raise _rejection(problems[0])


def _without(body: bytes, places: Sequence[tuple[str | int, ...]]) -> bytes:
    """``body`` without the unknown fields at ``places``, which are null: clients send back all that their own
    types know, and null asks nothing."""
    content: Any = json.loads(body)
    for place in places:
        node: Any = content
        for key in place[:-1]:
            # Other keys name the member of a union; it may have the name of a field that is a text.
            if isinstance(key, int) or (isinstance(node, dict) and isinstance(node.get(key), (dict, list))):
                node = node[key]
        node.pop(place[-1], None)
    return json.dumps(content).encode()


def _rejection(details: ErrorDetails) -> Rejection:
    keys = [key for key in details["loc"] if isinstance(key, int) or (key.isidentifier() and key != "str")]
    param = "".join(f"[{key}]" if isinstance(key, int) else f".{key}" for key in keys).lstrip(".")
    text = details["msg"].removeprefix("Value error, ")
    kind = details["type"]
    if kind == "extra_forbidden":
        text = "this server does not know the field"
    message = f"{param}: {text[0].lower()}{text[1:]}" if param else f"the body: {text[0].lower()}{text[1:]}"
    return Rejection(400, message, param or None, CODES.get(kind, "invalid_value"))


def _unsupported(value: object) -> None:
    """Raises ValueError unless nothing is asked."""
    if value not in (None, False, [], {}):
        raise ValueError("this server cannot do that; leave the field out")


Unsupported = Annotated[None, BeforeValidator(_unsupported)]
"""A field of the protocol that may only be empty."""
Labels = dict[str, str] | None
"""Data for whoever keeps requests: it asks nothing of an answer."""


def text_of(value: object) -> object:
    """The words of a text or of a list of text parts. Raises ValueError for other parts."""
    if not isinstance(value, list):
        return value
    texts: list[str] = []
    for place, part in enumerate(cast("list[Any]", value)):
        if not isinstance(part, dict) or part.get("type") not in ("text", "input_text", "output_text"):
            kind = part.get("type") if isinstance(part, dict) else type(part).__name__
            raise ValueError(f"part {place} is {kind!r}: only parts of text can be read")
        known = {"type", "text", "cache_control", "annotations", "logprobs", "citations"}
        if unknown := {key for key, given in part.items() if given is not None} - known:
            raise ValueError(f"part {place}: this server does not know {min(unknown)!r}")
        if not isinstance(part.get("text"), str):
            raise ValueError(f"part {place} has no text")
        texts.append(part["text"])
    return "".join(texts)


Text = Annotated[str, BeforeValidator(text_of)]
"""A text, or parts of text, which are put together."""

Ids = tuple[Annotated[int, Field(ge=0)], ...]
TextsOrIds: TypeAlias = str | Ids | tuple[str, ...] | tuple[Ids, ...]
"""A text, ids, or a list of either."""


def listed(value: TextsOrIds) -> list[str | Ids]:
    """``value`` as a list."""
    if isinstance(value, str):
        return [value]
    ids = tuple(part for part in value if isinstance(part, int))
    return [ids] if ids else [part for part in value if not isinstance(part, int)]


def _texts(value: object) -> object:
    if isinstance(value, str):
        return (value,)
    return tuple(value) if isinstance(value, list) else value


def _stops(texts: tuple[str, ...]) -> tuple[str, ...]:
    if not all(texts):
        raise ValueError("a stop text is empty")
    return texts


Stops = Annotated[
    tuple[str, ...], BeforeValidator(_texts), AfterValidator(_stops), Field(max_length=MOST_STOPS)
]
LEAST = 1e-4
"""The smallest temperature above 0, ``top_p`` and ``repetition_penalty``: with much smaller ones the
computation overflows, and every token is the first of the vocabulary."""


def _zero_or_not_tiny(value: float) -> float:
    if 0 < value < LEAST:
        raise ValueError(f"must be 0, for greedy answers, or at least {LEAST:g}")
    return value


Temperature = Annotated[float, Field(ge=0, le=2), AfterValidator(_zero_or_not_tiny)]
TopP = Annotated[float, Field(ge=LEAST, le=1)]
Penalty = Annotated[float, Field(ge=-2, le=2)]
Count = Annotated[int, Field(ge=1)]


def _biases(value: dict[str, float]) -> dict[str, float]:
    for token, bias in value.items():
        if not (token.isascii() and token.isdigit()):
            raise ValueError(f"{token!r} is not the id of a token")
        if abs(bias) > 100:
            raise ValueError(f"{bias:g} is not between -100 and 100")
    return value


Biases = Annotated[dict[str, float], AfterValidator(_biases)]
"""Ids of tokens → what is added to their logits."""


class StreamOptions(Body):
    include_usage: bool | None = None
    include_obfuscation: Unsupported = None


class Drawing(Body):
    """Fields of both of OpenAI's older protocols: who answers, and how tokens are drawn. The last five ask
    nothing of an answer: ``store`` may only be false."""

    model: str | None = None
    temperature: Temperature | None = None
    top_p: TopP | None = None
    top_k: Annotated[int, Field(ge=0)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[float, Field(ge=LEAST, le=10)] | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    logit_bias: Biases | None = None
    seed: int | None = None
    stop: Stops | None = None
    n: Count | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    user: str | None = None
    store: Unsupported = None
    metadata: Labels = None
    service_tier: Literal["auto", "default"] | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None

    @model_validator(mode="after")
    def _streams(self) -> Drawing:
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options needs stream: true")
        return self

    @property
    def include_usage(self) -> bool:
        """Whether the last chunk of a stream says how many tokens were used."""
        return self.stream_options is not None and bool(self.stream_options.include_usage)

    def drawn(self, question: Question) -> Question:
        """``question`` with what is asked here."""
        return replace(
            question,
            **self.how_to_draw(),
            logit_bias={int(token): bias for token, bias in (self.logit_bias or {}).items()},
            stop=self.stop or (),
            stream=bool(self.stream),
            user=self.user,
        )


class Function(Body):
    """What a client declares of a tool."""

    name: str = Field(min_length=1, max_length=128, pattern=r"^[A-Za-z0-9_.:/-]+$")
    description: str | None = None
    parameters: dict[str, JsonValue] | None = None
    strict: bool | None = None


def declared(function: Mapping[str, Any], param: str) -> JSON:
    """The declaration of a tool as training rows have it: keys in the client's order, and none that speaks to
    the server. Raises Rejection if it is not one."""
    try:
        known = Function.model_validate({key: value for key, value in function.items() if value is not None})
        schemas.checked(known.parameters or {})
    except ValidationError as error:
        details = error.errors(include_url=False)[0]
        raise _rejection({**details, "loc": (*_keys(param), *details["loc"])}) from None
    except ValueError as error:
        raise Rejection(
            400, f"{param}.parameters: {error}", f"{param}.parameters", "invalid_schema"
        ) from None
    body = {key: value for key, value in function.items() if key != "strict" and value is not None}
    return {"type": "function", "function": body}


def _keys(param: str) -> tuple[str | int, ...]:
    """``tools[0].function`` as the keys that lead there."""
    parts = param.replace("]", "").replace("[", ".").split(".")
    return tuple(int(part) if part.isdigit() else part for part in parts)


def call_of(name: str, arguments: str, call_id: str | None, param: str) -> Call:
    """A call in the history. Raises Rejection if its arguments are not a JSON object."""
    try:
        value: JSON = STRICT.decode(arguments.strip() or "{}")
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict):
        message = f"{param}: the arguments of {name} are not a JSON object"
        raise Rejection(400, message, param, "invalid_value")
    return Call(name, value, call_id, arguments if arguments.strip() else None)


def with_reasoning(words: str, reasoning: str | None) -> str:
    """The content of an answer in the history, as training rows have it."""
    return f"<think>\n{reasoning}\n</think>\n\n{words}" if reasoning else words


def require_answerable(messages: list[Message], param: str) -> None:
    """Raises Rejection if nobody waits for an answer."""
    if not messages or messages[-1].role == "assistant":
        message = f"{param}: the last message must be one of the user or of a tool"
        raise Rejection(400, message, param, "invalid_value")


def require_tool(choice: ToolChoice, named: str | None, functions: Sequence[Mapping[str, Any]]) -> None:
    """Raises Rejection if a tool must be called, and none is declared, or none with the name ``named``."""
    names = [function.get("name") for function in functions]
    if choice == "required" and (not names or (named is not None and named not in names)):
        raise Rejection(400, "tool_choice: there is no such tool", "tool_choice", "invalid_value")


def strict_tools(functions: Iterable[Mapping[str, Any]]) -> frozenset[str]:
    """Names of the tools whose calls must fit their schema."""
    return frozenset(str(function.get("name")) for function in functions if function.get("strict"))
