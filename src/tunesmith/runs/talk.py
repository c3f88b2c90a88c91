"""What does a run answer? ``generate`` and ``chat`` with a run, a checkpoint folder, or a plain model."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from tunesmith import events
from tunesmith.data.formats import Message
from tunesmith.engine import generation
from tunesmith.engine.engine import notify_if_separate
from tunesmith.engine.generation import Chat, Sampling, Speaker
from tunesmith.events import Notice, Sink
from tunesmith.runs import opening
from tunesmith.runs.configure import listed


def generate(
    target: str | Path,
    prompts: Sequence[str],
    *,
    checkpoint: str = "best",
    model: str | None = None,
    adapter: bool = True,
    system: str | None = None,
    max_tokens: int = 256,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
    notify: Sink = events.silent,
) -> list[str]:
    """One answer a prompt from a run, a checkpoint folder, or a plain model; batched.

    model: path of the run's model, if it was moved since training. adapter False: ask the model without the
    run's adapter."""
    speaker = _speaker(opening.find(target, checkpoint, model=model, adapter=adapter, notify=notify), notify)
    conversations = [generation.asked(prompt, system) for prompt in listed(prompts)]
    sampling = Sampling(max_tokens, temperature, top_p, seed)
    return speaker.answer(conversations, sampling, events.ticker(notify, "answering"))


def chat(
    target: str | Path,
    *,
    checkpoint: str = "best",
    model: str | None = None,
    system: str | None = None,
    max_tokens: int = 512,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
    notify: Sink = events.silent,
) -> Chat:
    """A conversation with a run, a checkpoint folder or a plain model: ``for piece in chat(run).say("Hello"):
    …``.

    model: path of the run's model, if it was moved since training."""
    speaker = _speaker(opening.find(target, checkpoint, model=model, notify=notify), notify)
    sampling = Sampling(max_tokens, temperature, top_p, seed)
    return Chat(speaker, sampling, [Message("system", system)] if system else [])


def _speaker(source: opening.Source, notify: Sink) -> Speaker:
    """The model, with its adapter attached, ready to answer."""
    opened = source.open(notify)
    notify_if_separate(opened.loaded.net, notify)
    opened.attach()
    if source.checkpoint:
        notify(Notice(f"checkpoint {source.checkpoint.name}"))
    opened.loaded.net.eval()
    return Speaker(opened.loaded.net, opened.renderer)
