"""Which JSON Schemas can be enforced while an answer is generated?

llguidance refuses what it does not know. Refused here is what it enforces otherwise than `checks.schemas`
reads it, so that every answer that it lets through is valid."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from typing import cast

from tunesmith.checks import schemas
from tunesmith.data.formats import JSON
from tunesmith.errors import ModelError

IN_MAPS = ("properties", "patternProperties", "$defs", "definitions", "dependentSchemas")
IN_LISTS = ("anyOf", "allOf", "oneOf", "prefixItems", "items")
ALONE = ("items", "additionalItems", "additionalProperties", "not", "if", "then", "else", "contains")
NEGATED = re.compile(r"\\[WDB]|\[\^[^\]]*\\[wd]")
"""Characters that are not letters or digits: of ASCII in a JSON Schema, of Unicode in `checks.schemas`."""


def enforceable(schema: JSON, where: str = "schema") -> JSON:
    """``schema``, rewritten so that bounds hold after a number was rounded to float64.

    Raises ModelError if it is invalid, or a keyword in it cannot be enforced; ``where`` names it."""
    try:
        schemas.checked(schema)
    except ValueError as error:
        raise ModelError(str(error), where=where) from None
    if not isinstance(schema, dict):
        return schema
    if "x-guidance" in schema:
        raise ModelError("x-guidance would change how the schema is enforced", where=where)
    own = cast("dict[str, JSON]", json.loads(json.dumps(schema)))
    for part in _parts(own):
        if problem := _problem(part):
            raise ModelError(f"the schema cannot be enforced: {problem}", where=where, hint="leave it out")
        _round(part)
    return own


def _parts(schema: JSON) -> Iterator[dict[str, JSON]]:
    """All schemas in ``schema``, itself first."""
    if not isinstance(schema, dict):
        return
    yield schema
    for key in IN_MAPS:
        for part in (
            cast("dict[str, JSON]", schema[key]).values() if isinstance(schema.get(key), dict) else ()
        ):
            yield from _parts(part)
    for key in IN_LISTS:
        for part in cast("list[JSON]", schema[key]) if isinstance(schema.get(key), list) else ():
            yield from _parts(part)
    for key in ALONE:
        yield from _parts(schema.get(key))


def _problem(schema: dict[str, JSON]) -> str | None:
    """The keyword of ``schema`` itself that cannot be enforced, and why."""
    fewest = schema.get("minProperties", 0)
    named = schema.get("required")
    if isinstance(fewest, int | float) and fewest > max(1, len(named) if isinstance(named, list) else 0):
        return "minProperties above 1, if required names fewer: a name that comes twice would count twice"
    step = schema.get("multipleOf", 1)
    if isinstance(step, float) and not step.is_integer():
        return f"multipleOf {step}, which is not a whole number: rounding decides"
    for key in ("exclusiveMinimum", "exclusiveMaximum"):
        if isinstance(schema.get(key), bool):
            return f"{key} as true or false, of draft 4"
    patterns = [schema.get("pattern"), *cast("dict[str, JSON]", schema.get("patternProperties") or {})]
    for pattern in patterns:
        if not isinstance(pattern, str):
            continue
        try:
            re.compile(pattern)
        except re.error as error:
            return f"pattern {pattern!r}: {error}"
        if NEGATED.search(pattern):
            return f"pattern {pattern!r}: negated classes of letters or digits"
    return None


def _round(schema: dict[str, JSON]) -> None:
    """Bounds that a number does not reach become the float64 next to them: 4.99999999999999999 is read as
    5."""
    if schema.get("type") == "integer":
        return
    for key, inclusive, towards in (
        ("exclusiveMinimum", "minimum", math.inf),
        ("exclusiveMaximum", "maximum", -math.inf),
    ):
        if isinstance(bound := schema.get(key), int | float):
            del schema[key]
            pick = max if towards > 0 else min
            limit = math.nextafter(bound, towards)
            other = schema.get(inclusive)
            schema[inclusive] = pick(limit, other) if isinstance(other, int | float) else limit
