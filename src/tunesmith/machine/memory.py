"""How much memory does this machine have for a process: the ceiling of the device, and what other programs
hold."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

from tunesmith.machine import backend


@dataclass(frozen=True, slots=True)
class Room:
    """Bytes. ``ceiling``: what a process can use without swapping if it is alone: the working set that Metal
    recommends, a GPU's memory, or the machine's, and never more than the container's limit. ``others``: what
    other programs hold of it. ``program``: what this process holds beside MLX's arrays. ``swap``: what the
    machine could swap out."""

    ceiling: int
    others: int
    program: int
    swap: int

    @property
    def free(self) -> int:
        return max(0, self.ceiling - self.others)


def room() -> Room:
    import psutil

    virtual, readings = psutil.virtual_memory(), backend.memory()
    ceiling, own = backend.memory_limit(), readings["resident"]
    limit, used = container()
    others = max(0, virtual.total - virtual.available - own)
    if limit < ceiling:
        ceiling, others = int(limit), int(max(0.0, used - own))
    on_gpu = backend.setup().kind == "gpu"
    program = own if on_gpu else own - readings["active"]
    if on_gpu and not backend.shares_memory():
        others = 0  # of a card's own memory MLX tells only what this process holds
        program = 0
    return Room(ceiling, others, max(0, program), psutil.swap_memory().total)


def container() -> tuple[float, float]:
    """(limit, in use without droppable caches) of this control group (cgroup v2), in bytes; infinite if there
    is no limit."""
    folder = Path("/sys/fs/cgroup")
    try:
        limit, used, details = (
            (folder / f"memory.{name}").read_text().strip() for name in ("max", "current", "stat")
        )
    except OSError:
        return math.inf, 0.0
    cached = dict(line.split() for line in details.splitlines()).get("inactive_file", "0")
    return float(limit.replace("max", "inf")), float(used) - float(cached)
