"""What a layout of rows is, and all layouts that there are: one file in ``layouts``, one class that
registers.

A layout states the keys that its rows have, and what a row becomes. `RowReader` takes apart what layouts have
in common: texts, messages, calls, tools."""

from __future__ import annotations

import json
import pkgutil
from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import replace
from functools import cache, partial
from importlib import import_module
from typing import ClassVar, Protocol, TypeVar, cast

from tunesmith.data import calls, nested
from tunesmith.data.examples import (
    REASONING_BESIDE,
    BadRow,
    Call,
    Conversation,
    Demonstration,
    Example,
    Judged,
    Message,
    RowRemark,
    check,
)
from tunesmith.data.sources import show
from tunesmith.settings.config import JSON

FOLDER = "tunesmith.data.layouts"
MOST_MESSAGES = 20_000
"""Of one conversation: each has a token or more, and no model reads so long a row."""


EMPTY_SYSTEM = "empty system text left out"


class MakesExample(Protocol):
    """Makes an example once its place is known."""

    def __call__(self, *, source: str, metadata: dict[str, JSON]) -> Example: ...


class Layout(ABC):
    """One way of writing rows."""

    name: ClassVar[str]
    order: ClassVar[int]
    """The place in which it is tried if a row has the keys of several layouts."""
    keys: ClassVar[tuple[str, ...]]
    """Its rows have all of them, none of them null."""
    looks_like: ClassVar[str]
    becomes: ClassVar[str]
    """Columns of the table in docs/data.md."""
    example: ClassVar[str] = ""
    """Rows in JSON, one a line, for the reference."""
    alike: ClassVar[tuple[str, ...]] = ()
    """Other layouts whose rows are also read if this one is named."""
    labelled: ClassVar[bool] = True
    """Whether ``label`` is a verdict on the answer; if not, it is metadata."""
    label_words: ClassVar[bool] = True
    """Whether 0, 1 and words such as good are verdicts too; if not, they may be classes of the text. The
    words true and false are verdicts everywhere: a cell of a CSV file can hold nothing else."""

    @abstractmethod
    def read(self, row: RowReader) -> MakesExample:
        """Takes the row apart. Raises BadRow."""


_registered: dict[str, Layout] = {}
_Layout = TypeVar("_Layout", bound=Layout)


def register(kind: type[_Layout]) -> type[_Layout]:
    """Decorate the class of a layout: its rows can then be read."""
    _registered[kind.name] = kind()
    layouts.cache_clear()
    return kind


def unregister(name: str) -> None:
    _registered.pop(name, None)
    layouts.cache_clear()


@cache
def layouts() -> dict[str, Layout]:
    """All of them by name, in the order in which they are tried."""
    for module in pkgutil.iter_modules(import_module(FOLDER).__path__, f"{FOLDER}."):
        import_module(module.name)
    return {layout.name: layout for layout in sorted(_registered.values(), key=lambda layout: layout.order)}


def layout_of(row: dict[str, JSON], wanted: str) -> Layout:
    """The layout of ``row``: the one that is named, or the first whose keys it has. Raises BadRow."""
    known = layouts()
    tried = (
        [known[name] for name in (wanted, *known[wanted].alike)] if wanted in known else list(known.values())
    )
    for layout in tried:
        if has(row, *layout.keys):
            return layout
    hint = (
        "rename the keys"
        if wanted == "auto"
        else "data.format=auto detects the layout of each row by its keys"
    )
    keys = " or ".join("+".join(layout.keys) for layout in tried)
    raise BadRow("layout", "", f"the keys {keys}", ", ".join(map(show, list(row)[:12])) or "none", hint)


def table() -> str:
    """The layouts as docs/data.md shows them."""
    lines = ["| layout | keys | becomes |", "|---|---|---|"]
    shown = sorted(layouts().values(), key=lambda layout: (layout.name == "preference", layout.order))
    lines += [f"| `{layout.name}` | {layout.looks_like} | {layout.becomes} |" for layout in shown]
    return "\n".join(lines)


_GOOD = frozenset({"true", "1", "good", "desirable", "chosen", "accepted"})
_BAD = frozenset({"false", "0", "bad", "undesirable", "rejected"})
_MEANINGFUL = frozenset(
    "system system_prompt tools functions history instruction input output prompt completion messages "
    "conversations text chosen rejected question kto_tag weight train learn image images video videos audio "
    "audios documents chat_template_kwargs reasoning_content reasoning thinking".split()
)
"""Keys that some layout reads, or that other programs for training read."""
_REASONING_KEYS = ("reasoning_content", "reasoning", "thinking")
_MODES = frozenset(
    "on off true false yes no none enabled disabled auto minimal low medium high xhigh think no_think "
    "/think /no_think".split()
)
"""Words that say whether or how much a model reasons: no reasoning themselves."""
_Value = TypeVar("_Value", str, list[JSON], dict[str, JSON])


def typed(kind: type[_Value], value: JSON, place: str, reason: str = "type") -> _Value:
    if not isinstance(value, kind):
        raise BadRow(reason, place, {str: "text", list: "a list", dict: "an object"}[kind], show(value))
    return value


def _verdict(value: JSON, words: bool) -> bool | None:
    """The verdict that a number or word is, or None if it may be something else. ``words``: more than true
    and false are verdicts."""
    word = value.strip().lower() if isinstance(value, str) else str(value) if isinstance(value, int) else ""
    if not words and word not in ("true", "false"):
        return None
    return True if word in _GOOD else False if word in _BAD else None


def has(row: dict[str, JSON], *keys: str) -> bool:
    return all(row.get(key) is not None for key in keys)


def take(row: dict[str, JSON], *keys: str) -> JSON:
    return next((value for value in [row.pop(key, None) for key in keys] if value is not None), None)


class RowReader:
    """Takes known keys from ``row``; what is left is metadata.

    reasoning, instruct, structure_calls: as `DataSpec` says. ``label``: of the
    row."""

    def __init__(
        self, row: dict[str, JSON], *, reasoning: str, instruct: bool, structure_calls: bool = False
    ) -> None:
        self.row, self.reasoning, self.instruct = row, reasoning, instruct
        self.structure_calls = structure_calls
        self.label: bool | None = None
        self.extra: dict[str, JSON] = {}  # keys of messages
        self.remarks: list[RowRemark] = []

    def remark(self, text: str, *, doubt: bool = False) -> None:
        if (remark := RowRemark(text, doubt)) not in self.remarks:
            self.remarks.append(remark)

    def judge(self, layout: Layout) -> None:
        """Take the verdict on the answer from ``label`` or ``kto_tag``."""
        verdicts: dict[str, bool] = {}
        for key in ("label", "kto_tag"):
            if not has(self.row, key):
                continue
            value = self.row.pop(key)
            verdict = value if isinstance(value, bool) else _verdict(value, layout.label_words)
            if verdict is None:
                hint = "write true or false, or rename the key if it is not a verdict on the answer"
                raise BadRow("label", key, "true, false or nothing", show(value), hint)
            if key != "label" or not isinstance(value, bool):
                self.remark(f"{key} read as a verdict: {json.dumps(value)} is {json.dumps(verdict)}")
            verdicts[key] = verdict
        self.row.pop("label", None)
        if len(set(verdicts.values())) > 1:
            raise BadRow("label", "label", "the verdict of kto_tag", show(verdicts["label"]))
        self.label = next(iter(verdicts.values()), None)

    def tell_unread(self, layout: Layout) -> None:
        """RowRemark on keys that mean something elsewhere and are metadata here."""
        for key in sorted(_MEANINGFUL & self.row.keys()):
            if self.row[key] not in (None, "", [], {}):
                self.remark(f"{key} is not read beside {' and '.join(layout.keys)}: metadata", doubt=True)

    def unpack(self, *keys: str) -> None:
        """Replace messages that stand in the row as text by the messages. Raises BadRow if they cannot be
        read."""
        for key in keys:
            text = self.row.get(key)
            if isinstance(text, str) and (turns := nested.messages(text, key)) is not None:
                self.row[key] = turns
                self.remark(f"{key} held messages as text: read as messages")

    def whole(self, key: str) -> list[Message]:
        """The messages of a conversation. Raises BadRow for text that does not hold messages."""
        self.unpack(key)
        if isinstance(self.row[key], str):
            raise BadRow("type", key, "a list of messages", show(self.row[key]))
        return self.turns(key, "user")

    def metadata(self) -> dict[str, JSON]:
        extra: dict[str, JSON] = {"message_keys": self.extra} if self.extra else {}
        rest = self.row | extra
        only = rest.get("metadata")  # alone: as `write_examples` writes it
        return only if isinstance(only, dict) and len(rest) == 1 else rest

    def text(self, key: str) -> str:
        value = self.row.pop(key, None)
        return typed(str, "" if value is None else value, key)

    def words(self, key: str) -> str:
        value = self.text(key)
        if not value.strip():
            raise BadRow("empty", key, "words", show(value))
        return value

    def instruction(self, headed: bool) -> list[Message]:
        """History, then the instruction with its input after an empty line."""
        messages: list[Message] = []
        for pair in typed(list, self.row.pop("history", None) or [], "history"):
            question, answer = (
                typed(str, text, "history") for text in (*typed(list, pair, "history"), None, None)[:2]
            )
            messages += [Message("user", question), Message("assistant", answer)]
        question, answer = self.text("instruction"), self.text("input")
        between = "\n\n### Input:\n" if headed else "\n\n"
        return [
            *messages,
            Message("user", f"{question}{between}{answer}" if question and answer else question or answer),
        ]

    def turns(self, key: str, role: str) -> list[Message]:
        """A list of messages, one message, or a text that ``role`` says."""
        value = self.row.pop(key, None)
        if isinstance(value, str):
            return [Message(role, value)]
        turns = [value] if isinstance(value, dict) else typed(list, value, key)
        if not turns:
            raise BadRow("type", key, "messages", "none")
        if len(turns) > MOST_MESSAGES:
            raise BadRow("too_long", key, f"at most {MOST_MESSAGES:,} messages", f"{len(turns):,}")
        messages = [
            self.message(dict(typed(dict, turn, f"{key}[{number}]")), f"{key}[{number}]")
            for number, turn in enumerate(turns)
        ]
        spoken = [message for message in messages if message.role != "system" or message.content.strip()]
        if len(spoken) < len(messages):
            self.remark(EMPTY_SYSTEM)
        return spoken

    def message(self, turn: dict[str, JSON], place: str) -> Message:
        said, content = take(turn, "role", "from"), take(turn, "content", "value")
        role = nested.ROLES.get(said) if isinstance(said, str) else None
        if role is None:
            raise BadRow("role", place, "a role: " + ", ".join(nested.ROLES), show(said))
        calls: list[JSON] = []
        if said == "function_call":
            inside, content = nested.from_json(content, place, "call"), None
            calls += inside if isinstance(inside, list) else [inside]
        thoughts = [turn.pop(key) for key in _REASONING_KEYS if isinstance(turn.get(key), str)]
        content = self.content(content, place, calls, thoughts)
        calls += typed(list, turn.pop("tool_calls", None) or [], place, "call")
        calls += [turn.pop("function_call")] if has(turn, "function_call") else []
        if calls and role != "assistant":
            raise BadRow("call", place, "calls by the assistant only", f"a call by {said}")
        call_id, name = (
            typed(str, turn.pop(key), f"{place}.{key}") if has(turn, key) else None
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
                place,
                "learn, weight or train as true or false (1 or 0), true only for assistants",
                show(flags),
            )
        extra: dict[str, JSON] = {key: value for key, value in turn.items() if value is not None}
        self.extra |= {place: extra} if extra else {}
        return Message(role, content, tuple(_call(call, place) for call in calls), call_id, name, learn)

    def content(self, value: JSON, place: str, calls: list[JSON], thoughts: list[JSON]) -> str:
        """The text; calls among the parts are added to ``made``."""
        texts: list[str] = []
        for part in value if isinstance(value, list) else ["" if value is None else value]:
            kind, text = (
                (part.get("type"), part.get("text", part.get("value")))
                if isinstance(part, dict)
                else ("text", part)
            )
            if kind == "tool_call":
                calls.append(nested.from_json(text, place, "call"))
            elif kind in ("text", "reasoning") and isinstance(text, str):
                (texts if kind == "text" else thoughts).append(text)
            else:
                hint = "a JSON result is written as a string; pictures and sound cannot be learned"
                raise BadRow("content", place, "text, null or a list of text parts", show(part), hint)
        return self._marked("".join(map(str, thoughts)), place) + "".join(texts)

    def _marked(self, thought: str, place: str) -> str:
        """The reasoning as ``data.reasoning`` has it before the words of an answer. Raises BadRow if it
        refuses reasoning."""
        if thought and self.reasoning == "refuse":
            hint = "data.reasoning=auto learns it as the template writes it, omit leaves it out"
            raise BadRow("reasoning", place, "no reasoning apart from the answer", show(thought), hint)
        if not thought or self.reasoning == "omit":
            return ""
        if self.reasoning == "auto":
            self.remark(REASONING_BESIDE)
        return f"<think>\n{thought}\n</think>\n\n"

    def _with_reasoning(self, messages: list[Message]) -> list[Message]:
        """The messages, with the reasoning of a column of the row in the last answer. If it may be something
        else, it stays in the row: reasoning of one of several answers to one prompt, reasons for a verdict,
        a mode, or what the answer already has."""
        columns = [key for key in _REASONING_KEYS if self.row.get(key) not in (None, "")]
        if len(columns) != 1 or self.label is not None:
            return messages
        (key,) = columns
        thought, answer, before = self.row[key], messages[-1], messages[-2].role if messages[1:] else ""
        if (
            not isinstance(thought, str)
            or thought.strip().lower() in {"", *_MODES}
            or answer.role != "assistant"
            or before != "user"
            or "</think>" in answer.content
            or not (answer.content.strip() or answer.calls)
        ):
            return messages
        del self.row[key]
        return [*messages[:-1], replace(answer, content=self._marked(thought, key) + answer.content)]

    def conversation(self, messages: list[Message]) -> Conversation:
        system = self.text("system")
        if system.strip():
            messages = [Message("system", system), *messages]
        elif system:
            self.remark(EMPTY_SYSTEM)
        values = (self.row.pop("tools", None), self.row.pop("functions", None))
        tools = tuple(tool for value in values for tool in declared(value))
        if self.structure_calls and (read := list(calls.tagged(messages))) != messages:
            messages = read
            self.remark("calls in <tool_call> marks: read as calls")
        check(messages, set(names(tools)))
        return Conversation(tuple(messages), tools)

    def spoken(self, messages: list[Message]) -> MakesExample:
        """A conversation to imitate, or with a verdict on it."""
        conversation = self.conversation(self._with_reasoning(messages))
        if self.label is None:
            return partial(Demonstration, conversation)
        return partial(Judged, conversation, self.label)


def declared(value: JSON) -> tuple[JSON, ...]:
    """The tools that ``value`` lists, as JSON or as its text, in OpenAI's form. Raises BadRow."""
    tools: list[JSON] = []
    for tool in typed(list, nested.from_json(value or "[]", "tools", "tools"), "tools", "tools"):
        body = typed(dict, tool, "tools", "tools")
        tools.append(body if "function" in body else {"type": "function", "function": body})
        typed(str, typed(dict, body.get("function", body), "tools", "tools").get("name"), "tools", "tools")
    return tuple(tools)


def names(tools: Iterable[JSON]) -> list[str]:
    """The names of tools in OpenAI's form."""
    return [cast(dict[str, dict[str, str]], tool)["function"]["name"] for tool in tools]


def _call(item: JSON, place: str) -> Call:
    outer = typed(dict, item, f"{place}, a call", "call")
    body = typed(dict, outer.get("function", outer), f"{place}, a call", "call")
    name, call_id, given = body.get("name"), outer.get("id"), body.get("arguments")
    if not isinstance(name, str) or not name or not isinstance(call_id, str | None):
        raise BadRow("call", place, "a call with a name, and an id that is text", show(item))
    if isinstance(given, str) and not given.strip():
        hint = "write {} if there are none"
        raise BadRow("arguments", f"{place}, arguments of {name}", "an object", show(given), hint)
    arguments = nested.from_json(given, f"{place}, arguments of {name}", "arguments")
    if not isinstance(arguments, dict):
        raise BadRow(
            "arguments",
            f"{place}, arguments of {name}",
            "an object",
            show(given),
            "write {} if there are none",
        )
    return Call(name, arguments, call_id or None, given if isinstance(given, str) else None)
