"""Will it run here? ``doctor`` looks at versions, device, memory, disk, BLAS and compiler, and trains a tiny model.

Importable when MLX is broken: whatever a check raises becomes a failed check that says so.
"""

from __future__ import annotations

import importlib.metadata
import math
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, TypedDict

from tunesmith import backend, events
from tunesmith.console import size
from tunesmith.errors import SetupError, TunesmithError
from tunesmith.events import Notice, Sink

PACKAGES = ("tunesmith", "mlx", "mlx-lm", "transformers", "mistral-common")
OVERFIT_LOSS = 1.0
"""Nats that the overfit must get below; its first loss is about ln 64 = 4.2."""
SLOW_GFLOPS = 20.0
WRITTEN = 64 << 20  # bytes of the write test
LOW_MEMORY, LOW_DISK, SLOW_DISK = 4e9, 5e9, 50e6  # bytes, bytes, bytes a second

Status = Literal["ok", "warn", "fail"]


class Check(TypedDict):
    """One finding. ``hint``: what to do about it, None where nothing is to be done."""

    name: str
    status: Status
    value: str
    hint: str | None


def doctor(path: Path = Path("."), overfit: bool = True, notify: Sink = events.silent) -> dict[str, Any]:
    """``{"ok": no check failed, "checks": [Check, …]}``; never raises for what is wrong with the machine.

    path: where runs will be written (it need not exist). overfit: also train a tiny random model for ten steps.
    """
    groups: list[tuple[str, Callable[[], list[Check]]]] = [
        ("versions", _versions),
        ("device", _device),
        ("memory", _memory),
        ("disk", lambda: _disk(path)),
        ("products", _products),
        ("compiler", _compiler),
    ]
    if overfit:
        groups.append(("overfit", _overfit))
    checks: list[Check] = []
    for name, look in groups:
        notify(Notice(f"looking at {name}"))
        try:
            checks += look()
        except TunesmithError as error:
            checks.append(_check(name, "fail", error.what, error.hint))
        except Exception as error:  # a broken native library can raise anything; the doctor's work is to tell it
            checks.append(_check(name, "fail", f"{type(error).__name__}: {error}", "reinstall as the README says"))
    return {"ok": all(check["status"] != "fail" for check in checks), "checks": checks}


def render(checks: Sequence[Check]) -> str:
    """A table in plain text: a mark, the name, what was found, and hints on lines of their own."""
    marks = {"ok": "ok  ", "warn": "warn", "fail": "FAIL"}
    width = max((len(check["name"]) for check in checks), default=0)
    lines: list[str] = []
    for check in checks:
        first, *rest = check["value"].splitlines() or [""]
        lines.append(f"{marks[check['status']]}  {check['name']:<{width}}  {first}")
        lines += [f"{'':<{width + 8}}{line}" for line in rest]
        if check["hint"] is not None:
            lines.append(f"{'':<{width + 8}}hint: {check['hint']}")
    counts = {status: sum(check["status"] == status for check in checks) for status in marks}
    verdict = "this machine cannot train yet" if counts["fail"] else "this machine is ready to train"
    lines.append(f"\n{verdict}: {counts['ok']} ok, {counts['warn']} to look at, {counts['fail']} failed")
    return "\n".join(lines)


def _check(name: str, status: Status, value: str, hint: str | None = None) -> Check:
    return {"name": name, "status": status, "value": value, "hint": hint}


def _versions() -> list[Check]:
    old = sys.version_info < (3, 11)
    checks = [_check("python", "fail" if old else "ok", platform.python_version(), "Python 3.11 or newer" if old else None)]
    for package in PACKAGES:
        try:
            checks.append(_check(package, "ok", importlib.metadata.version(package)))
        except importlib.metadata.PackageNotFoundError:
            checks.append(_check(package, "fail", "not installed", f"pip install {package}"))
    return checks


def _device() -> list[Check]:
    device = backend.setup()
    import mlx.core as mx

    value = f"{device.name} ({device.kind})"
    if device.kind == "gpu":
        info = mx.device_info()
        known = {"memory_size": "memory", "max_recommended_working_set_size": "recommended working set"}
        value += "".join(f", {size(float(info[key]))} {word}" for key, word in known.items() if key in info)
    reading = backend.memory()
    value += "; in use " + ", ".join(f"{size(n_bytes)} {name}" for name, n_bytes in reading.items())
    return [_check("device", "ok", value), *(_check("device", "warn", note) for note in device.notes)]


def _memory() -> list[Check]:
    import psutil

    memory, swap = psutil.virtual_memory(), psutil.swap_memory()
    total, free, where = float(memory.total), float(memory.available), ""
    container = _container()
    if container is not None and container[0] < total:
        total, free, where = container[0], min(free, container[0] - container[1]), " (limit of this container)"
    low = free < LOW_MEMORY
    checks = [
        _check(
            "memory", "warn" if low else "ok", f"{size(total)} in all{where}, {size(free)} free",
            "close other programs; else a smaller batch.micro, or loop.checkpoint_gradients" if low else None,
        )
    ]  # fmt: skip
    busy = swap.used > 1e9
    hint = "the machine is swapping: training would be many times slower; free memory first" if busy else None
    checks.append(_check("swap", "warn" if busy else "ok", f"{size(swap.total)} in all, {size(swap.used)} used", hint))
    return checks


def _container() -> tuple[float, float] | None:
    """(limit, in use without what can be dropped) of this control group (cgroup v2) in bytes; None: no limit."""
    folder = Path("/sys/fs/cgroup")
    try:
        limit, used, details = ((folder / f"memory.{name}").read_text().strip() for name in ("max", "current", "stat"))
    except OSError:
        return None
    cached = dict(line.split() for line in details.splitlines()).get("inactive_file", "0")
    return (float(limit), float(used) - float(cached)) if limit.isdigit() else None


def _disk(path: Path) -> list[Check]:
    folder = path.absolute()
    while not folder.exists():
        folder = folder.parent
    if not folder.is_dir():
        raise SetupError(f"{folder} is not a folder, so runs cannot be written there", hint="choose another folder")
    free = shutil.disk_usage(folder).free
    low = free < LOW_DISK
    checks = [
        _check(
            "disk", "warn" if low else "ok", f"{size(free)} free at {folder}",
            "each checkpoint of a 7B adapter takes up to 1 GB, a fused model as much as the base" if low else None,
        )
    ]  # fmt: skip
    if free < 2 * WRITTEN:
        return [*checks, _check("write speed", "fail", "not measured: the disk is full", "make room")]
    block = os.urandom(1 << 20)  # a file system that compresses must not flatter itself
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            start = time.perf_counter()
            for _ in range(WRITTEN // len(block)):
                file.write(block)
            file.flush()
            os.fsync(file.fileno())
            speed = WRITTEN / (time.perf_counter() - start)
    except OSError as error:
        return [*checks, _check("write speed", "fail", f"{folder} cannot be written: {error}", "choose another folder")]
    slow = speed < SLOW_DISK
    hint = "checkpoints will take long: raise loop.save_every, or write runs to another disk" if slow else None
    return [*checks, _check("write speed", "warn" if slow else "ok", f"{size(speed)}/s, flushed to disk", hint)]


def _products() -> list[Check]:
    device = backend.setup()
    speed = backend.gflops()
    slow = device.kind == "cpu" and speed < SLOW_GFLOPS
    hint = device.blas_hint or ("other programs may be using the processor; try again" if slow else None)
    status: Status = "warn" if slow or device.blas_hint else "ok"
    return [_check("products", status, f"{speed:,.0f} GFLOP/s float32, BLAS: {device.blas}", hint)]


def _compiler() -> list[Check]:
    """MLX compiles fused kernels with g++ on Linux CPU only; elsewhere there is nothing to check."""
    if sys.platform != "linux" or backend.setup().kind != "cpu":
        return []
    if shutil.which("g++") is None:
        return [_check("compiler", "warn", "no g++: MLX runs uncompiled", "apt-get install g++ makes it faster")]
    found = subprocess.run(["g++", "--version"], capture_output=True, text=True, timeout=20)
    if found.returncode:
        return [_check("compiler", "fail", f"g++ does not run: {found.stderr.strip()}", "apt-get install g++")]
    return [_check("compiler", "ok", (found.stdout.splitlines() or ["g++"])[0])]


def _overfit() -> list[Check]:
    backend.setup()
    from tunesmith import training

    start = time.perf_counter()
    first, last = training.overfit_probe()
    took = time.perf_counter() - start
    learned = math.isfinite(last) and last <= OVERFIT_LOSS
    value = f"loss {first:.2f} → {last:.2f} in ten steps, at most {OVERFIT_LOSS:g} asked, {took:.1f} s"
    hint = None if learned else "the numbers of this machine or of this MLX are wrong; TUNESMITH_BLAS=off tells if it is BLAS"
    return [_check("overfit", "ok" if learned else "fail", value, hint)]
