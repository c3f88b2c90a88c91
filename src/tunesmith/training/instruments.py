"""What a run measures of itself: gradients, updates and ΔW by weight, activations by layer, time by stage,
losses by row.

Measuring changes nothing: no random number is drawn and no array of the run is changed, so a run ends in the
same bytes with it and without. Effective rank: Roy and Vetterli, "The effective rank" (EUSIPCO 2007)."""

from __future__ import annotations

import math
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten

from tunesmith import adapters, events
from tunesmith.adapters import AdapterLayer, DoRALinear, LoRALinear
from tunesmith.learning import optimizer
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
MEASURED_EXPERTS = 8
"""Most experts of a layer whose growth is measured, evenly spaced: all entries of ΔW of hundreds of experts
would take longer than the updates."""
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
    scaled: Any = mx.stack([_norm(leaf) for _, leaf in flat]).tolist() if flat else []
    return {name: norm * largest for (name, _), (norm, largest) in zip(flat, scaled, strict=True)}


def _norm(leaf: mx.array) -> mx.array:
    """(2,) the norm divided by the largest absolute entry, and that entry: float32 cannot hold the square of
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
        optimizer.move(state, net, gradients, rate)
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
        self._layers = adapters.adapted(net)
        self._frozen: dict[str, float] = {}

    def event(self, step: int) -> events.Growth:
        """Norm, norm over ‖W‖, effective rank, and one histogram of all entries. Weights trained in full are
        left out. Of a layer of experts, MEASURED_EXPERTS are measured, and the effective rank is their mean.

        For DoRA norm and histogram are of the whole change, with the magnitudes; the effective rank is of
        s·A·B alone, since a magnitude for each row makes the whole change full rank. Entries that are not
        finite are counted, and their weight has no norm and no rank."""
        sizes: dict[str, float] = {}
        ranks: dict[str, float] = {}
        histogram = Histogram()
        for name, layer in self._layers.items():
            parts = _measured(layer)
            if name not in self._frozen:
                bases = [norms({name: adapters.dense(part.linear)})[name] for part in parts]
                self._frozen[name] = math.hypot(*bases)
            values = [low_rank_values(part) for part in parts]
            if np.isfinite(values).all():
                ranks[name] = float(np.mean([effective_rank(of_part) for of_part in values]))
            squares = sum(_counted(change, histogram) for part in parts for change in _changes(part))
            if math.isfinite(squares):
                sizes[name] = math.sqrt(squares)
        relative = {name: size / self._frozen[name] for name, size in sizes.items() if self._frozen[name] > 0}
        return events.Growth(step, sizes, relative, ranks, histogram.content)


def _measured(layer: AdapterLayer) -> list[LoRALinear]:
    """The matrices of ``layer`` whose growth is measured."""
    parts = list(layer.parts())
    count = min(len(parts), MEASURED_EXPERTS)
    return [parts[place * len(parts) // count] for place in range(count)]


def _counted(change: mx.array, histogram: Histogram) -> float:
    """The sum of the squares of ``change``, whose entries go into ``histogram``."""
    entries, squares = np.array(change).reshape(-1), 0.0
    for start in range(0, len(entries), CHUNK):
        histogram.add(piece := entries[start : start + CHUNK])
        squares += float(np.square(piece, dtype=np.float64).sum())
    return squares


def _changes(layer: LoRALinear) -> Iterator[mx.array]:
    """ΔW, (in, out) or (out, in), in blocks of at most CHUNK entries where it is a product of factors."""
    if isinstance(layer, DoRALinear):
        yield layer.merged_weight() - adapters.dense(layer.linear)
        return
    a, rows = layer.expanded_a(), max(1, CHUNK // layer.lora_b.shape[1])
    for start in range(0, len(a), rows):
        yield (a[start : start + rows] * layer.scale) @ layer.factors[1]


def low_rank_values(layer: LoRALinear) -> np.ndarray:
    """(r,) the singular values of s·A·B, largest first, from the (r, r) products G = AᵀA and H = BBᵀ alone.

    Their squares are the eigenvalues of √G·H·√G. In float64; what is below 1e-7 of the largest is rounding,
    and 0. The products are einsum's: numpy's BLAS would wake threads of its own beside MLX's, which took up
    to 800 times as long on busy cores. All NaN if a factor is not finite."""
    held_a, held_b = layer.factors
    a, b = np.array(held_a.T, dtype=np.float64), np.array(held_b, dtype=np.float64)
    if not (np.isfinite(a).all() and np.isfinite(b).all()):
        return np.full(len(a), np.nan)
    values, vectors = np.linalg.eigh(np.einsum("in,jn->ij", a, a))
    root = vectors * np.sqrt(np.maximum(values, 0.0))
    squares = np.linalg.eigvalsh(root.T @ np.einsum("in,jn->ij", b, b) @ root)[::-1]
    singular = layer.scale * np.sqrt(np.maximum(squares, 0.0))
    return np.where(singular > 1e-7 * singular[0], singular, 0.0)


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
    def content(self) -> events.Bins:
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
    outputs: list[tuple[str, mx.array, mx.array, int]] = []

    def hear(name: str, out: mx.array) -> None:
        values = out.astype(mx.float32)
        outputs.append((name, mx.square(values).mean(), mx.abs(values).max(), out.size))

    net.eval()
    with _listening(net, hear):
        for row in rows[:ACTIVATION_ROWS]:
            outputs.clear()
            ids = row.sequences[0].ids
            mx.eval(net(mx.array(ids[: max(1, len(ids) - 1)])[None]), [output[1:3] for output in outputs])
            for name, mean, highest, size in outputs:
                squares[name] += float(np.array(mean)) * size
                largest[name] = max(largest[name], float(np.array(highest)))
                entries[name] += size
    return events.Activations(
        step, {name: math.sqrt(total / entries[name]) for name, total in squares.items()}, dict(largest)
    )


def row_losses(step: int, epoch: int, groups: Sequence[Group], logps: np.ndarray) -> events.RowLosses:
    """logps (S,): Σ weight · log p of all sequences of ``groups``. For a pair, of the chosen answer; one
    source is one row. Mixed rows are left out: they are compared with none of the task's."""
    sums: dict[str, float] = defaultdict(float)
    units: dict[str, float] = defaultdict(float)
    avoided: set[str] = set()
    first = 0
    for group in groups:
        if group.learned[0] > 0 and not group.mixed:
            sums[group.source] -= float(logps[first])
            units[group.source] += group.learned[0]
            avoided |= {group.source} if group.label is False else set()
        first += len(group.sequences)
    return events.RowLosses(
        step, epoch, {key: sums[key] / units[key] for key in sums}, dict(units), sorted(avoided)
    )


def held_out_losses(
    step: int, groups: Sequence[Group], losses: np.ndarray, units: Sequence[float]
) -> events.HeldOutLosses:
    """losses, units: (G,) the summed loss and the units of each of ``groups``. Groups of one source are one
    row; a row without units has no loss."""
    sums: dict[str, float] = defaultdict(float)
    weights: dict[str, float] = defaultdict(float)
    for group, loss, weight in zip(groups, losses.tolist(), units, strict=True):
        sums[group.source] += loss
        weights[group.source] += weight
    means = {source: total / weights[source] for source, total in sums.items() if weights[source] > 0}
    return events.HeldOutLosses(step, means, {source: weights[source] for source in means})
