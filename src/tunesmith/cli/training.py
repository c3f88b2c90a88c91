"""``train`` and ``watch``: a run, from its settings to its last update."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

import tunesmith
from tunesmith.cli.options import (
    Accept,
    AsJson,
    Config,
    Data,
    Model,
    Preset,
    RunDirectory,
    Set,
    print_json,
    progress,
    say,
)

if TYPE_CHECKING:
    from tunesmith.runs.config import RunConfig
    from tunesmith.runs.directory import Run
    from tunesmith.settings.config import Resolved


def train(
    config: Config = None,
    preset: Preset = None,
    model: Model = None,
    data: Data = None,
    sets: Set = None,
    accept: Accept = None,
    out: Annotated[
        Path | None, typer.Option(help="the new run directory (default: runs/<day>-<model>-…)")
    ] = None,
    resume: Annotated[Path | None, typer.Option(help="resume this run")] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="check everything and count, train nothing")
    ] = False,
    anyway: Annotated[
        bool, typer.Option("--anyway", help="train also if the plan says that memory is too small")
    ] = False,
    explain: Annotated[bool, typer.Option("--explain", help="print every setting with its origin")] = False,
    as_json: AsJson = False,
) -> None:
    """Fine-tune, or resume an interrupted run; exit status 130 if it is interrupted."""
    if resume is not None:
        _refuse_beside_resume(
            bool(config or preset or model or data or accept or out or dry_run or anyway or explain)
        )
        with progress() as notify:
            run = tunesmith.train(resume=resume, sets=sets or (), notify=notify)
        _print_run(run, as_json)
        return
    resolved = tunesmith.configure(
        preset=preset,
        config=config or (),
        model=model,
        data=data or (),
        sets=sets or (),
        accept=accept or (),
        environ=os.environ,
    )
    if explain:
        from tunesmith.settings.config import explain as lines

        say("\n".join(lines(resolved)), err=not dry_run or as_json)
    if dry_run:
        _rehearse(resolved, out, as_json)
        return
    with progress() as notify:
        run = tunesmith.train(resolved, out=out, anyway=anyway, notify=notify)
    _print_run(run, as_json)


def _refuse_beside_resume(given: bool) -> None:
    if given:
        from tunesmith.errors import ConfigError

        raise ConfigError("--resume takes its settings from the run", hint="only --set may be given with it")


def _rehearse(resolved: Resolved[RunConfig], out: Path | None, as_json: bool) -> None:
    if out is not None:
        from tunesmith.runs.directory import require_free

        require_free(out)
    with progress() as notify:
        planned = tunesmith.rehearse(resolved, notify=notify)
    if as_json:
        print_json(planned.to_json())
        return
    say("\n".join(planned.lines()))
    say("nothing was trained: the same command without --dry-run trains")


def _print_run(run: Run | None, as_json: bool) -> None:
    """Print the verdict. On all ranks but the first the run is None, and nothing is printed."""
    if run is None:
        return
    from tunesmith import reports

    if as_json:
        print_json(reports.to_json(reports.summarise(run.path)))
    else:
        say("\n".join(reports.verdict_lines(run.path)))
        say(f"report: {run.path / 'report.html'}")
    if run.status == "interrupted":
        say(f"interrupted; go on with: {run.hint}", err=True)
        raise typer.Exit(130)


def watch(
    run: RunDirectory,
    once: Annotated[bool, typer.Option("--once", help="print the curves as they are now")] = False,
) -> None:
    """Show the curves of a run in the terminal, while it trains or after."""
    tunesmith.watch(run, once=once)
