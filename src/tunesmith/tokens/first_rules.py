"""The rules by which 0.1.0 rendered with a Hugging Face template, for runs that were made by them.

A resumed run must end in the same bytes: what 0.1.0 refused stays refused, and every other row has the ids
that it had. Only the date is that on which the run began, where 0.1.0 took each day's."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from datetime import date
from typing import TYPE_CHECKING

from tunesmith.data.formats import JSON, Conversation, Message
from tunesmith.tokens.chat_templates import dated, openai
from tunesmith.tokens.hugging_face import Vocabulary
from tunesmith.tokens.template import Answered, Refused, Renderer, digest

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

RULES = 2


class FirstRules(Renderer):
    """Prompts are those of the tokenizer's ``apply_chat_template``. An answer is its words and one end token;
    thinking is off if the template can turn it off, and reasoning is text."""

    nine_letters = False
    text_end_id = None  # the first of eos_ids ends plain text, too
    _in_text = re.compile(r"(?!)")

    def __init__(self, tokenizer: PreTrainedTokenizerBase, day: date) -> None:
        """day: the date that the template sees."""
        self._words = words = Vocabulary(tokenizer)
        self._control, self._day = words.control, day
        self.unknown_id, self.control_ids = words.unknown, words.control_ids
        self.size, self.bos_id = words.size, words.text_bos
        self.eos_ids = () if words.eos is None else (words.eos,)
        self._options: dict[str, bool] = {}
        self.chat_bos_id: int | None = None
        self._broken: Refused | None = None
        try:
            self._probe()
        except Refused as error:
            self._broken = error  # plain text can still be rendered
        parts = (words.content, words.tokenizer.chat_template, words.bos, self.eos_ids, self._options)
        self.fingerprint = digest(RULES, *parts)

    def _probe(self) -> None:
        """Finds the token that ends an answer, and whether thinking must be turned off so that an answer
        holds its words only."""
        roles = ("user", "assistant", "user", "assistant")
        spoken = Conversation(tuple(Message(role, f"zq{number}") for number, role in enumerate(roles)))
        for options in ({}, {"enable_thinking": False}):
            self._options = options
            head = self._text(replace(spoken, messages=spoken.messages[:3]), True)
            full = self._text(spoken, False)
            match = self._control.search(full, len(head))
            if match and full.startswith(head) and full[len(head) : match.start()].strip() == "zq3":
                end = self._words.tokenizer.convert_tokens_to_ids(match.group())
                self.eos_ids = tuple(dict.fromkeys((end, *self.eos_ids)))
                bos = self._words.bos
                self.chat_bos_id = bos if bos is not None and self._encode(full).count(bos) == 1 else None
                return
        raise Refused(
            "template",
            "the chat template does not render an answer as prompt, words and end token",
            "start a new run: later releases read more templates",
        )

    def needed_options(self, conversation: Conversation) -> dict[str, JSON]:
        return dict(self._options)  # they are set only if the template does not do without them

    def decode(self, ids: Sequence[int]) -> str:
        return self._words.decode(ids)

    def token_bytes(self) -> list[bytes]:
        return self._words.token_bytes()

    def _encode(self, text: str) -> list[int]:
        return self._words.encode(text)

    def unframed(self, text: str) -> str:
        return text

    def _text(self, conversation: Conversation, generate: bool) -> str:
        if self._broken is not None:
            raise Refused(self._broken.code, self._broken.what, self._broken.hint)
        if self._words.tokenizer.chat_template is None:
            raise Refused("no_chat_template", "this tokenizer has no chat template")
        messages, tools = openai(conversation)
        try:
            template = dated(self._words.tokenizer.get_chat_template(None, tools), self._day)
            return self._words.tokenizer.apply_chat_template(
                messages,
                tools=tools,
                chat_template=template,
                tokenize=False,
                add_generation_prompt=generate,
                **self._options,
            )
        except Exception as error:  # a template is a program, which may raise anything
            roles = " ".join(message.role for message in conversation.messages)
            raise Refused("template", f"the chat template refuses the roles {roles}: {error}") from error

    def _prompt(self, conversation: Conversation) -> list[int]:
        return self._encode(self._text(conversation, True))

    def _answered(self, before: Conversation, answer: Message) -> Answered:
        self._refuse_control([answer.content])
        shown = replace(before, messages=(*before.messages, answer))
        head, full = self._text(before, True), self._text(shown, False)
        prompt, whole = self._encode(head), self._encode(full)
        if not full.startswith(head):
            return Answered(prompt, whole, "", "", full)
        ids = self._continue(prompt, full[len(head) :], whole)
        end = next(
            (place for place in range(len(prompt), len(ids)) if ids[place] in self.eos_ids), len(ids) - 1
        )
        rest = full[len(head) :].partition(self.decode(ids[end : end + 1]))[0]
        wrote = rest if answer.calls else answer.content
        return Answered(prompt, ids[: end + 1], self._between(ids, len(prompt), end), wrote, full)
