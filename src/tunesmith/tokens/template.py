"""Words to tokens: which ids a conversation becomes, and which of them are learned.

Where an answer begins and ends is the difference of two renderings, the prompt that inference sees and the
prompt with the answer, compared token by token; no text is searched for. Every row is checked: the learned
tokens decode to the assistant's words and the end token; there is one BOS; no message is missing; something
is learned."""

from __future__ import annotations

import datetime
import hashlib
import json
import re
import unicodedata
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from copy import copy
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import pairwise
from typing import Annotated, Any, Literal, NamedTuple, TypeAlias, TypeVar, cast

import numpy as np
from pydantic import AfterValidator, Field

from tunesmith.data import formats, layout
from tunesmith.data.calls import calls_only, without_words
from tunesmith.data.examples import REASONING_BESIDE, label_of
from tunesmith.data.formats import (
    JSON,
    Call,
    Conversation,
    Demonstration,
    Document,
    Judged,
    Message,
    Preference,
)
from tunesmith.errors import DataError, TemplateError, listing
from tunesmith.settings.config import Spec

Learn = Literal["all", "last", "marked"]

SURROGATES = r"[\ud800-\udfff]"  # halves of a character: no tokenizer can encode them
# Merges with nothing, and keeps the space that some tokenizers put before a text away from what follows.
ANCHOR = "☺"
TextControl = Literal["refuse", "read", "letters"]
WordsBesideCalls = Literal["refuse", "drop_words", "split"]
THOUGHT = re.compile(r"\s*<think>(.*?)</think>\n*(.*)", re.DOTALL)
CONTINUED_THOUGHT = re.compile(r"((?:(?!</?think>).)+?)\n</think>\n+(.*)", re.DOTALL)
REASONED = "answers learned with their reasoning"
SURE = 16
"""A text of fewer characters a token than this is encoded as a whole: that takes no time."""
MOST_TURNS = 10_000
"""Turns of a conversation whose oldest turns may be cut: cutting renders it again and again."""
_NO_SURROGATES = dict.fromkeys(range(0xD800, 0xE000), "?")
SCHEMA_WORDS = frozenset(
    "type object string number integer boolean array function name description parameters properties "
    "required items enum".split()
)
"""Words of JSON Schema. A template may write tools in another notation, as gpt-oss's does in TypeScript."""
MANY_ANSWERS = 6
"""From so many answers on, their prompts are read from one run of the template if that is possible."""
SPLIT, CUT = "split into one row per assistant turn", "cut at a turn boundary"


def _iso_date(text: str) -> str:
    datetime.date.fromisoformat(text)
    return text


class TemplateSpec(Spec):
    """How conversations become tokens, and which tokens are learned."""

    renderer: Literal["auto", "hf", "mistral-v3"] = Field(
        "auto",
        description="hf: the chat template; mistral-v3: mistral-common",
        json_schema_extra={"when": "if the folder's chat template does not give the ids of mistral-common"},
    )
    thinking: Literal["auto", "on", "off"] = Field(
        "auto",
        description="whether prompts without an answer ask for reasoning (samples, evaluation, chat); auto: "
        "as most answers that are learned. A row decides by its own answer",
        json_schema_extra={
            "when": "if prompts should, or should not, ask a reasoning model to reason, whatever the rows do"
        },
    )
    options: dict[str, bool | int | float | str] = Field(
        default_factory=dict,
        description="variables for the chat template in every row and prompt, such as enable_thinking: true",
        json_schema_extra={"when": "if the template has switches that your rows were written for"},
    )
    date: Annotated[str, AfterValidator(_iso_date)] | None = Field(
        None,
        description="the date that a template writes, as 2026-01-31; none: the day on which the run began",
        json_schema_extra={
            "when": "to repeat a run on another day to the byte, with a template that writes the date"
        },
    )
    learn: Learn = Field(
        "all",
        description="all answers but those with learn: false; the last; those with learn: true",
        json_schema_extra={
            "when": "last if earlier answers are not worth imitating; marked to choose single answers"
        },
    )
    prompt_weight: float = Field(
        0.0,
        ge=0,
        le=1,
        description="weight of all other tokens; 0.01 to 0.5 helps short answers",
        json_schema_extra={"when": "if answers are very short beside their prompts"},
    )
    words_beside_calls: WordsBesideCalls = Field(
        "refuse",
        description="a turn of words and calls, if the format has one or the other: refuse the row, drop the "
        "words, or split it: a row that learns the words, and one that learns the calls",
        json_schema_extra={"when": "if the audit or the dry run refuses rows that have both"},
    )
    text_end: Literal["eos", "turn"] = Field(
        "eos",
        description="what ends plain text: the tokenizer's eos_token, or the end of a chat's turn",
        json_schema_extra={"when": "turn if plain-text rows are prompts and answers of a chat model"},
    )
    too_long: Literal["refuse", "drop", "cut"] = Field(
        "refuse",
        description="rows longer than batch.length: stop the run, drop them, or cut their oldest turns",
        json_schema_extra={"when": "drop or cut once you have read which rows are too long"},
    )


class Tokens(NamedTuple):
    """ids: (T,) int32. targets: (T,) float32, the weight of learning the token at its own index; 0 is not
    learned."""

    ids: np.ndarray
    targets: np.ndarray

    @property
    def start(self) -> int:
        """Index of the first learned token, at least 1, since nothing predicts the first token; 1 if none is
        learned."""
        return 1 + int(np.argmax(self.targets[1:] > 0)) if len(self.ids) > 1 else 1

    @property
    def digest(self) -> bytes:
        """(32,) SHA-256 of the ids and of the weights of learning them."""
        content = self.ids.astype("<i4").tobytes() + b"|" + self.targets.astype("<f4").tobytes()
        return hashlib.sha256(content).digest()


@dataclass(frozen=True, slots=True)
class Row:
    """A sequence to train on. turn: place of its last learned message. kind: completion | chosen |
    rejected."""

    tokens: Tokens
    source: str
    example_id: str
    turn: int
    label: bool | None
    kind: str = "completion"


@dataclass
class Rendered:
    """notes: changes that the author of the rows may not expect, with counts."""

    rows: list[Row]
    dropped: list[formats.Dropped]
    notes: Counter[str]


class Refused(TemplateError):
    """A row that cannot be rendered faithfully; ``code`` is the reason under which it is counted."""

    def __init__(self, code: str, what: str, hint: str | None = None) -> None:
        super().__init__(what, hint=hint)
        self.code = code


class Turn(NamedTuple):
    """An answer in its context: ids[:start] is the prompt, ids[start:] the answer with its end token."""

    place: int
    ids: list[int]
    start: int
    notes: tuple[str, ...]


class Shown(NamedTuple):
    """``messages``: how many messages ``text`` is known to show. ``prompt``: ids that are known to show the
    tools."""

    text: str
    messages: int
    prompt: Sequence[int] = ()


_SURROGATES = re.compile(SURROGATES)
_LEFT_OUT, _ALONE = "words beside calls left out", "words beside calls learned in a row of their own"
_Made = TypeVar("_Made")


class Thought(NamedTuple):
    """An answer in its two parts."""

    reasoning: str
    words: str


class Answered(NamedTuple):
    """An answer after its prompt. ids: up to the last end token. said: the answer without it, as the ids
    decode. wrote: as it should read. text: of prompt and answer."""

    prompt: list[int]
    ids: list[int]
    said: str
    wrote: str
    text: str


Parts: TypeAlias = list[tuple[str, list[Turn]]]  # for each row its kind and its learned turns


class Renderer(ABC):
    """Examples to rows, prompts to ids, ids to text. ``bos_id`` is None if plain text gets no BOS."""

    fingerprint: str  # of all that decides the ids
    size: int  # one more than the highest id
    eos_ids: tuple[int, ...]
    bos_id: int | None
    unknown_id: int | None  # of what the tokenizer cannot write
    control_ids: frozenset[int]  # of tokens that are no text
    _control: re.Pattern[str]  # texts that are encoded as control tokens
    chat_bos_id: int | None  # the id that opens a rendered conversation, once
    thinking: bool = False  # whether prompts without an answer ask for reasoning
    nine_letters: bool  # the format wants call ids of nine letters or digits
    text_end_id: int | None = None  # the one of eos_ids that ends plain text; None: the first
    ends_text_as_turn: bool = False  # as `TemplateSpec.text_end` says
    text_control: TextControl = "refuse"  # as `DataSpec.text_control` says
    words_beside_calls: WordsBesideCalls = "refuse"  # as `TemplateSpec` says
    _in_text: re.Pattern[str]  # texts that a row of plain text may mean as control tokens

    def follow(self, spec: TemplateSpec, text_control: TextControl) -> Renderer:
        """Render by the settings of a run from now on."""
        self.words_beside_calls, self.text_control = spec.words_beside_calls, text_control
        self.ends_text_as_turn = spec.text_end == "turn"
        return self

    @property
    def text_end(self) -> int | None:
        """The id that ends plain text, or None if the tokenizer has none."""
        own = None if self.ends_text_as_turn else self.text_end_id
        return next(iter(self.eos_ids), None) if own is None else own

    def needed_options(self, conversation: Conversation) -> dict[str, JSON]:
        """The variables without which the chat template renders the prompt of ``conversation`` otherwise:
        a program that has the template alone must be given them."""
        return {}

    @abstractmethod
    def decode(self, ids: Sequence[int]) -> str:
        """The text of ``ids`` with special tokens written out."""

    @abstractmethod
    def token_bytes(self) -> list[bytes]:
        """Bytes that each token adds to a text, by id; empty if no token has the id. Raises ModelError if
        they are not known."""

    @abstractmethod
    def _encode(self, text: str) -> list[int]: ...

    def encoded_part(self, text: str) -> list[int]:
        """Ids of the beginning of a text, to count them; control tokens in it are not refused."""
        return self._encode(text.translate(_NO_SURROGATES))

    @abstractmethod
    def _prompt(self, conversation: Conversation) -> list[int]: ...

    def _expect(self, conversation: Conversation) -> None:
        """Prepares for the answers of one conversation, of which there are many."""
        return None

    @abstractmethod
    def _answered(self, before: Conversation, answer: Message) -> Answered:
        """The answer in its context, up to its end."""

    @abstractmethod
    def unframed(self, text: str) -> str:
        """A decoded answer without what the template writes around words."""

    def prompt(self, conversation: Conversation) -> list[int]:
        """Ids up to where the assistant's answer begins. Raises TemplateError, also if the last message is
        the assistant's."""
        if not conversation.messages or conversation.messages[-1].role == "assistant":
            raise Refused("order", "a prompt must end with a message of the user or of a tool")
        try:
            return self._prompt(self._checked(conversation, Counter()))
        except Refused as error:
            if not _words_beside_calls(conversation):
                raise
            quiet = calls_only(conversation)
            return self._without_words(error, lambda: self._prompt(self._checked(quiet, Counter())))

    def answered(self, before: Conversation, answer: Message) -> list[int]:
        """Ids of ``answer`` after the prompt of ``before``, with its end token. Raises TemplateError if the
        template cannot write it."""
        written = self._answered(before, answer)
        return written.ids[len(written.prompt) :]

    def whole_prompt(self, conversation: Conversation) -> list[int]:
        """Ids of `prompt`. Raises TemplateError also if the template leaves out a message, a call or a tool:
        the model would answer something else than what was asked."""
        ids = self.prompt(conversation)
        text = self.decode(ids)
        for message in conversation.messages:
            quiet = message.calls and self.words_beside_calls != "refuse"
            _present(replace(message, content="") if quiet else message, text, history=True)
        if conversation.tools:
            self.require_tools(conversation.tools, ids)
        return ids

    @property
    def thinking_switch(self) -> str | None:
        """The variable of the template that turns thinking on and off, or None if there is none."""
        return None

    def with_thinking(self, thinking: bool) -> Renderer:
        """The renderer whose prompts ask for reasoning, or do not. Raises Refused if the template has no
        switch for it."""
        if thinking == self.thinking:
            return self
        switched = copy(self)
        switched.thinking = thinking
        asked = Conversation((Message("user", ANCHOR),))
        if self.thinking_switch is None or switched.prompt(asked) == self.prompt(asked):
            text = f"the chat template cannot turn reasoning {'on' if thinking else 'off'}"
            raise Refused("thinking", text, "leave it as the run was trained")
        return switched

    def text_prompt(self, text: str) -> list[int]:
        """Ids of plain text to be continued: BOS if the tokenizer adds one, then the text."""
        start = [] if self.bos_id is None else [self.bos_id]
        if self.text_control == "read":
            self._refuse([text], _SURROGATES)
            text = text.removeprefix(self.decode(start))
        else:
            self._refuse([text], self._control)
        return [*start, *self._text_ids(text)]

    def _text_ids(self, text: str) -> list[int]:
        """Ids of a part of a plain text."""
        return self._encode(text)

    def plain(self, text: str) -> str:
        """``text`` without control tokens and lone surrogates: what is left can be a `text_prompt`."""
        while (left := self._control.sub("", text)) != text:  # what is left can make a new one
            text = left
        return text

    def answer(self, ids: Sequence[int]) -> str:
        """The text of generated ids up to the first end token, without what the template writes around words;
        other special tokens are written out."""
        end = next((place for place, token in enumerate(ids) if token in self.eos_ids), len(ids))
        return self.unframed(self.decode(ids[:end]))

    @property
    def writes_reasoning(self) -> bool:
        """Whether the template has a form of its own for the reasoning of an answer, or refuses it itself."""
        return False

    def opens(self, text: str) -> bool:
        """Whether a decoded answer may still be what the template writes before words, or reasoning that goes
        on."""
        return False

    def rows(
        self,
        example: formats.Example,
        *,
        learn: Learn = "all",
        prompt_weight: float = 0.0,
        cut: int | None = None,
        notes: Counter[str] | None = None,
    ) -> list[Row]:
        """One row if all answers fit into one rendering, else one for each learned answer.

        cut: drop the oldest turns of a row with more tokens than this, as far as that helps. notes: counts
        are added to it. Raises TemplateError with the example's source."""
        notes = Counter() if notes is None else notes
        try:
            self._require_form_of_reasoning(example)
            parts = self._parts(example, learn, cut, notes)
        except Refused as error:
            error.where = example.source
            raise
        label = label_of(example)
        rows = []
        for kind, group in parts:
            ids = np.array(group[-1].ids, dtype=np.int32)
            targets = np.full(len(ids), prompt_weight, dtype=np.float32)
            targets[0] = 0  # BOS, or a token with nothing before it
            for turn in group:
                targets[turn.start : len(turn.ids)] = 1
                notes.update(turn.notes)
            rows.append(Row(Tokens(ids, targets), example.source, example.id, group[-1].place, label, kind))
        return rows

    def _require_form_of_reasoning(self, example: formats.Example) -> None:
        """Raises Refused if the row has reasoning beside its answers, and the template would read it as
        words."""
        if REASONING_BESIDE in (remark.text for remark in example.remarks) and not self.writes_reasoning:
            raise Refused(
                "reasoning",
                "the row has reasoning beside an answer, and the template has no form for it",
                "data.reasoning: think learns it as <think> text before the answer, omit leaves it out",
            )

    def _parts(self, example: formats.Example, learn: Learn, cut: int | None, notes: Counter[str]) -> Parts:
        if isinstance(example, Document | formats.Completion):
            return [("completion", [self._text_turn(example)])]
        sides = (
            (example.chosen, example.rejected) if isinstance(example, Preference) else (example.conversation,)
        )
        first_notes: Counter[str] = Counter()
        try:
            parts = self._answers(example, learn, cut, first_notes)
        except Refused as error:
            first_notes = Counter()
            spoken = sum(len(_words_beside_calls(side)) for side in sides)
            if not spoken:
                raise
            parts = self._without_words(
                error, lambda: self._answers(cast(Any, without_words(example)), learn, cut, first_notes)
            )
            alone: Parts = []
            if self.words_beside_calls == "split":
                alone = self._words_alone(example, learn, cut, first_notes)
            done = Counter({_ALONE: len(alone), _LEFT_OUT: spoken - len(alone)})
            first_notes.update(+done)  # those above 0
            parts = alone + parts
        notes.update(first_notes)
        return parts

    def _answers(
        self, example: Demonstration | Judged | Preference, learn: Learn, cut: int | None, notes: Counter[str]
    ) -> Parts:
        if isinstance(example, Preference):
            return self._pair(example, learn, cut, notes)
        conversation = self._checked(example.conversation, notes)
        groups = self._groups(conversation, learned_places(conversation, learn, 0, notes))
        return [("completion", part) for group in groups for part in self._fit(conversation, group, cut)]

    def _without_words(self, refused: Refused, render: Callable[[], _Made]) -> _Made:
        """What ``render`` gives of turns that only call. Raises ``refused`` if they are refused too, and
        names the setting if it does not allow to leave words out."""
        try:
            made = render()
        except Refused:
            raise refused from None
        if self.words_beside_calls == "refuse":
            raise Refused(
                "words_beside_calls",
                "an assistant's turn has words and calls, and this format has one or the other",
                "template.words_beside_calls: drop_words leaves the words out, split learns them in a row of "
                "their own",
            ) from None
        return made

    def _words_alone(
        self, example: Demonstration | Judged | Preference, learn: Learn, cut: int | None, notes: Counter[str]
    ) -> Parts:
        """A row for the words of each learned turn that has words and calls."""
        if isinstance(example, Preference):
            text = "the sides of a pair cannot be split into words and calls"
            raise Refused("words_beside_calls", text, "template.words_beside_calls: drop_words")
        quiet = self._checked(calls_only(example.conversation), Counter())
        learned = learned_places(quiet, learn, 0, Counter())
        parts: Parts = []
        for place, message in _words_beside_calls(example.conversation).items():
            if place in learned:
                spoken = replace(quiet, messages=(*quiet.messages[:place], replace(message, calls=())))
                group = self._groups(spoken, [place])[0]
                parts += [("completion", part) for part in self._fit(spoken, group, cut)]
        return parts

    def _text_turn(self, example: Document | formats.Completion) -> Turn:
        """Plain text with its end token, learned from where the prompt ends."""
        text = isinstance(example, Document)
        before, after = ("", example.text) if text else (example.prompt, example.completion)
        marked = [match for match in map(self._in_text.search, (before, after)) if match is not None]
        if marked and self.text_control == "refuse":
            raise Refused(
                "text_control",
                f"the text holds {marked[0].group().strip()!r}, which is a control token",
                "write the row as messages; or data.text_control: read takes it as the token",
            )
        end = self.text_end
        if end is None:
            raise Refused(
                "end_token", "this tokenizer has no end token", "set eos_token in tokenizer_config.json"
            )
        if self.text_control == "read":  # both are added once
            after = after.removesuffix(self.decode([end]))
            if self.bos_id is not None and not before:
                after = after.removeprefix(self.decode([self.bos_id]))
        head = self.text_prompt(before)
        if not after or not (head or text):
            raise Refused("empty", "a completion or its context is empty", 'use {"text": …} for text alone')
        ids = self._continue(head, after, self.text_prompt(before + after))
        said = self._same(self._between(ids, len(head), len(ids)), after)
        bare = () if head else ("first token of a text not learned: nothing precedes it",)
        return Turn(0, [*ids, end], max(len(head), 1), said + bare)

    def _pair(self, pair: Preference, learn: Learn, cut: int | None, notes: Counter[str]) -> Parts:
        """Chosen and rejected, one row each, in the same context, learned from where they differ."""
        sides = [self._checked(side, notes) for side in (pair.chosen, pair.rejected)]
        same = [a == b for a, b in zip(*(side.messages for side in sides), strict=False)]
        part = [*same, False].index(False)
        learned = [learned_places(side, learn, part, notes) for side in sides]
        turns: list[list[Turn]] = []
        for start in (0, *_starts(sides[0], part)):
            groups = [self._groups(side, places, start) for side, places in zip(sides, learned, strict=True)]
            turns = [group[0] for group in groups]
            if (
                turns[0][0].ids[: turns[0][0].start] != turns[1][0].ids[: turns[1][0].start]
                or max(map(len, groups)) > 1
            ):
                raise _not_comparable(sides)
            if cut is None or all(len(side[-1].ids) <= cut for side in turns):
                break
        return list(zip(("chosen", "rejected"), turns, strict=True))

    def _groups(self, conversation: Conversation, learned: Sequence[int], start: int = 0) -> list[list[Turn]]:
        """The learned turns, grouped by row: together if each rendering begins with the one before, else each
        alone.

        start: the message that follows the system messages; older ones are left out.
        """
        if len(learned) >= MANY_ANSWERS:
            self._expect(_from(conversation, start, learned[-1] + 1))
        turns: list[Turn] = []
        shown = Shown("", 0)
        for place in learned:
            turn, shown = self._turn(conversation, place, start, shown)
            turns.append(turn)
        nested = all(later.ids[: len(turn.ids)] == turn.ids for turn, later in pairwise(turns))
        turns[0] = turns[0]._replace(notes=turns[0].notes + (SPLIT,) * (not nested) + (CUT,) * (start > 0))
        return [turns] if nested else [[turn] for turn in turns]

    def _fit(self, conversation: Conversation, group: list[Turn], cut: int | None) -> list[list[Turn]]:
        """The group without as many of its oldest turns as needed to fit; the answers left out get rows of
        their own.

        An answer that is too long even with its own user turn alone stays: the caller drops it."""
        if cut is None or len(group[-1].ids) <= cut:
            return [group]
        earlier, groups = group[:-1], [group[-1:]]
        for start in _starts(conversation, group[-1].place):
            shorter = self._groups(conversation, [turn.place for turn in group if turn.place > start], start)
            if all(len(part[-1].ids) <= cut for part in shorter):
                earlier, groups = [turn for turn in group if turn.place < start], shorter
                break
        return [*(self._fit(conversation, earlier, cut) if earlier else []), *groups]

    def _turn(self, conversation: Conversation, place: int, start: int, earlier: Shown) -> tuple[Turn, Shown]:
        """The answer ``messages[place]`` after the system messages and those from ``start`` on, checked.
        earlier: of an answer before it."""
        message = conversation.messages[place]
        before = _from(conversation, start, place)
        shown = replace(before, messages=(*before.messages, message))
        is_asked = bool(before.messages) and before.messages[-1].role in ("user", "tool")
        if not is_asked or not (message.calls or message.content.strip()):
            raise Refused(
                "answer", "an answer needs a turn of the user or a tool before it, and words or calls"
            )
        prompt, ids, said, wrote, text = self._answered(before, message)
        if ids[: len(prompt)] != prompt or ids[-1] not in self.eos_ids:
            raise Refused(
                "prefix",
                "a rendered answer must be its prompt, the answer and an end token",
                "this template shows another context in training than at inference",
            )
        bos = self.chat_bos_id
        if bos is not None and (ids[0] != bos or ids.count(bos) != 1):
            raise Refused("bos", f"{ids.count(bos)} BOS tokens; there must be one, at the start")
        notes = self._same(said, wrote) + (REASONED,) * bool(thought_of(message.content).reasoning)
        checked = earlier.messages if text.startswith(earlier.text) else 0
        for other in before.messages[checked:]:
            _present(other, text, history=True)
        _present(message, said, history=False)
        tools = [cast(dict[str, Any], tool)["function"] for tool in shown.tools]
        if tools and not (earlier.prompt and prompt[: len(earlier.prompt)] == [*earlier.prompt]):
            self.require_tools(shown.tools, prompt)
        if not all(_written(part, text) for part in _leaves(tools) if part not in SCHEMA_WORDS):
            notes += ("a declared tool is not written in full by the template",)
        if bos is None and self.bos_id is not None and self.bos_id not in ids:
            notes += ("no BOS: the tokenizer has one, the template writes none",)
        return Turn(place, ids, len(prompt), notes), Shown(text, len(shown.messages), prompt)

    def require_tools(self, tools: Sequence[JSON], prompt: list[int]) -> None:
        """Raises Refused if a tool is not named in the prompt; the answer may name it."""
        seen = self.decode(prompt)
        if missing := [name for name in layout.names(tools) if name not in seen]:
            raise Refused(
                "left_out",
                f"the template leaves out the declared tools ({', '.join(missing)})",
                "a model with this template cannot see them: describe them in the system message",
            )

    def _continue(self, prompt: list[int], rest: str, whole: list[int]) -> list[int]:
        """The ids of prompt and rest: ``whole`` (both encoded as one text) if it begins with the prompt, else
        the prompt and the ids of the segment, since inference never sees a token that spans the boundary."""
        if whole[: len(prompt)] == prompt:
            return whole
        anchored = self._text_ids(ANCHOR + rest)[len(self._encode(ANCHOR)) :]
        for segment in (self._text_ids(rest), anchored):
            ids = [*prompt, *segment]
            if plain(self._between(ids, len(prompt), len(ids))) == plain(rest):
                return ids
        raise Refused("boundary", "the tokens of the prompt and of the answer cannot be told apart")

    def _between(self, ids: Sequence[int], start: int, stop: int) -> str:
        """The text of ids[start:stop] as it decodes after the token before it; decoded alone, it may lose its
        first space."""
        first = max(start - 1, 0)
        before, both = self.decode(ids[first:start]), self.decode(ids[first:stop])
        return both[len(before) :] if both.startswith(before) else self.decode(ids[start:stop])

    def _same(self, said: str, words: str) -> tuple[str, ...]:
        """Notes on how the decoded tokens differ from the words. Raises Refused if the difference is not
        allowed."""
        if said == words:
            return ()
        if plain(said) == plain(words):
            return ("Unicode normalised by the tokenizer",)
        if plain(said.strip()) != plain(words.strip()):
            raise Refused(
                "words",
                f"the learned tokens read {said!r:.120}, the assistant's words are {words!r:.120}",
                "the template or the tokenizer changes the answer",
            )
        return (f"whitespace {'trimmed' if len(said) < len(words) else 'added'} by the template",)

    def _refuse_control(self, texts: Sequence[str]) -> None:
        self._refuse(texts, self._control)

    def _refuse(self, texts: Sequence[str], pattern: re.Pattern[str]) -> None:
        for match in filter(None, map(pattern.search, texts)):
            raise Refused(
                "not_text",
                f"a text holds {match.group()!a}, which this tokenizer does not read as text",
                "repair the encoding, or remove it from the text",
            )

    def _checked(self, conversation: Conversation, notes: Counter[str]) -> Conversation:
        """The conversation with an id for each call, and its id and name for each result. Raises Refused if a
        text cannot be encoded as text."""
        self._refuse_control([json_text(conversation.tools)])
        messages: list[Message] = []
        waiting: list[tuple[Call, str]] = []  # calls without a result, and their new ids
        for number, message in enumerate(conversation.messages):
            calls = message.calls
            self._refuse_control(
                [
                    *(thought_of(message.content) if message.role == "assistant" else [message.content]),
                    *(text for call in calls for text in (call.name, json_text(call.arguments))),
                ]
            )
            if calls:
                waiting = []
                for place, call in enumerate(calls):
                    key = call.id
                    if not key or (self.nine_letters and not re.fullmatch("[A-Za-z0-9]{9}", key)):
                        notes["tool call id made of nine letters and digits"] += 1
                        key = hashlib.sha256(f"{number}.{place} {call!a}".encode()).hexdigest()[:9]
                    waiting.append((call, key))
                message = replace(message, calls=tuple(replace(call, id=key) for call, key in waiting))
            elif message.role == "tool":
                name, wanted = message.name, message.call_id
                fits = [
                    pair for pair in waiting if wanted in (None, pair[0].id) and name in (None, pair[0].name)
                ]
                if not fits:
                    raise Refused(
                        "call_id",
                        f"a tool result (call id {wanted}) answers no open call",
                        "each result needs the id of a call just before it",
                    )
                waiting.remove(fits[0])
                message = replace(message, call_id=fits[0][1], name=fits[0][0].name)
            messages.append(message)
        return replace(conversation, messages=tuple(messages))


def render(
    examples: Sequence[formats.Example],
    renderer: Renderer,
    spec: TemplateSpec,
    length: int,
    progress: Callable[[int, int], None] | None = None,
) -> Rendered:
    """All rows of at most ``length`` tokens; what cannot be rendered is in ``dropped`` with its reason.

    Raises DataError if a row is longer and ``spec.too_long`` is refuse.
    """
    result, cut = Rendered([], [], Counter()), length if spec.too_long == "cut" else None
    long: list[formats.Dropped] = []
    for done, example in enumerate(examples, 1):
        rows: list[Row] = []
        if (at_least := tokens_at_least(example, renderer, length, cut is not None)) is not None:
            message = f"more than {at_least} tokens, the limit is {length}"
            long.append(formats.Dropped(example.source, "too_long", message, ""))
            if progress is not None:
                progress(done, len(examples))
            continue
        try:
            rows = renderer.rows(
                example, learn=spec.learn, prompt_weight=spec.prompt_weight, cut=cut, notes=result.notes
            )
        except Refused as error:
            refused = formats.Dropped(example.source, error.code, error.what, "", error.hint or "")
            result.dropped.append(refused)
        fits = [row for row in rows if len(row.tokens.ids) <= length]
        lengths = [len(row.tokens.ids) for row in rows if len(row.tokens.ids) > length]
        if isinstance(example, Preference) and lengths:  # a pair is kept or dropped as a whole
            lengths = [max(lengths)]
        for tokens in lengths:
            message = f"{tokens} tokens, the limit is {length}"
            long.append(formats.Dropped(example.source, "too_long", message, ""))
        if len(fits) == len(rows) or not isinstance(example, Preference):
            result.rows += fits
        if progress is not None:
            progress(done, len(examples))
    if long and spec.too_long == "refuse":
        listed = listing([f"{row.source}: {row.message}" for row in long])
        raise DataError(
            f"{len(long)} rows have more than {length} tokens:\n{listed}",
            hint="raise batch.length, or set template.too_long: drop or cut",
        )
    result.dropped += long
    return result


def _not_comparable(sides: Sequence[Conversation]) -> Refused:
    """What is said of a pair whose two sides have no prompt in common."""
    reasoned = [bool(thought_of(side.messages[-1].content).reasoning) for side in sides]
    if reasoned[0] != reasoned[1]:
        one, other = ("chosen", "rejected") if reasoned[0] else ("rejected", "chosen")
        message = f"{one} has reasoning and {other} has none: the template asks for them by different prompts"
        hint = "write it for both or for neither; data.reasoning: omit leaves out what stands beside answers"
        return Refused("pair", message, hint)
    return Refused("pair", "chosen and rejected do not diverge at an answer, or need more than one row each")


def _words_beside_calls(conversation: Conversation) -> dict[int, Message]:
    """The assistant's turns that have words and calls, by their places."""
    return {
        place: message
        for place, message in enumerate(conversation.messages)
        if message.calls and message.content.strip()
    }


def tokens_at_least(example: formats.Example, renderer: Renderer, length: int, cut: bool) -> int | None:
    """A number above ``length`` of which the row surely has more tokens, found without encoding all of it;
    None if it may have fewer, or if turns could be ``cut``.

    A text is encoded up to twice ``length`` tokens; a merge that crosses the end of the part changes few."""
    texts = _texts(example)
    if cut and not isinstance(example, Document | formats.Completion):
        return length if len(texts) > MOST_TURNS else None
    if len(texts) > length:  # each message has a token of its own
        return length
    longest = max(texts, key=len, default="")
    size = SURE * length
    while len(longest) > size:
        if (count := len(renderer.encoded_part(longest[:size]))) > 2 * length:
            return count // 2
        size *= 2
    return None


def _texts(example: formats.Example) -> list[str]:
    """The texts that each of its rows has, with all their words: an answer in the middle may be rendered
    without its reasoning, and later messages belong to later rows only."""
    if isinstance(example, Document):
        return [example.text]
    if isinstance(example, formats.Completion):
        return [example.prompt, example.completion]
    conversation = example.chosen if isinstance(example, Preference) else example.conversation
    messages = conversation.messages
    answers = [place for place, message in enumerate(messages) if message.role == "assistant"]
    end = answers[0] + (len(answers) == 1) if answers else None
    return ["" if message.calls else message.content for message in messages[:end]]


def learned_places(conversation: Conversation, learn: Learn, first: int, notes: Counter[str]) -> list[int]:
    """Places of the learned answers from ``first`` on. Raises Refused if there is none."""
    messages = conversation.messages
    answers = [place for place in range(first, len(messages)) if messages[place].role == "assistant"][
        -1 if learn == "last" else 0 :
    ]
    learned = [
        place
        for place in answers
        if messages[place].learn or (learn != "marked" and messages[place].learn is None)
    ]
    if learn != "marked":
        notes.update(["answer not learned: it says learn: false"] * (len(answers) - len(learned)))
    if not learned:
        raise Refused("no_target", "no answer to learn", "template.learn says which answers are learned")
    return learned


def _from(conversation: Conversation, start: int, end: int) -> Conversation:
    """The system messages, and the messages from ``start`` up to ``end``."""
    system = [older for older in conversation.messages[:start] if older.role == "system"]
    return replace(conversation, messages=(*system, *conversation.messages[start:end]))


def _starts(conversation: Conversation, before: int) -> list[int]:
    """Where a conversation can begin if its oldest turns are cut: user messages that follow an answer, oldest
    first."""
    roles = [message.role for message in conversation.messages]
    return [
        place
        for place in range(1, before)
        if roles[place] == "user" and roles[place - 1] in ("assistant", "tool")
    ]


def _present(message: Message, text: str, *, history: bool) -> None:
    """Raises Refused if words, a call's name or an argument are not in ``text``.

    A template may leave the reasoning out of answers that are history, and write a JSON result anew.
    """
    thought = thought_of(message.content) if message.role == "assistant" else Thought("", message.content)
    words = thought.words.strip()
    shown = [words.rpartition("</think>")[2].strip()] if history else [thought.reasoning.strip(), words]
    parts = [*shown, *_leaves([[call.name, call.arguments] for call in message.calls])]
    missing = [part for part in parts if not _written(part, text)]
    if missing and message.role == "tool":
        with suppress(ValueError):
            missing = [part for part in [json_text(json.loads(words))] if part not in text]
    if missing:
        raise Refused(
            "left_out",
            f"{missing[0]!r:.120} ({message.role}) is missing in the rendering",
            "the template cannot express this role or call: put it into the words",
        )


def _written(part: str, text: str) -> bool:
    """Whether ``part`` is in ``text``, as it is, normalised, or as JSON writes it."""
    return any(form in text for form in (part, plain(part), json_text(part)[1:-1], json.dumps(part)[1:-1]))


def _leaves(value: formats.JSON) -> list[str]:
    """Keys, strings and numbers at every depth; true, false and null are written differently by each
    template."""
    if isinstance(value, dict):
        return [part for key, inner in value.items() for part in (key, *_leaves(inner))]
    if isinstance(value, list | tuple):
        return [part for inner in value for part in _leaves(inner)]
    return [] if value is None or isinstance(value, bool) else [str(value)]


def plain(text: str) -> str:
    """``text`` in the Unicode form in which texts are compared."""
    return unicodedata.normalize("NFC", text)


def json_text(value: object) -> str:
    return json.dumps(value, ensure_ascii=False)


@lru_cache(maxsize=1024)
def thought_of(content: str) -> Thought:
    """The reasoning that stands in <think> marks before the words of an answer; the first mark may be
    missing, since some prompts end with it."""
    match = THOUGHT.fullmatch(content) or CONTINUED_THOUGHT.fullmatch(content)
    return Thought(match.group(1).strip("\n"), match.group(2)) if match else Thought("", content)


def digest(rules: int, *parts: object) -> str:
    return hashlib.sha256(repr((rules, *parts)).encode()).hexdigest()
