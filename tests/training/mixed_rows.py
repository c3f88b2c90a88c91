"""Rows of a task and general ones beside them, and the settings of short runs on both."""

from __future__ import annotations

from pathlib import Path

import tiny

SETS = [
    "loop.epochs=2",
    "batch.sequences=5",
    "batch.micro=2",
    "adapter.rank=2",
    "adapter.dropout=0.1",
    "optimizer.learning_rate=0.01",
    "loop.validate_every=3",
    "loop.samples=0",
    "loop.save_every=1",
    "loop.keep_last=99",
    "audit.before_training=false",
]


def written(folder: Path) -> dict[str, Path]:
    """``task``: 20 rows; ``general``: 12 others."""
    general = tiny.conversations(12, seed=7)
    for number, row in enumerate(general):
        row["conversations"][0]["content"] = f"general {number}"
    return {
        "task": tiny.write_rows(folder / "task.jsonl", tiny.conversations(20)),
        "general": tiny.write_rows(folder / "general.jsonl", general),
    }
