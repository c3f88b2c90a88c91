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
from tunesmith.files import read_regular

JSON: TypeAlias = JsonValue


class Bounds(NamedTuple):
    """What one text of settings may hold. ``size``: bytes; the reader takes about ten seconds a megabyte.
    ``values``: None allows one for each character, of which there are more only by aliases.
    ``characters``: of one value."""

    size: int
    values: int | None
    characters: int


OF_A_USER = Bounds(256 << 10, 20_000, 4096)
RECORDED = Bounds(32 << 20, None, 32 << 20)
"""Of the settings that a run has written, which name every file of its data."""


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


def read(path: Path, origin: Callable[[int], str], bounds: Bounds = OF_A_USER) -> Node:
    """The mapping of a file, or a node of None if it is empty. ``origin`` as in `parse`."""
    try:
        with path.open("rb") as file:  # which may be a pipe, or a device that never ends
            content = file.read(bounds.size + 1)
        node = parse(content.decode("utf-8"), origin, bounds)
    except (OSError, ValueError) as error:  # ValueError also for a path with a null character
        why = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
        raise ConfigError(f"cannot be read: {why}", where=shortened(str(path), 1000)) from error
    if not isinstance(node.value, dict | None):
        raise ConfigError(f"must be a mapping of keys, not {type(node.value).__name__}", where=node.origin)
    return node


def parse(text: str, origin: Callable[[int], str], bounds: Bounds = OF_A_USER) -> Node:
    """``origin``: line (from 1) → where it is, in words. Raises ConfigError."""
    if len(text) > bounds.size:
        hint = "settings are a few kilobytes: is this another file?"
        raise ConfigError(f"has more than {bounds.size >> 10:,} kB", where=origin(1), hint=hint)
    try:
        node = yaml.compose(text, Loader=_Loader)
        return (
            _Composer(origin, bounds, len(text))(node, node.start_mark.line + 1)
            if node
            else Node(None, origin(1))
        )
    except (yaml.YAMLError, RecursionError) as error:
        mark = error.problem_mark if isinstance(error, yaml.MarkedYAMLError) else None
        message = error.problem if isinstance(error, yaml.MarkedYAMLError) else str(error).partition("\n")[0]
        hint = "text that holds or starts with one of * & : { [ % @ ! needs quotes; indent with spaces"
        raise ConfigError(
            f"not readable as YAML: {message}", where=origin(mark.line + 1 if mark else 1), hint=hint
        ) from error


class _Composer:
    """Makes nodes of YAML's nodes, of which an alias repeats one with all that is in it."""

    def __init__(self, origin: Callable[[int], str], bounds: Bounds, length: int) -> None:
        self.origin, self.bounds, self.count = origin, bounds, 0
        self.most = length if bounds.values is None else bounds.values

    def __call__(self, node: yaml.Node, line: int) -> Node:
        where, values = self.origin(line), {}
        self.count += 1
        if self.count > self.most:
            hint = "aliases (*name) repeat all that they name: write the values out"
            raise ConfigError(f"has more than {self.most:,} values", where=where, hint=hint)
        if isinstance(node, yaml.ScalarNode):
            return Node(self._scalar(node, where), where)
        if isinstance(node, yaml.SequenceNode):
            return Node([plain(self(item, item.start_mark.line + 1)) for item in node.value], where)
        for key, item in node.value:
            line = key.start_mark.line + 1
            if key.tag != "tag:yaml.org,2002:str":
                raise ConfigError("a key must be text", where=self.origin(line), hint="put it in quotes")
            writable(key.value, self.origin(line), self.bounds)
            if key.value in values:
                hint = f"it is already given at {values[key.value].origin}"
                message = f'the key "{shortened(key.value)}" is given twice'
                raise ConfigError(message, where=self.origin(line), hint=hint)
            values[key.value] = self(item, line)
        return Node(values, where)

    def _scalar(self, node: yaml.ScalarNode, where: str) -> JSON:
        writable(node.value, where, self.bounds)
        try:
            if node.tag.endswith(":int") and len(node.value) > 400:
                raise ValueError("more digits than Python writes")
            return _SCALARS[node.tag.removeprefix("tag:yaml.org,2002:")](node.value)
        except (KeyError, ValueError) as error:
            message = f'"{shortened(node.value)}" cannot be read as {node.tag}'
            raise ConfigError(message, where=where) from error


def writable(text: str, where: str, bounds: Bounds = OF_A_USER) -> None:
    """Raises ConfigError for a text that no file of settings can hold."""
    if len(text) > bounds.characters:
        message = f"a text has {len(text):,} characters, more than {bounds.characters:,}: {shortened(text)}"
        raise ConfigError(message, where=where)
    if _UNWRITABLE.search(text):
        message = f"{shortened(text)} holds half of a surrogate pair"
        raise ConfigError(message, where=where, hint="names of files must be UTF-8")


_UNWRITABLE = re.compile("[\ud800-\udfff]")


def shortened(text: str, most: int = 80) -> str:
    """The first ``most`` characters of ``text``, as ASCII if they cannot be printed."""
    start = text if len(text) <= most else f"{text[:most]}…"
    return start if start.isprintable() else ascii(start)


def skim(path: Path) -> Any:
    """The content of a file that `write` made, with every scalar as text and nothing checked: a hundred times
    as fast as `read`. Raises ConfigError if it is not YAML."""
    loader = yaml.CBaseLoader if yaml.__with_libyaml__ else yaml.BaseLoader
    try:
        return yaml.load(read_regular(path, RECORDED.size).decode("utf-8"), Loader=loader)
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        why = error.strerror if isinstance(error, OSError) else "it is not YAML in UTF-8"
        raise ConfigError(f"cannot be read: {why}", where=shortened(str(path), 1000)) from error
