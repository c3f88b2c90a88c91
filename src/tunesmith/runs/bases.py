"""What is the base of a run called, and do two runs have the same one? A GGUF file and the folders that it
was converted to are one base. MLX is not loaded unless two bases must be compared."""

from __future__ import annotations

from pathlib import Path

from tunesmith.model.gguf import source
from tunesmith.runs.directory import Run


def named(path: str, base: object) -> str:
    """The model at ``path``: the GGUF file that it was converted from, or ``path`` itself. base: the hash of
    the base in the run's manifest."""
    recorded = source.read(Path(path))
    return path if recorded is None or recorded["fingerprint"] != base else recorded["file"]


def are_same(first: Run, second: Run) -> bool:
    """Whether the bases of two runs have the same files, or come from one GGUF file in other dtypes. Raises
    DataError if a manifest cannot be read, ModelError if a part of a GGUF model is missing."""
    if first.hashes["base"] == second.hashes["base"]:
        return True
    digests = [_digest(run) for run in (first, second)]
    return digests[0] is not None and digests[0] == digests[1]


def _digest(run: Run) -> str | None:
    """SHA-256 of the GGUF file that the base was converted from, or None if it was not, or is not known to
    be."""
    from tunesmith.model.gguf import conversion

    path = Path(run.config.model.path)
    folders = conversion.made_of(path) if path.is_file() else [path]
    for recorded in map(source.read, folders):
        if recorded is not None and recorded["fingerprint"] == run.hashes["base"]:
            return recorded["sha256"]
    return None
