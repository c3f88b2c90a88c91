"""Does a part of a text still go on while the text grows?

Calls are read from an answer while it is made, and a call is read when it is complete. Until then these
classes read each letter of it once, so that a long call takes time in proportion to its length."""

from __future__ import annotations

import re
from typing import Protocol

DEEPEST = 200
"""Levels of nesting that `OpenValue` follows: fewer than those at which Python's reader gives up."""
ESCAPE_BEGUN = re.compile(r"\\(?:u[0-9a-fA-F]{0,4})?\Z")
_SPACES = re.compile(r"[ \t\r\n]*+")
_IN_STRING = re.compile(r'(?:[^"\\\x00-\x1f]++|\\(?:["\\/bfnrt]|u[0-9a-fA-F]{4}))*+')
_SCALAR = re.compile(r"true|false|null|-?(?:0|[1-9][0-9]*+)(?:\.[0-9]++)?(?:[eE][+-]?[0-9]++)?")
_SCALAR_BEGUN = re.compile(
    r"t(?:r(?:ue?)?)?|f(?:a(?:l(?:se?)?)?)?|n(?:u(?:ll?)?)?"
    r"|-?(?:(?:0|[1-9][0-9]*+)(?:\.[0-9]*+)?(?:[eE][+-]?[0-9]*+)?)?"
)


class Growing(Protocol):
    """A part of a text whose end has not come yet."""

    def goes_on(self, text: str) -> bool:
        """Whether the part has still no end in ``text``, which has grown. Once this is False, it is not
        called again."""
        ...


class OpenText:
    """A part of a text from ``start`` to the first of ``ends``."""

    def __init__(self, start: int, *ends: str) -> None:
        self._position, self._ends = start, ends

    def goes_on(self, text: str) -> bool:
        if any(text.find(end, self._position) >= 0 for end in self._ends):
            return False
        self._position = max(self._position, len(text) - max(map(len, self._ends)) + 1)
        return True


class OpenValue:
    """A strict JSON value at ``start``. It goes on if the text ends within white space before it, or within
    an object, an array or a string, and is valid so far."""

    def __init__(self, start: int) -> None:
        self._position = start
        self._brackets: list[str] = []
        """Those that will close what is open, the innermost last."""
        self._next = "value"
        """What may stand next: value, value or ], key, key or }, colon, or comma."""
        self._in_string = False

    def goes_on(self, text: str) -> bool:
        while True:
            if self._in_string and (ends := self._string_goes_on(text)) is not None:
                return ends
            spaces = _SPACES.match(text, self._position)
            assert spaces is not None  # it matches anything
            self._position = spaces.end()
            if self._next == "comma" and not self._brackets:
                return False  # the value is complete
            if self._position == len(text):
                return True
            if self._next in ("value", "value or ]") and _SCALAR_BEGUN.fullmatch(text, self._position):
                return bool(self._brackets)
            if not self._read(text, text[self._position]):
                return False

    def _string_goes_on(self, text: str) -> bool | None:
        """Whether the open string goes on; None if it has ended."""
        letters = _IN_STRING.match(text, self._position)
        assert letters is not None  # it matches anything
        self._position = letters.end()
        if self._position == len(text) or ESCAPE_BEGUN.fullmatch(text, self._position):
            return True
        if text[self._position] != '"':
            return False
        self._position += 1
        self._in_string = False
        self._next = "colon" if self._next in ("key", "key or }") else "comma"
        return None

    def _read(self, text: str, letter: str) -> bool:
        """Go over the token that begins with ``letter``. False if it is not valid here, or too deep."""
        is_value = self._next in ("value", "value or ]")
        is_last = bool(self._brackets) and letter == self._brackets[-1]
        if letter == '"' and self._next not in ("colon", "comma"):
            self._in_string = True
        elif is_value and letter in "{[":
            self._brackets.append("}" if letter == "{" else "]")
            self._next = "key or }" if letter == "{" else "value or ]"
            if len(self._brackets) > DEEPEST:
                return False
        elif is_last and self._next in ("comma", f"key or {letter}", f"value or {letter}"):
            self._brackets.pop()
            self._next = "comma"
        elif self._next == "comma" and letter == ",":
            self._next = "key" if self._brackets[-1] == "}" else "value"
        elif self._next == "colon" and letter == ":":
            self._next = "value"
        elif is_value and (scalar := _SCALAR.match(text, self._position)):
            self._position, self._next = scalar.end(), "comma"
            return True
        else:
            return False
        self._position += 1
        return True
