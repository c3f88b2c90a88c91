"""What can be removed to make room, without losing what anybody needs?

Proposed are checkpoints of finished runs that are neither best nor last, runs that ended before their first
checkpoint or were done again, and caches. Nothing is proposed of a run that has a tag, is being trained, is
damaged or is reached by a link, nothing that another run under the folder or beside it uses, and no run with
an export that was accepted."""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from tunesmith.errors import ConfigError, DataError
from tunesmith.files import draft_name, is_linked, read_json, read_regular
from tunesmith.runs import artefacts, checkpoints, tags
from tunesmith.runs.ancestry import Use, by_user, named_paths
from tunesmith.runs.artefacts import REJECTED
from tunesmith.runs.directory import CHECKPOINTS, CONFIG, EVALS, EXPORTS, FROZEN, INDEX, RESTORE, Run
from tunesmith.runs.registry import FINISHED, ListedCheckpoints, RegisteredRun, is_training, read, size
from tunesmith.runs.search import FOLDER, around, folders
from tunesmith.settings.config import JSON

PrunedKind = Literal["checkpoint", "run", "cache"]
KINDS: tuple[PrunedKind, ...] = ("checkpoint", "run", "cache")


@dataclass(frozen=True)
class Prunable:
    """What can go. ``run``: the run directory that it is in, or is. ``why``: one sentence."""

    kind: PrunedKind
    path: Path
    run: Path
    why: str
    size_bytes: int

    def to_json(self) -> dict[str, JSON]:
        return asdict(self) | {"path": str(self.path), "run": str(self.run)}


@dataclass(frozen=True)
class Pruning:
    """``proposed``: what can go. ``deleted``: what went. ``refused``: path and reason of what could not be
    deleted."""

    proposed: tuple[Prunable, ...]
    deleted: tuple[Prunable, ...] = ()
    refused: tuple[tuple[Path, str], ...] = ()

    def to_json(self) -> dict[str, JSON]:
        return {
            "proposed": [item.to_json() for item in self.proposed],
            "deleted": [item.to_json() for item in self.deleted],
            "refused": [{"path": str(path), "why": why} for path, why in self.refused],
            "size_bytes": sum(item.size_bytes for item in self.proposed),
        }


def prune(folder: str | Path = FOLDER, *, delete: bool = False, only: Sequence[str] = ()) -> Pruning:
    """What can go of the runs under ``folder``; it is deleted only if ``delete``. only: some of `KINDS`.

    Raises ConfigError for another kind, DataError if there is no such folder."""
    if unknown := sorted(set(only) - set(KINDS)):
        raise ConfigError(f"cannot prune {unknown[0]!r}", where="--only", hint=", ".join(KINDS))
    proposed = tuple(item for item in _proposed(Path(folder)) if not only or item.kind in only)
    if not delete:
        return Pruning(proposed)
    deleted: list[Prunable] = []
    refused: list[tuple[Path, str]] = []
    for item in proposed:
        try:
            _delete(item)
            deleted.append(item)
        except (DataError, OSError) as error:
            what = error.what if isinstance(error, DataError) else error.strerror or str(error)
            refused.append((item.path, what))
    return Pruning(proposed, tuple(deleted), tuple(refused))


def _proposed(folder: Path) -> Iterator[Prunable]:
    paths = [path for path in folders(folder) if not is_linked(path, folder)]
    users = _possible_users(folder, paths)
    uses = by_user(users)
    used = _used_by_settings(paths, users)
    runs = [run for run in map(read, paths) if not (run.tags or run.faults or run.state == "running")]
    newer = _newest_of_same(runs)
    for run in runs:
        mine = [use for use in uses if use.owner == run.path.resolve()]
        inside = used.get(run.path.resolve(), ())
        why = None if mine or inside else _why_run(run, newer)
        if why is not None:
            yield Prunable("run", run.path, run.path, why, run.size_bytes)
        elif run.state in FINISHED:
            for item in (*_checkpoints(run, mine), *_caches(run)):
                if not any(place.is_relative_to(item.path.resolve()) for place in inside):
                    yield item


def _possible_users(folder: Path, runs: Sequence[Path]) -> list[Path]:
    """The runs under ``folder``, beside it, and around ``runs``, which are those under it."""
    places = {place.resolve(): place for place in (folder.resolve().parent, *map(around, runs))}
    users = [path for place in (folder, *places.values()) for path in folders(place)]
    return list({path.resolve(): path for path in users}.values())


def _used_by_settings(paths: Sequence[Path], users: Sequence[Path]) -> Mapping[Path, Sequence[Path]]:
    """Run → what the settings of other runs name inside it."""
    used: dict[Path, list[Path]] = {path.resolve(): [] for path in paths}
    for user in users:
        for place in named_paths(user):
            for owner in (place, *place.parents):
                if owner in used and owner != user.resolve():
                    used[owner].append(place)
    return used


def _newest_of_same(runs: Sequence[RegisteredRun]) -> Mapping[Path, RegisteredRun]:
    """Run → the newest finished run of the same settings and inputs."""
    identities = {run.path: _identity(run.path) for run in runs}
    newest: dict[object, RegisteredRun] = {}
    for run in sorted(runs, key=lambda run: run.created or ""):
        if run.state in FINISHED:
            newest[identities[run.path]] = run
    return {path: newest[identity] for path, identity in identities.items() if identity in newest}


def _identity(path: Path) -> tuple[bytes, str]:
    """What decides a run: its settings and the hashes of its inputs."""
    return read_regular(path / CONFIG), repr(sorted(Run(path).manifest.get("hashes", {}).items()))


def _why_run(run: RegisteredRun, newer: Mapping[Path, RegisteredRun]) -> str | None:
    """Why the whole run can go, or None if it cannot."""
    exports, unreadable = artefacts.read(run.path)
    if unreadable or any(artefact.accepted for artefact in exports):
        return None
    again = newer.get(run.path)
    if again is not None and (again.created or "") > (run.created or ""):
        return f"{again.name} has the same settings and inputs, and is newer"
    if run.state in ("failed", "died", "interrupted") and not Run(run.path).checkpoints():
        return f"it {'failed' if run.state == 'failed' else 'ended'} before its first checkpoint"
    return None


def _checkpoints(run: RegisteredRun, uses: Sequence[Use]) -> Iterator[Prunable]:
    opened = Run(run.path)
    steps = opened.checkpoints()
    if not steps or not (run.path / INDEX).is_file():
        return
    best = read_json(run.path / INDEX, ListedCheckpoints, DataError, RESTORE).get("best")
    needed = {use.parent.checkpoint.name for use in uses}
    for step in steps[:-1]:
        folder = opened.checkpoint(step)
        if step != best and folder.name not in needed and not folder.is_symlink():
            yield Prunable("checkpoint", folder, run.path, "neither best nor last", size(folder))


def _caches(run: RegisteredRun) -> Iterator[Prunable]:
    why: dict[Callable[[], list[Path]], str] = {
        lambda: [run.path / FROZEN]: "hidden states that only training uses",
        lambda: sorted((run.path / CHECKPOINTS).glob("torn-*")): "a torn checkpoint, which nothing reads",
        lambda: sorted((run.path / EXPORTS).glob(f"*{REJECTED}")): "a rejected export",
    }
    for paths, reason in why.items():
        for path in paths():
            if path.is_dir() and not path.is_symlink():
                yield Prunable("cache", path, run.path, reason, size(path))


def _delete(item: Prunable) -> None:
    """Raises DataError if the run was tagged, is being trained or is in use by another process, and if only a
    part could be deleted."""
    run = Run.open(item.run)
    if is_training(run.path):  # asked first: the lock writes this process in place of the one that trains
        raise DataError("another process is training this run", where=str(run.path))
    _require_locks(run)
    with ExitStack() as stack:
        stack.enter_context(run.lock())
        if tags.read(run.path):
            raise DataError("its run has a tag", where=str(run.path))
        if item.kind == "run":
            _require_unused(run, stack)
            aside = draft_name(item.path)
            item.path.rename(aside)
            _remove(aside)
        elif item.kind == "checkpoint":
            checkpoints.discard(run, item.path)
        else:
            _remove(item.path)


def _remove(folder: Path) -> None:
    """Raises DataError if a part of the folder stays."""
    try:
        shutil.rmtree(folder)
    except OSError as error:
        reason = error.strerror or str(error)
        raise DataError(f"{reason}: what is left lies in {folder}", where=str(folder)) from error


def _require_locks(run: Run) -> None:
    """Raises DataError if the file system of the run has no locks, by which other processes say what they
    use."""
    handle = os.open(run.path, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        pass
    except OSError as error:
        what = "its file system has no locks, so another process may use it unseen"
        raise DataError(what, where=str(run.path)) from error
    finally:
        os.close(handle)


def _require_unused(run: Run, stack: ExitStack) -> None:
    """Hold every checkpoint and the evaluations. Raises DataError if another process holds one."""
    places = [*map(run.checkpoint, run.checkpoints()), run.path / EVALS / ".lock"]
    for place in places:
        if not place.exists():
            continue
        handle = os.open(place, os.O_RDONLY)
        stack.callback(os.close, handle)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise DataError("another process uses it", where=str(place)) from error
