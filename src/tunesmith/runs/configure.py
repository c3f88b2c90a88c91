"""Which settings does a run have? All layers together as a `RunConfig`, and a template to start from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from tunesmith.data.formats import JSON
from tunesmith.runs.config import RunConfig
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
        )

    resolved = load()
    if accept:  # in addition to what the settings accept
        accepted = dict.fromkeys([*resolved.spec.audit.accept, *listed(accept)])
        overrides["audit.accept"] = ([*accepted], "--accept")
        resolved = load()
    return resolved


def init(*, preset: str | None = None, model: str | None = None, data: Sequence[str] = ()) -> str:
    """A complete configuration as YAML: each key with its meaning, default and range; required keys are
    marked."""
    values: dict[str, JSON] = {}
    if preset is not None:
        values |= flat(origins.plain(origins.read(settings.preset_file(preset), str)))
    values |= {"model.path": model} if model else {}
    values |= {"data.train": [*listed(data)]} if data else {}
    return settings.annotated(RunConfig, values)
