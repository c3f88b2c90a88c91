"""How files become examples.

Read: JSON lines, a JSON array, gzip of either, folders of them. Layouts are told apart by their keys. Words are never
changed, trimmed or invented. A row that cannot be used becomes a `Dropped` with its file:line, never an exception; only a
file that cannot be read as a whole raises.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from math import inf
from pathlib import Path
from typing import Annotated, Literal, NamedTuple, TypeVar

from pydantic import Field, field_validator

from tunesmith.config import JSON, Spec
from tunesmith.errors import DataError, listing
from tunesmith.examples import BadRow, check, opening, prompt_key, split, write_examples, write_lines

# isort: split
from tunesmith.examples import Call, Completion, Conversation, Demonstration, Document, Example, Judged, Message, Preference

__all__ = [
    "JSON", "Call", "Completion", "Conversation", "DataSpec", "Demonstration", "Document", "Dropped", "Example", "Judged",
    "Message", "Preference", "Read", "prompt_key", "read", "require", "split", "write_dropped", "write_examples",
]  # fmt: skip


class DataSpec(Spec):
    """Where the rows are and how they are read."""

    train: tuple[str, ...] = Field(min_length=1, description="files or folders: JSONL, a JSON array, gzip of either")
    valid: Annotated[float, Field(ge=0, lt=1)] | tuple[str, ...] = Field(0.2, description="share held out (0: none), or files")
    format: Literal["auto", "messages", "sharegpt", "alpaca", "completion", "text", "preference"] = Field(
        default="auto", description="layout of the rows; auto tells by their keys"
    )
    max_dropped: float = Field(default=0.05, ge=0, le=1, description="largest share of unusable rows before it stops")
    instruction_layout: Literal["chat", "instruct"] = Field(
        default="chat", description="alpaca rows as a conversation, or as ### Instruction: text for base models"
    )
    reasoning: Literal["refuse", "think", "omit"] = Field(
        default="refuse", description="thoughts kept apart from the answer: refuse, put before it in <think>, or omit"
    )

    @field_validator("train", "valid", mode="before")
    @classmethod
    def _one_path(cls, value: object) -> object:
        return (value,) if isinstance(value, str) else value


class Dropped(NamedTuple):
    """A row left out. ``reason``: a code to count by. ``message``: expected, found, hint. ``raw``: the row as written."""

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


_SUFFIXES = (".jsonl", ".ndjson", ".json", ".jsonl.gz", ".ndjson.gz", ".json.gz")


def read(paths: Sequence[str | Path], spec: DataSpec) -> Read:
    """All rows of ``paths`` in order; files of a folder by name, hidden ones and other endings left out.

    Raises DataError where a file is missing, given twice, or cannot be read as a whole.
    """
    examples: list[Example] = []
    dropped: list[Dropped] = []
    files: dict[str, str] = {}
    for path in _files(paths):
        try:
            data = path.read_bytes()
        except OSError as error:
            raise DataError(f"cannot be read: {error.strerror}", where=str(path)) from error
        files[str(path)] = hashlib.sha256(data).hexdigest()
        for line, raw, value in _rows(_decoded(data, path), path):
            source = f"{path}:{line}"
            try:
                if isinstance(value, BadRow):
                    raise value
                examples.append(_example(value, source, spec))
            except BadRow as bad:
                dropped.append(Dropped(source, bad.reason, str(bad), raw))
            except RecursionError:
                dropped.append(Dropped(source, "json", "expected a row, found values nested too deeply", raw))
    return Read(examples, dropped, len(examples) + len(dropped), files)


def _files(paths: Sequence[str | Path]) -> list[Path]:
    found: dict[Path, Path] = {}
    for given in paths:
        path = Path(given).expanduser()
        if not path.exists():
            raise DataError("no such file or folder", where=str(given), hint=f"looked from {Path.cwd()}")
        inside = [path]
        if path.is_dir():
            inside = [file for file in sorted(path.rglob("*")) if file.name.lower().endswith(_SUFFIXES) and file.is_file()]
            inside = [file for file in inside if not any(part[0] == "." for part in file.relative_to(path).parts)]
        if not inside:
            raise DataError("the folder has no data", where=str(given), hint="names must end in " + ", ".join(_SUFFIXES))
        for file in inside:
            if found.setdefault(file.resolve(), file) is not file:
                raise DataError("is given twice", where=str(file), hint="name a file once, alone or by its folder")
    return list(found.values())


def _decoded(data: bytes, path: Path) -> str:
    """Text; bytes that are not UTF-8 become lone surrogates, so that only their rows are lost."""
    if data[:2] == b"\x1f\x8b":
        try:
            data = gzip.decompress(data)
        except (OSError, EOFError, zlib.error) as error:
            raise DataError(f"the gzip file is damaged: {error}", where=str(path), hint="copy or compress it again") from error
    if data[:2] in (b"\xff\xfe", b"\xfe\xff"):
        raise DataError("is UTF-16", where=str(path), hint="save it as UTF-8")
    return data.removeprefix(b"\xef\xbb\xbf").decode("utf-8", "surrogateescape")


def _rows(text: str, path: Path) -> Iterator[tuple[int, str, JSON | BadRow]]:
    """(line where it starts, as written, its value or what is wrong with it) of each row."""
    decoder, at = _Decoder(), _skip(text, 0)
    if text[at : at + 1] != "[":
        for line, raw in enumerate(text.split("\n"), 1):  # U+2028 and its kin do not end a line
            if raw.strip():
                yield line, raw.removesuffix("\r"), decoder.whole(raw)
        return

    line, counted, at = 1, 0, _skip(text, at + 1)
    try:
        while text[at : at + 1] != "]":
            line, counted = line + text.count("\n", counted, at), at
            value, end = decoder.value(text, at)
            yield line, text[at:end], value
            at = _skip(text, end)
            comma = text[at : at + 1] == ","
            at = _skip(text, at + 1) if comma else at
            if comma == (text[at : at + 1] == "]"):
                raise json.JSONDecodeError("expected a comma and a row, or ]", text, at)
        if (at := _skip(text, at + 1)) < len(text):
            raise json.JSONDecodeError("more text after ]", text, at)
    except json.JSONDecodeError as error:
        hint = "mend it, or write one row a line (JSONL)"
        raise DataError(f"the JSON array breaks off: {error.msg}", where=f"{path}:{error.lineno}", hint=hint) from None


def _skip(text: str, at: int) -> int:
    while at < len(text) and text[at] in " \t\r\n":
        at += 1
    return at


class _Decoder(json.JSONDecoder):
    """JSON to the letter of its standard: what Python's reader would lose or invent makes the row a bad one."""

    def __init__(self) -> None:
        number = self._number
        super().__init__(object_pairs_hook=self._object, parse_constant=number, parse_float=number, parse_int=number)
        self.problems: list[str] = []

    def _number(self, text: str) -> int | float:
        try:
            value = int(text) if text.lstrip("-").isdigit() else float(text)
        except ValueError:  # more digits than Python converts
            value = inf
        if abs(value) == inf or value != value:
            self.problems.append(f"{text[:40]}, a number that cannot be kept")
        return value

    def _object(self, pairs: list[tuple[str, JSON]]) -> dict[str, JSON]:
        result = dict(pairs)
        if len(result) < len(pairs):
            key, _ = Counter(key for key, _ in pairs).most_common(1)[0]
            self.problems.append(f"the key {_show(key)} twice in one object")
        return result

    def value(self, text: str, at: int) -> tuple[JSON | BadRow, int]:
        """The value that starts at ``at``, or what is wrong with it, and where it ends. Raises JSONDecodeError."""
        self.problems.clear()
        try:
            value, end = self.raw_decode(text, at)
            try:  # half a surrogate pair, which no encoding can write
                if not (raw := text[at:end]).isascii() or "\\u" in raw:
                    (raw + json.dumps(value, ensure_ascii=False)).encode()
            except UnicodeEncodeError as error:
                found = _show(error.object[max(0, error.start - 20) : error.start + 1])
                hint = "save the file as UTF-8; a character above U+FFFF takes two \\u escapes"
                value = BadRow("encoding", "", "text that UTF-8 can write", found, hint)
        except RecursionError:
            raise json.JSONDecodeError("values nested too deeply", text, at) from None
        return BadRow("json", "", "plain JSON", self.problems[0]) if self.problems else value, end

    def whole(self, text: str) -> JSON | BadRow:
        try:
            value, end = self.value(text, _skip(text, 0))
            if (end := _skip(text, end)) < len(text):
                raise json.JSONDecodeError("more text after the value", text, end)
            return value
        except json.JSONDecodeError as error:
            found = f"{error.msg} at column {error.pos + 1}: {_show(text[max(0, error.pos - 20) : error.pos + 20])}"
            return BadRow("json", "", "one whole JSON object a line", found, "rows over many lines need a JSON array")


def _nested(value: JSON, at: str, reason: str) -> JSON:
    """``value``, or where it is text, the JSON inside."""
    inside = _Decoder().whole(value) if isinstance(value, str) else value
    if isinstance(inside, BadRow):
        raise BadRow(reason, at, "a string that holds JSON", f"{_show(value)} ({inside})")
    return inside


def _show(value: object) -> str:
    text = json.dumps(value)
    return text if len(text) <= 80 else f"{text[:77]}…"


_LAYOUTS: dict[str, tuple[str, ...]] = {
    "preference": ("chosen", "rejected"), "messages": ("messages",), "sharegpt": ("conversations",),
    "alpaca": ("instruction", "output"), "completion": ("prompt", "completion"), "text": ("text",),
}  # fmt: skip
_ROLES = {
    "system": "system", "developer": "system", "user": "user", "human": "user", "assistant": "assistant",
    "gpt": "assistant", "model": "assistant", "function_call": "assistant", "tool": "tool", "observation": "tool",
    "function": "tool",
}  # fmt: skip
_MARKS = {"system": "", "user": "### Instruction:\n", "assistant": "### Response:\n"}
_T = TypeVar("_T", str, list[JSON], dict[str, JSON])


def _is(kind: type[_T], value: JSON, at: str, reason: str = "type") -> _T:
    if not isinstance(value, kind):
        raise BadRow(reason, at, {str: "text", list: "a list", dict: "an object"}[kind], _show(value))
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
        raise BadRow("label", "label", "true, false or nothing", _show(label), hint)
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
            prompt = "".join(f"{_MARKS[message.role]}{message.content}\n\n" for message in asked) + _MARKS["assistant"]
            made = partial(Completion, prompt, answer.content, label)
        else:
            made = partial(Demonstration, conversation) if label is None else partial(Judged, conversation, label)
    return made(source=source, metadata=make.metadata())


def _layout(row: dict[str, JSON], wanted: str) -> str:
    named = [wanted] if wanted in _LAYOUTS else list(_LAYOUTS)
    if wanted in ("messages", "sharegpt"):  # either name stands for a list of turns under either key
        named.append("messages" if wanted == "sharegpt" else "sharegpt")
    for layout in named:
        if _has(row, *_LAYOUTS[layout]):
            return layout
    hint = "rename the keys" if wanted == "auto" else "data.format=auto tells the layout of each row by its keys"
    keys = " or ".join("+".join(_LAYOUTS[layout]) for layout in named)
    raise BadRow("layout", "", f"the keys {keys}", ", ".join(map(_show, list(row)[:12])) or "none", hint)


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
            raise BadRow("empty", key, "words", _show(value))
        return value

    def instruction(self, headed: bool) -> list[Message]:
        """History, then the instruction with its input after an empty line."""
        messages: list[Message] = []
        for pair in _is(list, self.row.pop("history", None) or [], "history"):
            asked, given = (_is(str, text, "history") for text in (*_is(list, pair, "history"), None, None)[:2])
            messages += [Message("user", asked), Message("assistant", given)]
        asked, given = self.text("instruction"), self.text("input")
        between = "\n\n### Input:\n" if headed else "\n\n"
        return [*messages, Message("user", f"{asked}{between}{given}" if asked and given else asked or given)]

    def preference(self) -> tuple[Conversation, Conversation]:
        key = next((key for key in ("prompt", "conversations", "messages") if _has(self.row, key)), None)
        context = self.turns(key, "user") if key else self.instruction(False) if _has(self.row, "instruction") else []
        asked = [message for message in context if message.role != "system"]
        row, sides = dict(self.row), []
        for key in ("chosen", "rejected"):
            messages = self.turns(key, "assistant")
            if messages[0].role == "assistant":
                if not context:
                    raise BadRow("prompt", key, "prompt, messages, conversations or instruction beside it", "none of them")
                messages = context + messages
            elif [m for m in messages if m.role != "system"][: len(asked)] != asked:
                raise BadRow("prompt", key, "a conversation that begins with the prompt", _show(messages[0].content))
            self.row |= {key: row[key] for key in ("system", "tools", "functions") if key in row}  # for both sides
            sides.append(self.conversation(messages))
        if opening(sides[0]) != opening(sides[1]) or sides[0] == sides[1]:
            raise BadRow("prompt", "", "two different answers to one prompt", "two prompts, or the same answer twice")
        return sides[0], sides[1]

    def turns(self, key: str, role: str) -> list[Message]:
        """A list of messages, one message, or a text that ``role`` says."""
        value = self.row.pop(key, None)
        if isinstance(value, str):
            return [Message(role, value)]
        turns = [value] if isinstance(value, dict) else _is(list, value, key)
        if not turns:
            raise BadRow("type", key, "messages", "none")
        return [self.message(dict(_is(dict, turn, f"{key}[{at}]")), f"{key}[{at}]") for at, turn in enumerate(turns)]

    def message(self, turn: dict[str, JSON], at: str) -> Message:
        said, content = _take(turn, "role", "from"), _take(turn, "content", "value")
        role = _ROLES.get(said) if isinstance(said, str) else None
        if role is None:
            raise BadRow("role", at, "a role: " + ", ".join(_ROLES), _show(said))
        made: list[JSON] = []
        if said == "function_call":
            inside, content = _nested(content, at, "call"), None
            made += inside if isinstance(inside, list) else [inside]
        thoughts = [turn.pop(key) for key in ("reasoning_content", "reasoning", "thinking") if isinstance(turn.get(key), str)]
        content = self.content(content, at, made, thoughts)
        made += _is(list, turn.pop("tool_calls", None) or [], at, "call")
        made += [turn.pop("function_call")] if _has(turn, "function_call") else []
        if made and role != "assistant":
            raise BadRow("call", at, "calls by the assistant only", f"a call by {said}")
        call_id, name = (_is(str, turn.pop(key), f"{at}.{key}") if _has(turn, key) else None for key in ("tool_call_id", "name"))
        flags = {key: value for key in ("learn", "weight", "train") if (value := turn.pop(key, None)) is not None}
        learn = None if not flags else all(flags.values())
        if any(value not in (0, 1) or value != learn for value in flags.values()) or (learn and role != "assistant"):
            raise BadRow("learn", at, "learn, weight or train as true or false (1 or 0), true only for assistants", _show(flags))
        extra: dict[str, JSON] = {key: value for key, value in turn.items() if value is not None}
        self.extra |= {at: extra} if extra else {}
        return Message(role, content, tuple(_call(call, at) for call in made), call_id, name, learn)

    def content(self, value: JSON, at: str, made: list[JSON], thoughts: list[JSON]) -> str:
        """The text; calls among the parts are added to ``made``."""
        texts: list[str] = []
        for part in value if isinstance(value, list) else ["" if value is None else value]:
            kind, text = (part.get("type"), part.get("text", part.get("value"))) if isinstance(part, dict) else ("text", part)
            if kind == "tool_call":
                made.append(_nested(text, at, "call"))
            elif kind in ("text", "reasoning") and isinstance(text, str):
                (texts if kind == "text" else thoughts).append(text)
            else:
                hint = "a JSON result is written as a string; pictures and sound cannot be learned"
                raise BadRow("content", at, "text, null or a list of text parts", _show(part), hint)
        thought = "".join(map(str, thoughts))
        if thought and self.spec.reasoning == "refuse":
            hint = "data.reasoning=think puts it before the answer in <think> marks, omit leaves it out"
            raise BadRow("reasoning", at, "no reasoning apart from the answer", _show(thought), hint)
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
                declared.add(_is(str, _is(dict, body.get("function", body), "tools", "tools").get("name"), "tools", "tools"))
        check(messages, declared)
        return Conversation(tuple(messages), tuple(tools))


def _call(item: JSON, at: str) -> Call:
    outer = _is(dict, item, f"{at}, a call", "call")
    body = _is(dict, outer.get("function", outer), f"{at}, a call", "call")
    name, made, given = body.get("name"), outer.get("id"), body.get("arguments")
    if not isinstance(name, str) or not name or not isinstance(made, str | None):
        raise BadRow("call", at, "a call with a name, and an id that is text", _show(item))
    arguments = _nested(given, f"{at}, arguments of {name}", "arguments")
    if not isinstance(arguments, dict):
        raise BadRow("arguments", f"{at}, arguments of {name}", "an object", _show(given), "write {} where there are none")
    return Call(name, arguments, made or None, given if isinstance(given, str) else None)


def require(read: Read, max_dropped: float) -> None:
    """Raises DataError where more than ``max_dropped`` (a share) of the rows are bad, or none is left."""
    share = len(read.dropped) / max(read.rows, 1)
    if read.examples and share <= max_dropped:
        return
    files = ", ".join(read.files)
    if not read.dropped:
        raise DataError("no rows", where=files, hint="data.train names files of rows")
    reasons = ", ".join(f"{reason} {count}" for reason, count in Counter(row.reason for row in read.dropped).most_common())
    shown = listing([f"{row.source}: {row.message}" for row in read.dropped])
    raise DataError(
        f"{len(read.dropped)} of {read.rows} rows cannot be used, {share:.1%} ({reasons}):\n{shown}",
        where=files or None, hint=f"mend these rows, or allow more than {max_dropped:.1%} with data.max_dropped",
    )  # fmt: skip


def write_dropped(dropped: Iterable[Dropped], path: Path) -> None:
    """JSONL, one object a row: source, reason, message, raw. Plain ASCII, for ``raw`` may be no valid text."""
    write_lines([json.dumps(row._asdict()) for row in dropped], path)
