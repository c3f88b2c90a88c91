"""How a model is asked that learned from given rows: in a chat, by plain text to be continued, or by a text
under the marks of an instruction."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Literal, TypeAlias, get_args

from tunesmith.data.examples import Completion, Conversation, Document, Example, Message
from tunesmith.data.layouts.alpaca import MARKS

AskedAs: TypeAlias = Literal["chat", "text", "instruct"]
KINDS: tuple[AskedAs, ...] = get_args(AskedAs)


def asked_as(examples: Iterable[Example]) -> AskedAs:
    """As most of ``examples`` were asked; in doubt, and without any, in a chat."""
    counts = Counter(map(_kind, examples))
    return max(KINDS, key=lambda kind: counts[kind])


def _kind(example: Example) -> AskedAs:
    if isinstance(example, Completion) and example.prompt.endswith(MARKS["assistant"]):
        return "instruct"
    return "text" if isinstance(example, Document | Completion) else "chat"


def question(messages: Sequence[Message], kind: AskedAs) -> Conversation | str:
    """What is asked after ``messages``. As plain text only the last of them: such rows have no turns."""
    if kind == "chat":
        return Conversation(tuple(messages))
    if kind == "text":
        return messages[-1].content
    return "".join(f"{MARKS[message.role]}{message.content}\n\n" for message in messages) + MARKS["assistant"]
