"""Does learning from good and bad rows work? SFT on the good, KTO, and SFT then KTO, on held-out rows, with
intervals.

A fixed subset of labelled rows, as many good as bad, split 80/20 within each label; every arm with several
seeds (order of rows, adapter). Measured through the product's own commands: ``train`` and ``evaluate --task
preference --task perplexity``. The base of every number is the model without any adapter, but for the row
that says otherwise. Intervals: bootstrap over held-out rows, good and bad apart, of the mean over seeds; the
spread between seeds stands beside them. Arms that are there from an earlier call are not trained again.

    python bench/preferences.py --model MODEL --data rows.jsonl --out bench/results/preferences.json
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import record
import small

import tunesmith
from tunesmith.data import formats
from tunesmith.display import console
from tunesmith.learning.objective import won
from tunesmith.learning.objectives.kto import KTO
from tunesmith.model import loading
from tunesmith.runs import records
from tunesmith.runs.directory import Run
from tunesmith.tokens import renderers, template

RESAMPLES = 4000
COMMON = {
    "data.valid": 0,
    "data.max_dropped": 1,
    "loop.samples": 0,
    "loop.validate_every": 0,
    "loop.save_every": 0,
    "optimizer.warmup_share": 0.1,
    "adapter.targets": "all-linear",
}


def subset(options: argparse.Namespace, folder: Path) -> tuple[Path, Path, dict[str, Any]]:
    """(training file, held-out file, what they hold). Chosen by a hash of the row, so always the same."""
    spec = formats.DataSpec(train=(options.data,))
    read = formats.read(spec.train, spec)
    names = loading.resolve(options.model, dtype="auto")
    renderer = renderers.load(names)
    lenient = template.TemplateSpec.model_validate({"too_long": "drop"})
    rendered = template.render(KTO().select(read.examples).examples, renderer, lenient, options.length)
    short = {row.example_id for row in rendered.rows}
    judged = {
        example.id: example
        for example in read.examples
        if isinstance(example, formats.Judged) and example.id in short
    }
    chosen = sorted(judged.values(), key=lambda example: hashlib.sha256(example.id.encode()).digest())
    seen: set[str] = set()
    sides: dict[str, list[formats.Example]] = {"train": [], "held_out": []}
    for desirable in (True, False):
        rows: list[formats.Example] = []
        for example in chosen:
            prompt = formats.prompt_key(example)
            if example.desirable is desirable and prompt not in seen and len(rows) < options.rows // 2:
                seen.add(prompt)
                rows.append(example)
        held = round(len(rows) / 5)
        sides["held_out"] += rows[:held]
        sides["train"] += rows[held:]
    files = {}
    for name, rows in sides.items():
        files[name] = folder / f"{name}.jsonl"
        formats.write_examples(rows, files[name])
    tokens = {row.example_id: len(row.tokens.ids) for row in rendered.rows}
    facts = {
        name: {
            "rows": len(rows),
            "desirable": sum(isinstance(row, formats.Judged) and row.desirable for row in rows),
            "tokens": sum(tokens[row.id] for row in rows),
        }
        for name, rows in sides.items()
    }
    return files["train"], files["held_out"], facts


def arm(name: str, seed: int, options: argparse.Namespace, data: Path, folder: Path) -> Run:
    """Train, or find it trained."""
    out = folder / f"{name.replace(' ', '-')}-{seed}"
    if (out / "manifest.json").exists() and Run(out).manifest["status"] == "completed":
        return Run(out)
    settings = dict(COMMON) | {"loop.seed": seed, "batch.length": options.length}
    if name == "SFT":
        settings |= {
            "loop.epochs": options.sft_epochs,
            "optimizer.learning_rate": options.sft_rate,
            "batch.sequences": 8,
        }
    else:
        settings |= {
            "objective.kind": "kto",
            "loop.epochs": options.epochs,
            "optimizer.learning_rate": options.rate,
        }
    if name == "SFT then KTO":
        settings |= {"adapter.start": str(folder / f"SFT-{seed}")}
    words = [f"{key}={value}" for key, value in settings.items()]
    resolved = tunesmith.configure(model=options.model, data=[str(data)], sets=words)
    resume = out if (out / "manifest.json").exists() else None
    with console.sink(sys.stderr) as notify:
        run = tunesmith.train(
            None if resume else resolved, out=None if resume else out, resume=resume, notify=notify
        )
    assert run is not None
    return run


def measured(run: Run, held_out: Path) -> dict[str, Any]:
    """Held-out rows → r (nats) and whether good, and the perplexity of the good."""

    def recorded() -> dict[str, records.Record]:
        found, _ = records.read(run.path)
        return {record.task: record for record in found if record.variant.startswith(f"+{held_out.stem}-")}

    if "preference" not in recorded():
        with console.sink(sys.stderr) as notify:
            tunesmith.evaluate(
                run.path,
                data=[str(held_out)],
                checkpoint="last",
                tasks=("perplexity", "preference"),
                notify=notify,
            )
    done = recorded()
    rows = list(done["preference"].examples())
    loss = next(score for score in done["perplexity"].scores if score.name == "loss")
    return {
        "ratios": {row.source: row.tuned - row.base for row in rows if row.base is not None},
        "good": {row.source: row.tuned_detail["good"] for row in rows},
        "loss": loss.value,
        "base_loss": loss.base,
    }


def against(tuned: dict[str, Any], base: dict[str, Any]) -> dict[str, Any]:
    """The same with another base."""
    ratios = {source: ratio - base["ratios"][source] for source, ratio in tuned["ratios"].items()}
    return tuned | {"ratios": ratios, "base_loss": base["loss"]}


def summarised(found: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Accuracy and margin as means over seeds, with their 95 % intervals over rows and their least and
    largest seed."""
    sources = sorted(found[0]["ratios"])
    good = np.array([found[0]["good"][source] for source in sources])
    ratios = np.array([[seed["ratios"][source] for source in sources] for seed in found])  # (seeds, rows)
    up, down = ratios[:, good], ratios[:, ~good]
    wins = won(up[:, :, None] - down[:, None, :])
    chance = np.random.default_rng(0)
    draws = []
    for _ in range(RESAMPLES):
        here, there = (
            chance.integers(up.shape[1], size=up.shape[1]),
            chance.integers(down.shape[1], size=down.shape[1]),
        )
        draws.append((wins[:, here][:, :, there].mean(), up[:, here].mean() - down[:, there].mean()))
    edges = np.quantile(np.array(draws), [0.025, 0.975], axis=0)
    every = {"accuracy": wins.mean(axis=(1, 2)), "margin": up.mean(axis=1) - down.mean(axis=1)}
    return {
        name: {
            "mean": float(values.mean()),
            "low": float(edges[0, at]),
            "high": float(edges[1, at]),
            "seeds": [float(value) for value in values],
        }
        for at, (name, values) in enumerate(every.items())
    } | {
        "ratio_good": float(up.mean()),
        "ratio_bad": float(down.mean()),
        "loss_good": float(np.mean([seed["loss"] for seed in found])),
        "base_loss_good": found[0]["base_loss"],
    }


def table(result: dict[str, Any]) -> str:
    lines = [
        "| | accuracy | margin, nats | log-ratio of good | of bad | loss of good, nats a token |",
        "|---|---|---|---|---|---|",
        f"| before | 0.500 | 0 | 0 | 0 | {next(iter(result['arms'].values()))['base_loss_good']:.3f} |",
    ]
    for name, found in result["arms"].items():
        cells = [
            f"{value['mean']:.3f} ({value['low']:.3f} to {value['high']:.3f}; "
            f"seeds {min(value['seeds']):.3f} to {max(value['seeds']):.3f})"
            for value in (found["accuracy"], found["margin"])
        ]
        cells += [f"{found[key]:+.2f}" for key in ("ratio_good", "ratio_bad")] + [f"{found['loss_good']:.3f}"]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--model", default="demo/model/SmolLM2-135M-Instruct.Q4_1.gguf", help="folder or GGUF file"
    )
    parser.add_argument(
        "--data", default="../shared/data/syngen_toolset_v1.0.0_claude.jsonl", help="labelled rows"
    )
    parser.add_argument(
        "--work", type=Path, default=Path("runs/bench-preferences"), help="where the runs lie"
    )
    parser.add_argument("--rows", type=int, default=160, help="half of them good; a fifth is held out")
    parser.add_argument("--length", type=int, default=400, help="longest row, in tokens")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--arms", nargs="+", default=["SFT", "KTO", "SFT then KTO"])
    parser.add_argument("--epochs", type=float, default=2.0, help="of KTO")
    parser.add_argument("--rate", type=float, default=1e-4, help="learning rate of KTO")
    parser.add_argument("--sft-epochs", type=float, default=2.0)
    parser.add_argument("--sft-rate", type=float, default=2e-4)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--smoke", action="store_true", help=small.HELP)
    options = parser.parse_args()
    smaller = {"rows": 16, "length": 128, "seeds": 1, "epochs": 1.0, "sft_epochs": 1.0}
    with small.inputs(options, **smaller) as folder:
        options.work = folder if options.smoke else options.work
        result = compare(options)
    print(table(result))
    learned = "KTO" not in result["arms"] or result["arms"]["KTO"]["accuracy"]["low"] > 0.5
    if not (learned or options.smoke):
        print("FAILED  KTO's accuracy is not clear of chance", file=sys.stderr)
    return 0 if learned or options.smoke else 1


def compare(options: argparse.Namespace) -> dict[str, Any]:
    started = time.perf_counter()
    options.work.mkdir(parents=True, exist_ok=True)
    data, held_out, facts = subset(options, options.work)
    print(json.dumps(facts), file=sys.stderr)
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in options.arms}
    spent: dict[str, list[float]] = {name: [] for name in options.arms}
    for seed in range(options.seeds):
        for name in options.arms:
            print(
                f"== {name}, seed {seed}, after {console.duration(time.perf_counter() - started)}",
                file=sys.stderr,
                flush=True,
            )
            began = time.perf_counter()
            found[name].append(measured(arm(name, seed, options, data, options.work), held_out))
            spent[name].append(time.perf_counter() - began)
            partial = summarised(found[name])
            print(
                f"   accuracy {partial['accuracy']}, margin {partial['margin']}", file=sys.stderr, flush=True
            )
    if {
        "SFT",
        "SFT then KTO",
    } <= found.keys():  # what its second half alone did: KTO compared with the model after SFT
        found["SFT then KTO, against SFT"] = [
            against(*both) for both in zip(found["SFT then KTO"], found["SFT"], strict=True)
        ]
    result = {
        "benchmark": "preferences",
        "rows": facts,
        "seeds": options.seeds,
        "settings": {
            key: getattr(options, key) for key in ("length", "epochs", "rate", "sft_epochs", "sft_rate")
        }
        | COMMON,
        "arms": {name: summarised(parts) for name, parts in found.items()},
        "seconds": time.perf_counter() - started,
        "seconds_of_runs": spent,
    }
    return record.keep(result, options.out)


if __name__ == "__main__":
    sys.exit(main())
