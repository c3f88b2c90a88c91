"""Which model does a run, a checkpoint or a plain model name, and how is it opened for use?

Finding reads small files only, so that a wrong name is reported before weights are loaded; opening loads the
base and its renderer and checks that they are those of training. The adapter is attached by the caller, who
may need the base alone first."""

from __future__ import annotations

import os
import shlex
from dataclasses import dataclass
from pathlib import Path

from tunesmith import adapters, events
from tunesmith.adapters import merging
from tunesmith.errors import ConfigError, DataError
from tunesmith.events import Sink
from tunesmith.model.loading import Loaded, ModelSpec
from tunesmith.runs import checkpoints, manifest, tags
from tunesmith.runs.config import RunConfig
from tunesmith.runs.directory import ADAPTER_CONFIG, CHECKPOINTS, MANIFEST, Run
from tunesmith.runs.search import FOLDER
from tunesmith.tokens import renderers
from tunesmith.tokens.template import Renderer


@dataclass(frozen=True)
class Opened:
    """A base model in memory, with its renderer. ``checkpoint``: folder of the adapter; None: there is
    none."""

    loaded: Loaded
    renderer: Renderer
    checkpoint: Path | None

    def attach(self) -> None:
        """Put the checkpoint's adapter into the base for good. Raises ModelError if it does not fit."""
        if self.checkpoint is not None:
            adapters.load(self.loaded.net, self.checkpoint)


@dataclass(frozen=True)
class Source:
    """A model that was found. ``run`` and ``config``: None for a plain model."""

    model: ModelSpec
    run: Run | None = None
    config: RunConfig | None = None
    checkpoint: Path | None = None

    def open(self, notify: Sink = events.silent, *, lazily: bool = False) -> Opened:
        """Load base and renderer. Raises ModelError if they are not those that the run was trained with.
        lazily: each tensor is read when it is first used."""
        loaded = merging.load(self.model, notify, lazily=lazily)
        if self.run is None or self.config is None:
            return Opened(loaded, renderers.load(loaded.path), None)
        tokenizer = self.model.tokenizer or loaded.path
        renderer = renderer_of(self.run, tokenizer)
        manifest.require_base(self.run, loaded.fingerprint, renderer.fingerprint)
        return Opened(loaded, renderer, self.checkpoint)


def renderer_of(run: Run, tokenizer: Path | str) -> Renderer:
    """The renderer of the folder ``tokenizer``, by the settings, the date and the rules of ``run``."""
    template, text_control = run.config.template, run.config.data.text_control
    return renderers.load(tokenizer, template, manifest.recorded(run)).follow(template, text_control)


def of_run(run: Run, checkpoint: Path | None, model: str | None = None) -> Source:
    """The model of ``run``, whose base lies at ``model`` if it was moved. Raises ModelError if it is not
    there."""
    config = run.settings(model)
    return Source(config.model, run, config, checkpoint)


def find(
    target: str | Path,
    checkpoint: str = "best",
    *,
    model: str | None = None,
    adapter: bool = True,
    notify: Sink = events.silent,
) -> Source:
    """The model of a run (its directory or a tag), of a checkpoint folder inside one, or a plain model
    (folder, GGUF file, hub id).

    checkpoint: best, last or a step, for a run. model: where the run's base lies now, if it was moved.
    adapter False: the run's base as it was before training. Raises ConfigError for options that a plain model
    does not have, DataError for an adapter outside a run, or for a mistyped run."""
    path = tags.find(target)
    if (path / MANIFEST).is_file():
        run = Run.open(path)
        return of_run(run, checkpoints.choose(run, checkpoint, notify) if adapter else None, model)
    if (path / ADAPTER_CONFIG).is_file():
        if path.resolve().parent.name != CHECKPOINTS:
            hint = "name its run directory, or a model"
            raise DataError("is an adapter outside a run", where=str(path), hint=hint)
        run = Run.open(path.resolve().parent.parent)
        return of_run(run, checkpoints.choose(run, path.resolve().name) if adapter else None, model)
    _require_not_mistyped(path)
    if checkpoint != "best" or not adapter or model is not None:
        message = "a plain model has no checkpoint, no adapter to leave out, and no other place"
        raise ConfigError(message, where=str(path), hint="name a run")
    return Source(ModelSpec(path=str(target)))


def _require_not_mistyped(path: Path) -> None:
    """Raises DataError if nothing is at ``path``, and its first folder says that no hub id is meant."""
    folder = Path(path.parts[0]) if path.parts else path
    if len(path.parts) < 2 or path.is_absolute() or path.suffix == ".gguf" or os.path.lexists(path):
        return
    if folder == Path(FOLDER):
        raise DataError("is not a run", where=str(path), hint="tunesmith runs lists the runs")
    if os.path.isdir(folder):
        hint = f"tunesmith runs --folder {shlex.quote(str(folder))} lists the runs there; "
        hint += f"if it is a model of the hub, use a current folder without a folder {folder}"
        raise DataError("is neither a run nor a model here", where=str(path), hint=hint)
