"""Adds to a benchmark's numbers what they were measured on, and writes them as JSON."""

from __future__ import annotations

import importlib.util
import json
import os
import platform
import subprocess
import sys
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

PACKAGES = ("tunesmith", "mlx", "mlx-cuda-13", "mlx-lm", "torch", "transformers", "peft", "trl", "numpy")
LIBRARIES = ("OPENBLAS_", "OMP_", "MKL_", "ONEDNN_", "ATEN_", "MLX_ENABLE_", "BENCH_VECTORS")
OURS = ("TUNESMITH_ALLOCATOR", "TUNESMITH_BLAS", "TUNESMITH_CXXFLAGS", "TUNESMITH_KERNELS", "CXXFLAGS")
"""How the variables of this process begin that may change a speed; a benchmark's workers may have others.
TUNESMITH_KEY is a secret."""


def keep(result: dict[str, Any], out: Path | None) -> dict[str, Any]:
    """``result`` with `facts`; written to ``out`` if given."""
    result |= facts()
    if out:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    return result


def facts() -> dict[str, Any]:
    """What a number needs beside it to mean something."""
    versions = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = "absent"
    return {
        "commit": commit(),
        "versions": versions,
        "cpu": cpu(),
        "cores": os.cpu_count(),
        "environment": {
            name: value.rpartition(os.sep)[2]  # of a path its last part
            for name, value in sorted(os.environ.items())
            if name.startswith((*LIBRARIES, *OURS))
        },
        "date": datetime.now(UTC).isoformat("T", "seconds"),
        "command": " ".join(sys.argv),
    }


def commit(package: Path | None = None) -> str | None:
    """The commit of the measured package (default: the one that is imported), with ``-dirty`` if its checkout
    was changed; None outside a checkout."""
    if package is None:
        source = importlib.util.find_spec("tunesmith")
        assert source is not None and source.origin is not None
        package = Path(source.origin).parent
    describe = ["git", "-C", str(package), "describe", "--always", "--abbrev=12", "--exclude=*", "--dirty"]
    try:
        done = subprocess.run(describe, capture_output=True, text=True)
    except FileNotFoundError:  # no git
        return None
    return done.stdout.strip() or None


def cpu() -> str:
    """The processor and the width of its vectors, on which ratios between trainers depend."""
    if sys.platform != "linux":
        return platform.processor() or platform.machine()
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    facts = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    flags = facts.get("flags", "").split()
    width = next((name for name in ("avx512f", "avx2") if name in flags), "no AVX2")
    return f"{facts.get('model name', platform.machine())} ({width})"
