"""Values that a row holds as text: messages and calls in JSON, or as Python writes them.

Exports of tables write a list of messages as one text. Learned as it is, it would teach the model brackets
and quotation marks, so it is read as messages if it can only be that."""

from __future__ import annotations

import ast
import json
import re
import warnings

from tunesmith.data import sources
from tunesmith.data.examples import BadRow
from tunesmith.data.sources import show
from tunesmith.settings.config import JSON

ROLES = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "model": "assistant",
    "function_call": "assistant",
    "tool": "tool",
    "observation": "tool",
    "function": "tool",
}
"""What rows call a speaker → the role."""
_CONTENT = ("content", "value", "tool_calls", "function_call")
_LIKE_MESSAGES = re.compile(rf"""["'](?:role|from)["']\s*:\s*["'](?:{"|".join(ROLES)})["']""")
_BEGINS_WITH_A_MESSAGE = re.compile(rf"(?:\[\s*)?\{{\s*{_LIKE_MESSAGES.pattern}")
_BRACKETS_AND_STRINGS = re.compile(
    r"""[][{}]|"[^"\\]*(?:\\.[^"\\]*)*(?:"|\\?\Z)|'[^'\\]*(?:\\.[^'\\]*)*(?:'|\\?\Z)""", re.DOTALL
)
"""Brackets, and whole strings; the last one may be open."""


def messages(text: str, place: str) -> JSON:
    """The messages that ``text`` holds in JSON or as Python writes them, or None if it is words. Raises
    BadRow if it can only be messages and cannot be read."""
    bare = text.strip()
    if bare[:1] not in ("[", "{") or not _LIKE_MESSAGES.search(bare):
        return None
    if bare[-1:] not in ("]", "}") and not _is_cut_off(bare):
        return None
    try:
        value = literal(bare)
    except ValueError as error:
        hint = "write the messages as a list, not as text"
        raise BadRow(
            "nested", place, "messages, in JSON or as Python writes them", f"{show(bare)} ({error})", hint
        ) from None
    turns: list[JSON] = value if isinstance(value, list) else [value]
    return turns if turns and all(map(_is_message, turns)) else None


def _is_cut_off(text: str) -> bool:
    """Whether ``text`` begins with a message and ends before its brackets are closed."""
    if not _BEGINS_WITH_A_MESSAGE.match(text):
        return False
    depth = 0
    for part in _BRACKETS_AND_STRINGS.finditer(text):
        depth += {"[": 1, "{": 1, "]": -1, "}": -1}.get(part[0], 0)
        if depth == 0:
            return False
    return True


def _is_message(turn: JSON) -> bool:
    if not isinstance(turn, dict):
        return False
    speaker = turn.get("role", turn.get("from"))
    return isinstance(speaker, str) and speaker in ROLES and any(key in turn for key in _CONTENT)


def literal(text: str) -> JSON:
    """The value of ``text``, which is JSON, or a literal of Python. Raises ValueError with the reason."""
    value = _json(text)
    if not isinstance(value, BadRow):
        return value
    try:
        json.loads(text)
    except ValueError:
        pass
    except RecursionError:
        raise ValueError("values nested too deeply") from None
    else:
        raise ValueError(value.fault)  # it is JSON, but a key stands twice, or a number cannot be kept
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of escapes that Python will not know one day
            parsed = ast.literal_eval(text)
        return json.loads(json.dumps(parsed, allow_nan=False))
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        raise ValueError(value.fault) from None


def _json(text: str) -> JSON | BadRow:
    try:
        return sources.value(text)
    except RecursionError:
        raise ValueError("values nested too deeply") from None


def from_json(value: JSON, place: str, reason: str) -> JSON:
    """``value``, or the JSON inside it if it is text."""
    inside = sources.value(value) if isinstance(value, str) else value
    if isinstance(inside, BadRow):
        raise BadRow(reason, place, "a string that holds JSON", f"{show(value)} ({inside.fault})")
    return inside
