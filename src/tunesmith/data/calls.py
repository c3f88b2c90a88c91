"""Calls that an assistant writes as text: where they are, and the same conversation with them as calls and
results.

The form is ``tool_call: NAME``, ``arguments: {…}``, ``Result: …``, each at the start of a line. What stands
in a code fence or in the middle of a sentence is not a call. Nothing is invented or lost: a row that cannot
be written as turns stays as it is. Other forms of calls, and whether a template can render the turns, are not
checked here."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import count, pairwise, zip_longest
from typing import Any, NamedTuple, cast

from tunesmith.data import nested, sources
from tunesmith.data.examples import (
    BadRow,
    Call,
    Conversation,
    Demonstration,
    Example,
    Judged,
    Message,
    Preference,
    check,
)
from tunesmith.settings.config import JSON

STRUCTURED = "structured"
"""What `structure` returns for a row whose calls became turns."""


@dataclass(frozen=True, slots=True)
class TextCall:
    """``arguments``: None if ``text``, which is how they are written, is not a JSON object. ``result``: as
    written, None if there is none. text[start:end] is the call, with its result if that follows at once."""

    name: str
    arguments: dict[str, JSON] | None
    text: str
    result: str | None
    start: int
    end: int


class _Piece(NamedTuple):
    """A call, or a result if ``name`` is "". ``text``: what follows the last marker. ``sure``: it ends
    there."""

    name: str
    text: str
    arguments: dict[str, JSON] | None
    sure: bool
    start: int
    end: int


@dataclass
class _Run:
    """Consecutive calls, and the consecutive results that follow them."""

    calls: list[_Piece]
    results: list[_Piece] = field(default_factory=list)

    @property
    def end(self) -> int:
        return (self.results or self.calls)[-1].end


_HEAD = re.compile(
    r"^ {0,3}(?:(?P<fence>`{3,}(?=[^`\n]*$)|~{3,})|tool_call:[ "
    r"\t]*(?P<name>\S++)\s++(?:(?P<given>arguments:\s*+)|(?=Result:)))",
    re.MULTILINE,
)
_CALL, _RESPONSE = (
    re.compile(rf"<{mark}>\s*(.*?)\s*</{mark}>", re.DOTALL) for mark in ("tool_call", "tool_response")
)
_CLOSE = re.compile(r"^ {0,3}(`{3,}|~{3,})[ \t\r]*$", re.MULTILINE)
_MARKER = re.compile(r"^ {0,3}(?:tool_call|Result):", re.MULTILINE)  # JSON has no such line
_STRAY = re.compile(r"^ {0,3}Result:", re.MULTILINE)
_RESULT = re.compile(r"\s*+Result:[ \t]*+(?:\r?\n)?[ \t]*+")
_ENDS, _LINE = (
    re.compile(rf"[ \t\r]*+(?:\n|\Z{more})") for more in ("|Result:", "")
)  # behind arguments, behind a result
_BREAK = re.compile(r"\n(?=[ \t\r]*+(?:\n|\Z))")
_BLANK = re.compile(r"\A(?:[ \t\r]*+\n)*+")
_STRICT, _LENIENT = (
    json.JSONDecoder(strict=strict, parse_int=str, parse_float=str, parse_constant=str)
    for strict in (True, False)
)


def tagged(messages: Sequence[Message]) -> tuple[Message, ...]:
    """``messages`` with calls in ``<tool_call>`` marks, as Hermes writes them, as calls, and what stands in
    ``<tool_response>`` marks as their results. Words before the calls stay beside them. Raises BadRow for
    marks that cannot be read so."""
    made: list[Message] = []
    ids = (f"c{number:08x}" for number in count())
    waiting: list[Call] = []
    for turn, message in enumerate(messages, 1):
        if message.role == "assistant" and not message.calls and "<tool_call>" in message.content:
            words, waiting = _tagged_calls(message.content, f"turn {turn}", ids)
            made.append(replace(message, content=words, calls=tuple(waiting)))
        elif message.role == "tool" and message.call_id is None and waiting:
            results = _RESPONSE.findall(message.content) or [message.content]
            if len(results) > len(waiting):
                wanted = f"{len(waiting)} results"
                raise BadRow("results", f"turn {turn}", wanted, f"{len(results)} in one turn")
            for result in results:
                call = waiting.pop(0)
                made.append(Message("tool", result, call_id=call.id, name=call.name))
        else:
            made.append(message)
    return tuple(made)


def _tagged_calls(text: str, place: str, ids: Iterator[str]) -> tuple[str, list[Call]]:
    """(the words before the calls, the calls)."""
    marks = list(_CALL.finditer(text))
    between = [text[before.end() : after.start()] for before, after in pairwise(marks)]
    if not marks or any(part.strip() for part in between) or text[marks[-1].end() :].strip():
        raise BadRow(
            "call", place, "calls in <tool_call> marks after the words", "words behind or an open mark"
        )
    calls: list[Call] = []
    for mark in marks:
        try:
            value = nested.literal(mark[1])
        except ValueError as error:
            raise BadRow("call", place, "an object in <tool_call> marks", str(error)) from None
        name, arguments = (
            (value.get("name"), value.get("arguments")) if isinstance(value, dict) else (None, None)
        )
        if not isinstance(name, str) or not isinstance(arguments, dict):
            raise BadRow("call", place, "a call with a name and arguments", sources.show(mark[1]))
        calls.append(Call(name, arguments, next(ids)))
    return text[: marks[0].start()].rstrip(), calls


def without_words(example: Example) -> Example:
    """The example without words in turns that call, as formats have it whose turns hold words or calls."""
    if isinstance(example, Preference):
        chosen, rejected = calls_only(example.chosen), calls_only(example.rejected)
        return replace(example, chosen=chosen, rejected=rejected, id="")
    if isinstance(example, Demonstration | Judged):
        return replace(example, conversation=calls_only(example.conversation), id="")
    return example


def calls_only(conversation: Conversation) -> Conversation:
    """The conversation without words in turns that call."""
    messages = (
        replace(message, content="") if message.calls else message for message in conversation.messages
    )
    return replace(conversation, messages=tuple(messages))


def found(text: str) -> list[TextCall]:
    """The calls of an assistant's turn, in order, each with its result; if there are fewer results than
    calls, the last calls have them."""
    calls: list[TextCall] = []
    for run in _runs(text):
        lacking = max(len(run.calls) - len(run.results), 0)
        for position, call in enumerate(run.calls):
            result = run.results[position - lacking] if position >= lacking else None
            end = result.end if result and len(run.calls) == 1 else call.end
            calls.append(
                TextCall(
                    call.name, call.arguments, call.text, result.text if result else None, call.start, end
                )
            )
    return calls


def structure(example: Example) -> tuple[Example, str]:
    """The example with its calls as turns, and ``structured``; or the example as it is, and ``left: `` with a
    reason, or "" if it has no calls.

    Of a pair both sides are changed or none, so that they differ in what they say and not in how it is
    written."""
    if not isinstance(example, Demonstration | Judged | Preference):
        return example, ""
    pair = isinstance(example, Preference)
    before = [example.chosen, example.rejected] if pair else [example.conversation]
    try:
        after = [_turned(side) for side in before]
    except BadRow as bad:
        return example, f"left: {bad.reason}"
    if before == after:
        return example, ""
    if isinstance(example, Preference):
        parts = next(
            (two for two in zip_longest(*(side.messages for side in after)) if two[0] != two[1]), (None, None)
        )
        if any(message is None or message.role != "assistant" for message in parts):
            return (
                example,
                "left: pair",
            )  # they part at a result, which is not learned, or do not differ any more
        return replace(example, chosen=after[0], rejected=after[1], id=""), STRUCTURED
    return replace(example, conversation=after[0], id=""), STRUCTURED


def _turned(conversation: Conversation) -> Conversation:
    messages = structured(conversation.messages)
    if messages != conversation.messages:
        functions = [cast(dict[str, Any], tool)["function"] for tool in conversation.tools]
        check(messages, {function["name"] for function in functions})
    return replace(conversation, messages=messages)


def structured(messages: Sequence[Message]) -> tuple[Message, ...]:
    """``messages`` with each call as text replaced by a turn that calls, a tool's turn with the result, and
    what is said next.

    A call with words before it is refused: Mistral's format has either words or calls in a turn. Consecutive
    calls that as many results follow are calls of one turn. Ids have nine letters and digits, as Mistral
    wants, and count the calls of the conversation. Raises BadRow if the calls cannot be told apart from
    words, results, or each other. `check` is the caller's."""
    made: list[Message] = []
    ids = (f"c{number:08x}" for number in count())
    mixed = any(message.calls or message.role == "tool" for message in messages)
    for turn, message in enumerate(messages, 1):
        runs = _runs(message.content) if message.role == "assistant" else []
        if runs and mixed:
            raise BadRow("mixed_calls", f"turn {turn}", "calls as text or as calls, in one row", "both")
        start = 0
        for run in runs:
            words = _words(message.content[start : run.calls[0].start].rstrip(), start)
            start = run.end
            _check_run(run, f"turn {turn}")
            if not run.results and message.content[start:].strip():
                raise BadRow("unanswered_call", f"turn {turn}", f"the result of {run.calls[-1].name}", "none")
            if words.strip():
                raise BadRow(
                    "words",
                    f"turn {turn}",
                    "a call alone in its turn, as Mistral's format has it",
                    "words before it",
                )
            calls = tuple(
                Call(call.name, cast(JSON, call.arguments), next(ids), call.text) for call in run.calls
            )
            made.append(replace(message, content="", calls=calls))
            for call, result in zip(calls, run.results, strict=False):
                made.append(Message("tool", result.text, call_id=call.id, name=call.name))
        rest = _words(message.content[start:], start)
        if not runs or rest.strip():
            made.append(replace(message, content=rest))
    return tuple(made)


def _words(text: str, start: int) -> str:
    """What is said from ``start`` on, behind a call without blank lines. Raises BadRow if it holds a stray
    result."""
    if start and _STRAY.search(text):
        raise BadRow("result", "", "a result right behind its call", "one between the words")
    return _BLANK.sub("", text) if start else text


def _check_run(run: _Run, at: str) -> None:
    names = " and ".join(call.name for call in run.calls)
    if any(call.arguments is None for call in run.calls):
        raise BadRow("arguments", at, f"a JSON object as the arguments of {names}", "something else")
    if run.results and len(run.results) != len(run.calls):
        raise BadRow(
            "results",
            at,
            f"a result for each call of {names}",
            f"{len(run.results)} for {len(run.calls)} calls",
        )
    if not all(result.sure for result in run.results):
        raise BadRow("result", at, f"a result of {names} with a clear end", "one that is empty or breaks off")


def _runs(text: str) -> list[_Run]:
    runs: list[_Run] = []
    for piece in _pieces(text):
        if not piece.name:
            runs[-1].results.append(piece)
        elif runs and not runs[-1].results and not text[runs[-1].end : piece.start].strip():
            runs[-1].calls.append(piece)
        else:
            runs.append(_Run([piece]))
    return runs


def _pieces(text: str) -> Iterator[_Piece]:
    """Calls, each with the results right behind it. Every letter is read a bounded number of times."""
    position = 0 if "tool_call:" in text else len(text)
    while head := _HEAD.search(text, position):
        if fence := head["fence"]:
            closed = next(
                (end for end in _CLOSE.finditer(text, head.end()) if end[1].startswith(fence)), None
            )
            position = closed.end() if closed else len(text)
            continue
        window = _window(text, head.end()) if head["given"] else ""
        end = _value(window, _STRICT, _ENDS)
        said = window[: _paragraph(window) if end is None else end].rstrip()
        yield _Piece(
            head["name"],
            said,
            None if end is None else _object(said),
            True,
            head.start(),
            position := head.end() + len(said),
        )
        while marker := _RESULT.match(text, position):
            window = _window(text, marker.end())
            end = _value(window, _STRICT, _LINE) or _value(window, _LENIENT, _LINE)
            said = window[: end or _paragraph(window)].rstrip()
            sure = bool(said) and not said.count("```") % 2 and not (said[0] in "{[" and "\n" in said)
            yield _Piece(
                "", said, None, end is not None or sure, marker.start(), position := marker.end() + len(said)
            )


def _window(text: str, start: int) -> str:
    """What can belong to the marker before ``start``."""
    following = _MARKER.search(text, start)
    return text[start : following.start() if following else len(text)]


def _value(window: str, decoder: json.JSONDecoder, behind: re.Pattern[str]) -> int | None:
    """Where the JSON value at the start of ``window`` ends, if it does and ``behind`` follows."""
    try:
        _, end = decoder.raw_decode(window)
    except (ValueError, RecursionError):
        return None
    return end if behind.match(window, end) else None


def _object(text: str) -> dict[str, JSON] | None:
    try:
        value = sources.value(text)
    except RecursionError:
        return None
    return value if isinstance(value, dict) else None


def _paragraph(window: str) -> int:
    """Where the text at the start of ``window`` ends: at a blank line."""
    stop = _BREAK.search(window)
    return 0 if window[:1] in "\r\n" else stop.start() if stop else len(window)
