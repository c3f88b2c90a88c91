"""The pieces of an answer, made of tokens as they come. There is no other way to read an answer: a whole one
is its pieces put together, so that it cannot differ from a stream.

The text of the tokens is that of `Renderer.answer`. It begins with the reasoning, if there is any; the rest
ends before the first stop text. In that rest calls are read as evaluation reads them (`checks.parsers`). A
call is delivered when it is complete. One with a problem is words: nothing that the model wrote is lost."""

from __future__ import annotations

import json
import secrets
import string
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

from tunesmith.checks.parsers import CallSpan, ParsedCall, Scan
from tunesmith.checks.schemas import takes
from tunesmith.data.formats import JSON
from tunesmith.engine.requests import NewToken
from tunesmith.serving.pieces import (
    AnswerEnded,
    CallArguments,
    CallBegun,
    EndReason,
    Logprobs,
    Piece,
    Reasoned,
    TokenLogprob,
    Usage,
    Words,
)
from tunesmith.tokens.growing import GrowingText
from tunesmith.tokens.template import Renderer

if TYPE_CHECKING:
    from jsonschema.protocols import Validator

OPENED, CLOSED = "<think>", "</think>"
LETTERS = string.ascii_letters + string.digits


class AnswerReading(NamedTuple):
    """How an answer is read. ``stop``: texts before which it ends. ``calls``: whether calls are delivered as
    calls. ``one_call``: the answer ends after the first. ``schemas``: of tools whose calls must fit them.
    ``tools``: those that the prompt declares.
    ``thinks``: the prompt has opened reasoning. ``reasoning``: whether it is told from words."""

    stop: tuple[str, ...] = ()
    calls: bool = False
    one_call: bool = False
    schemas: Mapping[str, Validator] = {}
    thinks: bool = False
    reasoning: bool = True
    tools: Sequence[JSON] = ()


def new_call_id() -> str:
    """Nine letters and digits, as Mistral's format wants them: every other takes them too."""
    return "".join(secrets.choice(LETTERS) for _ in range(9))


class Assembler:
    """Turns the tokens of one answer into pieces. ``over``: the last piece was made; more tokens are not
    wanted."""

    def __init__(
        self,
        renderer: Renderer,
        reading: AnswerReading,
        prompt_tokens: int = 0,
        new_id: Callable[[], str] = new_call_id,
    ) -> None:
        self.over = False
        self._renderer, self._new_id = renderer, new_id
        self._prompt_tokens, self._cached, self._n_tokens, self._n_reasoning = prompt_tokens, 0, 0, 0
        self._growing = GrowingText(renderer)
        self._text = ""  # of the answer, without what the template writes around words
        self._thoughts = _Thoughts(reading)
        self._stops = _StopTexts(reading.stop)
        self._spoken = _Spoken(reading)
        self._waiting: deque[tuple[int, TokenLogprob]] = deque()  # with where the text of the token begins

    def feed(self, token: NewToken) -> list[Piece]:
        """The pieces that are certain now."""
        if self.over:
            return []
        self._n_tokens += 1
        self._cached = max(self._cached, token.cached)
        if token.finish != "stop":
            if token.logprob is not None:
                entry = TokenLogprob(token.token, token.logprob, tuple(token.top))
                self._waiting.append((len(self._text), entry))
            self._growing.add(token.token)
        if token.finish is not None:
            self._growing.finish()
        return list(self._pieces(token.finish is not None, token.finish or "stop"))

    def _pieces(self, complete: bool, reason: EndReason) -> Iterator[Piece]:
        raw = self._growing.text
        if complete or not self._renderer.opens(raw):
            text = self._renderer.unframed(raw)
            # What the template writes behind words may be taken away when its first letters come.
            self._text = text if text.startswith(self._text) or complete else self._text
        thought = self._thoughts.read(self._text, complete)
        if thought:
            yield Reasoned(thought)
        if self._thoughts.words_at is None and not complete:
            self._n_reasoning = self._n_tokens * self._thoughts.begun
            yield from self._logprobs(len(self._text))
            return
        start = len(self._text) if self._thoughts.words_at is None else self._thoughts.words_at
        words = self._text[start:]
        end = self._stops.read(words, complete)
        complete = complete or self._stops.met is not None
        yield from self._logprobs(start + end, whole=complete and self._stops.met is None)
        yield from self._spoken.read(words[:end], complete, self._new_id)
        if complete or self._spoken.over:
            self.over = True
            yield AnswerEnded(self._reason(reason), self.usage, self._stops.met)

    def _reason(self, reason: EndReason) -> EndReason:
        """Why the answer ended, if ``reason`` is why its tokens did."""
        if reason == "length" and not (self._stops.met or self._spoken.over):
            return "length"
        return "tool_calls" if self._spoken.n_calls else "stop"

    @property
    def usage(self) -> Usage:
        """Up to now."""
        return Usage(self._prompt_tokens, self._n_tokens, self._cached, self._n_reasoning)

    def _logprobs(self, end: int, *, whole: bool = False) -> Iterator[Piece]:
        """Of the tokens whose text begins before ``end``, which is certain to be delivered. whole: of all."""
        ready: list[TokenLogprob] = []
        while self._waiting and (whole or not self._stops.texts or self._waiting[0][0] < end):
            ready.append(self._waiting.popleft()[1])
        if ready:
            yield Logprobs(tuple(ready))


class _Thoughts:
    """The reasoning at the beginning of an answer. ``begun``: there is some. ``words_at``: where the words
    begin; None while that is not known."""

    def __init__(self, reading: AnswerReading) -> None:
        self.begun = reading.thinks
        self.words_at: int | None = None if reading.reasoning else 0
        self._start = 0
        self._shown = 0

    def read(self, text: str, complete: bool) -> str:
        """The reasoning that is new."""
        if self.words_at is not None:
            return ""
        if not self.begun:
            rest = text.lstrip()
            if not rest.startswith(OPENED):
                self.words_at = None if OPENED.startswith(rest) and not complete else 0
                return ""
            self.begun, self._start = True, len(text) - len(rest) + len(OPENED)
        end = text.find(CLOSED, self._start)
        is_open = end < 0
        if is_open:
            end = len(text) if complete else len(text) - overlap(text[self._start :], [CLOSED])
        thought = text[self._start : end].lstrip("\n").rstrip("\n")
        if not is_open:
            after = text[end + len(CLOSED) :]
            if complete or after.strip("\n"):
                self.words_at = len(text) - len(after.lstrip("\n"))
        new, self._shown = thought[self._shown :], len(thought)
        return new


class _StopTexts:
    """Looks for the stop text that is complete first. ``met``: which that is."""

    def __init__(self, texts: Sequence[str]) -> None:
        self.texts = [text for text in texts if text]
        self.met: str | None = None
        self._read = 0

    def read(self, words: str, complete: bool) -> int:
        """Up to where ``words`` can be delivered."""
        found: list[tuple[int, int, str]] = []
        for text in self.texts:
            start = words.find(text, max(0, self._read - len(text) + 1))
            if start >= 0:
                found.append((start + len(text), start, text))
        self._read = len(words)
        if found:
            _, start, self.met = min(found)
            return start
        return len(words) if complete else len(words) - overlap(words, self.texts)


def overlap(text: str, marks: Sequence[str]) -> int:
    """How many letters at the end of ``text`` may be the beginning of one of ``marks``."""
    longest = min(len(text), max(map(len, marks), default=1) - 1)
    for size in range(longest, 0, -1):
        end = text[-size:]
        if any(len(mark) > size and mark.startswith(end) for mark in marks):
            return size
    return 0


class _Spoken:
    """Words and calls. White space beside calls is not delivered. ``n_calls``: delivered so far. ``over``: no
    more is wanted."""

    def __init__(self, reading: AnswerReading) -> None:
        self._reading = reading
        self._scan = Scan(reading.tools)
        self._done = 0
        self._held = ""  # white space, of which it is not known yet whether a call follows
        self._has_words = False
        self.n_calls = 0
        self.over = False

    def read(self, text: str, complete: bool, new_id: Callable[[], str]) -> Iterator[Piece]:
        if not self._reading.calls:
            if new := text[self._done :]:
                self._done = len(text)
                yield Words(new)
            return
        for span in self._scan.read(text, complete=complete):
            calls = self._deliverable(span)
            if not calls:
                continue
            yield from self._words(text[self._done : span.start])
            self._done = span.end
            for name, arguments in calls:
                yield CallBegun(self.n_calls, new_id(), name)
                yield CallArguments(self.n_calls, arguments)
                self.n_calls += 1
            if self._reading.one_call:
                self.over = True
                return
        yield from self._words(text[self._done : self._scan.settled])
        self._done = self._scan.settled
        if complete and self._held and not self.n_calls:
            yield Words(self._held)

    def _words(self, text: str) -> Iterator[Piece]:
        text = self._held + text
        if self.n_calls and not self._has_words:
            text = text.lstrip()
        words = text.rstrip()
        self._held = text[len(words) :]
        if words:
            self._has_words = True
            yield Words(words)

    def _deliverable(self, span: CallSpan) -> list[tuple[str, str]]:
        """Names and arguments of the calls; empty if one of them cannot be delivered."""
        calls: list[tuple[str, str]] = []
        for call in span.calls[:1] if self._reading.one_call else span.calls:
            arguments = self._arguments(call)
            if arguments is None or not call.name.isprintable():
                return []
            calls.append((call.name, arguments))
        return calls

    def _arguments(self, call: ParsedCall) -> str | None:
        """The arguments as strict JSON, or None if that cannot be, or the tool does not take them."""
        if call.problem is not None:
            return None
        schema = self._reading.schemas.get(call.name)
        if schema is not None and not takes(schema, call.arguments):
            return None
        try:
            text = json.dumps(call.arguments, ensure_ascii=False, allow_nan=False)
            text.encode()
        except UnicodeEncodeError:  # half of a character, as an escape
            return json.dumps(call.arguments)
        except (ValueError, RecursionError):  # a number beyond float64; read at one depth, not written at it
            return None
        return text
