"""A JSON schema that every answer must satisfy."""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

from pydantic import Field, model_validator

from tunesmith.checks.constraints import Constraint, constraint
from tunesmith.serving.guardrails.guardrail import NEVER, UNREDACTED, WHOLE, Guardrail, Span, register


@register
class AnswerSchema(Guardrail):
    name = "json_schema"
    detects: ClassVar = "answers that are not JSON, or not valid by your schema; calls of tools pass"
    misses: ClassVar = "wrong values of the right form"
    inputs = NEVER
    outputs = UNREDACTED

    file: str | None = Field(None, description="JSON file with the schema")
    fence: bool = Field(False, description="the JSON may stand in a code fence")

    @model_validator(mode="after")
    def _readable(self) -> AnswerSchema:
        if self.output != "off" and self.file is None:
            raise ValueError("json_schema: file names the schema that answers must satisfy")
        if self.file is not None:
            try:
                _constraint(self.file, self.fence)
            except (OSError, ValueError) as error:
                raise ValueError(f"json_schema: {self.file} is not a usable schema: {error}") from None
        return self

    @cached_property
    def _checked(self) -> Constraint | None:
        return _constraint(self.file, self.fence) if self.file else None

    def find(self, text: str) -> Iterator[Span]:
        if self._checked is not None and not self._checked.holds(text):
            yield Span(0, len(text), "invalid")

    def reach(self) -> float:
        return WHOLE


def _constraint(file: str, fence: bool) -> Constraint:
    schema: dict[str, Any] = json.loads(Path(file).read_text("utf-8"))
    return constraint("json_schema", {"schema": schema, "fence": fence})
