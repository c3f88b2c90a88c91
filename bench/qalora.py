"""What is left of an adapter on a 4-bit base when it is merged at 4 bits? LoRA, which has to be quantised
again, beside QA-LoRA, which goes into the biases of the quantisation.

Both are trained alike on the same rows over the same quantised base; beside them stands LoRA over the base as
it is, merged and then quantised. The held-out loss is that of the base, of the live adapter, and of the
exported 4-bit model as it is read back from disk.

    python bench/qalora.py --model demo/model/SmolLM2-135M-Instruct.Q4_1.gguf --out bench/results/qalora.json
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import record
import small
from rich.console import Console
from rich.table import Table

import tunesmith
from tunesmith import adapters, events
from tunesmith.demo import data
from tunesmith.display import console
from tunesmith.errors import ExportError
from tunesmith.evaluation import evaluate, tasks
from tunesmith.evaluation.subject import Subject
from tunesmith.evaluation.tasks import EvaluationSpec, Task
from tunesmith.model import loading
from tunesmith.model.loading import ModelSpec
from tunesmith.runs import opening
from tunesmith.runs.directory import Run
from tunesmith.runs.records import ExampleScore, Score
from tunesmith.tokens.template import Renderer

if TYPE_CHECKING:  # tunesmith chooses the BLAS before MLX is loaded
    import mlx.nn as nn

SIDES = {"lora": ("lora", 4), "qalora": ("qalora", 4), "lora-16": ("lora", None)}
"""Kind of the adapter, and bits of its base."""


def trained(kind: str, bits: int | None, rows: Path, options: argparse.Namespace, out: Path) -> Run:
    """A run of ``kind`` over the base at ``bits``."""
    sets = [
        f"adapter.kind={kind}",
        "adapter.targets=all-linear",
        f"adapter.rank={options.rank}",
        f"adapter.alpha={2 * options.rank}",
        f"model.quantize={bits or 'null'}",
        f"model.group_size={options.group}",
        f"loop.steps={options.steps}",
        f"optimizer.learning_rate={options.rate}",
        "optimizer.warmup_steps=5",
        "batch.sequences=4",
        "batch.length=512",
        "template.too_long=drop",
        "data.valid=0.2",
        "data.max_dropped=1",
        "loop.samples=0",
        "loop.validate_every=0",
    ]
    settings = tunesmith.configure(model=str(options.model), data=[str(rows)], sets=sets)
    with console.sink(sys.stderr) as notify:
        run = tunesmith.train(settings, out=out, notify=notify)
    assert run is not None
    return run


def task_of(run: Run, net: nn.Module, renderer: Renderer, limit: int | None) -> Task:
    """The loss on the run's held-out rows."""
    group, spec = tasks.groups()["perplexity"], EvaluationSpec()
    rows = evaluate.rows_of(run, (), [group], limit, events.silent)
    return group.build(evaluate.material_of(run, rows, net, renderer, spec, events.silent))[0]


def measured(task: Task, net: nn.Module, renderer: Renderer) -> list[ExampleScore]:
    return task.score(task.measure(Subject(net, renderer, "tuned")))


def exported(run: Run, rows: int) -> tuple[Path, str]:
    """The 4-bit artefact, and why the gate rejected it (empty: it did not)."""
    try:
        return tunesmith.export(run.path, to="mlx-4bit", rows=rows, checkpoint="last").path, ""
    except ExportError as error:
        return Path(str(error.where)), " ".join(error.what.split())


def loss(task: Task, before: list[ExampleScore], after: list[ExampleScore]) -> dict[str, Any]:
    """The mean loss, and its difference from ``before``."""
    scores: list[Score] = task.summarise(before, after, 0)
    score = next(score for score in scores if score.name == "loss" and score.part is None)
    return {
        "loss": score.value,
        "change": score.delta,
        "low": score.delta_low,
        "high": score.delta_high,
        "rows": score.n,
    }


def side(name: str, rows: Path, options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Base, live and exported, for one side."""
    run = trained(*SIDES[name], rows, options, folder / name)
    opened = opening.find(run.path, "last").open()
    net, renderer = opened.loaded.net, opened.renderer
    task = task_of(run, net, renderer, options.limit)
    base = measured(task, net, renderer)
    opened.attach()
    live = measured(task, net, renderer)
    path, rejected = exported(run, options.gate)
    artefact = loading.load(ModelSpec(path=str(path))).net
    merged = measured(task, artefact, renderer)
    return {
        "side": name,
        "trained": sum(value.size for value in adapters.trainable(net).values()),
        "base": loss(task, base, base)["loss"],
        "live": loss(task, base, live),
        "merged": loss(task, live, merged),
        "bytes": (path / "model.safetensors").stat().st_size,
        "rejected": rejected,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--model", help="model folder or GGUF file")
    parser.add_argument("--data", type=Path, help="rows (default: those of the demo)")
    parser.add_argument("--sides", nargs="+", default=list(SIDES), choices=SIDES)
    parser.add_argument("--rows", type=int, default=240, help="rows of the demo")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--rate", type=float, default=1e-3, help="learning rate")
    parser.add_argument(
        "--group", type=int, default=64, choices=(32, 64, 128), help="weights that share a scale"
    )
    parser.add_argument("--limit", type=int, help="only the first held-out rows")
    parser.add_argument("--gate", type=int, default=8, help="rows that the export is measured on")
    parser.add_argument("--out", type=Path, help="where the JSON goes")
    parser.add_argument("--smoke", action="store_true", help=small.HELP)
    options = parser.parse_args()
    with small.inputs(options, steps=2, rank=2, rows=12, group=32, gate=2) as folder:
        rows = options.data or data.write(folder / "tools.jsonl", options.rows, seed=0)
        sides = [side(name, rows, options, folder) for name in options.sides]
    names = ("steps", "rank", "rate", "group")
    settings = {name: getattr(options, name) for name in names}
    record.keep({"benchmark": "qalora", "settings": settings, "sides": sides}, options.out)
    table = Table(title=f"held-out loss ({sides[0]['live']['rows']} rows)")
    for column in ("adapter", "base", "live", "merged at 4 bits", "lost by merging (95 %)", "MB"):
        table.add_column(column)
    for row in sides:
        merged = row["merged"]
        ends = "" if merged["low"] is None else f" ({merged['low']:+.4f} to {merged['high']:+.4f})"
        table.add_row(
            row["side"],
            f"{row['base']:.4f}",
            f"{row['live']['loss']:.4f}",
            f"{merged['loss']:.4f}",
            f"{merged['change']:+.4f}{ends}",
            f"{row['bytes'] / 1e6:.1f}",
        )
    Console(stderr=True).print(table)


if __name__ == "__main__":
    main()
