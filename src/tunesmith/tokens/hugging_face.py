"""A Hugging Face tokenizer with its own chat template."""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Sequence
from contextlib import suppress
from datetime import UTC, datetime
from itertools import pairwise
from typing import TYPE_CHECKING, Any, NamedTuple, cast

from tunesmith.data.formats import JSON, Conversation, Message
from tunesmith.tokens.chat_templates import QUESTION, ChatTemplate, Choices
from tunesmith.tokens.pieces import hugging_face_bytes
from tunesmith.tokens.template import (
    SURROGATES,
    Answered,
    Refused,
    Renderer,
    digest,
    json_text,
    plain,
    thought_of,
)

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SPOKEN = Conversation(tuple(Message(role, "zq") for role in ("user", "assistant", "user", "assistant")))
RULES = 4  # part of every fingerprint: change it when unchanged data would give other ids or targets


MOST_PARTS = 4096
"""Parts of texts whose ids are kept."""
BLOCK = 512
"""Letters of two texts that are compared at once."""


class Encoded(NamedTuple):
    """A text and its ids. places: of the control tokens at which it is cut. sizes: how many ids stand before
    each of them."""

    text: str
    places: list[int]
    sizes: list[int]
    ids: list[int]

    def part_of(self, other: str, reach: int) -> Encoded:
        """The part of it, up to the beginning of a control token, that ``other`` begins with too.

        reach: length of the longest control token. Both texts are the same that far behind the end of the
        part, so that the same tokens are found up to there."""
        same = 0
        while same < len(self.text) and self.text[same : same + BLOCK] == other[same : same + BLOCK]:
            same += BLOCK
        count = bisect_right(self.places, min(same, len(self.text)) - reach)
        if not count:
            return Encoded("", [], [], [])
        size = self.sizes[count - 1]
        return Encoded("", self.places[:count], self.sizes[:count], self.ids[:size])


class Vocabulary:
    """The ids and texts of a Hugging Face tokenizer, and which of its tokens are control tokens."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = cast(Any, tokenizer)
        added = self.tokenizer.added_tokens_decoder
        special = {token.content for token in added.values() if token.special}
        special = (special | set(self.tokenizer.all_special_tokens)) - {""}  # which would match anywhere
        marks = [re.escape(text) for text in sorted(special, key=len, reverse=True)]
        self.in_text = re.compile("|".join(marks) or r"(?!)")
        self.control = re.compile("|".join((SURROGATES, *marks)))
        self.control_ids = frozenset(id for id, token in added.items() if token.special)
        self.size = max(len(self.tokenizer), *(id + 1 for id in added), 0)
        self._longest_start = 0
        self._starts = self._independent_starts(self.tokenizer.is_fast)
        self._known: dict[str, list[int]] = {}  # ids of parts that were encoded before
        self._last = Encoded("", [], [], [])
        self.bos: int | None = self.tokenizer.bos_token_id
        self.eos: int | None = self.tokenizer.eos_token_id
        self.unknown: int | None = self.tokenizer.unk_token_id
        opens = self.bos in self.tokenizer.encode("a")[:1] and self.bos not in self.encode("a")
        self.text_bos = self.bos if opens else None

    def decode(self, ids: Sequence[int]) -> str:
        return self.tokenizer.decode(
            [*map(int, ids)], skip_special_tokens=False, clean_up_tokenization_spaces=False
        )

    def token_bytes(self) -> list[bytes]:
        """Bytes of each token. Raises ModelError if they are not known."""
        return hugging_face_bytes(self.tokenizer, self.size)

    def encode(self, text: str) -> list[int]:
        """Ids of ``text``. A part that begins with a control token is encoded once: the context of an answer
        is the one of the answer before it, and more."""
        if self._starts is None:
            return self._encoded(text)
        known = self._last.part_of(text, self._longest_start)
        first = known.places[-1] if known.places else 0
        places = [match.start() for match in self._starts.finditer(text, first)]
        ids = known.ids
        if places and not known.places:
            ids = self._encoded(text[: places[0]]) if places[0] else []
        sizes: list[int] = []
        for start, end in pairwise([*places, len(text)]):
            sizes.append(len(ids))
            part = text[start:end]
            part_ids = self._known.get(part)  # another thread may clear what is known
            if part_ids is None:
                if len(self._known) >= MOST_PARTS:
                    self._known.clear()
                self._known[part] = part_ids = self._encoded(part)
            ids += part_ids
        if not places:
            return self._encoded(text)
        older = len(known.places) - bool(known.places)
        self._last = Encoded(text, known.places[:older] + places, known.sizes[:older] + sizes, [*ids])
        return ids

    def _encoded(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=False)

    def _independent_starts(self, is_fast: bool) -> re.Pattern[str] | None:
        """Control tokens at which a text can be cut, and its parts encoded each by itself; None if there are
        none. A fast tokenizer finds these before it normalises or splits what stands between them. It must
        not take white space from before them, and no other added token may reach across their beginning."""
        if not is_fast:
            return None
        added = list(self.tokenizer.added_tokens_decoder.items())
        texts = [token.content for _, token in added]
        starts = [
            token.content
            for id, token in added
            if token.special
            and not (token.normalized or token.lstrip or token.single_word)
            and self._encoded(token.content) == [id]
            and not any(_reaches_across(text, token.content) for text in texts)
        ]
        marks = sorted(starts, key=len, reverse=True)
        self._longest_start = len(marks[0]) if marks else 0
        return re.compile("|".join(map(re.escape, marks))) if marks else None

    @property
    def content(self) -> str:
        """Everything that decides which ids a text becomes."""
        if self.tokenizer.is_fast:
            return self.tokenizer.backend_tokenizer.to_str()
        return json_text(self.tokenizer.get_vocab())


def _reaches_across(text: str, mark: str) -> bool:
    """Whether ``text`` can stand in a text so that it begins before ``mark`` and ends in or behind it."""
    if mark[0] not in text[1:]:
        return False
    ends = (text[place:] for place in range(1, len(text)))
    return any(end.startswith(mark) or mark.startswith(end) for end in ends)


class HFRenderer(Renderer):
    """Prompts are those of the tokenizer's ``apply_chat_template``. ``thinking``: whether a prompt without an
    answer asks for reasoning. ``template``: None if it cannot be used."""

    nine_letters = False

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        choices: Choices | None = None,
        stops: Sequence[int] = (),
        *,
        thinking: bool = False,
    ) -> None:
        """stops: the end tokens that the model's generation_config.json names."""
        self._words = words = Vocabulary(tokenizer)
        self._tokenizer = words.tokenizer
        self._control, self._in_text = words.control, words.in_text
        self.text_end_id = words.eos
        self.unknown_id, self.control_ids = words.unknown, words.control_ids
        self.size, self.bos_id = words.size, words.text_bos
        self.thinking = thinking
        self._endings: dict[bool, str] = {}
        self._endless_calls = False
        self._tail = ""
        self._frames: dict[bool, tuple[str, str, str] | None] = {}
        known = () if words.eos is None else (words.eos,)
        self.eos_ids = tuple(dict.fromkeys((*known, *stops)))
        self.chat_bos_id: int | None = None
        self.template: ChatTemplate | None = None
        self._broken: Refused | None = None
        choices = choices or Choices({}, datetime.now(UTC).date(), False)
        try:
            if words.tokenizer.chat_template is None:
                raise Refused(
                    "no_chat_template",
                    "this tokenizer has no chat template",
                    "set data.instruction_layout: instruct",
                )
            self.template = ChatTemplate(tokenizer, choices)
            self._find_ends(self.template)
            self._frames = {thinking: self.template.frame(thinking=thinking) for thinking in (False, True)}
            self._tail = self._before_end((self._frames[False] or ("", "", ""))[2])
        except Refused as error:
            self._broken = error  # plain text can still be rendered
        parts = [words.tokenizer.chat_template, words.bos, self.eos_ids, choices.options]
        day = [str(choices.day)] if self.template and self.template.uses_date else []
        self.fingerprint = digest(RULES, words.content, *parts, *day)

    def needed_options(self, conversation: Conversation) -> dict[str, JSON]:
        return self.template.needed_options(conversation, thinking=self.thinking) if self.template else {}

    def decode(self, ids: Sequence[int]) -> str:
        return self._words.decode(ids)

    def token_bytes(self) -> list[bytes]:
        return self._words.token_bytes()

    def _encode(self, text: str) -> list[int]:
        return self._words.encode(text)

    def _find_ends(self, template: ChatTemplate) -> None:
        """The tokens that end an answer and those that end calls, and what is appended to a turn that the
        template leaves open until the next one begins."""
        ends, self._endings = self._ends_of_words(template)
        self.eos_ids = tuple(dict.fromkeys((*ends, *self.eos_ids)))
        with suppress(Refused):  # a template without calls
            self.eos_ids = tuple(dict.fromkeys((*self.eos_ids, *self._ends_of_calls(template))))
        bos, spoken = self._words.bos, template.text(SPOKEN, generate=False, thinking=False)
        # A BOS that opens every turn, as in some ChatML templates, does not mark the beginning.
        self.chat_bos_id = bos if bos is not None and self._encode(spoken).count(bos) == 1 else None

    def _ends_of_words(self, template: ChatTemplate) -> tuple[list[int], dict[bool, str]]:
        last, own, added = template.ending(calls=False)
        if run := self._run(last):
            known = [place for place, (token, _) in enumerate(run) if token in self.eos_ids]
            if known:
                return [token for token, _ in run[: 1 + known[-1]]], {}
            inside = template.inside()
            marks = [match.group() for match in self._control.finditer(own)]
            once = [mark for mark in marks if mark not in inside and marks.count(mark) == 1]
            return [self._id(once[0]) if once else run[0][0]], {}
        for token, text in self._run(added):
            if token in self.eos_ids:
                return [token], {False: added[: added.index(text) + len(text)]}
        raise Refused(
            "template",
            "the chat template ends an answer with no end token, and begins the next turn with none that "
            "stops generation",
            "if the model stops where the user's turn begins, name that token in generation_config.json "
            "(eos_token_id); else write a chat_template.jinja that ends answers with the eos_token",
        )

    def _ends_of_calls(self, template: ChatTemplate) -> list[int]:
        last, own, later = template.ending(calls=True)
        marks = [match.group() for match in self._control.finditer(last)]
        stops = [mark for mark in marks if self._id(mark) in self.eos_ids]
        written = own if own == last else later.partition(QUESTION)[0]
        if any(mark in written for mark in stops):
            return []
        added = later if own == last else later[len(own) :]
        for token, text in self._run(added):
            if token in self.eos_ids:
                self._endings[True] = added[: added.index(text) + len(text)]
                return []
        if own == last and marks and last.rstrip().endswith(marks[-1]):
            return [self._id(marks[-1])]
        if (ending := self._endings.get(False)) and ending in later:
            self._endings[True] = ending
        else:
            self._endless_calls = bool(stops)
        return []

    def _before_end(self, after: str) -> str:
        """What the template writes between words and their end token, if that is more than white space."""
        for match in self._control.finditer(after):
            if self._id(match.group()) in self.eos_ids:
                return after[: match.start()].strip()
        return ""

    def _id(self, text: str) -> int:
        return self._words.tokenizer.convert_tokens_to_ids(text)

    def _run(self, text: str) -> list[tuple[int, str]]:
        """The control tokens that ``text`` begins with, after white space."""
        run: list[tuple[int, str]] = []
        place = len(text) - len(text.lstrip())
        while match := self._control.match(text, place):
            run.append((self._id(match.group()), match.group()))
            place = match.end()
        return run

    @property
    def thinking_switch(self) -> str | None:
        """The variable of the template that turns thinking on and off, or None if there is none."""
        return None if self.template is None else self.template.forms.switch

    @property
    def writes_reasoning(self) -> bool:
        return self.template is not None and self.template.forms.reasoning != "words"

    def _require_template(self) -> ChatTemplate:
        if self.template is None or self._broken is not None:
            error = self._broken or Refused("template", "the chat template cannot be used")
            raise Refused(error.code, error.what, error.hint)
        return self.template

    def _prompt(self, conversation: Conversation) -> list[int]:
        template = self._require_template()
        return self._encode(template.text(conversation, generate=True, thinking=self.thinking))

    def _expect(self, conversation: Conversation) -> None:
        self._require_template().expect(conversation)

    def _answered(self, before: Conversation, answer: Message) -> Answered:
        template = self._require_template()
        segment = template.segment(before, answer)
        head, rest = segment
        prompt = self._encode(head)
        ids = self._continue(prompt, rest, self._encode(head + rest))
        if not any(token in self.eos_ids for token in ids[len(prompt) :]):
            rest += self._endings.get(bool(answer.calls), "")
            ids = self._continue(prompt, rest, self._encode(head + rest))
        first = next((place for place in range(len(prompt), len(ids)) if ids[place] in self.eos_ids), None)
        if first is None or (answer.calls and self._endless_calls):
            ended = "these calls" if answer.calls else "this answer"
            raise Refused(
                "end_token",
                f"no token ends {ended}: generation would not stop",
                "name the end token in generation_config.json, or write a chat_template.jinja that ends it",
            )
        said = self._between(ids, len(prompt), first)
        self._require_whole(answer, said, self._between(ids, first, len(ids)), ids[first])
        ending = rest.removeprefix(segment.rest)
        wrote = self._wrote(template, before, answer, said, ending)
        return Answered(prompt, ids[: self._last(ids, first) + 1], said, wrote, head + rest)

    def _last(self, ids: Sequence[int], first: int) -> int:
        """The last of the end tokens that stand together: Cohere ends the answer, then the turn."""
        last = place = first
        while place + 1 < len(ids) and ids[place + 1] in self.control_ids:
            place += 1
            last = place if ids[place] in self.eos_ids else last
        return last

    def _require_whole(self, answer: Message, said: str, left: str, end: int) -> None:
        """Raises Refused if a token that stops generation stands inside the answer."""
        thought = thought_of(answer.content)
        words = [thought.words.strip(), *(call.name for call in answer.calls)]
        if any(said.count(word) < words.count(word) and word in left for word in words if word):
            raise Refused(
                "end_token",
                f"{self.decode([end])!r} stops generation before the answer is whole",
                "write one call a turn, or leave the reasoning out",
            )

    def _wrote(
        self, template: ChatTemplate, before: Conversation, answer: Message, said: str, ending: str
    ) -> str:
        """What the learned tokens should read: words and reasoning as they are, between what the template
        writes around any words. An answer of calls alone is compared call by call."""
        content = answer.content
        if plain(said.strip()) == plain(content.strip()) or not content.strip():
            return content if content.strip() else said
        for expected in template.expected(before, answer):
            if plain(expected + ending).startswith(plain(said)):
                return said
        return content

    def opens(self, text: str) -> bool:
        if self.template is None or self._broken is not None:
            return False
        text = text.lstrip()
        for before, between, _ in filter(None, (self._frames.get(True), self._frames.get(False))):
            if before.strip().startswith(text):
                return bool(before.strip())
            marked = bool(between.strip()) and "</think>" not in between
            if marked and text.startswith(before.strip()) and between.strip() not in text:
                return True
        return False

    def unframed(self, text: str) -> str:
        """Reasoning that the template marks otherwise stands in <think> marks."""
        if self.template is None or self._broken is not None:
            return text
        sizes = range(len(self._tail), 0, -1)
        text = text[: -next((size for size in sizes if text.endswith(self._tail[:size])), 0) or None]
        before, between, _ = self._frames.get(True) or ("", "", "")
        if between and "</think>" not in between and text.lstrip().startswith(before.strip()):
            reasoning, mark, words = text.lstrip().removeprefix(before.strip()).partition(between.strip())
            if mark:
                return f"<think>\n{reasoning.strip()}\n</think>\n\n{words.lstrip()}"
        before = (self._frames.get(False) or ("", "", ""))[0]
        if before.strip() and text.lstrip().startswith(before.strip()):
            return text.lstrip().removeprefix(before.strip()).lstrip()
        return text
