"""Does an answer call the right tool, with arguments that the tool takes, and none where none is wanted?

Asked are the user's own rows: the last answer of each, and each earlier answer that calls, behind what stands
before it. Calls are read from the text (`parsers`), since that is what a program gets. Arguments are checked
against the JSON schema that the row declares for the tool (draft 2020-12 unless it names another; nothing is
fetched). What a call would do is not looked at."""

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


class Reference(NamedTuple):
    """What a model is asked, and the calls that the right answer makes (none: it must answer in words)."""

    source: str
    prompt: Prompt
    calls: tuple[Call, ...]
    answer: Message = Message("assistant", "")  # as the row has it


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


def references(example: Example) -> Reference | None:
    """The conversation up to its last assistant turn, and the calls of that turn (structured, or read from
    its text).

    None where there is no answer to be measured against: plain text, a row labelled undesirable, a
    conversation whose last assistant turn answers nobody, or an answer whose own call is broken."""
    conversation = _imitated(example)
    if isinstance(conversation, Conversation):
        places = [at for at, message in enumerate(conversation.messages) if message.role == "assistant"]
        return _reference(example.source, conversation, places[-1]) if places else None
    return (
        _made(example.source, conversation.prompt, Message("assistant", conversation.completion))
        if conversation
        else None
    )


def asked(example: Example) -> tuple[list[Reference], int]:
    """The earlier answers of ``example`` that call a tool, and the last; and how many of them are no usable
    reference."""
    last, conversation = references(example), _imitated(example)
    found: list[Reference | None] = []
    if isinstance(conversation, Conversation):
        turns = [
            at
            for at, one in enumerate(conversation.messages)
            if one.role == "assistant" and one.learn is not False
        ]
        found = [
            _reference(example.source, conversation, at)
            for at in turns[:-1]
            if _calls(conversation.messages[at])
        ]
    usable = [one for one in (*found, last) if one is not None]
    return usable, len(found) + 1 - len(usable)


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


def _reference(source: str, conversation: Conversation, at: int) -> Reference | None:
    messages = conversation.messages
    if at == 0 or messages[at - 1].role == "assistant":
        return None
    return _made(source, Conversation(messages[:at], conversation.tools), messages[at])


def _made(source: str, prompt: Prompt, answer: Message) -> Reference | None:
    parsed = [] if answer.calls else parse(answer.content)
    if any(call.problem for call in parsed):
        return None
    return Reference(
        source, prompt, answer.calls or tuple(Call(call.name, call.arguments) for call in parsed), answer
    )


class Written(NamedTuple):
    """``tokens``: with the one that ends it."""

    text: str
    tokens: int


def written(
    references: Sequence[Reference], renderer: Renderer, notify: Sink, task: str
) -> list[Written | None]:
    """Each right answer as training would teach it; None, with a notice for each reason, where training would
    refuse it.

    So nothing is asked of which the template leaves something out: tools, earlier calls, results.
    """
    texts: list[Written | None] = []
    refused: dict[str, list[tuple[str, Refused]]] = {}
    for one in references:
        answer = replace(one.answer, learn=None)
        try:
            (row,) = renderer.rows(
                Completion(one.prompt, answer.content)
                if isinstance(one.prompt, str)
                else Demonstration(replace(one.prompt, messages=(*one.prompt.messages, answer))),
                learn="last",
            )
        except Refused as error:
            refused.setdefault(error.code, []).append((one.source, error))
            texts.append(None)
        else:
            ids = row.tokens.ids[row.tokens.start :].tolist()
            end = next((at for at, token in enumerate(ids) if token in renderer.eos_ids), len(ids))
            texts.append(Written(renderer.decode(ids[:end]), end + 1))
    for reason, rows in refused.items():
        (first, error), sources = rows[0], list(dict.fromkeys(source for source, _ in rows))
        what = f"{task}: not asked, since training would refuse it: {reason}; {first}: {error.what}"
        where = ", ".join(sources[:3]) + ", …" * (len(sources) > 3)
        notify(Notice(what, level="warning", count=len(rows), where=where, hint=error.hint))
    return texts


def declared(prompt: Prompt) -> dict[str, JSON]:
    """The JSON schema of the arguments of each tool that ``prompt`` declares; one without takes any."""
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


def score(answer: str, reference: Reference) -> dict[str, JSON]:
    """``value`` and how it came about.

    Where the reference makes calls, ``value`` is 1.0 where the first two of these hold, and of every call:
    well_formed (at least one call, none with a problem), right_tool (the same tools in the same order, no
    call more), then required_arguments (all that the tool's schema requires; without a schema keys_present:
    all keys of the reference) and exact_arguments; and by themselves, where the row declares tools,
    known_tool (every tool called is one of them) and schema_valid (every call is of one with arguments that
    its schema takes; None where the schemas cannot say). Where the reference makes none, kind ``no_call``:
    unwanted_call is whether the answer makes one, ``value`` is 1.0 if not. Checks of the other kind are None.
    """
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
    def of(one: ExampleScore) -> float | None:
        return None if one.detail[check] is None else float(one.detail[check] is True)

    return Statistic(check, of, share=True, better="lower" if check == "unwanted_call" else "higher")


class ToolCalls(Task[tuple[Reference, Said]]):
    """``asked``: the questions. Items to score: (reference, what the model answered)."""

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

    def __init__(self, asked: Sequence[Reference] = (), *, max_tokens: int = 256) -> None:
        self.asked, self.max_tokens = asked, max_tokens

    @property
    def identity(self) -> str:
        return digest([_plain(one) for one in self.asked], self.max_tokens)

    def measure(self, subject: Subject) -> list[tuple[Reference, Said]]:
        return list(
            zip(self.asked, subject.answers([one.prompt for one in self.asked], self.max_tokens), strict=True)
        )

    def score(self, items: Sequence[tuple[Reference, Said]]) -> list[ExampleScore]:
        """``value``: 1 where the right tools are called well-formed, or none where none is wanted. ``cut``:
        at the limit."""
        if not items:
            raise EvaluationError(
                "no row has an answer to measure against", hint="give rows that end with an answer"
            )
        found: list[ExampleScore] = []
        for reference, said in items:
            detail = score(said.text, reference) | {"cut": said.cut}
            told = "\n".join(
                f"{call.name} {json.dumps(call.arguments, ensure_ascii=False)}" for call in reference.calls
            )
            right = float(detail["value"] == 1.0)
            prompt, told = asked_last(reference.prompt), told or "an answer in words, no call"
            found.append(ExampleScore(reference.source, right, 1.0, detail, prompt, told, said.text))
        return found


def asked_last(prompt: Prompt) -> str:
    """What the user said last."""
    if isinstance(prompt, str):
        return prompt
    said = [message.content for message in prompt.messages if message.role == "user"] or [
        prompt.messages[-1].content
    ]
    return said[-1]


def _plain(reference: Reference) -> list[JSON]:
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
    """The task for the rows that can be asked; none where no row asks for a call."""
    rows = [asked(example) for example in material.imitated if not isinstance(example, Document)]
    if lost := sum(unusable for _, unusable in rows):
        material.notify(
            Notice(
                "tool_calls: answers that are no usable reference are not asked for",
                level="warning",
                count=lost,
            )
        )
    every = [one for usable, _ in rows for one in usable]
    texts = written(every, material.renderer, material.notify, "tool_calls")
    told = [(one, its.text) for one, its in zip(every, texts, strict=True) if its is not None]
    kept = [one for one, _ in told]
    if unread := sum(bool(one.answer.calls) and score(text, one)["value"] != 1.0 for one, text in told):
        what = "tool_calls: calls as this template writes them cannot be read back: a right answer scores 0"
        hint = "which forms are read: the documentation, section tool_calls"
        material.notify(Notice(what, level="warning", count=unread, hint=hint))
    if not any(reference.calls for reference in kept):
        material.notify(Notice("tool_calls: no row asks for a call, so it is not measured"))
        return []
    calling = [reference for reference in kept if reference.calls]
    schemas = [declared(reference.prompt) for reference in calling]
    astray = [not all(map(validator, one.values())) for one in schemas]
    if any(astray):
        what = "tool_calls: rows that declare a tool with a schema that is none: schema_valid is not asked of them"
        material.notify(Notice(what, level="warning", count=sum(astray)))
    bad = sum(
        not all(_takes(one, call.name, call.arguments) for call in reference.calls)
        for reference, one, odd in zip(calling, schemas, astray, strict=True)
        if one and not odd
    )
    if bad:
        what = "tool_calls: reference calls that their own tool's schema does not allow"
        material.notify(
            Notice(what, level="warning", count=bad, hint="the data teach calls that the tool refuses")
        )
    return [ToolCalls(kept, max_tokens=material.spec.max_tokens)]
