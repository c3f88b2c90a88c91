"""Which calls does a text make, or try to make?

Read are the forms that data and models write:
- ``tool_call: NAME`` on a line and ``arguments: {…}`` after it, with any ``Result: …`` between calls skipped;
- Mistral: ``[TOOL_CALLS] [{"name": …, "arguments": …}, …]`` of version 3, and ``[TOOL_CALLS]NAME[ARGS]{…}``
  of later ones;
- Hermes: ``<tool_call>{"name": …, "arguments": …}</tool_call>``;
- OpenAI: a JSON object or array at the start of a line, ``{"name": …, "arguments": …}``, alone or as
  ``function`` inside
  ``tool_calls``; its arguments may be a string that holds JSON; Llama 3 calls them ``parameters``.

A call that is not strict JSON (NaN, single quotes, a trailing comma, text after the closing brace on its
line) has a problem, because the program that receives it would fail too. Whether a call is right is not
checked here."""

from __future__ import annotations

import json
import re
from typing import NamedTuple, NoReturn

from tunesmith.data.formats import JSON


class ParsedCall(NamedTuple):
    """``arguments`` is None exactly if ``problem`` says what is wrong with the call."""

    name: str
    arguments: dict[str, JSON] | None
    problem: str | None = None


_MARK = re.compile(
    r"^[ \t]*(?:(?P<text>tool_call:)|(?P<result>Result:)|(?P<bare>(?=\{|\[(?!TOOL_CALLS\]))))"
    r"|(?P<mistral>\[TOOL_CALLS\])|(?P<hermes><tool_call>)",
    re.MULTILINE,
)
_HEADER = re.compile(r"\s*([\w.-]+)(?:\[CALL_ID\]\s*\w+)?\s*\[ARGS\]")
_NAMED = re.compile(r"(.*)(\s*arguments:)?")
_CLOSED = re.compile(r"(?:\s*</tool_call>)?")
_GIVEN = ("arguments", "parameters")
_OPENS_LIKE_A_CALL = re.compile(
    r'\[?\s*\{\s*"(?:name|tool_calls|function)"\s*:(?s:.*)"(?:arguments|parameters)"'
)


def parse(text: str) -> list[ParsedCall]:
    """The calls that ``text`` makes or tries to make, in order. Never raises."""
    return _parsed(text)[0]


def one_form(text: str) -> str:
    """``text`` with its calls, without ids, in OpenAI's form, one a line, after the rest.

    Unchanged if it makes no call, or one that cannot be read."""
    calls, rest = _parsed(text)
    if not calls or any(call.problem for call in calls):
        return text
    try:
        lines = [
            json.dumps({"arguments": call.arguments, "name": call.name}, ensure_ascii=False, sort_keys=True)
            for call in calls
        ]
    except RecursionError:  # read at one depth, not written at it
        return text
    return "\n".join([*filter(None, [rest.strip()]), *lines])


def _parsed(text: str) -> tuple[list[ParsedCall], str]:
    """The calls, and the text around them."""
    calls: list[ParsedCall] = []
    rest, copied = "", 0
    position, broken = 0, False
    while mark := _MARK.search(text, position):
        kind, position, name = str(mark.lastgroup), mark.end(), ""
        if kind == "bare" and broken:  # inside the wreck of a call a line may start with a brace
            position += 1
            continue
        broken = False
        if kind == "text" and (line := _NAMED.match(text, position)):
            name, position = line[1].strip(), line.end()
            if line[2] is None:
                calls.append(ParsedCall(name, None, "no `arguments:` line after the name"))
                continue
        elif kind == "mistral" and (head := _HEADER.match(text, position)):
            kind, name, position = "header", head[1], head.end()
        try:
            value, position = _decode(text, position)
        except ValueError as error:
            if kind == "bare" and not _OPENS_LIKE_A_CALL.match(text, position):
                position += 1  # a bracket in prose
            elif kind != "result":
                calls.append(ParsedCall(name, None, f"no JSON where the call should be: {error}"))
                broken = True
            continue
        if kind != "result" and (decoded := _calls(kind, name, value, text[position:])):
            calls += decoded
            rest += text[copied : mark.start()]
            position += len(_CLOSED.match(text, position)[0]) if kind == "hermes" else 0  # type: ignore[index]  # it always matches
            copied = position
    return calls, rest + text[copied:]


def _refuse(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is not JSON")


STRICT = json.JSONDecoder(parse_constant=_refuse)
"""Strict JSON: NaN is a ValueError."""


def _decode(text: str, position: int) -> tuple[JSON, int]:
    """The JSON value that starts at ``at``, after white space, and where it ends. Raises ValueError."""
    try:
        return STRICT.raw_decode(text, len(text) - len(text[position:].lstrip(" \t\r\n")))
    except RecursionError:
        raise ValueError("nested too deeply") from None


def _calls(kind: str, name: str, value: JSON, after: str) -> list[ParsedCall]:
    """The calls in a decoded ``value`` that ``after`` follows."""
    rest = after.partition("\n")[0].strip()
    problem = f"text after the arguments: {rest[:40]!r}" if rest else None
    if kind == "header" and rest.startswith("[TOOL_CALLS]"):  # the next call
        problem = None
    if kind in ("text", "header"):  # a string does not count as an object, whatever it holds
        value = [{"name": name, "arguments": None if isinstance(value, str) else value}]
    elif kind == "hermes":
        value = [value]
        problem = None if after.lstrip().startswith("</tool_call>") else "no </tool_call> after the object"
    elif kind == "bare" and isinstance(value, dict):
        value = value.get("tool_calls") or [value]
    if not isinstance(value, list) or not value:
        return (
            [ParsedCall("", None, "no JSON array of calls after [TOOL_CALLS]")] if kind == "mistral" else []
        )
    items = [
        item["function"] if isinstance(item, dict) and isinstance(item.get("function"), dict) else item
        for item in value
    ]
    named = all(
        isinstance(entry, dict) and isinstance(entry.get("name"), str) and entry.keys() & set(_GIVEN)
        for entry in items
    )
    return [_call(item, problem) for item in items] if named or kind != "bare" else []


def _call(item: JSON, problem: str | None) -> ParsedCall:
    if not isinstance(item, dict):
        return ParsedCall("", None, "the call is not a JSON object")
    name, arguments = item.get("name"), next((item[key] for key in _GIVEN if key in item), None)
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


def same_json(first: JSON, second: JSON) -> bool:
    """Equality of JSON values: the order of keys does not matter, 1 equals 1.0, true is not 1."""
    if isinstance(first, bool) or isinstance(second, bool):
        return first is second
    if isinstance(first, dict) and isinstance(second, dict):
        return first.keys() == second.keys() and all(same_json(first[key], second[key]) for key in first)
    if isinstance(first, list) and isinstance(second, list):
        return len(first) == len(second) and all(map(same_json, first, second))
    return first == second
