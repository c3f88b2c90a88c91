"""Where a run lives: the name of every file in its directory, how the directory is created and opened, and
its lock.

Every file is written to a temporary name, flushed and renamed, so that it is whole or absent."""

from __future__ import annotations

import errno
import os
import shlex
import socket
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import date
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, NotRequired

from pydantic import ConfigDict
from typing_extensions import TypedDict

from tunesmith.display.notebook import NotebookResult
from tunesmith.errors import ConfigError, DataError, DiskFull, EvaluationError, ModelError, TrainingError
from tunesmith.events import Notice, Sink
from tunesmith.files import checked, draft, read_json, remove, remove_drafts, write_json, write_text
from tunesmith.runs import search, tags
from tunesmith.settings.config import dump

if TYPE_CHECKING:
    from tunesmith.runs.config import RunConfig  # loads MLX, which listing runs does not need

MANIFEST, CONFIG, EVENTS, CHECKPOINTS = search.MANIFEST, search.CONFIG, search.EVENTS, search.CHECKPOINTS
ORIGIN, LOG = "origin.json", "training.log"
DATA, EVALS, EXPORTS, FROZEN, REFERENCE = "data", "evals", "exports", "frozen", "reference.safetensors"
DIFFICULTY = "difficulty.safetensors"
DROPPED, VALID, SHOWN, PLAN = "data/dropped.jsonl", "data/valid.jsonl", "data/rendered.json", "data/plan.json"
AUDIT = "data/audit.json"
FORECAST = "plan.json"
"""What the run was expected to need, beside what it needed."""
INDEX = "checkpoints/index.json"
ADAPTERS, ADAPTER_CONFIG, OPTIMIZER, CURSOR = (
    "adapters.safetensors",
    "adapter_config.json",
    "optimizer.safetensors",
    "cursor.json",
)
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""Errors of a disk that is full."""
COMPOSED = "composed"
"""Status, and key of the lineage, of a run that was composed of other runs, not trained."""
RESTORE = "put it back from a copy of the run, or train again"


class Hashes(TypedDict):
    """SHA-256 of what a run was made from. ``data``: of each file."""

    data: dict[str, str]
    template: str
    base: str
    start: NotRequired[str]


class Manifest(TypedDict):
    """``manifest.json``, in the order in which it is written. Keys of other releases are kept."""

    __pydantic_config__ = ConfigDict(extra="allow")  # pyright: ignore[reportGeneralTypeIssues]

    created: NotRequired[str]
    day: NotRequired[str]
    versions: NotRequired[dict[str, str]]
    machine: NotRequired[dict[str, str | int]]
    seed: NotRequired[int]
    hashes: NotRequired[dict[str, str | dict[str, str]]]
    lineage: NotRequired[dict[str, dict[str, Any]]]
    accepted: NotRequired[dict[str, str]]
    status: str


class _Hashed(TypedDict):
    """The part of a manifest that a run needs to go on."""

    hashes: Hashes


@dataclass(frozen=True)
class Run(NotebookResult):
    """A run directory."""

    path: Path

    @cached_property
    def config(self) -> RunConfig:
        from tunesmith.runs.config import of_run

        file = self.path / CONFIG
        try:
            return of_run(file)
        except ConfigError as error:
            place = error.where or ""
            where = place if place.startswith(str(file)) else ": ".join(filter(None, (str(file), place)))
            raise ConfigError(error.what, where=where, hint=RESTORE) from error

    def settings(self, model: str | None = None) -> RunConfig:
        """`config` with the base model at ``model`` if it was moved; `manifest.require_base` checks that it
        is the same model."""
        config = self.config
        was = Path(config.model.path)
        if model is None and was.is_absolute() and not was.exists():
            hint = (
                f"give its new path: --model PATH, or to continue training: {self.hint} --set model.path=PATH"
            )
            raise ModelError("the model of this run was moved or removed", where=str(was), hint=hint)
        return (
            config
            if model is None
            else config.model_copy(update={"model": config.model.model_copy(update={"path": model})})
        )

    @property
    def manifest(self) -> Manifest:
        """Raises DataError if it cannot be read."""
        return read_json(self.path / MANIFEST, Manifest, DataError, RESTORE)

    @property
    def status(self) -> str:
        return self.manifest["status"]

    @property
    def hashes(self) -> Hashes:
        """Of the inputs. Raises DataError if one is missing."""
        place = str(self.path / MANIFEST)
        return checked(self.manifest, _Hashed, place, DataError, RESTORE)["hashes"]

    @property
    def hint(self) -> str:
        return f"tunesmith train --resume {shlex.quote(str(self.path))}"

    @classmethod
    def open(cls, path: str | Path) -> Run:
        """The run at ``path``, which may also be a tag. Raises DataError if there is none."""
        folder = tags.find(path)
        if not (folder / MANIFEST).is_file():
            reason = f"{MANIFEST} is missing" if folder.is_dir() else "there is no such folder"
            raise DataError(f"not a run: {reason}", where=str(path), hint="tunesmith runs lists the runs")
        return cls(folder)

    @classmethod
    def create(
        cls, path: Path, config: RunConfig, origins: Mapping[str, str], manifest: Mapping[str, Any]
    ) -> Run:
        """A new run directory, which appears complete with its settings or not at all. Raises DataError if
        ``path`` exists."""
        require_free(path)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            remove_drafts(path.parent, path.name)
            with draft(path) as folder:
                for part in (DATA, CHECKPOINTS):
                    (folder / part).mkdir(parents=True)
                write_text(folder / CONFIG, dump(config))
                write_json(folder / ORIGIN, dict(origins))
                write_json(folder / MANIFEST, {**manifest, "status": "running"})
        except OSError as error:
            if error.errno in FULL:
                message, hint = f"the disk is full: {error}", "make room, and start again"
                raise DiskFull(message, where=str(path), hint=hint) from error
            if path.exists():
                message = "exists already: another process made it a moment ago"
                raise DataError(message, where=str(path), hint="choose another --out") from error
            message = f"cannot be made: {error.strerror}"
            raise DataError(message, where=str(path), hint="choose another --out") from error
        return cls(path)

    def mark(self, status: str) -> None:
        write_json(self.path / MANIFEST, {**self.manifest, "status": status})

    def checkpoint(self, step: int) -> Path:
        return self.path / CHECKPOINTS / f"{step:06d}"

    def checkpoints(self) -> list[int]:
        """Steps that have a checkpoint folder, ascending. Raises DataError if they cannot be listed."""
        folder = self.path / CHECKPOINTS
        try:
            names = [entry.name for entry in folder.iterdir() if entry.is_dir()]
        except FileNotFoundError:
            return []
        except OSError as error:
            message = f"cannot be read: {error.strerror}"
            raise DataError(message, where=str(folder), hint=RESTORE) from error
        return sorted(int(name) for name in names if name.isascii() and name.isdigit())

    @contextmanager
    def room(self) -> Iterator[None]:
        """Inside, a write that fails raises DiskFull if the disk is full, else TrainingError with the file
        and the cure."""
        try:
            yield
        except (OSError, DataError) as error:
            if isinstance(error, OSError) and error.errno in FULL:
                raise self.full(str(error)) from error
            if not self.path.is_dir():
                message = "the run directory was moved or removed while it was in use"
                hint = f"if it was moved, put it back, then: {self.hint}"
                raise TrainingError(message, where=str(self.path), hint=hint) from error
            if isinstance(error, DataError):
                raise
            place = str(error.filename or "")
            inside = place.startswith((str(self.path), str(self.path.absolute())))
            if not inside and (place or error.errno not in (errno.EIO, errno.EROFS, errno.ESTALE)):
                raise
            message = f"cannot be used: {error.strerror}"
            hint = f"make the folder writable and the file what it was, then: {self.hint}"
            raise TrainingError(message, where=place or str(self.path), hint=hint) from error

    @contextmanager
    def writable(self) -> Iterator[None]:
        """Inside, a write that fails raises DiskFull or EvaluationError with the file and the cure."""
        try:
            yield
        except OSError as error:
            raise _unwritable(Path(error.filename or self.path), error, EvaluationError) from error

    def full(self, what: str) -> DiskFull:
        return DiskFull(
            f"the disk is full: {what}",
            where=str(self.path),
            hint=f"nothing before it is lost; make room, then: {self.hint}",
        )

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Let only one process train the run, and remove what ended processes left unfinished. The kernel
        releases the lock when the process ends."""
        with self._locked(self.path / ".lock", DataError) as owner:
            if owner is not None:
                message = "another process is training this run"
                raise DataError(message, where=str(self.path), hint=f"it is {owner}")
            if (self.path / CHECKPOINTS).is_dir():
                for unfinished in (self.path / CHECKPOINTS).glob(".*"):
                    remove(unfinished)
            remove_drafts(self.path.absolute().parent, self.path.name)
            self.remove_drafts()
            yield

    def remove_drafts(self) -> None:
        """Remove the files that ended processes left unfinished."""
        for folder in (self.path, self.path / DATA, self.path / EXPORTS, *(self.path / EVALS).glob("*")):
            remove_drafts(folder)

    @contextmanager
    def evaluating(self, notify: Sink) -> Iterator[None]:
        """Let only one process at a time write evaluations of the run; others wait, and say for whom. What
        ended processes left unfinished is removed. Raises EvaluationError if the folder cannot be written
        to."""
        import fcntl

        path = self.path / EVALS / ".lock"
        try:
            path.parent.mkdir(exist_ok=True)
        except OSError as error:
            raise _unwritable(path.parent, error, EvaluationError) from error
        with self._locked(path, EvaluationError) as owner:
            if owner is None:
                self.remove_drafts()
                yield
                return
            text = f"another evaluation of this run is under way ({owner}): waiting until it ends"
            notify(Notice(text, level="warning", where=str(self.path)))
            with path.open("r+") as handle:
                fcntl.flock(handle, fcntl.LOCK_EX)
                yield

    @contextmanager
    def _locked(self, path: Path, failed: type[DataError] | type[EvaluationError]) -> Iterator[str | None]:
        """None if this process now holds the lock at ``path``, else which process does. Raises ``failed`` if
        the file cannot be written."""
        import fcntl

        try:
            handle = path.open("a+", encoding="utf-8", errors="replace")
        except OSError as error:
            raise _unwritable(path, error, failed) from error
        with handle:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                handle.seek(0)
                yield handle.read(200).strip() or "an unknown process"
                return
            except OSError:  # a file system without locks: the line below still says who trains
                pass
            with suppress(OSError):  # a full disk: who holds the lock is then not said
                handle.truncate(0)
                handle.write(f"process {os.getpid()} on {socket.gethostname()}\n")
                handle.flush()
            try:
                yield None
            finally:
                with suppress(OSError):
                    handle.truncate(0)


def _unwritable(
    path: Path, error: OSError, failed: type[DataError] | type[EvaluationError]
) -> DataError | EvaluationError | DiskFull:
    if error.errno in FULL:
        return DiskFull(f"the disk is full: {error}", where=str(path), hint="make room, and start again")
    hint = "make the run's folder writable, or copy the run to a folder that you may write to"
    return failed(f"cannot be written: {error.strerror}", where=str(path), hint=hint)


def require_free(path: Path, *, resumable: bool = True) -> None:
    """Raises DataError if a run cannot be created at ``path``: it exists, or its parent is not a writable
    folder. resumable: whether the verb can continue a run that exists."""
    if path.exists():
        instead = f"--resume {shlex.quote(str(path))}" if resumable else "remove it"
        raise DataError("exists already", where=str(path), hint=f"choose another --out, or {instead}")
    above = next(folder for folder in path.absolute().parents if folder.exists())
    if not above.is_dir() or not os.access(above, os.W_OK):
        raise DataError(
            f"cannot be made: {above} is not a folder to write in",
            where=str(path),
            hint="choose another --out",
        )


def name(config: RunConfig, day: date) -> str:
    """``2026-11-21-mistral-sft-7f3a``: the day, the model, the objective, and a random suffix."""
    stem = Path(config.model.path).name.lower()
    stem = (
        "".join(letter if letter.isalnum() else "-" for letter in stem)
        .strip("-")
        .split(".")[0][:24]
        .strip("-")
    )
    return f"{day.isoformat()}-{stem or 'model'}-{config.objective.kind}-{uuid.uuid4().hex[:4]}"
