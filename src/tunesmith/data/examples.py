"""What one training row is and when it is valid; how it is written; and which rows are held out, by whole
prompts."""

from __future__ import annotations

import hashlib
import json
from collections import defaultdict
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field
from itertools import takewhile
from pathlib import Path
from typing import NamedTuple, TypeAlias, cast

from tunesmith.errors import DataError
from tunesmith.settings.config import JSON


class BadRow(Exception):
    """This row cannot be used. ``place``: the key in the row. ``fault``: what was expected and what was
    found there."""

    def __init__(self, reason: str, place: str, expected: str, found: str, hint: str = "") -> None:
        self.reason, self.place, self.hint = reason, _cut(place), _cut(hint)
        self.fault = f"expected {_cut(expected)}, found {_cut(found)}"
        super().__init__(with_hint(self.located, self.hint))

    @property
    def located(self) -> str:
        """The fault behind its place."""
        return f"{self.place}: " * bool(self.place) + self.fault


def with_hint(fault: str, hint: str) -> str:
    """What is wrong with a row, and what to do about it."""
    return f"{fault}; hint: {hint}" if hint else fault


def _cut(text: str, most: int = 500) -> str:
    """What a message says of a row, whose names may have any length."""
    return text if len(text) <= most else f"{text[:most]}…"


REASONING_BESIDE = "reasoning beside answers: learned as the template writes it"


class RowRemark(NamedTuple):
    """How a row was read. ``doubt``: something that it says was not understood."""

    text: str
    doubt: bool = False


@dataclass(frozen=True, slots=True)
class Call:
    """``text``: the arguments as the file wrote them, if it gave them as a string."""

    name: str
    arguments: JSON
    id: str | None = None
    text: str | None = None


@dataclass(frozen=True, slots=True)
class Message:
    """``call_id``: the call that a tool message answers. ``learn``: None leaves it to the template's
    settings."""

    role: str  # system | user | assistant | tool
    content: str
    calls: tuple[Call, ...] = ()
    call_id: str | None = None
    name: str | None = None
    learn: bool | None = None


@dataclass(frozen=True, slots=True)
class Conversation:
    """``tools``: declarations in OpenAI's form, ``{"type": "function", "function": {"name": …}}``."""

    messages: tuple[Message, ...]
    tools: tuple[JSON, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class _Sourced:
    """``id``: 16 hex digits of the sha256 of the content, source and metadata aside. ``source``:
    ``file:line``. ``remarks``: how the row was read, where that may not be what its author expects."""

    id: str = ""
    source: str = ""
    metadata: dict[str, JSON] = field(default_factory=dict)
    remarks: tuple[RowRemark, ...] = field(default=(), compare=False, repr=False)

    def __post_init__(self) -> None:
        if not self.id:
            content = content_of(cast(Example, self))
            digest = hashlib.sha256(json.dumps(content).encode()).hexdigest()
            object.__setattr__(self, "id", digest[:16])


@dataclass(frozen=True, slots=True)
class Document(_Sourced):
    """Plain text, all of it learned."""

    text: str
    label: bool | None = None


@dataclass(frozen=True, slots=True)
class Demonstration(_Sourced):
    """A conversation to imitate."""

    conversation: Conversation
    label: None = None


@dataclass(frozen=True, slots=True)
class Judged(_Sourced):
    """A conversation with a verdict on it."""

    conversation: Conversation
    desirable: bool


@dataclass(frozen=True, slots=True)
class Preference(_Sourced):
    """Two whole conversations that answer the same prompt differently."""

    chosen: Conversation
    rejected: Conversation


@dataclass(frozen=True, slots=True)
class Completion(_Sourced):
    """Plain text that follows plain text: no chat template."""

    prompt: str
    completion: str
    label: bool | None = None


Example: TypeAlias = Document | Demonstration | Judged | Preference | Completion


def content_of(example: Example) -> dict[str, JSON]:
    """The row of ``example``, without source and metadata."""
    row: dict[str, JSON] = {}
    tools: tuple[JSON, ...] = ()
    if isinstance(example, Document):
        row["text"] = example.text
    elif isinstance(example, Completion):
        row |= {"prompt": example.prompt, "completion": example.completion}
    elif isinstance(example, Preference):
        tools = example.rejected.tools
        row |= {"chosen": _turns(example.chosen), "rejected": _turns(example.rejected)}
    else:
        tools = example.conversation.tools
        row["messages"] = _turns(example.conversation)
    optional: dict[str, JSON] = {"tools": list(tools) or None, "label": label_of(example)}
    return row | {key: value for key, value in optional.items() if value is not None}


def label_of(example: Example) -> bool | None:
    """The verdict on the row, or None if it has none."""
    if isinstance(example, Judged):
        return example.desirable
    return None if isinstance(example, Preference) else example.label


def _turns(conversation: Conversation) -> list[JSON]:
    return [_turn(message) for message in conversation.messages]


def _turn(message: Message) -> JSON:
    calls: list[JSON] = []
    for call in message.calls:
        function: dict[str, JSON] = {
            "name": call.name,
            "arguments": call.arguments if call.text is None else call.text,
        }
        calls.append({"id": call.id, "type": "function", "function": function})
    turn: dict[str, JSON] = {"role": message.role, "content": message.content}
    turn |= {
        "tool_calls": calls or None,
        "tool_call_id": message.call_id,
        "name": message.name,
        "learn": message.learn,
    }
    return {key: value for key, value in turn.items() if value is not None}


_AFTER = {
    "": "system or user",
    "system": "user",
    "user": "assistant",
    "assistant": "user or tool",
    "tool": "tool or assistant",
}


_HINTS = {
    "leading_assistant": "put the greeting into the system text, or begin with what the user says",
    "user after user": "join the turns of one speaker into one",
    "assistant after assistant": "join the turns of one speaker into one",
    "system after system": "join the system texts into one",
    "system": "put it first, or into the user's turn",
    "tool": "a result follows the call of a tool; data.structure_calls reads calls that are written as text",
}


def check(messages: Iterable[Message], declared: Collection[str]) -> None:
    """Raises BadRow if no template could render the turns faithfully. ``declared``: names of the tools;
    empty: any."""
    before, waiting = "", []
    answered = False
    for turn, message in enumerate(messages, 1):
        where, role = f"turn {turn}", message.role
        if role not in _AFTER[before].split(" or "):
            code = "leading_assistant" if role == "assistant" and before in ("", "system") else "role_order"
            hint = _HINTS.get(f"{role} after {before}", _HINTS.get(code, _HINTS.get(role, "")))
            raise BadRow(
                code, where, _AFTER[before] + (f" after {before}" if before else " first"), role, hint
            )
        if role == "tool":
            fits = [
                call for call in waiting if call.id == message.call_id and message.name in (None, call.name)
            ]
            if not fits:
                raise _unasked(message, waiting, where)
            waiting.remove(fits[0])
        elif not message.content.strip() and not message.calls:
            wanted, hint = "words" + " or a call" * (role == "assistant"), "drop the turn, or the row"
            raise BadRow(f"empty_{role}", where, wanted, "none", hint)
        elif waiting:
            raise BadRow("unanswered_call", where, f"the result of {waiting[0].name}", role)
        else:
            waiting = list(message.calls)
        ids = {call.id for call in message.calls}
        if ids != {None} and len(ids - {None}) < len(message.calls):
            raise BadRow(
                "call_id", where, "an id of its own for each call, or none at all", ", ".join(map(str, ids))
            )
        if declared and (unknown := {call.name for call in message.calls} - set(declared)):
            raise BadRow(
                "undeclared_tool", where, " or ".join(sorted(declared)), " and ".join(sorted(unknown))
            )
        before, answered = role, answered or role == "assistant"
    if before != "assistant":
        raise BadRow(
            "no_answer",
            "",
            "the assistant to have the last word",
            before or "no turn",
            "drop the turns after the last answer" if answered else "there is nothing to learn",
        )


def _unasked(result: Message, waiting: Sequence[Call], where: str) -> BadRow:
    """What is wrong with a result that answers none of the calls that wait."""
    own = " ".join(
        filter(None, (result.name and f"of {result.name}", result.call_id and f"for the id {result.call_id}"))
    )
    if not waiting:
        return BadRow("call_id", where, "a result only behind its call", "one without a call", _HINTS["tool"])
    wanted = " or ".join(
        f"the result of {call.name}" + (f" (id {call.id})" if call.id else "") for call in waiting
    )
    hint = "tool_call_id names the call that a result answers"
    return BadRow("call_id", where, wanted, f"a result {own or 'without id and name'}", hint)


def write_examples(examples: Iterable[Example], path: Path) -> None:
    """JSONL that ``formats.read`` gives back under ``format: auto``: equal but for ``source``."""
    whole = [
        (content_of(example), {"metadata": example.metadata} if example.metadata else {})
        for example in examples
    ]
    write_lines([json.dumps(row | extra) for row, extra in whole], path)


def write_lines(lines: Iterable[str], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8", newline="\n")


def opening(conversation: Conversation) -> str:
    """What is asked before the first answer, without the system text: conversations that share any prompt
    share this."""
    before = takewhile(lambda message: message.role != "assistant", conversation.messages)
    return "\n".join(message.content for message in before if message.role != "system")


def prompt_key(example: Example) -> str:
    """`opening` without case and spacing: rows that share it stay together in `split`. Text without a prompt
    is its own."""
    if isinstance(example, Document):
        text = example.text
    elif isinstance(example, Completion):
        text = example.prompt if example.prompt.strip() else example.completion
    else:
        text = opening(example.chosen if isinstance(example, Preference) else example.conversation)
    return " ".join(text.casefold().split())


def split(examples: Sequence[Example], share: float, seed: int) -> tuple[list[Example], list[Example]]:
    """(train, held out), each in the order of ``examples``; every example is in one of them, no prompt is in
    both.

    About ``share`` of the rows of each label is held out, as nearly as whole prompts allow, and at least one
    prompt is on each side. The choice does not depend on the order of ``examples``. ``share``: from 0 to
    below 1. Raises DataError if all share one prompt."""
    if share == 0 or not examples:
        return list(examples), []
    keys = [
        hashlib.sha256(f"{seed}:{prompt_key(example)}".encode("utf-8", "surrogatepass")).digest()
        for example in examples
    ]
    sizes: dict[bytes, list[int]] = defaultdict(lambda: [0, 0, 0, 0])  # rows in all, by label
    for key, example in zip(keys, examples, strict=True):
        for column in (0, (True, False, None).index(label_of(example)) + 1):
            sizes[key][column] += 1
    if len(sizes) < 2:
        hint = "data.valid=0 holds out nothing; or name files of other prompts in data.valid"
        raise DataError(
            "all rows share one prompt: none can be held out", where=examples[0].source or None, hint=hint
        )
    left = [share * sum(counts) for counts in zip(*sizes.values(), strict=True)]  # rows still to be held out
    held: set[bytes] = set()

    def after(moved: Iterable[bytes]) -> list[float]:
        return [
            rows - sum(sizes[key][column] * (-1 if key in held else 1) for key in moved)
            for column, rows in enumerate(left)
        ]

    def miss(rows: Iterable[float]) -> float:
        return sum(number * number for number in rows)

    # First every prompt in the order of its hash, so that large prompts have the same chance as others;
    # then, of each size and side, one prompt or two at once, as long as that comes nearer to the share.
    changes, alike = [{key} for key in sorted(sizes)], list(sizes)
    nearer = True
    while nearer:
        nearer = False
        for moved in changes:
            if miss(rest := after(moved)) < miss(left) - 1e-9:
                left, nearer = rest, True
                held.symmetric_difference_update(moved)
        alike = list({(*sizes[key], key in held): key for key in sorted(sizes)}.values())
        changes = [{first, second} for first in alike for second in alike]
    if len(held) in (0, len(sizes)):
        held ^= min(({key} for key in alike), key=lambda moved: miss(after(moved)))
    sides: tuple[list[Example], list[Example]] = [], []
    for key, example in zip(keys, examples, strict=True):
        sides[key in held].append(example)
    return sides
