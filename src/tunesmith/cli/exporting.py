"""``export``: the tuned model for other programs."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

import tunesmith
from tunesmith.cli.options import AsJson, Checkpoint, MovedModel, RunDirectory, print_json, progress, say
from tunesmith.errors import ConfigError, ExportError

if TYPE_CHECKING:
    from tunesmith.exports.table import ExportTable


Kind = Annotated[str | None, typer.Option(help="kind of artefact; a name that does not exist lists them")]
Kinds = Annotated[
    str | None, typer.Option(help="kinds to export and compare instead, as mlx:16,mlx:8,mlx:4,gguf:q8_0")
]
Target = Annotated[
    Path | None,
    typer.Option(help="folder of the artefact, or of the table (default: exports/<kind> in the run)"),
]
Rows = Annotated[int, typer.Option(min=1, help="held-out rows that it is measured on")]
Evaluate = Annotated[
    bool, typer.Option("--evaluate", help="also ask it and the live adapter the tasks of the run")
]
Tasks = Annotated[
    list[str] | None, typer.Option(help="ask it and the live adapter these tasks instead; repeatable")
]
Limit = Annotated[
    int | None, typer.Option(min=1, help="with --evaluate or --task: only the first rows and items")
]
Keep = Annotated[
    bool, typer.Option("--keep/--discard", help="with --table: keep the artefacts once they are measured")
]


def export(
    run: RunDirectory,
    to: Kind = None,
    table: Kinds = None,
    out: Target = None,
    rows: Rows = 64,
    checkpoint: Checkpoint = "best",
    model: MovedModel = None,
    evaluate: Evaluate = False,
    task: Tasks = None,
    limit: Limit = None,
    keep: Keep = True,
    as_json: AsJson = False,
) -> None:
    """Write the tuned model for other programs, reload it, and compare it with the live adapter."""
    if (to is None) == (table is None):
        message = "name one kind, or a table of kinds, and not both"
        raise ConfigError(message, where="--to", hint="--to hf, or --table mlx:16,mlx:8,gguf:q8_0")
    if to is not None and not keep:
        raise ConfigError(
            "only a table discards its artefacts", where="--discard", hint="--table instead of --to"
        )
    with progress() as notify:
        if table is not None:
            from tunesmith.exports.table import export_table

            made = export_table(
                run,
                [name.strip() for name in table.split(",") if name.strip()],
                out=out,
                keep=keep,
                rows=rows,
                checkpoint=checkpoint,
                model=model,
                evaluate=evaluate,
                tasks=task or (),
                limit=limit,
                notify=notify,
            )
            _print_table(made, as_json)
            return
        assert to is not None
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


def _print_table(table: ExportTable, as_json: bool) -> None:
    from tunesmith.exports.table import PICTURE

    if as_json:
        print_json(table.to_json())
    else:
        say("\n".join([*table.lines, f"picture: {table.folder / PICTURE}"]))
    if not table.accepted:
        raise typer.Exit(ExportError.exit_code)
