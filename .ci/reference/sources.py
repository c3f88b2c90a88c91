"""What the reference reads from the source itself: classes by name, their fields, and the words of errors."""

from __future__ import annotations

import ast
import inspect
import re
from collections.abc import Iterator
from dataclasses import MISSING, fields, is_dataclass
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import BaseModel

import tunesmith

SOURCE = Path(tunesmith.__file__).parent


@cache
def trees() -> dict[Path, ast.Module]:
    return {path: ast.parse(path.read_text("utf-8")) for path in sorted(SOURCE.rglob("*.py"))}


@cache
def _homes() -> dict[str, str]:
    """Name of a class → its module; a class name exists once in the package (.ci/house.py)."""
    homes: dict[str, str] = {}
    for path, tree in trees().items():
        parts = path.relative_to(SOURCE.parent).with_suffix("").parts
        module = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        homes |= {node.name: module for node in ast.walk(tree) if isinstance(node, ast.ClassDef)}
    return homes


def class_of(name: str) -> type[Any] | None:
    """The class of the package with this name."""
    home = _homes().get(name)
    return getattr(import_module(home), name, None) if home else None


class ClassField(NamedTuple):
    """``default``: as Python writes it; "" if the field is required."""

    name: str
    annotation: str
    default: str


def fields_of(kind: type[Any]) -> list[ClassField]:
    """The fields of a dataclass, a model, a named tuple or a typed dictionary, with those of its bases."""
    notes: dict[str, Any] = {}
    for base in reversed(kind.__mro__ if isinstance(kind, type) else ()):
        notes |= vars(base).get("__annotations__", {})
    if issubclass(kind, BaseModel):
        given = {
            name: field.get_default(call_default_factory=True) for name, field in kind.model_fields.items()
        }
        required = {name for name, field in kind.model_fields.items() if field.is_required()}
        defaults = {name: given[name] for name in given if name not in required}
        names = list(kind.model_fields)
    elif is_dataclass(kind):
        names = [field.name for field in fields(kind)]
        defaults = {field.name: field.default for field in fields(kind) if field.default is not MISSING}
        made = [field for field in fields(kind) if field.default_factory is not MISSING]
        defaults |= {field.name: field.default_factory() for field in made if field.name != "at"}  # type: ignore[misc]
    else:
        names = list(getattr(kind, "_fields", notes))
        defaults = getattr(kind, "_field_defaults", {})
    return [
        ClassField(name, plain(notes[name]), shown(defaults[name]) if name in defaults else "")
        for name in names
    ]


def shown(value: object) -> str:
    """A default, if it says anything."""
    return repr(value) if isinstance(value, str | int | float | bool | tuple | list | dict | None) else ""


def plain(annotation: object) -> str:
    """A type as the source writes it."""
    text = annotation if isinstance(annotation, str) else inspect.formatannotation(annotation)
    text = re.sub(r"^ForwardRef\('(.*)', module=.*\)$", r"\1", text)
    text = re.sub(r"^NotRequired\[(.*)\]$", r"\1, may be absent", text)
    return re.sub(r"\b(?:typing|collections\.abc|tunesmith[\w.]*)\.", "", text)


class Said(NamedTuple):
    """The words of an error, with … for what varies."""

    error: str
    what: str
    hint: str


def errors_raised(names: set[str], at: int = 0) -> list[Said]:
    """Every message that the source gives to an error of one of these classes, sorted. ``at``: the place of
    the message among the arguments."""
    found: set[Said] = set()
    for tree in trees().values():
        for function in ast.walk(tree):
            if isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef):
                found |= set(_said(function, names, at))
    return sorted(found)


def _said(function: ast.FunctionDef | ast.AsyncFunctionDef, names: set[str], at: int) -> Iterator[Said]:
    assigned: dict[str, list[tuple[int, str, bool]]] = {}
    for node in ast.walk(function):
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            assigned.setdefault(node.targets[0].id, []).append((node.lineno, _words(node.value), False))
        elif isinstance(node, ast.AugAssign) and isinstance(node.target, ast.Name):
            assigned.setdefault(node.target.id, []).append((node.lineno, _words(node.value), True))

    def words(node: ast.expr | None, line: int) -> str:
        if not isinstance(node, ast.Name):
            return _words(node)
        text = ""
        for place, said, added in sorted(assigned.get(node.id, [])):
            if place < line:
                text = text + said if added else said
        return text

    for node in ast.walk(function):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in names:
            what = node.args[at] if len(node.args) > at else None
            hint = next((keyword.value for keyword in node.keywords if keyword.arg == "hint"), None)
            text = _tidy(words(what, node.lineno))
            if re.search(r"\w{3}", text):
                yield Said(node.func.id, text, _tidy(words(hint, node.lineno)))


def _words(node: ast.expr | None) -> str:
    """The text of an expression, with … for what is known only when it runs."""
    if isinstance(node, ast.Constant):
        return node.value if isinstance(node.value, str) else ""
    if isinstance(node, ast.JoinedStr):
        return "".join(_words(part) if isinstance(part, ast.Constant) else "…" for part in node.values)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return _words(node.left) + _words(node.right)
    if isinstance(node, ast.IfExp):
        either = [_words(node.body), _words(node.orelse)]
        return " / ".join(text for text in either if text)
    return "" if node is None else "…"


def _tidy(text: str) -> str:
    return re.sub(r"(?:…\s*)+…", "…", " ".join(text.split()))
