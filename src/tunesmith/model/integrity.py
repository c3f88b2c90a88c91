"""Are the files of a model whole, its settings usable and its weights finite? What is wrong is said with its
file and key, or its tensor, before time is spent on it."""

from __future__ import annotations

import dataclasses
import json
import math
import re
import types
import typing
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten
from safetensors import SafetensorError, safe_open

from tunesmith.errors import ModelError, listing

CONFIG = "config.json"
INDEX = "model.safetensors.index.json"
REPEATED = re.compile(r"(?<!_window)(^|_)(layers?|blocks?|depth)$")
"""Keys of config.json that say how many equal parts are built, each of at least one tensor."""
FETCH_AGAIN = "fetch it again; .bin and .pth weights must be saved as safetensors first"


def require_files(path: Path) -> None:
    """Raises ModelError, listing every problem, unless ``path`` has a config.json, at least one weights file
    and every file of the index, none of them damaged, and config.json asks for no more layers than there are
    tensors."""
    problems: list[str] = []
    config = _read(path / CONFIG, problems)
    if config is not None and not isinstance(config.get("model_type"), str):
        problems.append(f"{CONFIG}: model_type is {_shown(config, 'model_type')}, a name expected")
    present = {file.name for file in path.glob("model*.safetensors")}
    if (path / INDEX).is_file():
        problems += _missing_shards(path, present)
    elif not present:
        problems.append("no weights: model*.safetensors")
    n_tensors = 0
    for name in sorted(present):
        try:
            n_tensors += len(safe_open(path / name, framework="numpy").keys())
        except (SafetensorError, OSError) as error:
            problems.append(f"{name} is damaged or not a safetensors file: {error}")
    if config is not None and not problems:
        problems += _too_many(config, n_tensors)
    if problems:
        message = f"is not a complete model:\n{listing(problems)}"
        raise ModelError(message, where=str(path), hint=FETCH_AGAIN)


def stored_bytes(path: str) -> int:
    """Size of the weights files of a local model, a folder or a GGUF file; 0 if it is not here yet."""
    local = Path(path).expanduser()
    files = [local] if local.is_file() else [*local.glob("model*.safetensors")]
    return sum(file.stat().st_size for file in files)


def explained(error: Exception | SystemExit, config: Mapping[str, Any], arguments: type | None) -> str:
    """Why a model could not be built: the error, and every key of ``config`` that has not the type that
    ``arguments``, mlx-lm's class of settings, declares."""
    problems = list(_misfits(config, arguments)) if arguments is not None else []
    if isinstance(error, SystemExit) and isinstance(error.__context__, ImportError):
        error = error.__context__  # mlx-lm's olmo ends the process where its package is missing
    text = f"{type(error).__name__}: {error}" if not isinstance(error, ValueError) else str(error)
    return f"{CONFIG} does not give a model ({text}):\n{listing(problems)}" if problems else text


def require_finite(net: nn.Module, path: Path, tick: Callable[[int, int], None]) -> None:
    """Raises ModelError, naming every tensor of ``net``, read from ``path``, that holds NaN or infinity.

    One pass: a sum in float32 is finite only if every value is, and only the others are looked at again.
    Evaluates the weights. tick: called with the number of tensors that are read, and of all."""
    flat: Any = tree_flatten(net.parameters())
    problems: list[str] = []
    for done, (name, value) in enumerate(flat, start=1):
        if not mx.issubdtype(value.dtype, mx.floating):
            mx.eval(value)
            continue
        total = value.astype(mx.float32).sum()
        mx.eval(value, total)
        tick(done, len(flat))
        if not math.isfinite(float(np.array(total))):
            count = int(np.array((~mx.isfinite(value)).sum()))  # 0: finite values whose sum is not
            problems += [f"{name}: {count:,} of {value.size:,} values"] if count else []
    if problems:
        message = f"{len(problems)} tensors of the base hold NaN or infinity:\n{listing(problems)}"
        raise ModelError(message, where=str(path), hint="fetch it again, or convert it again from its source")


def _read(path: Path, problems: list[str]) -> dict[str, Any] | None:
    """The JSON object in ``path``, or None, with a problem."""
    if not path.is_file():
        problems.append(f"{path.name} is missing")
        return None
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        problems.append(f"{path.name} is not JSON: {error}")
        return None
    if not isinstance(content, dict):
        problems.append(f"{path.name} holds {type(content).__name__}, an object expected")
        return None
    return content


def _missing_shards(path: Path, present: set[str]) -> list[str]:
    problems: list[str] = []
    index = _read(path / INDEX, problems)
    if index is None:
        return problems
    named = index.get("weight_map")
    if not isinstance(named, dict) or not all(isinstance(name, str) for name in named.values()):
        return [f"{INDEX}: weight_map is {_shown(index, 'weight_map')}, tensor → file expected"]
    missing = sorted(set(named.values()) - present)
    return [f"{name} is missing (named in {INDEX})" for name in missing]


def _too_many(config: Mapping[str, Any], n_tensors: int, prefix: str = "") -> Iterator[str]:
    """Counts of layers that the weights cannot fill: building them would not end."""
    for key, value in config.items():
        if isinstance(value, dict):
            yield from _too_many(value, n_tensors, f"{prefix}{key}.")
        elif REPEATED.search(key) and isinstance(value, int | float) and value > n_tensors:
            yield f"{CONFIG}: {prefix}{key} is {value:,}, and the weights have {n_tensors:,} tensors"


def _misfits(config: Mapping[str, Any], arguments: type) -> Iterator[str]:
    if not dataclasses.is_dataclass(arguments):
        return
    try:
        hints = typing.get_type_hints(arguments)
    except (NameError, TypeError, AttributeError):
        return
    for field in dataclasses.fields(arguments):
        required = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        if field.name not in config:
            if required:
                yield f"{field.name} is missing"
        elif config[field.name] is None and not required:
            continue
        elif not _fits(config[field.name], hints[field.name]):
            yield f"{field.name} is {_shown(config, field.name)}, {_type_name(hints[field.name])} expected"


def _fits(value: Any, hint: Any) -> bool:
    """Whether a JSON value can be what ``hint`` declares; True if that cannot be said. Sizes are at
    least 1."""
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return any(_fits(value, option) for option in typing.get_args(hint))
    kind = typing.get_origin(hint) or hint
    if kind is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    if kind is int:
        return isinstance(value, int | float) and not isinstance(value, bool) and 1 <= value < 2**31
    return not isinstance(kind, type) or kind is object or isinstance(value, kind)


def _type_name(hint: Any) -> str:
    return {int: "a positive integer below 2**31", float: "a number"}.get(
        hint, str(getattr(hint, "__name__", hint))
    )


def _shown(values: Mapping[str, Any], key: str) -> str:
    if key not in values:
        return "missing"
    text = repr(values[key])
    return text if len(text) <= 60 else f"{text[:57]}…"
