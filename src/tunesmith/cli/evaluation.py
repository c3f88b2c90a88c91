"""``evaluate``, ``compare`` and ``report``: what a run is worth."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

import tunesmith
from tunesmith.cli.options import AsJson, Checkpoint, Data, MovedModel, RunDirectory, print_json, progress

if TYPE_CHECKING:
    from tunesmith.evaluation.evaluate import Evaluation

Files = list[str] | None
Task = Annotated[
    Files,
    typer.Option(
        help="perplexity, adherence, tool_calls, preference, drift, efficiency (default: all these), "
        "benchmarks"
    ),
]
Base = Annotated[bool, typer.Option(help="measure the base too, for the difference")]
Limit = Annotated[int | None, typer.Option(min=1, help="only the first rows, and items of each suite")]
MaxTokens = Annotated[int, typer.Option(min=1, help="longest answer to a row")]
BatchSize = Annotated[int | None, typer.Option(min=1, help="answers at once (default: 32 on a CPU, else 16)")]
Knowledge = Annotated[
    Files, typer.Option(help="file of choices for drift.knowledge, not our own; repeatable")
]
Text = Annotated[Files, typer.Option(help="file of general text for drift.text, not our own; repeatable")]
Chats = Annotated[Files, typer.Option(help="file of plain chats for drift.chat, not our own; repeatable")]
Safety = Annotated[Files, typer.Option(help="file of requests for drift.safety, not our own; repeatable")]
Benchmark = Annotated[Files, typer.Option(help="mmlu, hellaswag, gsm8k, …, mmlu:astronomy; repeatable")]
BenchmarkData = Annotated[
    Path | None, typer.Option(help="folder with the benchmarks' files (default: the hub)")
]
Shots = Annotated[int, typer.Option(min=0, help="solved examples before each question of a benchmark")]
AllowCode = Annotated[bool, typer.Option("--allow-code", help="run code that the model writes, sandboxed")]
Embed = Annotated[bool, typer.Option(help="also compare meanings of answers by embeddings")]
Fresh = Annotated[bool, typer.Option("--fresh", help="measure again what is known from before")]


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
    knowledge: Knowledge = None,
    text: Text = None,
    chats: Chats = None,
    safety: Safety = None,
    benchmark: Benchmark = None,
    benchmark_data: BenchmarkData = None,
    shots: Shots = 0,
    allow_code: AllowCode = False,
    embed: Embed = True,
    fresh: Fresh = False,
    as_json: AsJson = False,
) -> None:
    """Score base and tuned on the held-out rows (or --data) and the suites: what improved, what was lost, how
    sure it is."""
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
    if as_json:
        print_json(result.summary())
        return
    from rich.console import Console

    from tunesmith import reports
    from tunesmith.reports import screen

    screen.render(result.scores, Console())
    typer.echo(reports.verdict_line(result.run.path))
    typer.echo(f"report: {result.run.path / 'report.html'}")


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
        typer.echo(comparison.verdict)
        typer.echo(f"page: {out / 'compare.html'}")


def report(run: RunDirectory) -> None:
    """Write the report of a run again."""
    from tunesmith import reports

    page = tunesmith.report(run).with_suffix(".html")
    summary = reports.summarise(run)
    for message in summary["unread"]:
        typer.echo(message, err=True)
    typer.echo(summary["verdict"])
    typer.echo(f"report: {page}")
