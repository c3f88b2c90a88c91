"""The stages of a full examination, and the process in which one runs: ``python -m
tunesmith.preflight.thorough.stages NAME SCALE``.

It writes JSON lines: ``{"units": n}`` at first, ``{"done": k}`` after each unit of work, and
``{"result": …}`` in the end."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

from tunesmith.errors import TunesmithError
from tunesmith.machine import backend, imports
from tunesmith.preflight.thorough import speed
from tunesmith.preflight.thorough.results import (
    Deviation,
    Findings,
    SkippedStage,
    StageResult,
    deviation,
    figure,
    largest,
)
from tunesmith.preflight.thorough.speed import MISTRAL, SMOLLM2, Scale, Tick

GOLDEN_LIMITS = {"cpu": 1e-5, "gpu": 1e-4}
"""The sums of a GPU have another order."""
SERVED_RATE, SERVED_SECONDS = 2.0, 10.0
"""Requests a second, and for how long."""


class Stage(NamedTuple):
    """``units``: how often it reports that work was done. Its title is in `report.STAGES`."""

    units: Callable[[Scale], int]
    examine: Callable[[Scale, Tick], Findings]


def goldens(scale: Scale, tick: Tick) -> Findings:
    from tunesmith.preflight.goldens import compared

    limit = GOLDEN_LIMITS[backend.setup().kind]
    found = []
    for what, error in compared.deviations():
        found.append(deviation(what, error, limit))
        tick()
    return {"deviations": found, "figures": largest(found, "goldens.deviation"), "notes": []}


def laws(scale: Scale, tick: Tick) -> Findings:
    from tunesmith.preflight.thorough import laws

    found: dict[str, list[Deviation]] = {}
    for law, dtype, error, limit in laws.deviations():
        found.setdefault(dtype, []).append(deviation(f"{law}, {dtype}", error, limit))
        tick()
    figures = [entry for dtype in found for entry in largest(found[dtype], f"laws.{dtype}.deviation")]
    return {"deviations": list(chain.from_iterable(found.values())), "figures": figures, "notes": []}


def products(scale: Scale, tick: Tick) -> Findings:
    figures = [figure(f"products.{name}", rate, "GFLOP/s") for name, rate in speed.products(scale, tick)]
    return {"deviations": [], "figures": figures, "notes": []}


def sandbox(scale: Scale, tick: Tick) -> Findings:
    """What must fail in the sandbox fails, and what may run runs. Raises SetupError, which lists what a
    program could still do."""
    from tunesmith.evaluation.sandbox import sandbox

    sandbox.require()
    tick()
    outcome = sandbox.run("print(6 * 7)")
    wrong = float(outcome.status != "passed" or outcome.output.strip() != "42")
    endless = sandbox.run("while True: pass", sandbox.Limits(seconds=1))
    tick()
    found = [
        deviation("a program runs to its end", wrong, 0),
        deviation("an endless program is ended", float(endless.status != "timeout"), 0),
    ]
    return {"deviations": found, "figures": [], "notes": []}


def serving(scale: Scale, tick: Tick) -> Findings:
    """What `serve --bench` says of a model in the shape of SmolLM2-135M, in a process as a user starts it."""
    shape = replace(scale.of(SMOLLM2), vocabulary=MISTRAL.vocabulary)
    with tempfile.TemporaryDirectory(prefix="tunesmith-serving-") as name:
        speed.write_model(Path(name), shape)
        tick()
        seconds = 1.0 if scale.small else SERVED_SECONDS
        words = ["--model", name, "--bench", f"{SERVED_RATE:g}", "--bench-seconds", f"{seconds:g}", "--json"]
        command = [sys.executable, "-m", "tunesmith", "serve", *words, "--port", "0"]
        done = subprocess.run(command, capture_output=True, text=True)
    tick()
    if done.returncode:
        raise RuntimeError((done.stderr.strip().splitlines() or ["serve failed"])[-1])
    report: dict[str, Any] = json.loads(done.stdout)
    unanswered = report["requests"] - report["answered"]
    figures = [
        figure("serving.tokens", report["tokens_per_second"], "tokens/s"),
        figure("serving.first_token.p50", report["first_s"]["p50"], "s"),
        figure("serving.first_token.p95", report["first_s"]["p95"], "s"),
        figure("serving.answer.p50", report["total_s"]["p50"], "s"),
    ]
    found = [deviation("requests that were not answered", unanswered / report["requests"], 0)]
    return {"deviations": found, "figures": figures, "notes": []}


def _types(scale: Scale) -> int:
    return 3 if backend.setup().kind == "gpu" else 1


STAGES = {
    "goldens": Stage(lambda scale: 29, goldens),
    "laws": Stage(lambda scale: 7 * _types(scale), laws),
    "sandbox": Stage(lambda scale: 2, sandbox),
    "products": Stage(_types, products),
    "update": Stage(lambda scale: 1 + scale.rounds, speed.small_model),
    "wide": Stage(lambda scale: 1 + scale.rounds, speed.wide_layers),
    "answers": Stage(lambda scale: 2 + 2 * scale.rounds, speed.answers),
    "reference": Stage(lambda scale: 2, speed.reference_memory),
    "serving": Stage(lambda scale: 2, serving),
}


def examined(name: str, scale: Scale, write: Callable[[dict[str, object]], None]) -> StageResult:
    """What the stage ``name`` found; of what goes wrong in it, the reason."""
    began, done = time.perf_counter(), 0
    nothing: Findings = {"deviations": [], "figures": [], "notes": []}

    def tick() -> None:
        nonlocal done
        done += 1
        write({"done": done})

    def result(status: Any, reason: str | None, findings: Findings = nothing) -> StageResult:
        seconds = round(time.perf_counter() - began, 2)
        return {"stage": name, "status": status, "reason": reason, "seconds": seconds, **findings}

    try:
        backend.setup()
        write({"units": STAGES[name].units(scale)})
        return result("ok", None, STAGES[name].examine(scale, tick))
    except SkippedStage as skipped:
        return result("skipped", str(skipped))
    except TunesmithError as error:
        return result("fail", str(error))
    except Exception as error:  # a native library can raise anything, and the report says what
        return result("fail", f"{type(error).__name__}: {error}")


def main() -> None:
    name, scale = sys.argv[1], Scale(**json.loads(sys.argv[2]))
    imports.hide("torch")  # as the command line does

    def write(line: dict[str, object]) -> None:
        print(json.dumps(line), flush=True)

    write({"result": examined(name, scale, write)})


if __name__ == "__main__":
    main()
