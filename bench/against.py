"""Is this checkout as fast and as small as another one? The same run by both, update by update in turn.

Each checkout trains in a process of its own, through ``tunesmith.train``, which is held up between two
updates while the other one computes. ``ratio``: seconds of the other over ours inside a round, above 1 if
ours is faster; ``cpu_ratio``: the same of CPU seconds, which other programs disturb less; ``memory_ratio``:
our peak of resident memory over the other's. The losses must agree. Ends with 1 if a bar is missed.

    git worktree add /tmp/before COMMIT
    python bench/against.py /tmp/before --out bench/results/against.json
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import record
import small

import rivals

HERE = Path(__file__).resolve().parents[1]
BARS = {"ratio": 0.97, "memory_ratio": 1.03}  # at least, at most
LOSS_TOLERANCE = 1e-6  # relative


def work() -> None:
    """In a process of its own: train, and wait for the parent's word before each update."""
    gate = rivals.Gate()
    job = json.loads(gate.job_line)
    import tunesmith

    started, first = 0.0, True

    def hear(event: Any) -> None:
        nonlocal started, first
        kind = type(event).__name__
        if kind not in ("RunStarted", "StepDone"):
            return
        if first:
            gate.loaded()
            first = False
        if kind == "StepDone":
            gate.stop()
            cpu_seconds = time.process_time() - started
            learned = event.units if event.learned is None else event.learned
            gate.done(event.loss, round(learned), cpu_seconds=cpu_seconds)
        if not gate.wait():
            raise KeyboardInterrupt  # which ends a run as the user would
        started = time.process_time()

    resolved = tunesmith.configure(model=job["model"], data=[job["data"]], sets=job["sets"])
    with tempfile.TemporaryDirectory() as folder:
        tunesmith.train(resolved, out=Path(folder) / "run", notify=hear)


def compare(options: argparse.Namespace) -> dict[str, Any]:
    sets = [
        "data.valid=0",
        "data.max_dropped=1",
        "template.too_long=drop",
        f"batch.length={options.length}",
        f"batch.sequences={options.rows}",
        "loop.samples=0",
        "loop.save_every=0",
        f"loop.steps={1_000_000}",
        "audit.before_training=false",
        "optimizer.learning_rate=1e-4",
        f"adapter.targets={options.targets}",
        *options.set,
    ]
    job = {"model": options.model, "data": options.data, "sets": sets}
    command = [str(Path(__file__).resolve()), "--worker"]
    workers = [
        rivals.Worker(name, command, job, {"PYTHONPATH": str(checkout / "src"), "BENCH_KEEP_MEMORY": "1"})
        for name, checkout in (("ours", HERE), ("other", options.checkout))
    ]
    race = rivals.compete(
        "against", workers, options.rounds, repeats=0
    )  # so that both stay at the same update
    by_round: dict[int, dict[str, dict[str, Any]]] = {}
    for update in race["measurements"]:
        by_round.setdefault(update["round"], {})[update["trainer"]] = update
    apart = max(
        abs(pair["ours"]["loss"] - pair["other"]["loss"]) / abs(pair["other"]["loss"])
        for pair in by_round.values()
    )
    cpu_ratios = [
        pair["other"]["further"]["cpu_seconds"] / pair["ours"]["further"]["cpu_seconds"]
        for number, pair in by_round.items()
        if number
    ]
    ratio, trainers = race["ratios"]["other"], race["trainers"]
    return {
        "benchmark": "against",
        "other": record.commit(options.checkout),
        "ratio": ratio["median"],
        "ratio_min_max": [ratio["min"], ratio["max"]],
        "cpu_ratio": statistics.median(cpu_ratios),
        "memory_ratio": trainers["ours"]["peak_rss_bytes"] / trainers["other"]["peak_rss_bytes"],
        "loss_difference": apart,
        "settings": {key: getattr(options, key) for key in ("length", "rows", "rounds", "targets", "set")},
        "race": race,
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkout", type=Path, nargs="?", help="folder of the other checkout")
    parser.add_argument("--model", default=rivals.default_model(), help="folder or GGUF file")
    parser.add_argument("--data", default=rivals.default_data(), help="rows to learn")
    parser.add_argument("--rounds", type=int, default=15, help="updates of each")
    parser.add_argument("--rows", type=int, default=8, help="of an update")
    parser.add_argument("--length", type=int, default=512, help="longest row; longer ones are left out")
    parser.add_argument("--targets", default="[q_proj, v_proj]", help="adapted layers, or all-linear")
    parser.add_argument(
        "--set", action="append", default=[], help="a setting of both, as of train; repeatable"
    )
    parser.add_argument("--out", type=Path)
    parser.add_argument("--smoke", action="store_true", help=f"{small.HELP}; this checkout against itself")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        return work()
    options.checkout = HERE if options.smoke else options.checkout
    if options.checkout is None:
        parser.error("the folder of the other checkout is missing")
    with small.inputs(options, rounds=2, rows=4, length=128):
        result = record.keep(compare(options), options.out)
    print(json.dumps({key: value for key, value in result.items() if key != "race"}))
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
