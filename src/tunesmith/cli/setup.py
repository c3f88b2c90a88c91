"""``init`` and ``doctor``: before the first run."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

import tunesmith
from tunesmith import files
from tunesmith.cli.options import AsJson, Data, Model, Preset, print_json, progress, say
from tunesmith.errors import ConfigError


def init(
    preset: Preset = None,
    model: Model = None,
    data: Data = None,
    presets: Annotated[bool, typer.Option("--presets", help="list the presets instead")] = False,
    schema: Annotated[
        bool, typer.Option("--schema", help="print the JSON schema of the settings, for editors")
    ] = False,
    source: Annotated[
        Path | None,
        typer.Option(
            "--from",
            help="translate a file of settings of mlx-lm, axolotl, LLaMA-Factory, TRL or Toolset-Training",
        ),
    ] = None,
    source_format: Annotated[
        str | None, typer.Option("--from-format", help="whose file it is, if it is not recognised")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Print an annotated configuration; `tunesmith init > run.yaml`."""
    from tunesmith.settings import config

    if presets:
        lines = {
            name: path.read_text(encoding="utf-8").splitlines()[0].lstrip("# ")
            for name, path in sorted(config.presets().items())
        }
        if as_json:
            print_json(lines)
        else:
            say("\n".join(f"{name}\t{line}" for name, line in lines.items()))
    elif source is not None:
        _translate(source, source_format, preset, model, data, as_json)
    elif schema:
        from tunesmith.machine import backend

        backend.setup()
        from tunesmith.runs.config import RunConfig

        print_json(config.schema(RunConfig))
    else:
        text = tunesmith.init(preset=preset, model=model, data=data or (), source_format=source_format)
        if as_json:
            print_json({"yaml": text})
        else:
            typer.echo(text, nl=False)


def _translate(
    source: Path,
    source_format: str | None,
    preset: str | None,
    model: str | None,
    data: list[str] | None,
    as_json: bool,
) -> None:
    """Print the settings of another program's file as ours, and on stderr what became of its keys."""
    from tunesmith.machine import backend

    backend.setup()
    from tunesmith.runs.configure import translated

    translation = translated(source, source_format=source_format, preset=preset, model=model, data=data or ())
    if as_json:
        print_json(translation.json())
    else:
        say(translation.yaml.removesuffix("\n"))
        say(translation.summary, err=True)


def doctor(
    path: Annotated[Path, typer.Argument(help="where runs will be written")] = Path("."),
    model: Annotated[
        str | None, typer.Option(help="also load this model, and tell which kernels compute it")
    ] = None,
    plan: Annotated[
        str | None, typer.Option(help="also tell which settings of this model fit; its weights are not read")
    ] = None,
    overfit: Annotated[bool, typer.Option(help="train a tiny model for ten steps")] = True,
    full: Annotated[
        bool,
        typer.Option("--full", help="also compare its numbers with torch, TRL and float64, and measure it"),
    ] = False,
    out: Annotated[
        Path | None, typer.Option(help="with --full: JSON file to send, without private names")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Check this machine: versions, device, memory, disk, BLAS, kernels, and a ten-step overfit; exit
    status 10 if a check fails."""
    from tunesmith.preflight import doctor as examination
    from tunesmith.preflight.thorough import report

    if out is not None:
        _require_place(out, full)
    with progress() as notify:
        diagnosis = tunesmith.doctor(path, model=model, plan=plan, overfit=overfit, full=full, notify=notify)
    found = diagnosis.get("full")
    if out is not None:
        files.write_json(out, found)
    if as_json:
        print_json(diagnosis)
    else:
        typer.echo(examination.render(diagnosis["checks"]))
        if found is not None:
            typer.echo(f"\n{report.render(found)}")
        if out is not None:
            say(f"written to {out}")
    if not diagnosis["ok"]:
        raise typer.Exit(10)


def _require_place(out: Path, full: bool) -> None:
    """Raises ConfigError if there would be nothing to write, or no folder to write it to."""
    if not full:
        raise ConfigError("there is nothing to write without --full", where="--out", hint="add --full")
    if not out.absolute().parent.is_dir() or out.is_dir():
        hint = "choose a file in a folder that exists"
        raise ConfigError(f"{out} cannot be written", where="--out", hint=hint)
