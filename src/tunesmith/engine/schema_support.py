"""Which JSON Schemas can be enforced while an answer is generated?

llguidance refuses what it does not know. Refused here is what it enforces otherwise than `checks.schemas`
reads it, so that every answer that it lets through is valid. One exception is left: a number of more than 15
digits is rounded when it is read, so that 4.9999999999999999 is 5."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from typing import cast

from tunesmith.checks import schemas
from tunesmith.data.formats import JSON
from tunesmith.errors import ModelError

IN_MAPS = ("properties", "patternProperties", "$defs", "definitions", "dependentSchemas")
IN_LISTS = ("anyOf", "allOf", "oneOf", "prefixItems", "items")
ALONE = ("items", "additionalItems", "additionalProperties", "not", "if", "then", "else", "contains")
NEGATED = re.compile(r"\\[WDB]|\[\^[^\]]*\\[wd]")
"""Characters that are not letters or digits: of ASCII in a JSON Schema, of Unicode in `checks.schemas`."""

MOST_PARTS = 1000
"""Schemas within the schemas of one constraint: the time to compile them grows with their square."""
MOST_CHARACTERS = 200_000
"""Of the schemas of one constraint, as JSON."""
MOST_DECIMALS = 14
"""Of bounds: with more, llguidance 1.9.1 lets numbers through that are not inside."""


def require_small(schemas: Sequence[JSON]) -> None:
    """Raises ModelError if compiling ``schemas`` into one constraint would take long."""
    hint = "ask for less at once"
    n_characters = sum(len(json.dumps(schema)) for schema in schemas)
    if n_characters > MOST_CHARACTERS:
        message = f"the schemas have {n_characters:,} characters; at most {MOST_CHARACTERS:,} are possible"
        raise ModelError(message, hint=hint)
    n_parts = sum(1 for schema in schemas for _ in _parts(schema))
    if n_parts > MOST_PARTS:
        message = f"the schemas have {n_parts:,} properties and parts; at most {MOST_PARTS:,} are possible"
        raise ModelError(message, hint=hint)


def require_enforceable(schema: JSON, where: str = "schema") -> None:
    """Raises ModelError, at ``where``, if ``schema`` is invalid, or a keyword in it cannot be enforced."""
    try:
        schemas.checked(schema)
    except ValueError as error:
        raise ModelError(str(error), where=where) from None
    if isinstance(schema, dict) and "x-guidance" in schema:
        raise ModelError("x-guidance would change how the schema is enforced", where=where)
    for part in _parts(schema):
        if problem := _problem(part):
            raise ModelError(f"the schema cannot be enforced: {problem}", where=where, hint="leave it out")


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
    for key in ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"):
        bound = schema.get(key)
        if isinstance(bound, bool):
            return f"{key} as true or false, of draft 4"
        if isinstance(bound, float) and round(bound, MOST_DECIMALS) != bound:
            return f"{key} {bound}, which has more than {MOST_DECIMALS} decimals"
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
