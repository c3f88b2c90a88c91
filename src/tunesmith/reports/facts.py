"""What did a run do? The run directory's files, read into types. Nothing is judged here.

A field is empty or None if the run did not get so far. Losses are in the unit of the objective (SFT: nats a
learned token), perplexity is e to nats a token, memory is bytes, times are seconds."""

from __future__ import annotations

import math
import shlex
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from operator import mul
from pathlib import Path
from typing import Any, TypeVar

from pydantic import ConfigDict
from typing_extensions import TypedDict

from tunesmith import events
from tunesmith.errors import SHOWN, EvaluationError
from tunesmith.files import checked, parse_json, read_json
from tunesmith.reports.measures import Measure
from tunesmith.reports.row_losses import RowClasses, classify
from tunesmith.runs import artefacts, records
from tunesmith.runs.artefacts import Exported
from tunesmith.runs.directory import (
    AUDIT,
    COMPOSED,
    CONFIG,
    DROPPED,
    EVENTS,
    INDEX,
    MANIFEST,
    ORIGIN,
    PLAN,
    RESTORE,
    Manifest,
)
from tunesmith.runs.records import Record
from tunesmith.settings import origins as sources
from tunesmith.settings.config import flat

Kind = TypeVar("Kind", bound=events.Event)
T = TypeVar("T")
LOSS_UNIT = "nats a learned token"
REMOVE = "put it back from a copy of the run, or remove it: the report then goes without it"


class Counts(TypedDict, total=False):
    """``data/plan.json``: what was read, dropped and planned. An objective adds counts of its own."""

    __pydantic_config__ = ConfigDict(extra="allow")  # pyright: ignore[reportGeneralTypeIssues]

    rows_read: int
    rows_dropped: dict[str, int]
    rows_train: int
    rows_valid: int
    sequences_train: int
    sequences_valid: int
    tokens: int
    supervised_tokens: int
    padding_share: float
    steps: int
    loss: str
    notes: dict[str, int]
    labels: dict[str, int]
    mix: dict[str, dict[str, Any]]


@dataclass(frozen=True)
class UpdateCounts:
    planned: int | None = None
    done: int = 0
    clipped: int = 0
    skipped: tuple[events.StepSkipped, ...] = ()
    resumed: tuple[events.Resumed, ...] = ()


@dataclass(frozen=True)
class TrainedWeights:
    trainable: int
    total: int


@dataclass(frozen=True)
class TrainingLoss:
    """Mean training loss of the first and of the last ``updates_each`` updates with rows of the task, over
    these; and the same for rows of ``data.mix``, or None if nothing is mixed in."""

    first: float
    last: float
    updates_each: int
    mixed_first: float | None = None
    mixed_last: float | None = None


@dataclass(frozen=True)
class SampledAnswer:
    step: int
    answer: str


@dataclass(frozen=True)
class PromptSamples:
    """All answers to one prompt in the course of training. ``after``: the last; None if it was asked once."""

    prompt: str
    reference: str | None
    before: SampledAnswer
    after: SampledAnswer | None
    answers: tuple[SampledAnswer, ...]


@dataclass(frozen=True)
class EvaluationFacts:
    """A record, with how many answers were ``cut`` at the longest length, how many ``examples`` it has, and
    how many of them changed in which way (None if that is not defined)."""

    record: Record
    cut: int = 0
    examples: int = 0
    changes: Mapping[str, int] | None = None


@dataclass(frozen=True)
class Times:
    seconds: float | None = None
    training_s: float = 0.0
    validating_s: float = 0.0
    saving_s: float = 0.0
    scoring_s: float = 0.0


@dataclass(frozen=True)
class TokenSpeeds:
    learned: float | None = None
    all: float | None = None


@dataclass(frozen=True)
class WatchedMeans:
    """Means of the objective's metrics over a tenth of the run, up to step ``to_step``."""

    to_step: int
    means: Mapping[str, float]


@dataclass(frozen=True)
class ModuleSpreads:
    """By module: minimum, quartiles and maximum of the gradient norm, and of ‖update‖ / ‖weight‖, over its
    layers and the measured updates."""

    gradient: Mapping[str, list[float]] = field(default_factory=dict)
    ratio: Mapping[str, list[float]] = field(default_factory=dict)


@dataclass(frozen=True)
class AuditedFinding:
    rule: str
    severity: str
    what: str
    count: int | None = None
    of: int | None = None
    hint: str | None = None
    accepted: str | None = None


@dataclass(frozen=True)
class AuditSummary:
    """The audit's verdict and findings, without the rows of the data."""

    verdict: str | None = None
    rows: int | None = None
    findings: tuple[AuditedFinding, ...] = ()


@dataclass(frozen=True)
class GroupedNotice:
    """Equal notices together: ``count`` is their sum, ``where`` lists the places."""

    level: str
    what: str
    count: int
    where: tuple[str, ...]
    hint: str | None


@dataclass(frozen=True)
class DroppedRow:
    source: str
    reason: str
    message: str


@dataclass(frozen=True)
class DroppedRows:
    """How many rows were left out for which reason, and the first of them."""

    reasons: Mapping[str, int] = field(default_factory=dict)
    first: tuple[DroppedRow, ...] = ()

    @property
    def total(self) -> int:
        return sum(self.reasons.values())


@dataclass(frozen=True)
class CheckpointIndex:
    """``checkpoints/index.json``: steps."""

    last: int
    best: int | None
    kept: tuple[int, ...]
    metric: str | None = None
    best_value: float | None = None

    @property
    def used(self) -> int:
        """The step that ``best`` selects: the last if the best was not kept."""
        return self.best if self.best is not None and self.best in self.kept else self.last


@dataclass(frozen=True)
class Facts:
    """``origins``: where each setting that is not a default was given. ``unread``: evaluations and exports
    that could not be read."""

    run: Path
    status: str = "unfinished"
    why: str | None = None
    updates: UpdateCounts = UpdateCounts()
    weights: TrainedWeights | None = None
    counts: Mapping[str, Any] = field(default_factory=dict)
    training_loss: TrainingLoss | None = None
    validation: tuple[events.Validated, ...] = ()
    samples: tuple[PromptSamples, ...] = ()
    growth: events.Growth | None = None
    evaluations: tuple[EvaluationFacts, ...] = ()
    artefacts: tuple[Exported, ...] = ()
    time: Times = Times()
    stages: Mapping[str, float] = field(default_factory=dict)
    speeds: TokenSpeeds = TokenSpeeds()
    padding: float | None = None
    watched: tuple[WatchedMeans, ...] = ()
    gradients: ModuleSpreads = ModuleSpreads()
    rows: RowClasses | None = None
    memory_peak: Mapping[str, int] = field(default_factory=dict)
    audit: AuditSummary | None = None
    notices: tuple[GroupedNotice, ...] = ()
    unread: tuple[events.Notice, ...] = ()
    dropped: DroppedRows = DroppedRows()
    checkpoints: CheckpointIndex | None = None
    origins: Mapping[str, str] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)
    manifest: Mapping[str, Any] = field(default_factory=dict)

    @property
    def measures(self) -> list[Measure]:
        """Every score with its record."""
        return [
            Measure(score, evaluation.record)
            for evaluation in self.evaluations
            for score in evaluation.record.scores
        ]

    @property
    def loss_unit(self) -> str:
        return str(self.counts.get("loss", LOSS_UNIT))

    @property
    def ended(self) -> bool:
        """Whether training reached its end, or there was none."""
        return self.status in ("completed", "stopped_early", COMPOSED)

    @property
    def reproduce(self) -> list[str]:
        """The commands that repeat this run while its data and base are unchanged."""
        run = shlex.quote(str(self.run))
        lines = [f"tunesmith train --config {shlex.quote(str(self.run / CONFIG))} --out {run}-again"]
        return lines + ([f"tunesmith evaluate {run}-again"] if self.evaluations else [])


def read(run_dir: Path, log: Sequence[events.Event]) -> Facts:
    """log: the run's events. An evaluation that cannot be read is left out and named in ``unread``. Raises
    EvaluationError, with file, key and cure, if another file of the run cannot be read."""
    run_dir = run_dir.resolve()
    steps = only(log, events.StepDone)
    started = next(reversed(only(log, events.RunStarted)), None)
    manifest = _load(run_dir / MANIFEST, Manifest, RESTORE) or {}
    status, ended = _status(log, manifest)
    evaluations, unread = _evaluations(run_dir)
    exported, unreadable = artefacts.read(run_dir)
    unread += [_unread("not in this report", error) for error in unreadable]
    return Facts(
        run=run_dir,
        status=status,
        why=ended and ended.why,
        updates=UpdateCounts(
            started and started.steps,
            len(steps),
            sum(step.clipped for step in steps),
            tuple(only(log, events.StepSkipped)),
            tuple(only(log, events.Resumed)),
        ),
        weights=started and TrainedWeights(started.trainable, started.total),
        counts=_counts(run_dir, started),
        training_loss=_training_loss(steps),
        validation=tuple(only(log, events.Validated)),
        samples=tuple(_samples(only(log, events.Sampled))),
        growth=next(reversed(only(log, events.Growth)), None),
        evaluations=tuple(evaluations),
        artefacts=tuple(exported),
        time=_times(log, ended),
        stages=_stages(steps),
        speeds=_speeds(steps),
        padding=_padding(steps),
        watched=tuple(_watched(steps)),
        gradients=_gradients(log),
        rows=classify(log) if only(log, events.RowLosses) else None,
        memory_peak={
            name: max(step.memory[name] for step in steps if name in step.memory)
            for name in dict.fromkeys(name for step in steps for name in step.memory)
        },
        audit=_load(run_dir / AUDIT, AuditSummary, REMOVE),
        notices=tuple(_notices([*log, *unread])),
        unread=tuple(unread),
        dropped=_dropped(run_dir / DROPPED),
        checkpoints=checkpoints(run_dir),
        origins={key: origin for key, origin in given(run_dir).items() if not origin.startswith("default")},
        settings=settings(run_dir),
        manifest=manifest,
    )


def read_log(run_dir: Path) -> list[events.Event]:
    """The run's events in order; empty if it did not get so far. Raises EvaluationError if the file cannot be
    read."""
    path = run_dir / EVENTS
    try:
        return list(events.read(path)) if path.exists() else []
    except OSError as error:
        message = f"cannot be read: {error.strerror}"
        raise EvaluationError(message, where=str(path), hint=RESTORE) from error


def only(log: Sequence[events.Event], kind: type[Kind]) -> list[Kind]:
    return [event for event in log if isinstance(event, kind)]


def settings(run_dir: Path) -> dict[str, Any]:
    """Every setting as key path → value. Raises ConfigError if they cannot be read."""
    path = run_dir / CONFIG
    if not path.exists():
        return {}
    return flat(sources.plain(sources.read(path, lambda line: f"{path}:{line}", sources.RECORDED)) or {})


def given(run_dir: Path) -> dict[str, str]:
    """Key path → where the setting was given."""
    return _load(run_dir / ORIGIN, dict[str, str], REMOVE) or {}


def loss_unit(log: Sequence[events.Event]) -> str:
    return next((event.counts.get("loss", LOSS_UNIT) for event in only(log, events.RunStarted)), LOSS_UNIT)


def mean_loss(steps: Sequence[events.StepDone]) -> float:
    """Mean over the task's learned tokens of these updates, not over updates: a short update weighs less."""
    units = sum(step.task_units for step in steps)
    total = sum(step.task_loss * step.task_units for step in steps if step.task_units)
    return total / units if units else math.nan


def mean_mixed_loss(steps: Sequence[events.StepDone]) -> float | None:
    """As `mean_loss`, over the rows of ``data.mix``; None if these updates have none."""
    mixed = [(step.mixed_loss, step.mixed_units) for step in steps if step.mixed_loss is not None]
    units = sum(count for _, count in mixed)
    return sum(loss * count for loss, count in mixed) / units if units else None


def trailing(values: Sequence[float], window: int, weights: Sequence[float] | None = None) -> list[float]:
    """The mean of each value and the ``window`` − 1 values before it, weighted by ``weights`` if given."""
    weighted = weights if weights is not None else [1.0] * len(values)
    parts = [slice(max(0, end - window), end) for end in range(1, len(values) + 1)]
    sums = [(sum(map(mul, values[part], weighted[part])), sum(weighted[part])) for part in parts]
    return [total / weight if weight else math.nan for total, weight in sums]


def evenly(items: Sequence[T], most: int) -> list[T]:
    """At most ``most`` of ``items``: the first, the last, and evenly between."""
    count = min(len(items), most)
    return [items[round(index * (len(items) - 1) / max(count - 1, 1))] for index in range(count)]


def five(values: Sequence[float]) -> list[float]:
    """Minimum, quartiles and maximum."""
    ranked = sorted(values)
    return [ranked[round(share * (len(ranked) - 1))] for share in (0, 0.25, 0.5, 0.75, 1)]


def module(weight: str) -> str:
    """The weight's name without its layer: ``model.layers.3.self_attn.q_proj.lora_a`` →
    ``self_attn.q_proj.lora_a``."""
    parts = weight.split(".")
    last = max((index for index, part in enumerate(parts) if part.isdigit()), default=-1)
    return ".".join(parts[last + 1 :]) or weight


def layer(weight: str) -> str:
    """The number of the weight's layer, "–" if it is in none."""
    return next((part for part in reversed(weight.split(".")) if part.isdigit()), "–")


def _status(log: Sequence[events.Event], manifest: Mapping[str, Any]) -> tuple[str, events.RunEnded | None]:
    """A run that was resumed after its end has not ended; one that was composed has no log."""
    if manifest.get("status") == COMPOSED:
        return COMPOSED, None
    marks = (events.RunEnded, events.RunStarted, events.Resumed)
    last = next((event for event in reversed(log) if isinstance(event, marks)), None)
    if isinstance(last, events.RunEnded):
        return last.status, last
    return "running" if manifest.get("status") == "running" else "unfinished", None


def _training_loss(steps: Sequence[events.StepDone]) -> TrainingLoss | None:
    window = max(1, len(steps) // 20)
    if not steps:
        return None
    task = [step for step in steps if step.task_units] or steps
    mixed = [step for step in steps if step.mixed_loss is not None]
    return TrainingLoss(
        mean_loss(task[:window]),
        mean_loss(task[-window:]),
        window,
        mean_mixed_loss(mixed[:window]),
        mean_mixed_loss(mixed[-window:]),
    )


def _samples(sampled: Sequence[events.Sampled]) -> Iterator[PromptSamples]:
    by_prompt: dict[tuple[str, str | None], list[SampledAnswer]] = {}
    for event in sampled:
        answers = by_prompt.setdefault((event.prompt, event.reference), [])
        answers.append(SampledAnswer(event.step, event.answer))
    for (prompt, reference), answers in by_prompt.items():
        after = answers[-1] if len(answers) > 1 else None
        yield PromptSamples(prompt, reference, answers[0], after, tuple(answers))


def _times(log: Sequence[events.Event], ended: events.RunEnded | None) -> Times:
    return Times(
        ended and ended.seconds,
        sum(event.seconds for event in only(log, events.StepDone)),
        sum(event.seconds for event in only(log, events.Validated)),
        sum(event.seconds for event in only(log, events.Saved)),
        sum(event.adherence_seconds for event in only(log, events.Validated)),
    )


def _stages(steps: Sequence[events.StepDone]) -> dict[str, float]:
    total: Counter[str] = Counter()
    for step in steps:
        total.update(step.stages)
    return dict(total)


def _speeds(steps: Sequence[events.StepDone]) -> TokenSpeeds:
    seconds = sum(step.seconds for step in steps)
    if not seconds:
        return TokenSpeeds()
    learned = sum(step.units if step.learned is None else step.learned for step in steps)
    return TokenSpeeds(learned / seconds, sum(step.tokens for step in steps) / seconds)


def _padding(steps: Sequence[events.StepDone]) -> float | None:
    """Its share of all positions, over the updates that recorded it; updates of earlier releases did not."""
    measured = [step for step in steps if step.stages and step.padding < 1]
    positions = sum(step.tokens / (1 - step.padding) for step in measured)
    return 1 - sum(step.tokens for step in measured) / positions if positions else None


def _watched(steps: Sequence[events.StepDone]) -> Iterator[WatchedMeans]:
    """Over tenths of the run, since one step has few rows of each kind."""
    size = -(-len(steps) // 10) if steps else 1
    for start in range(0, len(steps), size):
        part = steps[start : start + size]
        values: dict[str, list[float]] = {}
        for step in part:
            for name, value in step.metrics.items():
                values.setdefault(name, []).append(value)
        if values:
            means = {name: sum(metric) / len(metric) for name, metric in values.items()}
            yield WatchedMeans(part[-1].step, means)


def _gradients(log: Sequence[events.Event]) -> ModuleSpreads:
    gradient: dict[str, list[float]] = {}
    ratio: dict[str, list[float]] = {}
    for event in only(log, events.Instruments):
        for by_module, values in ((gradient, event.gradient), (ratio, event.ratios)):
            for weight, value in values.items():
                by_module.setdefault(module(weight), []).append(value)
    spreads = [{name: five(values) for name, values in sorted(kind.items())} for kind in (gradient, ratio)]
    return ModuleSpreads(*spreads)


def _evaluations(run_dir: Path) -> tuple[list[EvaluationFacts], list[events.Notice]]:
    evaluations: list[EvaluationFacts] = []
    readable, unreadable = records.read(run_dir)
    unread = [_unread("not in this report", error) for error in unreadable]
    for record in readable:
        try:
            examples = list(record.examples())
        except EvaluationError as error:
            unread.append(_unread("its numbers are in this report, its prompts are not", error))
            evaluations.append(EvaluationFacts(record))
            continue
        moved = Counter(example.change for example in examples if example.change is not None)
        changes = {name: moved[name] for name in ("improved", "unchanged", "regressed")} if moved else None
        cut = sum(example.cut for example in examples)
        evaluations.append(EvaluationFacts(record, cut, len(examples), changes))
    return evaluations, unread


def _unread(text: str, error: EvaluationError) -> events.Notice:
    return events.Notice(f"{text}: {error.what}", "warning", where=error.where, hint=error.hint)


def _counts(run_dir: Path, started: events.RunStarted | None) -> Counts:
    if started is not None:
        return checked(started.counts, Counts, f"{run_dir / EVENTS}: RunStarted", EvaluationError, RESTORE)
    return _load(run_dir / PLAN, Counts, REMOVE) or {}


def _notices(log: Sequence[events.Event]) -> list[GroupedNotice]:
    """Warnings first, skipped updates among them."""
    notices = only(log, events.Notice)
    for event in only(log, events.StepSkipped):
        loss = f"loss {event.loss}, gradient norm {event.gradient_norm}"
        notices.append(
            events.Notice(f"step {event.step} skipped: {loss}, rows {', '.join(event.rows)}", "warning")
        )
    groups: dict[tuple[str, str, str | None], list[events.Notice]] = {}
    for notice in sorted(notices, key=lambda notice: notice.level != "warning"):
        groups.setdefault((notice.level, notice.what, notice.hint), []).append(notice)
    return [
        GroupedNotice(
            level,
            text,
            sum(notice.count for notice in equal),
            tuple(notice.where for notice in equal if notice.where is not None),
            hint,
        )
        for (level, text, hint), equal in groups.items()
    ]


def _dropped(path: Path) -> DroppedRows:
    if not path.exists():
        return DroppedRows()
    try:
        with path.open("rb") as lines:
            rows = [
                parse_json(line, DroppedRow, f"{path}:{number}", EvaluationError, REMOVE)
                for number, line in enumerate(lines, 1)
                if line.strip()
            ]
    except OSError as error:
        message = f"cannot be read: {error.strerror}"
        raise EvaluationError(message, where=str(path), hint=REMOVE) from error
    return DroppedRows(dict(sorted(Counter(row.reason for row in rows).items())), tuple(rows[:SHOWN]))


def checkpoints(run_dir: Path) -> CheckpointIndex | None:
    return _load(run_dir / INDEX, CheckpointIndex, REMOVE)


def _load(path: Path, kind: type[T], hint: str) -> T | None:
    """What the file at ``path`` holds, or None if there is none."""
    return read_json(path, kind, EvaluationError, hint) if path.exists() else None
