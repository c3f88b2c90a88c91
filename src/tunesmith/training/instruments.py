"""What a run measures of itself: gradients, updates and ΔW by weight, activations by layer, time by stage,
losses by row.

Measuring changes nothing: no random number is drawn and no array of the run is changed, so a run ends in the
same bytes with it and without. Effective rank: Roy and Vetterli, "The effective rank" (EUSIPCO 2007). Robust
z: Iglewicz and Hoaglin (1993)."""

from __future__ import annotations

import math
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from contextlib import contextmanager
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten

from tunesmith import adapters, events
from tunesmith.adapters import DoRALinear, LoRALinear
from tunesmith.model import wrap
from tunesmith.runs.config import LoopSpec
from tunesmith.tokens.batches import Group

STAGES = ("reference", "gradients", "reduce", "optimizer", "other")
BINS = 64
"""Bins of the histogram of ΔW: equal, half of them below 0, up to the first power of two above every
entry."""
CHUNK = 1 << 18
"""Entries of ΔW that are computed and counted at once: they fit a core's cache; from memory, counting takes
14 times as long."""
ACTIVATION_ROWS = 8
"""Validation rows whose activations are measured, from the first."""


class Stages:
    """A stopwatch: ``clock(stage)`` adds the time since its last call to ``stage``."""

    def __init__(self) -> None:
        self._last = time.perf_counter()
        self.seconds: dict[str, float] = dict.fromkeys(STAGES, 0.0)

    def __call__(self, stage: str) -> None:
        now = time.perf_counter()
        self.seconds[stage] += now - self._last
        self._last = now


def due(loop: LoopSpec, step: int, steps: int) -> bool:
    """Whether the weights are measured at update ``step`` (from 1) of ``steps``: the first, the last, and
    every ``instrument_every``-th."""
    every = loop.instrument_every
    return every > 0 and (step % every == 0 or step in (1, steps))


def norms(tree: dict) -> dict[str, float]:
    """Euclidean norm of each leaf by name, sorted."""
    flat: Any = sorted(tree_flatten(tree))
    found: Any = mx.stack([_norm(leaf) for _, leaf in flat]).tolist() if flat else []
    return {name: norm * largest for (name, _), (norm, largest) in zip(flat, found, strict=True)}


def _norm(leaf: mx.array) -> mx.array:
    """(2,) its norm over its largest absolute entry, and that one: float32 has no room for the square of
    1e20."""
    values = leaf.astype(mx.float32).reshape(-1)
    largest = mx.abs(values).max()
    largest = mx.where(largest > 0, largest, 1.0)
    return mx.stack([mx.linalg.norm(values / largest), largest])


class Measured:
    """Measures one optimizer step: created before it from the gradients (means over units, before clipping),
    it makes the step, and then gives the norms."""

    def __init__(self, net: nn.Module, gradients: dict) -> None:
        self._gradients, self._weights = norms(gradients), norms(net.trainable_parameters())
        self._updates: dict[str, float] = {}

    def apply(self, state: Any, net: nn.Module, gradients: dict, rate: float) -> None:
        """As `optimizer.apply`, weight by weight, so that only one old weight is kept beside its new
        value."""
        old: Any = dict(tree_flatten(net.trainable_parameters()))
        state.learning_rate = rate
        state.update(net, gradients)
        for name, leaf in sorted(tree_flatten(net.trainable_parameters())):
            change = leaf - old.pop(name)
            self._updates |= norms({name: change})
            del change
        mx.eval(net.trainable_parameters(), state.state)

    def event(self, step: int) -> events.Instruments:
        return events.Instruments(step, self._gradients, self._weights, self._updates)


class Grown:
    """Measures how far the adapted weights of ``net`` are from their base. ‖W‖ is measured once: the base is
    frozen."""

    def __init__(self, net: nn.Module) -> None:
        self._layers = {
            name: layer for name, layer in sorted(net.named_modules()) if isinstance(layer, LoRALinear)
        }
        self._frozen: dict[str, float] = {}

    def event(self, step: int) -> events.Growth:
        """Norm, norm over ‖W‖, effective rank, and one histogram of all entries. Weights trained in full are
        left out.

        For DoRA norm and histogram are of the whole change, with the magnitudes; the effective rank is of
        s·A·B alone, since a magnitude for each row makes the whole change full rank. Entries that are not
        finite are counted, and their weight has no norm and no rank."""
        sizes: dict[str, float] = {}
        ranks: dict[str, float] = {}
        histogram = Histogram()
        for name, layer in self._layers.items():
            if name not in self._frozen:
                self._frozen[name] = norms({name: adapters.dense(layer.linear)})[name]
            values = low_rank_values(layer)
            if np.isfinite(values).all():
                ranks[name] = effective_rank(values)
            squares = 0.0
            for part in _changes(layer):
                entries = np.array(part).reshape(-1)
                for start in range(0, len(entries), CHUNK):
                    histogram.add(piece := entries[start : start + CHUNK])
                    squares += float(np.square(piece, dtype=np.float64).sum())
            if math.isfinite(squares):
                sizes[name] = math.sqrt(squares)
        relative = {name: size / self._frozen[name] for name, size in sizes.items() if self._frozen[name] > 0}
        return events.Growth(step, sizes, relative, ranks, histogram.found)


def _changes(layer: LoRALinear) -> Iterator[mx.array]:
    """ΔW, (in, out) or (out, in), in blocks of at most CHUNK entries where it is a product of factors."""
    if isinstance(layer, DoRALinear):
        yield layer.merged_weight() - adapters.dense(layer.linear)
        return
    rows = max(1, CHUNK // layer.lora_b.shape[1])
    for start in range(0, layer.lora_a.shape[0], rows):
        yield (layer.lora_a[start : start + rows] * layer.scale) @ layer.lora_b


def low_rank_values(layer: LoRALinear) -> np.ndarray:
    """(r,) the singular values of s·A·B, largest first, from the (r, r) products G = AᵀA and H = BBᵀ alone.

    Their squares are the eigenvalues of √G·H·√G. In float64; what is below 1e-7 of the largest is rounding,
    and 0. The products are einsum's: numpy's BLAS would wake threads of its own beside MLX's, which took up
    to 800 times as long on busy cores. All NaN if a factor is not finite."""
    a, b = np.array(layer.lora_a.T, dtype=np.float64), np.array(layer.lora_b, dtype=np.float64)
    if not (np.isfinite(a).all() and np.isfinite(b).all()):
        return np.full(len(a), np.nan)
    values, vectors = np.linalg.eigh(np.einsum("in,jn->ij", a, a))
    root = vectors * np.sqrt(np.maximum(values, 0.0))
    squares = np.linalg.eigvalsh(root.T @ np.einsum("in,jn->ij", b, b) @ root)[::-1]
    found = layer.scale * np.sqrt(np.maximum(squares, 0.0))
    return np.where(found > 1e-7 * found[0], found, 0.0)


def effective_rank(values: np.ndarray) -> float:
    """exp of the entropy of the singular ``values`` as shares of their sum; 0 if all are zero."""
    total = float(values.sum())
    if total == 0:
        return 0.0
    shares = values[values > 0] / total
    return float(np.exp(-(shares * np.log(shares)).sum()))


class Histogram:
    """Counts of BINS equal bins around 0. If an entry does not fit, neighbouring bins are merged and the
    range doubles."""

    def __init__(self) -> None:
        self._reach = 2.0**-40
        self._counts = np.zeros(BINS, dtype=np.int64)
        self._not_finite = 0

    def add(self, values: np.ndarray) -> None:
        """Add all ``values`` (n,) float32; those that are not finite are counted beside the bins."""
        if not (finite := np.isfinite(values)).all():
            self._not_finite += len(values) - int(finite.sum())
            values = values[finite]
        largest = float(np.abs(values).max(initial=0.0))
        while largest >= self._reach:
            self._reach *= 2
            pairs = self._counts.reshape(-1, 2).sum(axis=1)
            self._counts = np.concatenate(
                [np.zeros(BINS // 4, np.int64), pairs, np.zeros(BINS // 4, np.int64)]
            )
        # A power of two scales without rounding: each entry falls into the bin that it is in.
        bins = np.floor(values * np.float32(BINS / 2 / self._reach)).astype(np.int16)
        self._counts += np.bincount(bins + np.int16(BINS // 2), minlength=BINS)

    @property
    def found(self) -> dict[str, Any]:
        """``edges`` (BINS + 1), ``counts`` (BINS) and ``not_finite``, entries in no bin; empty if there was
        no entry."""
        if not self._counts.any() and not self._not_finite:
            return {}
        edges = np.linspace(-self._reach, self._reach, BINS + 1).tolist()
        return {"edges": edges, "counts": self._counts.astype(float).tolist(), "not_finite": self._not_finite}


@contextmanager
def _listening(net: nn.Module, hear: Callable[[str, mx.array], None]) -> Iterator[None]:
    """Inside, each layer of ``net`` passes its name and output to ``hear``."""
    layers: Any = net.layers or []
    names = {id(module): name for name, module in net.named_modules()}

    def call_of(kind: type[nn.Module]) -> wrap.Call:
        def call(self: nn.Module, *inputs: Any, **options: Any) -> Any:
            out = kind.__call__(self, *inputs, **options)
            hear(names[id(self)], out[0] if isinstance(out, tuple) else out)
            return out

        return call

    with wrap.replaced(layers, call_of):
        yield


def activations(net: nn.Module, rows: Sequence[Group], step: int) -> events.Activations:
    """Of the output of each layer over all positions of the first ACTIVATION_ROWS of ``rows``, one at a time:
    no padding."""
    squares: dict[str, float] = defaultdict(float)
    largest: dict[str, float] = defaultdict(float)
    entries: dict[str, int] = defaultdict(int)
    heard: list[tuple[str, mx.array, mx.array, int]] = []

    def hear(name: str, out: mx.array) -> None:
        values = out.astype(mx.float32)
        heard.append((name, mx.square(values).mean(), mx.abs(values).max(), out.size))

    net.eval()
    with _listening(net, hear):
        for row in rows[:ACTIVATION_ROWS]:
            heard.clear()
            ids = row.sequences[0].ids
            mx.eval(net(mx.array(ids[: max(1, len(ids) - 1)])[None]), [one[1:3] for one in heard])
            for name, mean, highest, size in heard:
                squares[name] += float(np.array(mean)) * size
                largest[name] = max(largest[name], float(np.array(highest)))
                entries[name] += size
    return events.Activations(
        step, {name: math.sqrt(total / entries[name]) for name, total in squares.items()}, dict(largest)
    )


def row_losses(step: int, epoch: int, groups: Sequence[Group], logps: np.ndarray) -> events.RowLosses:
    """logps (S,): Σ weight · log p of all sequences of ``groups``. For a pair, of the chosen answer; one
    source is one row."""
    sums: dict[str, float] = defaultdict(float)
    units: dict[str, float] = defaultdict(float)
    avoided: set[str] = set()
    at = 0
    for group in groups:
        if group.learned[0] > 0:
            sums[group.source] -= float(logps[at])
            units[group.source] += group.learned[0]
            avoided |= {group.source} if group.label is False else set()
        at += len(group.sequences)
    return events.RowLosses(
        step, epoch, {key: sums[key] / units[key] for key in sums}, dict(units), sorted(avoided)
    )


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


class _Visit(NamedTuple):
    """A row in an epoch: its loss, the median of its neighbours, and the robust z of the difference."""

    loss: float
    middle: float
    z: float


def rows(log: Iterable[events.Event]) -> dict[str, Any]:
    """What the losses of each row by epoch say of the training rows, as `DEFINITIONS` words it; JSON's types
    only.

    A row's neighbours are the rows of its update and of NEAR updates on either side in the same epoch; its z
    is its loss less their median, over 1.4826 times the median absolute deviation of all such differences of
    the epoch (at least FLOOR). Rows are compared with their neighbours of the same epochs, as one learned
    early in the first epoch falls further than one learned late. A row in several parts (its turns) is their
    mean by units; an epoch in which not all were learned is left out. Rows to be avoided (labelled
    undesirable) are counted and not judged: their loss is meant to rise.

    ``epochs`` and ``rows`` count, ``avoided`` too; ``held_out`` is the last held-out loss in nats a token,
    None for none; ``medians`` by epoch; then for each class its rows, the clearest first, with ``source``,
    ``losses`` and ``z`` by epoch (None if it was not learned whole), ``units`` (learned tokens). With one
    epoch only ``outliers`` are looked for."""
    history = _history(log)
    known = {source: [visit for visit in line if visit] for source, line in history.visits.items()}
    several = {source: line for source, line in known.items() if len(line) > 1}
    facts: dict[str, Any] = {
        "epochs": history.epochs,
        "rows": len(known),
        "avoided": history.avoided,
        "held_out": history.held_out,
        "medians": [
            _median([visit.loss for visit in visits if visit])
            for visits in zip(*history.visits.values(), strict=True)
        ],
        "definitions": DEFINITIONS if several else {"outliers": DEFINITIONS["outliers"]},
        "note": "" if several or not known else "one epoch: only outliers",
        **{name: [] for name in DEFINITIONS},
    }

    def highest(source: str) -> float:
        return max(visit.z for visit in known[source])

    classes: dict[str, list[str]] = defaultdict(list)
    if several:
        for source, name in _classes(several, history.unseen):
            classes[name].append(source)
        classes["memorised"].sort(key=lambda source: several[source][-1].loss)
    else:
        classes["outliers"] = [source for source in known if highest(source) > HIGH]
    for name in ("suspicious", "never_learned", "outliers"):
        classes[name].sort(key=highest, reverse=True)
    return facts | {name: [history.described(source) for source in rows] for name, rows in classes.items()}


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

    def described(self, source: str) -> dict[str, Any]:
        losses = [visit and visit.loss for visit in self.visits[source]]
        scores = [visit and visit.z for visit in self.visits[source]]
        return {"source": source, "losses": losses, "z": scores, "units": self.units[source]}


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


def _units(found: Iterable[events.RowLosses]) -> dict[str, float]:
    """By row, the sum over the updates of an epoch."""
    total: dict[str, float] = defaultdict(float)
    for event in found:
        for source, count in event.units.items():
            total[source] += count
    return total


def _visits(found: Mapping[int, events.RowLosses], whole: Set[str]) -> dict[str, _Visit]:
    """Of one epoch, step → losses: the rows of ``whole`` beside one another, in the order in which they first
    came."""
    parts: dict[str, list[tuple[int, float, float]]] = defaultdict(list)
    for step in sorted(found):
        for source, loss in found[step].losses.items():
            if source in whole:
                parts[source].append((step, loss, found[step].units[source]))
    losses: dict[str, float] = {}
    at: dict[int, list[float]] = defaultdict(list)
    for source, seen in parts.items():
        losses[source] = (
            seen[0][1]
            if len(seen) == 1
            else statistics.fmean([one[1] for one in seen], [one[2] for one in seen])
        )
        for step, _, _ in seen:
            at[step].append(losses[source])
    around = {step: _middle(at, step) for step in at}
    middles = {
        source: statistics.fmean([around[one[0]] for one in seen], [one[2] for one in seen])
        for source, seen in parts.items()
    }
    spread = _spread([losses[source] - middles[source] for source in losses])
    return {
        source: _Visit(loss, middles[source], (loss - middles[source]) / spread)
        for source, loss in losses.items()
    }


def _middle(at: Mapping[int, Sequence[float]], step: int) -> float:
    """Median loss of the rows around update ``step``."""
    reach = min(NEAR, step - min(at), max(at) - step)
    while True:
        near = [loss for other in range(step - reach, step + reach + 1) for loss in at.get(other, ())]
        if reach == NEAR or len(near) >= FEW:
            return statistics.median(near)
        reach += 1


def _median(values: Sequence[float]) -> float | None:
    return statistics.median(values) if values else None


def _spread(differences: Sequence[float]) -> float:
    """The standard deviation that the median absolute deviation stands for in a normal distribution, at least
    FLOOR."""
    middle = _median(differences) or 0.0
    return max(FLOOR, 1.4826 * (_median([abs(one - middle) for one in differences]) or 0.0))
