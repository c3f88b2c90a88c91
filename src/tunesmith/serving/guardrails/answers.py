"""Screens what clients ask and what they are answered, by the guardrails of the server.

Words and reasoning are held back until a window of them is clean. A call of a tool is held back until it is
complete: its arguments are screened as the values that the tool would get, not as JSON text."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace

from tunesmith.data.formats import JSON, Conversation
from tunesmith.errors import ServeError
from tunesmith.serving.guardrails.guardrail import WHOLE, Detection, Guardrail
from tunesmith.serving.guardrails.screening import TextScreen, screened
from tunesmith.serving.pieces import AnswerEnded, CallArguments, CallBegun, Logprobs, Piece, Reasoned, Words
from tunesmith.serving.question import Question

ASKED = ("user", "tool")
"""Roles whose texts are screened in a prompt: the others are the developer's and the model's own."""
Report = Callable[[Detection], None]


class PromptBlocked(ServeError):
    """The prompt is not let through."""


class Guard:
    """The guardrails of a server. ``report`` is called with every detection, for the metrics."""

    def __init__(self, guardrails: Sequence[Guardrail] = (), report: Report = lambda detection: None) -> None:
        self._guardrails = tuple(guardrails)
        self._inputs = [guardrail for guardrail in guardrails if guardrail.input != "off"]
        self._report = report

    @property
    def withholds(self) -> bool:
        """Whether a part of an answer may be withheld. Log-probabilities would disclose it."""
        return any(guardrail.output in ("redact", "block") for guardrail in self._guardrails)

    def screen_question(self, question: Question) -> Question:
        """The question as it may be asked. Raises PromptBlocked."""
        if question.logprobs is not None and self.withholds:
            raise PromptBlocked(
                "log-probabilities are refused: they would disclose what a guardrail withholds"
            )
        prompt = question.prompt
        if not isinstance(prompt, Conversation):
            return replace(question, prompt=self.screen_text(prompt))
        messages = tuple(
            replace(message, content=self._screened(message.content)) if message.role in ASKED else message
            for message in prompt.messages
        )
        return replace(question, prompt=replace(prompt, messages=messages))

    def screen_text(self, prompt: str | tuple[int, ...]) -> str | tuple[int, ...]:
        """A prompt without roles as it may be asked. Raises PromptBlocked."""
        if isinstance(prompt, str):
            return self._screened(prompt)
        if self._inputs:
            raise PromptBlocked("a prompt of token ids cannot be screened by the guardrails: send text")
        return prompt

    def _screened(self, text: str) -> str:
        shown, blocked = screened(text, self._inputs, "input", self._report)
        if blocked is not None:
            message = f"the guardrail {blocked.guardrail} does not let this prompt through"
            raise PromptBlocked(f"{message} ({blocked.kind})")
        return shown

    def screen_answer(self) -> AnswerScreen:
        """A screen for one answer."""
        return AnswerScreen(self._guardrails, self._report)


class AnswerScreen:
    """Screens the pieces of one answer."""

    def __init__(self, guardrails: Sequence[Guardrail], report: Report) -> None:
        self._report = report
        output = [guardrail for guardrail in guardrails if guardrail.output != "off"]
        self._anywhere = [rail for rail in output if not rail.opening and rail.reach() != WHOLE]
        self._withholds = any(rail.output in ("redact", "block") for rail in output)
        self._words = TextScreen(output, "output", self._report)
        self._reasoning = TextScreen(self._anywhere, "output", self._report)
        self._open: type[Piece] | None = None
        self._call: CallBegun | None = None
        self._arguments: list[str] = []
        self._called = False
        self.blocked: Detection | None = None
        """What blocked the answer. The caller ends the generation then, and delivers the last piece,
        ``AnswerEnded("content_filter")``, with the usage that it knows."""

    def feed(self, piece: Piece) -> list[Piece]:
        """The pieces that may be delivered now."""
        if self.blocked is not None:
            return []
        delivered: list[Piece] = []
        begins = isinstance(piece, CallBegun) or type(piece) is not self._open
        if begins and not isinstance(piece, CallArguments | Logprobs):
            delivered += self._close(final=isinstance(piece, AnswerEnded))
        if self.blocked is not None:
            pass
        elif isinstance(piece, Words):
            delivered += _words(self._words.feed(piece.text))
            self.blocked = self._words.blocked
        elif isinstance(piece, Reasoned):
            delivered += _reasoned(self._reasoning.feed(piece.text))
            self.blocked = self._reasoning.blocked
        elif isinstance(piece, CallBegun):
            self._call, self._arguments, self._called = piece, [], True
        elif isinstance(piece, CallArguments):
            self._arguments.append(piece.text)
        if isinstance(piece, CallBegun | CallArguments | Logprobs) and not self._withholds:
            delivered.append(piece)
        elif isinstance(piece, AnswerEnded) and self.blocked is None:
            delivered.append(piece)
        if not isinstance(piece, CallArguments | Logprobs):
            self._open = type(piece)
        return delivered

    def _close(self, final: bool) -> list[Piece]:
        """What may be delivered of the text or call that ends here. final: the answer ends too."""
        if self._call is not None:
            call, self._call = self._call, None
            return self._closed_call(call, "".join(self._arguments))
        delivered: list[Piece] = []
        if self._open is Reasoned:
            delivered += _reasoned(self._reasoning.end())
            self.blocked = self._reasoning.blocked
        # Complete texts are judged only if they are the whole answer: beside a call they are not.
        ends = final and not self._called
        if self.blocked is None and (self._open is Words or ends):
            delivered += _words(self._words.end() if ends else self._words.pause())
            self.blocked = self._words.blocked
        return delivered

    def _closed_call(self, call: CallBegun, arguments: str) -> list[Piece]:
        blocked: list[Detection] = []

        def clean(text: str) -> str:
            shown, detection = screened(text, self._anywhere, "output", self._report)
            blocked.extend([detection] if detection is not None else [])
            return shown

        try:
            values: JSON = json.loads(arguments)
        except (ValueError, RecursionError):
            cleaned = clean(arguments)
        else:
            cleaned_values = mapped(values, clean)
            cleaned = (
                arguments if cleaned_values == values else json.dumps(cleaned_values, ensure_ascii=False)
            )
        if blocked:
            self.blocked = blocked[0]
        if blocked or not self._withholds:  # withheld, or delivered before
            return []
        return [call, CallArguments(call.index, cleaned)] if cleaned else [call]


def _words(text: str) -> list[Piece]:
    return [Words(text)] if text else []


def _reasoned(text: str) -> list[Piece]:
    return [Reasoned(text)] if text else []


def mapped(value: JSON, clean: Callable[[str], str]) -> JSON:
    """``value`` with ``clean`` applied to its texts, names of keys too."""
    if isinstance(value, str):
        return clean(value)
    if isinstance(value, dict):
        return {clean(key): mapped(item, clean) for key, item in value.items()}
    if isinstance(value, list):
        return [mapped(item, clean) for item in value]
    return value
