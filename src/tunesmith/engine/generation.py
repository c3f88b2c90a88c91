"""A model that answers: a run, one of its checkpoints, or a plain model, with the renderer that trained
it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import mlx.nn as nn

from tunesmith import adapters, events
from tunesmith.adapters import merging
from tunesmith.data.formats import Conversation, Message
from tunesmith.errors import ConfigError, DataError
from tunesmith.events import Notice, Sink
from tunesmith.model import loading as model
from tunesmith.runs import checkpoints, manifest
from tunesmith.runs.directory import ADAPTER_CONFIG, CHECKPOINTS, MANIFEST, Run
from tunesmith.tokens import renderers, template


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
    """A conversation that goes on: ``say`` streams the answer and remembers both turns."""

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


def load(
    target: str | Path,
    checkpoint: str = "best",
    *,
    model_path: str | None = None,
    adapter: bool = True,
    notify: Sink = events.silent,
) -> Speaker:
    """The model of a run directory or of a checkpoint folder inside one, or a plain model (folder, GGUF file,
    hub id).

    checkpoint: best, last or a step, for a run. model_path: where the run's model lies now, if it was moved.
    adapter False: the run's base as it was before training."""
    path = Path(target)
    folder: Path | None = None
    if (path / MANIFEST).is_file():
        run = Run.open(path)
        folder = checkpoints.choose(run, checkpoint, notify) if adapter else None
    elif (path / ADAPTER_CONFIG).is_file():
        if path.resolve().parent.name != CHECKPOINTS:
            raise DataError(
                "is an adapter outside a run", where=str(path), hint="name its run directory, or a model"
            )
        run = Run.open(path.resolve().parent.parent)
        folder = checkpoints.choose(run, path.resolve().name) if adapter else None
    elif checkpoint != "best" or not adapter or model_path is not None:
        what = "a plain model has no checkpoint, no adapter to leave out, and no other place"
        raise ConfigError(what, where=str(path), hint="name a run")
    else:
        spec = model.ModelSpec(path=str(target))
        loaded = merging.load(spec, notify)
        return Speaker(loaded.net, renderers.load(loaded.path))
    config = run.settings(model_path)
    loaded = merging.load(config.model, notify)
    renderer = renderers.load(config.model.tokenizer or loaded.path, config.template.renderer)
    manifest.require_base(run, loaded.fingerprint, renderer.fingerprint)
    if folder is not None:
        adapters.load(loaded.net, folder)
        notify(Notice(f"checkpoint {folder.name}"))
    loaded.net.eval()
    return Speaker(loaded.net, renderer)
