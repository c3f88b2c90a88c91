"""The chat template of a run in Ollama's language, found by asking the run's own renderer.

Neutral words are rendered in every place of a conversation; what stands between them is what the template
writes there. This holds for every template that writes the messages in their order and nothing that depends
on them: ChatML, Llama 3, Gemma, Phi 3 and 4, Mistral and others. What was found is tried on longer
conversations, and refused if it renders one of them otherwise."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tunesmith.data.examples import JSON, Conversation, Message
from tunesmith.errors import ExportError, TemplateError
from tunesmith.exports import go_templates
from tunesmith.tokens.template import Renderer

SYSTEM, FIRST, ANSWER, SECOND = "zq1s", "zq3f", "zq5a", "zq7n"
"""Words that no template writes."""


@dataclass(frozen=True)
class Marks:
    """What a template writes: ``head`` before the first question without a system message; ``opening`` and
    ``closing`` around a system message; ``answering`` between a question and its answer that is given, and
    ``asking`` between an answer and the next question; ``tail`` after the last question. ``late``: a system
    message stands before the last question, not before the first."""

    head: str
    answering: str
    asking: str
    tail: str
    opening: str | None = None
    closing: str = ""
    late: bool = False

    def template(self) -> str:
        """In Go's text/template."""
        head = _quoted(self.head)
        if self.opening is not None and not self.late:
            system = f"{_quoted(self.opening)}{{{{ .System }}}}{_quoted(self.closing)}"
            head = f"{{{{ if .System }}}}{system}{{{{ else }}}}{head}{{{{ end }}}}"
        question = "{{ .Content }}"
        if self.late:
            system = f"{_quoted(self.opening or '')}{{{{ $.System }}}}{_quoted(self.closing)}"
            question = f"{{{{ if and $last $.System }}}}{system}{{{{ end }}}}{question}"
        after = _quoted(self.answering)
        if self.answering != self.tail:
            after = f"{{{{ if $last }}}}{_quoted(self.tail)}{{{{ else }}}}{after}{{{{ end }}}}"
        return (
            f"{head}\n"
            "{{- range $i, $_ := .Messages }}\n"
            "{{- $last := eq (len (slice $.Messages $i)) 1 }}\n"
            '{{- if eq .Role "user" }}' + question + after + "\n"
            '{{- else if eq .Role "assistant" }}{{ .Content }}'
            f"{{{{ if not $last }}}}{_quoted(self.asking)}{{{{ end }}}}\n"
            "{{- end }}\n"
            "{{- end }}"
        )


def _quoted(text: str) -> str:
    """An action that writes ``text``. Quotes and braces are written as numbers, so that neither Go's marks
    nor a Modelfile's end inside it."""
    if not text:
        return ""
    written = "".join(
        letter if letter.isprintable() and letter not in '"\\{}' else f"\\u{ord(letter):04x}"
        for letter in text
    ).replace("\\u000a", "\\n")
    return f'{{{{ "{written}" }}}}'


def find(renderer: Renderer, tools: tuple[JSON, ...], bos: str) -> Marks:
    """The marks of the template of ``renderer`` with the same ``tools`` in every conversation. bos: the text
    of the token that llama.cpp writes before every prompt, or "". Raises ExportError if they do not render
    what the template does."""

    def text(*messages: tuple[str, str]) -> str:
        said = tuple(Message(role, content) for role, content in messages)
        return renderer.decode(renderer.prompt(Conversation(said, tools))).removeprefix(bos)

    user, again, answer = ("user", FIRST), ("user", SECOND), ("assistant", ANSWER)
    try:
        head, tail = _between(text(user), FIRST)
        begin, answering, asking, end = _between(text(user, answer, again), FIRST, ANSWER, SECOND)
    except TemplateError as error:
        raise _unknown(error.what) from error
    if (begin, end) != (head, tail):
        raise _unknown("it writes the first or the last turn of a longer conversation otherwise")
    marks = Marks(head, answering, asking, tail)
    try:
        opening, closing, _ = _between(text(("system", SYSTEM), user), SYSTEM, FIRST)
    except (TemplateError, ExportError):
        opening, candidates = None, [marks]
    else:
        candidates = [
            Marks(head, answering, asking, tail, opening, closing),
            Marks(head, answering, asking, tail, opening.removeprefix(head), closing, late=True),
        ]
    turns = [user, answer, again, answer, user]
    tried = [turns[:1], turns[:3], turns]
    if opening is not None:
        tried += [[("system", SYSTEM), *each] for each in tried]
    for candidate in candidates:
        if all(_rendered(candidate, each) == text(*each) for each in tried):
            return candidate
    raise _unknown("it does not write the messages one after the other")


def _between(text: str, *words: str) -> list[str]:
    """The parts of ``text`` around ``words``. Raises ExportError if one of them does not stand in it once."""
    parts: list[str] = []
    for word in words:
        if text.count(word) != 1:
            raise _unknown(f"it writes a message {text.count(word)} times")
        before, _, text = text.partition(word)
        parts.append(before)
    return [*parts, text]


def _rendered(marks: Marks, turns: Sequence[tuple[str, str]]) -> str:
    conversation = Conversation(tuple(Message(role, content) for role, content in turns))
    return go_templates.read(marks.template(), go_templates.request(conversation))


def _unknown(reason: str) -> ExportError:
    hint = "--to gguf, and serve it by llama-server --jinja, which reads the model's own template"
    return ExportError(f"ollama: the chat template has no counterpart in Ollama's: {reason}", hint=hint)
