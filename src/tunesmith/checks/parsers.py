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
_HEADER_BEGUN = re.compile(r"\s*[\w.-]*(?:\[CALL_ID\]\s*\w*)?\s*(\[\w*\]?)?")
_CLOSED = re.compile(r"(?:\s*</tool_call>)?")
_GIVEN = ("arguments", "parameters")
_CALL_OPENING = re.compile(r'\[?[ \t\r\n]*\{[ \t\r\n]*"(?:name|tool_calls|function)"[ \t\r\n]*:')
_GIVEN_KEY = re.compile('"(?:arguments|parameters)"')
_ESCAPE_BEGUN = re.compile(r"\\(?:u[0-9a-fA-F]{0,4})?\Z")
_IN_STRING = re.compile(r'(?:[^"\\\x00-\x1f]++|\\(?:["\\/bfnrt]|u[0-9a-fA-F]{4}))*+')
_NUMBER_GOES_ON = re.compile(r"\.|[eE][+-]?")
_SPACE = " \t\r\n"
TOOL_CALLS = "[TOOL_CALLS]"
"""Mistral's mark before calls."""
_HERMES = "<tool_call>"
_CLOSE = "</tool_call>"
_TEXT = "tool_call:"
_RESULT = "Result:"
_ARGUMENTS = "arguments:"


def parse(text: str) -> list[ParsedCall]:
    """The calls that ``text`` makes or tries to make, in order. Never raises."""
    return [call for span in Scan().read(text, complete=True) for call in span.calls]


def one_form(text: str) -> str:
    """``text`` with its calls, without ids, in OpenAI's form, one a line, after the rest.

    Unchanged if it makes no call, or one that cannot be read."""
    spans = Scan().read(text, complete=True)
    calls = [call for span in spans for call in span.calls]
    if not calls or any(call.problem for call in calls):
        return text
    ends = [0, *(span.end for span in spans)]
    starts = [*(span.start for span in spans), len(text)]
    rest = "".join(text[end:start] for end, start in zip(ends, starts, strict=True))
    try:
        lines = [
            json.dumps({"arguments": call.arguments, "name": call.name}, ensure_ascii=False, sort_keys=True)
            for call in calls
        ]
    except RecursionError:  # read at one depth, not written at it
        return text
    return "\n".join([*filter(None, [rest.strip()]), *lines])


class CallSpan(NamedTuple):
    """``text[start:end]`` makes ``calls``, or tries to; if it has a problem, ``end`` is where it was seen."""

    start: int
    end: int
    calls: tuple[ParsedCall, ...]


class _Unfinished(Exception):
    """What the text means here depends on text that has not come yet. ``string``: where the letters of the
    JSON string begin that is still open at the end of the text, if one is."""

    def __init__(self, string: int | None = None) -> None:
        super().__init__()
        self.string = string


class Scan:
    """Finds the calls of a text that may still grow: however it grows, the calls are those of the whole.

    ``settled``: no call that is not yet returned begins before this place of the text."""

    def __init__(self) -> None:
        self.settled = 0
        self._position = 0
        self._broken = False
        self._in_string: int | None = None

    def read(self, text: str, *, complete: bool) -> list[CallSpan]:
        """The calls that are new since the last reading of ``text``, which began with the same letters.
        complete: nothing follows."""
        spans: list[CallSpan] = []
        if not complete and self._string_is_open(text):
            return spans
        while mark := _MARK.search(text, self._position):
            try:
                span, self._position = self._marked(text, mark, complete)
            except _Unfinished as unfinished:
                self._position = self.settled = mark.start()
                self._in_string = unfinished.string
                return spans
            if span is not None:
                spans.append(span)
        self._position = self.settled = len(text) if complete else _mark_may_begin(text, self._position)
        return spans

    def _string_is_open(self, text: str) -> bool:
        """Whether the string that was open at the last reading still is. Then nothing else is read: a long
        string takes time in proportion to its length."""
        if self._in_string is None:
            return False
        letters = _IN_STRING.match(text, self._in_string)
        assert letters is not None  # it matches anything
        self._in_string = letters.end()
        if self._in_string == len(text) or _ESCAPE_BEGUN.fullmatch(text, self._in_string):
            return True
        self._in_string = None
        return False

    def _marked(self, text: str, mark: re.Match[str], complete: bool) -> tuple[CallSpan | None, int]:
        """What stands behind ``mark``, and where to go on. Raises _Unfinished."""
        kind, start, position, name = str(mark.lastgroup), mark.start(), mark.end(), ""
        if kind == "bare" and not complete and TOOL_CALLS.startswith(text[position:]):
            raise _Unfinished
        if kind == "bare" and self._broken:  # inside the wreck of a call a line may start with a brace
            return None, position + 1
        self._broken = False
        if kind == "text":
            name, position, is_named = _text_header(text, position, complete)
            if not is_named:
                return _failed(start, position, name, "no `arguments:` line after the name"), position
        elif kind == "mistral" and (head := _header(text, position, complete)):
            kind, name, position = "header", head[1], head.end()
        try:
            value, position = _decode(text, position, complete)
        except ValueError as error:
            if kind == "bare" and not _opens_like_a_call(text, position, complete):
                return None, position + 1  # a bracket in prose
            if kind == "result":
                return None, position
            self._broken = True
            return _failed(start, position, name, f"no JSON where the call should be: {error}"), position
        if kind == "result":
            return None, position
        calls = _calls(kind, name, value, text[position:], complete)
        position += len(_CLOSED.match(text, position)[0]) if kind == "hermes" else 0  # type: ignore[index]  # it always matches
        return (CallSpan(start, position, tuple(calls)) if calls else None), position


def _failed(start: int, end: int, name: str, problem: str) -> CallSpan:
    return CallSpan(start, end, (ParsedCall(name, None, problem),))


def _mark_may_begin(text: str, position: int) -> int:
    """The first place from ``position`` on at which more text can make a mark."""
    line = text.rfind("\n") + 1
    begun = text[line:].lstrip(" \t")
    if line >= position and any(mark.startswith(begun) for mark in (_TEXT, _RESULT)):
        return line
    for size in range(len(TOOL_CALLS) - 1, 0, -1):
        end = text[max(position, len(text) - size) :]
        if end and any(mark.startswith(end) for mark in (TOOL_CALLS, _HERMES)):
            return len(text) - len(end)
    return len(text)


def _text_header(text: str, position: int, complete: bool) -> tuple[str, int, bool]:
    """The name after ``tool_call:``, where to go on, and whether ``arguments:`` follows the line."""
    line = _NAMED.match(text, position)
    assert line is not None  # it matches anything
    following = text[line.end() :]
    if line[2] is None and not complete and _ARGUMENTS.startswith(following.lstrip()):
        raise _Unfinished
    return line[1].strip(), line.end(), line[2] is not None


def _header(text: str, position: int, complete: bool) -> re.Match[str] | None:
    """The name of a call as later versions of Mistral write it."""
    head = _HEADER.match(text, position)
    if head is None and not complete and (begun := _HEADER_BEGUN.fullmatch(text, position)):
        bracket = begun[1] or ""
        if any(mark.startswith(bracket) for mark in ("[CALL_ID]", "[ARGS]")):
            raise _Unfinished
    return head


def _opens_like_a_call(text: str, position: int, complete: bool) -> bool:
    """Whether text that is not JSON tries to be a call."""
    if (opening := _CALL_OPENING.match(text, position)) is None:
        return False
    if _GIVEN_KEY.search(text, opening.end()):
        return True
    if not complete:
        raise _Unfinished
    return False


def _refuse(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is not JSON")


STRICT = json.JSONDecoder(parse_constant=_refuse)
"""Strict JSON: NaN is a ValueError."""


def _decode(text: str, position: int, complete: bool = True) -> tuple[JSON, int]:
    """The JSON value that starts at ``position``, after white space, and where it ends. Raises ValueError,
    or _Unfinished if more text can make it valid or longer."""
    start = len(text) - len(text[position:].lstrip(_SPACE))
    try:
        value, end = STRICT.raw_decode(text, start)
    except RecursionError:
        raise ValueError("nested too deeply") from None
    except json.JSONDecodeError as error:
        if not complete and _may_go_on(text, error):
            string = error.pos + 1 if error.msg.startswith("Unterminated string") else None
            raise _Unfinished(string) from None
        raise
    if not complete and end == len(text) and isinstance(value, int | float):
        raise _Unfinished
    return value, end


def _may_go_on(text: str, error: json.JSONDecodeError) -> bool:
    """Whether text that is not JSON may become JSON when more follows. True also in some cases in which it
    cannot, which the next letters decide."""
    rest = text[error.pos :]
    if error.msg.startswith("Unterminated string"):
        return True
    if "escape" in error.msg:
        return _ESCAPE_BEGUN.search(text) is not None
    if not rest.strip(_SPACE):
        return True
    if error.msg == "Expecting value":
        return any(literal.startswith(rest) for literal in ("true", "false", "null", "-"))
    return _NUMBER_GOES_ON.fullmatch(rest) is not None and text[error.pos - 1].isdigit()


def _calls(kind: str, name: str, value: JSON, after: str, complete: bool) -> list[ParsedCall]:
    """The calls in a decoded ``value`` that ``after`` follows. Raises _Unfinished if more text can give them
    a problem."""
    line, newline, _ = after.partition("\n")
    rest = line.strip()
    is_open = not complete and not newline and not rest
    problem = f"text after the arguments: {rest[:40]!r}" if rest else None
    if kind == "header" and TOOL_CALLS.startswith(rest[: len(TOOL_CALLS)]):  # the next call
        is_open = not complete and not newline and len(rest) < len(TOOL_CALLS)
        problem = None if rest.startswith(TOOL_CALLS) else problem
    if kind in ("text", "header"):  # a string does not count as an object, whatever it holds
        value = [{"name": name, "arguments": None if isinstance(value, str) else value}]
    elif kind == "hermes":
        value, closing = [value], after.lstrip()
        is_open = not complete and _CLOSE.startswith(closing) and closing != _CLOSE
        problem = None if closing.startswith(_CLOSE) else "no </tool_call> after the object"
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
    calls = [_call(item, problem) for item in items] if named or kind != "bare" else []
    if calls and is_open:
        raise _Unfinished
    return calls


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
