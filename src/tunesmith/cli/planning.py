"""``plan``: what a run would need, and how far earlier forecasts were off."""

from __future__ import annotations

import os
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

import tunesmith
from tunesmith.cli.options import Accept, AsJson, Config, Data, Model, Preset, Set, print_json, progress, say

if TYPE_CHECKING:
    from tunesmith.preflight.fitting import Proposal


def plan(
    config: Config = None,
    preset: Preset = None,
    model: Model = None,
    data: Data = None,
    sets: Set = None,
    accept: Accept = None,
    measure: Annotated[
        bool, typer.Option("--measure", help="load the model and make two updates that correct the estimate")
    ] = False,
    fit: Annotated[
        str | None, typer.Option(help="propose changes until the process needs at most this memory: 16GB")
    ] = None,
    fit_time: Annotated[
        str | None, typer.Option(help="propose changes with which the run takes at most this time: 8h")
    ] = None,
    record: Annotated[
        bool, typer.Option("--record", help="instead: how far the forecasts of finished runs were off")
    ] = False,
    folder: Annotated[
        Path | None, typer.Option("--folder", help="folder of the runs, for --record (default: runs)")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Estimate memory, disk and time of a run, with intervals, before anything is spent."""
    words = {"--config": config, "--preset": preset, "--model": model, "--data": data, "--set": sets}
    words |= {"--accept": accept}
    if record:
        flags = {"--measure": measure, "--fit": fit, "--fit-time": fit_time}
        given = [name for name, value in (words | flags).items() if value]
        _record(folder or Path("runs"), given, as_json)
        return
    if folder is not None:
        from tunesmith.errors import ConfigError

        raise ConfigError("is for --record", where="--folder", hint="add --record, or leave it out")
    resolved = tunesmith.configure(
        preset=preset,
        config=config or (),
        model=model,
        data=data or (),
        sets=sets or (),
        accept=accept or (),
        environ=os.environ,
    )
    with progress() as notify:
        planned = tunesmith.plan(resolved, measure=measure, fit=fit, fit_time=fit_time, notify=notify)
    if as_json:
        print_json(planned.to_json())
        return
    say("\n".join(planned.lines()))
    if planned.proposal is not None:
        say("\n".join(_proposed(planned.proposal, words)))


def _record(folder: Path, given: list[str], as_json: bool) -> None:
    if given:
        from tunesmith.errors import ConfigError

        message = f"reads finished runs, and takes no {given[0]}"
        raise ConfigError(message, where="--record", hint="--folder says where the runs are")
    with progress() as notify:
        errors = tunesmith.track_record(folder, notify=notify)
    if as_json:
        print_json(errors.to_json())
    else:
        say("\n".join(errors.lines()))


def _proposed(proposal: Proposal, given: dict[str, object]) -> list[str]:
    """The changes, what the run needs with them, and the command."""
    from tunesmith.training.forecast import lines

    if not proposal.sets:
        return ["", "it fits as it is" if proposal.met else "no change of settings helps"]
    verdict = "with these changes it fits"
    if not proposal.met:
        verdict = f"no changes meet {proposal.limits.text()}; these come nearest"
    command = ["tunesmith", "train"]
    for name, value in given.items():
        values = value if isinstance(value, list) else [] if value is None else [value]
        command += [word for item in values for word in (name, str(item))]
    for text in proposal.sets:
        command += ["--set", text]
    return ["", f"{verdict}:", *lines(proposal.forecast), f"  {shlex.join(command)}"]
