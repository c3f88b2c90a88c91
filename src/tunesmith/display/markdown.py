"""Tables and code blocks of Markdown that no text of the data can break out of."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Any

from tunesmith.display.text import escaped


def fence(text: str, language: str = "text") -> list[str]:
    """A code block that ``text`` cannot end: its fence is longer than any run of backticks inside."""
    clean = "".join(
        letter if letter.isprintable() or letter in "\n\t" else f"\\x{ord(letter):02x}"
        for letter in text.replace("\r\n", "\n")
    )
    ticks = "`" * (max([2, *(len(run) for run in re.findall("`+", clean))]) + 1)
    return [ticks + language, *clean.split("\n"), ticks]


def cell(value: Any) -> str:
    """``value`` in a table: on one line, with what Markdown or HTML would act on escaped."""
    if value is None:
        return "–"
    if isinstance(value, int | float) and not isinstance(value, bool):
        return f"{value:.5g}" if isinstance(value, float) else f"{value:,}"
    line = escaped(" ".join(str(value).split()))
    line = line.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return re.sub(r"([\\`*\[\]|~]|(?<!\w)_|_(?!\w))", r"\\\1", line)


def table(head: Sequence[str], rows: Iterable[Sequence[Any]]) -> list[str]:
    lines = [head, ["---"] * len(head), *([cell(value) for value in row] for row in rows)]
    return ["| " + " | ".join(line) + " |" for line in lines]


def verdict(lines: Sequence[str]) -> list[str]:
    """The verdict, which is the first line, then its reasons as a list."""
    line, *reasons = lines
    return [f"**{cell(line)}**", *([""] if reasons else []), *(f"- {cell(reason)}" for reason in reasons)]
