"""Is this checkout as fast and as small as another one? The same run by both, in turn, by the command line.

Seconds of an update are those of the run's own events, without the first. Memory is the highest resident size
of the process. ``ratio``: seconds of the other over ours inside a round, above 1 if ours is faster;
``memory_ratio``: our peak over the other's. The losses must agree. Ends with 1 if a bar is missed.

    git worktree add /tmp/before COMMIT
    python bench/against.py /tmp/before --out bench/results/against.json
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import record
import small

import rivals

HERE = Path(__file__).resolve().parents[1]
BARS = {"ratio": 0.97, "memory_ratio": 1.03}  # at least, at most
LOSS_TOLERANCE = 1e-6  # relative


def measure(checkout: Path, options: argparse.Namespace, out: Path) -> dict[str, Any]:
    """One run of the code in ``checkout``: seconds an update (median), losses and peak memory."""
    settings = {
        "data.valid": 0,
        "data.max_dropped": 1,
        "template.too_long": "drop",
        "batch.length": options.length,
        "batch.sequences": options.rows,
        "loop.samples": 0,
        "loop.save_every": 0,
        "loop.steps": options.updates + 1,
        "audit.before_training": False,
        "optimizer.learning_rate": 1e-4,
        "adapter.targets": options.targets,
    }
    words = [sys.executable, "-m", "tunesmith", "train", "--model", options.model, "--data", options.data]
    words += ["--out", str(out)]
    for key, value in settings.items():
        words += ["--set", f"{key}={json.dumps(value) if isinstance(value, bool) else value}"]
    environ = {key: value for key, value in os.environ.items() if not key.startswith("OPENBLAS_")}
    environ |= {"PYTHONPATH": str(checkout / "src"), "HF_HUB_OFFLINE": "1"}
    with out.with_suffix(".log").open("w+") as log:
        process = subprocess.Popen(words, stdout=log, stderr=log, env=environ)
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            log.seek(0)
            raise SystemExit(f"the run of {checkout} ended with {process.returncode}:\n{log.read()[-3000:]}")
    lines = [json.loads(line) for line in (out / "events.jsonl").read_text().splitlines()]
    steps = [line for line in lines if line["kind"] == "StepDone"]
    return {
        "seconds": statistics.median(step["seconds"] for step in steps[1:]),
        "losses": [step["loss"] for step in steps],
        "peak_rss_bytes": usage.ru_maxrss * (1024 if sys.platform == "linux" else 1),
    }


def compare(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    sides = {"ours": HERE, "other": options.checkout}
    rounds: list[dict[str, dict[str, Any]]] = []
    for number in range(options.rounds):
        names = list(sides) if number % 2 == 0 else [*sides][::-1]
        runs = {name: measure(sides[name], options, folder / f"{number}-{name}") for name in names}
        rounds.append(runs)
        texts = [
            f"{name} {runs[name]['seconds']:.3f} s {runs[name]['peak_rss_bytes'] / 1e9:.3f} GB"
            for name in sides
        ]
        print(f"round {number + 1} of {options.rounds}: {', '.join(texts)}", file=sys.stderr, flush=True)
    ratios = [runs["other"]["seconds"] / runs["ours"]["seconds"] for runs in rounds]
    memory = [runs["ours"]["peak_rss_bytes"] / runs["other"]["peak_rss_bytes"] for runs in rounds]
    apart = max(
        abs(mine - other) / abs(other)
        for runs in rounds
        for mine, other in zip(runs["ours"]["losses"], runs["other"]["losses"], strict=True)
    )
    return {
        "benchmark": "against",
        "other": record.commit(options.checkout),
        "ratio": statistics.median(ratios),
        "ratio_min_max": [min(ratios), max(ratios)],
        "memory_ratio": statistics.median(memory),
        "memory_ratio_min_max": [min(memory), max(memory)],
        "loss_difference": apart,
        "settings": {key: getattr(options, key) for key in ("length", "rows", "updates", "targets")},
        "rounds": rounds,
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkout", type=Path, nargs="?", help="folder of the other checkout")
    parser.add_argument("--model", default=rivals.default_model(), help="folder or GGUF file")
    parser.add_argument("--data", default=rivals.default_data(), help="rows to learn")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--updates", type=int, default=4, help="measured in a run, after one more")
    parser.add_argument("--rows", type=int, default=8, help="of an update")
    parser.add_argument("--length", type=int, default=512, help="longest row; longer ones are left out")
    parser.add_argument("--targets", default="[q_proj, v_proj]", help="adapted layers, or all-linear")
    parser.add_argument("--out", type=Path)
    parser.add_argument(
        "--smoke", action="store_true", help=f"{small.HELP}; compares this checkout with itself"
    )
    options = parser.parse_args()
    options.checkout = HERE if options.smoke else options.checkout
    if options.checkout is None:
        parser.error("the folder of the other checkout is missing")
    with small.inputs(options, rounds=1, updates=1, rows=4, length=128) as folder:
        result = record.keep(compare(options, folder), options.out)
    print(json.dumps({key: value for key, value in result.items() if key != "rounds"}))
    missed: list[str] = []
    if result["loss_difference"] > LOSS_TOLERANCE:
        missed.append(f"the losses differ by {result['loss_difference']:.1e}")
    if not options.smoke and result["ratio"] < BARS["ratio"]:
        missed.append(f"ratio {result['ratio']:.3f}, the bar {BARS['ratio']:g}")
    if not options.smoke and result["memory_ratio"] > BARS["memory_ratio"]:
        missed.append(f"memory {result['memory_ratio']:.3f}, the bar {BARS['memory_ratio']:g}")
    for text in missed:
        print(f"FAILED  {text}", file=sys.stderr)
    sys.exit(bool(missed))


if __name__ == "__main__":
    main()
