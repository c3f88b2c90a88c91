"""What a rule sees: one row at a time (`View`) while the files are read, then what it returned for all of
them (`Survey`)."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple

from tunesmith.auditing import AuditSpec
from tunesmith.data.examples import (
    Completion,
    Conversation,
    Demonstration,
    Document,
    Example,
    Judged,
    Message,
    Preference,
    label_of,
    opening,
)
from tunesmith.data.formats import Dropped
from tunesmith.errors import TemplateError

if TYPE_CHECKING:
    from tunesmith.tokens.template import Renderer, Row, TemplateSpec


class TextPart(NamedTuple):
    """One text of a row. ``at``: where it stands: ``turn 2``, ``turn 2, arguments of NAME``, ``text``,
    ``rejected, turn 2``."""

    role: str  # system | user | assistant | tool | call | text
    text: str
    at: str


@dataclass(eq=False)
class View:
    """One row: exactly one of ``example`` and ``dropped`` is given. It exists only while the rules look at
    it. ``shortened``: ``example`` is its `beginning`."""

    source: str
    example: Example | None
    dropped: Dropped | None = None
    shortened: bool = False

    @cached_property
    def label(self) -> bool | None:
        return None if self.example is None else label_of(self.example)

    @cached_property
    def conversation(self) -> Conversation | None:
        """The conversation that is learned: of a pair the chosen one."""
        if isinstance(self.example, Preference):
            return self.example.chosen
        return self.example.conversation if isinstance(self.example, Demonstration | Judged) else None

    @cached_property
    def messages(self) -> tuple[Message, ...]:
        return self.conversation.messages if self.conversation else ()

    @cached_property
    def asked(self) -> str:
        """What is asked before the first answer, without the system text; of plain text its prompt, or ""."""
        if isinstance(self.example, Completion):
            return self.example.prompt
        return opening(self.conversation) if self.conversation else ""

    @cached_property
    def answers(self) -> tuple[str, ...]:
        """What is learned: one text for each assistant turn, with its calls as JSON; of a pair the chosen
        side."""
        if isinstance(self.example, Document):
            return (self.example.text,)
        if isinstance(self.example, Completion):
            return (self.example.completion,)
        return tuple(
            "\n".join(
                [message.content, *(f"{call.name} {_arguments(call)}" for call in message.calls)]
            ).strip("\n")
            for message in self.messages
            if message.role == "assistant"
        )

    @cached_property
    def said(self) -> str:
        return "\n".join(self.answers)

    @cached_property
    def parts(self) -> tuple[TextPart, ...]:
        """Every text of the row; of a pair both sides, with what they share once."""
        example = self.example
        if isinstance(example, Document):
            return (TextPart("text", example.text, "text"),)
        if isinstance(example, Completion):
            return (
                TextPart("user", example.prompt, "prompt"),
                TextPart("assistant", example.completion, "completion"),
            )
        parts = list(_parts(self.messages, ""))
        if isinstance(example, Preference):
            shared = set(parts)
            parts += [
                part._replace(at=f"rejected, {part.at}")
                for part in _parts(example.rejected.messages, "")
                if part not in shared
            ]
        return tuple(parts)

    @cached_property
    def whole(self) -> str:
        """All words of the row."""
        return "\n".join(part.text for part in self.parts)

    @cached_property
    def words(self) -> list[str]:
        """The words of `whole`, in lower case, without punctuation."""
        return WORD.findall(self.whole.lower())


LOOKED_AT = 1_000_000
"""Characters of a row that are audited, from its start: more take minutes, and few models read so much."""


def beginning(example: Example) -> Example:
    """``example``, or the first `LOOKED_AT` characters of it: of several turns whole ones."""
    if isinstance(example, Document):
        return example if len(example.text) <= LOOKED_AT else replace(example, text=example.text[:LOOKED_AT])
    if isinstance(example, Completion):
        if len(example.prompt) + len(example.completion) <= LOOKED_AT:
            return example
        half = LOOKED_AT // 2
        return replace(example, prompt=example.prompt[:half], completion=example.completion[:half])
    if isinstance(example, Preference):
        chosen, rejected = _first_turns(example.chosen), _first_turns(example.rejected)
        if chosen is example.chosen and rejected is example.rejected:
            return example
        return replace(example, chosen=chosen, rejected=rejected)
    conversation = _first_turns(example.conversation)
    return example if conversation is example.conversation else replace(example, conversation=conversation)


def _first_turns(conversation: Conversation) -> Conversation:
    messages = conversation.messages
    if sum(len(message.content) for message in messages) <= LOOKED_AT:
        return conversation
    shown: list[Message] = []
    answered = total = 0
    for message in messages:
        shown.append(replace(message, content=message.content[: LOOKED_AT // 2]))
        total += len(shown[-1].content)
        if message.role == "assistant" and not message.calls:
            answered = len(shown)
            if total > LOOKED_AT // 2:
                break
    return replace(conversation, messages=tuple(shown[:answered] or shown))


_JOINED = "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff"
WORD = re.compile(f"[{_JOINED}]|[^\\W{_JOINED}]+")
"""A word; in scripts that put no space between words (Thai, Burmese, Khmer, Kana, Han) a letter."""


def _arguments(call: Any) -> str:
    return call.text if call.text is not None else json.dumps(call.arguments, ensure_ascii=False)


def _parts(messages: Iterable[Message], before: str) -> Iterator[TextPart]:
    for turn, message in enumerate(messages, 1):
        if message.content:
            yield TextPart(message.role, message.content, f"{before}turn {turn}")
        for call in message.calls:
            yield TextPart("call", _arguments(call), f"{before}turn {turn}, arguments of {call.name}")


def normal(text: str) -> str:
    """``text`` in lower case, with single spaces, without punctuation: rows with equal normal forms count as
    the same."""
    return " ".join(WORD.findall(text.casefold()))


def spaced(text: str) -> str:
    """``text`` in lower case with single spaces, as in `examples.prompt_key`; punctuation counts."""
    return " ".join(text.casefold().split())


def digest(text: str) -> int:
    """The first 64 bits of BLAKE2b: collisions are negligible."""
    return int.from_bytes(
        hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "big"
    )


@dataclass
class Context:
    """What rules know while they look at a row. ``share``: of the rows that are `drawn`, chosen by their
    content."""

    spec: AuditSpec
    limit: int = 2048  # batch.length, in tokens
    share: float = 1.0
    renderer: Renderer | None = None
    tokenizer: str = ""  # what the renderer's tokenizer is called
    rendered: Callable[[Example], list[Row]] | None = None  # where they are known; raises `template.Refused`
    against: Sequence[Any] | None = None  # each a `contamination.PromptIndex`
    embed: Callable[[Sequence[str]], Any] | None = None  # (n, width) features of texts by the user's model
    template: TemplateSpec | None = None  # how rows are learned and cut; None: by default
    clusters: Callable[[Sequence[str]], Any] | None = None  # (prompts) → Clustering, if it is made elsewhere
    charts: bool = True  # whether the map of prompts is wanted, which takes longer than all else
    refusals: bool = True  # whether many rows that cannot be rendered are an error here, or elsewhere
    known: int | None = None  # rows of the model's embedding; None: no model is named, or rows are added
    _last: tuple[View | None, list[Row] | TemplateError] = (None, [])

    def rows(self, view: View) -> list[Row] | TemplateError:
        """The sequences that ``view`` becomes, or why it cannot be rendered. Requires a renderer."""
        if self._last[0] is not view and view.example is not None:
            try:
                self._last = (view, (self.rendered or self.render)(view.example))
            except TemplateError as error:
                self._last = (view, error)
        return self._last[1]

    def render(self, example: Example) -> list[Row]:
        """By the renderer, as training would. Raises `template.Refused`."""
        assert self.renderer is not None
        if self.template is None:
            return self.renderer.rows(example)
        cut = self.limit if self.template.too_long == "cut" else None
        return self.renderer.rows(example, learn=self.template.learn, cut=cut)

    def drawn(self, view: View) -> bool:
        """Whether the expensive rules look at this row. Depends on its content alone."""
        return self.share >= 1 or (view.example is not None and int(view.example.id, 16) < self.share * 2**64)


@dataclass
class Survey:
    """All training rows, in order; the lists are parallel. fetch: reads rows again, by their index."""

    spec: AuditSpec
    sources: list[str] = field(default_factory=list)
    labels: list[bool | None] = field(default_factory=list)
    dropped: list[Dropped | None] = field(default_factory=list)
    asked: list[str] = field(default_factory=list)  # excerpts
    kept: dict[str, list[Any]] = field(default_factory=dict)  # rule → what it kept of each row
    context: Context | None = None
    fetch: Callable[[Sequence[int]], dict[int, View]] = lambda rows: {}
    charts: dict[str, Any] = field(default_factory=dict)  # filled by the rules, drawn by `page`

    def __len__(self) -> int:
        return len(self.sources)

    @property
    def training(self) -> list[int]:
        """Indices of the rows that could be read."""
        return [row for row, bad in enumerate(self.dropped) if bad is None]
