"""What does a run answer? ``generate`` and ``chat`` with a run, a checkpoint folder, or a plain model."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from tunesmith import events
from tunesmith.data import asking
from tunesmith.data.asking import AskedAs
from tunesmith.data.formats import Message
from tunesmith.engine.engine import notify_if_separate
from tunesmith.engine.generation import Chat, Sampling, Speaker
from tunesmith.engine.requests import MOST_ANSWER_TOKENS
from tunesmith.errors import ConfigError
from tunesmith.events import Notice, Sink
from tunesmith.runs import checkpoints, opening
from tunesmith.runs.asking import of_run
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
    raw: bool = False,
    notify: Sink = events.silent,
) -> list[str]:
    """One answer a prompt from a run, a checkpoint folder, or a plain model; batched. A run is asked as it
    was trained: in a chat, by plain text, or under the marks of an instruction.

    model: path of the run's model, if it was moved since training. adapter False: ask the model without the
    run's adapter. raw: continue the prompts as plain text."""
    source = opening.find(target, checkpoint, model=model, adapter=adapter, notify=notify)
    kind = _asked_as(source, raw, system, notify)
    speaker = _speaker(source, notify)
    before = [Message("system", system)] if system else []
    questions = [asking.question([*before, Message("user", prompt)], kind) for prompt in listed(prompts)]
    sampling = _sampling(max_tokens, temperature, top_p, seed)
    return speaker.answer(questions, sampling, events.ticker(notify, "answering"))


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
    raw: bool = False,
    notify: Sink = events.silent,
) -> Chat:
    """A conversation with a run, a checkpoint folder or a plain model: ``for piece in chat(run).say("Hello"):
    …``.

    A run is asked as it was trained; plain text is continued without the turns before it. model: path of the
    run's model, if it was moved since training. raw: continue plain text."""
    source = opening.find(target, checkpoint, model=model, notify=notify)
    kind = _asked_as(source, raw, system, notify)
    speaker = _speaker(source, notify)
    sampling = _sampling(max_tokens, temperature, top_p, seed)
    return Chat(speaker, sampling, [Message("system", system)] if system else [], kind)


def _asked_as(source: opening.Source, raw: bool, system: str | None, notify: Sink) -> AskedAs:
    """How the model is asked. Raises ConfigError for a system message that plain text cannot have."""
    kind: AskedAs = "text" if raw else "chat" if source.run is None else of_run(source.run)
    if kind == "text" and system:
        raise ConfigError("plain text has no system message", where="--system", hint="put it into the prompt")
    if kind != "chat" and not raw:
        words = {"text": "plain text", "instruct": "text under ### Instruction:"}[kind]
        notify(Notice(f"asked by {words}, as the run was trained"))
    return kind


def _sampling(max_tokens: int, temperature: float, top_p: float, seed: int) -> Sampling:
    if max_tokens > MOST_ANSWER_TOKENS:
        message = f"must be at most {MOST_ANSWER_TOKENS}, not {max_tokens}"
        raise ConfigError(message, where="max_tokens")
    return Sampling(max_tokens, temperature, top_p, seed)


def _speaker(source: opening.Source, notify: Sink) -> Speaker:
    """The model, with its adapter attached, ready to answer."""
    with checkpoints.held(source.checkpoint):
        opened = source.open(notify)
        notify_if_separate(opened.loaded.net, notify)
        opened.attach()
    if source.checkpoint:
        notify(Notice(f"checkpoint {source.checkpoint.name}"))
    opened.loaded.net.eval()
    return Speaker(opened.loaded.net, opened.renderer)
