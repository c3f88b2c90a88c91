"""What users say of answers: ``votes.jsonl``, one vote a line, with the prompt and the answers; and the
answers that may still be voted on.

A vote is on one answer (up or down) or on two answers to one prompt (which is preferred, or neither). A later
vote of the same user on the same answers replaces the earlier one; a vote without a user counts as one of
the request's user, or, if that named none either, of one user for all such votes. The file is only appended
to, by any number of processes; it names users by a hash."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal, TypeAlias

from tunesmith.data.examples import content_of
from tunesmith.data.formats import JSON, Call, Conversation, Demonstration, Message
from tunesmith.errors import DataError, ServeError
from tunesmith.files import parse_json
from tunesmith.serving.pieces import Piece, joined
from tunesmith.serving.question import prompt_size

VERSION = 1
VOTES = "votes.jsonl"
"""In the folder of a run, or elsewhere if the user says so."""
Verdict: TypeAlias = Literal["up", "down", "first", "second", "tie"]
THUMBS: tuple[Verdict, ...] = ("up", "down")
REMEMBERED = 10_000
"""Answers that can be voted on: the newest, and at most `REMEMBERED_CHARACTERS` of them."""
REMEMBERED_CHARACTERS = 64_000_000
_APPENDED = os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC
_HINT = "every line is a vote that tunesmith serve wrote; take the line out if it was edited"


@dataclass(frozen=True)
class VotedAnswer:
    """``message``: as in a row of messages. ``digest``: of the base and the adapter that answered."""

    id: str
    model: str
    digest: str
    message: JSON


@dataclass(frozen=True)
class Vote:
    """A line of the file. ``test``: the A/B test whose name was asked. ``blind``: the user could not see
    which model answered. ``user``: a hash, or None if the client named none."""

    time: str
    verdict: Verdict
    prompt: list[JSON]
    tools: list[JSON]
    answers: list[VotedAnswer]
    test: str | None = None
    blind: bool = False
    user: str | None = None
    version: Literal[1] = VERSION

    @property
    def key(self) -> tuple[str | None, ...]:
        """Votes with the same key replace each other."""
        return (self.user, *sorted(answer.id for answer in self.answers))


@dataclass(frozen=True)
class RememberedAnswer:
    """An answer that can be voted on. ``test``: as of `Vote`. ``user``: as the request named them."""

    id: str
    conversation: Conversation
    message: Message
    model: str
    digest: str
    test: str | None = None
    user: str | None = None


class UnknownAnswer(ServeError):
    """No answer that can still be voted on has this id."""


class RememberedAnswers:
    """The newest answers of a server. Used on the event loop only."""

    def __init__(self, most: int = REMEMBERED, characters: int = REMEMBERED_CHARACTERS) -> None:
        self._most, self._characters = most, characters
        self._answers: OrderedDict[str, tuple[RememberedAnswer, int]] = OrderedDict()
        self._held = 0

    def add(self, answer: RememberedAnswer) -> None:
        asked = answer.conversation
        size = prompt_size(replace(asked, messages=(*asked.messages, answer.message)))
        self._discard(answer.id)
        self._answers[answer.id] = answer, size
        self._held += size
        while len(self._answers) > self._most or (self._held > self._characters and len(self._answers) > 1):
            self._discard(next(iter(self._answers)))

    def get(self, answer_id: str) -> RememberedAnswer:
        """Raises UnknownAnswer."""
        if answer_id not in self._answers:
            raise UnknownAnswer(
                f"no answer that can be voted on has the id {answer_id[:100]!r}",
                hint=f"at most the newest {self._most:,} answers to conversations can be voted on",
            )
        return self._answers[answer_id][0]

    def _discard(self, answer_id: str) -> None:
        _, size = self._answers.pop(answer_id, (None, 0))
        self._held -= size


def message_of(pieces: Iterable[Piece]) -> Message:
    """The answer as a message of its conversation, without the reasoning before it."""
    answer = joined(pieces)
    calls = tuple(Call(call.name, _parsed(call.arguments), call.id) for call in answer.calls)
    return Message("assistant", answer.words, calls)


def _parsed(arguments: str) -> JSON:
    try:
        return json.loads(arguments)
    except (ValueError, RecursionError):
        return arguments


def thumb(answer: RememberedAnswer, up: bool, user: str | None = None) -> Vote:
    """A vote on one answer."""
    return _vote("up" if up else "down", [answer], user)


def preference(
    first: RememberedAnswer,
    second: RememberedAnswer,
    verdict: Literal["first", "second", "tie"],
    user: str | None = None,
) -> Vote:
    """A vote on two answers. Raises ServeError if they do not answer the same prompt."""
    if first.conversation != second.conversation:
        raise ServeError("the two answers do not answer the same prompt")
    if first.id == second.id:
        raise ServeError("the two answers are the same answer")
    return _vote(verdict, [first, second], user)


def _vote(verdict: Verdict, answers: Sequence[RememberedAnswer], user: str | None) -> Vote:
    first = answers[0]
    row = content_of(Demonstration(first.conversation))
    messages, tools = row["messages"], row.get("tools", [])
    tests = {answer.test for answer in answers}
    return Vote(
        datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z"),
        verdict,
        list(messages) if isinstance(messages, list) else [],
        list(tools) if isinstance(tools, list) else [],
        [
            VotedAnswer(answer.id, answer.model, answer.digest, _message_row(answer.message))
            for answer in answers
        ],
        tests.pop() if len(tests) == 1 else None,
        all(answer.test is not None for answer in answers),
        _hashed(user or first.user),
    )


def _message_row(message: Message) -> JSON:
    messages = content_of(Demonstration(Conversation((message,))))["messages"]
    assert isinstance(messages, list)
    return messages[0]


def _hashed(user: str | None) -> str | None:
    return hashlib.sha256(user.encode("utf-8", "surrogatepass")).hexdigest()[:16] if user else None


def require_writable(path: Path) -> None:
    """Raises ServeError if votes cannot be written to ``path``, which is made if it is missing."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        os.close(os.open(path, _APPENDED, 0o600))
    except OSError as error:
        message = f"votes cannot be written: {error.strerror or error}"
        raise ServeError(message, where=str(path), hint="choose another --votes") from error


def append(path: Path, vote: Vote) -> None:
    """Add a line, whole even if several processes write. Raises ServeError if it cannot be written."""
    line = json.dumps(asdict(vote)).encode("ascii") + b"\n"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle = os.open(path, _APPENDED, 0o600)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX)
            size = os.fstat(handle).st_size
            if size and os.pread(handle, 1, size - 1) != b"\n":
                line = b"\n" + line  # a process died while it wrote
            while line:
                line = line[os.write(handle, line) :]
            os.fsync(handle)
        finally:
            os.close(handle)
    except OSError as error:
        message = f"the vote cannot be written: {error.strerror or error}"
        raise ServeError(message, where=str(path)) from error


def read(path: Path) -> tuple[list[Vote], int]:
    """The votes in the order in which they were given, without those that were replaced; and how many lines
    a process left unfinished. Raises DataError if the file cannot be read, or a line is not a vote."""
    try:
        lines = path.read_bytes().split(b"\n")
    except OSError as error:
        hint = "tunesmith serve writes it once somebody votes"
        raise DataError(f"cannot be read: {error.strerror or error}", where=str(path), hint=hint) from error
    latest: dict[tuple[str | None, ...], Vote] = {}
    torn = 0
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        if not _is_json(line):
            torn += 1
            continue
        vote = parse_json(line, Vote, f"{path}:{number}", DataError, _HINT)
        latest.pop(vote.key, None)
        latest[vote.key] = vote
    return list(latest.values()), torn


def _is_json(line: bytes) -> bool:
    try:
        json.loads(line)
    except (ValueError, RecursionError):
        return False
    return True
