"""From settings to a trained adapter in a run directory: the story, and the loop.

State is arithmetic: the order of rows and every dropout mask are functions of (seed, step), so a checkpoint
is the adapter, the optimizer and a small cursor, and a resumed run ends in the same bytes as one that was
never stopped."""

from __future__ import annotations

import math
import signal
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from datetime import date
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_map
from safetensors.numpy import load_file
from safetensors.numpy import save as serialise

from tunesmith import adapters, events
from tunesmith.adapters import merging
from tunesmith.display import console
from tunesmith.display.tensorboard import board_sink
from tunesmith.engine import scoring
from tunesmith.errors import ConfigError, Diverged, OutOfMemory, RankLost, TunesmithError
from tunesmith.events import Notice, Sink
from tunesmith.files import flush
from tunesmith.learning import optimizer
from tunesmith.machine import backend, ranks
from tunesmith.machine.ranks import ONE, Ranks
from tunesmith.model import loading as model
from tunesmith.runs import checkpoints, lineage, manifest
from tunesmith.runs.checkpoints import Cursor
from tunesmith.runs.config import LOWER, SKIPS_BEFORE_STOP, RunConfig
from tunesmith.runs.directory import EVENTS, FROZEN, LOG, OPTIMIZER, REFERENCE, Run, name, require_free
from tunesmith.settings.config import flat
from tunesmith.tokens.batches import Cut, Group
from tunesmith.training import gradients, preparation, reference
from tunesmith.training.caution import Watch
from tunesmith.training.frozen import Lower
from tunesmith.training.gradients import Accumulation, Gradients
from tunesmith.training.instruments import Grown, Measured, Stages, activations, due, row_losses


def train(
    config: RunConfig,
    origins: Mapping[str, str] | None = None,
    *,
    out: Path | None = None,
    resume: Run | None = None,
    notes: Sequence[str] = (),
    notify: Sink = events.silent,
) -> Run | None:
    """Train as ``config`` says and return the run directory, with its last checkpoint written; None on ranks
    but the first.

    out: the new run directory (default ``runs/<day>-<model>-<objective>-<id>``). resume: go on with this run
    instead. Raises DataError, TemplateError, ModelError before step 1, TrainingError later; what was saved
    stays."""
    early: list[Notice] = []  # what is noticed before there is a run to write it to

    def hear(event: events.Event) -> None:
        if isinstance(event, Notice):
            early.append(event)
        notify(event)

    among = ranks.join(hear)
    if not among.writes:
        notify = events.silent
    if resume is None and out is not None and among.writes:
        require_free(out)
    device = backend.setup()
    config = lineage.anchored(config) if resume is None else config
    changed = manifest.moved(resume, manifest.facts(config, {}, among.size)) if resume else ()
    for text in (*config.warnings(), *notes, *device.notes, *changed):
        hear(Notice(text, level="warning"))
    if device.blas == "reference":
        hear(Notice("MLX computes with its slow reference BLAS", level="warning", hint=device.blas_hint))
    prepared = preparation.prepare(
        config, hear, audited=resume is not None
    )  # files → examples → tokens → plan; bad rows stop it
    if config.optimizer.warmup(prepared.plan.steps) >= prepared.plan.steps:
        hear(
            Notice(
                "the warm-up is as long as the run: the learning rate never reaches its peak", level="warning"
            )
        )
    loaded = merging.load(config.model, hear)  # base weights, frozen, quantised if asked
    attached = config.adapter.attach(loaded.net, config.loop.seed)  # what is trainable
    before = begin(config, loaded, hear)  # adapters that it goes on from
    gradients.require(loaded.net, config, prepared.train, hear)
    hashes = prepared.hashes | {"base": loaded.fingerprint}
    hashes |= {"start": before["start"]["sha256"]} if "start" in before else {}
    if resume is not None:
        manifest.require_same(resume, config, hashes)
    run = resume
    if run is None and among.writes:
        place = out or Path("runs") / name(config, date.today())
        run = Run.create(
            place,
            config,
            origins or {},
            manifest.facts(config, hashes, among.size, before, prepared.accepted),
        )
    with ExitStack() as held:
        if run is not None and among.writes:
            held.enter_context(run.lock())
            held.enter_context(run.room())
        stop = held.enter_context(_interruptible(among))
        state = optimizer.build(config.optimizer, loaded.net)
        among.require_agreement(_without_paths(config), sorted(map(str, flat(hashes).values())))
        if (
            prepared.objective.needs_reference
        ):  # before a checkpoint is restored: the model is as it was before training
            with _before_training(run if among.writes else None, hear):
                own = run.path / REFERENCE if run and among.writes else None
                prepared = reference.compared(
                    prepared, config, loaded, own=own, among=among, stopped=stop.is_set, notify=hear
                )
        known = len(early)
        cursor = restore(resume, loaded.net, state, among, hear) if resume is not None else Cursor()
        among.require_agreement(cursor.step, cursor.sha256)
        if cursor.step:
            del early[:known]  # said before, when the run began
        emit = events.silent
        if run is not None and among.writes:
            emit = _sinks(run, cursor, prepared.plan.steps, config.loop.tensorboard, early, notify, held)
            preparation.write(run, prepared)
        if cursor.step == 0:
            where = str(run.path) if run else ""
            emit(
                events.RunStarted(
                    where, prepared.plan.steps, attached.trainable, attached.total, prepared.counts
                )
            )
        Loop(run, config, loaded.net, state, prepared, emit, stop, among).finish(cursor)
    return run if among.writes else None


@contextmanager
def _before_training(run: Run | None, notify: Sink) -> Iterator[None]:
    """What fails or is stopped inside leaves a run that says so, and that goes on with what was measured."""
    try:
        yield
    except BaseException as error:
        if run is not None:
            stopped = isinstance(error, KeyboardInterrupt)
            run.mark("interrupted" if stopped else "failed")
            if stopped:
                notify(
                    Notice(
                        f"stopped before step 1, what was measured is kept; go on with: {run.hint}",
                        level="warning",
                    )
                )
        if isinstance(error, RuntimeError | MemoryError) and backend.is_out_of_memory(error):
            what = f"the device ran out of memory: {error}"
            raise OutOfMemory(what, where="before step 1", hint="lower batch.tokens, in a new run") from error
        raise


def begin(config: RunConfig, loaded: model.Loaded, notify: Sink = events.silent) -> dict[str, Any]:
    """Fill the adapter with the one that training goes on from; where it and a merged one come from."""
    found: dict[str, Any] = {}
    if config.model.adapter is not None:
        found["merged"] = lineage.origin(config.model.adapter, loaded.files)
    if config.adapter.start is not None:
        found["start"] = lineage.origin(config.adapter.start, loaded.fingerprint)
        adapters.go_on(loaded.net, config.adapter, Path(config.adapter.start))
        notify(Notice(f"training goes on from the adapter {config.adapter.start}"))
    return found


def _without_paths(config: RunConfig) -> dict[str, Any]:
    """The settings without the places of files, which may differ from machine to machine."""
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


@dataclass
class Loop:
    """One run in progress: what the steps share."""

    run: Run | None  # None on ranks that do not write
    config: RunConfig
    net: nn.Module
    optimizer: Any
    prepared: preparation.Prepared
    emit: Sink
    stop: threading.Event
    ranks: Ranks = ONE
    lower: Lower | None = None

    def __post_init__(self) -> None:
        self.grown, self.watch = Grown(self.net), Watch(self.prepared.objective.needs_reference)

    @property
    def hint(self) -> str:
        return self.run.hint if self.run else "start all ranks again with --resume"

    def finish(self, cursor: Cursor) -> None:
        """Train from ``cursor`` to the end of the plan, to an early stop, or to an interruption; then
        save."""
        started = time.perf_counter() - cursor.elapsed_s
        status, why = "failed", None
        try:
            with gradients.checkpointed(self.net) if self.config.loop.checkpoint_gradients else ExitStack():
                status, why = self._fit(cursor, started)
        except TunesmithError as error:
            why = error.what
            raise
        except KeyboardInterrupt:
            status, why = "interrupted", f"at once, before the step was finished; go on with: {self.hint}"
            raise
        except (RuntimeError, MemoryError) as error:
            why = f"{type(error).__name__}: {error}"
            if not backend.is_out_of_memory(error):
                raise
            raise OutOfMemory(
                f"the device ran out of memory: {error}",
                where=f"after step {cursor.step}",
                hint=f"lower batch.tokens or loop.sample_tokens, in a new run; or try: {self.hint}",
            ) from error
        finally:
            self.emit(events.RunEnded(status, cursor.step, time.perf_counter() - started, why))
            if self.lower and (not self.ranks.writes or status in ("completed", "stopped_early")):
                self.lower.close()
            if self.run and self.ranks.writes:
                self.run.mark(status)

    def _fit(self, cursor: Cursor, started: float) -> tuple[str, str | None]:
        """(status, why) after the last update. Every save leaves the cursor at the update that it holds."""
        spec, plan = self.config.loop, self.prepared.plan
        accumulation = self.accumulation()
        accumulation.probe(cursor)
        if cursor.step == 0:
            self._validate(cursor)
            self._sample(0)
        if tired := self._tired(cursor):  # the process died between the last save and the end
            return tired
        for step in range(cursor.step, plan.steps):
            stopping = self.update(step, cursor, accumulation)
            cursor.step = done = step + 1
            cursor.elapsed_s = time.perf_counter() - started
            last = done == plan.steps
            best = False
            if last or (spec.validate_every and done % spec.validate_every == 0):
                best = self._validate(cursor)
            tired = self._tired(cursor)
            stopping = stopping or (self.ranks.size == 1 and self.stop.is_set())
            if last or tired or (spec.sample_every and done % spec.sample_every == 0):
                self._sample(done)
            due = spec.save_every and done % spec.save_every == 0
            if last or tired or due or (best and spec.keep_best is not False) or stopping:
                self._save(cursor)
            if tired:
                return tired
            if stopping and not last:
                return "interrupted", f"go on with: {self.hint}"
        return "completed", None

    def accumulation(self) -> Accumulation:
        """Where the sums of an update come from; with frozen lower layers kept on disk if asked."""
        config, rows, plan = self.config, self.prepared.train, self.prepared.plan
        if config.loop.cache_frozen:
            shared = self.run.path / FROZEN if self.run and self.ranks.writes else None
            self.lower = Lower(self.net, shared or Path(tempfile.mkdtemp(prefix="tunesmith-")))
            size = self.lower.open(rows)
            self.emit(
                Notice(
                    f"{self.lower.depth} layers below the adapter: what they say is kept on disk, {size / 1e9:.2f} GB"
                )
            )
        ranks = self.ranks
        shapes = (
            gradients.frequent_shapes(plan, rows, ranks.rank, ranks.size) if plan.cut.bucket else frozenset()
        )
        gradients_of = Gradients(self.net, config, shapes, self.lower, self.prepared.objective)
        return Accumulation(gradients_of, self.net, rows, plan, config, self.ranks, self.emit)

    def _tired(self, cursor: Cursor) -> tuple[str, str] | None:
        patience = self.config.loop.early_stop
        if patience is None or cursor.stale < patience:
            return None
        return "stopped_early", f"no better validation {self.config.loop.best} in {cursor.stale} validations"

    def update(self, step: int, cursor: Cursor, accumulation: Accumulation) -> bool:
        """One optimizer update: sums of loss and gradients over micro-batches and ranks, divided by the units
        once.

        Returns whether any rank was asked to stop.
        """
        clock = Stages()
        spec, plan, objective = self.config.optimizer, self.prepared.plan, self.prepared.objective
        groups = [self.prepared.train[member] for member in plan.members(step)]
        units = sum(objective.units(group) for group in groups)
        before = cursor.tokens
        twins = reference.twins(self.prepared, self.config, step)
        baseline, watched = reference.baseline(twins, self._logps(twins, cursor))
        clock("reference")
        loss, sums, found = accumulation.sums(step, cursor, baseline)
        clock("gradients")
        budgets = mx.array(
            [float(cursor.tokens or 0) * (rank == self.ranks.rank) for rank in range(self.ranks.size)]
        )
        found = mx.array(found, mx.float32)  # as they came; one rank has each of them
        loss, stop, budgets, found, sums = self.ranks.total(
            [loss, mx.array(float(self.stop.is_set())), budgets, found, sums]
        )
        clock("reduce")
        cursor.tokens = min((int(tokens) for tokens in np.array(budgets) if tokens), default=None)
        if cursor.tokens != before:
            what = f"the device ran out of memory: from step {step + 1} on, at most {cursor.tokens} tokens at once"
            self.emit(Notice(what, level="warning", hint=f"for the next run: batch.tokens={cursor.tokens}"))
        means = tree_map(lambda leaf: leaf / units, sums)
        del sums
        norm = optimizer.global_norm(means)
        mx.eval(loss, means, norm)
        mean, size = float(np.array(loss)) / units, float(np.array(norm))
        rate, stopping = spec.rate(step, plan.steps), bool(np.array(stop))
        if not (math.isfinite(mean) and math.isfinite(size)):
            cursor.skipped += 1
            rows = [group.source for group in groups]
            self.emit(events.StepSkipped(step + 1, str(mean), str(size), rows, cursor.skipped))
            if cursor.skipped >= SKIPS_BEFORE_STOP:
                raise Diverged(
                    f"{cursor.skipped} updates in a row were not finite (loss {mean}, gradient norm {size})",
                    where=", ".join(rows),
                    hint="look at these rows with `tunesmith show`; else lower optimizer.learning_rate",
                )
            return stopping
        cursor.skipped = 0
        clock("optimizer")
        measured = Measured(self.net, means) if due(self.config.loop, step + 1, plan.steps) else None
        clock("other")
        if spec.max_norm is not None:
            means = optimizer.clip(means, norm, spec.max_norm)
        (measured.apply if measured else optimizer.apply)(self.optimizer, self.net, means, rate)
        clock("optimizer")
        logps = np.array(found, dtype=np.float64)
        watched |= objective.metrics(groups, logps)
        further = (measured.event(step + 1),) if measured else ()
        padding, memory = accumulation.padding(step, cursor), backend.memory()
        clock("other")
        self.emit(
            events.StepDone(
                step + 1,
                (step + 1) / plan.steps_per_epoch,
                mean,
                units,
                sum(group.tokens for group in groups),
                rate,
                size,
                spec.max_norm is not None and size > spec.max_norm,
                sum(clock.seconds.values()),
                memory,
                accumulation.shapes,
                sum(group.units for group in groups),
                watched,
                padding,
                clock.seconds,
            )
        )
        for event in (row_losses(step + 1, step // plan.steps_per_epoch + 1, groups, logps), *further):
            self.emit(event)
        self.watch.step(watched, self.emit)
        return stopping

    def _logps(
        self, groups: Sequence[Group], cursor: Cursor, tick: Callable[[int, int], None] | None = None
    ) -> np.ndarray:
        """(S,) Σ weight · log p of all sequences of ``groups``, without gradient and dropout; ranks share the
        work."""
        if not groups:
            return np.zeros(0)
        parts = [np.zeros(len(group.sequences)) for group in groups]
        mine = range(self.ranks.rank, len(groups), self.ranks.size)
        sums = scoring.sequence_sums(
            self.net, [groups[index] for index in mine], self._cut(groups, cursor), tick
        )
        for index, found in zip(mine, sums, strict=True):
            parts[index] = np.array([logp for logp, _ in found])
        return self.ranks.total_float(np.concatenate(parts))

    def _cut(self, groups: Sequence[Group], cursor: Cursor) -> Cut:
        """For passes without gradient, within the budget that the run came down to."""
        cut, _ = Cut.around(self.config.batch, groups)
        return cut if cursor.tokens is None else replace(cut, tokens=cursor.tokens)

    def _validate(self, cursor: Cursor) -> bool:
        """All validation rows, if any, and the weights; True when what `LoopSpec.best` names is the best so
        far."""
        best = bool(self.prepared.valid) and self._held_out(cursor)
        if self.ranks.writes:
            self.emit(self.grown.event(cursor.step))
            if self.config.loop.activations:
                self.emit(activations(self.net, self.prepared.valid or self.prepared.train, cursor.step))
        return best

    def _held_out(self, cursor: Cursor) -> bool:
        start = time.perf_counter()
        objective, valid = self.prepared.objective, self.prepared.valid
        twins = reference.twins(self.prepared, self.config, None)
        every = self._logps([*valid, *twins], cursor, events.ticker(self.emit, "validating"))
        logps, of_twins = np.split(every, [len(every) - len(twins)])
        baseline, watched = reference.baseline(twins, of_twins)
        watched |= objective.metrics(valid, logps)
        fields = objective.fields(valid, baseline)
        losses = objective.losses(mx.array(logps, mx.float32), mx.array(fields, mx.float32))
        units = sum(objective.units(group) for group in valid)
        loss = float(np.array(losses, dtype=np.float64).sum()) / units
        imitated = np.array([flag for group in valid for flag in objective.imitated(group)])
        learned = float(np.concatenate([group.learned for group in valid])[imitated].sum())
        perplexity = math.exp(min(-float(logps[imitated].sum()) / learned, 700.0)) if learned else math.nan
        value = {"loss": loss, "perplexity": perplexity, **watched}.get(name := self.config.loop.best)
        if value is None or (name == "perplexity" and not learned):
            what = f"loop.best is {name}, and the held-out rows do not give it"
            hint = "it may need rows of both kinds, or more of them; loss is always there"
            raise ConfigError(what, where="loop.best", hint=hint)
        held = cursor.best_value
        best = math.isfinite(value) and (held is None or (value < held if name in LOWER else value > held))
        if best:
            cursor.best_step, cursor.best_value, cursor.stale = cursor.step, value, 0
        else:
            cursor.stale += 1
        seconds = time.perf_counter() - start
        self.emit(events.Validated(cursor.step, loss, perplexity, units, len(valid), seconds, best, watched))
        self.watch.validation(watched, self.emit)
        return best

    def _sample(self, step: int) -> None:
        """Greedy answers to prompts spread evenly over the validation rows."""
        if not self.ranks.writes:
            return
        chosen = preparation.prompts(
            self.prepared.valid_examples, self.prepared.renderer, self.config.loop.samples
        )
        if not chosen:
            return
        renderer = self.prepared.renderer
        self.net.eval()
        answers = model.generate(
            self.net,
            [one.ids for one in chosen],
            max_tokens=self.config.loop.sample_tokens,
            eos_ids=renderer.eos_ids,
            on_done=events.ticker(self.emit, "sampling"),
        )
        for one, answer in zip(chosen, answers, strict=True):
            self.emit(events.Sampled(step, one.text, renderer.answer(answer.ids), one.reference))

    def _save(self, cursor: Cursor) -> None:
        if self.run is None or not self.ranks.writes:
            return
        start = time.perf_counter()
        tensors = optimizer.state(self.optimizer)
        needed = sum(value.nbytes for value in tensors.values())
        needed += sum(value.nbytes for value in adapters.trainable(self.net).values())
        flush(self.run.path / EVENTS)
        cursor.events_bytes = (self.run.path / EVENTS).stat().st_size

        def write(folder: Path) -> None:
            adapters.save(self.net, self.config.adapter, folder)
            # Through Python's own writing: a full disk is then an OSError, and the file has the user's usual
            # mode.
            (folder / OPTIMIZER).write_bytes(serialise(tensors))

        size = checkpoints.save(self.run, cursor, write, needed)
        checkpoints.retain(self.run, cursor, self.config.loop)
        path = self.run.checkpoint(cursor.step)
        self.emit(events.Saved(cursor.step, str(path), size, time.perf_counter() - start))


def restore(run: Run, net: nn.Module, state: Any, among: Ranks, notify: Sink) -> Cursor:
    """Load the newest whole checkpoint into ``net`` and ``state``, or start where there is none. Torn ones
    are named."""
    torn: list[str] = []
    newest = checkpoints.newest(run, lambda error: torn.append(str(error))) if among.writes else None
    for text in torn:
        notify(Notice(f"{text}; the checkpoint before it is used", level="warning"))
    # The first rank sets torn ones aside; the others wait for its word.
    step = int(among.total_float(np.array([newest.step if newest else 0], dtype=np.float64))[0])
    if step == 0:
        return Cursor()
    folder = run.checkpoint(step)
    cursor = checkpoints.read(run, step)
    adapters.load_tensors(net, folder)
    optimizer.restore(state, load_file(folder / OPTIMIZER))
    return cursor


@contextmanager
def _interruptible(among: Ranks) -> Iterator[threading.Event]:
    """An event that SIGINT and SIGTERM set: the step is saved. A second one interrupts at once (SIGTERM: one
    rank)."""
    stop = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return

    def handle(number: int, frame: object) -> None:
        if stop.is_set() and (
            number == signal.SIGINT or among.size == 1
        ):  # `mlx.launch` repeats SIGTERM once a rank is gone
            raise KeyboardInterrupt
        stop.set()

    before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    except RankLost:  # this process ends by itself, after it has said why
        before[signal.SIGTERM] = signal.SIG_IGN
        raise
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _sinks(
    run: Run,
    cursor: Cursor,
    steps: int,
    tensorboard: bool,
    early: list[Notice],
    notify: Sink,
    open_files: ExitStack,
) -> Sink:
    """Events go to the run directory and to ``notify``. What was logged after the checkpoint is cut: it is
    done again."""
    path = run.path / EVENTS
    redone = 0
    resuming = path.exists()
    if resuming:
        with path.open("rb+") as stream:
            whole = (
                stream.read(cursor.events_bytes).rfind(b"\n") + 1
            )  # a power cut can leave the log shorter than that
            if whole < cursor.events_bytes:
                early.append(
                    Notice("the log lost its end before the checkpoint", level="warning", where=str(path))
                )
            redone = sum(line.startswith(b'{"kind": "StepDone"') for line in stream)
            stream.truncate(whole)
    kept = [
        events.jsonl(open_files.enter_context(path.open("a", encoding="utf-8"))),
        console.log(open_files.enter_context((run.path / LOG).open("a", encoding="utf-8"))),
    ]
    if tensorboard:
        kept.append(open_files.enter_context(board_sink(run.path / "tensorboard")))
    keep = events.tee(kept)
    for event in early:
        keep(event)

    def emit(event: events.Event) -> None:
        if not isinstance(event, events.Working):
            keep(event)
        notify(event)

    if resuming:
        emit(events.Resumed(cursor.step, redone, steps))
        run.mark("running")
    return emit
