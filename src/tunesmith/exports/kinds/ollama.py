"""A folder for ``ollama create``: the merged model as GGUF, and a Modelfile with the template that the run
was trained with, in Ollama's language, its end tokens and its system message."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import ClassVar

from tunesmith.data import formats
from tunesmith.data.examples import JSON, Conversation, Demonstration, Judged
from tunesmith.errors import ExportError, TemplateError
from tunesmith.evaluation.evaluate import IMITATED
from tunesmith.events import Event, Notice, Sink
from tunesmith.exports import go_templates, ollama_templates
from tunesmith.exports.kind import (
    ArtefactNotes,
    ForLlamaCpp,
    LlamaFiles,
    Reloaded,
    Tolerance,
    Tuned,
    refuse,
    register,
)
from tunesmith.exports.kinds.gguf import GGUFF16, GGUFQ40, GGUFQ80
from tunesmith.exports.kinds.gguf_mixes import GGUFQ4KM
from tunesmith.model.gguf.reading import Reader
from tunesmith.model.loading import ModelSpec
from tunesmith.runs.directory import VALID, Run
from tunesmith.tokens.template import Renderer

MODELFILE, QUOTES = "Modelfile", '"""'
CHECKED = 64
"""Prompts that are rendered by Ollama's template and compared."""
INSTEAD = "--to gguf, and serve it by llama-server --jinja, which reads the model's own template"


class _Ollama(ForLlamaCpp):
    """Abstract. ``gguf``: the kind of the model's file."""

    gguf: ClassVar[type[ForLlamaCpp]]
    has_own_template: ClassVar[bool] = True

    def require_installed(self) -> None:
        self.gguf().require_installed()

    def announcement(self, tuned: Tuned) -> str:
        model = self.gguf().announcement(tuned)
        return self.what if model == self.gguf.what else f"folder for ollama create: {model}"

    def accepts(self, tuned: Tuned) -> None:
        self.gguf().accepts(tuned)
        conversations = _conversations(tuned.run)
        ollama_templates.find(tuned.renderer, _tools(conversations), "")
        if not _prompts(conversations):
            what = "ollama: every row has calls or results of tools before its answer"
            raise refuse(f"{what}, which Ollama writes in another way", INSTEAD)

    def write(self, tuned: Tuned, folder: Path, notify: Sink) -> ArtefactNotes:
        notes = self.gguf().write(tuned, folder, notify)
        (model,) = folder.glob("*.gguf")
        conversations = _conversations(tuned.run)
        tools = _tools(conversations)
        marks = ollama_templates.find(tuned.renderer, tools, _bos(model, tuned.renderer))
        lines = [f"FROM ./{model.name}", f"TEMPLATE {QUOTES}{marks.template()}{QUOTES}"]
        lines += [f'PARAMETER stop "{text}"' for text in _stops(tuned.renderer, tuned.ends)]
        if (system := _system(conversations)) and _is_quotable(system):
            lines.append(f"SYSTEM {QUOTES}{system}{QUOTES}")
        (folder / MODELFILE).write_text("\n".join(lines) + "\n", encoding="utf-8")
        name = tuned.run.path.resolve().name.lower()
        remarks = [f"use: ollama create {name} -f Modelfile", *_remarks(conversations, marks.opening, tools)]
        if system and not _is_quotable(system):
            remarks.append(
                "the system message of the rows has quotes that a Modelfile cannot hold: give it with every "
                "request"
            )
        remarks += _unwritten_stops(tuned.renderer, tuned.ends)
        own = [remark for remark in notes.remarks if not remark.startswith("use:")]
        return notes._replace(remarks=(*remarks, *own))

    def llama_files(self, base: Callable[[], Tuned], folder: Path, work: Path) -> LlamaFiles:
        return self.gguf().llama_files(base, folder, work)

    def reload(self, folder: Path, source: ModelSpec, run: Run, notify: Sink) -> Reloaded:
        reloaded = self.gguf().reload(folder, source, run, notify)
        (model,) = folder.glob("*.gguf")
        remarks: list[str] = []
        problems = differing(folder / MODELFILE, model, reloaded.renderer, run, remarks)
        return reloaded._replace(problems=(*reloaded.problems, *problems), remarks=tuple(remarks))


def _conversations(run: Run) -> list[Conversation]:
    """Of the held-out rows, or of the training rows if none are held out. Raises ExportError if the run was
    not trained on conversations."""
    held_out, data = run.path / VALID, run.config.data
    if held_out.is_file() and held_out.stat().st_size:
        read = formats.read([str(held_out)], data.model_copy(update={"format": "auto"}))
    else:
        read = formats.read(list(data.train), data)
    examples = IMITATED.select(read.examples).examples
    conversations = [
        example.conversation for example in examples if isinstance(example, Demonstration | Judged)
    ]
    if not conversations:
        what = "ollama: the run was trained on plain text, for which Ollama has no template"
        raise refuse(what, "--to gguf")
    return conversations


def _tools(conversations: Sequence[Conversation]) -> tuple[JSON, ...]:
    """The tools that all conversations share. Raises ExportError if they differ."""
    tools = conversations[0].tools
    if any(conversation.tools != tools for conversation in conversations):
        what = "ollama: rows have different tools, which Ollama's template writes in another way than yours"
        raise refuse(what, INSTEAD)
    return tools


def _system(conversations: Sequence[Conversation]) -> str | None:
    """The system message that all conversations begin with."""
    texts = {
        "".join(message.content for message in conversation.messages[:1] if message.role == "system")
        for conversation in conversations
    }
    (text, *others) = texts
    return text if text and not others else None


def _is_quotable(text: str) -> bool:
    """Whether three quotes around ``text`` end where it ends."""
    return QUOTES not in text and not text.endswith('"')


def _stops(renderer: Renderer, ends: Sequence[int]) -> list[str]:
    """The texts of the end tokens that a line of a Modelfile can hold."""
    texts = [renderer.decode([token]) for token in ends]
    return [text for text in texts if _fits_a_line(text)]


def _fits_a_line(text: str) -> bool:
    return '"' not in text and len(text.splitlines()) == 1


def _unwritten_stops(renderer: Renderer, ends: Sequence[int]) -> list[str]:
    """A remark if the text of an end token cannot be written."""
    texts = [repr(text) for token in ends if not _fits_a_line(text := renderer.decode([token]))]
    if not texts:
        return []
    return [
        f"the Modelfile cannot hold the end tokens {', '.join(texts)} as stop (a quote, a line break, or no "
        "text): Ollama stops at them only if the GGUF file declares them"
    ]


def _prompts(conversations: Sequence[Conversation]) -> list[Conversation]:
    """What comes before each answer, without prompts that have calls or results of tools."""
    prompts: list[Conversation] = []
    for conversation in conversations:
        for place, message in enumerate(conversation.messages):
            before = conversation.messages[:place]
            plain = all(said.role != "tool" and not said.calls for said in before)
            if message.role == "assistant" and plain and before:
                prompts.append(Conversation(before, conversation.tools))
    return prompts[:CHECKED]


def _remarks(conversations: Sequence[Conversation], system: str | None, tools: tuple[JSON, ...]) -> list[str]:
    remarks: list[str] = []
    if system is None:
        remarks.append("the chat template knows no system message: Ollama leaves one out")
    if tools:
        remarks.append("the tools of the rows stand in the template: Ollama shows calls as text")
    turns = [message for conversation in conversations for message in conversation.messages]
    if any(message.role == "tool" for message in turns):
        remarks.append("results of tools cannot be given to it through Ollama")
    return remarks


def _bos(model: Path, renderer: Renderer) -> str:
    """The text of the token that llama.cpp writes before every prompt, or nothing."""
    fields = Reader(model).fields
    of = "tokenizer.ggml."
    spm = fields[f"{of}model"].contents() == "llama"
    adds = fields[f"{of}add_bos_token"].contents() if f"{of}add_bos_token" in fields else spm
    bos = fields.get(f"{of}bos_token_id")
    return renderer.decode([int(bos.contents())]) if adds and bos is not None else ""


def differing(modelfile: Path, model: Path, renderer: Renderer, run: Run, remarks: list[str]) -> list[str]:
    """Sentences if Ollama would give the model other ids for prompts of the rows than in training, another
    system message, or not stop at its end tokens. Adds to ``remarks`` why Go could not check it."""
    text = modelfile.read_text("utf-8")
    if f"TEMPLATE {QUOTES}" not in text:
        return ["the Modelfile has no TEMPLATE"]
    template = text.partition(f"TEMPLATE {QUOTES}")[2].partition(QUOTES)[0]
    conversations = _conversations(run)
    problems = _other_settings(text, renderer, _system(conversations))
    prompts, bos = _prompts(conversations), _bos(model, renderer)
    notices: list[Event] = []
    try:
        rendered = go_templates.render(template, prompts, notices.append)
        expected = [renderer.prompt(prompt) for prompt in prompts]
    except (ExportError, TemplateError) as error:
        return [*problems, f"Ollama's template: {error.what}"]
    remarks += [notice.what for notice in notices if isinstance(notice, Notice)]
    reader = "Go" if go_templates.has_go() and not notices else "tunesmith's reading of Go"
    actual = [renderer.encoded_part(bos + text) for text in rendered]
    wrong = sum(ids != others for ids, others in zip(actual, expected, strict=True))
    if not wrong:
        return problems
    double = bos and any(each.startswith(bos) for each in rendered)
    reason = ": its template begins with the token that Ollama writes already" if double else ""
    return [
        *problems,
        f"other ids: Ollama's template gives {wrong} of {len(prompts)} prompts other ids, by "
        f"{reader}{reason}",
    ]


def _other_settings(modelfile: str, renderer: Renderer, system: str | None) -> list[str]:
    """Sentences if the Modelfile has another system message than the rows, or lacks an end token."""
    problems: list[str] = []
    (_, own, after) = modelfile.partition(f"\nSYSTEM {QUOTES}")
    written = after.partition(f"{QUOTES}\n")[0] if own else None
    if written != (system if system and _is_quotable(system) else None):
        problems.append("the Modelfile has another system message than the rows")
    stops = set(re.findall(r'^PARAMETER stop "(.*)"$', modelfile, re.M))
    if missing := set(_stops(renderer, renderer.eos_ids)) - stops:
        problems.append(f"the Modelfile does not stop at {', '.join(sorted(missing))}")
    return problems


@register
class Ollama(_Ollama):
    name: ClassVar[str] = "ollama"
    what: ClassVar[str] = "folder for ollama create, 8.5 bits a weight"
    tolerance: ClassVar[Tolerance] = GGUFQ80.tolerance
    more_precise: ClassVar[str | None] = "ollama-f16"
    gguf: ClassVar[type[ForLlamaCpp]] = GGUFQ80


@register
class OllamaF16(_Ollama):
    name: ClassVar[str] = "ollama-f16"
    what: ClassVar[str] = "folder for ollama create, in float16"
    tolerance: ClassVar[Tolerance] = GGUFF16.tolerance
    gguf: ClassVar[type[ForLlamaCpp]] = GGUFF16


@register
class OllamaQ40(_Ollama):
    name: ClassVar[str] = "ollama-q4_0"
    what: ClassVar[str] = "folder for ollama create, 4.5 bits a weight"
    tolerance: ClassVar[Tolerance] = GGUFQ40.tolerance
    more_precise: ClassVar[str | None] = "ollama"
    gguf: ClassVar[type[ForLlamaCpp]] = GGUFQ40


@register
class OllamaQ4KM(_Ollama):
    name: ClassVar[str] = "ollama-q4_k_m"
    what: ClassVar[str] = "folder for ollama create, about 4.9 bits a weight, with an importance matrix"
    tolerance: ClassVar[Tolerance] = GGUFQ4KM.tolerance
    more_precise: ClassVar[str | None] = "ollama"
    gguf: ClassVar[type[ForLlamaCpp]] = GGUFQ4KM
