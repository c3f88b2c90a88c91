"""Who may ask, which models, and how often.

The file of keys is a JSON list: ``[{"name": "editor", "key": "…", "per_minute": 60, "models": ["writer"]}]``.
Instead of ``key`` it may have ``sha256``, so that the file does not disclose the keys."""

from __future__ import annotations

import hashlib
import hmac
import time
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from pydantic import Field, ValidationError

from tunesmith.errors import ConfigError, listing
from tunesmith.files import read_json
from tunesmith.serving.rejections import Rejection
from tunesmith.settings.config import JSON, Spec

SHORTEST = 16
"""Characters of a key; a shorter one can be guessed."""
MINUTE_S = 60.0


class KeySpec(Spec):
    """One entry of the file of keys."""

    name: str = Field(min_length=1, max_length=100)
    key: str | None = Field(default=None, min_length=SHORTEST)
    sha256: str | None = Field(default=None, pattern=r"^[0-9a-fA-F]{64}$")
    per_minute: int | None = Field(default=None, ge=1)
    models: tuple[str, ...] = ()
    admin: bool = False


@dataclass(frozen=True)
class Key:
    """``digest``: SHA-256 of the key. ``per_minute``: most requests; None: no limit. ``models``: those that
    it may ask; empty: all. ``admin``: whether it may change what is served."""

    name: str
    digest: str
    per_minute: int | None = None
    models: tuple[str, ...] = ()
    admin: bool = False


def read(path: Path) -> tuple[Key, ...]:
    """The keys of a file. Raises ConfigError, which quotes no key, if it cannot be read, an entry is wrong,
    or two have one name or one key."""
    hint = f'a list of keys: [{{"name": "me", "key": "at least {SHORTEST} characters"}}]'
    entries = read_json(path, list[JSON], ConfigError, hint)
    problems: list[str] = []
    keys: list[Key] = []
    for place, entry in enumerate(entries):
        try:
            spec = KeySpec.model_validate(entry)
        except ValidationError as error:
            problems += [
                f"entry {place}: {'.'.join(map(str, finding['loc']))}: {finding['msg']}"
                for finding in error.errors(include_url=False, include_input=False)
            ]
            continue
        if (spec.key is None) == (spec.sha256 is None):
            problems.append(f"entry {place}: give either key or sha256")
            continue
        if spec.key is not None and not (spec.key.isascii() and spec.key.isprintable()):
            problems.append(f"entry {place}: key: only printable ASCII can be sent in a header")
            continue
        digest = digest_of(spec.key) if spec.key is not None else str(spec.sha256).lower()
        keys.append(Key(spec.name, digest, spec.per_minute, spec.models, spec.admin))
    for what, values in (("name", [key.name for key in keys]), ("key", [key.digest for key in keys])):
        if len(set(values)) < len(values):
            problems.append(f"two entries have the same {what}")
    if not entries:
        problems.append("there is no key")
    if problems:
        raise ConfigError(f"wrong keys\n{listing(problems)}", where=str(path), hint=hint)
    return tuple(keys)


def digest_of(key: str) -> str:
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).hexdigest()


@dataclass
class Doorkeeper:
    """Knows the keys, and counts what each asked in the last minute."""

    keys: Sequence[Key] = ()
    _asked: dict[str, deque[float]] = field(default_factory=dict, repr=False)

    def require(self, headers: Mapping[str, str]) -> Key | None:
        """The key that ``headers`` show (``Authorization: Bearer`` or ``x-api-key``), or None if the server
        has no keys. Raises Rejection if it is none of the server's. The time that this takes does not depend
        on how much of a key is right."""
        if not self.keys:
            return None
        scheme, _, given = headers.get("authorization", "").partition(" ")
        shown = given.strip() if scheme.lower() == "bearer" else headers.get("x-api-key", "")
        digest = digest_of(shown)
        known = [key for key in self.keys if hmac.compare_digest(key.digest, digest)]
        if not known:
            message = "the key is not one of this server's" if shown else "this server wants a key"
            headers = {"WWW-Authenticate": "Bearer"}
            raise Rejection(401, f"{message}: Authorization: Bearer KEY", None, "invalid_api_key", headers)
        return known[0]

    def count(self, key: Key) -> None:
        """Count a request of ``key``. Raises Rejection if it had as many in the last minute as it may."""
        if key.per_minute is None:
            return
        now = time.monotonic()
        times = self._asked.setdefault(key.name, deque())
        while times and now - times[0] >= MINUTE_S:
            times.popleft()
        if len(times) >= key.per_minute:
            retry = {"Retry-After": str(max(1, round(MINUTE_S - (now - times[0]))))}
            message = f"the key {key.name} may ask {key.per_minute} times a minute"
            raise Rejection(429, message, None, "rate_limit_exceeded", retry)
        times.append(now)
