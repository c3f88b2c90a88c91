"""The state of training on disk: adapter, optimizer and cursor as a checkpoint, and back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mlx.nn as nn
import numpy as np
from safetensors.numpy import load_file
from safetensors.numpy import save as serialise

from tunesmith import adapters
from tunesmith.events import Notice, Sink
from tunesmith.files import flush
from tunesmith.learning import optimizer
from tunesmith.machine.ranks import Ranks
from tunesmith.runs import checkpoints
from tunesmith.runs.checkpoints import Cursor
from tunesmith.runs.config import RunConfig
from tunesmith.runs.directory import EVENTS, OPTIMIZER, Run


def save(run: Run, config: RunConfig, net: nn.Module, state: Any, cursor: Cursor) -> int:
    """Write the checkpoint of ``cursor``, remove those no longer retained, and return its size in bytes."""
    tensors = optimizer.state(state)
    needed = sum(value.nbytes for value in tensors.values())
    needed += sum(value.nbytes for value in adapters.trainable(net).values())
    flush(run.path / EVENTS)
    cursor.events_bytes = (run.path / EVENTS).stat().st_size

    def write(folder: Path) -> None:
        adapters.save(net, config.adapter, folder)
        # Written by Python: a full disk is then an OSError, and the file has the user's usual mode.
        (folder / OPTIMIZER).write_bytes(serialise(tensors))

    size = checkpoints.save(run, cursor, write, needed)
    checkpoints.retain(run, cursor, config.loop)
    return size


def restore(run: Run, net: nn.Module, state: Any, among: Ranks, notify: Sink) -> Cursor:
    """Load the newest intact checkpoint into ``net`` and ``state``, or start if there is none. Torn ones are
    named."""
    torn: list[str] = []
    newest = (
        checkpoints.newest(run, lambda error: torn.append(f"{error.where}: {error.what}"))
        if among.writes
        else None
    )
    for text in torn:
        notify(Notice(f"{text}; the checkpoint before it is used", level="warning"))
    # The first rank sets torn ones aside; the others wait for its word.
    step = int(among.total_float(np.array([newest.step if newest else 0], dtype=np.float64))[0])
    if step == 0:
        return Cursor()
    folder = run.checkpoint(step)
    cursor = checkpoints.read(run, step)
    adapters.load_tensors(net, folder)
    optimizer.restore(state, load_file(folder / OPTIMIZER))
    return cursor
