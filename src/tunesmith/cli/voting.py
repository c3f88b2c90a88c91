"""``votes``: what users prefer, and the rows that can be learned from it."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

import tunesmith
from tunesmith.cli.options import AsJson, print_json, say


class RowObjective(StrEnum):
    kto = "kto"
    dpo = "dpo"


def votes(
    file: Annotated[Path, typer.Argument(help="a run that was served, or the file of votes")],
    to: Annotated[
        Path | None, typer.Option("--to", help="write the votes as rows that `tunesmith train` takes")
    ] = None,
    objective: Annotated[
        RowObjective | None,
        typer.Option(help="of the rows (default: dpo if all votes compare two answers, else kto)"),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Show which model users prefer, with an interval and a test that may be looked at at any time."""
    summary = tunesmith.votes(file, to=to, objective=None if objective is None else objective.value)
    if as_json:
        print_json(summary.to_json())
        return
    from tunesmith.serving import tally

    say("\n".join(tally.lines(summary)))
