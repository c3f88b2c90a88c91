"""Are these the files that a run was trained on? A hash of a model folder, quick also for large files."""

from __future__ import annotations

import hashlib
from pathlib import Path

ENDS = 1 << 20
"""Bytes at the start and at the end of a weights file that are hashed."""


def of_folder(path: Path, n_added: int = 0) -> str:
    """SHA-256 (hex) over config.json and the name, size, first MiB and last MiB of each weights file, in the
    order of names; with rows added to the embedding, also over their number. A change in the middle of a file
    of equal size is not seen."""
    total = hashlib.sha256((path / "config.json").read_bytes())
    for file in sorted(path.glob("model*.safetensors")):
        size = file.stat().st_size
        with file.open("rb") as stream:
            total.update(f"{file.name} {size}\n".encode() + stream.read(ENDS))
            stream.seek(max(0, size - ENDS))
            total.update(stream.read())
    if n_added:
        total.update(f"{n_added} rows\n".encode())
    return total.hexdigest()
