"""How files become examples.

Read: JSON lines, a JSON array, gzip of either, folders of them. Layouts are told apart by their keys. Words
are never changed, trimmed or invented. A row that cannot be used becomes a `Dropped` with its file:line,
never an exception; only a file that cannot be read as a whole raises."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Annotated, Literal, NamedTuple, TypeVar

from pydantic import Field, field_validator

from tunesmith.data import sources
from tunesmith.data.calls import structure
from tunesmith.data.examples import BadRow, check, opening, prompt_key, split, write_examples, write_lines
from tunesmith.data.sources import show
from tunesmith.errors import DataError, listing
from tunesmith.settings.config import JSON, Spec

# isort: split
from tunesmith.data.examples import (
    Call,
    Completion,
    Conversation,
    Demonstration,
    Document,
    Example,
    Judged,
    Message,
    Preference,
)

__all__ = [
    "JSON",
    "Call",
    "Completion",
    "Conversation",
    "DataSpec",
    "Demonstration",
    "Document",
    "Dropped",
    "Example",
    "Judged",
    "Message",
    "Preference",
    "Read",
    "prompt_key",
    "read",
    "require",
    "split",
    "write_dropped",
    "write_examples",
]


class DataSpec(Spec):
    """Where the rows are and how they are read."""

    train: tuple[str, ...] = Field(
        min_length=1, description="files or folders: JSONL, a JSON array, gzip of either"
    )
    valid: Annotated[float, Field(ge=0, lt=1)] | tuple[str, ...] = Field(
        0.2, description="share held out (0: none), or files"
    )
    format: Literal["auto", "messages", "sharegpt", "alpaca", "completion", "text", "preference"] = Field(
        default="auto", description="layout of the rows; auto tells by their keys"
    )
    max_dropped: float = Field(
        default=0.05, ge=0, le=1, description="largest share of unusable rows before it stops"
    )
    instruction_layout: Literal["chat", "instruct"] = Field(
        default="chat",
        description="alpaca rows as a conversation, or as ### Instruction: text for base models",
    )
    reasoning: Literal["refuse", "think", "omit"] = Field(
        default="refuse",
        description="thoughts kept apart from the answer: refuse, put before it in <think>, or omit",
    )
    structure_calls: bool = Field(
        default=False,
        description="calls and results written as text become turns, so that results are read and never "
        "learned",
    )

    @field_validator("train", "valid", mode="before")
    @classmethod
    def _one_path(cls, value: object) -> object:
        return (value,) if isinstance(value, str) else value


class Dropped(NamedTuple):
    """A row left out. ``reason``: a code to count by. ``message``: expected, found, hint. ``raw``: the row as
    written."""

    source: str
    reason: str
    message: str
    raw: str


class Read(NamedTuple):
    """``rows`` = examples + dropped. ``files``: path → sha256 of its bytes."""

    examples: list[Example]
    dropped: list[Dropped]
    rows: int
    files: dict[str, str]


def read(paths: Sequence[str | Path], spec: DataSpec) -> Read:
    """All rows of ``paths`` in order; files of a folder by name, hidden ones and other endings left out.

    Raises DataError where a file is missing, given twice, or cannot be read as a whole.
    """
    examples: list[Example] = []
    dropped: list[Dropped] = []
    for made in rows(paths, spec):
        if isinstance(made, Dropped):
            dropped.append(made)
        else:
            examples.append(made)
    files = {str(path): sources.sha256(path) for path in sources.files(paths)}
    return Read(examples, dropped, len(examples) + len(dropped), files)


def rows(paths: Sequence[str | Path], spec: DataSpec) -> Iterator[Example | Dropped]:
    """The rows of `read`, one at a time: no more than one is in memory, but for those of an array."""
    for path in sources.files(paths):
        for raw in sources.raws(path):
            yield row(raw, spec)


def row(raw: sources.Raw, spec: DataSpec) -> Example | Dropped:
    """What one row becomes; never raises."""
    try:
        value = sources.value(raw.text)
        if isinstance(value, BadRow):
            raise value
        return _example(value, raw.source, spec)
    except BadRow as bad:
        return Dropped(raw.source, bad.reason, str(bad), raw.text)
    except RecursionError:
        return Dropped(raw.source, "json", "expected a row, found values nested too deeply", raw.text)


def _nested(value: JSON, at: str, reason: str) -> JSON:
    """``value``, or where it is text, the JSON inside."""
    inside = sources.value(value) if isinstance(value, str) else value
    if isinstance(inside, BadRow):
        raise BadRow(reason, at, "a string that holds JSON", f"{show(value)} ({inside})")
    return inside


_LAYOUTS: dict[str, tuple[str, ...]] = {
    "preference": ("chosen", "rejected"),
    "messages": ("messages",),
    "sharegpt": ("conversations",),
    "alpaca": ("instruction", "output"),
    "completion": ("prompt", "completion"),
    "text": ("text",),
}
_ROLES = {
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
_MARKS = {"system": "", "user": "### Instruction:\n", "assistant": "### Response:\n"}
_T = TypeVar("_T", str, list[JSON], dict[str, JSON])


def _is(kind: type[_T], value: JSON, at: str, reason: str = "type") -> _T:
    if not isinstance(value, kind):
        raise BadRow(reason, at, {str: "text", list: "a list", dict: "an object"}[kind], show(value))
    return value


def _has(row: dict[str, JSON], *keys: str) -> bool:
    return all(row.get(key) is not None for key in keys)


def _take(row: dict[str, JSON], *keys: str) -> JSON:
    return next((value for value in [row.pop(key, None) for key in keys] if value is not None), None)


def _example(value: JSON, source: str, spec: DataSpec) -> Example:
    row = dict(_is(dict, value, ""))
    layout = _layout(row, spec.format)
    label = row.get("label")
    if label is not None and not isinstance(label, bool):
        hint = "write true or false, or rename the key if it is no verdict on the answer"
        raise BadRow("label", "label", "true, false or nothing", show(label), hint)
    if layout != "preference":
        row.pop("label", None)
    make = _Maker(row, spec)
    instruct = layout == "alpaca" and spec.instruction_layout == "instruct"
    if layout == "preference":
        made = partial(Preference, *make.preference())
    elif layout == "text":
        made = partial(Document, make.words("text"), label)
    elif layout == "completion" and isinstance(row["prompt"], str) and isinstance(row["completion"], str):
        made = partial(Completion, make.text("prompt"), make.words("completion"), label)
    else:
        if layout == "alpaca":
            messages = [*make.instruction(instruct), Message("assistant", make.text("output"))]
        elif layout == "completion":
            messages = make.turns("prompt", "user") + make.turns("completion", "assistant")
        else:
            messages = make.turns(_LAYOUTS[layout][0], "user")
        conversation = make.conversation(messages)
        if instruct:
            *asked, answer = conversation.messages
            prompt = (
                "".join(f"{_MARKS[message.role]}{message.content}\n\n" for message in asked)
                + _MARKS["assistant"]
            )
            made = partial(Completion, prompt, answer.content, label)
        else:
            made = (
                partial(Demonstration, conversation)
                if label is None
                else partial(Judged, conversation, label)
            )
    example = made(source=source, metadata=make.metadata())
    turned, note = structure(example) if spec.structure_calls else (example, "")
    return replace(turned, metadata=turned.metadata | {"text_calls": note}) if note else example


def _layout(row: dict[str, JSON], wanted: str) -> str:
    named = [wanted] if wanted in _LAYOUTS else list(_LAYOUTS)
    if wanted in ("messages", "sharegpt"):  # either name stands for a list of turns under either key
        named.append("messages" if wanted == "sharegpt" else "sharegpt")
    for layout in named:
        if _has(row, *_LAYOUTS[layout]):
            return layout
    hint = (
        "rename the keys" if wanted == "auto" else "data.format=auto tells the layout of each row by its keys"
    )
    keys = " or ".join("+".join(_LAYOUTS[layout]) for layout in named)
    raise BadRow("layout", "", f"the keys {keys}", ", ".join(map(show, list(row)[:12])) or "none", hint)


class _Maker:
    """Takes from ``row`` what has a meaning; what is left is metadata."""

    def __init__(self, row: dict[str, JSON], spec: DataSpec) -> None:
        self.row, self.spec = row, spec
        self.extra: dict[str, JSON] = {}  # keys of messages

    def metadata(self) -> dict[str, JSON]:
        extra: dict[str, JSON] = {"message_keys": self.extra} if self.extra else {}
        rest = self.row | extra
        only = rest.get("metadata")  # alone: as `write_examples` writes it
        return only if isinstance(only, dict) and len(rest) == 1 else rest

    def text(self, key: str) -> str:
        value = self.row.pop(key, None)
        return _is(str, "" if value is None else value, key)

    def words(self, key: str) -> str:
        value = self.text(key)
        if not value.strip():
            raise BadRow("empty", key, "words", show(value))
        return value

    def instruction(self, headed: bool) -> list[Message]:
        """History, then the instruction with its input after an empty line."""
        messages: list[Message] = []
        for pair in _is(list, self.row.pop("history", None) or [], "history"):
            asked, given = (
                _is(str, text, "history") for text in (*_is(list, pair, "history"), None, None)[:2]
            )
            messages += [Message("user", asked), Message("assistant", given)]
        asked, given = self.text("instruction"), self.text("input")
        between = "\n\n### Input:\n" if headed else "\n\n"
        return [*messages, Message("user", f"{asked}{between}{given}" if asked and given else asked or given)]

    def preference(self) -> tuple[Conversation, Conversation]:
        key = next((key for key in ("prompt", "conversations", "messages") if _has(self.row, key)), None)
        context = (
            self.turns(key, "user")
            if key
            else self.instruction(False)
            if _has(self.row, "instruction")
            else []
        )
        asked = [message for message in context if message.role != "system"]
        row, sides = dict(self.row), []
        for key in ("chosen", "rejected"):
            messages = self.turns(key, "assistant")
            if messages[0].role == "assistant":
                if not context:
                    raise BadRow(
                        "prompt",
                        key,
                        "prompt, messages, conversations or instruction beside it",
                        "none of them",
                    )
                messages = context + messages
            elif [m for m in messages if m.role != "system"][: len(asked)] != asked:
                raise BadRow(
                    "prompt", key, "a conversation that begins with the prompt", show(messages[0].content)
                )
            self.row |= {
                key: row[key] for key in ("system", "tools", "functions") if key in row
            }  # for both sides
            sides.append(self.conversation(messages))
        if opening(sides[0]) != opening(sides[1]) or sides[0] == sides[1]:
            raise BadRow(
                "prompt", "", "two different answers to one prompt", "two prompts, or the same answer twice"
            )
        return sides[0], sides[1]

    def turns(self, key: str, role: str) -> list[Message]:
        """A list of messages, one message, or a text that ``role`` says."""
        value = self.row.pop(key, None)
        if isinstance(value, str):
            return [Message(role, value)]
        turns = [value] if isinstance(value, dict) else _is(list, value, key)
        if not turns:
            raise BadRow("type", key, "messages", "none")
        return [
            self.message(dict(_is(dict, turn, f"{key}[{at}]")), f"{key}[{at}]")
            for at, turn in enumerate(turns)
        ]

    def message(self, turn: dict[str, JSON], at: str) -> Message:
        said, content = _take(turn, "role", "from"), _take(turn, "content", "value")
        role = _ROLES.get(said) if isinstance(said, str) else None
        if role is None:
            raise BadRow("role", at, "a role: " + ", ".join(_ROLES), show(said))
        made: list[JSON] = []
        if said == "function_call":
            inside, content = _nested(content, at, "call"), None
            made += inside if isinstance(inside, list) else [inside]
        thoughts = [
            turn.pop(key)
            for key in ("reasoning_content", "reasoning", "thinking")
            if isinstance(turn.get(key), str)
        ]
        content = self.content(content, at, made, thoughts)
        made += _is(list, turn.pop("tool_calls", None) or [], at, "call")
        made += [turn.pop("function_call")] if _has(turn, "function_call") else []
        if made and role != "assistant":
            raise BadRow("call", at, "calls by the assistant only", f"a call by {said}")
        call_id, name = (
            _is(str, turn.pop(key), f"{at}.{key}") if _has(turn, key) else None
            for key in ("tool_call_id", "name")
        )
        flags = {
            key: value for key in ("learn", "weight", "train") if (value := turn.pop(key, None)) is not None
        }
        learn = None if not flags else all(flags.values())
        if any(value not in (0, 1) or value != learn for value in flags.values()) or (
            learn and role != "assistant"
        ):
            raise BadRow(
                "learn",
                at,
                "learn, weight or train as true or false (1 or 0), true only for assistants",
                show(flags),
            )
        extra: dict[str, JSON] = {key: value for key, value in turn.items() if value is not None}
        self.extra |= {at: extra} if extra else {}
        return Message(role, content, tuple(_call(call, at) for call in made), call_id, name, learn)

    def content(self, value: JSON, at: str, made: list[JSON], thoughts: list[JSON]) -> str:
        """The text; calls among the parts are added to ``made``."""
        texts: list[str] = []
        for part in value if isinstance(value, list) else ["" if value is None else value]:
            kind, text = (
                (part.get("type"), part.get("text", part.get("value")))
                if isinstance(part, dict)
                else ("text", part)
            )
            if kind == "tool_call":
                made.append(_nested(text, at, "call"))
            elif kind in ("text", "reasoning") and isinstance(text, str):
                (texts if kind == "text" else thoughts).append(text)
            else:
                hint = "a JSON result is written as a string; pictures and sound cannot be learned"
                raise BadRow("content", at, "text, null or a list of text parts", show(part), hint)
        thought = "".join(map(str, thoughts))
        if thought and self.spec.reasoning == "refuse":
            hint = "data.reasoning=think puts it before the answer in <think> marks, omit leaves it out"
            raise BadRow("reasoning", at, "no reasoning apart from the answer", show(thought), hint)
        if thought and self.spec.reasoning == "think":
            texts.insert(0, f"<think>\n{thought}\n</think>\n\n")
        return "".join(texts)

    def conversation(self, messages: list[Message]) -> Conversation:
        if system := self.text("system"):
            messages = [Message("system", system), *messages]
        tools: list[JSON] = []
        declared: set[str] = set()
        for value in (self.row.pop("tools", None), self.row.pop("functions", None)):
            for tool in _is(list, _nested(value or "[]", "tools", "tools"), "tools", "tools"):
                body = _is(dict, tool, "tools", "tools")
                tools.append(body if "function" in body else {"type": "function", "function": body})
                declared.add(
                    _is(
                        str,
                        _is(dict, body.get("function", body), "tools", "tools").get("name"),
                        "tools",
                        "tools",
                    )
                )
        check(messages, declared)
        return Conversation(tuple(messages), tuple(tools))


def _call(item: JSON, at: str) -> Call:
    outer = _is(dict, item, f"{at}, a call", "call")
    body = _is(dict, outer.get("function", outer), f"{at}, a call", "call")
    name, made, given = body.get("name"), outer.get("id"), body.get("arguments")
    if not isinstance(name, str) or not name or not isinstance(made, str | None):
        raise BadRow("call", at, "a call with a name, and an id that is text", show(item))
    arguments = _nested(given, f"{at}, arguments of {name}", "arguments")
    if not isinstance(arguments, dict):
        raise BadRow(
            "arguments",
            f"{at}, arguments of {name}",
            "an object",
            show(given),
            "write {} where there are none",
        )
    return Call(name, arguments, made or None, given if isinstance(given, str) else None)


def require(read: Read, max_dropped: float) -> None:
    """Raises DataError where more than ``max_dropped`` (a share) of the rows are bad, or none is left."""
    share = len(read.dropped) / max(read.rows, 1)
    if read.examples and share <= max_dropped:
        return
    files = ", ".join(read.files)
    if not read.dropped:
        raise DataError("no rows", where=files, hint="data.train names files of rows")
    reasons = ", ".join(
        f"{reason} {count}" for reason, count in Counter(row.reason for row in read.dropped).most_common()
    )
    shown = listing([f"{row.source}: {row.message}" for row in read.dropped])
    raise DataError(
        f"{len(read.dropped)} of {read.rows} rows cannot be used, {share:.1%} ({reasons}):\n{shown}",
        where=files or None,
        hint=f"mend these rows, or allow more than {max_dropped:.1%} with data.max_dropped",
    )


def write_dropped(dropped: Iterable[Dropped], path: Path) -> None:
    """JSONL, one object a row: source, reason, message, raw. Plain ASCII, for ``raw`` may be no valid
    text."""
    write_lines([json.dumps(row._asdict()) for row in dropped], path)
