"""``evaluate``, ``compare`` and ``report``: what a run is worth; ``compose``: one run of several."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperCommand, TyperOption

import tunesmith
from tunesmith.cli.options import (
    AsJson,
    Checkpoint,
    Data,
    MovedModel,
    RunDirectory,
    print_json,
    progress,
    say,
)
from tunesmith.errors import ConfigError

if TYPE_CHECKING:
    from tunesmith.evaluation.evaluate import Evaluation

Files = list[str] | None
Task = Annotated[Files, typer.Option()]
Base = Annotated[bool, typer.Option(help="measure the base too, for the difference")]
Limit = Annotated[int | None, typer.Option(min=1)]
MaxTokens = Annotated[int, typer.Option(min=1)]
BatchSize = Annotated[int | None, typer.Option(min=1)]
BenchmarkData = Annotated[Path | None, typer.Option()]
Shots = Annotated[int, typer.Option(min=0)]
AllowCode = Annotated[bool, typer.Option("--allow-code")]
Fresh = Annotated[bool, typer.Option("--fresh", help="measure again instead of using cached scores")]


class EvaluateCommand(TyperCommand):
    """Takes the help of its options from the tasks and `EvaluationSpec`; only when it is shown, since they
    load MLX."""

    def format_help(self, ctx: Any, formatter: Any) -> None:  # their types are private to Typer
        from tunesmith.evaluation.tasks import option_help

        for option in self.params:
            if isinstance(option, TyperOption) and not option.help:
                option.help = option_help(option.name or "") + ("; repeatable" if option.multiple else "")
        super().format_help(ctx, formatter)


def evaluate(
    run: RunDirectory,
    data: Data = None,
    checkpoint: Checkpoint = "best",
    model: MovedModel = None,
    task: Task = None,
    base: Base = True,
    limit: Limit = None,
    max_tokens: MaxTokens = 256,
    batch_size: BatchSize = None,
    knowledge: Files = None,
    text: Files = None,
    chats: Files = None,
    safety: Files = None,
    benchmark: Files = None,
    benchmark_data: BenchmarkData = None,
    shots: Shots = 0,
    allow_code: AllowCode = False,
    embed: bool = True,
    fresh: Fresh = False,
    as_json: AsJson = False,
) -> None:
    """Measure base and tuned on held-out rows (or --data) and fixed suites: what improved, what got worse,
    how sure that is."""
    with progress("; what was measured is kept, and the same command goes on") as notify:
        result = tunesmith.evaluate(
            run,
            data=data or (),
            checkpoint=checkpoint,
            model=model,
            tasks=task or (),
            base=base,
            fresh=fresh,
            notify=notify,
            limit=limit,
            max_tokens=max_tokens,
            batch_size=batch_size,
            knowledge=tuple(knowledge or ()),
            text=tuple(text or ()),
            chats=tuple(chats or ()),
            safety=tuple(safety or ()),
            benchmarks=tuple(benchmark or ()),
            benchmark_data=None if benchmark_data is None else str(benchmark_data),
            shots=shots,
            allow_code=allow_code,
            embed=embed,
        )
    if result is not None:  # None on ranks but the first
        _print_evaluation(result, as_json)


def _print_evaluation(result: Evaluation, as_json: bool) -> None:
    from tunesmith import reports

    if as_json:
        print_json(result.summary() | reports.ship(reports.summarise(result.run.path)))
        return
    from rich.console import Console

    from tunesmith.reports import screen

    screen.render(result.scores, Console())
    say("\n".join(reports.verdict_lines(result.run.path)))
    say(f"report: {result.run.path / 'report.html'}")


def compare(
    runs: Annotated[
        list[Path], typer.Argument(help="run directories; the others are compared with the first")
    ],
    out: Annotated[Path, typer.Option(help="folder for compare.html, compare.md and compare.json")] = Path(
        "comparison"
    ),
    against: Annotated[Path | None, typer.Option(help="compare the others with this run instead")] = None,
    as_json: AsJson = False,
) -> None:
    """Compare runs: settings that differ, curves, and paired differences on the same prompts."""
    with progress() as notify:
        comparison = tunesmith.compare(runs, out=out, against=against, notify=notify)
    if as_json:
        print_json(comparison.to_json())
    else:
        say("\n".join(comparison.lines))
        say(f"page: {out / 'compare.html'}")


def compose(
    sources: Annotated[
        list[str],
        typer.Argument(metavar="RUN=WEIGHT", help="runs with their weights; a negative weight subtracts"),
    ],
    out: Annotated[Path, typer.Option(help="the new run directory")],
    method: Annotated[str, typer.Option(help="linear, svd, ties or dare")] = "linear",
    rank: Annotated[
        int | None,
        typer.Option(min=1, help="rank of the result (default: linear the sum, others the largest)"),
    ] = None,
    density: Annotated[
        float | None, typer.Option(help="share of entries that ties (default 0.2) and dare (0.5) use")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="decides which entries dare uses")] = 0,
    evaluate: Annotated[
        bool, typer.Option("--evaluate", help="measure each source's held-out rows alone and in the mixture")
    ] = False,
    limit: Annotated[int | None, typer.Option(min=1, help="only the first held-out rows of each")] = None,
    max_tokens: Annotated[int, typer.Option(min=1, help="longest answer")] = 256,
    model: MovedModel = None,
    as_json: AsJson = False,
) -> None:
    """Combine the adapters of runs into a new run: added, subtracted, and factored again."""
    weights = dict(map(_weighted, sources))
    if len(weights) < len(sources):
        raise ConfigError("a run is named twice", where="compose", hint="add up its weights")
    with progress() as notify:
        made = tunesmith.compose(
            weights,
            out=out,
            method=method,
            rank=rank,
            density=density,
            seed=seed,
            evaluate=evaluate,
            limit=limit,
            max_tokens=max_tokens,
            model=model,
            notify=notify,
        )
    if as_json:
        print_json(made.to_json())
    else:
        say("\n".join([*made.lines, f"run: {out}"]))


def _weighted(source: str) -> tuple[str, float]:
    """``RUN=WEIGHT``; a run alone has the weight 1."""
    run, sign, weight = source.rpartition("=")
    if not sign:
        return source, 1.0
    try:
        value = float(weight)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        hint = "for example runs/a=0.7 runs/b=-0.3"
        raise ConfigError(f"{weight!r} is not a weight", where=source, hint=hint)
    return run, value


def report(run: RunDirectory, as_json: AsJson = False) -> None:
    """Write the report of a run again."""
    from tunesmith import reports
    from tunesmith.display.console import readable

    page = tunesmith.report(run).with_suffix(".html")
    summary = reports.summarise(page.parent)
    for notice in summary.facts.unread:
        typer.echo(readable(notice), err=True)
    if as_json:
        print_json(reports.to_json(summary))
        return
    say("\n".join(summary.lines))
    say(f"report: {page}")
