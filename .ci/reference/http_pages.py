"""Every route of the server, the fields of its requests, and why a request is refused."""

from __future__ import annotations

import ast
import inspect
import re
from typing import Any, cast

from sources import class_of, errors_raised, trees
from starlette.routing import Route
from writing import code, first_sentence, prose, table

from tunesmith.serving import app, entrance, rejections
from tunesmith.serving.limits import ServerLimits
from tunesmith.serving.rejections import ANTHROPIC_BY_STATUS, BY_STATUS
from tunesmith.serving.service import Service
from tunesmith.settings.config import meanings

INTRODUCTION = """# HTTP API

`tunesmith serve` answers these routes; [serving](../serving.md) explains what is served, keys, limits and
streams. A request may be sent with `Authorization: Bearer KEY` or `x-api-key: KEY`.
"""
REFUSALS = """## Refusals

A request that cannot be answered gets one of these statuses, and a body that says why. `param` names the
field that is wrong. Paths under `/v1/messages` have Anthropic's form of it, all others OpenAI's:

```json
{"error": {"message": "…", "type": "…", "param": "…", "code": "…"}}
{"type": "error", "error": {"type": "…", "message": "…"}}
```
"""
EMPTY = "may only be empty: anything else is refused"
CALL = re.compile(r"await read\(request, (\w+)\)")


def text() -> str:
    routes = app.routes(cast(Service, None))  # handlers ask the service only when they are called
    open_paths = ", ".join(map(code, entrance.OPEN_PATHS))
    rows = [(code(route.path), " ".join(methods(route)), about(route)) for route in routes]
    parts = [INTRODUCTION, table(["path", "method", ""], rows), f"Without a key: {open_paths}.\n"]
    for route in routes:
        if match := CALL.search(inspect.getsource(route.endpoint)):
            parts += [f"## {' '.join(methods(route))} {route.path}\n", *body(class_of(match[1]))]
    parts += [REFUSALS, table(["status", "type", "type of Anthropic's", "codes"], statuses())]
    parts += ["## Messages of refusals\n", table(["message"], [[message] for message in messages()])]
    limits = [
        (code(limit.key), limit.allowed, code(limit.default or ""), limit.effect)
        for limit in meanings(ServerLimits)
    ]
    parts += [
        "## Limits\n",
        "`--limit KEY=VALUE` changes one.\n",
        table(["limit", "value", "default", "meaning"], limits),
    ]
    return "\n".join(parts)


def methods(route: Route) -> list[str]:
    return sorted((route.methods or set()) - {"HEAD"})


def about(route: Route) -> str:
    """What the handler of a route says of itself, or the only one of a module."""
    return first_sentence(route.endpoint.__doc__ or inspect.getdoc(inspect.getmodule(route.endpoint)))


def body(kind: Any) -> list[str]:
    """The fields of a body, and of the objects in it."""
    schema = kind.model_json_schema()
    parts = [prose(kind.__doc__) + "\n"] * ("__doc__" in vars(kind) and bool(kind.__doc__))
    parts.append(fields(schema))
    for name, inner in schema.get("$defs", {}).items():
        if "properties" in inner:
            words = prose(inner.get("description", "")).replace("\n", " ")
            parts.append(f"**{name}**{': ' if words else ''}{words}\n\n{fields(inner)}")
    return parts


def fields(schema: dict[str, Any]) -> str:
    required = schema.get("required", [])
    rows = [
        (code(name), "required" if name in required else "", allowed(field))
        for name, field in schema["properties"].items()
    ]
    return table(["field", "", "value"], rows)


def allowed(schema: dict[str, Any]) -> str:
    """What a JSON schema takes, in words."""
    if schema.get("type") == "null":
        return EMPTY
    if "$ref" in schema:
        return schema["$ref"].rpartition("/")[2]
    if "anyOf" in schema or "oneOf" in schema:
        several = schema.get("anyOf", schema.get("oneOf"))
        return " or ".join(dict.fromkeys(allowed(part) for part in several if part.get("type") != "null"))
    if "enum" in schema or "const" in schema:
        return ", ".join(code(str(value)) for value in schema.get("enum", [schema.get("const")]))
    words = {"string": "text", "integer": "an integer", "number": "a number", "boolean": "true or false"}
    kind = schema.get("type")
    if kind == "array":
        items = schema.get("items") or {}
        most = f", {schema['maxItems']} at most" if "maxItems" in schema else ""
        return f"a list of {allowed(items)}{most}" if items else f"a list{most}"
    if kind == "object":
        inner = schema.get("additionalProperties")
        named = isinstance(inner, dict) and not inner.get("$ref", "").endswith("/JsonValue")
        return f"an object whose values are {allowed(inner)}" if named and inner else "an object"
    low, high = schema.get("minimum"), schema.get("maximum")
    bounds = [f"{sign} {bound:g}" for sign, bound in (("≥", low), ("≤", high)) if bound is not None]
    return f"{words.get(kind or '', 'any value')} {' and '.join(bounds)}".strip()


def statuses() -> list[tuple[str, str, str, str]]:
    """Each status that a rejection can have, its types, and the codes that the source gives it."""
    codes: dict[int, set[str]] = {}
    for tree in trees().values():
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "Rejection":
                status, given = node.args[0] if node.args else None, [*node.args[3:4]]
                given += [keyword.value for keyword in node.keywords if keyword.arg == "code"]
                if isinstance(status, ast.Constant):
                    words = {word.value for word in given if isinstance(word, ast.Constant)}
                    codes.setdefault(status.value, set()).update(words)
    return [
        (
            str(status),
            rejections.Rejection(status, "").kind,
            ANTHROPIC_BY_STATUS.get(status, "api_error"),
            ", ".join(code(word) for word in sorted(codes.get(status, ()))),
        )
        for status in sorted(codes.keys() | BY_STATUS.keys())
    ]


def messages() -> list[str]:
    """What a client is told, in the order of the alphabet."""
    from error_pages import escaped

    return [escaped(said.what) for said in errors_raised({"Rejection"}, at=1)]
