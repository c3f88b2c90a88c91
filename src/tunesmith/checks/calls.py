"""Does an answer make the calls that its reference makes, with the same arguments, and none if that makes
none? Calls are read from the text, and are not executed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from tunesmith.checks.parsers import ParsedCall, parse, same_json
from tunesmith.checks.schemas import takes, validator
from tunesmith.data.formats import (
    JSON,
    Call,
    Completion,
    Conversation,
    Demonstration,
    Example,
    Judged,
    Message,
    Preference,
)

NO_CALL = "no call"


class ReferenceAnswer(NamedTuple):
    """A prompt, the calls that the right answer makes (none: it answers in words), and the answer as the row
    has it."""

    source: str
    prompt: Conversation | str
    calls: tuple[Call, ...]
    answer: Message = Message("assistant", "")


ON_CALLS = (
    "well_formed",
    "known_tool",
    "right_tool",
    "keys_present",
    "required_arguments",
    "exact_arguments",
    "schema_valid",
)
CHECKS = (*ON_CALLS, "unwanted_call")


def references(example: Example) -> ReferenceAnswer | None:
    """The conversation up to its last assistant turn, and the calls of that turn (structured, or read from
    its text).

    None if there is no answer to measure against: plain text, a row labelled undesirable, a conversation
    whose last assistant turn follows no other role, or an answer whose own call is broken."""
    conversation = _imitated(example)
    if isinstance(conversation, Conversation):
        messages = enumerate(conversation.messages)
        places = [place for place, message in messages if message.role == "assistant"]
        return _reference(example.source, conversation, places[-1]) if places else None
    return (
        _made(example.source, conversation.prompt, Message("assistant", conversation.completion))
        if conversation
        else None
    )


def asked(example: Example) -> tuple[list[ReferenceAnswer], int]:
    """The earlier answers of ``example`` that call a tool, and the last; and how many of them cannot be used
    as a reference."""
    last, conversation = references(example), _imitated(example)
    earlier: list[ReferenceAnswer | None] = []
    if isinstance(conversation, Conversation):
        messages = conversation.messages
        turns = [
            place
            for place, message in enumerate(messages)
            if message.role == "assistant" and message.learn is not False
        ]
        calling = [place for place in turns[:-1] if _calls(messages[place])]
        earlier = [_reference(example.source, conversation, place) for place in calling]
    usable = [reference for reference in (*earlier, last) if reference is not None]
    return usable, len(earlier) + 1 - len(usable)


def _imitated(example: Example) -> Conversation | Completion | None:
    match example:
        case Completion(label=None | True):
            return example
        case Judged(desirable=True) | Demonstration():
            return example.conversation
        case Preference():
            return example.chosen
        case _:
            return None


def _calls(message: Message) -> Sequence[Call | ParsedCall]:
    return message.calls or parse(message.content)


def _reference(source: str, conversation: Conversation, place: int) -> ReferenceAnswer | None:
    messages = conversation.messages
    if place == 0 or messages[place - 1].role == "assistant":
        return None
    return _made(source, Conversation(messages[:place], conversation.tools), messages[place])


def _made(source: str, prompt: Conversation | str, answer: Message) -> ReferenceAnswer | None:
    parsed = [] if answer.calls else parse(answer.content, _tools(prompt))
    if any(call.problem for call in parsed):
        return None
    return ReferenceAnswer(
        source, prompt, answer.calls or tuple(Call(call.name, call.arguments) for call in parsed), answer
    )


def _tools(prompt: Conversation | str) -> tuple[JSON, ...]:
    return () if isinstance(prompt, str) else prompt.tools


def declared(prompt: Conversation | str) -> dict[str, JSON]:
    """The JSON schema of the arguments of each tool that ``prompt`` declares; {} for a tool without one,
    which takes any arguments."""
    functions = [tool.get("function") for tool in _tools(prompt) if isinstance(tool, dict)]
    named = [
        (function.get("name"), function.get("parameters"))
        for function in functions
        if isinstance(function, dict)
    ]
    return {name: {} if schema is None else schema for name, schema in named if isinstance(name, str)}


def score(answer: str, reference: ReferenceAnswer) -> dict[str, JSON]:
    """``value``, and the checks behind it.

    If the reference makes calls (kind ``call``), ``value`` is 1.0 if well_formed (at least one call, none
    with a problem) and right_tool (the same tools in the same order, no further call) hold. Only then can
    these hold: keys_present (all keys of the reference), required_arguments (all that the tool's schema
    requires; without a schema, as keys_present) and exact_arguments. If the row declares tools: known_tool
    (each tool called is declared) and schema_valid (each call is of a declared tool and fits its schema; None
    if a schema cannot be used).

    If the reference makes no call (kind ``no_call``), unwanted_call says whether the answer makes one, and
    ``value`` is 1.0 if it does not. Checks of the other kind are None."""
    made, wanted = parse(answer, _tools(reference.prompt)), reference.calls
    schemas = declared(reference.prompt)
    called: list[JSON] = [call.name for call in made]
    expected: list[JSON] = [call.name for call in wanted]
    problems: list[JSON] = [call.problem for call in made if call.problem]
    checks: dict[str, JSON] = dict.fromkeys(CHECKS)
    if not wanted:
        checks["unwanted_call"] = bool(made)
        value = not made
    else:
        well_formed, right_tool = bool(made) and not problems, called == expected
        value = well_formed and right_tool
        pairs = (
            [
                (call.name, want.arguments, call.arguments or {})
                for call, want in zip(made, wanted, strict=True)
            ]
            if value
            else []
        )
        checks["well_formed"], checks["right_tool"] = well_formed, right_tool
        checks["keys_present"] = value and all(_keys(want) <= given.keys() for _, want, given in pairs)
        checks["required_arguments"] = value and all(_required(schemas, *pair) for pair in pairs)
        checks["exact_arguments"] = value and all(same_json(want, given) for _, want, given in pairs)
        if schemas:
            checks["known_tool"] = bool(made) and {call.name for call in made} <= schemas.keys()
        if schemas and all(map(validator, schemas.values())):
            checks["schema_valid"] = well_formed and all(
                fits_schema(schemas, call.name, call.arguments) for call in made
            )
    about: dict[str, JSON] = {"called": called, "expected": expected, "problems": problems}
    tool = ", ".join(dict.fromkeys(map(str, expected))) or NO_CALL
    return {"kind": "call" if wanted else "no_call", "value": float(value), "tool": tool, **checks, **about}


def _keys(arguments: JSON) -> set[str]:
    return set(arguments) if isinstance(arguments, dict) else set()


def _required(schemas: dict[str, JSON], name: str, wanted: JSON, given: dict[str, JSON]) -> bool:
    schema = schemas.get(name)
    required: Any = (
        schema.get("required", [])
        if schema and isinstance(schema, dict) and validator(schema) is not None
        else None
    )
    return (_keys(wanted) if required is None else set(required)) <= given.keys()


def fits_schema(schemas: dict[str, JSON], name: str, arguments: JSON) -> bool:
    """Whether a call is of a declared tool, whose schema takes its arguments."""
    check = validator(schemas[name]) if name in schemas else None
    return check is not None and takes(check, arguments)


def asked_last(prompt: Conversation | str) -> str:
    """The last message of the user."""
    if isinstance(prompt, str):
        return prompt
    messages = [message for message in prompt.messages if message.role == "user"] or prompt.messages
    return messages[-1].content
