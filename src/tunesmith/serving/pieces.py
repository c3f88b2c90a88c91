"""What an answer consists of, in the order in which it is delivered. The whole answer is its pieces, one
after the other."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal, TypeAlias

EndReason: TypeAlias = Literal["stop", "length", "tool_calls", "content_filter"]
"""OpenAI's names: ended by itself or at a stop text; as many tokens as were allowed; tools are called; a
guardrail."""


@dataclass(frozen=True, slots=True)
class Reasoned:
    """A part of the reasoning before the words, without the marks around it."""

    text: str


@dataclass(frozen=True, slots=True)
class Words:
    """A part of the answer that the user reads."""

    text: str


@dataclass(frozen=True, slots=True)
class CallBegun:
    """A call of a tool: its place among the calls of this answer, its id and the tool's name."""

    index: int
    id: str
    name: str


@dataclass(frozen=True, slots=True)
class CallArguments:
    """A part of the JSON text of the arguments of call ``index``."""

    index: int
    text: str


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """``logprob``: of the token, before temperature, penalties and constraints. ``top``: the likeliest tokens
    at its place, with theirs."""

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, slots=True)
class Logprobs:
    """Of generated tokens, in their order: those of reasoning and calls too, the end token not."""

    tokens: tuple[TokenLogprob, ...]


@dataclass(frozen=True, slots=True)
class Usage:
    """Numbers of tokens. ``cached``: of the prompt, taken from the prefix cache. ``answer``: all that were
    generated, end token and ``reasoning`` included."""

    prompt: int = 0
    answer: int = 0
    cached: int = 0
    reasoning: int = 0


@dataclass(frozen=True, slots=True)
class AnswerEnded:
    """The last piece. ``stop``: the stop text before which the answer was cut, or None if there was none."""

    reason: EndReason
    usage: Usage = Usage()
    stop: str | None = None


Piece: TypeAlias = Reasoned | Words | CallBegun | CallArguments | Logprobs | AnswerEnded


@dataclass(frozen=True, slots=True)
class MadeCall:
    """A complete call. ``arguments``: JSON text."""

    id: str
    name: str
    arguments: str


@dataclass(frozen=True, slots=True)
class WholeAnswer:
    """An answer that has ended."""

    reasoning: str
    words: str
    calls: tuple[MadeCall, ...]
    logprobs: tuple[TokenLogprob, ...]
    ended: AnswerEnded


def joined(pieces: Iterable[Piece]) -> WholeAnswer:
    """The answer that consists of ``pieces``, the last of which is `AnswerEnded`."""
    reasoning: list[str] = []
    words: list[str] = []
    begun: list[CallBegun] = []
    arguments: dict[int, str] = {}
    logprobs: list[TokenLogprob] = []
    ended: AnswerEnded | None = None
    for piece in pieces:
        match piece:
            case Reasoned(text):
                reasoning.append(text)
            case Words(text):
                words.append(text)
            case CallBegun():
                begun.append(piece)
            case CallArguments(index, text):
                arguments[index] = arguments.get(index, "") + text
            case Logprobs(tokens):
                logprobs += tokens
            case AnswerEnded():
                ended = piece
    assert ended is not None
    calls = tuple(MadeCall(call.id, call.name, arguments.get(call.index, "{}")) for call in begun)
    return WholeAnswer("".join(reasoning), "".join(words), calls, tuple(logprobs), ended)


PartKind: TypeAlias = Literal["reasoning", "words", "call", ""]


def part_of(piece: Piece) -> PartKind:
    """What ``piece`` is a part of; "" if of nothing that the user reads."""
    match piece:
        case Reasoned():
            return "reasoning"
        case Words():
            return "words"
        case CallBegun() | CallArguments():
            return "call"
        case _:
            return ""


def begins_part(piece: Piece, before: PartKind) -> bool:
    """Whether ``piece`` begins a new part after one of kind ``before``. Every call is a part of its own."""
    return isinstance(piece, CallBegun) or part_of(piece) != before


def parts(pieces: Iterable[Piece]) -> list[list[Piece]]:
    """The pieces of each part of an answer, in their order: of its reasoning, of words between calls, of each
    call."""
    runs: list[list[Piece]] = []
    for piece in pieces:
        if not part_of(piece):
            continue
        if not runs or begins_part(piece, part_of(runs[-1][0])):
            runs.append([])
        runs[-1].append(piece)
    return runs


def text_in(part: Iterable[Piece]) -> str:
    """The text of a part: words, reasoning, or arguments."""
    return "".join(piece.text for piece in part if isinstance(piece, Words | Reasoned | CallArguments))
