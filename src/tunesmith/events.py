"""What happens during a run, as plain records, and where they go: the terminal, JSON lines, a tracker.

The loop never prints: it calls a sink. ``events.jsonl`` is the one truth of a run; everything else is derived
from it. Times are seconds since the epoch (UTC), memory is bytes, losses are means a unit of the objective.
"""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any


@dataclass(frozen=True, slots=True)
class Event:
    """Base of all events. ``at``: seconds since the epoch."""

    at: float = field(default_factory=time.time, kw_only=True)


@dataclass(frozen=True, slots=True)
class Notice(Event):
    """Something the user should know: a fallback, a dropped row, a clamped value. ``count`` of how many it
    concerns."""

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
    """Progress of other long work, for whoever watches; never written to the run directory."""

    label: str
    done: int
    total: int


@dataclass(frozen=True, slots=True)
class Resumed(Event):
    """``step``: the checkpoint it goes on from, of ``steps``. ``redone``: updates logged after it, done
    again."""

    step: int
    redone: int
    steps: int


@dataclass(frozen=True, slots=True)
class StepDone(Event):
    """One optimizer update. ``loss``: mean over its ``units``, learned tokens (weighted) or rows or pairs:
    the objective's unit.

    ``learned``: its learned tokens, None where they are the units. ``metrics``: what the objective watches.
    """

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


@dataclass(frozen=True, slots=True)
class Instruments(Event):
    """Of one optimizer update, by trainable weight: norm of its gradient before clipping, of itself before,
    of its change."""

    step: int
    gradient: dict[str, float]
    weight: dict[str, float]
    update: dict[str, float]

    @property
    def ratios(self) -> dict[str, float]:
        """Change over weight. A weight that is all zero before its update, as LoRA's B is before the first,
        has none."""
        return {name: self.update[name] / size for name, size in self.weight.items() if size > 0}


@dataclass(frozen=True, slots=True)
class RowLosses(Event):
    """``losses``: source → mean nats a learned token of that row, as the model was when it learned it;
    ``units``: how many.

    Of a pair, of the chosen answer. ``epoch``: from 1. ``avoided``: those of them that are to become less
    likely."""

    step: int
    epoch: int
    losses: dict[str, float]
    units: dict[str, float]
    avoided: list[str] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Probed(Event):
    """The run's largest micro-batch was tried before step 1: ``rows`` with ``tokens`` on the device, padding
    included."""

    rows: int
    tokens: int
    seconds: float
    memory: dict[str, int]


@dataclass(frozen=True, slots=True)
class StepSkipped(Event):
    """The guard found a loss or gradient that is not finite. ``rows``: the sources (file:line) of the
    update."""

    step: int
    loss: str
    gradient_norm: str
    rows: list[str]
    in_a_row: int


@dataclass(frozen=True, slots=True)
class Validated(Event):
    """All validation rows. ``loss``: mean over ``units``. ``perplexity``: a learned token of what is
    imitated, NaN for none.

    ``metrics``: what the objective watches. ``best``: the best so far by what `LoopSpec.best` follows.
    """

    step: int
    loss: float
    perplexity: float
    units: float
    rows: int
    seconds: float
    best: bool
    metrics: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Sampled(Event):
    """What the model answered to a fixed prompt at this step, greedily."""

    step: int
    prompt: str
    answer: str
    reference: str | None = None


@dataclass(frozen=True, slots=True)
class Growth(Event):
    """Of the change ΔW of each adapted weight W: its Frobenius norm, that over W's, and its effective rank.

    ``histogram``: of all entries of all ΔW: ``edges`` (one more) and ``counts``, ``not_finite`` (how many are
    in no bin); empty where they were not looked at."""

    step: int
    norms: dict[str, float]
    relative: dict[str, float] = field(default_factory=dict)
    effective_rank: dict[str, float] = field(default_factory=dict)
    histogram: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Activations(Event):
    """Of each layer's output on the first validation rows (training rows where none are held out): root mean
    square, and largest absolute value."""

    step: int
    rms: dict[str, float]
    largest: dict[str, float]


@dataclass(frozen=True, slots=True)
class Saved(Event):
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
    """The event of a line of ``events.jsonl``, and whether all of the line is in it.

    A field that is not known is left out; a kind that is not known, and a line that is damaged, is None.
    """
    try:
        values = json.loads(line)
        kind = KINDS[values.pop("kind")]
        known = {name: value for name, value in values.items() if name in kind.__dataclass_fields__}
        return kind(**known), len(known) == len(values)
    except (ValueError, KeyError, TypeError, AttributeError):
        return None, False


def read(path: Path) -> Iterator[Event]:
    """The events of a run in order; a torn last line (the process was killed while writing it) is left out.

    What is damaged or from a later version is told by a last notice, at the time of the last event.
    """
    strange, at = 0, 0.0
    with path.open("rb") as lines:
        for line in lines:
            if line.endswith(b"\n"):
                event, whole = from_json(line)
                strange += not whole
                if event is not None:
                    at = event.at
                    yield event
    if strange:
        what = "lines of the log were not read whole: they are from a later version, or damaged"
        yield Notice(what, "warning", strange, path.name, at=at)


def silent(event: Event) -> None:
    """A sink that keeps nothing."""


def tee(sinks: Sequence[Sink]) -> Sink:
    """A sink that passes each event to all of ``sinks`` in order."""

    def send(event: Event) -> None:
        for sink in sinks:
            sink(event)

    return send


def ticker(sink: Sink, label: str) -> Callable[[int, int], None]:
    """A callable (done, total) that tells ``sink`` how far the work called ``label`` is; it began when this
    was called."""
    began: float | None = time.time()

    def tick(done: int, total: int) -> None:
        nonlocal began
        if began is not None and done:
            sink(Working(label, 0, total, at=began))
        began = None
        sink(Working(label, done, total))

    return tick


def jsonl(stream: IO[str]) -> Sink:
    """A sink that writes one JSON object a line and flushes after each."""

    def write(event: Event) -> None:
        stream.write(to_json(event) + "\n")
        stream.flush()

    return write
