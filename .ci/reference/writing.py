"""Markdown that reads the same on GitHub and on the site."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterable, Sequence


def cell(text: str) -> str:
    """``text`` in a cell of a table: one line, and no column of its own."""
    return " ".join(text.split()).replace("|", "\\|")


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(map(cell, line))} |" for line in lines).replace("| --- ", "|---") + "\n"


def code(text: str) -> str:
    """``text`` as code; nothing if there is none."""
    if not text:
        return ""
    mark = "``" if "`" in text else "`"
    return f"{mark}{text}{mark}"


def console(lines: Iterable[str]) -> str:
    return "\n".join(["```", *lines, "```"]) + "\n"


def prose(text: str | None) -> str:
    """A docstring as Markdown: its marks of code, and signs that HTML or tables would read."""
    plain = re.sub(r"``(.+?)``", r"`\1`", inspect.cleandoc(text or ""), flags=re.S)
    parts = re.split(r"(`[^`]+`)", plain)
    return "".join(
        part if part[:1] == "`" else part.replace("<", "&lt;").replace("*", "\\*") for part in parts
    )


def first_sentence(text: str | None) -> str:
    """The first paragraph on one line."""
    return " ".join(prose(text).partition("\n\n")[0].split())
