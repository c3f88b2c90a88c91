"""Answers of one model: continuations of prompts, answers to a batch of conversations, a stream, a chat."""

from __future__ import annotations

from collections.abc import Container, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import mlx.nn as nn
import numpy as np

from tunesmith.data.asking import AskedAs, question
from tunesmith.data.formats import JSON, Conversation, Message
from tunesmith.engine import batching, caches, scoring
from tunesmith.engine.engine import READ_AT_ONCE, UNLIMITED, Engine
from tunesmith.engine.prefixes import Prefixes, common_length
from tunesmith.engine.requests import Finish, Request
from tunesmith.errors import TemplateError
from tunesmith.events import Tick
from tunesmith.machine import backend
from tunesmith.model import vocabulary
from tunesmith.tokens import template
from tunesmith.tokens.growing import GrowingText

IDLE_ON_CPU = 0.25
"""Share of a batch that may be rows that have ended, on a CPU: copies of keys and values are slow there."""
THIS_NET = "net"
"""Key of its prefixes: there are no others."""
UNBOUNDED = 1 << 62


class Generation(NamedTuple):
    """``ids``: what was generated, without the end token."""

    ids: list[int]
    finish: Finish


def generate(
    net: nn.Module,
    prompts: Sequence[Sequence[int]],
    *,
    max_tokens: int = 256,
    eos_ids: Sequence[int],
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
    batch_size: int = 16,
    on_done: Tick | None = None,
) -> list[Generation]:
    """One continuation a prompt, in the order of the prompts; ``batch_size`` of them at a time.

    temperature 0 is greedy. Otherwise each prompt draws from its own stream, a function of (seed, index of
    the prompt), and MLX's global random state is untouched. on_done: called after each that ends. Raises
    ModelError for an empty prompt."""
    requests = [
        Request(prompt, eos_ids, max_tokens, temperature, top_p, seed, index, digest=THIS_NET)
        for index, prompt in enumerate(prompts)
    ]
    finish: dict[int, Finish] = {}
    prefixes = Prefixes(UNBOUNDED, grows=False)
    idle = IDLE_ON_CPU if backend.setup().kind == "cpu" else 0.0
    with Engine(net, batch_size, prefill_tokens=UNLIMITED, prefixes=prefixes, idle=idle) as engine:
        numbers = engine.submit(requests)
        _read_beginning(net, prompts, prefixes)
        ids: dict[int, list[int]] = {number: [] for number in numbers}
        while tokens := engine.step():
            for number, token, end, *_ in tokens:
                if end != "stop":
                    ids[number].append(token)
                if end is not None:
                    finish[number] = end
                    if on_done is not None:
                        on_done(len(finish), len(prompts), _share(ids, finish, max_tokens))
    return [Generation(ids[number], finish[number]) for number in numbers]


def _share(ids: Mapping[int, Sequence[int]], finish: Container[int], max_tokens: int) -> float:
    """The share of all passes that is done, if what has not ended goes on to ``max_tokens``."""
    done = sum(max_tokens if number in finish else len(own) for number, own in ids.items())
    return done / (max_tokens * len(ids))


def _read_beginning(net: nn.Module, prompts: Sequence[Sequence[int]], prefixes: Prefixes) -> None:
    """Read once what all ``prompts`` begin with, if it pays."""
    first = np.asarray(prompts[0] if prompts else (), np.int32)
    # The last token of a prompt is read by the pass that chooses the first of the answer.
    common = min((common_length(first, np.asarray(prompt, np.int32)[:-1]) for prompt in prompts), default=0)
    if (len(prompts) - 1) * common < scoring.WORTH or not batching.batches(net):
        return
    layers = caches.new_cache(net, None)
    caches.read(net, first[:common], layers, READ_AT_ONCE)
    caches.fit(layers)
    prefixes.add(THIS_NET, first[:common].tolist(), layers)


def stream(
    net: nn.Module,
    prompt: Sequence[int],
    *,
    max_tokens: int = 256,
    eos_ids: Sequence[int],
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
) -> Iterator[int]:
    """The ids of ``generate([prompt])``, each as soon as it is known."""
    with Engine(net, 1, prefill_tokens=UNLIMITED) as engine:
        engine.submit([Request(prompt, eos_ids, max_tokens, temperature, top_p, seed)])
        while tokens := engine.step():
            yield from (token for _, token, end, *_ in tokens if end != "stop")


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
        self, questions: Sequence[Conversation | str], sampling: Sampling, tick: Tick | None = None
    ) -> list[str]:
        """One answer a question, in order: a conversation, or plain text to be continued."""
        answers = generate(
            self.net,
            self._prompts(questions),
            max_tokens=sampling.max_tokens,
            eos_ids=self.renderer.eos_ids,
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            seed=sampling.seed,
            on_done=tick,
        )
        return [self.renderer.answer(answer.ids) for answer in answers]

    def stream(self, question: Conversation | str, sampling: Sampling) -> Iterator[str]:
        """The answer in pieces; a character waits for its last byte, and words for the end of what the
        template writes before them."""
        growing, shown = GrowingText(self.renderer), ""
        for token in stream(
            self.net,
            self._prompts([question])[0],
            max_tokens=sampling.max_tokens,
            eos_ids=self.renderer.eos_ids,
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            seed=sampling.seed,
        ):
            growing.add(token)
            if self.renderer.opens(growing.text):
                continue
            text = self.renderer.unframed(growing.text)
            # What the template writes behind words may be taken away when its first letters come.
            if text.startswith(shown) and text != shown:
                yield text[len(shown) :]
                shown = text
        growing.finish()
        rest = self.renderer.unframed(growing.text)
        if rest != shown:
            yield rest[len(shown) :]

    def prompt(self, question: Conversation | str) -> list[int]:
        """Ids of the prompt. Raises TemplateError, also if the template leaves out the declared tools."""
        if isinstance(question, str):
            return self.renderer.text_prompt(question)
        ids = self.renderer.prompt(question)
        self.renderer.require_tools(question.tools, ids)
        return ids

    def _prompts(self, questions: Sequence[Conversation | str]) -> list[list[int]]:
        """Ids of the prompts. Raises ModelError if the model does not know one of their tokens."""
        prompts = [self.prompt(question) for question in questions]
        places = [f"prompt {place}" for place in range(len(prompts))]
        vocabulary.require_known(self.net, zip(places, prompts, strict=True), self.renderer.decode)
        return prompts


@dataclass
class Chat:
    """A chat: ``say`` streams the answer and keeps both turns. ``tools``: declared to the model, in OpenAI's
    form."""

    speaker: Speaker
    sampling: Sampling = Sampling()
    messages: list[Message] = field(default_factory=list)
    asked_as: AskedAs = "chat"
    tools: tuple[JSON, ...] = ()

    def say(self, text: str) -> Iterator[str]:
        """An answer that is not finished leaves neither turn. Raises TemplateError if the template cannot
        write the turns, such as an answer with the marks of a call."""
        turn = Message("user", text)
        pieces: list[str] = []
        try:
            for piece in self.speaker.stream(self._question([*self.messages, turn]), self.sampling):
                pieces.append(piece)
                yield piece
        except template.Refused as error:
            self._require_writable(turn)
            message = f"an earlier answer cannot stand in the prompt: {error.what}"
            raise TemplateError(message, hint="begin a new chat") from error
        self.messages += [turn, Message("assistant", "".join(pieces))]

    def _require_writable(self, turn: Message) -> None:
        """Raises TemplateError if ``turn`` cannot be written even without earlier answers."""
        system = [message for message in self.messages if message.role == "system"]
        self.speaker.prompt(self._question([*system, turn]))

    def _question(self, messages: Sequence[Message]) -> Conversation | str:
        return question(messages, self.asked_as, self.tools)
