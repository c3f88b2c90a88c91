"""Where a run lives: the name of every file in its directory, how the directory is created and opened, and
its lock.

Every file is written to a temporary name, flushed and renamed, so that it is whole or absent."""

from __future__ import annotations

import errno
import json
import os
import shlex
import shutil
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import date
from functools import cached_property
from pathlib import Path
from typing import Any

from tunesmith.errors import DataError, DiskFull, ModelError
from tunesmith.files import write_json, write_text
from tunesmith.runs.config import RunConfig
from tunesmith.settings.config import dump, load

CONFIG, ORIGIN, MANIFEST, EVENTS, LOG = (
    "config.yaml",
    "origin.json",
    "manifest.json",
    "events.jsonl",
    "training.log",
)
DATA, EVALS, CHECKPOINTS, FROZEN, REFERENCE = (
    "data",
    "evals",
    "checkpoints",
    "frozen",
    "reference.safetensors",
)
DROPPED, VALID, SHOWN, PLAN = "data/dropped.jsonl", "data/valid.jsonl", "data/rendered.json", "data/plan.json"
AUDIT = "data/audit.json"
ADAPTERS, ADAPTER_CONFIG, OPTIMIZER, CURSOR = (
    "adapters.safetensors",
    "adapter_config.json",
    "optimizer.safetensors",
    "cursor.json",
)


@dataclass(frozen=True)
class Run:
    """A run directory."""

    path: Path

    @cached_property
    def config(self) -> RunConfig:
        return load(RunConfig, files=[self.path / CONFIG]).spec

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
    def manifest(self) -> dict[str, Any]:
        return json.loads((self.path / MANIFEST).read_text(encoding="utf-8"))

    @property
    def hint(self) -> str:
        return f"tunesmith train --resume {shlex.quote(str(self.path))}"

    @classmethod
    def open(cls, path: str | Path) -> Run:
        """The run at ``path``. Raises DataError if there is none."""
        folder = Path(path)
        if not (folder / MANIFEST).is_file():
            reason = f"{MANIFEST} is missing" if folder.is_dir() else "there is no such folder"
            raise DataError(f"not a run: {reason}", where=str(path), hint="runs live in ./runs/<name>")
        return cls(folder)

    @classmethod
    def create(
        cls, path: Path, config: RunConfig, origins: Mapping[str, str], manifest: Mapping[str, Any]
    ) -> Run:
        """A new run directory, which appears complete with its settings or not at all. Raises DataError if
        ``path`` exists."""
        require_free(path)
        draft = path.parent / f".{path.name}.{uuid.uuid4().hex[:8]}"
        try:
            for folder in (DATA, CHECKPOINTS):
                (draft / folder).mkdir(parents=True)
        except OSError as error:
            raise DataError(
                f"cannot be made: {error.strerror}", where=str(path), hint="choose another --out"
            ) from error
        write_text(draft / CONFIG, dump(config))
        write_json(draft / ORIGIN, dict(origins))
        write_json(draft / MANIFEST, {**manifest, "status": "running"})
        draft.rename(path)
        return cls(path)

    def mark(self, status: str) -> None:
        write_json(self.path / MANIFEST, {**self.manifest, "status": status})

    def checkpoint(self, step: int) -> Path:
        return self.path / CHECKPOINTS / f"{step:06d}"

    def checkpoints(self) -> list[int]:
        """Steps that have a checkpoint folder, ascending."""
        folder = self.path / CHECKPOINTS
        return sorted(
            int(entry.name) for entry in folder.iterdir() if entry.is_dir() and entry.name.isdigit()
        )

    @contextmanager
    def room(self) -> Iterator[None]:
        """Inside, a write that fails because the disk is full raises DiskFull."""
        try:
            yield
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
                raise
            raise self.full(str(error)) from error

    def full(self, what: str) -> DiskFull:
        return DiskFull(
            f"the disk is full: {what}",
            where=str(self.path),
            hint=f"nothing before it is lost; make room, then: {self.hint}",
        )

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Let only one process train the run. The kernel releases the lock when the process ends."""
        import fcntl

        with (self.path / ".lock").open("w") as handle:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                raise DataError("another process is training this run", where=str(self.path)) from error
            for draft in (self.path / CHECKPOINTS).glob(".*"):  # of a process that was killed
                shutil.rmtree(draft) if draft.is_dir() else draft.unlink()
            yield


def require_free(path: Path) -> None:
    """Raises DataError if a run cannot be created at ``path``: it exists, or its parent is not a writable
    folder."""
    if path.exists():
        raise DataError(
            "exists already",
            where=str(path),
            hint=f"choose another --out, or --resume {shlex.quote(str(path))}",
        )
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
