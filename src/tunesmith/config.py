"""Settings as frozen values, and where each of them came from.

Layers, lowest first: defaults < preset < files in the order given < environment (``TUNESMITH_ADAPTER__RANK``) <
``--set adapter.rank=8`` < flags of the command line. Mappings are merged key by key; lists and scalars are replaced. Where
a higher layer changes the *kind* of a block to one of another class, nothing of the lower layers' block is carried over,
keys of the same name included: it starts from the defaults of its new kind, and ``Resolved.unused`` tells what was left.
The module knows `Spec` and nothing of what a run is. Files are read by `origins`.
"""

from __future__ import annotations

import difflib
import json
import textwrap
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Generic, Literal, NamedTuple, TypeVar, Union, get_args, get_origin

import annotated_types as limits
from pydantic import BaseModel, ConfigDict, GetJsonSchemaHandler, ValidationError, model_validator
from pydantic.fields import FieldInfo
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema, ErrorDetails, to_jsonable_python

from tunesmith.errors import ConfigError, listing
from tunesmith.origins import JSON, Node, nested, parse, plain, read, write

PREFIX = "TUNESMITH_"
EXEMPT = frozenset({"TUNESMITH_BLAS", "TUNESMITH_CACHE", "TUNESMITH_DEBUG"})
"""Variables that belong to the machine, not to a run; they are read elsewhere."""


class Spec(BaseModel):
    """Base of every settings block: frozen, strict about types, unknown keys refused, defaults checked, no NaN or inf.

    Sequences are declared as ``tuple[...]``; a list is accepted for one. A block that comes in kinds is a union of Specs
    with a field ``kind: Literal[...]``; it also takes the name of a kind (``"kto"``), or a mapping without ``kind``, which
    means the kind of the field's default, else the first member. Built directly it raises pydantic's ValidationError;
    through `load`, ConfigError.
    """

    model_config = ConfigDict(
        frozen=True, extra="forbid", strict=True, validate_default=True, allow_inf_nan=False, protected_namespaces=()
    )

    @model_validator(mode="before")
    @classmethod
    def _prepare(cls, values: object) -> object:
        if not isinstance(values, dict):
            return values
        shapes = {name: _shape(field) for name, field in cls.model_fields.items() if name in values}
        return {name: shape.expand(values[name]) if (shape := shapes.get(name)) else _tuples(values[name]) for name in values}

    @classmethod
    def __get_pydantic_json_schema__(cls, core_schema: CoreSchema, handler: GetJsonSchemaHandler, /) -> JsonSchemaValue:
        """As pydantic's, and the name of a kind is valid where a block has kinds."""
        described = handler(core_schema)
        properties = handler.resolve_ref_schema(described)["properties"]
        for name, field in cls.model_fields.items():
            if (shape := _shape(field)) and shape.kinds:
                old = properties[name]
                kept = {key: old.pop(key) for key in ("title", "description", "default") if key in old}
                properties[name] = {"anyOf": [{"enum": shape.kinds}, *old.get("anyOf", [old])], **kept}
        return described


S = TypeVar("S", bound=Spec)


@dataclass(frozen=True, slots=True)
class Resolved(Generic[S]):
    """``origins``: key path → where its value was set. ``unused``: what a change of kind left behind, one line each."""

    spec: S
    origins: dict[str, str]  # "run.yaml:4" | "default" | "preset NAME" | "TUNESMITH_…" | "--set" | a flag
    unused: tuple[str, ...] = ()


def load(
    root: type[S],
    *,
    preset: str | None = None,
    files: Sequence[Path] = (),
    environ: Mapping[str, str] = {},
    sets: Sequence[str] = (),
    overrides: Mapping[str, tuple[JSON, str]] = {},
) -> Resolved[S]:
    """All layers as one checked spec. ``overrides``: key path → (value, origin), from flags such as ``--model``.

    Raises ConfigError: at once where a text is not readable as YAML; else with every unknown key, missing key, and value
    of a wrong type or out of range together.
    """
    layers = _Layers(root)
    if preset is not None:
        layers.add([read(preset_file(preset), lambda line: f"preset {preset}")])
    for path in files:
        layers.add([read(path, lambda line, path=path: f"{path}:{line}")])
    variables = [name for name in environ if name.startswith(PREFIX) and name not in EXEMPT]
    layers.add(nested(name[len(PREFIX) :].lower().split("__"), parse(environ[name], lambda _, name=name: name))
               for name in variables)  # fmt: skip
    layers.add(_assignment(text) for text in sets)
    layers.add(nested(key.split("."), _node(value, origin)) for key, (value, origin) in overrides.items())
    spec = layers.build(root, layers.tree, "")
    if spec is None or layers.problems:
        raise _error(layers.problems + layers.missing)
    return Resolved(spec, {key: origin for key, _, origin in _leaves(spec, layers.tree, "")}, tuple(layers.unused))


def presets() -> dict[str, Path]:
    """Name → file of the settings that ship with the package, by name."""
    folder = Path(str(resources.files("tunesmith") / "presets"))
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))}


def preset_file(name: str) -> Path:
    """Raises ConfigError with the names there are."""
    if name not in presets():
        hint = _meant(difflib.get_close_matches(name, presets())) or f"presets: {', '.join(presets())}"
        raise ConfigError(f'no preset is called "{name}"', hint=hint)
    return presets()[name]


def explain(resolved: Resolved[S]) -> list[str]:
    """One line a value: ``adapter.rank 16 (run.yaml:4)``."""
    leaves = _leaves(resolved.spec, None, "")
    return [f"{key} {_show(value, bare=True)} ({resolved.origins[key]})" for key, value, _ in leaves]


def dump(spec: Spec) -> str:
    """Complete YAML, defaults included; `load` gives an equal spec (floats are written so that they read back exactly)."""
    return write(spec.model_dump(mode="json"))


def schema(root: type[Spec]) -> dict[str, JSON]:
    """JSON schema (2020-12) of the settings, for editors."""
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **root.model_json_schema()}


def annotated(root: type[Spec], values: Mapping[str, JSON] = {}) -> str:
    """YAML of every key with its description, what is allowed and its default as comments; ``values``: key path → value.

    A required key without a value is left as a comment. Raises ConfigError where a value is wrong.
    """
    layers = _Layers(root)
    layers.add(nested(key.split("."), _node(value, "values")) for key, value in values.items())
    layers.build(root, layers.tree, "")
    if layers.problems:
        raise _error(layers.problems)
    return "\n".join(_commented(root, layers.tree, "")) + "\n"


# --- values with their origins


def _node(value: object, origin: str = "default") -> Node:
    if isinstance(value, Spec):
        value = {name: getattr(value, name) for name in type(value).model_fields}
    return Node({key: _node(item, origin) for key, item in value.items()} if isinstance(value, dict) else value, origin)


def _leaves(value: object, node: Node | None, key: str) -> Iterator[tuple[str, object, str]]:
    """(key path, value, origin). Entries of a mapping are leaves of their own; a list is one leaf."""
    if isinstance(value, Spec):
        value = {name: getattr(value, name) for name in type(value).model_fields}
    if not isinstance(value, dict) or not value:
        yield key, value, node.origin if node else "default"
        return
    for name, child in value.items():
        below = node.value.get(name) if node and isinstance(node.value, dict) else None
        yield from _leaves(child, below, _join(key, name))


def _join(key: str, name: object) -> str:
    return f"{key}.{name}" if key else str(name)


def _tuples(value: object) -> object:
    if isinstance(value, dict):
        return {key: _tuples(item) for key, item in value.items()}
    return tuple(_tuples(item) for item in value) if isinstance(value, list | tuple) else value


# --- what a field accepts


class _Shape(NamedTuple):
    """A field that holds a Spec. ``members``: kind → class, or "" → class where there are no kinds."""

    members: dict[str, type[Spec]]
    first: str  # the kind of a mapping that names none
    optional: bool

    @property
    def kinds(self) -> list[str]:
        return [kind for kind in self.members if kind]

    def block(self, kind: str) -> dict[str, Node]:
        """The defaults of a kind."""
        return {**_defaults(self.members[kind]), **({"kind": Node(kind, "default")} if kind else {})}

    def expand(self, value: object) -> object:
        """The shorthands written out: the name of a kind, and a mapping without ``kind``."""
        if isinstance(value, str) and value in self.kinds:
            return {"kind": value}
        return {"kind": self.first, **value} if isinstance(value, dict) and self.kinds else value


def _shape(field: FieldInfo) -> _Shape | None:
    parts = _parts(field.annotation)
    members = {kind: part for part in parts if _is_spec(part) for kind in _kinds(part)}
    if not members:
        return None
    default = None if field.is_required() else _default(field)
    first = _node(default).value["kind"].value if "" not in members and isinstance(default, Spec) else next(iter(members))
    return _Shape(members, first, NoneType in parts)


def _default(field: FieldInfo) -> Any:
    return field.get_default(call_default_factory=True, validated_data={})


def _defaults(model: type[Spec]) -> dict[str, Node]:
    return {name: _node(_default(field)) for name, field in model.model_fields.items() if not field.is_required()}


def _parts(annotation: Any) -> list[Any]:
    """The members of a union, nested and annotated ones unfolded."""
    if get_origin(annotation) is Annotated:
        return _parts(get_args(annotation)[0])
    if get_origin(annotation) in (Union, UnionType):
        return [part for member in get_args(annotation) for part in _parts(member)]
    return [annotation]


def _is_spec(part: Any) -> bool:
    return isinstance(part, type) and issubclass(part, Spec)


def _kinds(spec: type[Spec]) -> tuple[str, ...]:
    field = spec.model_fields.get("kind")
    return get_args(field.annotation) if field is not None and get_origin(field.annotation) is Literal else ("",)


_BOUNDS = ((limits.Gt, "gt", ">"), (limits.Ge, "ge", "≥"), (limits.Lt, "lt", "<"), (limits.Le, "le", "≤"))


def _allowed(annotation: Any, metadata: Sequence[Any] = ()) -> str:
    """What may be written, in words: ``an integer ≥ 1 or null``."""
    origin, args = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _allowed(args[0], [one for item in args[1:] for one in (item.metadata if isinstance(item, FieldInfo) else [item])])
    if origin in (Union, UnionType) or _is_spec(annotation):
        parts = sorted(args or [annotation], key=lambda part: part is NoneType)
        kinds = [kind for part in parts if _is_spec(part) for kind in _kinds(part)]
        block = f"one of the kinds {', '.join(kinds)}" if any(kinds) else "a mapping of keys"
        return " or ".join([block] * bool(kinds) + [_allowed(part, metadata) for part in parts if not _is_spec(part)])
    if origin is Literal:
        return "one of " * (len(args) > 1) + ", ".join(_show(value, bare=True) for value in args)
    least = next((limit.min_length for limit in metadata if isinstance(limit, limits.MinLen)), 0)
    if origin is tuple:
        items = _allowed(args[0]).replace("an integer", "integers").replace("a number", "numbers")
        return f"a list of {items}" + f" (at least {least})" * bool(least)
    bounds = " and ".join(f"{sign} {getattr(limit, name):g}" for limit in metadata for kind, name, sign in _BOUNDS
                          if isinstance(limit, kind))  # fmt: skip
    words = {
        bool: "true or false",
        int: f"an integer {bounds}".rstrip(),
        float: f"a number {bounds}".rstrip(),
        str: "text" + f" (at least {least} character{'s' * (least > 1)})" * bool(least),
        NoneType: "null",
    }
    return words.get(annotation) or ("a mapping" if dict in (origin, annotation) else "another value")


def _show(value: object, *, bare: bool = False) -> str:
    """A value on one line, cut at 80 characters; text in quotes unless ``bare``."""
    text = value if bare and isinstance(value, str) else json.dumps(to_jsonable_python(value), ensure_ascii=False)
    return text if len(text) <= 80 else text[:79] + "…"


# --- merging and checking


def _error(problems: Sequence[ConfigError]) -> ConfigError:
    lines = [f"{problem.where}: {problem.what}" + (f" ({problem.hint})" if problem.hint else "") for problem in problems]
    summary = ConfigError(f"{len(problems)} problems in the settings:\n{listing(lines)}")
    return problems[0] if len(problems) == 1 else summary


def _meant(names: Sequence[str]) -> str | None:
    return f"did you mean {' or '.join(names)}?" if names else None


_FAILED = object()
"""Stands in a tree for a block whose problem is already noted."""


def _assignment(text: str) -> Node:
    key, sign, value = text.partition("=")
    if not sign:
        raise ConfigError(f'must be key=value, not "{text}"', where="--set", hint="for example --set adapter.rank=8")
    return nested(key.strip().split("."), parse(value, lambda line: "--set"))


class _Layers:
    """The settings while layers are added, lowest first, and all that is wrong with them."""

    def __init__(self, root: type[Spec]) -> None:
        self.shape = _Shape({"": root}, "", optional=False)
        self.tree = Node(self.shape.block(""), "default")
        self.problems: list[ConfigError] = []
        self.missing: list[ConfigError] = []
        self.unused: list[str] = []
        self.known = list(dict.fromkeys(_known(root, "")))

    def add(self, nodes: Iterable[Node]) -> None:
        """One layer. Sections go before their keys and ``kind`` before its neighbours, whatever the order given."""
        for node in sorted(nodes, key=_order):
            self.tree = self.overlay(self.shape, self.tree, node, "")

    def overlay(self, shape: _Shape | None, lower: Node | None, upper: Node, key: str) -> Node:
        """``upper`` over ``lower``; unknown keys and kinds are noted and left out."""
        below = lower.value if lower and isinstance(lower.value, dict) else None
        if shape and isinstance(upper.value, str) and shape.kinds:
            upper = Node({"kind": upper}, upper.origin)
        if shape and upper.value is None and not shape.optional:
            upper = Node({}, upper.origin)  # a section whose keys are all commented out
        if not isinstance(upper.value, dict):
            return upper
        if shape is None:
            merged = {name: self.overlay(None, (below or {}).get(name), node, key) for name, node in upper.value.items()}
            return Node({**(below or {}), **merged}, upper.origin)
        old = below["kind"].value if below and shape.kinds else "" if below is not None else None
        named = upper.value.get("kind") if shape.kinds else None
        kind = plain(named) if named else shape.first if old is None else old
        if kind not in list(shape.members):
            hint = _meant(difflib.get_close_matches(str(kind), shape.kinds)) or f"kinds: {', '.join(shape.kinds)}"
            self.problems.append(ConfigError(f"unknown kind {_show(kind)}", where=f"{(named or upper).origin}: {key}", hint=hint))
            return Node(_FAILED, upper.origin)
        if below is None or old is None or shape.members[kind] is not shape.members[old]:
            self.unused += [f"{path} {_show(value, bare=True)} ({origin}): not used, {key} is {kind} ({upper.origin})"
                            for path, value, origin in _leaves(plain(lower) if lower and below else {}, lower, key)
                            if origin != "default" and path != f"{key}.kind"]  # fmt: skip
            below = shape.block(kind)
        merged, fields = dict(below), shape.members[kind].model_fields
        for name, node in upper.value.items():
            if name in fields:
                merged[name] = self.overlay(_shape(fields[name]), merged.get(name), node, _join(key, name))
            else:
                self.unknown(name, node.origin, key, shape, kind)
        return Node(merged, upper.origin)

    def unknown(self, name: str, origin: str, section: str, shape: _Shape, kind: str) -> None:
        key, here = _join(section, name), list(shape.members[kind].model_fields)
        others = [other for other in shape.kinds if name in shape.members[other].model_fields]
        same = [known for known in self.known if known.rpartition(".")[2] == name]
        near = [_join(section, match) for match in difflib.get_close_matches(name, here)]
        names = list(dict.fromkeys(same + near))[:3]
        if origin.startswith(PREFIX):
            variables = [PREFIX + known.replace(".", "__").upper() for known in names]
            every = {known.replace(".", "__").upper() for known in self.known} | {name[len(PREFIX) :] for name in EXEMPT}
            close = difflib.get_close_matches(origin[len(PREFIX) :], sorted(every), cutoff=0.75)
            names = list(dict.fromkeys([PREFIX + variable for variable in close] + variables))[:3]
        what, hint = "unknown key", _meant(names) or f"known here: {', '.join(here)}"
        if others:
            what, hint = f"{section} is {kind}, and this key belongs to {', '.join(others)}", None
        elif key in self.known:
            hint = f"a dot does not nest here: write {name.partition('.')[0]}, and its keys indented below it"
        self.problems.append(ConfigError(what, where=f"{origin}: {key}", hint=hint))

    def build(self, model: type[S], node: Node, key: str) -> S | None:
        """The checked spec of a tree of known keys; None where something is wrong, which is then noted."""
        values: dict[str, Any] = {}
        for name, child in node.value.items():
            shape = _shape(model.model_fields[name])
            values[name] = plain(child)
            if shape and isinstance(child.value, dict):
                member = shape.members[child.value["kind"].value if shape.kinds else ""]
                values[name] = self.build(member, child, _join(key, name)) or _FAILED
        try:
            return model.model_validate(values)
        except ValidationError as error:
            first = {detail["loc"][:1]: detail for detail in reversed(error.errors(include_url=False))}
            for detail in reversed(first.values()):
                self.tell(model, node, key, detail)
        return None

    def tell(self, model: type[Spec], node: Node, key: str, detail: ErrorDetails) -> None:
        """A finding of pydantic in plain words."""
        own = str(detail["ctx"]["error"]) if detail["type"] in ("value_error", "assertion_error") else None  # type: ignore
        if not detail["loc"]:
            where = f"{node.origin}: {key}" if key else "settings"
            self.problems.append(ConfigError(own or detail["msg"], where=where))
            return
        field, child = model.model_fields[str(detail["loc"][0])], node.value.get(detail["loc"][0])
        path, allowed = _join(key, detail["loc"][0]), _allowed(field.annotation, field.metadata)
        if child is None:
            for name, what in _required(field, path):
                hint = f"add it to the file, or give --set {name}=…"
                self.missing.append(ConfigError(f"missing; must be {what}", where=name, hint=hint))
        elif detail["input"] is not _FAILED:
            value = _show(plain(child))
            plainly = f"must be {allowed}, not {value}"
            told = plainly if detail["type"].endswith(_TOLD) else f"{own or detail['msg']}; it is {value}"
            self.problems.append(ConfigError(told, where=f"{child.origin}: {path}"))


_TOLD = ("_type", "literal_error", "_equal", "_than", "_short", "_number", "_from_float", "_required")
"""Ends of the names of pydantic's findings that ``must be`` and what is allowed say in full."""


def _order(node: Node) -> list[str]:
    path: list[str] = []
    while isinstance(node.value, dict) and len(node.value) == 1:
        ((name, node),) = node.value.items()
        path.append("" if name == "kind" else name)
    return path


def _known(model: type[Spec], key: str) -> Iterator[str]:
    """Every key path of every kind."""
    for name, field in model.model_fields.items():
        yield _join(key, name)
        for member in (shape.members if (shape := _shape(field)) else {}).values():
            yield from _known(member, _join(key, name))


def _required(field: FieldInfo, key: str) -> list[tuple[str, str]]:
    """(key path, what is allowed) of the values that are missing where a field is not given at all."""
    shape = _shape(field)
    inner = shape.members[""].model_fields.items() if shape and not shape.kinds else ()
    missing = [found for name, item in inner if item.is_required() for found in _required(item, _join(key, name))]
    return missing or [(key, _allowed(field.annotation, field.metadata))]


def _commented(model: type[Spec], node: Node, indent: str) -> Iterator[str]:
    for name, field in sorted(model.model_fields.items(), key=lambda item: item[0] != "kind"):
        shape, child = _shape(field), node.value.get(name)
        if shape and child is None:
            child = Node(shape.block(shape.first), "default")
        section = shape is not None and child is not None and isinstance(child.value, dict)
        words = [field.description] if field.description else []
        if not section or (shape and shape.kinds):
            default = "required" if field.is_required() else f"default {_show(_default(field), bare=True)}"
            default = f"default {shape.first}" if section and shape and not field.is_required() else default
            words.append(f"{_allowed(field.annotation, field.metadata)}; {default}")
        if name != "kind" or len(get_args(field.annotation)) != 1:
            yield from (f"{indent}# {line}" for text in words for line in textwrap.wrap(text, 110 - len(indent)))
        if section and shape and child:
            yield f"{indent}{name}:"
            yield from _commented(shape.members[child.value["kind"].value if shape.kinds else ""], child, indent + "  ")
        elif child:
            yield from (indent + line for line in write({name: plain(child)}).splitlines())
        else:
            yield f"{indent}# {name}:"
