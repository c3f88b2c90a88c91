"""Control tokens of chat templates, written as text: they would open or close turns for another program."""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar

from tunesmith.checks.content import control_tokens
from tunesmith.serving.guardrails.guardrail import Guardrail, Span, register


@register
class ControlTokens(Guardrail):
    name = "control_tokens"
    detects: ClassVar = "control tokens of chat templates written as text, such as `[INST]` or `<|im_end|>`"
    misses: ClassVar = "tokens of templates without a usual form"

    def find(self, text: str) -> Iterator[Span]:
        return (Span(start, start + len(token), "control_token") for token, start in control_tokens(text))

    def reach(self) -> float:
        return 64
