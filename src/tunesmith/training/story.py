"""From settings to a trained adapter in a run directory: `train` reads as a run happens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from datetime import date
from pathlib import Path
from threading import Event
from typing import Any

import mlx.nn as nn

from tunesmith import adapters, events
from tunesmith.adapters import merging
from tunesmith.events import Notice, Sink
from tunesmith.learning import optimizer
from tunesmith.machine import backend, ranks
from tunesmith.machine.ranks import Ranks
from tunesmith.model.loading import Loaded
from tunesmith.runs import lineage, manifest
from tunesmith.runs.checkpoints import Cursor
from tunesmith.runs.config import RunConfig
from tunesmith.runs.directory import REFERENCE, Run, name, require_free
from tunesmith.settings.config import flat
from tunesmith.training import gradients, preparation, recording, reference, saving
from tunesmith.training.interruption import before_training, interruptible
from tunesmith.training.loop import Loop
from tunesmith.training.preparation import Prepared
from tunesmith.training.recording import Early


def train(
    config: RunConfig,
    origins: Mapping[str, str] | None = None,
    *,
    out: Path | None = None,
    resume: Run | None = None,
    notes: Sequence[str] = (),
    notify: Sink = events.silent,
) -> Run | None:
    """Train as ``config`` says. Returns the run, or None on all ranks but the first.

    out: the new run directory (default ``runs/<day>-<model>-<objective>-<id>``). resume: a run to continue
    instead. Raises DataError, TemplateError or ModelError before step 1, TrainingError later; checkpoints
    stay."""
    hear = Early(notify)  # notices that come before the run has a log
    among = ranks.join(hear)
    hear.muted = not among.writes
    # 1. Settings and machine
    if resume is None:
        if out is not None and among.writes:
            require_free(out)
        config = lineage.anchored(config)
    _warn(config, resume, among, notes, hear)
    # 2. Files → examples → audit → tokens → groups → plan of updates
    prepared = preparation.prepare(config, hear, audited=resume is not None)
    _warn_of_warmup(config, prepared, hear)
    # 3. Base model, and the adapter that is trained on it
    loaded = merging.load(config.model, hear)
    attached = config.adapter.attach(loaded.net, config.loop.seed)
    ancestors = begin(config, loaded, hear)
    gradients.require(loaded.net, config, prepared.train, hear)
    # 4. The run directory, new or resumed
    hashes = _hashes(prepared, loaded, ancestors)
    facts = manifest.facts(config, hashes, among.size, ancestors, prepared.accepted)
    run = _resumed(resume, config, hashes) if resume else _created(among, out, config, origins, facts)
    own = run if among.writes else None
    with ExitStack() as held:
        if own is not None:
            held.enter_context(own.lock())
            held.enter_context(own.room())
        stop = held.enter_context(interruptible(among))
        state = optimizer.build(config.optimizer, loaded.net)
        among.require_agreement(_without_paths(config), sorted(map(str, flat(hashes).values())))
        # 5. The reference, by the model before training: before a checkpoint is restored
        prepared = _compared(prepared, config, loaded, own, among, stop, hear)
        # 6. The checkpoint to continue from, and the log
        cursor = _restored(resume, loaded.net, state, among, hear)
        emit = events.silent
        if own is not None:
            emit = recording.record(own, cursor, prepared.plan.steps, config.loop.tensorboard, hear, held)
            preparation.write(own, prepared)
        if cursor.step == 0:
            place, steps = str(own.path) if own else "", prepared.plan.steps
            emit(events.RunStarted(place, steps, attached.trainable, attached.total, prepared.counts))
        # 7. The loop
        Loop(run, config, loaded.net, state, prepared, emit, stop, among).finish(cursor)
    return own


def _warn(config: RunConfig, resume: Run | None, among: Ranks, notes: Sequence[str], hear: Sink) -> None:
    """Poor settings, a slow machine, and a machine or software that is not the one of the resumed run."""
    device = backend.setup()
    changed = manifest.moved(resume, manifest.facts(config, {}, among.size)) if resume else ()
    for text in (*config.warnings(), *notes, *device.notes, *changed):
        hear(Notice(text, level="warning"))
    if device.blas == "reference":
        hear(Notice("MLX computes with its slow reference BLAS", level="warning", hint=device.blas_hint))


def _warn_of_warmup(config: RunConfig, prepared: Prepared, hear: Sink) -> None:
    if config.optimizer.warmup(prepared.plan.steps) >= prepared.plan.steps:
        text = "the warm-up is as long as the run: the learning rate never reaches its peak"
        hear(Notice(text, level="warning"))


def begin(config: RunConfig, loaded: Loaded, notify: Sink = events.silent) -> dict[str, Any]:
    """Load the adapter that training starts from, if any. Returns where it and a merged adapter come from."""
    ancestors: dict[str, Any] = {}
    if config.model.adapter is not None:
        ancestors["merged"] = lineage.origin(config.model.adapter, loaded.files)
    if config.adapter.start is not None:
        ancestors["start"] = lineage.origin(config.adapter.start, loaded.fingerprint)
        adapters.go_on(loaded.net, config.adapter, Path(config.adapter.start))
        notify(Notice(f"training goes on from the adapter {config.adapter.start}"))
    return ancestors


def _hashes(prepared: Prepared, loaded: Loaded, ancestors: Mapping[str, Any]) -> dict[str, Any]:
    """Hashes of all inputs: data, template, base and starting adapter."""
    start = {"start": ancestors["start"]["sha256"]} if "start" in ancestors else {}
    return prepared.hashes | {"base": loaded.fingerprint} | start


def _resumed(run: Run, config: RunConfig, hashes: Mapping[str, Any]) -> Run:
    manifest.require_same(run, config, hashes)
    return run


def _created(
    among: Ranks,
    out: Path | None,
    config: RunConfig,
    origins: Mapping[str, str] | None,
    facts: Mapping[str, Any],
) -> Run | None:
    """A new run directory, or None on ranks that do not write."""
    if not among.writes:
        return None
    return Run.create(out or Path("runs") / name(config, date.today()), config, origins or {}, facts)


def _compared(
    prepared: Prepared,
    config: RunConfig,
    loaded: Loaded,
    run: Run | None,
    among: Ranks,
    stop: Event,
    hear: Sink,
) -> Prepared:
    """``prepared`` with the reference of its rows, if the objective needs one."""
    if not prepared.objective.needs_reference:
        return prepared
    with before_training(run, hear):
        own = run.path / REFERENCE if run else None
        return reference.compared(
            prepared, config, loaded, own=own, among=among, stopped=stop.is_set, notify=hear
        )


def _restored(resume: Run | None, net: nn.Module, state: Any, among: Ranks, hear: Early) -> Cursor:
    """The cursor to continue from, with weights and optimizer restored; all ranks agree on it."""
    known = len(hear.notices)
    cursor = saving.restore(resume, net, state, among, hear) if resume is not None else Cursor()
    among.require_agreement(cursor.step, cursor.sha256)
    if cursor.step:
        del hear.notices[:known]  # they are in the log from when the run began
    return cursor


def _without_paths(config: RunConfig) -> dict[str, Any]:
    """The settings without the places of files, which may differ between machines."""
    places = (
        "data.train",
        "data.valid",
        "model.path",
        "model.tokenizer",
        "model.adapter",
        "adapter.start",
        "audit.against",
    )
    return {key: value for key, value in flat(config.model_dump(mode="json")).items() if key not in places}
