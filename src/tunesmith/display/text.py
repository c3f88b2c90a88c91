"""Text of the data made safe to show, on a terminal and in a page: on one line, shortened, control characters
written out; and counts and shares in words."""

from __future__ import annotations

import re

EXCERPT = 160
"""Letters of a text that are shown."""
_UNSEEN = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff\ufffe\uffff]"
)


def escaped(text: str) -> str:
    """``text`` with control characters, lone surrogates and marks of direction written as ``\\x1b`` or
    ``\\u202e``."""
    return _UNSEEN.sub(
        lambda match: f"\\u{ord(match[0]):04x}" if match[0] > "\xff" else f"\\x{ord(match[0]):02x}", text
    )


def excerpt(text: str, limit: int = EXCERPT) -> str:
    """The first letters of ``text`` on one line."""
    line = " ".join(text[: 4 * limit].split())
    return line if len(line) <= limit else line[: limit - 1] + "…"


def visible(text: str, limit: int) -> str:
    """An `excerpt` of ``text``, `escaped`."""
    return escaped(excerpt(text, limit))


def many(count: int, noun: str) -> str:
    """``1 row``, ``1,200 rows``."""
    return f"{count:,} {noun}{'s' * (count != 1)}"


def percent(share: float) -> str:
    """To a tenth of a percent; "0%" and "100%" only if the share is exactly that."""
    if 0 < share < 0.001:
        return "< 0.1%"
    if 0.999 < share < 1:
        return "> 99.9%"
    return f"{share:.0%}" if share in (0, 1) else f"{share:.1%}"
