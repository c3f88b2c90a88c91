"""``probe``: the learning rate, before a run is trained with it."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

import tunesmith
from tunesmith.cli.options import Accept, AsJson, Config, Data, Model, Preset, Set, print_json, progress, say

if TYPE_CHECKING:
    from tunesmith.sweeps.probe import RateFinding


def probe(
    config: Config = None,
    preset: Preset = None,
    model: Model = None,
    data: Data = None,
    sets: Set = None,
    accept: Accept = None,
    rates: Annotated[
        str | None,
        typer.Option(help="rates, separated by commas (default: up to seven around the settings')"),
    ] = None,
    updates: Annotated[
        int | None, typer.Option(min=1, help="updates of all rates together (default: a tenth of the run's)")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="the new folder (default: probes/<day>-<model>-…)")] = None,
    as_json: AsJson = False,
) -> None:
    """Find the learning rate: a few updates with each of several, compared on the same held-out rows."""
    resolved = tunesmith.configure(
        preset=preset,
        config=config or (),
        model=model,
        data=data or (),
        sets=sets or (),
        accept=accept or (),
        environ=os.environ,
    )
    with progress("; nothing was written") as notify:
        finding = tunesmith.probe(
            resolved, rates=_numbers(rates or ""), updates=updates, out=out, notify=notify
        )
    if as_json:
        print_json(finding.json())
        return
    say("\n".join(_lines(finding)))


def _numbers(text: str) -> list[float]:
    try:
        return [float(part) for part in text.split(",") if part.strip()]
    except ValueError:
        from tunesmith.errors import ConfigError

        message, hint = f'must be numbers, not "{text}"', "for example --rates 1e-5,1e-4"
        raise ConfigError(message, where="--rates", hint=hint) from None


def _lines(finding: RateFinding) -> list[str]:
    """A table of the rates, the result and what to do with it."""
    lines = ["     rate  updates  held-out loss  "]
    for trial in finding.trials:
        loss = f"{trial.held_out[-1][1]:.4f}" if trial.held_out else "–"
        mark = "→" if trial.rate == finding.rate else " "
        lines.append(f"{mark} {trial.rate:>7.2g}  {trial.updates:>7}  {loss:>13}  {trial.status}")
    share = finding.updates / finding.planned
    lines.append(f"before training {finding.before:.4f}; {finding.updates} updates, {share:.0%} of the run's")
    lines += [finding.sentence, *(f"note: {note}" for note in finding.notes)]
    lines.append(f"tunesmith train … --set optimizer.learning_rate={finding.rate:g}")
    lines.append(f"plot: {finding.folder}/probe.png")
    return lines
