"""Which GGUF file was a model folder converted from? The conversion records it in a hidden file of the
folder: exports do not copy it, and hashes of the model do not change."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

from typing_extensions import TypedDict

from tunesmith.errors import ModelError
from tunesmith.files import read_json, write_json
from tunesmith.model import fingerprint

RECORD = ".converted-from"


class GGUFSource(TypedDict):
    """``file``: its absolute path. ``sha256``: as `conversion.digest` gives it. ``fingerprint``: of the
    folder as it was written; if it has another one, it holds another model now."""

    file: str
    sha256: str
    fingerprint: str


def write(folder: Path, file: Path, digest: str) -> None:
    """Record that ``folder`` is ``file`` converted."""
    whole = fingerprint.of_folder(folder)
    write_json(folder / RECORD, GGUFSource(file=str(file.resolve()), sha256=digest, fingerprint=whole))


def read(folder: Path) -> GGUFSource | None:
    """None if the folder was not converted, or its record cannot be read."""
    with suppress(ModelError):
        return read_json(folder / RECORD, GGUFSource, ModelError, None)
    return None
