"""How long does the full suite take, before and after? Through the command line, with nothing taken as known.

Then two tasks again, known: they must say the same. Seconds are of the whole command.

    python bench/evaluation.py RUN --out bench/results/evaluation.json
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import record
import small

import tunesmith
from tunesmith.runs import records

BAR_S = 1200.0  # both sides of everything, on two CPU cores


def command(run: Path, options: list[str]) -> tuple[float, dict[str, Any]]:
    words = [sys.executable, "-m", "tunesmith", "evaluate", str(run), "--json", *options]
    started = time.perf_counter()
    done = subprocess.run(words, stdout=subprocess.PIPE, text=True, check=True)
    return time.perf_counter() - started, json.loads(done.stdout)


def trained(options: argparse.Namespace, folder: Path) -> Path:
    """A tiny run to try the script on."""
    settings = ["loop.steps=2", "batch.sequences=4", "loop.samples=0", "data.valid=0.3"]
    resolved = tunesmith.configure(model=options.model, data=[options.data], sets=settings)
    run = tunesmith.train(resolved, out=folder / "run")
    assert run is not None
    return run.path


def compare(run: Path, options: list[str]) -> dict[str, Any]:
    seconds, first = command(run, ["--fresh", *options])
    again, second = command(run, [*options, "--task", "perplexity", "--task", "tool_calls"])
    tasks, _ = records.read(run)
    values = {(score["task"], score["name"], score["part"]): score["value"] for score in first["scores"]}
    return {
        "benchmark": "evaluation",
        "seconds": round(seconds, 1),
        "bar": BAR_S,
        "known_again": round(again, 1),
        "options": options,
        "tasks": {task.task: {"n": task.n, **(task.seconds or {})} for task in tasks},
        "headlines": {
            f"{score['task']} {score['name']}": [score["base"], score["value"], score["verdict"]]
            for score in first["scores"]
            if score["headline"]
        },
        "same_again": all(
            values[score["task"], score["name"], score["part"]] == score["value"]
            for score in second["scores"]
        ),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path, nargs="?", help="run directory")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--smoke", action="store_true", help=small.HELP)
    options, further = parser.parse_known_args()
    if options.run is None and not options.smoke:
        parser.error("RUN is missing")
    with small.inputs(options) as folder:
        if options.smoke:
            options.run = trained(options, folder)
            further = ["--limit", "2", "--max-tokens", "4", *further]
        result = record.keep(compare(options.run, further), options.out)
    print(json.dumps(result))
    sys.exit(result["seconds"] > BAR_S or not result["same_again"])


if __name__ == "__main__":
    main()
