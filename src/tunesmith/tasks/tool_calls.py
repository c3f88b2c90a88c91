"""Does an answer call the right tool, in a form that a program can run?

Calls are read from the text of an answer in four forms:
- ``tool_call: NAME`` on a line and ``arguments: {…}`` after it, with any ``Result: …`` between calls skipped;
- Mistral: ``[TOOL_CALLS] [{"name": …, "arguments": …}, …]``;
- Hermes: ``<tool_call>{"name": …, "arguments": …}</tool_call>``;
- OpenAI: a JSON object or array at the start of a line, ``{"name": …, "arguments": …}``, alone or as ``function`` inside
  ``tool_calls``; its arguments may be a string that holds JSON.

What is not strict JSON (NaN, single quotes, a trailing comma, text after the closing brace on its line) is a call with a
problem, because the program that receives it would fail too.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import NamedTuple, NoReturn

from tunesmith.errors import EvaluationError
from tunesmith.formats import JSON, Call, Completion, Conversation, Demonstration, Example, Judged, Message, Preference
from tunesmith.tasks import ExampleScore, Statistic, Task


class ParsedCall(NamedTuple):
    """``arguments`` is None exactly where ``problem`` says what is wrong with the call."""

    name: str
    arguments: dict[str, JSON] | None
    problem: str | None = None


class Reference(NamedTuple):
    """What a model is asked, and the calls that the right answer makes (none: it must answer in words)."""

    source: str
    prompt: Conversation | str  # str: a Completion, no chat template
    calls: tuple[Call, ...]


_MARK = re.compile(
    r"^[ \t]*(?:(?P<text>tool_call:)|(?P<result>Result:)|(?P<bare>(?=\{|\[(?!TOOL_CALLS\]))))"
    r"|(?P<mistral>\[TOOL_CALLS\])|(?P<hermes><tool_call>)",
    re.MULTILINE,
)
_NAMED = re.compile(r"(.*)(\s*arguments:)?")
_OPENS_LIKE_A_CALL = re.compile(r'\[?\s*\{\s*"(?:name|tool_calls|function)"\s*:(?s:.*)"arguments"')

CHECKS = ("well_formed", "right_tool", "keys_present", "exact_arguments")


def parse(text: str) -> list[ParsedCall]:
    """The calls that ``text`` makes or tries to make, in order. Never raises."""
    calls: list[ParsedCall] = []
    at, broken = 0, False
    while mark := _MARK.search(text, at):
        kind, at, name = str(mark.lastgroup), mark.end(), ""
        if kind == "bare" and broken:  # inside the wreck of a call a line may start with a brace
            at += 1
            continue
        broken = False
        if kind == "text" and (line := _NAMED.match(text, at)):
            name, at = line[1].strip(), line.end()
            if line[2] is None:
                calls.append(ParsedCall(name, None, "no `arguments:` line after the name"))
                continue
        try:
            value, at = _decode(text, at)
        except ValueError as error:
            if kind == "bare" and not _OPENS_LIKE_A_CALL.match(text, at):
                at += 1  # a bracket in prose
            elif kind != "result":
                calls.append(ParsedCall(name, None, f"no JSON where the call should be: {error}"))
                broken = True
            continue
        if kind != "result":
            calls += _calls(kind, name, value, text[at:])
    return calls


def _refuse(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is not JSON")


_DECODER = json.JSONDecoder(parse_constant=_refuse)


def _decode(text: str, at: int) -> tuple[JSON, int]:
    """The JSON value that starts at ``at``, after white space, and where it ends. Raises ValueError."""
    try:
        return _DECODER.raw_decode(text, len(text) - len(text[at:].lstrip(" \t\r\n")))
    except RecursionError:
        raise ValueError("nested too deeply") from None


def _calls(kind: str, name: str, value: JSON, after: str) -> list[ParsedCall]:
    """The calls in a decoded ``value`` that ``after`` follows."""
    rest = after.partition("\n")[0].strip()
    problem = f"text after the arguments: {rest[:40]!r}" if rest else None
    if kind == "text":  # a string is no object here, whatever it holds
        value = [{"name": name, "arguments": None if isinstance(value, str) else value}]
    elif kind == "hermes":
        value = [value]
        problem = None if after.lstrip().startswith("</tool_call>") else "no </tool_call> after the object"
    elif kind == "bare" and isinstance(value, dict):
        value = value.get("tool_calls") or [value]
    if not isinstance(value, list) or not value:
        return [ParsedCall("", None, "no JSON array of calls after [TOOL_CALLS]")] if kind == "mistral" else []
    items = [item["function"] if isinstance(item, dict) and isinstance(item.get("function"), dict) else item for item in value]
    other = [item for item in items if not (isinstance(item, dict) and isinstance(item.get("name"), str) and "arguments" in item)]
    return [] if kind == "bare" and other else [_call(item, problem) for item in items]


def _call(item: JSON, problem: str | None) -> ParsedCall:
    if not isinstance(item, dict):
        return ParsedCall("", None, "the call is not a JSON object")
    name, arguments = item.get("name"), item.get("arguments")
    if isinstance(arguments, str):
        try:
            arguments, end = _decode(string := arguments.strip(), 0)
            problem = problem or ("text after the arguments" if end < len(string) else None)
        except ValueError as error:
            problem = f"arguments are not JSON: {error}"
    if not isinstance(name, str) or not name:
        return ParsedCall("", None, problem or "the call has no tool name")
    if problem is None and isinstance(arguments, dict):
        return ParsedCall(name, arguments)
    return ParsedCall(name, None, problem or "the arguments are not a JSON object")


def references(example: Example) -> Reference | None:
    """The conversation up to its last assistant turn, and the calls of that turn (structured, or read from its text).

    None where there is no answer to be measured against: plain text, a row labelled undesirable, a conversation whose last
    assistant turn answers nobody, or an answer whose own call is broken.
    """
    match example:
        case Completion(label=None | True):
            prompt, answer = example.prompt, Message("assistant", example.completion)
        case Judged(desirable=True) | Demonstration() | Preference():
            conversation = example.chosen if isinstance(example, Preference) else example.conversation
            messages = conversation.messages
            at = max((at for at, message in enumerate(messages) if message.role == "assistant"), default=0)
            if at == 0 or messages[at - 1].role == "assistant":
                return None
            prompt, answer = Conversation(messages[:at], conversation.tools), messages[at]
        case _:
            return None
    parsed = [] if answer.calls else parse(answer.content)
    if any(call.problem for call in parsed):
        return None
    return Reference(example.source, prompt, answer.calls or tuple(Call(call.name, call.arguments) for call in parsed))


def same_json(one: JSON, other: JSON) -> bool:
    """Equality of JSON values: the order of keys is free, 1 equals 1.0, and true is not 1."""
    if isinstance(one, bool) or isinstance(other, bool):
        return one is other
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(same_json(one[key], other[key]) for key in one)
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(map(same_json, one, other))
    return one == other


def score(answer: str, reference: Reference) -> dict[str, JSON]:
    """``value`` and how it came about.

    Where the reference makes calls: well_formed (at least one call, none with a problem), right_tool (the same tools in the same
    order, no call more), keys_present and exact_arguments (of every call, where the first two hold); ``value`` is 1.0 where the
    first two hold. Where it makes none, kind ``no_call``: 1.0 if the answer makes none either, and the checks are None.
    """
    made, wanted = parse(answer), reference.calls
    called: list[JSON] = [call.name for call in made]
    expected: list[JSON] = [call.name for call in wanted]
    problems: list[JSON] = [call.problem for call in made if call.problem]
    well_formed, right_tool = bool(made) and not problems, called == expected
    right = well_formed and right_tool
    pairs = [(want.arguments, call.arguments or {}) for call, want in zip(made, wanted, strict=True)] if right else []
    present = right and all(not isinstance(want, dict) or want.keys() <= given.keys() for want, given in pairs)
    held = (well_formed, right_tool, present, right and all(same_json(want, given) for want, given in pairs))
    checks: dict[str, JSON] = dict(zip(CHECKS, held if wanted else [None] * len(held), strict=True))
    value = float(right if wanted else not made)
    about: dict[str, JSON] = {"called": called, "expected": expected, "problems": problems}
    return {"kind": "call" if wanted else "no_call", "value": value, **checks, **about}


def _share(check: str) -> Statistic:
    return Statistic(check, lambda one: None if one.detail[check] is None else float(one.detail[check] is True), share=True)


class ToolCalls(Task[tuple[Reference, str]]):
    """Items to score: (reference, the text that the model answered)."""

    name = "tool_calls"
    version = "1"
    statistics = (Statistic("tool_calls", lambda example: example.value, share=True), *map(_share, CHECKS))

    def score(self, items: Sequence[tuple[Reference, str]]) -> list[ExampleScore]:
        if not items:
            raise EvaluationError("no row has an answer to measure against", hint="give rows that end with an answer")
        details = [(reference.source, score(answer, reference)) for reference, answer in items]
        return [ExampleScore(source, float(detail["value"] == 1.0), detail=detail) for source, detail in details]
