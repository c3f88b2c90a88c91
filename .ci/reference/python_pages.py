"""The verbs as functions, and the classes that they return."""

from __future__ import annotations

import ast
import inspect
import re
from collections.abc import Iterator
from typing import Any

from sources import class_of, fields_of
from writing import code, first_sentence, prose, table

import tunesmith

INTRODUCTION = """# Python API

Each verb of the [command line](commands.md) is a function of `tunesmith`, under the same name and with the
same meaning (`runs` is `list_runs`, `runs show` is `lineage`, `runs prune` is `prune`, `train --dry-run` is
`rehearse`, and `plan --record` is `track_record`). `import tunesmith` loads neither MLX nor transformers: a
verb loads what it needs when it is first used. `notify` takes a function that is called with
[events](events.md). What goes wrong is an exception of [tunesmith.errors](errors.md).
"""
EXAMPLE = """```python
import tunesmith

settings = tunesmith.configure(model="MODEL", data=["mine.jsonl"], sets=["adapter.rank=8"])
run = tunesmith.train(settings)
evaluation = tunesmith.evaluate(run.path)
print(tunesmith.generate(run.path, ["Note: buy milk"]))
```
"""
OPTIONS = {"audit": "AuditOptions", "evaluate": "EvaluationSpec", "compose": "Recipe"}
"""Verb → the class whose fields are its further keyword arguments."""


def text() -> str:
    parts, returned = [INTRODUCTION, EXAMPLE], {}
    for name in tunesmith.__all__:
        function = getattr(tunesmith, name)
        parts += described(name, function)
        returned |= {kind.__name__: kind for kind in classes(inspect.signature(function).return_annotation)}
    parts.append("## What verbs return\n")
    for kind in returned.values():
        parts += returned_class(kind)
    return "\n".join(parts)


def described(name: str, function: Any) -> Iterator[str]:
    signature = inspect.signature(function)
    lines = [f"    {argument(parameter)}," for parameter in signature.parameters.values()]
    stars = [place for place, one in enumerate(signature.parameters.values()) if one.kind is one.KEYWORD_ONLY]
    if stars:
        lines.insert(stars[0], "    *,")
    yield f"## {name}\n"
    yield "\n".join(
        ["```python", f"tunesmith.{name}(", *lines, f") -> {signature.return_annotation}", "```\n"]
    )
    yield prose(function.__doc__) + "\n"
    if name in OPTIONS:
        assert signature.parameters, name
        yield table(["option", "type", "default", "meaning"], options(class_of(OPTIONS[name])))


def argument(parameter: inspect.Parameter) -> str:
    stars = "**" if parameter.kind is parameter.VAR_KEYWORD else ""
    default = parameter.default
    shown = getattr(default, "__qualname__", None) or repr(default)
    return f"{stars}{parameter.name}: {parameter.annotation}" + f" = {shown}" * (
        default is not parameter.empty
    )


def options(kind: Any) -> Iterator[tuple[str, str, str, str]]:
    for field in fields_of(kind):
        meaning = kind.model_fields[field.name].description or ""
        yield code(field.name), code(field.annotation), code(field.default), meaning.replace("<", "&lt;")


def classes(annotation: Any) -> Iterator[type[Any]]:
    """The classes of the package that an annotation names."""
    for node in ast.walk(ast.parse(str(annotation), mode="eval")):
        if isinstance(node, ast.Name) and (kind := class_of(node.id)) and not node.id.endswith("Config"):
            yield kind


def returned_class(kind: type[Any]) -> Iterator[str]:
    """A class with its fields, and its methods and properties that have words of their own."""
    yield f"### Class {kind.__name__}\n"
    if kind.__doc__ and not kind.__doc__.startswith(f"{kind.__name__}("):
        yield prose(kind.__doc__) + "\n"
    rows = [(code(field.name), code(field.annotation)) for field in fields_of(kind) if field.name[0] != "_"]
    yield table(["field", "type"], rows) if rows else ""
    rows = [(code(name), first_sentence(words)) for name, words in members(kind)]
    yield table(["member", "meaning"], rows) if rows else ""


def members(kind: type[Any]) -> Iterator[tuple[str, str]]:
    for name, member in vars(kind).items():
        function = (
            getattr(member, "fget", None)
            or getattr(member, "func", None)
            or getattr(member, "__func__", member)
        )
        if name[0] == "_" or not inspect.isfunction(function) or not function.__doc__:
            continue
        signature = re.sub(r"\((?:self|cls)(?:, )?", "(", str(inspect.signature(function)).replace("'", ""))
        yield (
            name
            if function is not member and not isinstance(member, classmethod | staticmethod)
            else f"{name}{signature.partition(' ->')[0]}",
            function.__doc__,
        )
