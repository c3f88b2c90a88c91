"""Checkpoints that survive a kill at any moment: written to a temporary name, flushed and renamed.

``cursor.json`` holds the SHA-256 of a checkpoint's other files. A torn checkpoint does not match it, and the
one before it is used."""

from __future__ import annotations

import json
import shutil
import uuid
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal

from tunesmith.data.sources import sha256
from tunesmith.errors import CorruptCheckpoint, DataError
from tunesmith.events import Notice, Sink, silent
from tunesmith.files import draft, write_json
from tunesmith.runs.config import LoopSpec
from tunesmith.runs.directory import ADAPTER_CONFIG, ADAPTERS, CHECKPOINTS, CURSOR, OPTIMIZER, Run


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


def retain(run: Run, cursor: Cursor, spec: LoopSpec) -> None:
    """Remove all checkpoints but the last ``keep_last`` and the best, and write the index."""
    steps = run.checkpoints()
    retained = set(steps[-spec.keep_last :]) | ({cursor.best_step} if spec.keep_best is not False else set())
    for step in steps:
        if step not in retained:
            doomed = run.checkpoint(step)
            aside = doomed.with_name(
                f".{doomed.name}.{uuid.uuid4().hex[:8]}"
            )  # a kill during the removal leaves no partial checkpoint
            doomed.rename(aside)
            shutil.rmtree(aside)
    write_json(
        run.path / CHECKPOINTS / "index.json",
        {
            "last": steps[-1] if steps else None,
            "best": cursor.best_step,
            "metric": f"validation {spec.best}",
            "best_value": cursor.best_value,
            "kept": [step for step in steps if step in retained],
        },
    )


def read(run: Run, step: int) -> Cursor:
    """The cursor of the checkpoint at ``step``. Raises CorruptCheckpoint, naming the file, if one does not
    match its checksum."""
    folder = run.checkpoint(step)
    try:
        fields = json.loads((folder / CURSOR).read_text(encoding="utf-8"))
        old = {"best_value": fields.pop("best_loss")} if "best_loss" in fields else {}  # its name in old runs
        cursor = Cursor(**fields, **old)
        complete = {ADAPTERS, ADAPTER_CONFIG, OPTIMIZER} <= cursor.sha256.keys() and cursor.step == step
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise CorruptCheckpoint(f"cannot be read: {error}", where=str(folder / CURSOR)) from error
    if not complete:
        raise CorruptCheckpoint("does not describe this checkpoint", where=str(folder / CURSOR))
    for name, expected in cursor.sha256.items():
        if not (folder / name).is_file():
            raise CorruptCheckpoint("is missing", where=str(folder / name))
        if sha256(folder / name) != expected:
            raise CorruptCheckpoint("does not match its checksum", where=str(folder / name))
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


def choose(run, which: str | int | Literal["best", "last"] = "best", notify: Sink = silent) -> Path:
    """The folder of a checkpoint: ``best``, ``last`` or a step. The last one is used, with a warning, if the
    best was not kept."""
    steps = run.checkpoints()
    if not steps:
        wait = "while it trains, wait; else: " if run.manifest["status"] == "running" else ""
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
        step = int(which) if str(which).isdigit() else None
        if step not in steps:
            known = ", ".join(map(str, steps))
            raise DataError(
                f"has no checkpoint {which}", where=str(run.path), hint=f"best, last, or a step: {known}"
            )
    assert step is not None
    read(run, step)
    return run.checkpoint(step)
