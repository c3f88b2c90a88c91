"""Will it run here? ``doctor`` checks versions, device, memory, disk, BLAS and compiler, and trains a tiny
model.

It can be imported when MLX is broken: an exception in a check becomes a failed check with its message.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal, NotRequired, TypedDict

from tunesmith import events
from tunesmith.display.console import size
from tunesmith.errors import SetupError, TunesmithError
from tunesmith.events import Notice, Sink
from tunesmith.machine import backend, memory
from tunesmith.preflight.thorough import report as thorough
from tunesmith.preflight.thorough.report import FullReport

PACKAGES = ("tunesmith", "mlx", "mlx-lm", "transformers", "mistral-common")
OVERFIT_LOSS = 1.0
"""Nats that the overfit must get below; its first loss is about ln 64 = 4.2."""
SLOW_GFLOPS = 20.0
WRITTEN = 64 << 20  # bytes of the write test
LOW_MEMORY, LOW_DISK, SLOW_DISK = 4e9, 5e9, 50e6  # bytes, bytes, bytes a second

Status = Literal["ok", "warn", "fail"]


class Check(TypedDict):
    """One result. ``hint``: what to do about a problem, or None if there is none."""

    name: str
    status: Status
    value: str
    hint: str | None


class Diagnosis(TypedDict):
    """``ok``: no check failed, and no stage of the full examination."""

    ok: bool
    checks: list[Check]
    full: NotRequired[FullReport]


def doctor(
    path: str | Path = ".",
    *,
    model: str | None = None,
    plan: str | None = None,
    overfit: bool = True,
    full: bool = False,
    notify: Sink = events.silent,
) -> Diagnosis:
    """Will it run here? Versions, device, memory, disk, BLAS, kernels, and a ten-step overfit whose end is
    known.

    path: where runs will be written (it need not exist). model: folder, GGUF file or hub id; it is loaded
    and examined: its family, what an adapter reaches, which kernels compute it, and with torch installed how
    far its logits are from those of transformers. plan: a model of which only headers are read: which
    settings of it fit this machine. overfit: also train a tiny random model for ten steps. full: also compare
    numbers with torch, TRL and float64, try the sandbox, and measure speed and memory, for minutes.
    Never raises for what is wrong with the machine."""
    groups: dict[str, Callable[[], list[Check]]] = {
        "versions": _versions,
        "device": _device,
        "memory": _memory,
        "disk": lambda: _disk(Path(path)),
        "products": _products,
        "kernels": lambda: _kernels(notify),
    }
    groups |= {} if model is None else {"model": lambda: _model(model)}
    groups |= {} if plan is None else {"plan": lambda: _plan(plan, notify)}
    groups |= {"overfit": _overfit} if overfit else {}
    checks: list[Check] = []
    for name, examine in groups.items():
        notify(Notice(f"looking at {name}"))
        try:
            checks += examine()
        except TunesmithError as error:
            checks.append(_check(name, error.what, "fail", error.hint))
        except Exception as error:  # a broken native library can raise anything, and doctor reports it
            problem = f"{type(error).__name__}: {error}"
            checks.append(_check(name, problem, "fail", "reinstall as the README says"))
    diagnosis: Diagnosis = {"ok": all(check["status"] != "fail" for check in checks), "checks": checks}
    if full:
        diagnosis["full"] = thorough.full(checks, notify=notify)
        diagnosis["ok"] = diagnosis["full"]["ok"]
    return diagnosis


def render(checks: Sequence[Check]) -> str:
    """A table in plain text: status, name and value, with each hint on a line of its own."""
    width = max((len(check["name"]) for check in checks), default=0)
    lines: list[str] = []
    for check in checks:
        mark = "FAIL" if check["status"] == "fail" else check["status"]
        first, *rest = check["value"].splitlines() or [""]
        lines.append(f"{mark:<4}  {check['name']:<{width}}  {first}")
        rest += [] if check["hint"] is None else [f"hint: {check['hint']}"]
        lines += [f"{'':<{width + 8}}{line}" for line in rest]
    counts = Counter(check["status"] for check in checks)
    verdict = "this machine cannot train yet" if counts["fail"] else "this machine is ready to train"
    lines.append(f"\n{verdict}: {counts['ok']} ok, {counts['warn']} to look at, {counts['fail']} failed")
    return "\n".join(lines)


def _check(name: str, value: str, problem: Status | Literal[False] = False, hint: str | None = None) -> Check:
    """``problem`` False: the status is ok, and the hint is left out."""
    return {"name": name, "status": problem or "ok", "value": value, "hint": hint if problem else None}


def _versions() -> list[Check]:
    checks = [_check("python", platform.python_version())]
    for package in PACKAGES:
        try:
            checks.append(_check(package, importlib.metadata.version(package)))
        except importlib.metadata.PackageNotFoundError:
            checks.append(_check(package, "not installed", "fail", f"pip install {package}"))
    return checks


def _device() -> list[Check]:
    device = backend.setup()
    import mlx.core as mx

    value = f"{device.name} ({device.kind})"
    if device.kind == "gpu":
        value += f", {size(float(mx.device_info().get('memory_size', 0)))} memory"
    value += "; in use " + ", ".join(f"{size(n_bytes)} {name}" for name, n_bytes in backend.memory().items())
    return [_check("device", value), *(_check("device", note, "warn") for note in device.notes)]


def _memory() -> list[Check]:
    import psutil

    virtual, swap = psutil.virtual_memory(), psutil.swap_memory()
    total, free, where = float(virtual.total), float(virtual.available), ""
    limit, used = memory.container()
    if limit < total:
        total, free, where = limit, min(free, limit - used), " (limit of this container)"
    value, hint = (
        f"{size(total)} in all{where}, {size(free)} free",
        "a smaller batch.tokens, or loop.checkpoint_gradients",
    )
    swapping = "the machine is swapping: training would be many times slower; free memory first"
    return [
        _check("memory", value, free < LOW_MEMORY and "warn", f"close other programs; else {hint}"),
        _check(
            "swap", f"{size(swap.total)} in all, {size(swap.used)} used", swap.used > 1e9 and "warn", swapping
        ),
    ]


def _disk(path: Path) -> list[Check]:
    folder = next(place for place in (path.absolute(), *path.absolute().parents) if place.exists())
    if not folder.is_dir():
        raise SetupError(
            f"{folder} is not a folder, so runs cannot be written there", hint="choose another folder"
        )
    free = shutil.disk_usage(folder).free
    hint = "each checkpoint of a 7B adapter takes up to 1 GB, a fused model as much as the base"
    checks = [_check("disk", f"{size(free)} free at {folder}", free < LOW_DISK and "warn", hint)]
    if free < 2 * WRITTEN:
        return [*checks, _check("write speed", "not measured: the disk is full", "fail", "make room")]
    block = os.urandom(1 << 20)  # random, so that a compressing file system gains nothing
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            start = time.perf_counter()
            for _ in range(WRITTEN // len(block)):
                file.write(block)
            file.flush()
            os.fsync(file.fileno())
            speed = WRITTEN / (time.perf_counter() - start)
    except OSError as error:
        return [
            *checks,
            _check("write speed", f"{folder} cannot be written: {error}", "fail", "choose another folder"),
        ]
    hint = "checkpoints will take long: raise loop.save_every, or write runs to another disk"
    return [
        *checks,
        _check("write speed", f"{size(speed)}/s, flushed to disk", speed < SLOW_DISK and "warn", hint),
    ]


def _products() -> list[Check]:
    device, speed = backend.setup(), backend.gflops()
    problem = (device.blas_hint is not None or (device.kind == "cpu" and speed < SLOW_GFLOPS)) and "warn"
    hint = device.blas_hint or "other programs may be using the processor; try again"
    how = backend.cpu_settings() or "on the GPU"
    if (forced := os.environ.get("OPENBLAS_CORETYPE")) and not problem and device.kind == "cpu":
        problem, hint = (
            "warn",
            f"OPENBLAS_CORETYPE={forced} keeps OpenBLAS from choosing: unset it and compare the speed",
        )
    return [_check("products", f"{speed:,.0f} GFLOP/s float32; {how}", problem, hint)]


def _kernels(notify: Sink) -> list[Check]:
    """What computes everything but matrix products."""
    from tunesmith.model import kernels

    absent = kernels.missing(notify)
    if absent is None:
        return [_check("kernels", kernels.described())]
    return [_check("kernels", kernels.described(), "warn", absent.hint)]


def _model(path: str) -> list[Check]:
    """What can be done with this model, and whether it is computed as transformers computes it."""
    from tunesmith.model import loading
    from tunesmith.preflight import examination

    findings = examination.examine(loading.load(loading.ModelSpec(path=path)))
    return [_check(name, value, problem or False, hint) for name, value, problem, hint in findings]


def _plan(path: str, notify: Sink) -> list[Check]:
    """Which settings of this model fit."""
    from tunesmith.preflight import capacity

    hint = "a smaller model, or a machine with more memory"
    rows = capacity.settings(path, notify)
    nothing = not any(row.tokens for row in rows)
    checks = [_check(row.name, row.text()) for row in rows]
    return [*checks, _check("plan", "no setting fits", "warn", hint)] if nothing else checks


def _overfit() -> list[Check]:
    backend.setup()
    start = time.perf_counter()
    first, last = _overfit_probe()
    seconds = time.perf_counter() - start
    value = f"loss {first:.2f} → {last:.2f} in ten steps, limit {OVERFIT_LOSS:g}, {seconds:.1f} s"
    hint = "this machine or this MLX computes wrongly; TUNESMITH_BLAS=off tells whether it is the BLAS"
    return [_check("overfit", value, not last <= OVERFIT_LOSS and "fail", hint)]


def _overfit_probe() -> tuple[float, float]:
    """(first, last) loss of a tiny random model that memorises one sequence in the training loop.

    Ten updates of AdamW at 2e-2 bring the loss from about ln 64 = 4.2 nats below 1, the limit of `doctor`."""
    import mlx.core as mx
    import numpy as np
    from mlx.utils import tree_map
    from mlx_lm.models import llama

    from tunesmith.model import kernels
    from tunesmith.runs.config import RunConfig
    from tunesmith.tokens.batches import Group
    from tunesmith.tokens.template import Tokens
    from tunesmith.training.without_run import UpdatesWithoutRun

    random = np.random.Generator(np.random.PCG64(0))
    sizes = llama.ModelArgs(
        model_type="llama",
        hidden_size=32,
        num_hidden_layers=1,
        intermediate_size=64,
        num_attention_heads=2,
        rms_norm_eps=1e-5,
        vocab_size=64,
        num_key_value_heads=1,
    )
    net = llama.Model(sizes)
    kernels.install(net)
    net.update(
        tree_map(
            lambda p: mx.array(random.normal(0, 0.1, p.shape).astype(np.float32)) if p.ndim > 1 else p,
            net.parameters(),
        )
    )
    config = RunConfig.model_validate(
        {
            "model": {"path": "probe"},
            "data": {"train": ("probe",), "valid": 0},
            "adapter": {"kind": "full"},
            "optimizer": {"learning_rate": 2e-2, "schedule": "constant"},
            "loop": {"steps": 10},
        }
    )
    config.adapter.attach(net, 0)
    tokens = Tokens(random.integers(0, 64, 32).astype(np.int32), np.ones(32, np.float32))
    update = UpdatesWithoutRun(net, config, [Group((tokens,), "probe")])
    losses = [update().loss for _ in range(10)]
    return losses[0], losses[-1]
