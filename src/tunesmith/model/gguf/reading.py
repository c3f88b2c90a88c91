"""The header and the tensors of a GGUF model, in one file or in the parts that llama.cpp splits a large one
into (``NAME-00001-of-00003.gguf``)."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from gguf import GGUFReader, ReaderField, ReaderTensor

from tunesmith.errors import ModelError, listing

PART = re.compile(r"(?P<name>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf", re.IGNORECASE)


class Reader(GGUFReader):
    """The library's reader of one file. It cuts each word of a vocabulary out of a numpy.memmap, which takes
    many times as long as out of the plain array in the same memory."""

    @property
    def data(self) -> np.ndarray:
        return self._plain

    @data.setter
    def data(self, mapped: np.memmap) -> None:
        self._plain = mapped.view(np.ndarray)


class GGUFModel(NamedTuple):
    """``fields``: of the header, without those that only say how the file was split. ``tensors``: of all
    parts, in their order."""

    fields: dict[str, ReaderField]
    tensors: list[ReaderTensor]


def files(path: Path) -> list[Path]:
    """The parts of the model whose first is ``path``; ``path`` alone if its name is not that of a part.
    Raises ModelError if it is not the first, or if parts are missing."""
    match = PART.fullmatch(path.name)
    if match is None:
        return [path]
    count, name = int(match["count"]), match["name"]
    parts = [path.with_name(f"{name}-{number:05}-of-{count:05}.gguf") for number in range(1, count + 1)]
    if int(match["number"]) != 1 and parts:
        message = f"is part {int(match['number'])} of {count} of a model"
        raise ModelError(message, where=str(path), hint=f"give the first: {parts[0]}")
    if missing := [part.name for part in parts if not part.is_file()]:
        message = f"{len(missing)} of {count} parts of the model are missing:\n{listing(missing)}"
        raise ModelError(message, where=str(path), hint="the parts of a model lie in one folder")
    return parts or [path]


def read(path: Path) -> GGUFModel:
    """The model whose only or first file is ``path``. Raises ModelError if a part is missing, cannot be read,
    or belongs to another model."""
    parts = files(path)
    readers = [_reader(part) for part in parts]
    total = _value(readers[0], "split.tensors.count")
    for number, (part, reader) in enumerate(zip(parts, readers, strict=True)):
        count = _value(reader, "split.count") or 1
        if len(parts) == 1 and count > 1:
            hint = f"its parts have names such as {path.stem}-00001-of-{count:05}.gguf: give the first"
            raise ModelError(f"is one of {count} parts of a model", where=str(path), hint=hint)
        place = (_value(reader, "split.no") or 0, count, _value(reader, "split.tensors.count"))
        if len(parts) > 1 and place != (number, len(parts), total):
            message = (
                f"its header says that it is part {place[0] + 1} of {place[1]} of a model of {place[2]} "
            )
            message += f"tensors; part {number + 1} of {len(parts)}, of {total}, expected"
            raise ModelError(message, where=str(part), hint="give parts of one model")
    tensors = [tensor for reader in readers for tensor in reader.tensors]
    if len({tensor.name for tensor in tensors}) < len(tensors):
        raise ModelError("has a tensor twice in its parts", where=str(path), hint="give parts of one model")
    fields = readers[0].fields.items()
    return GGUFModel({name: field for name, field in fields if not name.startswith("split.")}, tensors)


def _reader(path: Path) -> Reader:
    try:
        reader = Reader(path)
    except (ValueError, IndexError, KeyError, TypeError, OverflowError, MemoryError) as error:
        hint = "it may be cut short or of a newer version; compare its size with the source's"
        message = f"is not a complete, readable GGUF file: {error}"
        raise ModelError(message, where=str(path), hint=hint) from error
    if reader.byte_order != "I":
        raise ModelError("is a GGUF file of the other byte order", where=str(path))
    return reader


def _value(reader: Reader, key: str) -> Any:
    field = reader.fields.get(key)
    return None if field is None else field.contents()
