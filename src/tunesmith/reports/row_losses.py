"""Which training rows were memorised, never learned, or do not fit the others? Read from the loss of each row
by epoch. Robust z: Iglewicz and Hoaglin (1993)."""

from __future__ import annotations

import math
import statistics
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass
from typing import NamedTuple

from tunesmith import events

MEMORISED = 0.1
"""Nats a learned token below which a row is memorised: a token then has a probability of about 0.9 or
more."""
FAR = 0.25
"""A memorised row's loss is at most this share of the loss of unseen rows."""
HIGH = 3.5
"""Robust z from which on a row is an outlier (Iglewicz and Hoaglin)."""
ABOVE = 2.0
"""Robust z above which a row that was never learned ends."""
FALL = 0.05
"""A row is compared with its neighbours if their loss fell by at least this share; a loss that rose by this
share is a rise."""
NO_FALL = 0.1
"""A row whose loss fell by less than this share of its neighbours' fall did not fall."""
FLOOR = 0.01
"""Least spread, in nats, by which rows are compared."""
NEAR, FEW = 5, 8
"""Updates on either side whose rows are a row's neighbours: the model had learned about as much when it met
them. At the ends of an epoch as few as lie on the shorter side, so that no row is compared with later ones
only; unless that makes fewer than FEW rows."""

DEFINITIONS = {
    "memorised": (
        f"loss fell from above {MEMORISED} nats a token to {MEMORISED} or less, and to {FAR:.0%} or less "
        "of the loss of unseen rows, which is above it too: held-out ones, or without held-out rows the last "
        "ones of the first epoch"
    ),
    "never_learned": (
        f"from its first epoch to its last it fell by at most {NO_FALL:.0%} of what its neighbours fell by, "
        f"which is {FALL:.0%} or more of their loss; and it ends above them (robust z above {ABOVE:g}) and "
        f"{MEMORISED} nats"
    ),
    "suspicious": (
        f"above {MEMORISED} nats a token, and either robust z above {HIGH} among its neighbours in every "
        f"epoch; or its loss rose by {FALL:.0%} or more while that of its neighbours fell by as much, and "
        f"the difference is an outlier (robust z above {HIGH})"
    ),
    "outliers": f"robust z above {HIGH} among its neighbours in the only epoch",
}


@dataclass(frozen=True)
class RowCourse:
    """A row with its loss and its z in each epoch, None if it was not learned whole. ``units``: its learned
    tokens."""

    source: str
    losses: list[float | None]
    z: list[float | None]
    units: float


@dataclass(frozen=True)
class RowClasses:
    """``epochs``, ``rows`` and ``avoided`` are counts; ``held_out``: the last held-out loss in nats a token;
    ``medians``: by epoch. Then the rows of each class, the clearest first."""

    epochs: int
    rows: int
    avoided: int
    held_out: float | None
    medians: list[float | None]
    definitions: Mapping[str, str]
    note: str
    memorised: list[RowCourse]
    never_learned: list[RowCourse]
    suspicious: list[RowCourse]
    outliers: list[RowCourse]

    def of(self, name: str) -> list[RowCourse]:
        """The rows of a class of `DEFINITIONS`."""
        return {
            "memorised": self.memorised,
            "never_learned": self.never_learned,
            "suspicious": self.suspicious,
            "outliers": self.outliers,
        }[name]


class _Visit(NamedTuple):
    """A row in an epoch: its loss, the median of its neighbours, and the robust z of the difference."""

    loss: float
    middle: float
    z: float


def classify(log: Iterable[events.Event]) -> RowClasses:
    """The classes of training rows by the losses that the events of a run recorded, as `DEFINITIONS` words
    them; with one epoch only outliers.

    A row's neighbours are the rows of its update and of NEAR updates on either side in the same epoch; its z
    is its loss less their median, over 1.4826 times the median absolute deviation of all such differences of
    the epoch (at least FLOOR). Rows are compared with their neighbours of the same epochs, as one learned
    early in the first epoch falls further than one learned late. A row in several parts (its turns) is their
    mean by units; an epoch in which not all were learned is left out. Rows to be avoided (labelled
    undesirable) are counted and not judged: their loss is meant to rise."""
    history = _history(log)
    known = {source: [visit for visit in line if visit] for source, line in history.visits.items()}
    several = {source: line for source, line in known.items() if len(line) > 1}
    members: dict[str, list[str]] = {name: [] for name in DEFINITIONS}

    def highest(source: str) -> float:
        return max(visit.z for visit in known[source])

    if several:
        for source, name in _classes(several, history.unseen):
            members[name].append(source)
        members["memorised"].sort(key=lambda source: several[source][-1].loss)
    else:
        members["outliers"] = [source for source in known if highest(source) > HIGH]
    for name in ("suspicious", "never_learned", "outliers"):
        members[name].sort(key=highest, reverse=True)
    return RowClasses(
        epochs=history.epochs,
        rows=len(known),
        avoided=history.avoided,
        held_out=history.held_out,
        medians=[
            _median([visit.loss for visit in visits if visit])
            for visits in zip(*history.visits.values(), strict=True)
        ],
        definitions=DEFINITIONS if several else {"outliers": DEFINITIONS["outliers"]},
        note="" if several or not known else "only outliers can be found in one epoch",
        **{name: [history.course(source) for source in sources] for name, sources in members.items()},
    )


class _History(NamedTuple):
    """What a log says of the training rows.

    ``visits``: source → its visit in each epoch, or None if not all of it was learned. ``latest``: the loss
    of the rows that were learned last in the first epoch."""

    visits: dict[str, list[_Visit | None]]
    units: dict[str, float]
    epochs: int
    avoided: int
    held_out: float | None
    latest: float

    @property
    def unseen(self) -> float:
        """Nats a token of rows that the model has not learned."""
        return self.latest if self.held_out is None else self.held_out

    def course(self, source: str) -> RowCourse:
        visits = self.visits[source]
        losses, scores = [visit and visit.loss for visit in visits], [visit and visit.z for visit in visits]
        return RowCourse(source, losses, scores, self.units[source])


def _history(log: Iterable[events.Event]) -> _History:
    by_epoch: dict[int, dict[int, events.RowLosses]] = defaultdict(dict)
    avoided: set[str] = set()
    held_out: float | None = None
    for event in log:
        if isinstance(event, events.RowLosses):
            avoided |= set(event.avoided)
            by_epoch[event.epoch][event.step] = event
        elif isinstance(event, events.Validated) and event.perplexity > 0 and math.isfinite(event.perplexity):
            held_out = math.log(event.perplexity)
    epochs = sorted(by_epoch)
    totals = {epoch: _units(updates.values()) for epoch, updates in by_epoch.items()}
    units: dict[str, float] = {}
    for total in totals.values():
        units |= {source: max(count, units.get(source, 0.0)) for source, count in total.items()}
    visits: dict[str, list[_Visit | None]] = {
        source: [None] * len(epochs) for source in units if source not in avoided
    }
    latest = math.nan
    for place, epoch in enumerate(epochs):
        whole = {
            source
            for source, count in totals[epoch].items()
            if source in visits and count > (1 - 1e-6) * units[source]
        }
        for source, visit in _visits(by_epoch[epoch], whole).items():
            visits[source][place] = visit
            latest = visit.middle if place == 0 else latest
    return _History(visits, units, len(epochs), len(avoided), held_out, latest)


def _classes(several: Mapping[str, list[_Visit]], unseen: float) -> Iterator[tuple[str, str]]:
    """(source, class) of the rows that `DEFINITIONS` describes, from their visits in several epochs."""
    apart = {
        source: (line[0].middle - line[-1].middle) - (line[0].loss - line[-1].loss)
        for source, line in several.items()
    }
    spread = _spread(list(apart.values()))
    for source, line in several.items():
        first, last = line[0], line[-1]
        fall, others = first.loss - last.loss, first.middle - last.middle
        fell = others >= FALL * first.middle
        rose = fell and fall <= -FALL * first.loss and apart[source] > HIGH * spread
        if (rose or min(visit.z for visit in line) > HIGH) and max(first.loss, last.loss) > MEMORISED:
            yield source, "suspicious"
        elif fell and fall <= NO_FALL * others and last.z > ABOVE and last.loss > MEMORISED:
            yield source, "never_learned"
        elif min(first.loss, unseen) > MEMORISED >= last.loss and last.loss <= FAR * unseen:
            yield source, "memorised"


def _units(updates: Iterable[events.RowLosses]) -> dict[str, float]:
    """By row, the sum over the updates of an epoch."""
    total: dict[str, float] = defaultdict(float)
    for update in updates:
        for source, count in update.units.items():
            total[source] += count
    return total


class _Part(NamedTuple):
    """Part of a row in an update."""

    step: int
    loss: float
    units: float


def _visits(updates: Mapping[int, events.RowLosses], whole: Set[str]) -> dict[str, _Visit]:
    """Of one epoch, step → losses: the visits of the rows in ``whole``, in the order in which they first
    came."""
    parts: dict[str, list[_Part]] = defaultdict(list)
    for step in sorted(updates):
        update = updates[step]
        for source, loss in update.losses.items():
            if source in whole:
                parts[source].append(_Part(step, loss, update.units[source]))
    losses: dict[str, float] = {}
    by_step: dict[int, list[float]] = defaultdict(list)
    for source, seen in parts.items():
        losses[source] = seen[0].loss if len(seen) == 1 else _mean([part.loss for part in seen], seen)
        for part in seen:
            by_step[part.step].append(losses[source])
    around = {step: _middle(by_step, step) for step in by_step}
    middles = {source: _mean([around[part.step] for part in seen], seen) for source, seen in parts.items()}
    spread = _spread([losses[source] - middles[source] for source in losses])
    return {
        source: _Visit(loss, middles[source], (loss - middles[source]) / spread)
        for source, loss in losses.items()
    }


def _mean(values: Sequence[float], parts: Sequence[_Part]) -> float:
    """Of a value for each part, weighted by units."""
    return statistics.fmean(values, [part.units for part in parts])


def _middle(by_step: Mapping[int, Sequence[float]], step: int) -> float:
    """Median loss of the rows around update ``step``."""
    reach = min(NEAR, step - min(by_step), max(by_step) - step)
    while True:
        near = [loss for other in range(step - reach, step + reach + 1) for loss in by_step.get(other, ())]
        if reach == NEAR or len(near) >= FEW:
            return statistics.median(near)
        reach += 1


def _median(values: Sequence[float]) -> float | None:
    return statistics.median(values) if values else None


def _spread(differences: Sequence[float]) -> float:
    """The standard deviation that the median absolute deviation stands for in a normal distribution, at least
    FLOOR."""
    middle = _median(differences) or 0.0
    return max(FLOOR, 1.4826 * (_median([abs(difference - middle) for difference in differences]) or 0.0))
