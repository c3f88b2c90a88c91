"""How fast and how large tunesmith's LoRA update is beside other trainers: SmolLM2-135M, float32, rows of
real data.

Eight rows at even quantiles of the length distribution make one update; all trainers get the same rows, five
times, in turn. ``ratio_x`` is the seconds of x over ours inside a round (median; above 1 we are faster),
``memory_ratio_x`` our peak of resident memory over theirs (below 1 we are smaller). A benchmark whose losses
disagree fails: it compared different work."""

from __future__ import annotations

import argparse
import os
import sys
import time
from datetime import datetime
from pathlib import Path
from typing import Any

import record
import small

import rivals
from rivals import Job, Row

RIVALS = ("mlx_lm_blas", "trl", "torch", "mlx_lm", "checkpointed")
BARS = {
    "ratio_mlx_lm_blas": 2.6,
    "ratio_trl": 1.5,
    "ratio_torch": 1.3,
    "ratio_mlx_lm": 10.0,
    "memory_ratio_mlx_lm": 0.55,
    "memory_ratio_checkpointed": 0.95,
}
SHORT = 127  # tokens of the rows for mlx-lm with the reference BLAS, which makes about four a second
N_SHORT = 2
# Padded tokens a second on two Zen 3 cores, only for the guess of the duration that is printed first.
GUESSED = {"tunesmith": 130, "mlx_lm_blas": 65, "trl": 100, "torch": 115}


def measure(label: str, job: Job, chosen: list[str], rounds: int, repeats: int) -> dict[str, Any]:
    """All comparisons for one choice of adapted layers: name of the comparison → the result of its race."""
    races: dict[str, Any] = {}
    beside = [name for name in chosen if name in ("mlx_lm_blas", "trl", "torch")]
    if beside:
        races["speed"] = rivals.race(label, dict.fromkeys(["tunesmith", *beside], job), rounds, repeats)
    if "checkpointed" in chosen:
        both = dict.fromkeys(["tunesmith_checkpointed", "mlx_lm_checkpointed"], job)
        races["checkpointed"] = rivals.race(f"{label} checkpointed", both, 1, repeats)
    if "mlx_lm" in chosen:
        middle = [row for row in job.rows if row.offset < SHORT // 2][:N_SHORT] or job.rows[:N_SHORT]
        rows = [Row(row.ids[:SHORT], min(row.offset, SHORT - 8)) for row in middle]
        short = Job(job.model, rows, job.targets, batch=1)
        races["short"] = rivals.race(
            f"{label} {SHORT} tokens", dict.fromkeys(["tunesmith", "mlx_lm"], short), 1, repeats
        )
    return races


def summarise(races: dict[str, Any]) -> dict[str, Any]:
    summary: dict[str, Any] = {}
    spread: dict[str, list[float]] = {}
    for race in races.values():
        for name, ratio in race["ratios"].items():
            if name != "mlx_lm_checkpointed":
                summary[f"ratio_{name}"] = ratio["median"]
                spread[f"ratio_{name}"] = [ratio["min"], ratio["max"]]

    def peaks(kind: str, ours: str, theirs: str) -> float | None:
        trainers = races.get(kind, {}).get("trainers", {})
        return (
            trainers[ours]["peak_rss_bytes"] / trainers[theirs]["peak_rss_bytes"]
            if theirs in trainers
            else None
        )

    summary["memory_ratio_mlx_lm"] = peaks("speed", "tunesmith", "mlx_lm_blas")
    summary["memory_ratio_checkpointed"] = peaks(
        "checkpointed", "tunesmith_checkpointed", "mlx_lm_checkpointed"
    )
    shown = {kind: race["trainers"] for kind, race in races.items()}
    return summary | {
        "min_max": spread,
        "learned_tokens_per_second": {
            kind: {name: trainer["learned_tokens_per_second"] for name, trainer in trainers.items()}
            for kind, trainers in shown.items()
        },
        "peak_rss_gb": {
            kind: {name: trainer["peak_rss_bytes"] / 1e9 for name, trainer in trainers.items()}
            for kind, trainers in shown.items()
        },
        "agree": all(race["agree"] for race in races.values()),
        "rejected": sum(race["rejected"] for race in races.values()),
        "disturbed": [text for race in races.values() for text in race["disturbed"]],
    }


def guess(job: Job, chosen: list[str], rounds: int) -> float:
    """Seconds for one choice of adapted layers."""
    padded = sum(len(rows) * max(len(row.ids) for row in rows) for rows in job.batches)
    seconds = sum(padded / GUESSED[name] * (rounds + 1) for name in GUESSED if name in (*chosen, "tunesmith"))
    seconds += padded / 30 * 2 if "checkpointed" in chosen else 0.0
    return seconds + (N_SHORT * SHORT / 4 * 2.5 if "mlx_lm" in chosen else 0.0)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", default=rivals.default_data(), help="rows to learn")
    parser.add_argument("--model", default=rivals.default_model(), help="folder or GGUF file")
    parser.add_argument("--targets", nargs="+", choices=sorted(rivals.TARGETS), default=["qv", "all"])
    parser.add_argument(
        "--trainers", nargs="+", choices=RIVALS, default=list(RIVALS), help="beside tunesmith"
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--rows", type=int, default=8, help="rows of an update, an even number")
    parser.add_argument("--max-tokens", type=int, default=1024, help="longest row")
    parser.add_argument("--seed", type=int, default=rivals.SEED, help="of the order of the rows")
    parser.add_argument(
        "--vectors", choices=list(rivals.VECTORS), default="widest", help="as without wider ones"
    )
    parser.add_argument("--bars", action="store_true", help="fail when a bar is missed, too")
    parser.add_argument("--out", type=Path, help="default: bench/results/train_speed.json")
    parser.add_argument("--smoke", action="store_true", help=small.HELP)
    options = parser.parse_args()
    if options.rows % 2 or options.rows < 2 or options.rounds < 1:
        parser.error("--rows must be even, --rounds at least 1")
    with small.inputs(options, rows=4, max_tokens=128, rounds=1, targets=["qv"]):
        rivals.require_inputs(parser, options.data, options.model)
        return compare(options)


def compare(options: argparse.Namespace) -> int:
    os.environ["BENCH_VECTORS"] = options.vectors
    without = rivals.skipped(options.trainers)
    trainers = [name for name in options.trainers if name not in without]
    folder, rows = rivals.our_rows(options.data, options.model, options.max_tokens)
    chosen = rivals.quantiles(rows, options.rows, options.seed)
    jobs = {name: Job(str(folder), chosen, rivals.TARGETS[name]) for name in options.targets}
    lengths = [len(row.ids) for row in chosen]
    result: dict[str, Any] = record.facts() | {
        "benchmark": "train_speed",
        "vectors": options.vectors,
        "rows_found": len(rows),
        "row_lengths": lengths,
        "tokens": sum(lengths),
        "learned_tokens": sum(row.learned for row in chosen),
        "rounds": options.rounds,
        "skipped": without,
        "note": "mlx-lm learns one padding token more in each padded row and means over micro-batches: its "
        "loss_first_update differs by that; loss_same_tokens is its model's loss over the tokens that the "
        "others learn",
    }
    seconds = sum(guess(job, trainers, options.rounds) for job in jobs.values())
    print(
        f"rows of {lengths} tokens, {result['learned_tokens']} of {sum(lengths)} learned; "
        f"about {seconds / 60:.0f} minutes, to {datetime.fromtimestamp(time.time() + seconds):%H:%M}",
        file=sys.stderr,
        flush=True,
    )
    summary: dict[str, Any] = {"benchmark": "train_speed"}
    problems: list[str] = []
    result["races"] = {}
    for name, job in jobs.items():
        repeats = 0 if options.smoke else rivals.REPEATS
        result["races"][name] = races = measure(name, job, trainers, options.rounds, repeats)
        result[name] = summary[name] = summarise(races)
        problems += [f"{name}: {text}" for text in rivals.missed(summary[name], BARS)] if options.bars else []
    out = options.out or Path(__file__).parent / "results" / "train_speed.json"
    return rivals.finish(result, summary, problems, out)


if __name__ == "__main__":
    sys.exit(main())
