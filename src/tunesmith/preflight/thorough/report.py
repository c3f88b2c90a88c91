"""Run the stages and collect what they found, in a form that can be sent to others: no name of the machine or
of its user, no address, and of paths only the last part."""

from __future__ import annotations

import getpass
import importlib.metadata
import json
import os
import platform
import re
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any, Literal, TypedDict

from tunesmith import events
from tunesmith.display.console import duration
from tunesmith.events import Sink
from tunesmith.machine import backend
from tunesmith.preflight.thorough import results
from tunesmith.preflight.thorough.results import StageResult

SCHEMA = "tunesmith-doctor-1"
STAGES = {
    "goldens": "numbers of torch and TRL",
    "laws": "numbers of float64",
    "sandbox": "the sandbox",
    "products": "products of matrices",
    "update": "updates of SmolLM2-135M",
    "wide": "updates of 7B's widths",
    "answers": "answers",
    "reference": "memory of the reference preset",
    "serving": "the server",
}
"""In the order in which they run."""
LONGEST_S = 1200.0
"""A stage that takes longer is ended."""
EXACT = {"MLX_ENABLE_TF32": "0"}
"""Lets a GPU multiply float32 as float32, for the stages that compare numbers."""
ALIKE, ALIKE_DEVIATIONS = 1.1, 2.0
"""Figures within this ratio are called alike. Deviations are sums of few roundings, and vary more."""
PACKAGES = ("mlx", "mlx-lm", "transformers", "numpy", "safetensors", "mistral-common")
_PATH = re.compile(r"(?:[A-Za-z]:)?(?:[/\\][^\s/\\:'\",;()]+)+[/\\]([^\s/\\:'\",;()]+)")
_SHORTEST_NAME = 3
"""Names of users and machines of fewer characters are also parts of words."""


class MachineFacts(TypedDict):
    """``memory_gb``: of the machine, and of the GPU where it has its own."""

    device: str
    kind: str
    system: str
    architecture: str
    cores: int
    memory_gb: float
    gpu_memory_gb: float | None
    settings: str
    kernels: str


class ComparedFigure(TypedDict):
    """``ratio``: how many times as good as ``known``; above 1 is better."""

    name: str
    unit: str
    value: float
    known: float
    ratio: float
    verdict: Literal["better", "alike", "worse"]
    machine: str
    source: str


class FullReport(TypedDict):
    """The file of ``doctor --full --out``. ``checks``: those of `doctor`, in words. ``ok``: no check and no
    stage failed."""

    schema: str
    version: str
    date: str
    ok: bool
    seconds: float
    machine: MachineFacts | None
    versions: dict[str, str]
    checks: list[dict[str, Any]]
    stages: list[StageResult]
    compared: list[ComparedFigure]


def full(
    checks: Sequence[Mapping[str, Any]],
    *,
    small: bool = False,
    stages: Sequence[str] = tuple(STAGES),
    notify: Sink = events.silent,
) -> FullReport:
    """Run ``stages`` one after the other, and put what they found beside ``checks``. small: tiny models,
    whose figures are compared with nothing."""
    began = time.perf_counter()
    found = [run(stage, small, notify) for stage in stages]
    passed = all(check["status"] != "fail" for check in checks) and all(map(_passed, found))
    report: FullReport = {
        "schema": SCHEMA,
        "version": importlib.metadata.version("tunesmith"),
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "ok": passed,
        "seconds": round(time.perf_counter() - began, 1),
        "machine": _machine(),
        "versions": {"python": platform.python_version()} | _versions(),
        "checks": [dict(check) for check in checks],
        "stages": found,
        "compared": [] if small else compared(found, known()),
    }
    return scrubbed(report)


def _passed(stage: StageResult) -> bool:
    return stage["status"] != "fail" and all(map(results.holds, stage["deviations"]))


def run(stage: str, small: bool, notify: Sink = events.silent) -> StageResult:
    """The result of ``stage`` in a process of its own. It fails if the process crashes or takes longer than
    `LONGEST_S`."""
    began = time.perf_counter()
    tick, units = events.ticker(notify, STAGES[stage]), 0
    words = ["-m", "tunesmith.preflight.thorough.stages", stage, json.dumps({"small": small})]
    result: StageResult | None = None
    with (
        tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as said,
        subprocess.Popen(
            [sys.executable, *words],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=said,
            text=True,
            env=os.environ | (EXACT if stage in ("goldens", "laws") else {}),
        ) as process,
    ):
        timer = threading.Timer(LONGEST_S, process.kill)
        timer.start()
        try:
            assert process.stdout is not None
            for line in process.stdout:
                message = _message(line)
                units = message.get("units", units)
                if "done" in message and units:
                    tick(min(message["done"], units), units)
                result = message.get("result", result)
        finally:
            timer.cancel()
            process.kill()
            process.wait()
        said.seek(0)
        last = (said.read().strip().splitlines() or [""])[-1]
    seconds = round(time.perf_counter() - began, 2)
    if result is not None:
        return result
    ended = f"it was ended after {duration(seconds)}" if seconds >= LONGEST_S else "its process crashed"
    reason = ": ".join(part for part in (ended, _signal(process.returncode), last) if part)
    nothing: results.Findings = {"deviations": [], "figures": [], "notes": []}
    return {"stage": stage, "status": "fail", "reason": reason, "seconds": seconds, **nothing}


def _message(line: str) -> dict[str, Any]:
    """A line of the stage's process; empty for what a library printed."""
    try:
        message = json.loads(line)
    except ValueError:
        return {}
    return message if isinstance(message, dict) else {}


def _signal(code: int) -> str:
    return f"signal {-code}" if code < 0 else f"exit status {code}"


def _machine() -> MachineFacts | None:
    """None if MLX cannot be loaded."""
    try:
        device = backend.setup()
        import mlx.core as mx
        import psutil

        from tunesmith.model import kernels

        system = f"macOS {platform.mac_ver()[0]}" if platform.system() == "Darwin" else platform.system()
        own = device.kind == "gpu" and not backend.shares_memory()
        info: dict[str, Any] = mx.device_info() if own else {}
        gpu = next((info[key] for key in ("total_memory", "memory_size") if info.get(key)), None)
        return {
            "device": device.name,
            "kind": device.kind,
            "system": system,
            "architecture": platform.machine(),
            "cores": os.cpu_count() or 1,
            "memory_gb": round(psutil.virtual_memory().total / 1e9, 1),
            "gpu_memory_gb": None if gpu is None else round(gpu / 1e9, 1),
            "settings": backend.cpu_settings(),
            "kernels": kernels.described(),
        }
    except Exception:  # a broken native library can raise anything; the checks say what
        return None


def _versions() -> dict[str, str]:
    versions: dict[str, str] = {}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = "not installed"
    return versions


def known() -> list[dict[str, Any]]:
    """The figures of the documentation: machine, source, name → value."""
    file = resources.files("tunesmith.preflight.thorough") / "figures.json"
    return json.loads(file.read_text(encoding="utf-8"))


def compared(stages: Sequence[StageResult], machines: Sequence[Mapping[str, Any]]) -> list[ComparedFigure]:
    """Each figure beside the same one of each known machine."""
    rows: list[ComparedFigure] = []
    for measured in (figure for stage in stages for figure in stage["figures"]):
        for machine in machines:
            if (expected := machine["figures"].get(measured["name"])) is None or measured["value"] <= 0:
                continue
            ratio = measured["value"] / expected
            ratio = 1 / ratio if measured["unit"] in results.LESS_IS_BETTER else ratio
            alike = ALIKE_DEVIATIONS if measured["unit"] == "relative" else ALIKE
            verdict = "better" if ratio > alike else "worse" if ratio < 1 / alike else "alike"
            rows.append(
                {
                    "name": measured["name"],
                    "unit": measured["unit"],
                    "value": measured["value"],
                    "known": expected,
                    "ratio": round(ratio, 3),
                    "verdict": verdict,
                    "machine": machine["machine"],
                    "source": machine["source"],
                }
            )
    return rows


def scrubbed(value: Any) -> Any:
    """``value`` with private words taken out of every text in it."""
    if isinstance(value, str):
        return _scrubbed_text(value)
    if isinstance(value, dict):
        return {name: scrubbed(item) for name, item in value.items()}
    return [scrubbed(item) for item in value] if isinstance(value, list | tuple) else value


def _scrubbed_text(text: str) -> str:
    text = _PATH.sub(lambda match: f"…/{match[1]}", text.replace(str(Path.home()), "~"))
    for name in sorted(private_names(), key=len, reverse=True):  # a host's name begins its full one
        text = re.sub(rf"(?<!\w){re.escape(name)}(?!\w)", "…", text)
    return text


def private_names() -> set[str]:
    """Names of this machine and its user, long enough to be told from other words."""
    names = {platform.node(), socket.gethostname(), Path.home().name}
    try:
        names.add(getpass.getuser())
    except (OSError, KeyError):  # a user without an entry in the list of users
        pass
    names |= {name.partition(".")[0] for name in names}
    return {name for name in names if len(name) >= _SHORTEST_NAME and name != "localhost"}


def render(report: FullReport) -> str:
    """Tables in plain text: the stages with what failed in them, the figures, and how they compare."""
    lines = [f"{'stage':<32}{'':<9}{'time':>9}"]
    for stage in report["stages"]:
        broken = [found for found in stage["deviations"] if not results.holds(found)]
        status = "FAIL" if broken or stage["status"] == "fail" else stage["status"]
        lines.append(f"{STAGES[stage['stage']]:<32}{status:<9}{duration(stage['seconds']):>9}")
        held = len(stage["deviations"]) - len(broken)
        lines += [f"  {held} of {len(stage['deviations'])} hold"] if stage["deviations"] else []
        lines += [f"  {stage['reason']}"] if stage["reason"] else []
        lines += [f"  {_broken(found['what'], found['error'], found['limit'])}" for found in broken]
        lines += [f"  {note}" for note in stage["notes"]]
    figures = [figure for stage in report["stages"] for figure in stage["figures"]]
    if figures:
        width = max(len(figure["name"]) for figure in figures) + 2
        lines += ["", f"{'figure':<{width}}measured here"]
        for figure in figures:
            lines.append(f"{figure['name']:<{width}}{_number(figure['value'])} {figure['unit']}")
            rows = [row for row in report["compared"] if row["name"] == figure["name"]]
            lines += [f"{'':<{width}}{_beside(row)}" for row in rows]
    verdict = (
        "everything holds on this machine" if report["ok"] else "something does not hold on this machine"
    )
    return "\n".join([*lines, "", f"{verdict}; it took {duration(report['seconds'])}"])


def _broken(what: str, error: float | None, limit: float) -> str:
    if limit == 0:
        return f"does not hold: {what}"
    return f"{what}: off by {'no finite number' if error is None else f'{error:.1e}'}, allowed {limit:.0e}"


def _beside(row: ComparedFigure) -> str:
    known = f"{_number(row['known'])} on {row['machine']}"
    return (
        f"as {known}"
        if row["verdict"] == "alike"
        else f"{row['verdict']}: {row['ratio']:.2f} times as good as {known}"
    )


def _number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"
