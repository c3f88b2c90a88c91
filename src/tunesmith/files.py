"""Files and folders that are written whole or not at all, and are on the disk when the call returns."""

from __future__ import annotations

import json
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def draft(path: Path) -> Iterator[Path]:
    """Give a free name beside ``path``, at which the body creates a file or a folder. It is flushed and
    renamed to ``path`` when the body ends, or removed if the body raises."""
    temporary = path.with_name(f".{uuid.uuid4().hex[:8]}.{path.name}")  # MLX and matplotlib go by the suffix
    try:
        yield temporary
        is_folder = temporary.is_dir()
        for file in [part for part in temporary.rglob("*") if part.is_file()] if is_folder else [temporary]:
            flush(file)
        temporary.rename(path)
        if is_folder:
            flush(path.parent)
    finally:
        if temporary.is_dir():
            shutil.rmtree(temporary, ignore_errors=True)
        else:
            temporary.unlink(missing_ok=True)


def write_bytes(path: Path, content: bytes) -> None:
    with draft(path) as temporary:
        temporary.write_bytes(content)


def write_text(path: Path, text: str) -> None:
    write_bytes(path, text.encode("utf-8"))


def write_json(path: Path, value: object) -> None:
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def flush(path: Path) -> None:
    """Wait until the file, or the names in the folder, are on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
