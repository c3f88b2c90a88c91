"""Answers that decline the request. Blocking one lets a fallback answer instead."""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar

from tunesmith.checks.refusals import HEAD, refuses
from tunesmith.serving.guardrails.guardrail import NEVER, UNREDACTED, Guardrail, Span, register


@register
class Refusals(Guardrail):
    name = "refusals"
    detects: ClassVar = "answers that decline the request, in their first sentences"
    misses: ClassVar = "other languages, irony, answers that miss the question"
    inputs = NEVER
    outputs = UNREDACTED
    opening = True

    def find(self, text: str) -> Iterator[Span]:
        if refuses(text[:HEAD]):
            yield Span(0, 1, "refusal")

    def reach(self) -> float:
        return HEAD
