"""What one training row is and when it is sound; how it is written; and which rows are held out, by whole prompts."""

from __future__ import annotations

import hashlib
import json
from collections import defaultdict
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeAlias

from tunesmith.config import JSON
from tunesmith.errors import ConfigError, DataError


class BadRow(Exception):
    """This row cannot be used."""

    def __init__(self, reason: str, at: str, expected: str, found: str, hint: str = "") -> None:
        text = f"{at}: " * bool(at) + f"expected {expected}, found {found}" + f"; hint: {hint}" * bool(hint)
        super().__init__(text)
        self.reason = reason


@dataclass(frozen=True, slots=True)
class Call:
    """``text``: the arguments to the letter, where the file gave them as a string."""

    name: str
    arguments: JSON
    id: str | None = None
    text: str | None = None


@dataclass(frozen=True, slots=True)
class Message:
    """``call_id``: the call that a tool message answers. ``learn``: None leaves it to the template's settings."""

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
    """``id``: 16 hex digits of the sha256 of the content, source and metadata aside. ``source``: ``file:line``."""

    id: str = ""
    source: str = ""
    metadata: dict[str, JSON] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.id:
            digest = hashlib.sha256(json.dumps(content_of(self)).encode()).hexdigest()
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


def content_of(example: _Sourced) -> dict[str, JSON]:
    """The row that says what ``example`` says, source and metadata aside."""
    row: dict[str, JSON] = {}
    if isinstance(example, Preference):
        conversation = example.chosen
        row["chosen"], row["rejected"] = _turns_of(conversation), _turns_of(example.rejected)
    elif isinstance(example, Demonstration | Judged):
        conversation = example.conversation
        row["messages"] = _turns_of(conversation)
    else:
        conversation = Conversation(())
        keys = ("text",) if isinstance(example, Document) else ("prompt", "completion")
        row |= {key: getattr(example, key) for key in keys}
    if conversation.tools:
        row["tools"] = list(conversation.tools)
    if (label := _label(example)) is not None:
        row["label"] = label
    return row


def _label(example: object) -> bool | None:
    if isinstance(example, Judged):
        return example.desirable
    return example.label if isinstance(example, Document | Completion) else None


def _turns_of(conversation: Conversation) -> list[JSON]:
    turns: list[JSON] = []
    for message in conversation.messages:
        turn: dict[str, JSON] = {"role": message.role, "content": message.content}
        calls: list[JSON] = []
        for call in message.calls:
            function: dict[str, JSON] = {"name": call.name, "arguments": call.arguments if call.text is None else call.text}
            calls.append({"id": call.id, "type": "function", "function": function})
        optional = ("tool_calls", calls or None), ("tool_call_id", message.call_id), ("name", message.name)
        for key, value in (*optional, ("learn", message.learn)):
            if value is not None:
                turn[key] = value
        turns.append(turn)
    return turns


_AFTER = {
    None: ("system", "user"), "system": ("user",), "user": ("assistant",), "assistant": ("user", "tool"),
    "tool": ("tool", "assistant"),
}  # fmt: skip


def check(messages: Iterable[Message], declared: Collection[str]) -> None:
    """Raises BadRow where no template could show the turns faithfully. ``declared``: names of the tools, empty: any."""
    before, waiting, where = None, [], ""
    for at, message in enumerate(messages, 1):
        where, role = f"turn {at}", message.role
        if role not in _AFTER[before]:
            code = "leading_assistant" if role == "assistant" and before in (None, "system") else "role_order"
            raise BadRow(code, where, " or ".join(_AFTER[before]) + (f" after {before}" if before else " first"), role)
        if role != "tool" and not message.content.strip() and not message.calls:
            raise BadRow(f"empty_{role}", where, "words" + " or a call" * (role == "assistant"), "none")
        if role != "tool" and waiting:
            raise BadRow("unanswered_call", where, f"the result of {waiting[0].name}", role)
        if role == "tool":
            fits = [call for call in waiting if call.id == message.call_id and message.name in (None, call.name)]
            if not fits:
                asked = " or ".join(f"{call.name} (id {call.id})" for call in waiting) or "no tool, for none was called"
                raise BadRow("call_id", where, f"a result of {asked}", f"one of {message.name} (id {message.call_id})")
            waiting.remove(fits[0])
        else:
            waiting = list(message.calls)
        ids = {call.id for call in message.calls}
        if ids != {None} and len(ids - {None}) < len(message.calls):
            raise BadRow("call_id", where, "an id of its own for each call, or none at all", ", ".join(map(str, ids)))
        if declared and (unknown := {call.name for call in message.calls} - set(declared)):
            raise BadRow("undeclared_tool", where, " or ".join(sorted(declared)), " and ".join(sorted(unknown)))
        before = role
    if before != "assistant":
        raise BadRow("no_answer", where, "the assistant to have the last word", str(before), "there is nothing to learn")


def write_examples(examples: Iterable[Example], path: Path) -> None:
    """JSONL that ``formats.read`` gives back under ``format: auto``: equal but for ``source``."""
    lines: list[str] = []
    for example in examples:
        extra: dict[str, JSON] = {"metadata": example.metadata} if example.metadata else {}
        lines.append(json.dumps(content_of(example) | extra))
    write_lines(lines, path)


def write_lines(lines: Iterable[str], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8", newline="\n")


def opening(conversation: Conversation) -> str:
    """What is asked before the first answer, system text aside: conversations that share any prompt share this."""
    asked: list[str] = []
    for message in conversation.messages:
        if message.role == "assistant":
            break
        asked += [message.content] * (message.role != "system")
    return "\n".join(asked)


def prompt_key(example: Example) -> str:
    """What is asked before the first answer, the system text aside, without case and spacing: rows that share it stay
    together in `split`. Text without a prompt is its own key."""
    if isinstance(example, Demonstration | Judged):
        text = opening(example.conversation)
    elif isinstance(example, Preference):
        text = opening(example.chosen)
    else:
        text = example.text if isinstance(example, Document) else example.prompt
        text = text if text.strip() or isinstance(example, Document) else example.completion
    return " ".join(text.casefold().split())


def split(examples: Sequence[Example], share: float, seed: int) -> tuple[list[Example], list[Example]]:
    """(train, held out), each in the order of ``examples``; every example is in one of them, no prompt is in both.

    Of each label about ``share`` is held out, as near as whole prompts allow, and at least one prompt is on each side.
    Which prompts does not depend on the order of ``examples``. Raises DataError where all share one prompt.
    """
    if not 0 <= share < 1:
        raise ConfigError(f"a share from 0 to below 1 is needed, not {share}", where="data.valid")
    if share == 0 or not examples:
        return list(examples), []
    keys = [hashlib.sha256(f"{seed}:{prompt_key(example)}".encode("utf-8", "surrogatepass")).digest() for example in examples]
    sizes: dict[bytes, list[int]] = defaultdict(lambda: [0, 0, 0, 0])  # rows in all, by label
    for key, example in zip(keys, examples, strict=True):
        for at in (0, (True, False, None).index(_label(example)) + 1):
            sizes[key][at] += 1
    if len(sizes) < 2:
        hint = "data.valid=0 holds out nothing; or name files of other prompts in data.valid"
        raise DataError("all rows share one prompt: none can be held out", where=examples[0].source or None, hint=hint)
    kinds: dict[tuple[int, ...], list[bytes]] = defaultdict(list)  # prompts with the same counts, in an order by the seed
    for key in sorted(sizes):
        kinds[tuple(sizes[key])].append(key)
    left = [share * sum(counts) for counts in zip(*sizes.values(), strict=True)]  # rows still to be held out
    taken = dict.fromkeys(kinds, 0)

    def miss(*change: tuple[tuple[int, ...], int]) -> float:
        return sum((rows - sum(n * kind[at] for kind, n in change)) ** 2 for at, rows in enumerate(left))

    def take(*change: tuple[tuple[int, ...], int]) -> None:
        for kind, n in change:
            taken[kind] += n
            left[:] = [rows - n * size for rows, size in zip(left, kind, strict=True)]

    for key in sorted(sizes):  # at random, so that prompts with many rows have the same chance as others
        if miss((tuple(sizes[key]), 1)) < miss():
            take((tuple(sizes[key]), 1))
    while True:  # then one in, one out, or one for another, for as long as it comes nearer
        more = [(kind, 1) for kind, same in kinds.items() if taken[kind] < len(same)]
        less = [(kind, -1) for kind in kinds if taken[kind]]
        best = min([(change,) for change in more + less], key=lambda change: miss(*change))
        if miss(*best) > miss() - 1e-9:
            best = min(((one, other) for one in more for other in less), key=lambda change: miss(*change), default=best)
        if miss(*best) > miss() - 1e-9:
            break
        take(*best)
    if sum(taken.values()) in (0, len(sizes)):
        n = 1 if not any(taken.values()) else -1
        take(min((((kind, n),) for kind in kinds), key=lambda change: miss(*change))[0])
    held = {key for kind, same in kinds.items() for key in same[: taken[kind]]}
    return (
        [example for key, example in zip(keys, examples, strict=True) if key not in held],
        [example for key, example in zip(keys, examples, strict=True) if key in held],
    )
