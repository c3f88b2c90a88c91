"""Words and patterns that the user lists."""

from __future__ import annotations

import time
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import ClassVar

import regex
from pydantic import Field, field_validator

from tunesmith.serving.guardrails.guardrail import Guardrail, Span, register
from tunesmith.settings.config import Texts

PATIENCE_S = 0.5
"""Seconds that the patterns may take for one window; a text that takes longer is detected, as it is not known
to be clean."""
LEAST_REACH = 64
FLAGS = regex.IGNORECASE | regex.FULLCASE


@register
class BlockList(Guardrail):
    name = "block_list"
    detects: ClassVar = "words and patterns that you list, whatever their case"
    misses: ClassVar = "other spellings; patterns that match more than `longest` characters, in a stream"

    words: Texts = Field((), description="words or phrases, found as whole words")
    files: Texts = Field(
        (), description="text files with a word or phrase a line; a line that begins with # is a comment"
    )
    patterns: Texts = Field((), description="regular expressions")
    longest: int = Field(128, ge=1, le=4096, description="longest match of a pattern, in characters")

    @field_validator("patterns")
    @classmethod
    def _compile(cls, patterns: tuple[str, ...]) -> tuple[str, ...]:
        for pattern in patterns:
            try:
                regex.compile(pattern, FLAGS)
            except regex.error as error:
                raise ValueError(f"{pattern!r} is not a regular expression: {error}") from None
        return patterns

    @field_validator("files")
    @classmethod
    def _read(cls, files: tuple[str, ...]) -> tuple[str, ...]:
        for name in files:
            try:
                _lines(name)
            except (OSError, UnicodeDecodeError) as error:
                raise ValueError(f"{name} cannot be read: {error}") from None
        return files

    @cached_property
    def phrases(self) -> tuple[str, ...]:
        """``words`` and the lines of ``files``."""
        return (*self.words, *(line for name in self.files for line in _lines(name)))

    @cached_property
    def _expressions(self) -> list[regex.Pattern[str]]:
        """One for all phrases, and one for each pattern: joined, their groups and flags would mix."""
        phrases = [r"\s+".join(map(regex.escape, phrase.split())) for phrase in self.phrases]
        parts = [rf"(?<!\w)(?:{phrase})(?!\w)" for phrase in phrases if phrase]
        joined = ["|".join(parts)] if parts else []
        return [regex.compile(expression, FLAGS) for expression in (*joined, *self.patterns)]

    def find(self, text: str) -> Iterator[Span]:
        deadline = time.monotonic() + PATIENCE_S
        try:
            for expression in self._expressions:
                left = max(deadline - time.monotonic(), 0.001)
                for match in expression.finditer(text, timeout=left):
                    if match.end() > match.start():
                        yield Span(match.start(), match.end(), "listed")
        except TimeoutError:
            yield Span(0, len(text), "timed_out")

    def reach(self) -> float:
        longest_phrase = max(map(len, self.phrases), default=0)
        return max(LEAST_REACH, 2 * longest_phrase, self.longest if self.patterns else 0)


def _lines(name: str) -> list[str]:
    lines = (line.strip() for line in Path(name).read_text("utf-8").splitlines())
    return [line for line in lines if line and not line.startswith("#")]
