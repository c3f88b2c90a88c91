"""From settings to a trained adapter in a run directory: the story, and the loop.

State is arithmetic: the order of rows and every dropout mask are functions of (seed, step), so a checkpoint is the
adapter, the optimizer and a small cursor, and a resumed run ends in the same bytes as one that was never stopped.
"""

from __future__ import annotations

import functools
import math
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_map
from safetensors.numpy import load_file
from safetensors.numpy import save as serialise

from tunesmith import adapters, backend, console, events, model, objectives, optimizer, preparation, template
from tunesmith.batches import Group, by_length, collate
from tunesmith.errors import Diverged, OutOfMemory, TunesmithError
from tunesmith.events import Notice, Sink
from tunesmith.run import EVENTS, LOG, OPTIMIZER, Cursor, Run, RunConfig, facts, flush, name, require_free

SKIPS_BEFORE_STOP = 3


def train(
    config: RunConfig,
    origins: Mapping[str, str] | None = None,
    *,
    out: Path | None = None,
    resume: Run | None = None,
    notes: Sequence[str] = (),
    notify: Sink = events.silent,
) -> Run:
    """Train as ``config`` says and return the run directory, with its last checkpoint written.

    out: the new run directory (default ``runs/<day>-<model>-<objective>-<id>``). resume: go on with this run instead.
    Raises DataError, TemplateError, ModelError before step 1, TrainingError later; what was saved stays.
    """
    early: list[Notice] = []  # what is noticed before there is a run to write it to

    def hear(event: events.Event) -> None:
        if isinstance(event, Notice):
            early.append(event)
        notify(event)

    if resume is None and out is not None:
        require_free(out)
    device = backend.setup()
    config = config.anchored() if resume is None else config
    for text in (*config.warnings(), *notes, *device.notes, *(resume.moved(facts(config, {})) if resume else ())):
        hear(Notice(text, level="warning"))
    if device.blas == "reference":
        hear(Notice("MLX computes with its slow reference BLAS", level="warning", hint=device.blas_hint))
    prepared = preparation.prepare(config, hear)  # files → examples → tokens → plan of updates; bad rows stop it here
    if config.optimizer.warmup(prepared.plan.steps) >= prepared.plan.steps:
        hear(Notice("the warm-up is as long as the run: the learning rate never reaches its peak", level="warning"))
    loaded = model.load(config.model, hear)  # base weights, frozen, quantised if asked
    attached = config.adapter.attach(loaded.net, config.loop.seed)  # what is trainable
    if resume is None:
        given = facts(config, prepared.hashes | {"base": loaded.fingerprint})
        run = Run.create(out or Path("runs") / name(config, date.today()), config, origins or {}, given)
    else:
        run = resume
        run.require_same(config, prepared.hashes | {"base": loaded.fingerprint})
    with run.lock(), run.room(), _interruptible() as stop, ExitStack() as open_files:
        state = optimizer.build(config.optimizer, loaded.net)
        known = len(early)
        cursor = restore(run, loaded.net, state, hear) if resume is not None else Cursor()
        if cursor.step:
            del early[:known]  # said before, when the run began
        emit = _sinks(run, cursor, prepared.plan.steps, config.loop.tensorboard, early, notify, open_files)
        preparation.write(run, prepared)
        if cursor.step == 0:
            emit(events.RunStarted(str(run.path), prepared.plan.steps, attached.trainable, attached.total, prepared.counts))
        loop = Loop(run, config, loaded.net, state, prepared, emit, stop)
        loop.finish(cursor)
    return run


@dataclass
class Loop:
    """One run in progress: what the steps share."""

    run: Run
    config: RunConfig
    net: nn.Module
    optimizer: Any
    prepared: preparation.Prepared
    emit: Sink
    stop: threading.Event

    def finish(self, cursor: Cursor) -> None:
        """Train from ``cursor`` to the end of the plan, to an early stop, or to an interruption; then save."""
        started = time.perf_counter() - cursor.elapsed_s
        status, why = "failed", None
        try:
            with checkpointed(self.net) if self.config.loop.checkpoint_gradients else ExitStack():
                status, why = self._fit(cursor, started)
        except TunesmithError as error:
            why = error.what
            raise
        except KeyboardInterrupt:
            status, why = "interrupted", f"at once, before the step was finished; go on with: {self.run.hint}"
            raise
        except RuntimeError as error:
            why = f"{type(error).__name__}: {error}"
            if "alloc" not in str(error).lower() and "memory" not in str(error).lower():
                raise
            raise OutOfMemory(
                f"the device ran out of memory: {error}",
                where=f"step {cursor.step + 1}",
                hint=f"lower batch.micro or batch.length, or set loop.checkpoint_gradients; then: {self.run.hint}",
            ) from error
        finally:
            self.emit(events.RunEnded(status, cursor.step, time.perf_counter() - started, why))
            self.run.mark(status)

    def _fit(self, cursor: Cursor, started: float) -> tuple[str, str | None]:
        """(status, why) after the last update. Every save leaves the cursor at the update that it holds."""
        spec, plan = self.config.loop, self.prepared.plan
        gradients_of = gradient_function(self.net, self.config)
        if cursor.step == 0:
            self._validate(cursor)
            self._sample(0)
        if tired := self._tired(cursor):  # the process died between the last save and the end
            return tired
        for step in range(cursor.step, plan.steps):
            self._update(step, cursor, gradients_of)
            cursor.step = done = step + 1
            cursor.elapsed_s = time.perf_counter() - started
            last = done == plan.steps
            best = False
            if last or (spec.validate_every and done % spec.validate_every == 0):
                best = self._validate(cursor)
            tired, stopping = self._tired(cursor), self.stop.is_set()
            if last or tired or (spec.sample_every and done % spec.sample_every == 0):
                self._sample(done)
            due = spec.save_every and done % spec.save_every == 0
            if last or tired or due or (best and spec.keep_best is not False) or stopping:
                self._save(cursor)
            if tired:
                return tired
            if stopping and not last:
                return "interrupted", f"go on with: {self.run.hint}"
        return "completed", None

    def _tired(self, cursor: Cursor) -> tuple[str, str] | None:
        patience = self.config.loop.early_stop
        if patience is None or cursor.stale < patience:
            return None
        return "stopped_early", f"no better validation loss in {cursor.stale} validations"

    def _update(self, step: int, cursor: Cursor, gradients_of: GradientFunction) -> None:
        """One optimizer update: sums of loss and gradients over the micro-batches, divided by the units once."""
        start = time.perf_counter()
        spec = self.config.optimizer
        members = self.prepared.plan.update(step)
        groups = [[self.prepared.train[index] for index in micro] for micro in members]
        units = sum(group.units for micro in groups for group in micro)
        self.net.train()
        loss, gradients = mx.array(0.0), None
        for index, micro in enumerate(groups):
            adapters.seed_dropout(self.net, dropout_key(self.config.loop.seed, step, index))
            part, part_gradients = gradients_of(micro)
            loss = loss + part
            gradients = part_gradients if gradients is None else tree_map(mx.add, gradients, part_gradients)
            mx.eval(loss, gradients)
        assert gradients is not None
        gradients = tree_map(lambda leaf: leaf / units, gradients)
        norm = optimizer.global_norm(gradients)
        mean, size = float(np.array(loss)) / units, float(np.array(norm))
        rate = spec.rate(step, self.prepared.plan.steps)
        if not (math.isfinite(mean) and math.isfinite(size)):
            cursor.skipped += 1
            rows = [group.source for micro in groups for group in micro]
            self.emit(events.StepSkipped(step + 1, str(mean), str(size), rows, cursor.skipped))
            if cursor.skipped >= SKIPS_BEFORE_STOP:
                raise Diverged(
                    f"{cursor.skipped} updates in a row were not finite (loss {mean}, gradient norm {size})",
                    where=", ".join(rows),
                    hint="look at these rows with `tunesmith show`; else lower optimizer.learning_rate",
                )
            return
        cursor.skipped = 0
        if spec.max_norm is not None:
            gradients = optimizer.clip(gradients, norm, spec.max_norm)
        optimizer.apply(self.optimizer, self.net, gradients, rate)
        self.emit(
            events.StepDone(
                step + 1, (step + 1) / self.prepared.plan.steps_per_epoch, mean, units,
                sum(group.tokens for micro in groups for group in micro), rate, size,
                spec.max_norm is not None and size > spec.max_norm, time.perf_counter() - start, backend.memory(),
            )
        )  # fmt: skip

    def _validate(self, cursor: Cursor) -> bool:
        """All validation rows; True when the loss is the lowest so far."""
        if not self.prepared.valid:
            return False
        start = time.perf_counter()
        scores = row_losses(self.net, self.prepared.valid, self.config.batch.at_once, events.ticker(self.emit, "validating"))
        units = sum(units for _, units in scores)
        loss = sum(total for total, _ in scores) / units
        best = math.isfinite(loss) and (cursor.best_loss is None or loss < cursor.best_loss)
        if best:
            cursor.best_step, cursor.best_loss, cursor.stale = cursor.step, loss, 0
        else:
            cursor.stale += 1
        seconds = time.perf_counter() - start
        perplexity = math.exp(min(loss, 700.0))
        self.emit(events.Validated(cursor.step, loss, perplexity, units, len(scores), seconds, best))
        growth = {key: norm for key, (norm, _) in adapters.growth(self.net).items()}
        self.emit(events.Growth(cursor.step, growth))
        return best

    def _sample(self, step: int) -> None:
        """Greedy answers to prompts spread evenly over the validation rows."""
        chosen = preparation.prompts(self.prepared.valid_examples, self.prepared.renderer, self.config.loop.samples)
        if not chosen:
            return
        renderer = self.prepared.renderer
        self.net.eval()
        answers = model.generate(
            self.net, [one.ids for one in chosen], max_tokens=self.config.loop.sample_tokens,
            eos_ids=renderer.eos_ids, on_done=events.ticker(self.emit, "sampling"),
        )  # fmt: skip
        for one, answer in zip(chosen, answers, strict=True):
            self.emit(events.Sampled(step, one.text, renderer.answer(answer.ids), one.reference))

    def _save(self, cursor: Cursor) -> None:
        start = time.perf_counter()
        tensors = optimizer.state(self.optimizer)
        needed = sum(value.nbytes for value in tensors.values())
        needed += sum(value.nbytes for value in adapters.trainable(self.net).values())
        flush(self.run.path / EVENTS)
        cursor.events_bytes = (self.run.path / EVENTS).stat().st_size

        def write(folder: Path) -> None:
            adapters.save(self.net, self.config.adapter, folder)
            # Through Python's own writing: a full disk is then an OSError, and the file has the user's usual mode.
            (folder / OPTIMIZER).write_bytes(serialise(tensors))

        size = self.run.save(cursor, write, needed)
        self.run.retain(cursor, self.config.loop)
        path = self.run.checkpoint(cursor.step)
        self.emit(events.Saved(cursor.step, str(path), size, time.perf_counter() - start))


GradientFunction = Callable[[list[Group]], "tuple[mx.array, dict]"]


def gradient_function(net: nn.Module, config: RunConfig) -> GradientFunction:
    """micro-batch → (sum of loss (), gradients of that sum for the trainable tensors)."""
    logprobs = functools.partial(objectives.learned_logprobs, gather=model.split_head(net))

    def total(groups: list[Group]) -> mx.array:
        return config.objective.loss(net, collate(groups), logprobs).loss

    return nn.value_and_grad(net, total)


def row_losses(
    net: nn.Module, groups: list[Group], micro: int, tick: Callable[[int, int], None] | None = None
) -> list[tuple[float, float]]:
    """(sum of loss in nats, units) of each group, in order, in evaluation mode. No group is left out."""
    gather = model.split_head(net)
    net.eval()
    scores: list[tuple[float, float]] = [(0.0, 0.0)] * len(groups)
    done = 0
    for members in by_length([group.length for group in groups], micro):
        sums = objectives.sequence_sums(net, collate([groups[index] for index in members]), gather=gather)
        for index in members:
            own, sums = sums[: len(groups[index].sequences)], sums[len(groups[index].sequences) :]
            scores[index] = (sum(loss for loss, _ in own), sum(units for _, units in own))
        done += len(members)
        if tick is not None:
            tick(done, len(groups))
    return scores


def dropout_key(seed: int, step: int, micro: int) -> mx.array:
    """The key of all dropout masks of one micro-batch: a function of its place in the run, not of a global generator."""
    return mx.random.key(int(np.random.SeedSequence([seed, step, micro]).generate_state(1, np.uint64)[0]))


def restore(run: Run, net: nn.Module, state: Any, notify: Sink) -> Cursor:
    """Load the newest whole checkpoint into ``net`` and ``state``, or start where there is none. Torn ones are named."""
    torn: list[str] = []
    cursor = run.newest(lambda error: torn.append(str(error)))
    for text in torn:
        notify(Notice(f"{text}; the checkpoint before it is used", level="warning"))
    if cursor is None:
        return Cursor()
    folder = run.checkpoint(cursor.step)
    adapters.load_tensors(net, folder)
    optimizer.restore(state, load_file(folder / OPTIMIZER))
    return cursor


@contextmanager
def checkpointed(net: nn.Module) -> Iterator[None]:
    """Inside, each layer of ``net`` is recomputed in the backward pass instead of kept.

    The class of these layer objects is swapped for a subclass and put back; other models in the process stay as they were.
    Dropout masks come from explicit keys, so that the second pass draws what the first drew.
    """
    layers: list[Any] = list(net.layers or [])
    kinds = [type(layer) for layer in layers]
    try:
        for layer in layers:
            layer.__class__ = _recomputing(type(layer))
        yield
    finally:
        for layer, kind in zip(layers, kinds, strict=True):
            layer.__class__ = kind


@functools.cache
def _recomputing(kind: type[nn.Module]) -> type[nn.Module]:
    def call(self: nn.Module, x: mx.array, *rest: Any, **options: Any) -> mx.array:
        if not self.training:
            return kind.__call__(self, x, *rest, **options)

        def run(parameters: dict, x: mx.array) -> mx.array:
            self.update(parameters)
            return kind.__call__(self, x, *rest, **options)

        return mx.checkpoint(run)(self.trainable_parameters(), x)

    return type(f"Recomputing{kind.__name__}", (kind,), {"__call__": call})


@contextmanager
def _interruptible() -> Iterator[threading.Event]:
    """An event that SIGINT and SIGTERM set: the step is finished and saved. A second signal interrupts at once."""
    stop = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return

    def handle(number: int, frame: object) -> None:
        if stop.is_set():
            raise KeyboardInterrupt
        stop.set()

    before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _sinks(
    run: Run, cursor: Cursor, steps: int, tensorboard: bool, early: list[Notice], notify: Sink, open_files: ExitStack
) -> Sink:
    """Events go to the run directory and to ``notify``. What was logged after the checkpoint is cut: it is done again."""
    path = run.path / EVENTS
    redone = 0
    resuming = path.exists()
    if resuming:
        with path.open("rb+") as stream:
            belongs = stream.read(cursor.events_bytes)
            whole = belongs.rfind(b"\n") + 1  # a power cut can leave the log shorter than the checkpoint knew it
            if whole < cursor.events_bytes:
                early.append(Notice("the log lost its end before the checkpoint", level="warning", where=str(path)))
            redone = sum(line.startswith(b'{"kind": "StepDone"') for line in stream)
            stream.truncate(whole)
    kept = [
        events.jsonl(open_files.enter_context(path.open("a", encoding="utf-8"))),
        console.log(open_files.enter_context((run.path / LOG).open("a", encoding="utf-8"))),
    ]
    if tensorboard:
        kept.append(open_files.enter_context(console.tensorboard(run.path / "tensorboard")))
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


def overfit_probe(steps: int = 10) -> tuple[float, float]:
    """(first, last) loss of a tiny random model that learns one sequence by heart, through the code that trains.

    Ten updates of AdamW at 2e-2 bring the loss from about ln 64 = 4.2 nats below 1: the bound that `doctor` asks for.
    """
    from mlx_lm.models import llama

    from tunesmith.formats import DataSpec

    random = np.random.Generator(np.random.PCG64(0))
    sizes = llama.ModelArgs(
        model_type="llama", hidden_size=32, num_hidden_layers=1, intermediate_size=64, num_attention_heads=2,
        rms_norm_eps=1e-5, vocab_size=64, num_key_value_heads=1,
    )  # fmt: skip
    net = llama.Model(sizes)
    net.update(
        tree_map(lambda p: mx.array(random.normal(0, 0.1, p.shape).astype(np.float32)) if p.ndim > 1 else p, net.parameters())
    )
    config = RunConfig(
        model=model.ModelSpec(path="probe"),
        data=DataSpec(train=("probe",), valid=0),
        adapter=adapters.Full.model_validate({}),
        optimizer=optimizer.OptimizerSpec(learning_rate=2e-2, schedule="constant"),
    )
    config.adapter.attach(net, 0)
    state = optimizer.build(config.optimizer, net)
    group = Group((template.Tokens(random.integers(0, 64, 32).astype(np.int32), np.ones(32, np.float32)),), "probe")
    gradients_of = gradient_function(net, config)
    net.train()
    losses: list[float] = []
    for step in range(steps):
        loss, gradients = gradients_of([group])
        losses.append(float(np.array(loss)) / group.units)
        gradients = tree_map(lambda leaf: leaf / group.units, gradients)
        optimizer.apply(state, net, gradients, config.optimizer.rate(step, steps))
    return losses[0], losses[-1]
