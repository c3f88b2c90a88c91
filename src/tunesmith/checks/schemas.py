"""Validates values against JSON schemas.

By the draft that the schema names in ``$schema``, else 2020-12. References are followed inside it; nothing is
fetched."""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from tunesmith.settings.config import JSON

if TYPE_CHECKING:
    from jsonschema.protocols import Validator


def validator(schema: JSON) -> Validator | None:
    """None if `checked` refuses it."""
    return _validator(json.dumps(schema, sort_keys=True))


@lru_cache(maxsize=4096)
def _validator(text: str) -> Validator | None:
    try:
        return checked(json.loads(text))
    except ValueError:
        return None


def checked(schema: Any) -> Validator:
    """The validator of ``schema``. Raises ValueError if the schema is invalid or has a reference that it does
    not contain."""
    from jsonschema import Draft202012Validator, SchemaError
    from jsonschema.validators import validator_for
    from referencing import Registry
    from referencing.exceptions import Unresolvable
    from referencing.jsonschema import DRAFT202012, specification_with

    pointer = ""
    try:
        kind: Any = validator_for(schema, default=Draft202012Validator)
        kind.check_schema(schema)
        draft = specification_with(kind.META_SCHEMA["$schema"], default=DRAFT202012)
        resolver = (
            Registry().with_resource("", draft.create_resource(schema)).resolver()
        )  # an empty one fetches nothing
        for pointer in _pointers(schema):
            resolver.lookup(pointer)
        check = kind(schema, registry=Registry())
        check.is_valid({})  # a schema that points at itself alone never ends
    except SchemaError as error:
        raise ValueError(f"schema{''.join(f'.{key}' for key in error.path)}: {error.message}") from None
    except Unresolvable:
        raise ValueError(
            f"schema: {pointer} is not inside it; only references that begin with # are followed"
        ) from None
    except (RecursionError, TypeError, AttributeError) as error:
        raise ValueError(f"schema: it cannot be followed: {error}") from None
    return check


def takes(check: Validator, value: JSON) -> bool:
    """Whether the value is valid. Never raises: a value nested too deeply, or with too large numbers, is not
    valid."""
    from referencing.exceptions import Unresolvable

    try:
        return check.is_valid(value)
    except (Unresolvable, RecursionError, ArithmeticError):  # the first by an $id inside
        return False


def _pointers(schema: JSON) -> Iterator[str]:
    if isinstance(schema, dict) and isinstance(own := schema.get("$ref"), str):
        yield own
    for part in schema.values() if isinstance(schema, dict) else schema if isinstance(schema, list) else ():
        yield from _pointers(part)
