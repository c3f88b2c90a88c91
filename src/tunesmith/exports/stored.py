"""A copy of the files of a base model in which only the tensors that differ are replaced. A stored tensor
that has no place in the net is copied as it is, and refused if it was trained."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten

from tunesmith import events
from tunesmith.adapters import adapted, trainable
from tunesmith.errors import ExportError, listing
from tunesmith.events import Sink
from tunesmith.exports.weights import Tensors
from tunesmith.model.stored import Place, header_bytes, headers
from tunesmith.model.vocabulary import extended

WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".onnx", ".npz")
NOT_COPIED = {"adapter_config.json", "export.json", "README.md", "pytorch_model.bin.index.json"}
"""Files of the base that would be wrong beside merged weights."""
CODES: dict[str, tuple[str, mx.Dtype]] = {
    "F32": ("<f4", mx.float32),
    "F16": ("<f2", mx.float16),
    "BF16": ("<u2", mx.bfloat16),
}

BLOCK = 1 << 22
"""Values of a tensor that are compared, rounded and written at a time."""


def changed_names(net: nn.Module) -> set[str]:
    """Names of the dense tensors of ``net`` that its adapter changes."""
    layers = adapted(net)
    names = {f"{name}.weight" for name in layers}
    inner = {id(module) for module in extended(net)}
    tables = {name: module for name, module in net.named_modules() if id(module) in inner}
    names |= {f"{name}.weight" for name in tables}
    names |= {f"{name}.bias" for name, module in tables.items() if "row_biases" in module}
    names |= {
        name
        for name in trainable(net)
        if not any(name.startswith(f"{holder}.") for holder in (*layers, *tables))
    }
    return names


def require_places(net: nn.Module, found: Mapping[str, Place], kind: str, all_changed: bool) -> None:
    """Raises ExportError if a tensor that the run changed is not stored as one tensor. all_changed: every
    matrix may differ from the files."""
    placed = {place.name for place in found.values()}
    names = changed_names(net)
    if all_changed:
        flat: Any = tree_flatten(net.parameters())
        names |= {name for name, value in flat if name.endswith(".weight") and value.ndim > 1}
        names = {name for name in names if ".linear." not in name and ".base." not in name}
    if missing := sorted(names - placed):
        message = f"{kind}: {len(missing)} trained tensors are split or turned in the base's own files:\n"
        hint = "--to mlx-merged writes them in mlx-lm's layout"
        raise ExportError(message + listing(missing), hint=hint)


class Copied(NamedTuple):
    """``replaced``: names of the tensors that were replaced. ``change`` and ``error``: sums of squares of the
    change in float32, and of what rounding left of the difference to it."""

    replaced: list[str]
    change: float
    error: float

    @property
    def survived(self) -> float | None:
        return max(0.0, 1 - self.error / self.change) if self.change else None


def copy_settings(folder: Path, tokenizer: Path, target: Path) -> None:
    """Copy all files of a model but weights and adapters; those of the tokenizer from ``tokenizer``."""
    for source in dict.fromkeys((folder, tokenizer)):
        for file in sorted(source.iterdir()):
            skipped = file.suffix in WEIGHTS or file.name in NOT_COPIED or file.name.startswith(".")
            if file.is_file() and not skipped and (source == folder or file.name not in _OF_MODEL):
                shutil.copyfile(file, target / file.name)
        if (source / "additional_chat_templates").is_dir():
            name = "additional_chat_templates"
            shutil.copytree(source / name, target / name, dirs_exist_ok=True)


_OF_MODEL = {"config.json", "generation_config.json", "model.safetensors.index.json"}


def write_ends(folder: Path, ends: tuple[int, ...]) -> None:
    """Name ``ends`` first in generation_config.json, before those that the base declares."""
    path = folder / "generation_config.json"
    settings: dict[str, Any] = json.loads(path.read_text("utf-8")) if path.is_file() else {}
    model = json.loads((folder / "config.json").read_text("utf-8"))
    base = settings.get("eos_token_id", model.get("eos_token_id"))
    known = base if isinstance(base, list) else [] if base is None else [base]
    settings["eos_token_id"] = list(dict.fromkeys((*ends, *known)))
    path.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")


def write_vocabulary(folder: Path, size: int) -> None:
    """Write the rows of the embedding into config.json, also where the text model's settings lie."""
    path = folder / "config.json"
    config = json.loads(path.read_text("utf-8"))
    for part in (config, *(part for part in config.values() if isinstance(part, dict))):
        if "vocab_size" in part:
            part["vocab_size"] = size
    path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


class _Values:
    """The tensors that replace stored ones. Each is computed once, when the first stored tensor that it
    replaces is written, and freed after the last."""

    def __init__(self, tensors: Tensors, places: Iterable[Place]) -> None:
        self._tensors, self._computed = tensors, dict[str, np.ndarray]()
        self._left = Counter(place.name for place in places)

    def take(self, place: Place) -> np.ndarray:
        """The float32 values at ``place``. Call it once for each place."""
        name = place.name
        if name not in self._computed:
            self._computed[name] = np.asarray(self._tensors.pop(name)())
        self._left[name] -= 1
        value = self._computed[name] if self._left[name] else self._computed.pop(name)
        return value if place.expert is None else value[place.expert]


def copy_weights(
    folder: Path,
    target: Path,
    values: Tensors,
    found: Mapping[str, Place],
    changed: Collection[str] | None,
    notify: Sink,
) -> Copied:
    """Copy the weights files of ``folder``, one block of a tensor at a time. Where a stored tensor differs
    from its value, it is rounded once to the dtype of the file; all else stays byte for byte. Removes from
    ``values`` what it computes.

    found: the place of each stored tensor. changed: names of the values that can differ; None: all can."""
    files = headers(folder)
    entries = {name: entry for header, _ in files.values() for name, entry in _entries(header)}
    places = {
        name: place
        for name, place in found.items()
        if name in entries
        and entries[name]["dtype"] in CODES
        and place.name in values
        and (changed is None or place.name in changed)
    }
    grown = {
        name: list(shape)
        for name, place in places.items()
        if (shape := value_rows(values, place, entries[name])) is not None
    }
    computed, replaced, sums = _Values(values, places.values()), list[str](), np.zeros(2)
    tick, done = events.ticker(notify, "tensors written"), 0
    for file, (header, start) in files.items():
        rows = {name: grown[name] for name, _ in _entries(header) if name in grown}
        with file.open("rb") as source, (target / file.name).open("wb") as out:
            out.write(_resized_header(header, rows) if rows else source.read(start))
            for name, entry in _entries(header):
                first, end = entry["data_offsets"]
                source.seek(start + first)
                if name in places:
                    differs, squares = _replace(source, out, name, entry, computed.take(places[name]))
                    replaced += [name] if differs else []
                    sums += squares
                    mx.clear_cache()
                else:
                    _copy(source, out, end - first)
                done += 1
                tick(done, len(entries))
    return Copied(replaced, float(sums[0]), float(sums[1]))


def _entries(header: Mapping[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """Name and entry of each tensor, in the order of their bytes."""
    tensors = [item for item in header.items() if item[0] != "__metadata__"]
    return sorted(tensors, key=lambda item: item[1]["data_offsets"][0])


def _copy(source: BinaryIO, out: BinaryIO, size: int) -> None:
    while size > 0:
        block = source.read(min(size, 4 * BLOCK))
        if not block:
            raise EOFError(f"{source.name} is cut short")
        out.write(block)
        size -= len(block)


def _replace(
    source: BinaryIO, out: BinaryIO, name: str, entry: Mapping[str, Any], new: np.ndarray
) -> tuple[bool, np.ndarray]:
    """Write ``new`` in place of the stored tensor that ``source`` stands at; blocks without a difference stay
    as they are. Returns whether there was one, and the sums of squares of the change and of what rounding
    left of the difference to it."""
    code, has_shape = entry["dtype"], list(new.shape) == entry["shape"]
    values, differs, sums = new.reshape(-1), not has_shape, np.zeros(2)
    for first in range(0, values.size, BLOCK):
        block = values[first : first + BLOCK]
        if not has_shape:
            out.write(_encode(block, code, name))
            continue
        content = source.read(block.size * np.dtype(CODES[code][0]).itemsize)
        old = _decode(content, code)
        if np.array_equal(block, old):
            out.write(content)
            continue
        differs, stored = True, _encode(block, code, name)
        out.write(stored)
        sums += np.square(block - old).sum(), np.square(_decode(stored, code) - block).sum()
    return differs, sums


def value_rows(values: Tensors, place: Place, entry: Mapping[str, Any]) -> tuple[int, ...] | None:
    """The new shape of a stored tensor that was given rows; None for all others. Only tables of tokens and
    heads can grow, which are computed at once."""
    make = values.get(place.name)
    if make is None or place.expert is not None or len(entry["shape"]) > 2 or not _may_grow(place.name):
        return None
    shape = tuple(make().shape)
    return shape if list(shape) != list(entry["shape"]) else None


def _may_grow(name: str) -> bool:
    return ".layers." not in name and ".h." not in name


def _resized_header(header: Mapping[str, Any], rows: Mapping[str, list[int]]) -> bytes:
    entries: dict[str, Any] = {}
    end = 0
    for name, entry in _entries(header):
        start, stop = entry["data_offsets"]
        size = stop - start
        if name in rows:
            size = size // int(np.prod(entry["shape"])) * int(np.prod(rows[name]))
        entries[name] = {**entry, "shape": rows.get(name, entry["shape"]), "data_offsets": [end, end + size]}
        end += size
    metadata = {"__metadata__": header["__metadata__"]} if "__metadata__" in header else {}
    return header_bytes({**metadata, **entries})


def _decode(content: bytes, code: str) -> np.ndarray:
    values = np.frombuffer(content, CODES[code][0])
    if code == "BF16":
        return (values.astype(np.uint32) << 16).view(np.float32)
    return values.astype(np.float32)


def _encode(value: np.ndarray, code: str, name: str) -> bytes:
    rounded = mx.array(value).astype(CODES[code][1])
    if not bool(mx.isfinite(rounded).all()):
        raise ExportError(
            f"{name} has values that {code} cannot hold", hint="--to mlx keeps the adapter apart"
        )
    return np.array(rounded.view(mx.uint16) if code == "BF16" else rounded).tobytes()
