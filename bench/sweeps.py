"""What do the ready-made sweeps say of a small model? Each on the demo's rows, with fewer updates and seeds.

    python bench/sweeps.py --model demo/model/SmolLM2-135M-Instruct.Q4_1.gguf --out bench/results/sweeps.json

A folder named with --folder keeps the trials: the same command then goes on after an interruption.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import record
import small
from rich.console import Console
from rich.table import Table

import tunesmith
from tunesmith.demo import data
from tunesmith.display import console
from tunesmith.settings import origins
from tunesmith.sweeps import spec
from tunesmith.sweeps.outcome import SweepOutcome

OWN_ROWS = "retention"
"""The sweep that needs rows of general text."""


def copied(name: str, options: argparse.Namespace, folder: Path) -> Path:
    """The ready-made sweep with the first of its seeds."""
    path = spec.ready()[name]
    content: dict[str, Any] = origins.plain(origins.read(path, str))
    content["seeds"] = content["seeds"][: options.seeds]
    if options.limit is not None and "evaluate" in content:
        content["evaluation"] = {"limit": options.limit}
    text = origins.write(content)
    if options.retention is not None:
        text = text.replace("retention.jsonl", str(options.retention.resolve()))
    copy = folder / f"{name}.yaml"
    copy.write_text(text, "utf-8")
    return copy


def swept(name: str, rows: Path, options: argparse.Namespace, folder: Path) -> SweepOutcome:
    sets = [
        f"loop.steps={options.steps}",
        f"loop.validate_every={max(1, options.steps // 2)}",
        "loop.samples=0",
        "loop.instrument_every=0",
        "batch.sequences=4",
        "batch.length=512",
        "template.too_long=drop",
        "data.max_dropped=1",
    ]
    if name not in ("lora-vs-full", "objective"):  # where rates are varied, or follow from the objective
        sets.append(f"optimizer.learning_rate={options.rate}")
    file = copied(name, options, folder)
    with console.sink(sys.stderr) as notify:
        report = tunesmith.sweep(
            file,
            out=folder / name,
            model=str(options.model),
            data=[str(rows)],
            sets=sets,
            parallel=options.parallel,
            notify=notify,
        )
    return report.outcome


def main() -> None:
    names = list(spec.ready())
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--model", help="model folder or GGUF file")
    parser.add_argument("--data", type=Path, help="rows (default: those of the demo)")
    parser.add_argument("--sweeps", nargs="+", choices=names, help="which (default: all)")
    parser.add_argument("--rows", type=int, default=240, help="rows of the demo")
    parser.add_argument("--retention", type=Path, help="rows of general text; without, retention is left out")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--limit", type=int, help="questions and requests of a task (default: all)")
    parser.add_argument("--rate", type=float, default=1e-3, help="learning rate, where it is not varied")
    parser.add_argument("--parallel", type=int, default=1)
    parser.add_argument("--folder", type=Path, help="keep the trials here")
    parser.add_argument("--out", type=Path, help="where the JSON goes")
    parser.add_argument("--smoke", action="store_true", help=small.HELP)
    options = parser.parse_args()
    with small.inputs(options, steps=4, seeds=2, sweeps=["seeds"]) as temporary:
        folder = options.folder or temporary
        folder.mkdir(parents=True, exist_ok=True)
        rows = options.data or data.write(folder / "tools.jsonl", options.rows, seed=0)
        usable = [name for name in names if options.retention or name != OWN_ROWS]
        outcomes = {name: swept(name, Path(rows), options, folder) for name in options.sweeps or usable}
    settings = {name: getattr(options, name) for name in ("steps", "seeds", "rate", "rows", "limit")}
    results = {name: outcome.to_json() for name, outcome in outcomes.items()}
    record.keep({"benchmark": "sweeps", "settings": settings, "sweeps": results}, options.out)
    table = Table("sweep", "settings", "verdict", title=f"{options.steps} updates, {options.seeds} seeds")
    for name, outcome in outcomes.items():
        table.add_row(name, str(len(outcome.settings)), outcome.verdict)
    Console(stderr=True).print(table)


if __name__ == "__main__":
    main()
