"""Do two processes with half the cores each learn faster than one with all? Through the command line, in interleaved rounds.

The same settings and rows once as one process and once under ``mlx.launch``; seconds of an update are those of the run's own
events, without the first. Memory is the sum over the ranks: each holds the whole model.

    python bench/ranks.py --model MODEL --data rows.jsonl --out bench/results/ranks.json
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import psutil


def measure(ranks: int, asked: argparse.Namespace, out: Path) -> dict[str, Any]:
    """Seconds an update (median), learned tokens, losses and peak memory of one run."""
    settings = {
        "batch.length": asked.length, "template.too_long": "drop", "data.valid": 0, "data.max_dropped": 1, "loop.samples": 0,
        "loop.steps": asked.updates + 1, "loop.save_every": 0, "batch.sequences": asked.rows, "optimizer.learning_rate": 1e-4,
    }  # fmt: skip
    here = Path(sys.executable).parent
    launch = [str(here / "mlx.launch"), "-n", str(ranks), "--backend", "ring", "--"] if ranks > 1 else []
    words = [*launch, str(here / "tunesmith"), "train", "--model", asked.model, "--data", asked.data, "--out", str(out)]
    for key, value in settings.items():
        words += ["--set", f"{key}={value}"]
    environ = {key: value for key, value in os.environ.items() if not key.startswith("OPENBLAS_")}
    process = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=environ)
    peak = 0
    while process.poll() is None:
        peak = max(peak, _resident(process.pid))
        time.sleep(0.2)
    if process.returncode:
        raise SystemExit(
            f"the run of {ranks} ended with {process.returncode}: {process.stderr and process.stderr.read()[-2000:]}"
        )
    steps = [json.loads(line) for line in (out / "events.jsonl").read_text().splitlines() if '"StepDone"' in line]
    return {
        "seconds": statistics.median(step["seconds"] for step in steps[1:]),
        "learned_tokens_s": sum(step["units"] for step in steps[1:]) / sum(step["seconds"] for step in steps[1:]),
        "losses": [step["loss"] for step in steps], "peak_rss_gb": peak / 1e9,
    }  # fmt: skip


def _resident(root: int) -> int:
    """Bytes of all trainers under ``root``."""
    total = 0
    try:
        for process in [psutil.Process(root), *psutil.Process(root).children(recursive=True)]:
            if "mlx.launch" not in " ".join(process.cmdline()):
                total += process.memory_info().rss
    except psutil.Error:
        return 0
    return total


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--model", default="demo/model/SmolLM2-135M-Instruct.Q4_1.gguf")
    parser.add_argument("--data", default="../shared/data/syngen_toolset_v1.0.0_claude.jsonl")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--updates", type=int, default=4, help="measured in a run, after one more")
    parser.add_argument("--rows", type=int, default=8, help="of an update")
    parser.add_argument("--length", type=int, default=512, help="longest row; longer ones are left out")
    parser.add_argument("--out", type=Path)
    asked = parser.parse_args()
    rounds: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        for index in range(asked.rounds):
            order = (1, asked.ranks) if index % 2 == 0 else (asked.ranks, 1)
            found = {ranks: measure(ranks, asked, Path(folder) / f"{index}-{ranks}") for ranks in order}
            one, many = found[1], found[asked.ranks]
            worst = max(abs(a - b) / abs(b) for a, b in zip(many["losses"], one["losses"], strict=True))
            rounds.append({"ratio": one["seconds"] / many["seconds"], "loss_difference": worst, "one": one, "ranks": many})
            print(
                f"round {index + 1}: one {one['seconds']:.2f} s, {asked.ranks} ranks {many['seconds']:.2f} s an update, "
                f"ratio {rounds[-1]['ratio']:.2f}, losses differ by {worst:.1e}", file=sys.stderr,
            )  # fmt: skip
    sides = ("one", "ranks")
    result = {
        "benchmark": "ranks", "ranks": asked.ranks, "ratio": statistics.median(one["ratio"] for one in rounds),
        "learned_tokens_s": {name: statistics.median(one[name]["learned_tokens_s"] for one in rounds) for name in sides},
        "peak_rss_gb": {name: max(one[name]["peak_rss_gb"] for one in rounds) for name in sides},
        "loss_difference": max(one["loss_difference"] for one in rounds), "rounds": rounds,
        "versions": {name: importlib.metadata.version(name) for name in ("tunesmith", "mlx", "mlx-lm", "numpy")},
        "machine": f"{platform.machine()}, {len(os.sched_getaffinity(0))} cores",
        "date": datetime.now(UTC).isoformat("T", "seconds"),
    }  # fmt: skip
    print(json.dumps({key: value for key, value in result.items() if key != "rounds"}))
    if asked.out:
        asked.out.parent.mkdir(parents=True, exist_ok=True)
        asked.out.write_text(json.dumps(result, indent=2) + "\n")
    if result["loss_difference"] > 1e-4:
        raise SystemExit("the losses of one process and of several disagree")


if __name__ == "__main__":
    main()
