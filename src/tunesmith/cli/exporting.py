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
    as_json: AsJson = False,
) -> None:
    """Write the tuned model for other programs, reload it, and compare it with the live adapter."""
    with progress() as notify:
        exported = tunesmith.export(
            run, to=to, out=out, rows=rows, checkpoint=checkpoint, model=model, notify=notify
        )
    if as_json:
        print_json(exported.to_json())
    else:
        say("\n".join([*exported.lines, f"exported: {exported.path}"]))
