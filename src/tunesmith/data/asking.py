"""How a model is asked that learned from given rows: in a chat, by plain text to be continued, or by a text
under the marks of an instruction; and which tools it may call."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Literal, TypeAlias, get_args

from tunesmith.data import layout, nested, sources
from tunesmith.data.examples import BadRow, Completion, Conversation, Document, Example, Message, Preference
from tunesmith.data.layouts.alpaca import MARKS
from tunesmith.errors import DataError
from tunesmith.settings.config import JSON

AskedAs: TypeAlias = Literal["chat", "text", "instruct"]
KINDS: tuple[AskedAs, ...] = get_args(AskedAs)
HINT = "give a JSON list of tools, or rows that declare the same ones"
ROW_KEYS = {"tools", "functions", "messages", "conversations", "prompt"}
"""A row has one of them, and a tool has none."""


def asked_as(examples: Iterable[Example]) -> AskedAs:
    """As most of ``examples`` were asked; in doubt, and without any, in a chat."""
    counts = Counter(map(_kind, examples))
    return max(KINDS, key=lambda kind: counts[kind])


def _kind(example: Example) -> AskedAs:
    if isinstance(example, Completion) and example.prompt.endswith(MARKS["assistant"]):
        return "instruct"
    return "text" if isinstance(example, Document | Completion) else "chat"


def question(messages: Sequence[Message], kind: AskedAs, tools: tuple[JSON, ...] = ()) -> Conversation | str:
    """What is asked after ``messages``; ``tools``: those that a chat declares. As plain text only the last of
    the messages: such rows have no turns."""
    if kind == "chat":
        return Conversation(tuple(messages), tools)
    if kind == "text":
        return messages[-1].content
    return "".join(f"{MARKS[message.role]}{message.content}\n\n" for message in messages) + MARKS["assistant"]


def tools_of(example: Example) -> tuple[JSON, ...]:
    """The tools that an example declares."""
    if isinstance(example, Document | Completion):
        return ()
    return (example.chosen if isinstance(example, Preference) else example.conversation).tools


def common_tools(examples: Iterable[Example]) -> tuple[JSON, ...]:
    """The tools that ``examples`` declare, if all that declare any declare the same ones; else none."""
    lists = {json.dumps(tools): tools for tools in map(tools_of, examples) if tools}
    return next(iter(lists.values())) if len(lists) == 1 else ()


def read_tools(file: str | Path) -> tuple[JSON, ...]:
    """The tools in ``file``: a JSON list of tools, or rows of which all that declare tools declare the same
    ones. Raises DataError."""
    listed: list[JSON] = []
    of_rows: dict[str, tuple[JSON, ...]] = {}
    for raw in sources.raws(Path(file)):
        try:
            value = layout.typed(dict, nested.from_json(raw.text, "", "json"), "")
            if not value.keys() & ROW_KEYS:
                listed += layout.declared([value])
                continue
            tools = layout.declared(value.get("tools")) + layout.declared(value.get("functions"))
            of_rows |= {json.dumps(tools): tools} if tools else {}
        except BadRow as bad:
            raise DataError(bad.located, where=raw.source, hint=bad.hint or HINT) from None
    lists = [*of_rows.values(), *([tuple(listed)] if listed else [])]
    if len(lists) != 1:
        fault = f"holds {len(lists)} different lists of tools" if len(lists) > 1 else "declares no tools"
        raise DataError(fault, where=str(file), hint=HINT)
    return lists[0]
