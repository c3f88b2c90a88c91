"""Adds to a benchmark's numbers what they were measured on, and writes them as JSON."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import platform
import subprocess
from datetime import UTC, datetime
from pathlib import Path
from typing import Any


def commit() -> str | None:
    """The commit of the measured package, with ``-dirty`` if its source was changed; None outside a checkout."""
    source = importlib.util.find_spec("tunesmith")
    assert source is not None and source.origin is not None
    words = ["git", "describe", "--always", "--abbrev=12", "--exclude=*", "--dirty"]
    try:
        done = subprocess.run(words, cwd=Path(source.origin).parent, capture_output=True, text=True)
    except FileNotFoundError:  # no git
        return None
    return done.stdout.strip() or None


def keep(result: dict[str, Any], out: Path | None) -> dict[str, Any]:
    """``result`` with commit, versions, machine and date; written to ``out`` if given."""
    result |= {
        "commit": commit(),
        "versions": {
            name: importlib.metadata.version(name) for name in ("tunesmith", "mlx", "mlx-lm", "numpy")
        },
        "machine": f"{platform.machine()}, {len(os.sched_getaffinity(0))} cores",
        "date": datetime.now(UTC).isoformat("T", "seconds"),
    }
    if out:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(result, indent=1) + "\n")
    return result
