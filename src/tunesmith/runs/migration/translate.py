"""Reads a file of another program, recognises which program's it is, and translates it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from tunesmith.errors import ConfigError
from tunesmith.runs.config import RunConfig
from tunesmith.runs.migration.dialect import Dialect, dialects
from tunesmith.runs.migration.keys import Keys, Old
from tunesmith.runs.migration.translation import Translation
from tunesmith.settings import config as settings
from tunesmith.settings.config import JSON
from tunesmith.settings.origins import OF_A_USER, Node, read

BOUNDS = OF_A_USER._replace(characters=OF_A_USER.size)
"""Files of other programs may hold a whole chat template in one value."""
OVERRULED = "the option is used instead"


def translate(
    path: Path, *, program: str | None = None, model: str | None = None, data: Sequence[str] = ()
) -> Translation:
    """The settings in ``path`` as ours. ``program``: whose they are, or None to recognise it. ``model`` and
    ``data`` replace those of the file.

    Raises ConfigError if the file cannot be read, is no known program's, or holds a value that the program
    does not allow, or that trains what tunesmith does not."""
    root = read(path, lambda line: f"{path}:{line}", BOUNDS)
    chosen = _named(program) if program else _recognised(path, root)
    keys = Keys(path, root, chosen.name)
    chosen().translate(keys)
    for key, value in {"model.path": model, "data.train": [*data] or None}.items():
        if value is not None:
            _overrule(keys, key, value)
    empty = keys.leave_rest(chosen.reasons)
    missing = {key: option for key, option in settings.OPTIONS.items() if key not in keys.settings}
    _require_valid(keys, missing)
    ordered = sorted(keys.settings.values(), key=lambda setting: _order(setting.key))
    left_out = sorted(keys.left_out.values(), key=lambda entry: list(keys.leaves).index(entry.key))
    return Translation(chosen.name, str(path), tuple(ordered), tuple(left_out), tuple(empty), missing)


def _overrule(keys: Keys, key: str, value: JSON) -> None:
    if key in keys.settings:
        keys.leave(OVERRULED, *keys.settings[key].sources)
    keys.set(key, value, Old(settings.OPTIONS[key].split()[0], value, None))


def _named(name: str) -> type[Dialect]:
    if name not in dialects():
        raise ConfigError(f"{name} is not a program that is known", where="--from-format", hint=_programs())
    return dialects()[name]


def _recognised(path: Path, root: Node) -> type[Dialect]:
    """The dialect with the most marks among the keys."""
    leaves = Keys(path, root, "").leaves
    if not leaves or "" in leaves:
        raise ConfigError("holds no settings", where=str(path), hint=_programs())
    heads = {key[:end] for key in leaves for end in _ends(key)}
    counts = {dialect: len(heads & dialect.marks) for dialect in dialects().values()}
    most = max(counts.values())
    best = [dialect for dialect, count in counts.items() if count == most]
    if most == 0 and {"model.path", "data.train"} & heads:
        hint = f"tunesmith train --config {path}"
        raise ConfigError("these are settings of tunesmith already", where=str(path), hint=hint)
    if most == 0:
        shown = ", ".join(list(dict.fromkeys(key.split(".")[0] for key in leaves))[:5])
        message = f"is not a file of settings that is recognised (it begins with {shown})"
        raise ConfigError(message, where=str(path), hint=f"--from-format names the program: {_programs()}")
    if len(best) > 1:
        names = " or ".join(dialect.name for dialect in best)
        raise ConfigError(f"may be a file of {names}", where=str(path), hint="say which by --from-format")
    return best[0]


def _ends(key: str) -> list[int]:
    """Where the parts of a key path end."""
    return [index for index, letter in enumerate(key) if letter in ".["] + [len(key)]


def _programs() -> str:
    return f"programs: {', '.join(dialects())}"


def _order(key: str) -> tuple[int, bool, int]:
    """Sections in the order of RunConfig; in them the kind first, then the order of the section's keys."""
    section, _, name = key.partition(".")
    fields = list(RunConfig.model_fields)
    default = RunConfig.model_fields[section].annotation
    known = (
        list(default.model_fields) if isinstance(default, type) and issubclass(default, settings.Spec) else []
    )
    return fields.index(section), name != "kind", known.index(name) if name in known else len(known)


def _require_valid(keys: Keys, missing: Sequence[str] | dict[str, str]) -> None:
    """Raises ConfigError, with the place of the old key, if a value is out of our range."""
    overrides: dict[str, tuple[JSON, str]] = {
        key: ("MISSING", option) for key, option in settings.OPTIONS.items()
    }
    for setting in keys.settings.values():
        given = [old for old in setting.sources if old.given]
        place = ", ".join(f"{old.origin} ({old.key})" for old in given) or f"default of {keys.program}"
        overrides[setting.key] = (setting.value, place)
    settings.load(RunConfig, overrides=overrides)
