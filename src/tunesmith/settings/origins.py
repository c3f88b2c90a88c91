"""Values with the place where each was written: YAML 1.2 (core schema) in, with line numbers, and YAML out.

PyYAML reads YAML 1.1, in which ``1e-4`` is text, ``no`` is false and ``010`` is eight; here ``1e-4`` is a
number, ``no`` is text and ``010`` is ten. A key given twice and a tag that is not of the core schema are
refused. Format: yaml.org/spec/1.2.2."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import yaml
from pydantic import JsonValue
from pydantic_core import to_jsonable_python

from tunesmith.errors import ConfigError

JSON: TypeAlias = JsonValue


class Node(NamedTuple):
    """A value and where it was set. ``value``: dict of nodes, or anything else as YAML has it."""

    value: Any
    origin: str


def plain(node: Node) -> Any:
    """The value alone."""
    return (
        {key: plain(item) for key, item in node.value.items()} if isinstance(node.value, dict) else node.value
    )


class _Loader(yaml.SafeLoader):
    yaml_implicit_resolvers = {}  # noqa: RUF012


class _Dumper(yaml.SafeDumper):
    """Quotes texts that YAML 1.1 or 1.2 would read as another type; writes lists of scalars on one line."""


def _list(dumper: _Dumper, items: list[Any]) -> yaml.Node:
    flow = not any(isinstance(item, list | dict) for item in items)
    return dumper.represent_sequence("tag:yaml.org,2002:seq", items, flow_style=flow)


def _text(dumper: _Dumper, text: str) -> yaml.Node:
    """Escaped where not printable: PyYAML folds a plain U+0085 into a space."""
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=None if text.isprintable() else '"')


_Dumper.add_representer(list, _list)
_Dumper.add_representer(str, _text)
for _tag, _pattern in {
    "null": r"~|null|Null|NULL|",
    "bool": r"true|True|TRUE|false|False|FALSE",
    "int": r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+",
    "float": r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
}.items():
    for _class in (_Loader, _Dumper):
        _class.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(rf"(?:{_pattern})\Z"), None)

_SCALARS: dict[str, Callable[[str], JSON]] = {
    "null": lambda text: None,
    "bool": lambda text: text.lower() == "true",
    "int": lambda text: int(text, 16 if "x" in text else 8 if "o" in text else 10),
    "float": lambda text: float(re.sub(r"\.(?=[iInN])", "", text)),
    "str": str,
}


def write(value: object) -> str:
    """Block YAML of a mapping; `parse` reads back equal values, floats exactly; lists for tuples, text for
    paths."""
    jsonable = to_jsonable_python(value)
    return yaml.dump(
        jsonable, Dumper=_Dumper, sort_keys=False, allow_unicode=True, default_flow_style=False, width=2**20
    )


def read(path: Path, origin: Callable[[int], str]) -> Node:
    """The mapping of a file, or a node of None if it is empty. ``origin`` as in `parse`."""
    try:
        node = parse(path.read_text(encoding="utf-8"), origin)
    except (OSError, UnicodeError) as error:
        why = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
        raise ConfigError(f"cannot be read: {why}", where=str(path)) from error
    if not isinstance(node.value, dict | None):
        raise ConfigError(f"must be a mapping of keys, not {type(node.value).__name__}", where=node.origin)
    return node


def parse(text: str, origin: Callable[[int], str]) -> Node:
    """``origin``: line (from 1) → where it is, in words. Raises ConfigError."""
    try:
        node = yaml.compose(text, Loader=_Loader)
        return _composed(node, origin, node.start_mark.line + 1) if node else Node(None, origin(1))
    except (yaml.YAMLError, RecursionError) as error:
        mark = error.problem_mark if isinstance(error, yaml.MarkedYAMLError) else None
        message = error.problem if isinstance(error, yaml.MarkedYAMLError) else str(error).partition("\n")[0]
        hint = "text that holds or starts with one of * & : { [ % @ ! needs quotes; indent with spaces"
        raise ConfigError(
            f"not readable as YAML: {message}", where=origin(mark.line + 1 if mark else 1), hint=hint
        ) from error


def _composed(node: yaml.Node, origin: Callable[[int], str], line: int) -> Node:
    where, values = origin(line), {}
    if isinstance(node, yaml.ScalarNode):
        try:
            return Node(_SCALARS[node.tag.removeprefix("tag:yaml.org,2002:")](node.value), where)
        except (KeyError, ValueError) as error:
            raise ConfigError(f'"{node.value}" cannot be read as {node.tag}', where=where) from error
    if isinstance(node, yaml.SequenceNode):
        return Node([plain(_composed(item, origin, item.start_mark.line + 1)) for item in node.value], where)
    for key, item in node.value:
        line = key.start_mark.line + 1
        if key.tag != "tag:yaml.org,2002:str":
            raise ConfigError("a key must be text", where=origin(line), hint="put it in quotes")
        if key.value in values:
            hint = f"it is already given at {values[key.value].origin}"
            raise ConfigError(f'the key "{key.value}" is given twice', where=origin(line), hint=hint)
        values[key.value] = _composed(item, origin, line)
    return Node(values, where)
