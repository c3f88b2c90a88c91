"""``runs``, ``tag`` and ``push``: which runs there are, what they are called, and where they go."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

import tunesmith
from tunesmith.cli.options import AsJson, RunDirectory, print_json, progress, say

app = typer.Typer(name="runs", help="List the runs under a folder; their lineage; what can be pruned.")
Folder = Annotated[Path, typer.Option("--folder", help="folder of the runs")]


@app.callback(invoke_without_command=True)
def runs(
    context: typer.Context,
    folder: Folder = Path("runs"),
    sort: Annotated[
        str, typer.Option(help="created, name, model, objective, best, verdict, state or size")
    ] = "created",
    reverse: Annotated[bool, typer.Option("--reverse", help="the other way round")] = False,
    where: Annotated[
        list[str] | None,
        typer.Option(
            help="only runs of which this holds, as objective=kto, best<0.5, tag=mytool; repeatable"
        ),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """List the runs under a folder: model, data, objective, best value, verdict, state, tags and size."""
    if context.invoked_subcommand is not None:
        return
    listed = tunesmith.list_runs(folder, sort=sort, reverse=reverse, where=where or ())
    if as_json:
        print_json([run.to_json() for run in listed])
        return
    from tunesmith.runs import screen

    screen.render(listed, folder, screen.console())


@app.command()
def show(
    run: RunDirectory,
    folder: Annotated[
        Path | None,
        typer.Option("--folder", help="where to look for runs that use it (default: the current folder)"),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Show what a run was made from and what was made from it, as a tree."""
    ancestry = tunesmith.lineage(run, folder)
    if as_json:
        print_json(ancestry.to_json())
        return
    from tunesmith.runs import screen

    screen.render_lineage(ancestry, screen.console())


@app.command()
def prune(
    folder: Folder = Path("runs"),
    delete: Annotated[bool, typer.Option("--delete", help="delete what is listed")] = False,
    only: Annotated[
        list[str] | None, typer.Option(help="checkpoint, run or cache; repeatable (default: all)")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """List what can go: checkpoints but best and last, runs that failed or were done again, caches. Never
    what has a tag, is being trained, or is used by another run. Exit status 3 if something could not be
    deleted."""
    pruning = tunesmith.prune(folder, delete=delete, only=only or ())
    if as_json:
        print_json(pruning.to_json())
    else:
        from tunesmith.runs import screen

        screen.render_pruning(pruning, screen.console())
    if pruning.refused:
        raise typer.Exit(3)


def tag(
    run: RunDirectory,
    name: Annotated[
        str | None, typer.Argument(help="name and version, as mytool:2; without it, the tags are printed")
    ] = None,
    move: Annotated[bool, typer.Option("--move", help="take the tag from the run that has it")] = False,
    remove: Annotated[bool, typer.Option("--remove", help="take the tag from this run")] = False,
    as_json: AsJson = False,
) -> None:
    """Name a run, as mytool:2; every verb takes the tag instead of the folder."""
    tags = tunesmith.tag(run, name, move=move, remove=remove)
    if as_json:
        print_json(tags)
    else:
        say("\n".join(tags) or "no tags")


def push(
    run: RunDirectory,
    to: Annotated[str, typer.Option(help="repository of the hub, as you/name")],
    kind: Annotated[str, typer.Option(help="which export of the run: peft, hf, mlx, gguf-q8_0, …")] = "peft",
    public: Annotated[bool, typer.Option("--public", help="a new repository is for everyone")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="list what would be pushed")] = False,
    as_json: AsJson = False,
) -> None:
    """Push an export with its model card to a Hugging Face hub; a new repository is private."""
    with progress() as notify:
        pushed = tunesmith.push(run, to=to, kind=kind, private=not public, dry_run=dry_run, notify=notify)
    if as_json:
        print_json(pushed.to_json())
        return
    from tunesmith.display.console import size

    for file in pushed.files:
        say(f"{file['bytes']:>15,} bytes  {file['path']}")
    total = f"{len(pushed.files)} files, {size(pushed.size_bytes)}"
    if pushed.why_not is None:
        say(f"pushed {total}: {pushed.url}")
    else:
        access = "private" if pushed.private else "public"
        say(
            f"nothing was pushed ({pushed.why_not}): {total} would go to {to}, which is {access} if it is new"
        )
