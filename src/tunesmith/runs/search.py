"""Where are runs looked for? One rule for tags, lists, lineage and pruning.

A run lies in a folder, in a folder of it, and so on, at most `DEPTH` folders deep. Hidden folders are not
searched, nor is what lies inside a run."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from tunesmith.errors import DataError
from tunesmith.files import distinct

FOLDER = "runs"
"""Where runs are made and looked for, from the current folder."""
DEPTH = 4
MANIFEST, CONFIG, EVENTS, CHECKPOINTS = "manifest.json", "config.yaml", "events.jsonl", "checkpoints"
"""What a folder is recognised by as a run."""


def folders(folder: Path) -> list[Path]:
    """The run directories under ``folder``, by name. A run with links to it is listed once. Raises DataError
    if ``folder`` is not a folder."""
    if not folder.is_dir():
        what = "is not a folder" if folder.exists() else "there is no such folder"
        hint = "tunesmith train makes runs in ./runs; --folder names another place"
        raise DataError(what, where=str(folder), hint=hint)
    return distinct(list(_under(folder, DEPTH)), folder)


def around(run: Path) -> Path:
    """Where the runs lie that may have the same tag as ``run``, or use it: the current folder if it holds the
    run, else the folder above the one that holds it."""
    above = run.resolve().parents
    here = Path.cwd()
    if (here in above and here != above[-1]) or Path(FOLDER).resolve() in above:
        return Path()
    return above[1] if len(above) > 2 else above[0]


def is_run(folder: Path) -> bool:
    """Whether it is a run, or what is left of one."""
    manifest, config, checkpoints, events = (
        os.path.exists(folder / name)  # False without permission, where `Path.exists` raises an error
        for name in (MANIFEST, CONFIG, CHECKPOINTS, EVENTS)
    )
    return manifest or (config and (checkpoints or events))


def _under(folder: Path, depth: int) -> Iterator[Path]:
    for child in _children(folder):
        if is_run(child):
            yield child
        elif depth > 1:
            yield from _under(child, depth - 1)


def _children(folder: Path) -> list[Path]:
    try:
        return sorted(
            Path(entry.path)
            for entry in os.scandir(folder)
            if not entry.name.startswith(".") and _is_folder(entry)
        )
    except OSError:  # no permission
        return []


def _is_folder(entry: os.DirEntry[str]) -> bool:
    if entry.is_symlink():
        return os.path.isdir(entry.path)  # False where `DirEntry.is_dir` raises an error: a link to itself
    return entry.is_dir()
