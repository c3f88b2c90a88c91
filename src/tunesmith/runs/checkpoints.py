"""Checkpoints that survive a kill at any moment: written to a temporary name, flushed and renamed.

``cursor.json`` holds the SHA-256 of a checkpoint's other files. A torn checkpoint does not match it, and the
one before it is used."""

from __future__ import annotations

import os
import shutil
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from tunesmith.data.sources import sha256
from tunesmith.errors import CorruptCheckpoint, DataError
from tunesmith.events import Notice, Sink, silent
from tunesmith.files import checked, draft, draft_name, read_json, remove, write_json
from tunesmith.runs.directory import ADAPTER_CONFIG, ADAPTERS, CHECKPOINTS, CURSOR, INDEX, OPTIMIZER, Run

if TYPE_CHECKING:
    from tunesmith.runs.config import LoopSpec


@dataclass
class Cursor:
    """Where training stands after ``step`` updates: all state beside the adapter and the optimizer."""

    step: int = 0
    best_step: int | None = None
    best_value: float | None = None  # of what `LoopSpec.best` names
    stale: int = 0  # validations since the best
    skipped: int = 0  # updates that the guard skipped, in a row
    tokens: int | None = None  # tokens on the device at once, if the plan's budget was too large
    elapsed_s: float = 0.0
    events_bytes: int = 0  # events.jsonl up to here belongs to this checkpoint
    sha256: dict[str, str] = field(default_factory=dict)


def save(run: Run, cursor: Cursor, write: Callable[[Path], None], needed: int) -> int:
    """Write the checkpoint of ``cursor.step``, whose folder ``write`` fills. Returns its size in bytes.

    Raises DiskFull before anything is touched if ``needed`` bytes (and a margin) are not free, or if the disk
    fills up meanwhile. The checkpoints before it stay as they were."""
    final = run.checkpoint(cursor.step)
    free = shutil.disk_usage(run.path).free
    margin = needed + (16 << 20)
    if free < margin:
        raise run.full(f"a checkpoint needs {margin / 1e6:.0f} MB and {free / 1e6:.0f} MB are free")
    with draft(final) as folder:
        folder.mkdir()
        write(folder)
        cursor.sha256 = {file.name: sha256(file) for file in sorted(folder.iterdir())}
        write_json(folder / CURSOR, asdict(cursor))
    return sum(file.stat().st_size for file in final.iterdir())


def weights_hash(folder: Path) -> str:
    """sha256 of the adapter's weights in the checkpoint ``folder``."""
    return sha256(folder / ADAPTERS)


def retain(run: Run, cursor: Cursor, spec: LoopSpec) -> None:
    """Remove all checkpoints but the last ``keep_last`` and the best, and write the index."""
    steps = run.checkpoints()
    retained = set(steps[-spec.keep_last :]) | ({cursor.best_step} if spec.keep_best is not False else set())
    for abandoned in (run.path / CHECKPOINTS).glob(".*"):  # of a removal that was interrupted
        remove(abandoned)
    for step in steps:
        if step not in retained:
            _remove(run.checkpoint(step))
    write_json(
        run.path / INDEX,
        {
            "last": steps[-1] if steps else None,
            "best": cursor.best_step,
            "metric": f"validation {spec.best}",
            "best_value": cursor.best_value,
            "kept": [step for step in steps if step in retained],
        },
    )


def discard(run: Run, folder: Path) -> None:
    """Remove a checkpoint, also from the index. Raises DataError while it is `held`."""
    _remove(folder)
    if folder.exists():
        raise DataError("another process uses it", where=str(folder))
    index = run.path / INDEX
    content = read_json(index, dict[str, Any], DataError, None)
    steps = run.checkpoints()
    write_json(index, content | {"kept": [step for step in content.get("kept", steps) if step in steps]})


def _remove(folder: Path) -> None:
    """Remove a checkpoint, but not while `held`: then a later retention removes it. A kill during the removal
    leaves no partial checkpoint."""
    import fcntl

    handle = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return
        aside = draft_name(folder)
        folder.rename(aside)
        shutil.rmtree(aside)
    finally:
        os.close(handle)


@contextmanager
def held(folder: Path | None) -> Iterator[None]:
    """Inside, retention does not remove the checkpoint ``folder``. Raises DataError if it has just done
    so."""
    if folder is None:
        yield
        return
    import fcntl

    gone = "was removed a moment ago by the training of its run"
    hint = "the same command chooses another checkpoint"
    try:
        handle = os.open(folder, os.O_RDONLY)
    except FileNotFoundError as error:
        raise DataError(gone, where=str(folder), hint=hint) from error
    try:
        with suppress(OSError):  # a file system without locks
            fcntl.flock(handle, fcntl.LOCK_SH)
        if not folder.exists():
            raise DataError(gone, where=str(folder), hint=hint)
        yield
    finally:
        os.close(handle)


CURE = "put it back from a copy, or use another: --checkpoint STEP; a resumed run goes on from the one before"


def read(run: Run, step: int) -> Cursor:
    """The cursor of the checkpoint at ``step``. Raises CorruptCheckpoint, naming the file, if one does not
    match its checksum."""
    folder = run.checkpoint(step)
    path = folder / CURSOR
    fields = read_json(path, dict[str, Any], CorruptCheckpoint, CURE)
    if "best_loss" in fields:  # its name in old runs
        fields["best_value"] = fields.pop("best_loss")
    cursor = checked(fields, Cursor, str(path), CorruptCheckpoint, CURE)
    needed = {ADAPTERS, ADAPTER_CONFIG} | ({OPTIMIZER} if step else set())  # before step 1 it has no state
    if not (needed <= cursor.sha256.keys() and cursor.step == step):
        raise CorruptCheckpoint("does not describe this checkpoint", where=str(path), hint=CURE)
    for name, expected in cursor.sha256.items():
        file = folder / name
        if "/" in name or not file.is_file():
            raise CorruptCheckpoint("is missing", where=str(file), hint=CURE)
        try:
            whole = sha256(file) == expected
        except OSError as error:
            message = f"cannot be read: {error.strerror}"
            raise CorruptCheckpoint(message, where=str(file), hint=CURE) from error
        if not whole:
            raise CorruptCheckpoint("does not match its checksum", where=str(file), hint=CURE)
    return cursor


def newest(run: Run, report: Callable[[CorruptCheckpoint], None]) -> Cursor | None:
    """The cursor of the newest intact checkpoint, or None if there is none. Each torn one is reported and set
    aside."""
    for step in reversed(run.checkpoints()):
        try:
            return read(run, step)
        except CorruptCheckpoint as error:
            report(error)
            torn = run.checkpoint(step)
            torn.rename(torn.with_name(f"torn-{torn.name}-{uuid.uuid4().hex[:8]}"))
    return None


def choose(run: Run, which: str | int | Literal["best", "last"] = "best", notify: Sink = silent) -> Path:
    """The folder of a checkpoint: ``best``, ``last`` or a step. The last one is used, with a warning, if the
    best was not kept."""
    steps = run.checkpoints()
    if not steps:
        wait = "while it trains, wait; else: " if run.status == "running" else ""
        raise DataError("has no checkpoint yet", where=str(run.path), hint=wait + run.hint)
    if which == "best":
        last = read(run, steps[-1])
        step = last.best_step if last.best_step in steps else steps[-1]
        if last.best_step not in (step, None):
            place = f"at step {last.best_step}, which is not kept" if last.best_step else "the base's"
            message = f"the best validation {run.config.loop.best} so far is {place}; step {step} is used"
            notify(Notice(message, level="warning"))
    elif which == "last":
        step = steps[-1]
    else:
        named = str(which)
        step = int(named) if named.isascii() and named.isdigit() and len(named) < 20 else None
        if step not in steps:
            known = ", ".join(map(str, steps))
            raise DataError(
                f"has no checkpoint {which}", where=str(run.path), hint=f"best, last, or a step: {known}"
            )
    assert step is not None
    read(run, step)
    return run.checkpoint(step)
