"""What happens during a run, as records, and the sinks that take them: terminal, JSON lines, a tracker.

The loop never prints: it calls a sink. All curves and numbers of a report are derived from ``events.jsonl``.
Times are seconds since the epoch (UTC), memory is in bytes, a loss is the mean over the units of the
objective.
"""

from __future__ import annotations

import dataclasses
import json
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import IO, Any, Protocol

from typing_extensions import TypedDict

QUIET_S = 2.0
"""Work other than updates is shown once it has taken this long."""


@dataclass(frozen=True, slots=True)
class Event:
    """Base of all events. ``at``: seconds since the epoch."""

    at: float = field(default_factory=time.time, kw_only=True)


@dataclass(frozen=True, slots=True)
class Notice(Event):
    """Something the user should know: a fallback, a dropped row, a clamped value. ``count``: how many are
    concerned."""

    what: str
    level: str = "info"  # info | warning
    count: int = 1
    where: str | None = None
    hint: str | None = None


@dataclass(frozen=True, slots=True)
class RunStarted(Event):
    """``counts``: rows_read, rows_dropped, rows_train, rows_valid, tokens, supervised_tokens, padding_share,
    …"""

    run: str
    steps: int
    trainable: int
    total: int
    counts: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Working(Event):
    """Progress of long work other than updates, for the display only; never written to the run directory.
    ``share``: of the work that is done, with what is done of unfinished parts; None: done / total."""

    label: str
    done: int
    total: int
    share: float | None = None

    @property
    def progress(self) -> float:
        return self.done / max(1, self.total) if self.share is None else self.share


@dataclass(frozen=True, slots=True)
class Resumed(Event):
    """Training continues from the checkpoint at ``step`` of ``steps``. ``redone``: updates that were logged
    after it and are made again."""

    step: int
    redone: int
    steps: int


@dataclass(frozen=True, slots=True)
class StepDone(Event):
    """One optimizer update. ``loss``: mean over its ``units`` (learned tokens with their weights, rows, or
    pairs, depending on the objective).

    ``learned``: its learned tokens, or None if these are the units. ``metrics``: those of the objective.
    ``shapes``: compiled shapes so far, and micro-batches of other shapes. ``mixed_loss``: mean over the
    ``mixed_units`` of rows that come from ``data.mix``; None if the update has none of them. A distilled row
    counts with its divergence from the base."""

    step: int
    epoch: float
    loss: float
    units: float
    tokens: int
    learning_rate: float
    gradient_norm: float
    clipped: bool
    seconds: float
    memory: dict[str, int]  # resident, active, peak (bytes)
    shapes: dict[str, int] = field(
        default_factory=dict
    )  # compiled: so far; uncompiled: micro-batches of other shapes
    learned: float | None = None
    metrics: dict[str, float] = field(default_factory=dict)
    padding: float = 0.0  # share of the positions on the device
    stages: dict[str, float] = field(
        default_factory=dict
    )  # seconds: reference, gradients, reduce, optimizer, other
    mixed_loss: float | None = None
    mixed_units: float = 0.0

    @property
    def task_units(self) -> float:
        return self.units - self.mixed_units

    @property
    def task_loss(self) -> float:
        """Mean over the rows of the task; NaN if the update has none of them."""
        if self.mixed_loss is None:
            return self.loss
        if self.task_units <= 0:
            return math.nan
        return (self.loss * self.units - self.mixed_loss * self.mixed_units) / self.task_units


@dataclass(frozen=True, slots=True)
class Instruments(Event):
    """Norms of one optimizer update by trainable weight: of the gradient before clipping, of the weight
    before the update, and of its change."""

    step: int
    gradient: dict[str, float]
    weight: dict[str, float]
    update: dict[str, float]

    @property
    def ratios(self) -> dict[str, float]:
        """Change over weight. A weight that is zero before the update, such as LoRA's B before the first, is
        left out."""
        return {name: self.update[name] / size for name, size in self.weight.items() if size > 0}


@dataclass(frozen=True, slots=True)
class RowLosses(Event):
    """Loss of each row of an update, before the update: source → mean nats a learned token; for a pair, of
    the chosen answer. ``units``: learned tokens of each row. Rows of ``data.mix`` are not among them.

    ``epoch``: from 1. ``avoided``: sources of the rows that are to become less likely."""

    step: int
    epoch: int
    losses: dict[str, float]
    units: dict[str, float]
    avoided: list[str] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class HeldOutLosses(Event):
    """Loss of each held-out row at a validation: source → mean over its units, of the loss that is minimised.
    Runs with the same held-out rows are compared row by row by it."""

    step: int
    losses: dict[str, float]
    units: dict[str, float]


@dataclass(frozen=True, slots=True)
class Probed(Event):
    """The run's largest micro-batch was tried before step 1. ``tokens``: on the device, padding included."""

    rows: int
    tokens: int
    seconds: float
    memory: dict[str, int]


@dataclass(frozen=True, slots=True)
class StepSkipped(Event):
    """An update was skipped because its loss or gradient is not finite. ``rows``: its sources (file:line)."""

    step: int
    loss: str
    gradient_norm: str
    rows: list[str]
    in_a_row: int


@dataclass(frozen=True, slots=True)
class Validated(Event):
    """Loss on all validation rows: mean over ``units``. ``perplexity``: per learned token of the rows to
    imitate, NaN if there are none.

    ``metrics``: those of the objective. ``best``: the best so far, by the metric that `LoopSpec.best` names.
    ``adherence``: from 0 to 100, of answers to held-out prompts; None if none were asked.
    ``adherence_seconds``: what these answers took, beside ``seconds``."""

    step: int
    loss: float
    perplexity: float
    units: float
    rows: int
    seconds: float
    best: bool
    metrics: dict[str, float] = field(default_factory=dict)
    adherence: float | None = None
    adherence_seconds: float = 0.0


@dataclass(frozen=True, slots=True)
class Sampled(Event):
    """The model's greedy answer to a fixed prompt at this step. ``reference``: the answer of the held-out
    row; None if the prompt is one of `LoopSpec.prompts`."""

    step: int
    prompt: str
    answer: str
    reference: str | None = None


class Bins(TypedDict, total=False):
    """A histogram: edges, one more than the bins; entries in each bin; entries in none. Empty if it was not
    computed."""

    edges: list[float]
    counts: list[float]
    not_finite: int


@dataclass(frozen=True, slots=True)
class Growth(Event):
    """The change ΔW of each adapted weight W: its Frobenius norm, the ratio of this to the norm of W, and its
    effective rank. ``histogram``: of all entries of all ΔW."""

    step: int
    norms: dict[str, float]
    relative: dict[str, float] = field(default_factory=dict)
    effective_rank: dict[str, float] = field(default_factory=dict)
    histogram: Bins = field(default_factory=lambda: Bins())


@dataclass(frozen=True, slots=True)
class Activations(Event):
    """Root mean square and largest absolute value of each layer's output on the first validation rows, or
    training rows if none are held out."""

    step: int
    rms: dict[str, float]
    largest: dict[str, float]


@dataclass(frozen=True, slots=True)
class Saved(Event):
    """A checkpoint was written to ``path``, of ``bytes`` bytes."""

    step: int
    path: str
    bytes: int
    seconds: float


@dataclass(frozen=True, slots=True)
class RunEnded(Event):
    """``status``: completed | interrupted | stopped_early | failed."""

    status: str
    step: int
    seconds: float
    why: str | None = None


Sink = Callable[[Event], None]

KINDS: dict[str, type[Event]] = {
    kind.__name__: kind
    for kind in (
        Notice,
        RunStarted,
        Resumed,
        Probed,
        StepDone,
        Instruments,
        RowLosses,
        HeldOutLosses,
        StepSkipped,
        Validated,
        Sampled,
        Growth,
        Activations,
        Saved,
        RunEnded,
    )
}


def to_json(event: Event) -> str:
    """One line, keys in the order of the fields, ``kind`` first."""
    return json.dumps({"kind": type(event).__name__, **dataclasses.asdict(event)}, ensure_ascii=False)


def from_json(line: str | bytes) -> tuple[Event | None, bool]:
    """The event of a line of ``events.jsonl``, and whether it holds all of the line.

    An unknown field is left out. An unknown kind, a damaged line or a value of a wrong type gives None.
    """
    try:
        values = json.loads(line)
        kind = KINDS[values.pop("kind")]
        known = {name: value for name, value in values.items() if name in kind.__dataclass_fields__}
        return _reader(kind)(known), len(known) == len(values)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None, False


@cache
def _reader(kind: type[Event]) -> Callable[[dict[str, Any]], Event]:
    """Makes an event of ``kind``. Raises ValueError for a value of a wrong type."""
    from pydantic import TypeAdapter  # slow to import, and most verbs read no log

    return TypeAdapter(kind).validate_python


def read(path: Path) -> Iterator[Event]:
    """The events of a run in order. An unfinished last line (the process was killed while writing) is left
    out.

    If lines are damaged or from a later version, a last notice counts them, at the time of the last event.
    """
    unread, at = 0, 0.0
    with path.open("rb") as lines:
        for line in lines:
            if line.endswith(b"\n"):
                event, whole = from_json(line)
                unread += not whole
                if event is not None:
                    at = event.at
                    yield event
    if unread:
        text = "lines of the log could not be read in full: they are damaged, or from a later version"
        yield Notice(text, "warning", unread, path.name, at=at)


def silent(event: Event) -> None:
    """A sink that keeps nothing."""


def tee(sinks: Sequence[Sink]) -> Sink:
    """A sink that passes each event to all of ``sinks`` in order."""

    def send(event: Event) -> None:
        for sink in sinks:
            sink(event)

    return send


class Tick(Protocol):
    """Takes what is done, of all; and `Working.share`."""

    def __call__(self, done: int, total: int, share: float | None = None, /) -> None: ...


def ticker(sink: Sink, label: str, after_s: float = 0.0) -> Tick:
    """A function that reports the progress of ``label`` to ``sink``. The work begins when
    the ticker is made; in its first ``after_s`` seconds nothing is reported."""
    started = time.time()
    began: float | None = started

    def tick(done: int, total: int, share: float | None = None) -> None:
        nonlocal began
        if time.time() - started < after_s:
            return
        if began is not None and done:
            sink(Working(label, 0, total, at=began))
        began = None
        sink(Working(label, done, total, share))

    return tick


def jsonl(stream: IO[str]) -> Sink:
    """A sink that writes one JSON object a line and flushes after each."""

    def write(event: Event) -> None:
        stream.write(to_json(event) + "\n")
        stream.flush()

    return write
