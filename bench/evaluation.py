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

BAR_S = 1200.0  # both sides of everything, on two CPU cores


def command(run: Path, options: list[str]) -> tuple[float, dict[str, Any]]:
    words = [sys.executable, "-m", "tunesmith", "evaluate", str(run), "--json", *options]
    started = time.perf_counter()
    done = subprocess.run(words, stdout=subprocess.PIPE, text=True, check=True)
    return time.perf_counter() - started, json.loads(done.stdout)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path)
    parser.add_argument("--out", type=Path)
    asked, options = parser.parse_known_args()
    seconds, found = command(asked.run, ["--fresh", *options])
    again, second = command(asked.run, [*options, "--task", "perplexity", "--task", "tool_calls"])
    tasks = [json.loads(path.read_text()) for path in sorted((asked.run / "evals").glob("*/score.json"))]
    result: dict[str, Any] = {
        "seconds": round(seconds, 1),
        "bar": BAR_S,
        "known_again": round(again, 1),
        "options": options,
        "tasks": {one["task"]: {"n": one["n"], **one["seconds"]} for one in tasks if one.get("task")},
        "headlines": {
            f"{one['task']} {one['name']}": [one["base"], one["value"], one["verdict"]]
            for one in found["scores"]
            if one["headline"]
        },
    }
    values = {(one["task"], one["name"], one["part"]): one["value"] for one in found["scores"]}
    result["same_again"] = all(
        values[one["task"], one["name"], one["part"]] == one["value"] for one in second["scores"]
    )
    print(json.dumps(record.keep(result, asked.out)))
    sys.exit(seconds > BAR_S or not result["same_again"])


if __name__ == "__main__":
    main()
