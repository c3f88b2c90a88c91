"""What is served: one base in memory, alone and with each of its adapters, by name and by tag.

A run is served exactly as it was evaluated: its checkpoint, its renderer, the form in which it was trained to
be asked. The engine knows an adapter by the hash of its contents, so that an adapter that is replaced under
its name never meets the cache, or the unfinished answers, of the one before it."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from pathlib import Path

import mlx.nn as nn

from tunesmith import adapters, events
from tunesmith.adapters import Adapter, Full, Routing
from tunesmith.data.asking import AskedAs
from tunesmith.engine.engine import notify_if_separate
from tunesmith.errors import ConfigError
from tunesmith.events import Sink
from tunesmith.model import vocabulary
from tunesmith.model.loading import Loaded, ModelSpec
from tunesmith.runs import asking, bases, checkpoints, manifest, opening, tags
from tunesmith.runs.directory import Run
from tunesmith.runs.opening import Source
from tunesmith.serving.rejections import UnknownModel
from tunesmith.tokens.template import Renderer

BASE = "base"
"""The name that the base has beside that of its folder."""
HELD_AS = ("quantize", "group_size", "dtype", "resize_embeddings")
"""Settings of the base in memory on which an adapter's answers depend."""


@dataclass(frozen=True)
class Served:
    """A model that clients can name. ``adapter``: its name in the engine; None: the model as it was loaded.
    ``tags``: other names. ``digest``: hash of base and adapter. ``created``: seconds since the epoch."""

    name: str
    adapter: str | None
    renderer: Renderer
    asked_as: AskedAs
    run: Path | None
    tags: tuple[str, ...]
    digest: str
    created: int

    @property
    def names(self) -> tuple[str, ...]:
        return (self.name, *self.tags)


@dataclass(frozen=True)
class NamedRun:
    """``[NAME=]RUN`` of the command line. ``name``: None: that of the folder."""

    path: str
    name: str | None = None

    @classmethod
    def parse(cls, text: str) -> NamedRun:
        name, equals, path = text.partition("=")
        if not equals or not name or not path or os.path.lexists(text) or "/" in name:
            return cls(text)
        return cls(path, name)


@dataclass
class Models:
    """The base in memory and what is served on it. ``by_name``: the adapters, by their own names. ``base``:
    None if what is served has no base beside it, since whole weights were trained.

    `entries` and `resolve` may be called anywhere, all else on MLX's thread."""

    loaded: Loaded
    spec: ModelSpec
    routing: Routing | None
    base: Served | None
    by_name: dict[str, Served] = field(default_factory=dict)
    contents: dict[str, Adapter] = field(default_factory=dict)
    """Adapters, by their names in the engine."""

    @property
    def entries(self) -> list[Served]:
        """All that is served, the default first."""
        return [*self.by_name.values(), *([self.base] if self.base else [])]

    @property
    def held_as(self) -> str:
        """A name of a folder, for how the base is held: the digests of what is served do not cover it."""
        return "-".join(f"{key}={getattr(self.spec, key)}" for key in HELD_AS)

    def resolve(self, name: str | None) -> Served:
        """The model that ``name`` means: its name, a tag, or its run directory; None: the first that is
        served. Raises UnknownModel."""
        for served in self.entries:
            is_its_run = served.run is not None and name == str(served.run)
            if name is None or name in served.names or is_its_run:
                return served
        names = ", ".join(served.name for served in self.entries)
        raise UnknownModel(f"there is no model {name!r}", hint=f"served are: {names}")

    def read(self, target: NamedRun, source: Source) -> tuple[Served, Adapter]:
        """The adapter of a run, and how it is served. Raises ConfigError if it was trained on another base or
        with other settings of the base, or is not a run; ModelError or DataError if it cannot be read."""
        run, folder = source.run, source.checkpoint
        if run is None or folder is None:
            hint = "the base of the runs is served beside them; serve another model by a server of its own"
            raise ConfigError("is a model, not a run", where=target.path, hint=hint)
        self._require_same_base(target, run)
        renderer = opening.renderer_of(run, self.spec.tokenizer or self.loaded.path)
        manifest.require_base(run, self.loaded.fingerprint, renderer.fingerprint)
        with checkpoints.held(folder):
            adapter = adapters.read(folder)
            digest = _digest(self.loaded.fingerprint, folder)
        name = target.name or _name(target, run, folder)
        if name == BASE:
            hint = "give it another name: NAME=RUN"
            raise ConfigError(f"{BASE} is the name of the base", where=target.path, hint=hint)
        served = Served(
            name,
            digest,
            renderer,
            asking.of_run(run),
            run.path,
            tuple(tags.read(run.path)),
            digest,
            _made(run),
        )
        return served, adapter

    def _require_same_base(self, target: NamedRun, run: Run) -> None:
        alone = "serve it by a server of its own"
        if run.hashes["base"] != self.loaded.fingerprint:
            message = f"was trained on another base ({run.config.model.path}) than this server has"
            raise ConfigError(f"{message} ({self.spec.path})", where=target.path, hint=alone)
        for key in HELD_AS:
            was, here = (getattr(spec, key) for spec in (run.config.model, self.spec))
            if was != here:
                message = f"was trained with model.{key}={was}, and the base of this server has {here}"
                raise ConfigError(message, where=target.path, hint=alone)

    def add(self, served: Served, adapter: Adapter, in_use: Collection[str]) -> None:
        """Serve ``adapter`` under ``served.name``, instead of one that has the name. ``in_use``: names in the
        engine of adapters that answers still need. Raises ConfigError if another model has one of its names,
        ModelError if it does not fit; what is served is then as before."""
        others = [entry for entry in self.entries if entry.name != served.name]
        if taken := {name for entry in others for name in entry.names} & {*served.names}:
            hint = "name each adapter otherwise: NAME=RUN"
            raise ConfigError(f"two models are named {min(taken)}", where=str(served.run), hint=hint)
        self._route({**self.by_name, served.name: served}, {**self.contents, served.digest: adapter}, in_use)

    def drop(self, name: str, in_use: Collection[str]) -> None:
        """Serve the adapter ``name`` no longer. Raises UnknownModel if there is none, ConfigError if it is
        not an adapter."""
        served = self.resolve(name)
        if served.name not in self.by_name or self.routing is None:
            raise ConfigError(f"{name} is not an adapter", hint="only adapters can be dropped")
        left = {key: entry for key, entry in self.by_name.items() if key != served.name}
        self._route(left, self.contents, in_use)

    def forget_unused(self, in_use: Collection[str]) -> None:
        """Free the adapters that nobody can name and no answer needs."""
        self._route(self.by_name, self.contents, in_use)

    def _route(
        self, by_name: dict[str, Served], contents: Mapping[str, Adapter], in_use: Collection[str]
    ) -> None:
        """Make the adapters of ``by_name`` what is served."""
        if self.routing is None:
            message = "what is served has whole weights of its own, and no adapter fits beside it"
            raise ConfigError(message, hint="serve the adapters by a server of their own")
        needed = {served.digest for served in by_name.values()} | set(in_use)
        contents = {name: adapter for name, adapter in contents.items() if name in needed}
        if contents.keys() != self.contents.keys():
            self.routing.change(contents)
        self.by_name, self.contents = by_name, dict(contents)


def open_models(
    targets: Sequence[NamedRun],
    *,
    model: str | None = None,
    checkpoint: str = "best",
    notify: Sink = events.silent,
) -> Models:
    """Load the base that all ``targets`` share, and their adapters. model: the base's place if it was moved;
    without targets, a plain model. A target may itself be a plain model, if it is the only one.

    Raises ConfigError if targets cannot be served together, and what `opening.find` raises."""
    sources = [opening.find(target.path, checkpoint, model=model, notify=notify) for target in targets]
    if not targets and model is None:
        raise ConfigError("nothing to serve", hint="name a run, or a model: tunesmith serve RUN")
    first = sources[0] if sources else opening.find(model or "", notify=notify)
    if first.run is None:
        for target in targets[1:]:
            hint = "name the run first; its base is served beside it"
            raise ConfigError("a plain model is served alone", where=target.path, hint=hint)
        return _plain(first, targets[0].name if targets else None, notify)
    opened = first.open(notify)
    notify_if_separate(opened.loaded.net, notify)
    models = Models(opened.loaded, first.model, None, None)
    read = [models.read(*pair) for pair in zip(targets, sources, strict=True)]
    for target, (served, adapter) in zip(targets, read, strict=True):
        if reason := _whole(opened.loaded.net, adapter):
            if len(targets) > 1:
                message = f"{reason}, which the answers of a batch share"
                raise ConfigError(message, where=target.path, hint="serve it alone, without other runs")
            adapter.install(opened.loaded.net)
            opened.loaded.net.eval()
            models.by_name = {served.name: replace(served, adapter=None)}
            return models
    models.base = _base(first, opened.loaded, opened.renderer, asking.of_run(first.run), None)
    models.routing = Routing(opened.loaded.net, {})
    for served, adapter in read:
        if served.name in models.by_name:
            hint = "name one of them otherwise: NAME=RUN"
            raise ConfigError(f"two runs are named {served.name}", where=str(served.run), hint=hint)
        models.add(served, adapter, ())
    return models


def _plain(source: Source, name: str | None, notify: Sink) -> Models:
    """A model without a run, on which adapters can be put later."""
    opened = source.open(notify)
    notify_if_separate(opened.loaded.net, notify)
    base = _base(source, opened.loaded, opened.renderer, "chat", name)
    return Models(opened.loaded, source.model, Routing(opened.loaded.net, {}), base)


def _base(source: Source, loaded: Loaded, renderer: Renderer, kind: AskedAs, name: str | None) -> Served:
    name = name or Path(bases.named(source.model.path, loaded.fingerprint)).name
    others = () if name == BASE else (BASE,)
    return Served(name, None, renderer, kind, None, others, loaded.fingerprint, int(_changed(loaded.path)))


def _whole(net: nn.Module, adapter: Adapter) -> str | None:
    """Why the adapter can only be served alone; None if the rows of a batch can have it beside others."""
    if isinstance(adapter.spec, Full) or adapter.spec.full_modules:
        return "it trained whole modules"
    return "it trained rows of new tokens" if vocabulary.extended(net) else None


def _digest(base: str, folder: Path) -> str:
    """Of base and adapter. The settings beside the weights count: they decide the scale."""
    settings = hashlib.sha256((folder / adapters.CONFIG).read_bytes()).hexdigest()
    return hashlib.sha256(f"{base} {checkpoints.weights_hash(folder)} {settings}".encode()).hexdigest()


def _name(target: NamedRun, run: Run, folder: Path) -> str:
    name = run.path.resolve().name
    return f"{name}@{folder.name}" if Path(target.path).resolve() == folder.resolve() else name


def _made(run: Run) -> int:
    try:
        return int(datetime.fromisoformat(run.manifest.get("created", "")).timestamp())
    except ValueError:
        return int(_changed(run.path))


def _changed(path: Path) -> float:
    return path.stat().st_mtime
