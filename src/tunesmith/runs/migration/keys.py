"""The keys of another program's file while they are translated, and what became of each of them.

A program's translation reads keys by their type, and `Keys.set` names the keys that a setting was computed
from. A key that no setting names and that is not left out with a reason is reported as unknown."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Generic, NamedTuple, NoReturn, TypeVar

from tunesmith.errors import ConfigError
from tunesmith.settings.config import JSON
from tunesmith.settings.origins import Node, shortened

T = TypeVar("T")
U = TypeVar("U")
UNKNOWN = "not a key that this reader knows"
_FLAGS = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}
"""Words that YAML 1.1, which the other programs read, takes for a boolean."""


class Old(NamedTuple, Generic[T]):
    """A key of the other program. ``origin``: where the file gives it, or None if ``value`` is the program's
    default."""

    key: str
    value: T
    origin: str | None

    @property
    def given(self) -> bool:
        return self.origin is not None

    def holding(self, value: U) -> Old[U]:
        """The same key with ``value`` in place of its own."""
        return Old(self.key, value, self.origin)

    @property
    def where(self) -> str:
        """For the place of an error."""
        return f"{self.origin or 'default'}: {self.key}"


class MappedSetting(NamedTuple):
    """One of our settings. ``sources``: the old keys from which it was computed. ``note``: what changed in
    meaning, or ""."""

    key: str
    value: JSON
    sources: tuple[Old[Any], ...]
    note: str


class LeftOut(NamedTuple):
    """An old key without a counterpart."""

    key: str
    value: JSON
    origin: str
    reason: str


class Keys:
    """``file``: the other program's. ``leaves``: key path → value and origin; items of a list of mappings are
    called ``datasets[0].path``."""

    def __init__(self, file: Path, root: Node, program: str) -> None:
        self.file = file
        self.program = program
        self.leaves = {key: Old(key, value, origin) for key, value, origin in _leaves(root, "")}
        self.settings: dict[str, MappedSetting] = {}
        self.left_out: dict[str, LeftOut] = {}

    def has(self, key: str) -> bool:
        """Whether the file gives ``key``, or keys below it, a value other than null."""
        below = (f"{key}.", f"{key}[")
        return any(
            leaf.value is not None
            for name, leaf in self.leaves.items()
            if name == key or name.startswith(below)
        )

    def items(self, key: str) -> list[str]:
        """The paths of the items of a list of mappings: ``datasets[0]``, ``datasets[1]``, …"""
        names = (name for name in self.leaves if name.startswith(f"{key}["))
        return list(dict.fromkeys(name[: name.index("]", len(key)) + 1] for name in names))

    def below(self, key: str) -> list[Old[Any]]:
        """All that the file gives below ``key``."""
        return [old for name, old in self.leaves.items() if name.startswith(f"{key}.")]

    def integer(self, *names: str, default: int) -> Old[int]:
        """The first of ``names`` that is given, which may be aliases of one key; so for the other readers."""
        old = self._first(names, default)
        if (number := _number(old.value)) is None or number != int(number):
            self._refuse(old, "an integer")
        return old.holding(int(number))

    def number(self, *names: str, default: float) -> Old[float]:
        old = self._first(names, default)
        if (number := _number(old.value)) is None:
            self._refuse(old, "a number")
        return old.holding(float(number))

    def flag(self, *names: str, default: bool) -> Old[bool]:
        old = self._first(names, default)
        if (flag := _FLAGS.get(str(old.value).lower())) is None:
            self._refuse(old, "true or false")
        return old.holding(flag)

    def text(self, *names: str, default: str) -> Old[str]:
        old = self._first(names, default)
        if isinstance(old.value, list | dict):
            self._refuse(old, "text")
        return old.holding(str(old.value).lower() if isinstance(old.value, bool) else str(old.value))

    def choice(self, *names: str, default: str, among: Collection[str]) -> Old[str]:
        """A text, which must be one of ``among``."""
        old = self.text(*names, default=default)
        if old.value not in among:
            self._refuse(old, f"one of {', '.join(among)}")
        return old

    def texts(self, *names: str, default: Sequence[str]) -> Old[list[str]]:
        """A list of texts, or one text in which commas separate them."""
        old = self._first(names, list(default))
        items = old.value.split(",") if isinstance(old.value, str) else old.value
        if not isinstance(items, list) or any(isinstance(item, list | dict) for item in items):
            self._refuse(old, "a list of texts")
        return old.holding([str(item).strip() for item in items])

    def numbers(self, *names: str, default: Sequence[float]) -> Old[list[float]]:
        """A list of numbers."""
        old = self._first(names, list(default))
        numbers = [_number(item) for item in old.value] if isinstance(old.value, list) else [None]
        if None in numbers:
            self._refuse(old, "a list of numbers")
        return old.holding([float(number) for number in numbers if number is not None])

    def set(self, key: str, value: JSON, *sources: Old[Any], note: str = "") -> None:
        """Give our setting ``key`` a value that was computed from ``sources``."""
        written = tuple(self.leaves[old.key] if old.given else old for old in sources)
        self.settings[key] = MappedSetting(key, value, written, note)

    def carry(self, key: str, old: Old[Any], note: str = "") -> None:
        """Give our setting ``key`` the old value, if the file gives one."""
        if old.given:
            self.set(key, old.value, old, note=note)

    def leave(self, reason: str, *olds: Old[Any]) -> None:
        """Say why keys of the file have no counterpart."""
        for old in olds:
            if old.origin is not None:
                self.left_out[old.key] = LeftOut(old.key, old.value, old.origin, reason)

    def leave_rest(self, reasons: Mapping[str, str]) -> list[str]:
        """Leave out the keys that no setting uses, with the reason of the first pattern that matches. Returns
        those that are null."""
        empty: list[str] = []
        used = {old.key for setting in self.settings.values() for old in setting.sources if old.given}
        for key, old in self.leaves.items():
            if key in used or key in self.left_out:
                continue
            if old.value is None:
                empty.append(key)
                continue
            fitting = (reason for pattern, reason in reasons.items() if fnmatchcase(key, pattern))
            self.leave(next(fitting, UNKNOWN), old)
        return empty

    def _first(self, names: Sequence[str], default: object) -> Old[Any]:
        given = [self.leaves[name] for name in names if self.leaves.get(name, _NULL).value is not None]
        for other in given[1:]:
            self.leave(f"{given[0].key} is used, which is the same", other)
        return given[0] if given else Old(names[0], default, None)

    def _refuse(self, old: Old[Any], expected: str) -> NoReturn:
        shown = shortened(json.dumps(old.value, ensure_ascii=False, default=str))
        hint = f"{self.program} does not allow it either: correct it, or leave it out"
        raise ConfigError(f"must be {expected}, not {shown}", where=old.where, hint=hint)


_NULL = Old("", None, None)


def _number(value: object) -> float | None:
    """``value`` as a number, also if it is text, as 1e-4 is in YAML 1.1 and 1_000 in YAML 1.2."""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    try:
        number = float(value)
    except (ValueError, OverflowError):
        return None
    return number if abs(number) < float("inf") else None


def _leaves(value: Any, key: str, origin: str = "") -> Iterator[tuple[str, JSON, str]]:
    """(key path, value, origin) of everything in nested nodes. Mappings in lists are plain, and have the
    origin of the list."""
    if isinstance(value, Node):
        value, origin = value
    if isinstance(value, dict) and value:
        for name, item in value.items():
            yield from _leaves(item, f"{key}.{name}" if key else name, origin)
    elif isinstance(value, list) and any(isinstance(item, dict) for item in value):
        for index, item in enumerate(value):
            yield from _leaves(item, f"{key}[{index}]", origin)
    else:
        yield key, value, origin
