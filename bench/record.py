"""How a benchmark that runs through the product ends: with what it ran on beside its numbers, and its JSON
where asked."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
from datetime import UTC, datetime
from pathlib import Path
from typing import Any


def keep(result: dict[str, Any], out: Path | None) -> dict[str, Any]:
    """``result`` with versions, machine and date; written to ``out`` if given."""
    result |= {
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
