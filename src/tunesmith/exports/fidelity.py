"""How far is an artefact from the live adapter? Log-probabilities of both and of the base at the same places
of held-out rows, the weights by their sketches, the ids of rows and where answers end."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from tunesmith.data import formats
from tunesmith.engine import generation
from tunesmith.errors import ExportError, listing
from tunesmith.evaluation.evaluate import IMITATED
from tunesmith.exports.kind import Tolerance
from tunesmith.model import abilities, kernels, logprobs
from tunesmith.runs.config import RunConfig
from tunesmith.runs.directory import VALID, Run
from tunesmith.tokens import template
from tunesmith.tokens.template import Renderer

VALUES = 1 << 27
"""Log-probabilities that are kept of each model at most: 512 MiB."""
FAINT = 1e-9
"""An adapter whose KL divergence from the base is less changes nothing that could be lost."""


class Probe(NamedTuple):
    """A held-out row: its ids, where its answer begins, and the places whose next token is predicted."""

    ids: list[int]
    start: int
    places: list[int]


def rows(run: Run, config: RunConfig, renderer: Renderer, limit: int) -> list[Probe]:
    """The first ``limit`` held-out rows, or training rows if none are held out. Raises ExportError if there
    are none, or none can be rendered."""
    held_out = run.path / VALID
    if held_out.is_file() and held_out.stat().st_size:
        read = formats.read([str(held_out)], config.data.model_copy(update={"format": "auto"}))
    else:
        read = formats.read(list(config.data.train), config.data)
    examples = IMITATED.select(read.examples).examples[:limit]
    rendered = template.render(examples, renderer, config.template, config.batch.length)
    if not rendered.rows:
        reasons = listing([f"{row.source}: {row.message}" for row in rendered.dropped])
        raise ExportError(f"no row can be rendered to measure the artefact\n{reasons}", where=str(run.path))
    probes: list[Probe] = []
    for row in rendered.rows[:limit]:
        places = (np.flatnonzero(row.tokens.targets[1:] > 0)).tolist()
        probes.append(Probe(row.tokens.ids.tolist(), row.tokens.start, places))
    return probes


def thinned(probes: Sequence[Probe], width: int) -> list[Probe]:
    """The rows with evenly fewer places, so that ``width`` log-probabilities at each fit into `VALUES`."""
    total = sum(len(probe.places) for probe in probes)
    step = -(-total * width // VALUES)
    return [probe._replace(places=probe.places[:: max(1, step)]) for probe in probes]


def log_probabilities(net: nn.Module, probes: Sequence[Probe], path: Path) -> None:
    """Write (P, V) float32, the log-probabilities at all places in order, as ``path`` in numpy's format."""
    net.eval()
    splits = abilities.splits(net)
    parts: list[np.ndarray] = []
    for probe in probes:
        if not probe.places:
            continue
        ids, places = mx.array(probe.ids)[None], mx.array(probe.places)
        if splits:
            logits = logprobs.head(net, logprobs.features(net, ids)[0][places])
        else:
            logits = net(ids)[0][places]
        logits = logits.astype(mx.float32)
        parts.append(np.array(logits - kernels.log_sums(logits)[..., None]))
    np.save(path, np.concatenate(parts))


@dataclass(frozen=True)
class Distances:
    """KL divergence of an artefact from the live adapter in nats a token, over ``n`` places.

    ``top``: share of equal top tokens. ``rms_p``: root mean square difference of the probability of the live
    top token. ``base``: mean KL divergence of the live adapter from the base. ``from_base``: that of the
    artefact. ``survived``: the second as a share of the first."""

    n: int
    mean: float
    median: float
    p95: float
    p99: float
    max: float
    top: float
    rms_p: float
    base: float
    from_base: float
    survived: float | None

    @property
    def lost(self) -> float:
        """KL divergence from the live adapter as a share of the base's; 0 if the adapter does nothing."""
        return self.mean / self.base if self.base > FAINT else 0.0


def distances(live: np.ndarray, base: np.ndarray, artefact: np.ndarray) -> Distances:
    """From (P, V) log-probabilities of the three. If the artefact or base have fewer rows in their embedding,
    the ids that all of them know are compared."""
    width = min(values.shape[1] for values in (live, base, artefact))
    kl: list[np.ndarray] = []
    of_base: list[np.ndarray] = []
    change: list[np.ndarray] = []
    top: list[np.ndarray] = []
    moved: list[np.ndarray] = []
    for start in range(0, len(live), 256):
        p, b, q = (
            values[start : start + 256, :width].astype(np.float64) for values in (live, base, artefact)
        )
        kl.append(_divergence(p, q))
        of_base.append(_divergence(p, b))
        change.append(_divergence(q, b))
        best = p.argmax(axis=1)
        top.append(best == q.argmax(axis=1))
        rows = np.arange(len(best))
        moved.append(np.exp(p[rows, best]) - np.exp(q[rows, best]))
    values, before, after = np.concatenate(kl), _mean(of_base), _mean(change)
    return Distances(
        n=len(values),
        mean=float(values.mean()),
        median=float(np.median(values)),
        p95=float(np.quantile(values, 0.95)),
        p99=float(np.quantile(values, 0.99)),
        max=float(values.max()),
        top=float(np.concatenate(top).mean()),
        rms_p=float(np.sqrt(np.square(np.concatenate(moved)).mean())),
        base=before,
        from_base=after,
        survived=after / before if before > FAINT else None,
    )


def _divergence(p: np.ndarray, q: np.ndarray) -> np.ndarray:
    with np.errstate(invalid="ignore"):  # a probability of 0 adds nothing
        terms = np.where(np.isneginf(p), 0, np.exp(p) * (p - q))
    return np.maximum(terms.sum(axis=1), 0)  # a divergence below 0 is rounding


def _mean(parts: list[np.ndarray]) -> float:
    return float(np.concatenate(parts).mean())


@dataclass(frozen=True)
class Stops:
    """``n`` prompts that were answered. ``live`` and ``artefact``: answers that ended by themselves.
    ``equal``: answers with the same ids. ``undeclared``: tokens that end a trained answer and do not end the
    artefact's."""

    n: int
    live: int
    artefact: int
    equal: int
    undeclared: tuple[int, ...]


class Ended(NamedTuple):
    """``ids``: the answer. ``stopped``: it ended by itself."""

    ids: list[int]
    stopped: bool


def answers(net: nn.Module, probes: Sequence[Probe], ends: Sequence[int]) -> list[Ended]:
    """A greedy answer to the prompt of each row, up to half as long again as the longest trained one."""
    asked = [probe for probe in probes if probe.start > 1]
    if not asked:
        return []
    longest = max(len(probe.ids) - probe.start for probe in asked)
    limit = min(256, 16 + 3 * longest // 2)
    made = generation.generate(
        net, [probe.ids[: probe.start] for probe in asked], max_tokens=limit, eos_ids=list(ends)
    )
    return [Ended(answer.ids, answer.finish == "stop") for answer in made]


def trained_ends(probes: Sequence[Probe], ends: Sequence[int]) -> list[int]:
    """The tokens of ``ends`` that end rows."""
    last = {probe.ids[-1] for probe in probes}
    return [token for token in ends if token in last]


def stops(
    live: Sequence[Ended], artefact: Sequence[Ended], trained: Sequence[int], ends: Sequence[int]
) -> Stops:
    """``trained``: the tokens that end rows. ``ends``: those that end an answer of the artefact."""
    return Stops(
        n=len(live),
        live=sum(answer.stopped for answer in live),
        artefact=sum(answer.stopped for answer in artefact),
        equal=sum(one.ids == other.ids for one, other in zip(live, artefact, strict=True)),
        undeclared=tuple(token for token in trained if token not in ends),
    )


@dataclass(frozen=True)
class Carried:
    """How much of the adapter's change of each tensor the artefact has, from sketches.

    ``gains``: by tensor, the artefact's change in the direction of the adapter's, 1 if it is whole.
    ``error``: squared length of the difference of the two, as a share of the change, over all tensors.
    ``missing``: changed tensors that the artefact does not have."""

    gains: Mapping[str, float] = field(default_factory=dict)
    error: float = 0.0
    missing: tuple[str, ...] = ()


def carried(
    base: Mapping[str, np.ndarray], live: Mapping[str, np.ndarray], artefact: Mapping[str, np.ndarray]
) -> Carried:
    gains: dict[str, float] = {}
    missing: list[str] = []
    wrong = total = 0.0
    for name, value in live.items():
        if name not in base or base[name].shape != value.shape:
            continue  # rows were added
        change = value.astype(np.float64) - base[name]
        size = float(np.square(change).sum())
        if size <= 1e-12 * float(np.square(base[name]).sum()):
            continue
        if name not in artefact or artefact[name].shape != value.shape:
            missing.append(name)
            continue
        arrived = artefact[name].astype(np.float64) - base[name]
        gains[name] = float((arrived * change).sum()) / size
        wrong += float(np.square(arrived - change).sum())
        total += size
    return Carried(gains, wrong / total if total else 0.0, tuple(missing))


def reasons(
    measured: Distances, stopping: Stops, weights: Carried, tolerance: Tolerance, rounded: float | None
) -> list[str]:
    """Why the artefact is rejected, one sentence each; empty if it is accepted."""
    found: list[str] = []
    if not np.isfinite([measured.mean, measured.from_base]).all():
        found.append("its log-probabilities are not finite")
    if measured.base > FAINT and measured.mean >= measured.from_base:
        found.append("inert: it is nearer to the base than to the adapter")
    limits = {
        "mean KL divergence": (measured.mean, tolerance.kl),
        "99th percentile of the KL divergence": (measured.p99, tolerance.p99),
        "share of the adapter's effect that was lost": (measured.lost, tolerance.lost),
    }
    found += [
        f"{name} {value:.3g}, at most {most:g}" for name, (value, most) in limits.items() if not value <= most
    ]
    if measured.top < tolerance.top:
        found.append(f"equal top tokens {measured.top:.1%}, at least {tolerance.top:.0%}")
    if found:
        found += diagnosis(weights, rounded)
    if stopping.undeclared:
        tokens = ", ".join(map(str, stopping.undeclared))
        found.append(f"it never stops: the trained end token {tokens} is not an end token of the artefact")
    elif stopping.live and stopping.artefact < stopping.live / 2:
        found.append(
            f"it does not stop: {stopping.artefact} of {stopping.n} answers end, live {stopping.live}"
        )
    return found


def diagnosis(weights: Carried, rounded: float | None) -> list[str]:
    """Which tensors do not hold the adapter's change, and what that looks like."""
    gains = weights.gains
    if weights.missing:
        return [f"tensors without a counterpart: {', '.join(weights.missing[:5])}"]
    absent = [name for name, gain in gains.items() if abs(gain) < 0.1]
    values = np.array(list(gains.values()))
    if gains and len(absent) == len(gains) and rounded is None:
        return [
            "no tensor holds the change: the names of the adapter match nothing, or its factors are turned"
        ]
    if rounded is not None and rounded < 0.9:
        return [f"rounding to the dtype of the base left {rounded:.0%} of the change of the weights"]
    if absent:
        names = ", ".join(absent[:5])
        return [f"{len(absent)} of {len(gains)} changed tensors do not hold the change: {names}"]
    if len(values) and np.ptp(values) < 0.05 * abs(values.mean()) and abs(values.mean() - 1) > 0.05:
        return [f"all changes are multiplied by {values.mean():.3g}: look at alpha / rank"]
    turned = [name for name, gain in gains.items() if abs(gain - 1) > 0.2]
    return [f"tensors with another change: {', '.join(turned[:5])}"] if turned else []
