"""From settings to a trained adapter in a run directory: `train` reads as a run happens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from threading import Event
from typing import Any

import mlx.nn as nn

from tunesmith import adapters, events
from tunesmith.adapters import Adapter, merging, starting
from tunesmith.adapters.specs import Attached, Full, blocks_of
from tunesmith.errors import ModelError
from tunesmith.events import Notice, Sink
from tunesmith.learning import optimizer
from tunesmith.machine import backend, ranks
from tunesmith.machine.ranks import Ranks
from tunesmith.model import families, kernels, vocabulary
from tunesmith.model.loading import Loaded
from tunesmith.runs import lineage, manifest
from tunesmith.runs.checkpoints import Cursor
from tunesmith.runs.config import RunConfig
from tunesmith.runs.directory import AUDIT, REFERENCE, Run, name, require_free
from tunesmith.runs.forecasts import Forecast
from tunesmith.settings.config import flat
from tunesmith.tokens.batches import Group
from tunesmith.tokens.renderers import Recorded
from tunesmith.training import forecast, gradients, ordering, preparation, recording, reference, saving
from tunesmith.training.forecast import Needs, Watched
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
    anyway: bool = False,
    notify: Sink = events.silent,
) -> Run | None:
    """Train as ``config`` says. Returns the run, or None on all ranks but the first.

    out: the new run directory (default ``runs/<day>-<model>-<objective>-<id>``). resume: a run to continue
    instead. anyway: train also if the memory of this machine is too small. Raises DataError, TemplateError,
    ModelError or OutOfMemory before step 1, TrainingError later; checkpoints stay."""
    hear = Early(notify)  # notices that come before the run has a log
    among = ranks.join(hear)
    hear.muted = not among.writes
    # 1. Settings and machine
    before = forecast.held_before()
    config = _checked(config, out, resume, among, notes, hear)
    kernels.begin(hear)  # they are compiled while the rows are read
    # 2. Files → examples → audit → tokens → groups → plan of updates
    recorded = manifest.recorded(resume) if resume else Recorded.on_first_rank(among)
    audited = resume is not None and (resume.path / AUDIT).exists()
    prepared = preparation.prepare(config, hear, audited=audited, recorded=recorded)
    _warn_of_warmup(config, prepared, hear)
    # 3. Base model, and the adapter that is trained on it; what the run will need
    anyway = anyway or resume is not None
    forecast.require_room_for_large(config, prepared, among.size, anyway)
    model = open_model(config, prepared.train, hear, resume)
    config = model.config
    predicted = _predicted(config, prepared, model, among, anyway, hear)
    hashes = _hashes(prepared, model)
    # 4. The run directory, new or resumed
    run = _directory(config, origins, out, resume, prepared, model, hashes, among)
    with ExitStack() as held:
        stop = _hold(run, among, held)
        state = optimizer.build(config.optimizer, model.net)
        among.require_agreement(_without_paths(config), sorted(map(str, flat(hashes).values())))
        # 5. Difficulty and reference, by the model before training: before a checkpoint is restored
        prepared = _ordered(prepared, config, model.loaded, run, among, stop, hear)
        prepared = _compared(prepared, config, model.loaded, run, among, stop, hear)
        # 6. The checkpoint to continue from, and the log
        cursor = _restored(resume, model.net, state, among, hear)
        emit = Watched(_log(run, cursor, config, prepared, model.attached, hear, held), before)
        if run is not None:
            held.callback(emit.write, run, predicted)
        # 7. The loop
        Loop(run, config, model.net, state, prepared, emit, stop, among).finish(cursor)
    return run


@dataclass(frozen=True)
class Trainable:
    """A base model with the adapter that is trained on it. ``config``: with the settings that depend on the
    model. ``ancestors``: where the adapters that were merged into it, and that training starts from, come
    from."""

    config: RunConfig
    loaded: Loaded
    attached: Attached
    ancestors: Mapping[str, Any]

    @property
    def net(self) -> nn.Module:
        return self.loaded.net


def open_model(
    config: RunConfig, rows: Sequence[Group], notify: Sink, resume: Run | None = None
) -> Trainable:
    """Load the base, attach the adapter, and give it the weights that training starts from. Raises
    ModelError, also for an id that the model does not know, or ConfigError if the model cannot do what
    ``config`` asks of it."""
    loaded = merging.load(config.model, notify)
    vocabulary.require_rows(loaded.net, rows)
    if (doubt := families.doubt(loaded.config)) is not None:
        notify(Notice(doubt, level="warning", where="model", hint="docs/models.md lists those that were"))
    config = config.model_copy(update={"adapter": config.adapter.settled(loaded.net)})
    ancestors: dict[str, Any] = {}
    if config.model.adapter is not None:
        ancestors["merged"] = lineage.origin(config.model.adapter, loaded.files)
    start: tuple[Adapter, ...] = ()
    if (folder := config.adapter.start) is not None:
        ancestors["start"] = lineage.origin(folder, loaded.fingerprint)
        start = starting.read(Path(folder), loaded, config.model.path, notify)
    attached = config.adapter.attach(loaded.net, config.loop.seed, _recorded(start, resume))
    for notice in attached.notices:
        notify(notice)
    if start:
        starting.go_on(loaded.net, config.adapter, start)
        notify(Notice(f"training goes on from the adapter {folder}"))
    gradients.require(loaded.net, config, rows, notify)
    _tell_reach(config, loaded.net, attached, notify)
    return Trainable(config, loaded, attached, ancestors)


def _tell_reach(config: RunConfig, net: nn.Module, attached: Attached, notify: Sink) -> None:
    """Say how many blocks a low-rank adapter reaches, if not all."""
    if isinstance(config.adapter, Full):
        return
    blocks = blocks_of(net, config.adapter.layers)
    reached = {block for name in attached.tensors for block in blocks if name.startswith(block)}
    if len(reached) < len(blocks):
        text = f"{', '.join(config.adapter.targets)} reach {len(reached)} of {len(blocks)} blocks"
        notify(Notice(text, where="adapter.targets", hint="all-linear adapts every block"))


def _recorded(start: Sequence[Adapter], resume: Run | None) -> tuple[str, ...] | None:
    """The layers that the adapter to continue adapts, which an earlier release may have chosen, or None if
    there is none."""
    if resume is not None and (steps := resume.checkpoints()):
        with suppress(ModelError):  # a torn checkpoint is dealt with when it is restored
            return adapters.read_layers(resume.checkpoint(steps[-1]))
    layers = [part.layers for part in start]
    return None if not layers or layers[0] is None else tuple(name for part in layers for name in part or ())


def _checked(
    config: RunConfig, out: Path | None, resume: Run | None, among: Ranks, notes: Sequence[str], hear: Sink
) -> RunConfig:
    """The settings of the run, after notices of how folders were read, and warnings of poor settings, of a
    slow machine, and of a machine or software that is not the one of the resumed run. Raises DataError if
    the run cannot be created at ``out``."""
    if resume is None:
        if out is not None and among.writes:
            require_free(out)
        config = lineage.anchored(config)
    device = backend.setup()
    changed = manifest.moved(resume, manifest.facts(config, {}, among.size)) if resume else ()
    for text in notes:
        hear(Notice(text, where="data.train"))
    for text in (*config.warnings(), *device.notes, *changed):
        hear(Notice(text, level="warning"))
    if device.blas == "reference":
        hear(Notice("MLX computes with its slow reference BLAS", level="warning", hint=device.blas_hint))
    return config


def _warn_of_warmup(config: RunConfig, prepared: Prepared, hear: Sink) -> None:
    if config.optimizer.warmup(prepared.plan.steps) >= prepared.plan.steps:
        text = "the warm-up is as long as the run: the learning rate never reaches its peak"
        hear(Notice(text, level="warning"))


def _predicted(
    config: RunConfig, prepared: Prepared, model: Trainable, among: Ranks, anyway: bool, hear: Early
) -> Forecast:
    """What the run will need; it is shown. Raises OutOfMemory if this machine cannot have it."""
    needs = Needs.of(config, prepared, model.net, model.loaded.config, among.size)
    predicted = needs.forecast()
    forecast.require_room(predicted, anyway)
    for line in forecast.lines(predicted):
        hear.listener(Notice(line))  # plan.json has it: it is not for the log
    return predicted


def _hashes(prepared: Prepared, model: Trainable) -> dict[str, Any]:
    """Hashes of all inputs: data, template, base and starting adapter."""
    ancestors = model.ancestors
    start = {"start": ancestors["start"]["sha256"]} if "start" in ancestors else {}
    return prepared.hashes | {"base": model.loaded.fingerprint} | start


def _directory(
    config: RunConfig,
    origins: Mapping[str, str] | None,
    out: Path | None,
    resume: Run | None,
    prepared: Prepared,
    model: Trainable,
    hashes: Mapping[str, Any],
    among: Ranks,
) -> Run | None:
    """The run directory, new or that of ``resume``, or None on ranks that do not write. Raises
    ResumeMismatch."""
    if resume is not None:
        manifest.require_same(resume, config, hashes)
        preparation.require_same(resume, prepared)
    if not among.writes:
        return None
    if resume is not None:
        return resume
    facts = manifest.facts(config, hashes, among.size, model.ancestors, prepared.accepted, prepared.day)
    return Run.create(out or Path("runs") / name(config, date.today()), config, origins or {}, facts)


def _hold(run: Run | None, among: Ranks, held: ExitStack) -> Event:
    """Lock ``run``, and turn a full disk into DiskFull, until ``held`` is closed. Returns the event that
    signals set."""
    if run is not None:
        held.enter_context(run.lock())
        held.enter_context(run.room())
    return held.enter_context(interruptible(among))


def _ordered(
    prepared: Prepared,
    config: RunConfig,
    loaded: Loaded,
    run: Run | None,
    among: Ranks,
    stop: Event,
    hear: Sink,
) -> Prepared:
    """``prepared`` with its first epoch in the order of difficulty, if the settings ask for that."""
    if config.data.order != "difficulty":
        return prepared
    with before_training(run, hear):
        folder = run.path if run else None
        return ordering.measured(
            prepared, config, loaded, folder=folder, among=among, stopped=stop.is_set, notify=hear
        )


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


def _log(
    run: Run | None,
    cursor: Cursor,
    config: RunConfig,
    prepared: Prepared,
    size: Attached,
    hear: Early,
    held: ExitStack,
) -> Sink:
    """Where the events of the run go: to its log, open until ``held`` is closed, and to whoever listens."""
    if run is None:
        return events.silent
    steps = prepared.plan.steps
    emit = recording.record(run, cursor, steps, config.loop.tensorboard, hear, held)
    preparation.write(run, prepared)
    if cursor.step == 0:
        emit(events.RunStarted(str(run.path), steps, size.trainable, size.total, prepared.counts))
    return emit


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
    values = {key: value for key, value in flat(config.model_dump(mode="json")).items() if key not in places}
    return values | {
        "data.mix": [(entry.share, entry.repeat, entry.weight, entry.distill) for entry in config.data.mix]
    }
