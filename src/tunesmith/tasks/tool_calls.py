"""Does an answer call the right tool, in a form that a program can run?

Calls are read from the text of an answer in four forms:
- ``tool_call: NAME`` on a line and ``arguments: {…}`` after it, with any ``Result: …`` between calls skipped;
- Mistral: ``[TOOL_CALLS] [{"name": …, "arguments": …}, …]``;
- Hermes: ``<tool_call>{"name": …, "arguments": …}</tool_call>``;
- OpenAI: a JSON object or array at the start of a line, ``{"name": …, "arguments": …}``, alone or as ``function``
  inside ``tool_calls``; its arguments may be a string that holds JSON.

JSON is decoded, never matched. What is not strict JSON (NaN, single quotes, a trailing comma, text after the closing
brace on its line) is a call with a problem, because the program that receives it would fail too.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NoReturn

from tunesmith.errors import EvaluationError
from tunesmith.formats import JSON, Call, Completion, Conversation, Demonstration, Example, Judged, Preference
from tunesmith.tasks import ExampleScore, Statistic


@dataclass(frozen=True, slots=True)
class ParsedCall:
    """``arguments`` is None exactly where ``problem`` says what is wrong with the call."""

    name: str
    arguments: dict[str, JSON] | None
    problem: str | None = None


@dataclass(frozen=True, slots=True)
class Reference:
    """What a model is asked, and the calls that the right answer makes (none: it must answer in words)."""

    source: str
    prompt: Conversation | str  # str: a Completion, no chat template
    calls: tuple[Call, ...]


_MARKED = r"^[ \t]*(?:(?P<text>tool_call:)|(?P<result>Result:))|(?P<mistral>\[TOOL_CALLS\])|(?P<hermes><tool_call>)"
_ANY_MARK = re.compile(_MARKED + r"|^[ \t]*(?P<bare>(?=\{|\[(?!TOOL_CALLS\])))", re.MULTILINE)
_PLAIN_MARK = re.compile(_MARKED, re.MULTILINE)
_ARGUMENTS = re.compile(r"\s*arguments:")
_OPENS_LIKE_A_CALL = re.compile(r'\[?\s*\{\s*"(?:name|tool_calls|function)"\s*:')


def parse(text: str) -> list[ParsedCall]:
    """The calls that ``text`` makes or tries to make, in order. Never raises."""
    calls: list[ParsedCall] = []
    at, marks = 0, _ANY_MARK
    while mark := marks.search(text, at):
        kind, at, name, marks = str(mark.lastgroup), mark.end(), "", _ANY_MARK
        if kind == "text":
            line = text[at:].partition("\n")[0]
            name, at = line.strip(), at + len(line)
            key = _ARGUMENTS.match(text, at)
            if key is None:
                calls.append(ParsedCall(name, None, "no `arguments:` line after the name"))
                continue
            at = key.end()
        try:
            value, end = _decode(text, at)
        except ValueError as error:
            at += kind == "bare"
            if kind == "result" or (kind == "bare" and not _opens_like_a_call(text, at - 1)):
                continue  # a result in words, a bracket in prose
            calls.append(ParsedCall(name, None, f"no JSON where the call should be: {error}"))
            marks = _PLAIN_MARK  # inside the wreck of a call a line may start with a brace
            continue
        at = end
        calls += _calls(kind, name, value, text, end)
    return calls


def _calls(kind: str, name: str, value: JSON, text: str, end: int) -> list[ParsedCall]:
    """The calls in a decoded ``value`` that ends at ``end``."""
    rest = text[end:].partition("\n")[0].strip()
    problem = f"text after the arguments: {rest[:40]!r}" if rest else None
    if kind == "text":
        return [_checked(name, value, problem)]
    if kind == "mistral":
        if not isinstance(value, list) or not value:
            return [ParsedCall("", None, "no JSON array of calls after [TOOL_CALLS]")]
        return [_from_object(item, problem) for item in value]
    if kind == "hermes":
        closed = text[end:].lstrip().startswith("</tool_call>")
        return [_from_object(value, None if closed else "no </tool_call> after the object")]
    if isinstance(value, dict):
        value = value["tool_calls"] if isinstance(value.get("tool_calls"), list) else [value]
    if kind == "bare" and isinstance(value, list) and all(map(_is_call, value)):
        return [_from_object(item, problem) for item in value]
    return []  # a result, or some other JSON


def _refuse(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is not JSON")


_DECODER = json.JSONDecoder(parse_constant=_refuse)


def _decode(text: str, at: int) -> tuple[JSON, int]:
    """The JSON value that starts at ``at``, after white space, and where it ends. Raises ValueError."""
    while at < len(text) and text[at] in " \t\r\n":
        at += 1
    try:
        return _DECODER.raw_decode(text, at)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def _opens_like_a_call(text: str, at: int) -> bool:
    return _OPENS_LIKE_A_CALL.match(text, at) is not None and text.find('"arguments"', at) >= 0


def _function(item: JSON) -> JSON:
    return item["function"] if isinstance(item, dict) and isinstance(item.get("function"), dict) else item


def _is_call(item: JSON) -> bool:
    item = _function(item)
    return isinstance(item, dict) and isinstance(item.get("name"), str) and "arguments" in item


def _from_object(item: JSON, problem: str | None) -> ParsedCall:
    item = _function(item)
    if not isinstance(item, dict):
        return ParsedCall("", None, "the call is not a JSON object")
    arguments = item.get("arguments")
    if isinstance(arguments, str):
        string = arguments.strip()
        try:
            arguments, end = _decode(string, 0)
        except ValueError as error:
            return _checked(item.get("name"), None, f"arguments are not JSON: {error}")
        problem = problem or ("text after the arguments" if end < len(string) else None)
    return _checked(item.get("name"), arguments, problem)


def _checked(name: JSON, arguments: JSON, problem: str | None) -> ParsedCall:
    if not isinstance(name, str) or not name:
        return ParsedCall("", None, problem or "the call has no tool name")
    if problem is None and isinstance(arguments, dict):
        return ParsedCall(name, arguments)
    return ParsedCall(name, None, problem or "the arguments are not a JSON object")


def references(example: Example) -> Reference | None:
    """The conversation up to its last assistant turn, and the calls of that turn (structured, or read from its text).

    None where the example holds no answer to be measured against: plain text, a row labelled undesirable, a
    conversation without an assistant turn that answers another role's, or an answer whose own call is broken.
    """
    if isinstance(example, Completion) and example.label is not False:
        return _reference(example.source, example.prompt, (), example.completion)
    if isinstance(example, Demonstration) or (isinstance(example, Judged) and example.desirable):
        conversation = example.conversation
    elif isinstance(example, Preference):
        conversation = example.chosen
    else:
        return None
    turns = [at for at, message in enumerate(conversation.messages) if message.role == "assistant"]
    before = conversation.messages[: turns[-1]] if turns else ()
    if not before or before[-1].role == "assistant":
        return None
    answer = conversation.messages[turns[-1]]
    return _reference(example.source, Conversation(before, conversation.tools), answer.calls, answer.content)


def _reference(source: str, prompt: Conversation | str, calls: tuple[Call, ...], text: str) -> Reference | None:
    parsed = [] if calls else parse(text)
    if any(call.problem for call in parsed):
        return None
    return Reference(source, prompt, calls or tuple(Call(call.name, call.arguments) for call in parsed))


def same_json(one: JSON, other: JSON) -> bool:
    """Equality of JSON values: the order of keys is free, 1 equals 1.0, and true is not 1."""
    if isinstance(one, bool) or isinstance(other, bool):
        return one is other
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(same_json(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple) and isinstance(other, list | tuple):
        return len(one) == len(other) and all(map(same_json, one, other))
    return one == other


def score(answer: str, reference: Reference) -> dict[str, JSON]:
    """``value`` and how it came about.

    Where the reference makes calls: well_formed (at least one call, none with a problem), right_tool (the same tools in
    the same order, no call more), keys_present and exact_arguments (of well-formed calls of the right tools, every
    one); ``value`` is 1.0 for a well-formed call of the right tool. Where it makes none, kind ``no_call``: 1.0 if the
    answer makes none either, and the other checks are None.
    """
    made, wanted = parse(answer), reference.calls
    called: list[JSON] = [call.name for call in made]
    expected: list[JSON] = [call.name for call in wanted]
    problems: list[JSON] = [call.problem for call in made if call.problem]
    well_formed = bool(made) and not problems
    right_tool = called == expected
    right = well_formed and right_tool
    pairs = list(zip(made, wanted, strict=True)) if right else []
    checks: dict[str, JSON] = {
        "well_formed": well_formed,
        "right_tool": right_tool,
        "keys_present": right and all(_keys(want.arguments) <= _keys(call.arguments) for call, want in pairs),
        "exact_arguments": right and all(same_json(want.arguments, call.arguments) for call, want in pairs),
    }
    return {
        "kind": "call" if wanted else "no_call",
        "value": float(right) if wanted else float(not made),
        **(checks if wanted else dict.fromkeys(checks)),
        "called": called,
        "expected": expected,
        "problems": problems,
    }


def _keys(arguments: JSON) -> set[str]:
    return set(arguments) if isinstance(arguments, dict) else set()


def _share(check: str) -> Statistic:
    def of(example: ExampleScore) -> float | None:
        held = example.detail[check]
        return None if held is None else float(bool(held))

    return Statistic(check, of, share=True)


@dataclass(frozen=True, slots=True)
class ToolCalls:
    """Items to score: (reference, the text that the model answered)."""

    name: str = "tool_calls"
    version: str = "1"
    statistics: tuple[Statistic, ...] = (
        Statistic("tool_calls", lambda example: example.value, share=True),
        *map(_share, ("well_formed", "right_tool", "keys_present", "exact_arguments")),
    )

    def score(self, items: Sequence[tuple[Reference, str]]) -> list[ExampleScore]:
        if not items:
            raise EvaluationError("no row has an answer to measure against", hint="give rows that end with an answer")
        details = [(reference.source, score(answer, reference)) for reference, answer in items]
        return [ExampleScore(source, 1.0 if detail["value"] else 0.0, detail=detail) for source, detail in details]
