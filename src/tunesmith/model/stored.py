"""The weights files of a model folder: their tensors, and which tensor of the net each of them becomes.

The names are found by letting mlx-lm's own code rename placeholders. A stored tensor that it splits, turns or
computes with has no place."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from tunesmith.model import layouts


class StoredTensor(NamedTuple):
    """``offsets``: of its bytes in the file."""

    file: Path
    code: str
    shape: tuple[int, ...]
    offsets: tuple[int, int]


class Place(NamedTuple):
    """The tensor of the net, or its part for one ``expert``, that a stored tensor becomes."""

    name: str
    expert: int | None = None


def headers(folder: Path) -> dict[Path, tuple[dict[str, Any], int]]:
    """Header and offset of the data of each weights file."""
    by_file: dict[Path, tuple[dict[str, Any], int]] = {}
    for file in sorted(folder.glob("model*.safetensors")):
        with file.open("rb") as stream:
            size = int.from_bytes(stream.read(8), "little")
            by_file[file] = json.loads(stream.read(size)), 8 + size
    return by_file


def tensors(folder: Path) -> dict[str, StoredTensor]:
    """The stored tensors by name."""
    return {
        name: StoredTensor(
            file,
            entry["dtype"],
            tuple(entry["shape"]),
            (start + entry["data_offsets"][0], start + entry["data_offsets"][1]),
        )
        for file, (header, start) in headers(folder).items()
        for name, entry in header.items()
        if name != "__metadata__"
    }


def places(net: nn.Module, folder: Path, config: Mapping[str, Any]) -> dict[str, Place]:
    """Stored name → place in ``net``; a stored tensor that is left out or computed with is absent."""
    marks: dict[str, mx.array] = {}
    by_value: dict[int, str] = {}
    for number, (name, tensor) in enumerate(tensors(folder).items(), start=1):
        marks[name] = mx.broadcast_to(mx.array(float(number)), tensor.shape)
        by_value[number] = name
    stored = tensors(folder)
    by_identity = {id(value): name for name, value in marks.items()}
    held = list(marks.values())  # an identity is that of an object only while it lives
    code = _with_head(net)
    renamed = layouts.rename(dict(config), dict(marks))
    renamed = code.sanitize(renamed) if "sanitize" in dir(code) else renamed
    by_stored: dict[str, Place] = {}
    for name, value in renamed.items():
        if id(value) in by_identity:
            by_stored[by_identity[id(value)]] = Place(name)
        elif value.ndim == 3:
            by_stored |= _experts(name, value, by_value, stored)
    del held
    if config.get("tie_word_embeddings"):
        by_stored |= _tied_heads(by_stored, stored)
    return by_stored


def _with_head(net: nn.Module) -> Any:
    """A copy of ``net`` that has a head, to rename tensors by its code: that of Gemma 3 and RecurrentGemma
    removes the head of a tied model, and fails where loading did so already."""
    code: Any = copy.copy(net)
    code.setdefault("lm_head", None)
    if isinstance(code.get("language_model"), nn.Module):
        code["language_model"] = _with_head(code["language_model"])
    return code


def _tied_heads(known: Mapping[str, Place], stored: Mapping[str, StoredTensor]) -> dict[str, Place]:
    """A tied head that is stored beside its embedding: transformers may read either."""
    embeddings = [name for name in known if name.endswith(("embed_tokens.weight", "wte.weight"))]
    heads = [name for name in stored if name.endswith("lm_head.weight") and name not in known]
    return {
        head: known[embedding]
        for head in heads
        for embedding in embeddings
        if stored[head].shape == stored[embedding].shape
    }


def _experts(
    name: str, value: mx.array, by_value: Mapping[int, str], stored: Mapping[str, StoredTensor]
) -> dict[str, Place]:
    """The places of stored tensors that were stacked, one an expert."""
    numbers = np.array(value[:, 0, 0]).astype(int).tolist()
    constant = bool(mx.all(value == value[:, :1, :1]))
    names = [by_value.get(number) for number in numbers]
    if not constant or len(set(names)) < len(names):
        return {}
    shape = tuple(value.shape[1:])
    if any(part is None or stored[part].shape != shape for part in names):
        return {}
    return {part: Place(name, index) for index, part in enumerate(names) if part is not None}


def header_bytes(entries: Mapping[str, Mapping[str, Any]]) -> bytes:
    """What a safetensors file with the header ``entries`` begins with: an 8-byte length, and JSON."""
    content = json.dumps(entries).encode()
    content += b" " * (-len(content) % 8)
    return len(content).to_bytes(8, "little") + content


def content_bytes(entries: Mapping[str, Mapping[str, Any]]) -> int:
    """Size of the tensors that the header ``entries`` names."""
    ends = [entry["data_offsets"][1] for name, entry in entries.items() if name != "__metadata__"]
    return max(ends, default=0)


def write_hollow(path: Path, entries: Mapping[str, Mapping[str, Any]]) -> None:
    """A safetensors file with the header ``entries``, whose content is a hole that takes no space."""
    header = header_bytes(entries)
    with path.open("wb") as out:
        out.write(header)
        out.truncate(len(header) + content_bytes(entries))
