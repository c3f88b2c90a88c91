"""Does an answer call the right tool, with arguments that the tool takes, and no tool if none is wanted?

The prompts are the user's own rows: the conversation before the last answer of each, and before each earlier
answer that makes a call. Calls are read from the text (`parsers`), since that is what a program gets.
Arguments are checked against the JSON schema that the row declares for the tool (draft 2020-12 unless it
names another; nothing is fetched). Calls are not executed."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from tunesmith.checks.parsers import ParsedCall, parse, same_json
from tunesmith.checks.schemas import takes, validator
from tunesmith.data.formats import (
    JSON,
    Call,
    Completion,
    Conversation,
    Demonstration,
    Document,
    Example,
    Judged,
    Message,
    Preference,
)
from tunesmith.errors import EvaluationError
from tunesmith.evaluation.statistics import Statistic
from tunesmith.evaluation.subject import Prompt, Said, Subject
from tunesmith.evaluation.tasks import Material, Meaning, Task, digest, register
from tunesmith.events import Notice, Sink
from tunesmith.runs.records import ExampleScore
from tunesmith.tokens.template import Refused, Renderer

NO_CALL = "no call"


class ReferenceAnswer(NamedTuple):
    """A prompt, the calls that the right answer makes (none: it answers in words), and the answer as the row
    has it."""

    source: str
    prompt: Prompt
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


def _made(source: str, prompt: Prompt, answer: Message) -> ReferenceAnswer | None:
    parsed = [] if answer.calls else parse(answer.content)
    if any(call.problem for call in parsed):
        return None
    return ReferenceAnswer(
        source, prompt, answer.calls or tuple(Call(call.name, call.arguments) for call in parsed), answer
    )


class Written(NamedTuple):
    """``tokens``: their number, with the end token."""

    text: str
    tokens: int


def written(
    references: Sequence[ReferenceAnswer], renderer: Renderer, notify: Sink, task: str
) -> list[Written | None]:
    """Each reference's answer as training would teach it; None, with a notice for each reason, if training
    would refuse the row.

    So no prompt is used from which the template drops something: tools, earlier calls, results."""
    texts: list[Written | None] = []
    refused: dict[str, list[tuple[str, Refused]]] = {}
    for reference in references:
        prompt, answer = reference.prompt, replace(reference.answer, learn=None)
        if isinstance(prompt, str):
            example = Completion(prompt, answer.content)
        else:
            example = Demonstration(replace(prompt, messages=(*prompt.messages, answer)))
        try:
            (row,) = renderer.rows(example, learn="last")
        except Refused as error:
            refused.setdefault(error.code, []).append((reference.source, error))
            texts.append(None)
        else:
            ids = row.tokens.ids[row.tokens.start :].tolist()
            end = next((place for place, token in enumerate(ids) if token in renderer.eos_ids), len(ids))
            texts.append(Written(renderer.decode(ids[:end]), end + 1))
    for reason, rows in refused.items():
        (first, error), sources = rows[0], list(dict.fromkeys(source for source, _ in rows))
        text = f"{task}: not asked, since training would refuse it: {reason}; {first}: {error.what}"
        where = ", ".join(sources[:3]) + ", …" * (len(sources) > 3)
        notify(Notice(text, level="warning", count=len(rows), where=where, hint=error.hint))
    return texts


def declared(prompt: Prompt) -> dict[str, JSON]:
    """The JSON schema of the arguments of each tool that ``prompt`` declares; {} for a tool without one,
    which takes any arguments."""
    functions = [
        tool.get("function")
        for tool in ([] if isinstance(prompt, str) else prompt.tools)
        if isinstance(tool, dict)
    ]
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
    made, wanted, schemas = parse(answer), reference.calls, declared(reference.prompt)
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
                _takes(schemas, call.name, call.arguments) for call in made
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


def _takes(schemas: dict[str, JSON], name: str, arguments: JSON) -> bool:
    check = validator(schemas[name]) if name in schemas else None
    return check is not None and takes(check, arguments)


def _share(check: str) -> Statistic:
    def of(score: ExampleScore) -> float | None:
        return None if score.detail[check] is None else float(score.detail[check] is True)

    return Statistic(check, of, share=True, better="lower" if check == "unwanted_call" else "higher")


class ToolCalls(Task[tuple[ReferenceAnswer, Said]]):
    """Measured: (reference, the model's answer)."""

    name = "tool_calls"
    version = "3"
    statistics = (
        Statistic("tool_calls", lambda example: example.value, share=True, better="higher", headline=True),
        *map(_share, CHECKS),
    )
    parts = ("tool",)
    question, rank = "task", 0
    title, asks, asks_rows = "Tool calls right", "held-out prompts, some of which want a call", True
    options = ("max_tokens",)
    meanings = (
        Meaning(
            "tool_calls",
            "Tool calls right",
            "share of answers that call the right tools in order and readably, or none if none is wanted; "
            "arguments are judged apart",
        ),
        Meaning(
            "well_formed", "Calls well-formed", "if a call is wanted: at least one, all of them readable"
        ),
        Meaning(
            "known_tool",
            "Declared tools only",
            "if a call is wanted and tools are declared: a call is made, and each tool called is declared",
        ),
        Meaning("right_tool", "Right tool", "if a call is wanted: the same tools in the same order"),
        Meaning(
            "keys_present",
            "Arguments present",
            "the right tools, with every argument that the reference has, whatever its value",
        ),
        Meaning(
            "required_arguments",
            "Required arguments present",
            "the right tools, with every argument that their schema requires",
        ),
        Meaning(
            "exact_arguments",
            "Arguments exact",
            "the right tools, with the arguments and values of the reference",
        ),
        Meaning(
            "schema_valid",
            "Calls fit their schema",
            "if a call is wanted and tools are declared: all calls are readable and fit the JSON schemas",
        ),
        Meaning(
            "unwanted_call", "Unwanted calls", "if no call is wanted: the share of answers that make one"
        ),
    )

    def __init__(self, asked: Sequence[ReferenceAnswer] = (), *, max_tokens: int = 256) -> None:
        self.asked, self.max_tokens = asked, max_tokens

    @property
    def identity(self) -> str:
        return digest([_plain(reference) for reference in self.asked], self.max_tokens)

    def measure(self, subject: Subject) -> list[tuple[ReferenceAnswer, Said]]:
        prompts = [reference.prompt for reference in self.asked]
        return list(zip(self.asked, subject.answers(prompts, self.max_tokens), strict=True))

    def score(self, items: Sequence[tuple[ReferenceAnswer, Said]]) -> list[ExampleScore]:
        """``value``: 1 if the right tools are called well-formed, or none if none is wanted. ``cut``: the
        answer reached the limit."""
        if not items:
            raise EvaluationError(
                "no row has an answer to measure against", hint="give rows that end with an answer"
            )
        scores: list[ExampleScore] = []
        for reference, answer in items:
            detail = score(answer.text, reference) | {"cut": answer.cut}
            right = float(detail["value"] == 1.0)
            calls = [
                f"{call.name} {json.dumps(call.arguments, ensure_ascii=False)}" for call in reference.calls
            ]
            wanted = "\n".join(calls) or "an answer in words, no call"
            prompt = asked_last(reference.prompt)
            scores.append(ExampleScore(reference.source, right, 1.0, detail, prompt, wanted, answer.text))
        return scores


def asked_last(prompt: Prompt) -> str:
    """The last message of the user."""
    if isinstance(prompt, str):
        return prompt
    messages = [message for message in prompt.messages if message.role == "user"] or prompt.messages
    return messages[-1].content


def _plain(reference: ReferenceAnswer) -> list[JSON]:
    prompt = reference.prompt
    turns: JSON = prompt if isinstance(prompt, str) else [_turn(message) for message in prompt.messages]
    tools: list[JSON] = [] if isinstance(prompt, str) else list(prompt.tools)
    return [reference.source, turns, tools, [[call.name, call.arguments] for call in reference.calls]]


def _turn(message: Message) -> list[JSON]:
    return [
        message.role,
        message.content,
        [[call.name, call.arguments, call.id] for call in message.calls],
        message.call_id,
    ]


@register(ToolCalls)
def build(material: Material) -> list[ToolCalls]:
    """The task for the rows that can be asked; none if no row asks for a call."""
    notify = material.notify
    rows = [asked(example) for example in material.imitated if not isinstance(example, Document)]
    if lost := sum(unusable for _, unusable in rows):
        message = "tool_calls: answers that cannot be used as a reference are not asked for"
        notify(Notice(message, level="warning", count=lost))
    every = [reference for usable, _ in rows for reference in usable]
    answers = zip(every, written(every, material.renderer, notify, "tool_calls"), strict=True)
    texts = [(reference, answer.text) for reference, answer in answers if answer is not None]
    unread = sum(
        bool(reference.answer.calls) and score(text, reference)["value"] != 1.0 for reference, text in texts
    )
    if unread:
        message = (
            "tool_calls: calls as this template writes them cannot be read back: a right answer scores 0"
        )
        hint = "which forms are read: the documentation, section tool_calls"
        notify(Notice(message, level="warning", count=unread, hint=hint))
    references = [reference for reference, _ in texts]
    if not any(reference.calls for reference in references):
        notify(Notice("tool_calls: no row asks for a call, so it is not measured"))
        return []
    _notify_of_schemas([reference for reference in references if reference.calls], notify)
    return [ToolCalls(references, max_tokens=material.spec.max_tokens)]


def _notify_of_schemas(calling: Sequence[ReferenceAnswer], notify: Sink) -> None:
    """Count the rows whose schemas cannot be used, and those whose own calls do not fit their schemas."""
    unusable = misfits = 0
    for reference in calling:
        schemas = declared(reference.prompt)
        if not all(map(validator, schemas.values())):
            unusable += 1
        elif schemas:
            misfits += not all(_takes(schemas, call.name, call.arguments) for call in reference.calls)
    if unusable:
        text = (
            "tool_calls: rows that declare a tool with an invalid schema: schema_valid is not asked of them"
        )
        notify(Notice(text, level="warning", count=unusable))
    if misfits:
        text = "tool_calls: reference calls that do not fit their own tool's schema"
        hint = "the data teach calls that the tool refuses"
        notify(Notice(text, level="warning", count=misfits, hint=hint))
