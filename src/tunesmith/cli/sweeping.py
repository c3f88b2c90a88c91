"""``sweep``: many runs from one file, and one comparison."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

import tunesmith
from tunesmith.cli.options import AsJson, Config, Data, Model, Preset, Set, print_json, progress, say

File = Annotated[str, typer.Argument(help="YAML file, or a ready-made sweep: rank, lora-vs-full, seeds, …")]


def sweep(
    file: File,
    config: Config = None,
    preset: Preset = None,
    model: Model = None,
    data: Data = None,
    sets: Set = None,
    out: Annotated[Path | None, typer.Option(help="folder of the sweep (default: runs/NAME)")] = None,
    parallel: Annotated[
        int | None, typer.Option(min=1, help="processes at a time, if memory allows (default: the file's)")
    ] = None,
    optuna: Annotated[
        int | None, typer.Option(min=1, help="search the file's space with so many settings, by Optuna")
    ] = None,
    part: Annotated[
        str | None, typer.Option(help="train a part of the trials, such as 1/2: for several machines")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="list the trials, train nothing")] = False,
    as_json: AsJson = False,
) -> None:
    """Train the trials of a file and compare them; the same command goes on after an interruption."""
    if dry_run:
        if optuna is not None:
            from tunesmith.errors import ConfigError

            hint = "what is tried next depends on all that was tried"
            raise ConfigError("the trials of a search cannot be listed", where="--dry-run", hint=hint)
        _list(file, config, preset, model, data, sets, part, as_json)
        return
    with progress("; finished trials are kept, and the same command goes on") as notify:
        report = tunesmith.sweep(
            file,
            config=config or (),
            preset=preset,
            model=model,
            data=data or (),
            sets=sets or (),
            out=out,
            parallel=parallel,
            optuna=optuna,
            part=part,
            notify=notify,
        )
    if as_json:
        print_json(report.outcome.to_json())
        return
    from rich.console import Console

    from tunesmith.sweeps import screen

    screen.render(report.outcome, Console())
    say("\n".join(report.lines))
    say(f"page: {report.page}")


def _list(
    file: str,
    config: list[Path] | None,
    preset: str | None,
    model: str | None,
    data: list[str] | None,
    sets: list[str] | None,
    part: str | None,
    as_json: bool,
) -> None:
    """The trials, or a part of them, with the command of each."""
    from tunesmith.sweeps import trials, verb

    asked = verb.request(
        file, config=config or (), preset=preset, model=model, data=data or (), sets=sets or ()
    )
    verb.require_trials(asked)
    mine = asked.plan.part(*verb.parse_part(part))
    commands = {trial.name: trials.command(trial) for trial in mine}
    if as_json:
        print_json(commands)
        return
    from tunesmith.sweeps import screen

    say("\n".join(screen.planned(commands)))
