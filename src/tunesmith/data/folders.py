"""What a folder says by the names of its files: train, valid and test, as mlx-lm and the hub lay out data.

Such a test file is never trained on, and the valid file is held out. A table beside JSON of the same name is
taken for a copy of it."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from tunesmith.data import sources

_PART = re.compile(
    r"(train|training|valid|validation|val|dev|test)"
    r"(?:_(?:sft|gen|prefs))?"  # the purpose, as in UltraChat and UltraFeedback
    r"(?:[-_.]?\d+(?:[-_]of[-_]\d+(?:-[0-9a-f]{16})?)?)?"  # the shard, and its hash on the hub
)
_SIDES = {"train": "train", "training": "train", "test": "test"}


class Parts(NamedTuple):
    """``train``: files and folders to train on. ``others``: files of folders with parts that are none of
    them."""

    train: list[str]
    valid: list[str]
    test: list[str]
    others: list[str]


def parts(paths: Sequence[str]) -> Parts | None:
    """The parts of ``paths``, or None if no folder among them holds both a train and a valid or test file."""
    result = Parts([], [], [], [])
    split = False
    for given in paths:
        folder = Path(given).expanduser()
        sides = _sides(folder) if folder.is_dir() else None
        if sides is None:
            result.train.append(given)
            continue
        split = True
        for side, files in sides.items():
            getattr(result, side).extend(map(str, files))
    return result if split else None


def copies(paths: Sequence[str]) -> list[str]:
    """One line for each folder of ``paths`` with tables that are taken for copies of JSON files."""
    lines: list[str] = []
    for given in paths:
        if tables := sources.copies(Path(given).expanduser()):
            names = ", ".join(table.name for table in tables[:3]) + ", …" * (len(tables) > 3)
            count = "1 table" if len(tables) == 1 else f"{len(tables)} tables"
            lines.append(
                f"{given}: {count} not read, beside JSON of the same name ({names}): name them to read them"
            )
    return lines


def _sides(folder: Path) -> dict[str, list[Path]] | None:
    """Side → files, or None if no folder in ``folder`` is laid out in parts."""
    beside: dict[Path, list[tuple[str, Path]]] = defaultdict(list)
    for file in sources.inside(folder):
        group, side = _place(file, folder)
        beside[group].append((side, file))
    result: dict[str, list[Path]] = defaultdict(list)
    split = False
    for files in beside.values():
        names = {side for side, _ in files}
        in_parts = "train" in names and bool(names & {"valid", "test"})
        split |= in_parts
        for side, file in files:
            result[side if in_parts else "train"].append(file)
    return result if split else None


def _place(file: Path, folder: Path) -> tuple[Path, str]:
    """The folder whose parts are compared, and the side of ``file``: of its name, or of the nearest folder in
    ``folder`` around it that is named as a part."""
    own = _side(sources.stem(file))
    around = [parent for parent in file.parents if parent.is_relative_to(folder) and parent != folder]
    for parent in around:
        if (side := _side(parent.name.lower())) != "others":
            return parent.parent, side if own == "others" else own
    return file.parent, own


def _side(name: str) -> str:
    match = _PART.fullmatch(name)
    return _SIDES.get(match[1], "valid") if match else "others"
