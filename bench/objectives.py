"""What does learning from bad rows cost? An update of KTO and of APO beside one of SFT, and when sharing a
prompt pays.

Part one, through the command line in interleaved rounds: the same labelled rows learned by SFT (all of them),
by KTO and by APO, in the same micro-batches. Seconds of an update are those of the run's own events, without
the first, and hold the pass for KTO's baseline; what was measured before step 1 stands apart. Memory is the
peak of the whole process, and of MLX's allocator.

Part two: answers of one prompt scored together after it (`scoring`), against each with its own copy of it.

    python bench/objectives.py --model MODEL --data rows.jsonl --out bench/results/objectives.json
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import record
import small

from tunesmith.engine import scoring
from tunesmith.machine import backend
from tunesmith.model import loading
from tunesmith.tokens.batches import Cut, Group
from tunesmith.tokens.template import Tokens

SIDES = {
    "sft": ["objective.kind=sft", "objective.undesirable=learn"],
    "kto": ["objective.kind=kto"],
    "apo_zero_unpaired": ["objective.kind=apo_zero_unpaired"],
}
PROMPTS, ANSWERS = (32, 64, 128, 512), (2, 3)


def measure(side: str, options: argparse.Namespace, out: Path) -> dict[str, Any]:
    """One run: seconds an update (median) and a learned token, peaks of memory, what the time before step 1
    was."""
    settings = {
        "batch.length": options.length,
        "template.too_long": "drop",
        "data.valid": 0,
        "data.max_dropped": 1,
        "loop.samples": 0,
        "loop.steps": options.updates + 1,
        "loop.save_every": 0,
        "batch.sequences": options.rows,
        "batch.tokens": options.tokens,
        "optimizer.learning_rate": 1e-4,
        "optimizer.warmup_share": 0,
    }
    words = [
        sys.executable,
        "-m",
        "tunesmith",
        "train",
        "--model",
        options.model,
        "--data",
        options.data,
        "--out",
        str(out),
    ]
    for word in [*SIDES[side], *(f"{key}={value}" for key, value in settings.items())]:
        words += ["--set", word]
    environ = {key: value for key, value in os.environ.items() if not key.startswith("OPENBLAS_")}
    environ["TUNESMITH_CACHE"] = str(out.with_name("cache"))
    process = subprocess.Popen(
        words, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=environ
    )
    peak = 0
    while process.poll() is None:
        try:
            peak = max(peak, psutil.Process(process.pid).memory_info().rss)
        except psutil.Error:
            break
        time.sleep(0.1)
    _, said = process.communicate()
    if process.returncode:
        raise SystemExit(f"{side} ended with {process.returncode}: {said[-2000:]}")
    steps = [
        json.loads(line) for line in (out / "events.jsonl").read_text().splitlines() if '"StepDone"' in line
    ]
    learned = [step["learned"] or step["units"] for step in steps]
    return {
        "seconds": statistics.median(step["seconds"] for step in steps[1:]),
        "seconds_a_learned_token": sum(step["seconds"] for step in steps[1:]) / sum(learned[1:]),
        "learned_tokens": sum(learned),
        "peak_rss_gb": peak / 1e9,
        "peak_mlx_gb": max(step["memory"]["peak"] for step in steps) / 1e9,
        "before": next(
            (line.split("tunesmith: ")[-1] for line in said.splitlines() if "sequences measured" in line),
            None,
        ),
    }


def steps_compared(options: argparse.Namespace) -> dict[str, Any]:
    rounds: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        for index in range(options.rounds):
            names = [list(SIDES)[(position + index) % len(SIDES)] for position in range(len(SIDES))]
            runs = {name: measure(name, options, Path(folder) / f"{index}-{name}") for name in names}
            rounds.append(runs)
            line = ", ".join(
                f"{name} {runs[name]['seconds']:.2f} s {runs[name]['peak_rss_gb']:.2f} GB" for name in SIDES
            )
            print(f"round {index + 1} of {options.rounds}: {line}", file=sys.stderr, flush=True)
    made: dict[str, Any] = {}
    for name in list(SIDES)[1:]:
        for key in ("seconds_a_learned_token", "peak_rss_gb", "peak_mlx_gb"):
            ratios = sorted(runs[name][key] / runs["sft"][key] for runs in rounds)
            made.setdefault(name, {})[key] = {
                "median": statistics.median(ratios),
                "min": ratios[0],
                "max": ratios[-1],
            }
    return {"ratio_to_sft": made, "rounds": rounds}


def _apart(sequences: Sequence[Tokens]) -> list[list[int]]:
    return [[member] for member in range(len(sequences))]


def sharing_compared(options: argparse.Namespace) -> list[dict[str, Any]]:
    """For each length of prompt and number of answers: seconds apart by seconds shared, and how far the
    values differ."""
    net = loading.load(loading.ModelSpec(path=options.model)).net
    args: Any = net.args
    vocabulary = min(2000, args.vocab_size)
    chance, made, usual = np.random.default_rng(0), [], (scoring.WORTH, scoring.families)
    for length in PROMPTS:
        for count in ANSWERS:
            groups: list[Group] = []
            for _ in range(max(1, 256 // length)):
                prompt = chance.integers(10, vocabulary, length)
                for _ in range(count):
                    ids = np.concatenate([prompt, chance.integers(10, vocabulary, 60)]).astype(np.int32)
                    groups.append(
                        Group((Tokens(ids, (np.arange(len(ids)) >= length).astype(np.float32)),), "")
                    )
            cut = Cut(max(512, length + 60))
            seconds: dict[str, list[float]] = {"apart": [], "shared": []}
            values: dict[str, np.ndarray] = {}
            for index in range(2 * options.rounds + 2):
                side = ("apart", "shared")[index % 2]
                scoring.WORTH, scoring.families = 1, _apart if side == "apart" else usual[1]
                start = time.perf_counter()
                sums = scoring.sequence_sums(net, groups, cut)
                if index >= 2:  # the first of each is warm-up
                    seconds[side].append(time.perf_counter() - start)
                values[side] = np.array([logp for ((logp, _),) in sums])
            scoring.WORTH, scoring.families = usual
            ratios = sorted(a / b for a, b in zip(seconds["apart"], seconds["shared"], strict=True))
            made.append(
                {
                    "prompt": length,
                    "answers": count,
                    "saved": (count - 1) * (length - 1),
                    "ratio": {"median": statistics.median(ratios), "min": ratios[0], "max": ratios[-1]},
                    "difference": float(
                        np.max(np.abs(values["apart"] - values["shared"]) / np.abs(values["apart"]))
                    ),
                }
            )
            print(json.dumps(made[-1]), file=sys.stderr, flush=True)
    return made


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--model", default="demo/model/SmolLM2-135M-Instruct.Q4_1.gguf", help="folder or GGUF file"
    )
    parser.add_argument(
        "--data", default="../shared/data/syngen_toolset_v1.0.0_claude.jsonl", help="labelled rows"
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--updates", type=int, default=4, help="measured in a run, after one more")
    parser.add_argument("--rows", type=int, default=16, help="of an update")
    parser.add_argument(
        "--length", type=int, default=400, help="longest row, in tokens; longer ones are left out"
    )
    parser.add_argument("--tokens", type=int, default=1024, help="of a micro-batch")
    parser.add_argument("--part", choices=("both", "steps", "sharing"), default="both")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--smoke", action="store_true", help=small.HELP)
    options = parser.parse_args()
    with small.inputs(options, rounds=1, updates=1, rows=4, length=128, tokens=256):
        compare(options)


def compare(options: argparse.Namespace) -> None:
    result: dict[str, Any] = {"benchmark": "objectives"}
    if options.part != "sharing":
        result |= steps_compared(options)
    if options.part != "steps":
        backend.setup()
        result["sharing"] = sharing_compared(options)
    result["settings"] = {
        key: getattr(options, key) for key in ("rounds", "updates", "rows", "length", "tokens")
    }
    result = record.keep(result, options.out)
    print(json.dumps({key: value for key, value in result.items() if key != "rounds"}))


if __name__ == "__main__":
    main()
