"""Which settings does a run have? All layers together as a `RunConfig`, and a template to start from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from tunesmith.data import folders
from tunesmith.data.formats import JSON
from tunesmith.data.mixing import MixSpec
from tunesmith.errors import ConfigError
from tunesmith.runs.config import RunConfig
from tunesmith.runs.directory import MANIFEST
from tunesmith.runs.migration import Translation, translate
from tunesmith.settings import config as settings
from tunesmith.settings import origins
from tunesmith.settings.config import Resolved, flat


def listed(values: str | Path | Sequence[str | Path]) -> list[str]:
    """``values`` as a list; a single path or text becomes a list of one."""
    return [str(values)] if isinstance(values, str | Path) else [str(value) for value in values]


def configure(
    *,
    preset: str | None = None,
    config: Sequence[str | Path] = (),
    model: str | None = None,
    data: Sequence[str] = (),
    sets: Sequence[str] = (),
    accept: Sequence[str] = (),
    environ: Mapping[str, str] | None = None,
) -> Resolved[RunConfig]:
    """Settings from all layers, later ones first: sets, model, data and accept, environ, config files,
    preset, defaults.

    Raises ConfigError naming every key that is wrong."""
    overrides: dict[str, tuple[JSON, str]] = {}
    if model is not None:
        overrides["model.path"] = (model, "--model")
    if data:
        overrides["data.train"] = ([*listed(data)], "--data")
    files = [Path(path) for path in listed(config)]

    def load() -> Resolved[RunConfig]:
        return settings.load(
            RunConfig,
            overrides=overrides,
            preset=preset,
            files=files,
            environ=environ or {},
            sets=listed(sets),
            recorded=[path for path in files if (path.parent / MANIFEST).is_file()],
        )

    resolved = load()
    if accept:  # in addition to what the settings accept
        accepted = dict.fromkeys([*resolved.spec.audit.accept, *listed(accept)])
        overrides["audit.accept"] = ([*accepted], "--accept")
        resolved = load()
    data_spec = resolved.spec.data
    held_out = data_spec.valid
    copies = folders.copies([*data_spec.trained_on, *(held_out if isinstance(held_out, tuple) else ())])
    resolved = _mix_in_parts(_in_parts(resolved))
    return replace(resolved, notes=(*resolved.notes, *copies))


def _in_parts(resolved: Resolved[RunConfig]) -> Resolved[RunConfig]:
    """The settings with the train file of a folder to train on, and its valid file to hold out, if the folder
    has such parts."""
    data = resolved.spec.data
    parts = folders.parts(data.train)
    if parts is None:
        return resolved
    where = ", ".join(path for path in data.train if path not in parts.train)

    def names(files: Sequence[str]) -> str:
        shown = [_inside(file, data.train) for file in files]
        return ", ".join(shown[:3]) + (f" and {len(shown) - 3} more" if len(shown) > 3 else "")

    values: dict[str, Any] = {"train": tuple(parts.train)}
    notes = [f"{where}: {names(parts.train)} to train on"]
    named = data.valid if isinstance(data.valid, tuple) else ()
    if parts.valid and not isinstance(data.valid, tuple) and data.valid > 0:
        values["valid"] = tuple(parts.valid)
        notes.append(f"{names(parts.valid)} held out, instead of a share of the training rows")
    elif unused := [file for file in parts.valid if file not in named]:
        notes.append(f"{names(unused)} neither trained on nor held out, as data.valid says")
    if parts.test:
        notes.append(f"{names(parts.test)} not trained on: tunesmith evaluate RUN --data {parts.test[0]}")
    if parts.others:
        notes.append(f"{names(parts.others)} not read: name it in data.train to train on it")
    spec = resolved.spec.model_copy(update={"data": data.model_copy(update=values)})
    places = resolved.origins | {f"data.{key}": f"the files of {where}" for key in values}
    return replace(resolved, spec=spec, origins=places, notes=("; ".join(notes),))


def _mix_in_parts(resolved: Resolved[RunConfig]) -> Resolved[RunConfig]:
    """The settings with the train files of those folders of ``data.mix`` that have such parts."""
    data = resolved.spec.data
    entries: list[MixSpec] = []
    notes = list(resolved.notes)
    for entry in data.mix:
        parts = folders.parts(entry.path)
        entries.append(entry if parts is None else entry.model_copy(update={"path": tuple(parts.train)}))
        if parts is not None:
            notes.append(f"data.mix: of {', '.join(entry.path)} only {', '.join(parts.train)}")
    spec = resolved.spec.model_copy(update={"data": data.model_copy(update={"mix": tuple(entries)})})
    return replace(resolved, spec=spec, notes=tuple(notes))


def _inside(file: str, folders_given: Sequence[str]) -> str:
    """The path of ``file`` in the folder that was given, or its name if it was given by itself."""
    around = [path for given in folders_given if (path := Path(given).expanduser()) in Path(file).parents]
    return str(Path(file).relative_to(around[0])) if around else Path(file).name


def init(
    *,
    preset: str | None = None,
    model: str | None = None,
    data: Sequence[str] = (),
    source: str | Path | None = None,
    source_format: str | None = None,
) -> str:
    """A complete configuration as YAML: each key with its meaning, default and range; required keys are
    marked. Or, with ``source``, the settings of another program's file as ours; ``source_format`` names the
    program (by default it is recognised).

    Raises ConfigError."""
    if source is not None:
        return translated(source, source_format=source_format, preset=preset, model=model, data=data).yaml
    if source_format is not None:
        raise ConfigError("needs a file", where="--from-format", hint="name it by --from FILE")
    values: dict[str, JSON] = {}
    if preset is not None:
        values |= flat(origins.plain(origins.read(settings.preset_file(preset), str)))
    values |= {"model.path": model} if model else {}
    values |= {"data.train": [*listed(data)]} if data else {}
    return settings.annotated(RunConfig, values)


def translated(
    source: str | Path,
    *,
    source_format: str | None = None,
    preset: str | None = None,
    model: str | None = None,
    data: Sequence[str] = (),
) -> Translation:
    """The settings of another program's file. Raises ConfigError."""
    if preset is not None:
        hint = "a preset of tunesmith is a layer below: tunesmith train --preset NAME --config FILE"
        raise ConfigError("--from and --preset exclude each other", where="--preset", hint=hint)
    return translate(Path(source).expanduser(), program=source_format, model=model, data=listed(data))
