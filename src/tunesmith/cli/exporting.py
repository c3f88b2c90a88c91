"""``export``: the tuned model for other programs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

import tunesmith
from tunesmith.cli.options import AsJson, Checkpoint, MovedModel, RunDirectory, print_json, progress, say


def export(
    run: RunDirectory,
    to: Annotated[str, typer.Option(help="kind of artefact; a name that does not exist lists them")],
    out: Annotated[
        Path | None, typer.Option(help="folder of the artefact (default: exports/<kind> in the run)")
    ] = None,
    rows: Annotated[int, typer.Option(min=1, help="held-out rows that it is measured on")] = 64,
    checkpoint: Checkpoint = "best",
    model: MovedModel = None,
    evaluate: Annotated[
        bool, typer.Option("--evaluate", help="also ask it and the live adapter the tasks of the run")
    ] = False,
    task: Annotated[
        list[str] | None, typer.Option(help="with --evaluate: tasks to ask instead; repeatable")
    ] = None,
    limit: Annotated[
        int | None, typer.Option(min=1, help="with --evaluate: only the first rows and items")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Write the tuned model for other programs, reload it, and compare it with the live adapter."""
    with progress() as notify:
        exported = tunesmith.export(
            run,
            to=to,
            out=out,
            rows=rows,
            checkpoint=checkpoint,
            model=model,
            evaluate=evaluate,
            tasks=task or (),
            limit=limit,
            notify=notify,
        )
    if as_json:
        print_json(exported.to_json())
    else:
        from tunesmith.exports import screen

        say("\n".join([*screen.lines(exported), f"exported: {exported.path}"]))
