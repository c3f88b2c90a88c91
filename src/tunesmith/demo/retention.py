"""The rows that the demo mixes in against forgetting.

The prompts and the prose in ``retention.jsonl`` were written for this project. Each row says by ``kind`` what
it is for, and by ``answered`` whose answer it has: of SmolLM2-135M-Instruct (Apache-2.0) itself, greedy and
shortened to its first sentence if it was longer than ``tokens`` tokens, or our own. The rows are distilled:
not the answers are learned, but what the base finds likely at each of their tokens."""

from __future__ import annotations

import json
from importlib import resources
from pathlib import Path
from typing import Any

NAME = "retention.jsonl"


def _text() -> str:
    return (resources.files("tunesmith.demo") / NAME).read_text(encoding="utf-8")


def rows() -> list[dict[str, Any]]:
    """All rows of the package's file."""
    return [json.loads(line) for line in _text().splitlines()]


def write(path: Path) -> Path:
    """A copy of the package's file at ``path``, whose folder must exist."""
    path.write_text(_text(), "utf-8", newline="\n")
    return path
