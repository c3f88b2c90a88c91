"""How long does a verb take before and beside its real work?

Each verb runs in a fresh process with little to do: one row, 40 rows, one token of a tiny random model, the
audit of 1,000 rows. Measured are seconds of CPU (user and system, of all threads), seconds on the clock, and
the highest resident memory. ``--torch PYTHON`` also measures with a second interpreter, which has torch
beside tunesmith's dependencies. Both run the package that this script imports. The first round compiles
bytecode and is not counted. ``load`` in the result is the machine's load average at the start; seconds on the
clock mean something only if it is low. A process reports at least the memory of the one that started it, so
this script imports little.

    python bench/start.py --torch /path/to/python --data rows.jsonl --out bench/results/start.json
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

import record
import small

AUDITED = 1_000
BARS: dict[str, dict[str, float]] = {
    "help": {"seconds": 0.5, "peak_bytes": 40e6},
    "show": {"cpu_s": 1.5},
    "dry run": {"cpu_s": 3.0},
    "generate": {"cpu_s_beyond_load": 1.5},
    "audit": {"seconds": 5.0},
}
MAKE = """
import sys; sys.path.insert(0, {bench!r})
import audit, small
from pathlib import Path
folder = Path({folder!r})
small.model(folder); small.rows(folder)
audit.generate(folder / "audited.jsonl", {rows})
"""
LOAD = """
import time
import tunesmith
from tunesmith.machine import backend, imports
imports.hide("torch"); backend.setup()
from mlx_lm import utils
from tunesmith.model.loading import ModelSpec, load
start = time.process_time()
load(ModelSpec(path={model!r}))
print(time.process_time() - start)
"""


class Cost(NamedTuple):
    """Of one process; ``output`` is what it wrote to stdout."""

    cpu_s: float
    seconds: float
    peak_bytes: int
    output: str


def measure(python: str, words: list[str], folder: Path, compile_first: bool) -> Cost:
    """What ``python`` with ``words`` takes. ``compile_first``: with bytecode of its own, which a first round
    compiles."""
    source = importlib.util.find_spec("tunesmith")
    assert source is not None and source.origin is not None
    environ = {**os.environ, "PYTHONPATH": str(Path(source.origin).parents[1]), "HF_HUB_OFFLINE": "1"}
    environ.pop("PYTHONDONTWRITEBYTECODE", None)
    if compile_first:
        environ["PYTHONPYCACHEPREFIX"] = str(folder / "bytecode" / python.strip("/"))
    with (folder / "out.txt").open("w+") as out, (folder / "err.txt").open("w+") as err:
        start = time.perf_counter()
        process = subprocess.Popen([python, *words], cwd=folder, env=environ, stdout=out, stderr=err)
        _, status, usage = os.wait4(process.pid, 0)
        seconds = time.perf_counter() - start
        process.returncode = os.waitstatus_to_exitcode(status)
        out.seek(0)
        err.seek(0)
        if process.returncode not in (0, 3):  # 3: the audit found errors
            raise SystemExit(f"{python} {words} ended with {process.returncode}: {err.read()}")
        scale = 1024 if sys.platform == "linux" else 1
        return Cost(usage.ru_utime + usage.ru_stime, seconds, usage.ru_maxrss * scale, out.read())


def commands(folder: Path, data: str | None) -> dict[str, list[str]]:
    """Name → arguments of Python."""
    rows, model = folder / "rows.jsonl", folder / "model"
    one = folder / "one.jsonl"
    one.write_text(rows.read_text("utf-8").partition("\n")[0] + "\n", "utf-8")
    verb = ["-m", "tunesmith"]
    return {
        "python": ["-c", "pass"],
        "import tunesmith": ["-c", "import tunesmith"],
        "help": [*verb, "--help"],
        "show": [*verb, "show", str(one)],
        "show, with a chat template": [*verb, "show", str(one), "--model", str(model)],
        "dry run": [*verb, "train", "--dry-run", "--model", str(model), "--data", str(rows)],
        "load": ["-c", LOAD.format(model=str(model))],
        "generate": [*verb, "generate", str(model), "--prompt", "hello", "--max-tokens", "1"],
        "audit": [*verb, "audit", data or str(folder / "audited.jsonl")],
    }


def measured(
    python: str, folder: Path, data: str | None, rounds: int, compile_first: bool
) -> dict[str, dict[str, Any]]:
    """Name of a command → its medians, its bars and whether it met them."""
    named = commands(folder, data)
    costs = [
        {name: measure(python, words, folder, compile_first) for name, words in named.items()}
        for _ in range(rounds + compile_first)
    ]
    costs = costs[compile_first:]
    loading = statistics.median(float(cost["load"].output) for cost in costs)
    results: dict[str, dict[str, Any]] = {}
    for name in named:
        taken: dict[str, Any] = {
            "cpu_s": statistics.median(cost[name].cpu_s for cost in costs),
            "seconds": statistics.median(cost[name].seconds for cost in costs),
            "peak_bytes": max(cost[name].peak_bytes for cost in costs),
        }
        if name == "generate":
            taken["cpu_s_beyond_load"] = taken["cpu_s"] - loading
        bars = BARS.get(name, {})
        met = all(taken[unit] < bar for unit, bar in bars.items())
        results[name] = {**taken, "bars": bars, "met": met}
        print(
            f"{name:28}{taken['cpu_s']:7.2f} s of CPU{taken['seconds']:7.2f} s"
            f"{taken['peak_bytes'] / 1e6:8.1f} MB{'' if met else '  over ' + json.dumps(bars)}",
            file=sys.stderr,
        )
    return results


def torch_of(python: str) -> str | None:
    """The version of torch that ``python`` has installed."""
    code = "from importlib.metadata import version; print(version('torch'))"
    done = subprocess.run([python, "-c", code], capture_output=True, text=True)
    return done.stdout.strip() or None


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--torch", help="a second Python, with torch and what tunesmith needs")
    parser.add_argument("--data", help="rows to audit (default: 1,000 that are made)")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--smoke", action="store_true", help=small.HELP)
    options = parser.parse_args()
    load = os.getloadavg()[0]
    rows, rounds = (40, 1) if options.smoke else (AUDITED, options.rounds)
    with tempfile.TemporaryDirectory(prefix="bench-") as name:
        folder = Path(name)
        make = MAKE.format(bench=str(Path(__file__).parent), folder=name, rows=rows)
        subprocess.run([sys.executable, "-c", make], check=True)
        data = str(Path(options.data).resolve()) if options.data else None
        pythons = []
        for python in filter(None, (sys.executable, options.torch)):
            torch = torch_of(python)
            print(f"torch: {torch or 'not installed'}", file=sys.stderr)
            pythons.append(
                {"torch": torch, "commands": measured(python, folder, data, rounds, not options.smoke)}
            )
    met = all(taken["met"] for python in pythons for taken in python["commands"].values())
    audited = Path(options.data).name if options.data else f"{rows} rows that are made"
    result = {
        "benchmark": "start",
        "audited": audited,
        "rounds": rounds,
        "load": load,
        "pythons": pythons,
        "met": met,
    }
    print(json.dumps(record.keep(result, options.out)))
    sys.exit(not met and not options.smoke)


if __name__ == "__main__":
    main()
