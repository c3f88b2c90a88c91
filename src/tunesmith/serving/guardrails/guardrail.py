"""What a guardrail is: its settings (a block of the YAML file) and what it detects in a text, in one class.

A file in ``kinds`` that registers a class adds a guardrail: the settings, the table of the documentation and
the metrics are derived from the class."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable
from typing import Annotated, ClassVar, Literal, NamedTuple, TypeVar

from pydantic import BeforeValidator, Field, model_validator

from tunesmith.settings.config import Spec

Action = Literal["off", "flag", "redact", "block"]
Direction = Literal["input", "output"]
ALL: tuple[Action, ...] = ("off", "flag", "redact", "block")
UNREDACTED: tuple[Action, ...] = ("off", "flag", "block")
NEVER: tuple[Action, ...] = ("off",)
WHOLE = math.inf
"""`Guardrail.reach` of a guardrail that judges only complete texts."""

ActionSetting = Annotated[Action, BeforeValidator(lambda value: "off" if value is False else value, Action)]
"""YAML reads a bare ``off`` as false."""


class Span(NamedTuple):
    """A part of a text that a guardrail detects. ``kind``: which of the things that it looks for."""

    start: int
    end: int
    kind: str


class Detection(NamedTuple):
    """What a guardrail detected, without the text."""

    guardrail: str
    kind: str
    direction: Direction
    action: Action


class Guardrail(Spec, ABC):
    """Abstract: detects one sort of text. Frozen, without other state."""

    name: ClassVar[str]
    detects: ClassVar[str]
    misses: ClassVar[str]
    """What it cannot detect, for the documentation."""
    inputs: ClassVar[tuple[Action, ...]] = ALL
    """The actions that make sense for prompts."""
    outputs: ClassVar[tuple[Action, ...]] = ALL
    """The actions that make sense for answers."""
    opening: ClassVar[bool] = False
    """It judges only the first `reach` characters of a text."""

    input: ActionSetting = Field(default="off", description="for prompts: off, flag, redact or block")
    output: ActionSetting = Field(default="off", description="for answers: off, flag, redact or block")

    @abstractmethod
    def find(self, text: str) -> Iterable[Span]:
        """The parts of ``text`` that it detects. ``text`` may be a window of a longer one."""

    @abstractmethod
    def reach(self) -> float:
        """How many characters after a position must be known before the text up to there may leave.

        Nothing that is shorter escapes from a stream, however it is cut."""

    def action(self, direction: Direction) -> Action:
        return self.input if direction == "input" else self.output

    @model_validator(mode="after")
    def _suits(self) -> Guardrail:
        rules = (("input", self.input, self.inputs), ("output", self.output, self.outputs))
        for direction, action, allowed in rules:
            if action not in allowed:
                raise ValueError(f"{self.name}: {direction} can be {' or '.join(allowed)}, not {action}")
        return self


_registered: dict[str, type[Guardrail]] = {}
_Kind = TypeVar("_Kind", bound=Guardrail)


def register(kind: type[_Kind]) -> type[_Kind]:
    """Decorate the class of a guardrail: settings then have a block of its name."""
    _registered[kind.name] = kind
    return kind


def unregister(name: str) -> None:
    _registered.pop(name, None)


def registered() -> dict[str, type[Guardrail]]:
    """The registered guardrails by name; `settings.kinds` imports those of this package first."""
    return dict(sorted(_registered.items()))
