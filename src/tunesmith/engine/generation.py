"""Answers of one model: to a batch of conversations, as a stream, or in a chat."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import mlx.nn as nn

from tunesmith.data.formats import Conversation, Message
from tunesmith.model import loading as model
from tunesmith.tokens import template


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn: ``temperature`` 0 is greedy; ``top_p`` keeps the likeliest tokens of that total
    share."""

    max_tokens: int = 256
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0


@dataclass(frozen=True)
class Speaker:
    net: nn.Module
    renderer: template.Renderer

    def answer(
        self,
        conversations: Sequence[Conversation],
        sampling: Sampling,
        tick: Callable[[int, int], None] | None = None,
    ) -> list[str]:
        """One answer a conversation, in order."""
        found = model.generate(
            self.net,
            [self.renderer.prompt(conversation) for conversation in conversations],
            max_tokens=sampling.max_tokens,
            eos_ids=self.renderer.eos_ids,
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            seed=sampling.seed,
            on_done=tick,
        )
        return [self.renderer.answer(answer.ids) for answer in found]

    def stream(self, conversation: Conversation, sampling: Sampling) -> Iterator[str]:
        """The answer in pieces; a character that is not complete yet waits for its last byte."""
        ids: list[int] = []
        shown = ""
        for token in model.stream(
            self.net,
            self.renderer.prompt(conversation),
            max_tokens=sampling.max_tokens,
            eos_ids=self.renderer.eos_ids,
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            seed=sampling.seed,
        ):
            ids.append(token)
            text = self.renderer.answer(ids)
            if text.startswith(shown) and not text.endswith("\ufffd"):
                yield text[len(shown) :]
                shown = text
        rest = self.renderer.answer(ids)
        if rest != shown:
            yield rest[len(shown) :]


@dataclass
class Chat:
    """A chat: ``say`` streams the answer and keeps both turns."""

    speaker: Speaker
    sampling: Sampling = Sampling()
    messages: list[Message] = field(default_factory=list)

    def say(self, text: str) -> Iterator[str]:
        self.messages.append(Message("user", text))
        pieces: list[str] = []
        for piece in self.speaker.stream(Conversation(tuple(self.messages)), self.sampling):
            pieces.append(piece)
            yield piece
        self.messages.append(Message("assistant", "".join(pieces)))


def asked(prompt: str, system: str | None) -> Conversation:
    messages = [Message("user", prompt)]
    return Conversation(tuple([Message("system", system), *messages] if system else messages))
