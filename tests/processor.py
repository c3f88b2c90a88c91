"""What of a machine moves the last digit of a sum, beside what a run's manifest says."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path


def vectors() -> list[str]:
    """Widths of vector instructions that this CPU has; none where that cannot be read."""
    try:
        found = set(Path("/proc/cpuinfo").read_text().split())
    except OSError:
        return []
    return sorted(found & {"avx", "avx2", "avx512f", "fma", "asimd", "sve"})


def compiler() -> str:
    """The C++ compiler that MLX calls on a CPU."""
    found = shutil.which("g++")
    return (
        subprocess.run([found, "-dumpfullversion"], capture_output=True, text=True, check=True).stdout.strip()
        if found
        else ""
    )
