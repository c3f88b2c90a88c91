"""Which calls does a text make, or try to make?

Read are the forms that data and models write:
- ``tool_call: NAME`` on a line and ``arguments: {…}`` after it, with any ``Result: …`` between calls skipped;
- Mistral: ``[TOOL_CALLS] [{"name": …, "arguments": …}, …]`` of version 3, and ``[TOOL_CALLS]NAME[ARGS]{…}``
  of later ones;
- Hermes: ``<tool_call>{"name": …, "arguments": …}</tool_call>``;
- Qwen3-Coder: ``<tool_call><function=NAME><parameter=KEY>VALUE</parameter>…</function></tool_call>``, whose
  values are read by the tool's schema;
- Llama 3: a call as OpenAI's after ``<|python_tag|>``, wherever that stands;
- OpenAI: a JSON object or array at the start of a line, ``{"name": …, "arguments": …}``, alone or as
  ``function`` inside
  ``tool_calls``; its arguments may be a string that holds JSON; Llama 3 calls them ``parameters``.

A call that is not strict JSON (NaN, single quotes, a trailing comma, text after the closing brace on its
line) has a problem, because the program that receives it would fail too. Whether a call is right is not
checked here."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import NamedTuple, NoReturn

from tunesmith.checks.growing import ESCAPE_BEGUN, Growing, OpenText, OpenValue
from tunesmith.data.formats import JSON


class ParsedCall(NamedTuple):
    """``arguments`` is None exactly if ``problem`` says what is wrong with the call."""

    name: str
    arguments: dict[str, JSON] | None
    problem: str | None = None


_MARK = re.compile(
    r"^[ \t]*(?:(?P<text>tool_call:)|(?P<result>Result:)|(?P<bare>(?=\{|\[(?!TOOL_CALLS\]))))"
    r"|(?P<mistral>\[TOOL_CALLS\])|(?P<hermes><tool_call>)|(?P<python><\|python_tag\|>)",
    re.MULTILINE,
)
_HEADER = re.compile(r"\s*([\w.-]+)(?:\[CALL_ID\]\s*\w+)?\s*\[ARGS\]")
_NAMED = re.compile(r"(.*)(\s*arguments:)?")
_HEADER_BEGUN = re.compile(r"\s*[\w.-]*(?:\[CALL_ID\]\s*\w*)?\s*(\[\w*\]?)?")
_CLOSED = re.compile(r"(?:\s*</tool_call>)?")
_GIVEN = ("arguments", "parameters")
_CALL_OPENING = re.compile(r'\[?[ \t\r\n]*\{[ \t\r\n]*"(?:name|tool_calls|function)"[ \t\r\n]*:')
_GIVEN_KEYS = tuple(f'"{key}"' for key in _GIVEN)
_WHITE = re.compile(r"\s*+")
_FUNCTION = re.compile(r"\s*<function=([^<>\n]+)>")
_PARAMETER = re.compile(r"\s*<parameter=([^<>\n]+)>\n?")
_FUNCTION_END = re.compile(r"\s*</function>")
_TAG_BEGUN = re.compile(r"\s*(?:<(?:function|parameter)=[^<>\n]*|(?P<tag></?[a-z]*=?)?)")
_TAGS = ("<function=", "<parameter=", "</function>")
_PYTHON_NAMES: Mapping[str, JSON] = {"True": True, "False": False, "None": None}
_NUMBER_GOES_ON = re.compile(r"\.|[eE][+-]?")
_SPACE = " \t\r\n"
TOOL_CALLS = "[TOOL_CALLS]"
"""Mistral's mark before calls."""
_HERMES = "<tool_call>"
_PYTHON = "<|python_tag|>"
_CLOSE = "</tool_call>"
_PARAMETER_END = "</parameter>"
_TEXT = "tool_call:"
_RESULT = "Result:"
_ARGUMENTS = "arguments:"


def parse(text: str, tools: Sequence[JSON] = ()) -> list[ParsedCall]:
    """The calls that ``text`` makes or tries to make, in order. ``tools``: those that the prompt declares, as
    OpenAI does. Never raises."""
    return [call for span in Scan(tools).read(text, complete=True) for call in span.calls]


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
    """What the text means here depends on text that has not come yet. ``growing``: the part that has to end
    before anything can be said, or None if any letter may decide."""

    def __init__(self, growing: Growing | None = None) -> None:
        super().__init__()
        self.growing = growing


class Scan:
    """Finds the calls of a text that may still grow: however it grows, the calls are those of the whole.
    ``tools``: as `parse` takes them.

    ``settled``: no call that is not yet returned begins before this place of the text."""

    def __init__(self, tools: Sequence[JSON] = ()) -> None:
        self.settled = 0
        self._tools = tools
        self._position = 0
        self._broken = False
        self._growing: Growing | None = None

    def read(self, text: str, *, complete: bool) -> list[CallSpan]:
        """The calls that are new since the last reading of ``text``, which began with the same letters.
        complete: nothing follows."""
        spans: list[CallSpan] = []
        if not complete and self._growing is not None and self._growing.goes_on(text):
            return spans
        self._growing = None
        while mark := _MARK.search(text, self._position):
            try:
                span, self._position = self._marked(text, mark, complete)
            except _Unfinished as unfinished:
                self._position = self.settled = mark.start()
                self._growing = unfinished.growing
                return spans
            if span is not None:
                spans.append(span)
        self._position = self.settled = len(text) if complete else _mark_may_begin(text, self._position)
        return spans

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
        if kind == "hermes" and _tag_begins(text, position, complete):
            kind = "tags"
        try:
            if kind == "tags":
                value, position = _function(text, position, complete, self._tools)
            else:
                value, position = _decode(text, position, complete)
        except ValueError as error:
            if kind in ("bare", "python") and not _opens_like_a_call(text, position, complete):
                return None, position + (kind == "bare")  # a bracket in prose, or a program
            if kind == "result":
                return None, position
            self._broken = True
            problem = str(error) if kind == "tags" else f"no JSON where the call should be: {error}"
            return _failed(start, position, name, problem), position
        if kind == "result":
            return None, position
        calls = _calls(kind, name, value, text[position:], complete)
        position += len(_CLOSED.match(text, position)[0]) if kind in ("hermes", "tags") else 0  # type: ignore[index]  # it always matches
        return (CallSpan(start, position, tuple(calls)) if calls else None), position


def _failed(start: int, end: int, name: str, problem: str) -> CallSpan:
    return CallSpan(start, end, (ParsedCall(name, None, problem),))


def _mark_may_begin(text: str, position: int) -> int:
    """The first place from ``position`` on at which more text can make a mark."""
    line = text.rfind("\n") + 1
    begun = text[line:].lstrip(" \t")
    if line >= position and any(mark.startswith(begun) for mark in (_TEXT, _RESULT)):
        return line
    for size in range(len(_PYTHON) - 1, 0, -1):
        end = text[max(position, len(text) - size) :]
        if end and any(mark.startswith(end) and mark != end for mark in (TOOL_CALLS, _HERMES, _PYTHON)):
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
    if any(text.find(key, opening.end()) >= 0 for key in _GIVEN_KEYS):
        return True
    if not complete:
        raise _Unfinished(OpenText(opening.end(), *_GIVEN_KEYS))
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
            raise _Unfinished(OpenValue(start)) from None
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
        return ESCAPE_BEGUN.search(text) is not None
    if not rest.strip(_SPACE):
        return True
    if error.msg == "Expecting value":
        return any(literal.startswith(rest) for literal in ("true", "false", "null", "-"))
    return _NUMBER_GOES_ON.fullmatch(rest) is not None and text[error.pos - 1].isdigit()


def _tag_begins(text: str, position: int, complete: bool) -> bool:
    """Whether a call in tags stands at ``position``, after white space."""
    spaces = _WHITE.match(text, position)
    assert spaces is not None  # it matches anything
    begun = text[spaces.end() : spaces.end() + len(_TAGS[0])]
    if not complete and begun and begun != _TAGS[0] and _TAGS[0].startswith(begun):
        raise _Unfinished
    return begun == _TAGS[0]


def _function(text: str, position: int, complete: bool, tools: Sequence[JSON]) -> tuple[JSON, int]:
    """The call that is written in tags at ``position``, and where it ends. Raises ValueError, or _Unfinished
    if more text can complete it."""
    if (head := _FUNCTION.match(text, position)) is None:
        raise _wrong_tag(text, position, complete, "<function=NAME>")
    name, position = head[1].strip(), head.end()
    schemas = _schemas(name, tools)
    arguments: dict[str, JSON] = {}
    while parameter := _PARAMETER.match(text, position):
        end = text.find(_PARAMETER_END, parameter.end())
        if end < 0 and not complete:
            raise _Unfinished(OpenText(parameter.end(), _PARAMETER_END))
        if end < 0:
            raise ValueError(f"no {_PARAMETER_END} after the parameter {parameter[1]}")
        key = parameter[1].strip()
        arguments[key] = _value(text[parameter.end() : end].removesuffix("\n"), schemas.get(key))
        position = end + len(_PARAMETER_END)
    if (closing := _FUNCTION_END.match(text, position)) is None:
        raise _wrong_tag(text, position, complete, "<parameter=KEY> or </function>")
    return {"name": name, "arguments": arguments}, closing.end()


def _wrong_tag(text: str, position: int, complete: bool, wanted: str) -> Exception:
    """Why there is none of the ``wanted`` tags at ``position``."""
    begun = None if complete else _TAG_BEGUN.fullmatch(text, position)
    if begun and any(tag.startswith(begun["tag"] or "") for tag in _TAGS):
        return _Unfinished()
    return ValueError(f"{wanted} is missing")


def _schemas(name: str, tools: Sequence[JSON]) -> Mapping[str, JSON]:
    """The schemas of the arguments of the tool ``name``; empty if they are not known."""
    for tool in tools:
        function = tool.get("function") if isinstance(tool, dict) else None
        if isinstance(function, dict) and function.get("name") == name:
            parameters = function.get("parameters")
            properties = parameters.get("properties") if isinstance(parameters, dict) else None
            return properties if isinstance(properties, dict) else {}
    return {}


def _value(text: str, schema: JSON) -> JSON:
    """The value that a template writes as ``text``: strings as they are, others as JSON, or as Python does.
    If ``schema`` names no type, it is a string only if it is not JSON."""
    types = _types(schema)
    if types == {"string"}:
        return text
    try:
        value = _PYTHON_NAMES[text] if text in _PYTHON_NAMES and types else STRICT.decode(text)
    except (ValueError, RecursionError):
        return text
    is_other = "string" in types and _type_of(value) not in types
    return text if isinstance(value, str) or is_other else value


def _types(schema: JSON) -> set[str]:
    """The names of the types that ``schema`` allows; empty if it does not say so plainly."""
    if not isinstance(schema, dict):
        return set()
    entries = schema.get("enum")
    if isinstance(entries, list):
        return {_type_of(entry) for entry in entries}
    named = schema.get("type")
    branches = schema.get("anyOf") or schema.get("oneOf")
    if named is None and isinstance(branches, list):
        types = [_types(branch) for branch in branches]
        return set().union(*types) if all(types) else set()
    names = {name for name in (named if isinstance(named, list) else [named]) if isinstance(name, str)}
    return names | {"integer"} if "number" in names else names


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
    elif kind in ("hermes", "tags"):
        value, closing = [value], after.lstrip()
        is_open = not complete and _CLOSE.startswith(closing) and closing != _CLOSE
        problem = None if closing.startswith(_CLOSE) else "no </tool_call> after the object"
    elif kind in ("bare", "python") and isinstance(value, dict):
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
    calls = [_call(item, problem) for item in items] if named or kind not in ("bare", "python") else []
    if calls and is_open:
        raise _Unfinished
    return calls


def _type_of(value: JSON) -> str:
    """The name that schemas have for the type of ``value``."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "boolean"
    if isinstance(value, int | float):
        return "integer" if isinstance(value, int) or value.is_integer() else "number"
    return {str: "string", list: "array", dict: "object"}[type(value)]


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
