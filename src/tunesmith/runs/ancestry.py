"""What was a run made from, and what was made from it?

The manifest of a run names the adapters that it started from or merged, with theirs; so ancestors are known
even if they were removed. What was made from a run is found among the runs of a folder."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, NotRequired

from typing_extensions import TypedDict

from tunesmith.errors import DataError, TunesmithError
from tunesmith.files import checked, read_regular
from tunesmith.runs import artefacts
from tunesmith.runs.artefacts import Exported
from tunesmith.runs.directory import ADAPTERS, CHECKPOINTS, CONFIG, CURSOR, MANIFEST, RESTORE, Run
from tunesmith.runs.registry import RegisteredRun, fault_line, read
from tunesmith.runs.search import around, folders
from tunesmith.settings import origins
from tunesmith.settings.config import JSON

RELATIONS = {"start": "starts from", "merged": "has merged", "composed": "is composed of"}
"""Role of an adapter in the manifest's lineage, in words."""


class _Entry(TypedDict):
    """One adapter in the manifest's lineage."""

    checkpoint: str
    sha256: NotRequired[str]
    run: NotRequired[str]
    lineage: NotRequired[dict[str, Any]]
    weight: NotRequired[float]


class _Composed(TypedDict):
    """The mixture in the manifest's lineage."""

    sources: list[_Entry]


class Parent(NamedTuple):
    """An adapter that a run uses. ``relation``: a key of `RELATIONS`. ``parents``: of its own run.
    ``weight``: in a composition."""

    relation: str
    checkpoint: Path
    sha256: str | None
    parents: tuple[Parent, ...]
    weight: float | None = None

    @property
    def run(self) -> Path:
        """The run directory that the checkpoint was in."""
        return self.checkpoint.parent.parent


class Child(NamedTuple):
    """A run that uses a checkpoint of another. ``step``: name of the checkpoint's folder."""

    relation: str
    step: str
    run: RegisteredRun
    children: tuple[Child, ...]


@dataclass(frozen=True)
class Ancestry:
    """A run with all that it was made from, and all under ``folder`` that was made from it. ``faults``: what
    cannot be read of its exports."""

    run: RegisteredRun
    folder: Path
    parents: tuple[Parent, ...]
    children: tuple[Child, ...]
    exports: tuple[Exported, ...]
    faults: tuple[str, ...]

    def to_json(self) -> dict[str, JSON]:
        return {
            **self.run.to_json(),
            "made_from": [_parent_json(parent) for parent in self.parents],
            "used_by": [_child_json(child) for child in self.children],
            "exports": [_export_json(export) for export in self.exports],
        }


def _parent_json(parent: Parent) -> dict[str, JSON]:
    return {
        "relation": parent.relation,
        "checkpoint": str(parent.checkpoint),
        "weight": parent.weight,
        "exists": parent.checkpoint.is_dir(),
        "made_from": [_parent_json(above) for above in parent.parents],
    }


def _export_json(export: Exported) -> dict[str, JSON]:
    return {
        "kind": export.kind,
        "path": str(export.path),
        "checkpoint": export.checkpoint,
        "accepted": export.accepted,
    }


def _child_json(child: Child) -> dict[str, JSON]:
    return {
        "relation": child.relation,
        "step": child.step,
        "path": str(child.run.path),
        "used_by": [_child_json(below) for below in child.children],
    }


def lineage(run: str | Path, folder: str | Path | None = None) -> Ancestry:
    """The run with its lineage. folder: where to look for runs that use it (default: `search.around`).
    Raises DataError if there is no such run."""
    path = Run.open(run).path
    place = around(path) if folder is None else Path(folder)
    users = by_user([other for other in folders(place) if not other.samefile(path)], also=path)
    children = _children(path.resolve(), users, frozenset({path.resolve()}))
    exports, unreadable = artefacts.read(path)
    faults = tuple(fault_line(error) for error in unreadable)
    return Ancestry(read(path), place, parents(path), children, tuple(exports), faults)


def parents(run: Path) -> tuple[Parent, ...]:
    """The adapters that the run used; those that its settings name if its manifest cannot be read."""
    try:
        return _parents(Run(run).manifest.get("lineage", {}), str(run / MANIFEST))
    except DataError:
        return tuple(_of_settings(run))


def _of_settings(run: Path) -> Iterator[Parent]:
    try:
        content = checked(origins.skim(run / CONFIG), dict[str, Any], str(run / CONFIG), DataError, RESTORE)
    except TunesmithError:
        return
    for block, key, relation in (("adapter", "start", "start"), ("model", "adapter", "merged")):
        settings = content.get(block)
        checkpoint = settings.get(key, "null") if isinstance(settings, dict) else "null"
        if checkpoint != "null":
            yield Parent(relation, Path(str(checkpoint)), None, ())


def _parents(entries: Mapping[str, Any], where: str, depth: int = 0) -> tuple[Parent, ...]:
    if depth > 50:  # a manifest that was made by hand
        return ()
    found: list[Parent] = []
    for role in [role for role in RELATIONS if role in entries]:
        if role == "composed":
            adapters = checked(entries[role], _Composed, where, DataError, RESTORE)["sources"]
        else:
            adapters = [checked(entries[role], _Entry, where, DataError, RESTORE)]
        for entry in adapters:
            above = _parents(entry.get("lineage", {}), where, depth + 1)
            checkpoint = Path(entry["checkpoint"])
            found.append(Parent(role, checkpoint, entry.get("sha256"), above, entry.get("weight")))
    return tuple(found)


def named_paths(run: Path) -> Iterator[Path]:
    """The paths in the run's settings, such as its base, tokenizer and data; nothing if the settings cannot
    be read. Where a relative path began is not recorded: it is taken from the current folder and from each
    folder around the run."""
    try:
        waiting = [origins.skim(run / CONFIG)]
    except TunesmithError:
        return
    starts = (Path.cwd(), *run.resolve().parents)
    while waiting:
        value = waiting.pop()
        if isinstance(value, dict):
            waiting += value.values()
        elif isinstance(value, list):
            waiting += value
        elif isinstance(value, str) and "/" in value:
            with suppress(OSError, ValueError, RuntimeError):  # it is not a path
                for path in dict.fromkeys(folder / Path(value).expanduser() for folder in starts):
                    yield path.resolve()


class Use(NamedTuple):
    """``user`` uses ``parent``, a checkpoint of the run at ``owner`` (a resolved path)."""

    owner: Path
    parent: Parent
    user: Path


def by_user(users: Sequence[Path], *, also: Path | None = None) -> list[Use]:
    """What the runs use of each other, and of the run ``also``. A checkpoint is known by its path, or by its
    content if it is no longer there."""
    used = [(user, parent) for user in users for parent in parents(user)]
    by_hash: dict[str, list[Path]] = {}
    if not all(parent.checkpoint.exists() for _, parent in used):
        for run in [*users, *([] if also is None else [also])]:
            for value in _adapter_hashes(run):
                by_hash.setdefault(value, []).append(run.resolve())
    return [
        Use(owner, parent, user)
        for user, parent in used
        for owner in dict.fromkeys((parent.run.resolve(), *_elsewhere(parent, by_hash)))
    ]


def _elsewhere(parent: Parent, by_hash: Mapping[str, Sequence[Path]]) -> Sequence[Path]:
    return () if parent.sha256 is None or parent.checkpoint.exists() else by_hash.get(parent.sha256, ())


def _adapter_hashes(run: Path) -> Iterator[str]:
    """SHA-256 of the adapter in each checkpoint, as the checkpoints record it."""
    for path in sorted((run / CHECKPOINTS).glob(f"*/{CURSOR}")):
        try:
            yield str(json.loads(read_regular(path))["sha256"][ADAPTERS])
        except (OSError, ValueError, LookupError, TypeError, RecursionError):
            continue


def _children(run: Path, uses: Sequence[Use], seen: frozenset[Path]) -> tuple[Child, ...]:
    children: list[Child] = []
    for use in uses:
        user = use.user.resolve()
        if use.owner == run and user not in seen:
            below = _children(user, uses, seen | {user})
            children.append(Child(use.parent.relation, use.parent.checkpoint.name, read(use.user), below))
    return tuple(children)
