"""The access log: one JSON object for each HTTP request, without what was asked or answered unless that is
wished for."""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Mapping
from contextvars import ContextVar
from dataclasses import asdict, dataclass, field
from typing import TextIO


@dataclass
class AccessRecord:
    """One HTTP request, filled in while it is answered. ``contents``: bodies of request and response;
    empty without ``--log-contents``. ``fallback``: the model that answered instead, and why."""

    id: str = field(default_factory=lambda: uuid.uuid4().hex)
    at: float = field(default_factory=time.time)
    client: str = ""
    key: str | None = None
    method: str = ""
    path: str = ""
    status: int = 0
    model: str | None = None
    adapter: str | None = None
    prompt_tokens: int = 0
    cached_tokens: int = 0
    answer_tokens: int = 0
    first_token_s: float | None = None
    seconds: float = 0.0
    ended: str = ""
    """stop, length, or cancelled."""
    error: str | None = None
    fallback: str | None = None
    guardrails: list[str] = field(default_factory=list)
    contents: dict[str, str] = field(default_factory=dict)


_current: ContextVar[AccessRecord | None] = ContextVar("access_record", default=None)


def current() -> AccessRecord:
    """The record of the HTTP request that the running task answers; one that nobody reads outside of any."""
    return _current.get() or AccessRecord()


def begin(record: AccessRecord) -> None:
    """Make ``record`` the `current` one of this task, and of the tasks that it starts."""
    _current.set(record)


@dataclass
class AccessLog:
    """Writes records to ``stream``, or nothing if it is None. Used on the event loop. ``contents``: whether
    records get what was asked and answered."""

    stream: TextIO | None = None
    contents: bool = False

    def write(self, record: AccessRecord) -> None:
        if self.stream is None:
            return
        fields: Mapping[str, object] = {
            name: value for name, value in asdict(record).items() if value not in (None, [], {}, "")
        }
        line = json.dumps(fields, ensure_ascii=True) + "\n"
        self.stream.write(line)
        self.stream.flush()
