"""What a trial scored, row by row, and what it cost. Everything is read from its run directory."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePath
from typing import NamedTuple

from tunesmith import events
from tunesmith.display import words
from tunesmith.errors import ConfigError, EvaluationError
from tunesmith.evaluation import pairing, tasks
from tunesmith.evaluation.statistics import Statistic
from tunesmith.evaluation.tasks import Task
from tunesmith.reports import facts
from tunesmith.runs.directory import EVENTS
from tunesmith.runs.records import ExampleScore, Record
from tunesmith.sweeps.contrasts import RowValues
from tunesmith.sweeps.spec import LOSS, SweepSpec

RISE = 0.1
"""A held-out loss that ends above its start by more than this share of it has diverged."""


NOT_FINITE = "its held-out loss is not finite: it diverged"


class TrialCost(NamedTuple):
    """What a trial takes. ``memory_bytes``: the most that its process held. ``seconds``: of its updates.
    ``tokens``: that its updates computed, padding included."""

    trainable: int
    memory_bytes: int
    seconds: float
    tokens: float


@dataclass
class Follower:
    """The log of a run, read as it grows. ``looks``: held-out losses by step. ``steps``: updates that are
    planned. ``memory_bytes``: the most so far."""

    run_dir: Path
    looks: dict[int, RowValues] = field(default_factory=dict)
    steps: int | None = None
    memory_bytes: int = 0
    _read_bytes: int = 0

    def read(self) -> list[int]:
        """The steps of new validations."""
        path = self.run_dir / EVENTS
        try:
            size = path.stat().st_size
        except OSError:
            return []
        if size < self._read_bytes:  # cut back to a checkpoint: what comes again is the same
            self._read_bytes = 0
        new: list[int] = []
        with path.open("rb") as lines:
            lines.seek(self._read_bytes)
            for line in lines:
                if not line.endswith(b"\n"):
                    break
                self._read_bytes += len(line)
                self._take(line, new)
        return new

    def _take(self, line: bytes, new: list[int]) -> None:
        if not line.startswith(_READ):
            return
        event, _ = events.from_json(line)
        if isinstance(event, events.HeldOutLosses):
            if event.step not in self.looks:
                new.append(event.step)
            self.looks[event.step] = RowValues(event.losses, event.units)
        elif isinstance(event, events.RunStarted):
            self.steps = event.steps
        elif isinstance(event, events.StepDone | events.Probed):
            self.memory_bytes = max(self.memory_bytes, *event.memory.values(), 0)


_READ = tuple(
    f'{{"kind": "{kind.__name__}"'.encode()
    for kind in (events.HeldOutLosses, events.RunStarted, events.StepDone, events.Probed)
)


@dataclass(frozen=True)
class Metric:
    """What trials are compared by. ``task``: "" for the loss of the held-out rows. ``statistic``: how a row's
    number is read from its score, for tasks."""

    name: str
    unit: str
    lower_is_better: bool
    task: str = ""
    version: str = ""
    statistic: Statistic | None = None

    @property
    def share(self) -> bool:
        return self.statistic is not None and self.statistic.share

    def shown(self, mean: float) -> float:
        """The metric of a mean over rows, as perplexity of a mean loss."""
        import numpy as np

        return mean if self.statistic is None else float(self.statistic.finish(np.array(mean)))

    def text(self, value: float | None) -> str:
        """A value of the metric."""
        if value is not None and self.unit != "%" and math.isfinite(value):
            return f"{value:.4g}"
        return words.number(value, self.unit)

    def difference(self, value: float, *, signed: bool = False) -> str:
        """A difference between two values; of shares in points."""
        sign = "+" if signed else ""
        text = f"{100 * value:{sign}.1f} points" if self.unit == "%" else f"{value:{sign}.3g}"
        return text.replace("-", "−", 1) if text.startswith("-") else text

    def slope(self, mean: float) -> float:
        """How the metric changes with the mean over rows, near ``mean``: 1 for most, below 0 where it
        falls."""
        step = 1e-4
        return (self.shown(mean + step) - self.shown(mean - step)) / (2 * step)


def metric(spec: SweepSpec) -> Metric:
    """Raises ConfigError if ``spec.metric`` is not a number that the tasks under ``evaluate`` give, or is not
    a mean over rows."""
    if spec.metric == LOSS:
        return Metric("held-out loss", "", True)
    name, _, number = spec.metric.partition("/")
    try:
        groups = tasks.require(spec.evaluate, spec.evaluation)
    except EvaluationError as error:
        raise ConfigError(error.what, where="evaluate", hint=error.hint) from error
    known = [
        (kind, statistic)
        for group in groups
        for kind in group.kinds
        for statistic in kind.statistics
        if statistic.better is not None and kind.pairing == tasks.Pairing()
    ]
    for kind, statistic in known:
        if kind.name == name and (statistic.name == number if number else statistic.headline):
            return _of_task(kind, statistic)
    names = [kind.name + f"/{statistic.name}" * (not statistic.headline) for kind, statistic in known]
    hint = f"with these tasks it can be: {', '.join([LOSS, *sorted(set(names))])}"
    raise ConfigError("is not a number to compare trials by", where=f"metric: {spec.metric}", hint=hint)


def _of_task(kind: type[Task], statistic: Statistic) -> Metric:
    title = tasks.about(kind.name).title_of(statistic.name)
    lower = statistic.better == "lower"
    return Metric(title, statistic.unit or "%" * statistic.share, lower, kind.name, kind.version, statistic)


def scored(run_dir: Path, metric: Metric) -> RowValues | str:
    """What a finished trial scored on each row by ``metric``, or why that is not known. The loss is that of
    the checkpoint that every verb uses: the best if it was saved, else the last."""
    if metric.statistic is None:
        follower = Follower(run_dir)
        follower.read()
        index = facts.checkpoints(run_dir)
        if index is None:
            return "it has no checkpoint"
        if index.used not in follower.looks:
            return f"its log has no held-out losses at step {index.used}"
        scores = follower.looks[index.used]
        return scores if scores.finite else NOT_FINITE
    every, _ = pairing.recorded(run_dir)
    records = [record for record in every if (record.task, record.version) == (metric.task, metric.version)]
    if not records:
        return f"it was not evaluated on {metric.task}"
    newest = max(records, key=lambda record: record.at or 0.0)
    return _rows(newest, metric.statistic)


def _rows(record: Record, statistic: Statistic) -> RowValues:
    """Examples of one source are one row: they are not independent. Rows are told apart by the prompt too,
    since each seed has a file of held-out rows of its own."""
    sums: dict[str, float] = defaultdict(float)
    units: dict[str, float] = defaultdict(float)
    names: dict[str, str] = {}
    for score in pairing.scored(record):
        value = statistic.of(score)
        if value is not None:
            row = names.setdefault(score.source, _row(score))
            sums[row] += value * score.units
            units[row] += score.units
    return RowValues({row: sums[row] / units[row] for row in sums}, dict(units))


def _row(score: ExampleScore) -> str:
    return f"{PurePath(score.source).name} {score.prompt or ''}"


def cost(run_dir: Path) -> TrialCost | None:
    """None if the trial made no update."""
    log = facts.read_log(run_dir)
    steps = facts.only(log, events.StepDone)
    started = facts.only(log, events.RunStarted)
    if not steps or not started:
        return None
    memory_bytes = max(max(step.memory.values(), default=0) for step in steps)
    seconds = sum(step.seconds for step in steps)
    tokens = sum(step.tokens / (1 - step.padding) for step in steps)
    return TrialCost(started[-1].trainable, memory_bytes, seconds, tokens)


def mean_cost(costs: Sequence[TrialCost]) -> TrialCost:
    """Of the trials of one setting: the most memory, and the mean time and tokens."""
    return TrialCost(
        max(part.trainable for part in costs),
        max(part.memory_bytes for part in costs),
        sum(part.seconds for part in costs) / len(costs),
        sum(part.tokens for part in costs) / len(costs),
    )


def went_up(run_dir: Path) -> bool:
    """Whether the last held-out loss lies above that before training by more than `RISE` of it."""
    validations = facts.only(facts.read_log(run_dir), events.Validated)
    if len(validations) < 2:
        return False
    first, last = validations[0].loss, validations[-1].loss
    return not last <= first + RISE * abs(first)
