"""What will this run need: memory, disk and time, each with an interval, before its first update."""

from __future__ import annotations

import gc
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from tunesmith import events
from tunesmith.adapters import merging
from tunesmith.adapters.specs import Attached
from tunesmith.display.console import duration, size
from tunesmith.errors import DataError, OutOfMemory
from tunesmith.events import Event, Notice, Sink
from tunesmith.machine import backend
from tunesmith.machine.memory import room
from tunesmith.model import integrity, kernels
from tunesmith.runs import forecasts
from tunesmith.runs.config import RunConfig
from tunesmith.runs.directory import Run
from tunesmith.runs.forecasts import Amount, Forecast, MeasuredRun, Term
from tunesmith.tokens.batches import Cut, Group, bucketed
from tunesmith.training import anatomy, footprint, frozen, ordering, preparation, reference
from tunesmith.training.anatomy import Anatomy
from tunesmith.training.footprint import Micro, Moment
from tunesmith.training.pace import UpdatePace
from tunesmith.training.preparation import Prepared

MEMORY_SPREAD = 0.12
"""Half of the interval of what is not exact, as a share of it: activations, logits, gradients
(`bench/plan.py`, nine of ten)."""
MEASURED_MEMORY_SPREAD = 0.06
OTHER_SPREAD = (0.35, 0.60)
"""Below and above, where the kernels are not those that the factors were fitted to: on a GPU, in half
precision, with recurrent layers."""
TIME_FACTOR, OTHER_TIME_FACTOR, MEASURED_TIME_FACTOR = 1.8, 3.0, 1.2
"""The interval of a time: divided and multiplied by it."""
EXACT_SPREAD = 0.01
SMALL_BYTES = 1e6
"""Rows on the device and other small arrays, which count in tiny models only."""
LOGS_BYTES = 20e6
"""Log, report and pictures of a run."""
ANSWERED_AT_ONCE = 16
"""Prompts that are answered in one batch."""
PROBES = 3
"""Products that are timed; the best counts, since other programs disturb some."""
SOME_UPDATES = 16
"""Updates of whose mismatched pairs the time is computed."""
LARGE = 0.1
"""Weights files of a larger share of the memory are looked at before they are read: on a CPU four bits become
32."""

Sized = tuple[Micro, int]
"""A micro-batch and the length of its longest row."""


@dataclass(frozen=True)
class Calibration:
    """What two measured updates say. ``memory``: measured over computed bytes above what is exact.
    ``time``: measured over computed seconds."""

    memory: float
    time: float


@dataclass(frozen=True)
class Needs:
    """What a run computes, and everything that is computed of it."""

    config: RunConfig
    prepared: Prepared
    anatomy: Anatomy
    updates: tuple[tuple[Sized, ...], ...]
    """The micro-batches of the updates that are looked at, on the first rank."""
    frozen_bytes: int
    recomputed: bool
    calibration: Calibration | None = None

    @classmethod
    def of(
        cls,
        config: RunConfig,
        prepared: Prepared,
        net: nn.Module,
        settings: Mapping[str, Any],
        ranks: int = 1,
    ) -> Needs:
        """net: with its adapter, evaluated or not; settings: its config.json."""
        prepared = ordering.assumed(prepared, config)
        lower = frozen.Lower(net) if config.loop.cache_frozen and frozen.depth(net) else None
        return cls(
            config,
            prepared,
            anatomy.of(net, settings),
            updates(prepared, ranks),
            lower.needed(prepared.train) if lower else 0,
            config.loop.checkpoint_gradients,
        )

    def replanned(self, config: RunConfig, prepared: Prepared) -> Needs:
        """The same model and adapter with other rows or micro-batches."""
        prepared = ordering.assumed(prepared, config)
        recomputed = config.loop.checkpoint_gradients
        return replace(
            self, config=config, prepared=prepared, updates=updates(prepared), recomputed=recomputed
        )

    @property
    def exact(self) -> float:
        """Bytes that are known from shapes alone: weights, adapter and optimizer state."""
        state = footprint.state_bytes(self.anatomy, self.config.optimizer.kind)
        return self.anatomy.weights_bytes + self.anatomy.adapter_bytes + state

    @property
    def training_moment(self) -> Moment:
        """Of the micro-batch that needs most."""
        front = _front(micro for update in self.updates for micro, _ in update)
        return max(map(self.moment_of, front), key=lambda moment: moment.total)

    def moment_of(self, micro: Micro) -> Moment:
        several = any(len(update) > 1 for update in self.updates)
        return footprint.training(self.anatomy, micro, recomputed=self.recomputed, several=several)

    @property
    def stepping_moment(self) -> Moment:
        instrumented = self.config.loop.instrument_every > 0
        return footprint.stepping(self.anatomy, self.config.optimizer.kind, instrumented=instrumented)

    def moments(self) -> list[Moment]:
        """Everything but the updates' own passes that the run does with the weights in memory."""
        spec, prepared, anatomy = self.config, self.prepared, self.anatomy
        moments = [self.stepping_moment]
        if prepared.valid:
            moments += _scored("validation", spec, anatomy, prepared.valid)
        for name, groups in self._passes_before.items():
            moments += _scored(name, spec, anatomy, groups)
        if prompts := self._prompts():
            at_once = min(len(prompts), ANSWERED_AT_ONCE)
            moments.append(footprint.sampling(anatomy, at_once, max(prompts), spec.loop.sample_tokens))
        if anatomy.largest:
            moments.append(footprint.measuring(anatomy))
        return moments

    @property
    def _passes_before(self) -> dict[str, list[Group]]:
        """Passes over rows before the first update, by name."""
        prepared, passes = self.prepared, {}
        if self.config.data.order == "difficulty":
            passes["measuring difficulty"] = ordering.judged(prepared)
        if prepared.objective.needs_reference:
            passes["the reference pass"] = [*prepared.train, *prepared.valid]
        return passes

    def _prompts(self) -> list[int]:
        """Tokens of each prompt that is answered as a sample."""
        prepared, spec = self.prepared, self.config.loop
        count = max(spec.samples, spec.scored_prompts)
        rows = preparation.prompts(prepared.valid_examples, prepared.renderer, count)
        prompts = [*preparation.own_prompts(prepared, spec.prompts), *rows]
        return sorted((len(prompt.ids) for prompt in prompts), reverse=True)

    def forecast(self, rate: float | None = None) -> Forecast:
        """rate: operations a second of large products; None: measured now, in less than a second."""
        moments = [self.training_moment, *self.moments()]
        factor = self.calibration.memory if self.calibration else 1.0
        peak = max(moments, key=lambda moment: moment.total)
        transient = self._uncertain(peak.total * factor)
        exact = Amount(self.exact, self.exact * (1 - EXACT_SPREAD), self.exact * (1 + EXACT_SPREAD))
        whole = exact + transient + Amount(0.0, 0.0, SMALL_BYTES)
        machine, spec = room(), self.config
        pace = self.pace(rate or product_rate())
        update, total = self._times(pace)
        return Forecast(
            memory=self._terms(peak, factor),
            moment=peak.name,
            peak=whole,
            beside=self._beside(moments, peak, factor),
            program=machine.program,
            ceiling=machine.ceiling,
            others=machine.others,
            disk=self._disk(spec),
            steps=self.prepared.plan.steps,
            update_s=update,
            total_s=total,
            basis="measured updates" if self.calibration else "shapes",
            swap=machine.swap,
        )

    def _uncertain(self, value: float) -> Amount:
        """``value`` bytes that follow from the factors of `footprint`."""
        below, above = OTHER_SPREAD if not fitted(self.anatomy) else (MEMORY_SPREAD, MEMORY_SPREAD)
        if self.calibration:
            below = above = MEASURED_MEMORY_SPREAD
        return Amount(value, value * (1 - below), value * (1 + above))

    def _terms(self, peak: Moment, factor: float) -> tuple[Term, ...]:
        anatomy, state = self.anatomy, footprint.state_bytes(self.anatomy, self.config.optimizer.kind)
        exact = {
            "weights": (anatomy.weights_bytes, _held(anatomy)),
            "trained weights": (anatomy.adapter_bytes, ""),
            "optimizer state": (state, self.config.optimizer.kind),
        }
        recomputed = "recomputed block by block" if self.recomputed else ""
        others = {
            "gradients": (peak.gradients, ""),
            "activations": (peak.activations, recomputed),
            "logits and loss": (peak.logits, "" if anatomy.separable else "of all positions"),
            "cache and temporary arrays": (peak.other, ""),
        }
        terms = [Term(name, Amount(value, value, value), note) for name, (value, note) in exact.items()]
        terms += [Term(name, self._uncertain(value * factor), note) for name, (value, note) in others.items()]
        return tuple(term for term in terms if term.amount.value > 0)

    def _beside(self, moments: Sequence[Moment], peak: Moment, factor: float) -> tuple[Term, ...]:
        """The other moments, each with what it needs beside weights, adapter and optimizer state; and what
        the allocator keeps."""
        terms = [
            Term(moment.name, self._uncertain(moment.total * factor), "not at the peak")
            for moment in moments
            if moment is not peak
        ]
        if backend.setup().kind == "gpu":
            note = "freed arrays that MLX keeps, and gives back when memory is short"
            terms.append(Term("the allocator's cache", Amount(0.0, 0.0, peak.total * factor), note))
        return tuple(terms)

    def _disk(self, spec: RunConfig) -> tuple[Term, ...]:
        """What the run writes."""
        saved = self.anatomy.adapter_bytes + footprint.state_bytes(self.anatomy, spec.optimizer.kind)
        steps, every = self.prepared.plan.steps, spec.loop.save_every
        number = (
            min(spec.loop.keep_last + bool(self.prepared.valid), 1 + (steps // every if every else 0)) + 1
        )
        sequences = reference.count(self.prepared, spec)
        terms = {
            "checkpoints": (saved * number, f"{number} at once"),
            "the frozen layers' hidden states": (self.frozen_bytes, "loop.cache_frozen"),
            "reference log-probabilities": (80.0 * sequences, f"{sequences:,} sequences"),
            "logs and report": (LOGS_BYTES, ""),
        }
        return tuple(
            Term(name, Amount(value, value, 1.1 * value), note)
            for name, (value, note) in terms.items()
            if value > 0
        )

    def pace(self, rate: float) -> UpdatePace:
        pace = UpdatePace(self.anatomy, self.recomputed, rate)
        return replace(pace, correction=self.calibration.time) if self.calibration else pace

    def step_s(self, pace: UpdatePace, step: int) -> float:
        """Seconds of update ``step``, with the pass over mismatched pairs that some objectives make."""
        seconds = pace.update(self.updates[step])
        if self.prepared.objective.needs_reference:
            if pairs := reference.twins(self.prepared, self.config, step):
                seconds += _scoring_s(pace, self.config, pairs)
        return seconds

    def update_s(self, pace: UpdatePace) -> float:
        """Seconds of an update, on average."""
        looked_at = range(len(self.updates))
        if self.prepared.objective.needs_reference:  # pairs are made anew for each
            looked_at = looked_at[:: max(1, len(looked_at) // SOME_UPDATES)]
        return statistics.fmean(self.step_s(pace, step) for step in looked_at)

    @property
    def _validations(self) -> int:
        every = self.config.loop.validate_every
        return 1 + (self.prepared.plan.steps // every if every else 1)

    @property
    def _answers(self) -> int:
        """Batches of prompts that the run answers: samples, the user's own prompts at checkpoints, and those
        by which adherence is scored."""
        spec, steps, has_valid = self.config.loop, self.prepared.plan.steps, bool(self.prepared.valid)
        batches = 0
        if spec.prompts or (spec.samples and has_valid):
            batches += 2 + (steps // spec.sample_every if spec.sample_every else 0)
        if spec.prompts and spec.save_every:
            batches += steps // spec.save_every
        if has_valid:
            batches += self._validations * math.ceil(spec.scored_prompts / ANSWERED_AT_ONCE)
        return batches

    def _times(self, pace: UpdatePace) -> tuple[Amount, Amount]:
        """Seconds of an update, on average, and of the run."""
        spec, steps = self.config.loop, self.prepared.plan.steps
        update = self.update_s(pace)
        total = steps * update + self._answers * pace.generating(spec.sample_tokens)
        if self.prepared.valid:
            total += self._validations * _scoring_s(pace, self.config, self.prepared.valid)
        for groups in self._passes_before.values():
            total += _scoring_s(pace, self.config, groups)
        factor = OTHER_TIME_FACTOR if not fitted(self.anatomy) else TIME_FACTOR
        if self.calibration:
            factor = MEASURED_TIME_FACTOR
        return Amount(update, update / factor, update * factor), Amount(total, total / factor, total * factor)


def fitted(anatomy: Anatomy) -> bool:
    """Whether the factors were fitted to what computes this model: compiled kernels in float32."""
    return kernels.choice() == "compiled" and anatomy.element == 4 and not anatomy.recurrent


def product_rate() -> float:
    """Operations a second of a large product, in the dtype of training."""
    device = backend.setup()
    if device.kind == "gpu":
        return backend.gflops(4096, 10) * 1e9
    size = 384 if device.blas == "reference" else 1024
    return max(backend.gflops(size, 1) for _ in range(PROBES)) * 1e9


def updates(prepared: Prepared, ranks: int = 1) -> tuple[tuple[Sized, ...], ...]:
    """The micro-batches of the updates that are looked at: on the first rank, which has the longest rows."""
    plan, rows = prepared.plan, prepared.train
    learned = [row.n_learned for row in rows]

    def sized(micro: Sequence[int]) -> Sized:
        tokens = plan.cut.size([plan.lengths[index] for index in micro])
        n_learned = sum(learned[index] for index in micro)
        n_learned = bucketed(max(1, n_learned)) if plan.cut.bucket else n_learned
        part = Micro(tokens, n_learned, rows[micro[0]].distilled)
        return part, max(rows[index].length for index in micro)

    return tuple(tuple(map(sized, plan.update(step, 0, ranks))) for step in plan.looked_at)


def _front(micros: Iterable[Micro]) -> list[Micro]:
    """Those of which no other of its kind has both more tokens and more learned ones."""
    fronts: dict[bool, list[Micro]] = {False: [], True: []}
    for micro in sorted(set(micros), key=lambda micro: (-micro.tokens, -micro.learned)):
        front = fronts[micro.distilled]
        if not front or micro.learned > front[-1].learned:
            front.append(micro)
    return [*fronts[False], *fronts[True]]


def _passes(config: RunConfig, groups: Sequence[Group]) -> list[Sized]:
    """The micro-batches of a pass without gradients, in which sequences are single."""
    cut = Cut.forward(config.batch, groups)
    sequences = [sequence for group in groups for sequence in group.sequences]
    lengths = [max(1, len(sequence.ids) - 1) for sequence in sequences]
    learned = [int(np.count_nonzero(sequence.targets[1:])) for sequence in sequences]
    return [
        (
            Micro(cut.size([lengths[index] for index in part]), sum(learned[index] for index in part)),
            max(lengths[index] for index in part),
        )
        for part in cut(lengths, range(len(lengths)))
    ]


def _scored(name: str, config: RunConfig, anatomy: Anatomy, groups: Sequence[Group]) -> list[Moment]:
    front = _front(micro for micro, _ in _passes(config, groups))
    moments = [footprint.scoring(name, anatomy, micro) for micro in front]
    return [max(moments, key=lambda moment: moment.total)]


def _scoring_s(pace: UpdatePace, config: RunConfig, groups: Sequence[Group]) -> float:
    return sum(pace.scoring(micro, length) for micro, length in _passes(config, groups))


def _held(anatomy: Anatomy) -> str:
    """Which weights are in memory, if not all are computed."""
    held, active = anatomy.held_weights, anatomy.active_weights
    if held == active:
        return ""
    return f"{held / 1e9:.2f} billion weights in the blocks, of which a token meets {active / 1e9:.2f}"


@dataclass(frozen=True)
class Outline:
    """A model with its adapter of which only headers were read. ``config``: with the settings that depend on
    the model; ``settings``: its config.json."""

    config: RunConfig
    net: nn.Module
    settings: Mapping[str, Any]
    attached: Attached

    @classmethod
    def of(cls, config: RunConfig, notify: Sink = events.silent) -> Outline:
        """Raises ModelError or ConfigError as `story.open_model` does."""
        loaded = merging.load(config.model, notify, lazily=True)
        settled = config.model_copy(update={"adapter": config.adapter.settled(loaded.net)})
        attached = settled.adapter.attach(loaded.net, config.loop.seed, lazily=True)
        return cls(settled, loaded.net, loaded.config, attached)

    def needs(self, prepared: Prepared, ranks: int = 1) -> Needs:
        return Needs.of(self.config, prepared, self.net, self.settings, ranks)


def require_room_for_large(config: RunConfig, prepared: Prepared, ranks: int, anyway: bool) -> None:
    """Raises OutOfMemory before the weights of a large model are read, if the run cannot fit."""
    if anyway or integrity.stored_bytes(config.model.path) < LARGE * room().ceiling:
        return
    require_room(Outline.of(config).needs(prepared, ranks).forecast(), anyway)


def require_room(forecast: Forecast, anyway: bool) -> None:
    """Raises OutOfMemory if even the low end of the interval is more than this machine has."""
    if forecast.cannot_fit and not anyway:
        text = f"needs {size(forecast.needed.low)} at least, and this machine has {size(forecast.ceiling)}"
        fit = f"tunesmith plan --fit {0.9 * forecast.ceiling / 1e6:.0f}MB"
        hint = f"{fit} with the same settings proposes changes; train --anyway starts all the same"
        raise OutOfMemory(f"the run {text}", where="before step 1", hint=hint)


def lines(forecast: Forecast) -> list[str]:
    """The forecast in one line, and in another one what to beware of."""
    needed = forecast.needed
    memory = f"{size(needed.value)} of memory at the peak ({_range(needed)}) of {size(forecast.ceiling)}"
    times = [f"{duration_range(forecast.update_s)} an update, {duration_range(forecast.total_s)} in all"]
    said = [f"plan: {memory}; {times[0]}"]
    if forecast.may_not_fit and not forecast.cannot_fit:
        others = f"other programs hold {size(forecast.others)}"
        said.append(f"it may not fit, since {others}: close them, or see tunesmith plan --fit")
    return said


def _range(amount: Amount) -> str:
    return f"{size(amount.low)} to {size(amount.high)}"


def duration_range(amount: Amount) -> str:
    """``10 s to 25 s``, or one of them if they are the same in words."""
    low, high = _seconds(amount.low), _seconds(amount.high)
    return low if low == high else f"{low} to {high}"


def _seconds(seconds: float) -> str:
    return f"{seconds:.2g} s" if seconds < 10 else duration(seconds)


def held_before() -> int:
    """Bytes of the arrays that this process holds."""
    gc.collect()  # what nobody can use any more would be freed during the run
    return mx.get_active_memory()


@dataclass
class Watched:
    """A sink that passes events on to ``emit``, and measures what the run needs. ``held``: bytes of arrays
    that the process held before the run, such as those of another model in a notebook."""

    emit: Sink
    held: int = 0
    seconds: list[float] = field(default_factory=list)
    resident: int = 0
    step: int = 0
    total_s: float = 0.0
    status: str = "failed"

    def __call__(self, event: Event) -> None:
        if isinstance(event, events.StepDone):
            self.seconds.append(event.seconds)
            self.resident = max(self.resident, event.memory["resident"])
            self.step = event.step
        elif isinstance(event, events.RunEnded):
            self.total_s, self.status = event.seconds, event.status
        self.emit(event)

    def write(self, run: Run, predicted: Forecast) -> None:
        """Write what was measured beside what was predicted; nothing if no update was made."""
        if not self.seconds:
            return
        before: MeasuredRun | None = None
        try:
            if (written := forecasts.read(run)) is not None:
                predicted, before = written.predicted, written.measured
        except DataError as error:
            self.emit(Notice(f"{error.what}: it is written anew", level="warning", where=error.where))
        outcome = MeasuredRun(
            max(0, mx.get_peak_memory() - self.held),
            self.resident,
            statistics.median(self.seconds),
            self.total_s,
            self.step,
            self.status,
        )
        forecasts.write(run, predicted, forecasts.joined(before, outcome))
