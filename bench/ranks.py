"""Do two processes with half the cores each learn faster than one with all? Through the command line, in
interleaved rounds.

The same settings and rows as one process, as ranks started by themselves, and as ranks under ``mlx.launch``,
which asks its processes for output without a pause and so takes cores of its own on a machine that has none
to spare. Seconds of an update are those of the run's own events, without the first. Memory is the sum over
the ranks: each holds the whole model.

    python bench/ranks.py --model MODEL --data rows.jsonl --out bench/results/ranks.json
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import resource
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil
import record
import small

SIDES = ("one", "ranks", "launched")


def measure(side: str, options: argparse.Namespace, out: Path) -> dict[str, Any]:
    """Seconds an update (median), learned tokens, losses, peak memory and CPU seconds of one run: one, ranks
    or launched."""
    settings = {
        "batch.length": options.length,
        "template.too_long": "drop",
        "data.valid": 0,
        "data.max_dropped": 1,
        "loop.samples": 0,
        "loop.steps": options.updates + 1,
        "loop.save_every": 0,
        "batch.sequences": options.rows,
        "optimizer.learning_rate": 1e-4,
    }
    here = Path(sys.executable).parent
    words = [
        str(here / "tunesmith"),
        "train",
        "--model",
        options.model,
        "--data",
        options.data,
        "--out",
        str(out),
    ]
    for key, value in settings.items():
        words += ["--set", f"{key}={value}"]
    environ = {key: value for key, value in os.environ.items() if not key.startswith("OPENBLAS_")}
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    if side == "launched":
        launch = [str(here / "mlx.launch"), "-n", str(options.ranks), "--backend", "ring", "--", *words]
        processes = [_start(launch, environ)]
    elif side == "ranks":
        hosts = out.with_name(
            f"{out.name}.hosts.json"
        )  # as documented for mlx.launch: one list of addresses a rank
        hosts.write_text(json.dumps([[f"127.0.0.1:{port}"] for port in _free_ports(options.ranks)]))
        environ["MLX_HOSTFILE"] = str(hosts)
        processes = [_start(words, environ | {"MLX_RANK": str(rank)}) for rank in range(options.ranks)]
    else:
        processes = [_start(words, environ)]
    peak = 0
    while any(process.poll() is None for process in processes):
        peak = max(peak, sum(_resident(process.pid) for process in processes))
        time.sleep(0.2)
    for process in processes:
        if process.returncode:
            raise SystemExit(
                f"{side} ended with {process.returncode}: {process.stderr and process.stderr.read()[-2000:]}"
            )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    steps = [
        json.loads(line) for line in (out / "events.jsonl").read_text().splitlines() if '"StepDone"' in line
    ]
    return {
        "seconds": statistics.median(step["seconds"] for step in steps[1:]),
        "learned_tokens_s": sum(step["units"] for step in steps[1:])
        / sum(step["seconds"] for step in steps[1:]),
        "losses": [step["loss"] for step in steps],
        "peak_rss_gb": peak / 1e9,
        "cpu_seconds": after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime,
    }


def _start(words: list[str], environ: dict[str, str]) -> subprocess.Popen[str]:
    return subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=environ)


def _free_ports(count: int) -> list[int]:
    """Ports of this machine that nobody listens on."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for free in sockets:
            free.bind(("127.0.0.1", 0))
        return [free.getsockname()[1] for free in sockets]


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
    parser.add_argument("--smoke", action="store_true", help=small.HELP)
    options = parser.parse_args()
    with small.inputs(options, rounds=1, updates=1, rows=4, length=128):
        compare(options)


def compare(options: argparse.Namespace) -> None:
    rounds: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        for index in range(options.rounds):
            order = [SIDES[(position + index) % len(SIDES)] for position in range(len(SIDES))]
            runs = {side: measure(side, options, Path(folder) / f"{index}-{side}") for side in order}
            seconds = {side: runs[side]["seconds"] for side in SIDES}
            losses = {side: runs[side]["losses"] for side in SIDES}
            worst = max(
                abs(a - b) / abs(b)
                for side in SIDES
                for a, b in zip(losses[side], losses["one"], strict=True)
            )
            ratios = {side: seconds["one"] / seconds[side] for side in SIDES[1:]}
            rounds.append({"ratios": ratios, "loss_difference": worst, **runs})
            print(
                f"round {index + 1} of {options.rounds}: "
                + ", ".join(f"{side} {value:.2f} s" for side, value in seconds.items())
                + " an update, ratios "
                + ", ".join(f"{side} {value:.2f}" for side, value in ratios.items())
                + f", losses differ by {worst:.1e}",
                file=sys.stderr,
                flush=True,
            )
    ratios = {side: sorted(runs["ratios"][side] for runs in rounds) for side in SIDES[1:]}
    result = {
        "benchmark": "ranks",
        "ranks": options.ranks,
        "ratio": {
            side: {"median": statistics.median(values), "min": values[0], "max": values[-1]}
            for side, values in ratios.items()
        },
        "learned_tokens_s": {
            side: statistics.median(runs[side]["learned_tokens_s"] for runs in rounds) for side in SIDES
        },
        "cpu_seconds": {
            side: statistics.median(runs[side]["cpu_seconds"] for runs in rounds) for side in SIDES
        },
        "peak_rss_gb": {side: max(runs[side]["peak_rss_gb"] for runs in rounds) for side in SIDES},
        "loss_difference": max(runs["loss_difference"] for runs in rounds),
        "rounds": rounds,
    }
    record.keep(result, options.out)
    print(json.dumps({key: value for key, value in result.items() if key != "rounds"}))
    if result["loss_difference"] > 1e-4:
        raise SystemExit("the losses of one process and of several disagree")


if __name__ == "__main__":
    main()
