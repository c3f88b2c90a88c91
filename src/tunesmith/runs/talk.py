"""What does a run answer? ``generate`` and ``chat`` with a run, a checkpoint folder, or a plain model."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from tunesmith import events
from tunesmith.data import asking, layout
from tunesmith.data.asking import AskedAs
from tunesmith.data.examples import BadRow
from tunesmith.data.formats import JSON, Message
from tunesmith.engine.engine import notify_if_separate
from tunesmith.engine.generation import Chat, Sampling, Speaker
from tunesmith.engine.requests import MOST_ANSWER_TOKENS
from tunesmith.errors import ConfigError
from tunesmith.events import Notice, Sink
from tunesmith.runs import checkpoints, opening
from tunesmith.runs.asking import declared_tools, of_run
from tunesmith.runs.configure import listed
from tunesmith.runs.directory import VALID


def generate(
    target: str | Path,
    prompts: Sequence[str],
    *,
    checkpoint: str = "best",
    model: str | None = None,
    adapter: bool = True,
    system: str | None = None,
    tools: Sequence[JSON] = (),
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
    run's adapter. tools: declared in the prompts, as rows declare them. raw: continue the prompts as plain
    text."""
    source = opening.find(target, checkpoint, model=model, adapter=adapter, notify=notify)
    kind = _asked_as(source, raw, system, notify)
    declared = _declared(source, kind, tools, notify)
    speaker = _speaker(source, notify)
    before = [Message("system", system)] if system else []
    questions = [
        asking.question([*before, Message("user", prompt)], kind, declared) for prompt in listed(prompts)
    ]
    sampling = _sampling(max_tokens, temperature, top_p, seed)
    return speaker.answer(questions, sampling, events.ticker(notify, "answering"))


def chat(
    target: str | Path,
    *,
    checkpoint: str = "best",
    model: str | None = None,
    system: str | None = None,
    tools: Sequence[JSON] = (),
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
    run's model, if it was moved since training. tools: declared in the prompts, as rows declare them. raw:
    continue plain text."""
    source = opening.find(target, checkpoint, model=model, notify=notify)
    kind = _asked_as(source, raw, system, notify)
    declared = _declared(source, kind, tools, notify)
    speaker = _speaker(source, notify)
    sampling = _sampling(max_tokens, temperature, top_p, seed)
    return Chat(speaker, sampling, [Message("system", system)] if system else [], kind, declared)


def _asked_as(source: opening.Source, raw: bool, system: str | None, notify: Sink) -> AskedAs:
    """How the model is asked. Raises ConfigError for a system message that plain text cannot have."""
    kind: AskedAs = "text" if raw else "chat" if source.run is None else of_run(source.run)
    if kind == "text" and system:
        raise ConfigError("plain text has no system message", where="--system", hint="put it into the prompt")
    if kind != "chat" and not raw:
        words = {"text": "plain text", "instruct": "text under ### Instruction:"}[kind]
        notify(Notice(f"asked by {words}, as the run was trained"))
    return kind


def _declared(source: opening.Source, kind: AskedAs, tools: Sequence[JSON], notify: Sink) -> tuple[JSON, ...]:
    """The tools in OpenAI's form; a notice if there are none and rows of the run declare some. Raises
    ConfigError for tools without a name, or that plain text cannot declare."""
    if kind != "chat":
        if tools:
            raise ConfigError(
                "plain text declares no tools", where="--tools", hint="put them into the prompt"
            )
        return ()
    try:
        declared = layout.declared([*tools])
    except BadRow as bad:
        raise ConfigError(bad.located, where="--tools", hint=bad.hint or asking.HINT) from None
    if not declared and source.run is not None and (lists := declared_tools(source.run)):
        names = [*dict.fromkeys(name for tools in lists for name in layout.names(tools))]
        shown = ", ".join(names[:5]) + ", …" * (len(names) > 5)
        file = str(source.run.path / VALID) if len(lists) == 1 else "FILE, a JSON list of tools"
        text = f"no tools are declared to the model; rows of the run declare {shown}"
        notify(Notice(text, hint=f"--tools {file}"))
    return declared


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
