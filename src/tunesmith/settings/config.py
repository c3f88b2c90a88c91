"""Settings as frozen values, and where each of them came from.

Layers, lowest first: defaults < preset < files in the order given < environment (``TUNESMITH_ADAPTER__RANK``)
< ``--set adapter.rank=8`` < flags of the command line. Mappings are merged key by key; lists and scalars are
replaced. If a higher layer changes the *kind* of a block to one of another class, nothing of the lower
layers' block is carried over, keys of the same name included: it starts from the defaults of its new kind,
and ``Resolved.unused`` lists the values that were dropped. The module knows `Spec` and nothing of what a run
is. Files are read by `origins`."""

from __future__ import annotations

import difflib
import json
import pkgutil
import textwrap
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module, resources
from pathlib import Path
from types import NoneType, UnionType
from typing import (
    TYPE_CHECKING,
    Annotated,
    Any,
    ClassVar,
    Generic,
    Literal,
    NamedTuple,
    TypeVar,
    Union,
    get_args,
    get_origin,
)

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    GetCoreSchemaHandler,
    GetJsonSchemaHandler,
    ValidationError,
    ValidationInfo,
    model_validator,
)
from pydantic.fields import FieldInfo
from pydantic_core import CoreSchema, ErrorDetails, PydanticKnownError, to_jsonable_python
from pydantic_core.core_schema import union_schema, with_info_after_validator_function

from tunesmith.errors import ConfigError, listing
from tunesmith.settings import origins
from tunesmith.settings.origins import JSON, Node, parse, plain, read, shortened, writable, write

PREFIX = "TUNESMITH_"
OPTIONS = {"model.path": "--model MODEL", "data.train": "--data FILE"}
"""Settings that have an option of their own on the command line."""
EXEMPT = frozenset(PREFIX + name for name in ("ALLOCATOR", "BLAS", "CACHE", "CXXFLAGS", "DEBUG", "KERNELS"))
"""Variables that belong to the machine, not to a run; they are read elsewhere."""


Texts = Annotated[
    tuple[str, ...],
    BeforeValidator(lambda value: (value,) if isinstance(value, str) else value, tuple[str, ...] | str),
]
"""Several texts; one alone may be written without a list."""


@dataclass(frozen=True)
class Sensible:
    """Annotates a number: the range that a user may set. A run that recorded a number beyond it is read:
    pydantic's context then names the field."""

    ge: float | None = None
    le: float | None = None

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return with_info_after_validator_function(self._checked, handler(source))

    def __get_pydantic_json_schema__(
        self, schema: CoreSchema, handler: GetJsonSchemaHandler
    ) -> dict[str, Any]:
        limits = {"minimum": self.ge, "maximum": self.le}
        return handler(schema) | {name: limit for name, limit in limits.items() if limit is not None}

    def _checked(self, value: float | None, info: ValidationInfo) -> float | None:
        if value is None or info.field_name in (info.context or ()):
            return value
        if self.ge is not None and value < self.ge:
            raise PydanticKnownError("greater_than_equal", {"ge": self.ge})
        if self.le is not None and value > self.le:
            raise PydanticKnownError("less_than_equal", {"le": self.le})
        return value


class Spec(BaseModel):
    """Base of every settings block: frozen, strict about types, unknown keys refused, defaults checked, no
    NaN or inf.

    Sequences are declared as ``tuple[...]``; a list is accepted for one. A block that comes in kinds is a
    union of Specs with a field ``kind: Literal[...]``; it also takes the name of a kind (``"kto"``), or a
    mapping without ``kind``, which means the kind of the field's default, else the first member. A kind's
    ``suits`` (key path → value) are the defaults of other keys under it. Built directly it raises pydantic's
    ValidationError; through `load`, ConfigError."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        strict=True,
        validate_default=True,
        allow_inf_nan=False,
        protected_namespaces=(),
    )

    @model_validator(mode="before")
    @classmethod
    def _prepare(cls, values: object) -> object:
        if not isinstance(values, dict):
            return values
        prepared = {name: _tuples(value) for name, value in values.items()}
        for name, field in cls.model_fields.items():
            if name in prepared and (shape := _shape(field)) and shape.kinds:
                value = {"kind": prepared[name]} if prepared[name] in shape.kinds else prepared[name]
                prepared[name] = {"kind": shape.first, **value} if isinstance(value, dict) else value
        return prepared


class Family(Spec):
    """Abstract: a block whose kinds are not listed. Each concrete subclass of a direct subclass registers its
    kind.

    A field takes every registered kind if it is declared as ``Annotated[SerializeAsAny[Base],
    BeforeValidator(Base.member)]``."""

    if TYPE_CHECKING:
        kind: Any  # a Literal in each concrete subclass
    folder: ClassVar[str]
    """The package whose modules define kinds; they are imported when kinds are first asked for."""
    registered: ClassVar[dict[str, type[Spec]]]

    @classmethod
    def __pydantic_init_subclass__(cls, **options: Any) -> None:
        if Family in cls.__bases__:
            cls.registered = {}
        else:
            cls.registered |= {kind: cls for kind in _kinds(cls) if kind}

    @classmethod
    def members(cls) -> dict[str, type[Spec]]:
        """All kinds by name, in the order of their names."""
        for module in pkgutil.iter_modules(import_module(cls.folder).__path__, f"{cls.folder}."):
            import_module(module.name)
        return dict(sorted(cls.registered.items()))

    @classmethod
    def member(cls, value: object) -> object:
        """A mapping with a known ``kind`` as the spec of that kind; anything else as it is."""
        kind = value.get("kind") if isinstance(value, dict) else None
        known = cls.members()
        return known[kind].model_validate(value) if kind in known else value

    @classmethod
    def __get_pydantic_json_schema__(
        cls, schema: CoreSchema, handler: GetJsonSchemaHandler
    ) -> dict[str, Any]:
        if Family not in cls.__bases__:
            return handler(schema)
        return handler(union_schema([member.__pydantic_core_schema__ for member in cls.members().values()]))


S = TypeVar("S", bound=Spec)


@dataclass(frozen=True, slots=True)
class Resolved(Generic[S]):
    """``origins``: key path → where its value was set. ``unused``: what a change of kind left behind, one
    line each. ``notes``: what was read from the layout of folders, one line each."""

    spec: S
    origins: dict[
        str, str
    ]  # "run.yaml:4" | "default" | "default of kto" | "preset NAME" | "TUNESMITH_…" | "--set" | a flag
    unused: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


EXAMPLE = "--set adapter.rank=8"
"""The flag of assignments, with one of them."""


def load(
    root: type[S],
    *,
    preset: str | None = None,
    files: Sequence[Path] = (),
    environ: Mapping[str, str] = {},
    sets: Sequence[str] = (),
    overrides: Mapping[str, tuple[JSON, str]] = {},
    recorded: Collection[Path] = (),
    example: str = EXAMPLE,
) -> Resolved[S]:
    """All layers as one checked spec. ``overrides``: key path → (value, origin), from flags such as
    ``--model``. ``recorded``: those of ``files`` that runs have written. They may be long, and their numbers
    need not be `Sensible`. ``example``: the flag from which ``sets`` come, with one of its values.

    Raises ConfigError: immediately if a text is not readable as YAML; otherwise one error lists every unknown
    key, missing key, and value of a wrong type or out of range."""
    for name in sorted(environ.keys() - EXEMPT):
        if name.startswith(PREFIX) and (near := difflib.get_close_matches(name, EXEMPT, n=1, cutoff=0.95)):
            raise ConfigError("is no setting", where=name, hint=f"did you mean {near[0]}?")
    layers = _Layers(root, frozenset(map(str, recorded)))
    if preset is not None:
        layers.add(([], read(preset_file(preset), lambda line: f"preset {preset}")))
    for path in files:
        bounds = origins.RECORDED if path in recorded else origins.OF_A_USER
        layers.add(([], read(path, lambda line, path=path: f"{path}:{line}", bounds)))
    keys = {
        name: name[len(PREFIX) :].lower().split("__")
        for name in environ
        if name.startswith(PREFIX) and name not in EXEMPT
    }
    layers.add(*((key, parse(environ[name], lambda line, name=name: name)) for name, key in keys.items()))
    layers.add(*(_assignment(text, example) for text in sets))
    for value, origin in overrides.values():
        for text in value if isinstance(value, list) else [value]:
            if isinstance(text, str):
                writable(text, origin)
    layers.add(*((key.split("."), _node(value, origin)) for key, (value, origin) in overrides.items()))
    layers.suit()
    spec = layers.build(root, layers.tree, "")
    if spec is None or layers.problems:
        raise _error(layers.problems + layers.missing)
    return Resolved(
        spec,
        {key: origin for key, _, origin in _leaves(spec.model_dump(), layers.tree, "")},
        tuple(layers.unused),
    )


def from_arguments(root: type[S], arguments: Mapping[str, object]) -> S:
    """A spec from the keyword arguments of a function. Raises ConfigError as `load` does."""

    def plain_value(value: Any) -> JSON:
        if isinstance(value, list | tuple):
            return [plain_value(item) for item in value]
        return str(value) if isinstance(value, Path) else value

    return load(root, overrides={key: (plain_value(value), key) for key, value in arguments.items()}).spec


def presets() -> dict[str, Path]:
    """Name → file of the settings that ship with the package, by name."""
    folder = Path(str(resources.files("tunesmith.settings") / "presets"))
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))}


def preset_file(name: str) -> Path:
    """Raises ConfigError, which lists the presets."""
    if name not in presets():
        hint = _meant(difflib.get_close_matches(name, presets()), "presets", presets())
        raise ConfigError(f'no preset is called "{name}"', hint=hint)
    return presets()[name]


def explain(resolved: Resolved[S]) -> list[str]:
    """One line a value: ``adapter.rank 16 (run.yaml:4)``."""
    leaves = _leaves(resolved.spec.model_dump(), None, "")
    return [f"{key} {_show(value, bare=True)} ({resolved.origins[key]})" for key, value, _ in leaves]


def dump(spec: Spec) -> str:
    """Complete YAML, defaults included; `load` gives an equal spec (floats are written so that they read back
    exactly)."""
    return write(spec.model_dump(mode="json"))


def schema(root: type[Spec]) -> dict[str, JSON]:
    """JSON schema (2020-12) of the settings, for editors."""
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **root.model_json_schema()}


def annotated(root: type[Spec], values: Mapping[str, JSON] = {}) -> str:
    """YAML of every key with its description, what is allowed and its default as comments; ``values``: key
    path → value.

    A required key without a value is left as a comment. Raises ConfigError if a value is wrong.
    """
    layers = _Layers(root)
    layers.add(*((key.split("."), _node(value, "values")) for key, value in values.items()))
    layers.suit()
    layers.build(root, layers.tree, "")
    if layers.problems:
        raise _error(layers.problems)
    return "\n".join(_commented(root, layers.tree, "")) + "\n"


class Setting(NamedTuple):
    """What a key means. ``kinds``: those of its block that have it, empty if the block has no kinds.
    ``default``: None if it is required. ``when``: in which case another value is better."""

    key: str
    kinds: tuple[str, ...]
    allowed: str
    default: str | None
    effect: str
    when: str


def meanings(root: type[Spec]) -> list[Setting]:
    """Every key of every kind, in the order of the fields. Keys of several kinds that mean the same are one;
    a key of an entry of a list has ``[]`` before it."""
    merged: dict[Setting, list[str]] = {}
    for setting in _meanings(root, "", ""):
        merged.setdefault(setting._replace(kinds=()), []).extend(setting.kinds)
    return [setting._replace(kinds=tuple(kinds)) for setting, kinds in merged.items()]


def _meanings(model: type[Spec], key: str, kind: str) -> Iterator[Setting]:
    for name, field in sorted(model.model_fields.items(), key=lambda item: item[0] != "kind"):
        path, shape = _join(key, name), _shape(field)
        many = shape is not None and len({*shape.members.values()}) > 1
        if (many or not shape) and not (kind and name == "kind"):
            allowed = _allowed(field.annotation, field.metadata)
            kinds = (kind,) if kind else ()
            yield Setting(path, kinds, allowed, _first(field), field.description or "", _when(field))
        blocks = {block: name if many else "" for name, block in shape.members.items()} if shape else {}
        for block, name in blocks.items():
            yield from _meanings(block, path, name)
        for block in (part for part in _items(field) if _kinds(part)):
            yield from _meanings(block, f"{path}[]", "")


def flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """The leaves of nested mappings by their dotted keys."""
    leaves: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping):
            leaves |= flat(value, f"{prefix}{key}.")
        else:
            leaves[prefix + key] = value
    return leaves


def _node(value: object, origin: str = "default") -> Node:
    value = value.model_dump() if isinstance(value, Spec) else value
    return Node(
        {key: _node(item, origin) for key, item in value.items()} if isinstance(value, dict) else value,
        origin,
    )


def _leaves(value: object, node: Node | None, key: str) -> Iterator[tuple[str, object, str]]:
    """(key path, value, origin). Entries of a mapping are leaves of their own; a list is one leaf."""
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


class _Shape(NamedTuple):
    """A field that holds a Spec. ``members``: kind → class, or "" → class if there are no kinds."""

    members: dict[str, type[Spec]]
    first: str  # the kind of a mapping that names none
    optional: bool

    @property
    def kinds(self) -> list[str]:
        return [kind for kind in self.members if kind]

    def block(self, kind: str) -> dict[str, Node]:
        """The defaults of a kind; of a required block in it without kinds, the defaults of its keys."""
        blocks = {"kind": Node(kind, "default")} if kind else {}
        for name, field in self.members[kind].model_fields.items():
            if name not in blocks and not field.is_required():
                blocks[name] = _node(_default(field))
            elif (shape := _shape(field)) and not shape.kinds:
                blocks[name] = Node(shape.block(""), "default")
        return blocks

    def member(self, node: Node) -> type[Spec]:
        return self.members[node.value["kind"].value if self.kinds else ""]


def _shape(field: FieldInfo) -> _Shape | None:
    parts = _parts(field.annotation)
    members = {kind: part for part in parts for kind in _kinds(part)}
    return (
        _Shape(members, getattr(_default(field), "kind", next(iter(members))), NoneType in parts)
        if members
        else None
    )


def _default(field: FieldInfo) -> Any:
    return field.get_default(call_default_factory=True, validated_data={})


def _first(field: FieldInfo) -> str | None:
    """The default in words, or None if there is none: of a block, its kind."""
    if field.is_required():
        return None
    shape, value = _shape(field), _default(field)
    return shape.first if shape and shape.kinds and value is not None else _show(value, bare=True)


def _when(field: FieldInfo) -> str:
    """When another value is better, as the field's ``json_schema_extra`` says it."""
    extra = field.json_schema_extra
    return str(extra.get("when", "")) if isinstance(extra, dict) else ""


def _parts(annotation: Any) -> list[Any]:
    """The members of a union or a family, nested and annotated ones unfolded."""
    if isinstance(annotation, type) and Family in annotation.__bases__:
        return list(annotation.members().values())
    if get_origin(annotation) is Annotated:
        return _parts(get_args(annotation)[0])
    if get_origin(annotation) in (Union, UnionType):
        return [part for member in get_args(annotation) for part in _parts(member)]
    return [annotation]


def _items(field: FieldInfo) -> list[Any]:
    """What a list holds; empty if the field is not a list."""
    annotation = field.annotation
    return _parts(get_args(annotation)[0]) if get_origin(annotation) is tuple else []


def _kinds(part: Any) -> tuple[str, ...]:
    """The kinds of a Spec, or ``("",)`` if it has none; empty if it is not a Spec."""
    if not (isinstance(part, type) and issubclass(part, Spec)):
        return ()
    field = part.model_fields.get("kind")
    return (
        get_args(field.annotation) if field is not None and get_origin(field.annotation) is Literal else ("",)
    )


_SIGNS = {"gt": ">", "ge": "≥", "lt": "<", "le": "≤"}


def _allowed(annotation: Any, metadata: Sequence[Any] = ()) -> str:
    """What may be written, in words: ``an integer ≥ 1 or null``."""
    origin, args = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _allowed(
            args[0],
            [one for item in args[1:] for one in (item.metadata if isinstance(item, FieldInfo) else [item])],
        )
    if origin in (Union, UnionType) or _kinds(annotation):
        parts = sorted(args or _parts(annotation), key=lambda part: part is NoneType)
        kinds = [kind for part in parts for kind in _kinds(part)]
        block = f"one of the kinds {', '.join(kinds)}" if any(kinds) else "a mapping of keys"
        return " or ".join(
            [block] * bool(kinds) + [_allowed(part, metadata) for part in parts if not _kinds(part)]
        )
    if origin is Literal:
        return "one of " * (len(args) > 1) + ", ".join(_show(value, bare=True) for value in args)
    least = max((getattr(limit, "min_length", 0) for limit in metadata), default=0)
    if origin is tuple:
        items = _allowed(args[0]).replace("an integer", "integers").replace("a number", "numbers")
        items = items.replace("a mapping of", "mappings of")
        return f"a list of {items}" + f" (at least {least})" * bool(least)
    limits = [(sign, getattr(limit, name, None)) for limit in metadata for name, sign in _SIGNS.items()]
    given = {sign: bound for sign, bound in limits if bound is not None}
    if "≥" in given:  # which says more
        given.pop(">", None)
    bounds = " and ".join(f"{sign} {bound:g}" for sign, bound in given.items())
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
    text = (
        value
        if bare and isinstance(value, str)
        else json.dumps(to_jsonable_python(value), ensure_ascii=False)
    )
    return text if len(text) <= 80 else text[:79] + "…"


def _error(problems: Sequence[ConfigError]) -> ConfigError:
    if len(problems) == 1:
        return problems[0]
    lines = [
        f"{problem.where}: {problem.what}" + (f" ({problem.hint})" if problem.hint else "")
        for problem in problems
    ]
    return ConfigError(f"{len(problems)} problems in the settings:\n{listing(lines)}")


def _meant(names: Sequence[str], label: str, every: Iterable[str]) -> str:
    return f"did you mean {' or '.join(names)}?" if names else f"{label}: {', '.join(every)}"


_ENTRY_FAULTS = {"extra_forbidden": "unknown key", "missing": "missing"}
"""What is wrong in an entry of a list, by pydantic's name for it; of others pydantic's words are used."""
_FAILED = object()
"""Placeholder in a tree for a block whose problem is already noted."""


def _assignment(text: str, example: str) -> tuple[list[str], Node]:
    flag, _, _ = example.partition(" ")
    key, sign, value = text.partition("=")
    if not sign:
        message = f'must be key=value, not "{shortened(text)}"'
        raise ConfigError(message, where=flag, hint=f"for example {example}")
    writable(key, flag)
    return key.strip().split("."), parse(value, lambda line: flag)


class _Layers:
    """The settings while layers are added, lowest first, and the problems found so far."""

    def __init__(self, root: type[Spec], recorded: frozenset[str] = frozenset()) -> None:
        self.recorded = recorded  # files of runs
        self.shape = _Shape({"": root}, "", optional=False)
        self.tree = Node(self.shape.block(""), "default")
        self.problems: list[ConfigError] = []
        self.missing: list[ConfigError] = []
        self.unused: list[str] = []
        self.known = list(dict.fromkeys(_known(root, "")))

    def add(self, *values: tuple[list[str], Node]) -> None:
        """One layer: paths and values. Sections go before their keys and ``kind`` before its neighbours."""
        for path, node in sorted(
            values, key=lambda value: ["" if part == "kind" else part for part in value[0]]
        ):
            for part in reversed(path):
                node = Node({part: node}, node.origin)
            self.tree = self.overlay(self.shape, self.tree, node, "")

    def overlay(self, shape: _Shape | None, lower: Node | None, upper: Node, key: str) -> Node:
        """``upper`` over ``lower``; unknown keys and kinds are noted and left out."""
        below = lower.value if lower and isinstance(lower.value, dict) else None
        if shape and shape.kinds and isinstance(upper.value, str):
            upper = Node({"kind": upper}, upper.origin)
        if shape and not shape.optional and upper.value is None:
            upper = Node({}, upper.origin)  # a section whose keys are all commented out
        if not isinstance(upper.value, dict):
            return upper
        if shape is None:
            below = below or {}
            merged = {
                name: self.overlay(None, below.get(name), node, key) for name, node in upper.value.items()
            }
            return Node({**below, **merged}, upper.origin)
        named = upper.value.get("kind") if shape.kinds else None
        kind = plain(named) if named else below["kind"].value if below and shape.kinds else shape.first
        if kind not in list(shape.members):
            hint = _meant(difflib.get_close_matches(str(kind), shape.kinds), "kinds", shape.kinds)
            self.problems.append(
                ConfigError(
                    f"unknown kind {_show(kind)}", where=f"{(named or upper).origin}: {key}", hint=hint
                )
            )
            return Node(_FAILED, upper.origin)
        if lower is None or below is None or shape.members[kind] is not shape.member(lower):
            left = _leaves(plain(lower), lower, key) if lower and below else ()
            self.unused += [
                f"{path} {_show(value, bare=True)} ({origin}): not used, {key} is {kind} ({upper.origin})"
                for path, value, origin in left
                if origin != "default" and path != f"{key}.kind"
            ]
            below = shape.block(kind)
        merged, fields = dict(below), shape.members[kind].model_fields
        for name, node in upper.value.items():
            if name in fields:
                merged[name] = self.overlay(_shape(fields[name]), merged.get(name), node, _join(key, name))
            else:
                self.unknown(name, node.origin, key, shape, kind)
        return Node(merged, upper.origin)

    def suit(self) -> None:
        """If a chosen kind has ``suits`` (key path → value), they replace the defaults of keys that nobody
        has set. A key of ``suits`` that is a kind of another block holds the values that apply together with
        that kind.
        """
        blocks = [block.value for block in self.tree.value.values() if isinstance(block.value, dict)]
        chosen = {block["kind"].value for block in blocks if "kind" in block}
        for name, field in self.shape.members[""].model_fields.items():
            shape, block = _shape(field), self.tree.value.get(name)
            if not (shape and shape.kinds and block and isinstance(block.value, dict)):
                continue
            suits = getattr(shape.member(block), "suits", {})
            values = {key: value for key, value in suits.items() if not isinstance(value, dict)}
            for kind in chosen & suits.keys():
                values |= suits[kind]
            for key, value in values.items():
                section, _, last = key.partition(".")
                node = self.tree.value.get(section)
                if (
                    node
                    and isinstance(node.value, dict)
                    and last in node.value
                    and node.value[last].origin == "default"
                ):
                    node.value[last] = Node(value, f"default of {block.value['kind'].value}")

    def unknown(self, name: str, origin: str, section: str, shape: _Shape, kind: str) -> None:
        key, here = shortened(_join(section, name)), list(shape.members[kind].model_fields)
        others = [other for other in shape.kinds if name in shape.members[other].model_fields]
        same = [known for known in self.known if known.rpartition(".")[2] == name]
        near = [_join(section, match) for match in difflib.get_close_matches(name, here)]
        message, hint = "unknown key", _meant(list(dict.fromkeys(same + near))[:3], "known here", here)
        if others:
            message, hint = f"{section} is {kind}, and this key belongs to {', '.join(others)}", None
        elif key in self.known:
            hint = f"a dot does not nest here: write {name.partition('.')[0]}, and its keys indented below it"
        self.problems.append(ConfigError(message, where=f"{origin}: {key}", hint=hint))

    def build(self, model: type[S], node: Node, key: str) -> S | None:
        """The checked spec of a tree of known keys, or None if something is wrong; the problem is then
        noted."""
        values: dict[str, Any] = {}
        for name, child in node.value.items():
            shape = _shape(model.model_fields[name])
            values[name] = plain(child)
            if shape and isinstance(child.value, dict):
                values[name] = self.build(shape.member(child), child, _join(key, name)) or _FAILED
        recorded = {
            name: True
            for name, child in node.value.items()
            if child.origin.rpartition(":")[0] in self.recorded
        }
        try:
            return model.model_validate(values, context=recorded)
        except ValidationError as error:
            first = {detail["loc"][:1]: detail for detail in reversed(error.errors(include_url=False))}
            for name, detail in reversed(first.items()):
                self.tell(model, node, key, str(name[0]) if name else None, detail)
        return None

    def tell(self, model: type[Spec], node: Node, key: str, name: str | None, detail: ErrorDetails) -> None:
        """A finding of pydantic about the key ``name``, or the whole block, in plain words."""
        own = detail.get("ctx", {}).get("error")  # what a validator of the Spec raised
        if name is None:
            where = f"{node.origin}: {key}" if key else "settings"
            self.problems.append(ConfigError(str(own or detail["msg"]), where=where))
            return
        path, field, child = _join(key, name), model.model_fields[name], node.value.get(name)
        if child is not None and len(detail["loc"]) > 1 and any(_kinds(part) for part in _items(field)):
            place = "".join(
                f"[{part}]" if isinstance(part, int) else f".{part}" for part in detail["loc"][1:]
            )
            message = str(own or _ENTRY_FAULTS.get(detail["type"]) or detail["msg"])
            self.problems.append(ConfigError(message, where=f"{child.origin}: {path}{place}"))
            return
        must = f"must be {_allowed(field.annotation, field.metadata)}"
        if child is None:
            option = OPTIONS.get(path, f"--set {path}=…")
            hint = f"give {option}, or add it to a file of settings"
            self.missing.append(ConfigError(f"missing; {must}", where=path, hint=hint))
        elif detail["input"] is not _FAILED:
            value = _show(plain(child))
            message = f"{own}; it is {value}" if own else f"{must}, not {value}"
            self.problems.append(ConfigError(message, where=f"{child.origin}: {path}"))


def _known(model: type[Spec], key: str) -> Iterator[str]:
    """Every key path of every kind."""
    for name, field in model.model_fields.items():
        yield _join(key, name)
        for member in (shape.members if (shape := _shape(field)) else {}).values():
            yield from _known(member, _join(key, name))


def _commented(model: type[Spec], node: Node, indent: str) -> Iterator[str]:
    for name, field in sorted(model.model_fields.items(), key=lambda item: item[0] != "kind"):
        shape, child = _shape(field), node.value.get(name)
        section = shape if child and isinstance(child.value, dict) else None
        words = [field.description] if field.description else []
        words += [f"when to change it: {when}"] if (when := _when(field)) else []
        if not section or section.kinds:
            default = _first(field)
            allowed = _allowed(field.annotation, field.metadata)
            words.append(f"{allowed}; {'required' if default is None else f'default {default}'}")
        if name != "kind" or len(get_args(field.annotation)) != 1:
            yield from (
                f"{indent}# {line}" for text in words for line in textwrap.wrap(text, 110 - len(indent))
            )
        if section and child:
            yield f"{indent}{name}:"
            yield from _commented(section.member(child), child, indent + "  ")
        elif child:
            yield from (indent + line for line in write({name: plain(child)}).splitlines())
        else:
            yield f"{indent}# {name}:"
