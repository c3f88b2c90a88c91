"""How far is an artefact from the live adapter? Log-probabilities of both and of the base at the same places
of held-out rows, the loss on these rows, the weights by their sketches, and where answers end."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from tunesmith.data import formats
from tunesmith.data.examples import JSON, Conversation, Demonstration, Example, Judged
from tunesmith.engine import generation
from tunesmith.errors import ExportError, listing
from tunesmith.evaluation import statistics
from tunesmith.evaluation.evaluate import IMITATED
from tunesmith.evaluation.statistics import Statistic, TaskStatistics
from tunesmith.events import Tick
from tunesmith.exports.kind import UNROUNDED, Tolerance
from tunesmith.model import abilities, kernels, logprobs
from tunesmith.runs.artefacts import FAINT, Distances, Stops
from tunesmith.runs.config import RunConfig
from tunesmith.runs.directory import VALID, Run
from tunesmith.runs.records import ExampleScore, Score
from tunesmith.tokens import template
from tunesmith.tokens.template import Renderer

VALUES = 1 << 27
"""Log-probabilities that are kept of each model at most: 512 MiB."""
SEED = 0
"""Of the bootstrap."""
ENOUGH = 0.05
"""An artefact "does not stop" if chance explains the lost ends of its answers with less probability
(McNemar)."""


class Probe(NamedTuple):
    """A held-out row: its ids, where its answer begins, and the places whose next token is predicted."""

    ids: list[int]
    start: int
    places: list[int]


def examples(run: Run, config: RunConfig, limit: int) -> list[Example]:
    """The first ``limit`` held-out rows, or training rows if none are held out. Raises ExportError if no
    held-out row can be read."""
    held_out = run.path / VALID
    if held_out.is_file() and held_out.stat().st_size:
        read = formats.read([str(held_out)], config.data.model_copy(update={"format": "auto"}))
        if not read.examples:
            hint = "put the run's held-out rows back, or delete the file: then training rows are used"
            raise ExportError(
                f"no row can be read\n{formats.faults(read.dropped)}", where=str(held_out), hint=hint
            )
    else:
        read = formats.read(list(config.data.train), config.data)
    return IMITATED.select(read.examples).examples[:limit]


def rows(run: Run, config: RunConfig, renderer: Renderer, limit: int) -> list[Probe]:
    """`examples` as tokens. Raises ExportError if there are none, or none can be rendered."""
    rendered = template.render(examples(run, config, limit), renderer, config.template, config.batch.length)
    if not rendered.rows:
        reasons = listing([f"{row.source}: {row.message}" for row in rendered.dropped])
        raise ExportError(f"no row can be rendered to measure the artefact\n{reasons}", where=str(run.path))
    probes: list[Probe] = []
    for row in rendered.rows[:limit]:
        places = (np.flatnonzero(row.tokens.targets[1:] > 0)).tolist()
        probes.append(Probe(row.tokens.ids.tolist(), row.tokens.start, places))
    return probes


def needed_options(run: Run, config: RunConfig, renderer: Renderer, limit: int) -> dict[str, JSON]:
    """The variables without which the chat template renders prompts of the rows to other ids."""
    options: dict[str, JSON] = {}
    for example in examples(run, config, limit):
        if isinstance(example, Demonstration | Judged):
            asked_by = Conversation(example.conversation.messages[:-1], example.conversation.tools)
            options |= renderer.needed_options(asked_by)
    return options


def thinned(probes: Sequence[Probe], width: int) -> list[Probe]:
    """The rows with evenly fewer places, so that ``width`` log-probabilities at each fit into `VALUES`."""
    total = sum(len(probe.places) for probe in probes)
    step = -(-total * width // VALUES)
    return [probe._replace(places=probe.places[:: max(1, step)]) for probe in probes]


def log_probabilities(
    net: nn.Module, probes: Sequence[Probe], path: Path, tick: Callable[[int, int], None]
) -> None:
    """Write (P, V) float32, the log-probabilities at all places in order, as ``path`` in numpy's format.
    tick: called with the number of rows that are done, and of all."""
    net.eval()
    splits = abilities.splits(net)
    parts: list[np.ndarray] = []
    for done, probe in enumerate(probes, start=1):
        if probe.places:
            parts.append(_at_places(net, probe, splits))
        tick(done, len(probes))
    np.save(path, np.concatenate(parts))


def _at_places(net: nn.Module, probe: Probe, splits: bool) -> np.ndarray:
    """(places, V) float32. splits: whether the head of ``net`` can be applied to some places alone."""
    ids, places = mx.array(probe.ids)[None], mx.array(probe.places)
    if splits:
        logits = logprobs.head(net, logprobs.features(net, ids)[0][places])
    else:
        logits = net(ids)[0][places]
    logits = logits.astype(mx.float32)
    return np.array(logits - kernels.log_sums(logits)[..., None])


def distances(
    live: np.ndarray, base: np.ndarray, artefact: np.ndarray, of_row: Sequence[int] | None = None
) -> Distances:
    """From (P, V) log-probabilities of the three. If the artefact or base have fewer rows in their embedding,
    the ids that all of them know are compared. of_row: the row of each place, for the interval of the
    mean."""
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
    low, high = _interval(values, of_row)
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
        low=low,
        high=high,
    )


def _interval(values: np.ndarray, of_row: Sequence[int] | None) -> tuple[float | None, float | None]:
    """95 % interval of the mean of ``values``, over rows."""
    if of_row is None or not np.isfinite(values).all():
        return None, None
    score = _summarised("kl", None, _by_row(values, of_row))
    return score.low, score.high


def rows_of(probes: Sequence[Probe]) -> list[int]:
    """The row of each place, in the order in which `log_probabilities` writes them."""
    return [row for row, probe in enumerate(probes) for _ in probe.places]


def loss(live: np.ndarray, artefact: np.ndarray, probes: Sequence[Probe]) -> Score | None:
    """The artefact's loss on the rows in nats a learned token; its difference is that from the live adapter,
    paired by row. None if the artefact's is not finite."""
    next_ids = np.array([probe.ids[place + 1] for probe in probes for place in probe.places])
    places, of_row = np.arange(len(next_ids)), rows_of(probes)
    if next_ids.max() >= artefact.shape[1]:
        return None
    sides = [-np.asarray(values[places, next_ids], np.float64) for values in (live, artefact)]
    if not np.isfinite(sides).all():
        return None
    return _summarised("loss", _by_row(sides[0], of_row), _by_row(sides[1], of_row))


def _by_row(values: np.ndarray, of_row: Sequence[int]) -> list[ExampleScore]:
    sums = np.bincount(of_row, weights=values)
    counts = np.bincount(of_row)
    return [
        ExampleScore(f"row {row}", float(sums[row] / counts[row]), float(counts[row]))
        for row in np.flatnonzero(counts)
    ]


def _summarised(name: str, live: Sequence[ExampleScore] | None, artefact: Sequence[ExampleScore]) -> Score:
    statistic = Statistic(name, lambda score: score.value, better="lower", headline=True, unit="nats")
    task = TaskStatistics(f"export.{name}", "1", [statistic])
    return statistics.judge(statistics.summarise(task, live, artefact, SEED))[0]


def _divergence(p: np.ndarray, q: np.ndarray) -> np.ndarray:
    with np.errstate(invalid="ignore"):  # a probability of 0 adds nothing
        terms = np.where(np.isneginf(p), 0, np.exp(p) * (p - q))
    return np.maximum(terms.sum(axis=1), 0)  # a divergence below 0 is rounding


def _mean(parts: list[np.ndarray]) -> float:
    return float(np.concatenate(parts).mean())


class Ended(NamedTuple):
    """``ids``: the answer. ``stopped``: it ended by itself."""

    ids: list[int]
    stopped: bool


def answers(net: nn.Module, probes: Sequence[Probe], ends: Sequence[int], tick: Tick) -> list[Ended]:
    """A greedy answer to the prompt of each row, up to half as long again as the longest trained one."""
    prompted = [probe for probe in probes if probe.start > 1]
    if not prompted:
        return []
    longest = max(len(probe.ids) - probe.start for probe in prompted)
    limit = min(256, 16 + 3 * longest // 2)
    prompts = [probe.ids[: probe.start] for probe in prompted]
    made = generation.generate(net, prompts, max_tokens=limit, eos_ids=list(ends), on_done=tick)
    return [Ended(answer.ids, answer.finish == "stop") for answer in made]


def trained_ends(probes: Sequence[Probe], ends: Sequence[int]) -> list[int]:
    """The tokens of ``ends`` that end rows."""
    last = {probe.ids[-1] for probe in probes}
    return [token for token in ends if token in last]


def stops(
    live: Sequence[Ended], artefact: Sequence[Ended], trained: Sequence[int], ends: Sequence[int]
) -> Stops:
    """``trained``: the tokens that end rows. ``ends``: those that end an answer of the artefact."""
    pairs = list(zip(live, artefact, strict=True))
    return Stops(
        n=len(live),
        live=sum(answer.stopped for answer in live),
        artefact=sum(answer.stopped for answer in artefact),
        equal=sum(own.ids == other.ids for own, other in pairs),
        undeclared=tuple(token for token in trained if token not in ends),
        lost=sum(own.stopped and not other.stopped for own, other in pairs),
        gained=sum(other.stopped and not own.stopped for own, other in pairs),
    )


@dataclass(frozen=True)
class Carried:
    """How much of the adapter's change of each tensor the artefact has, from sketches.

    ``gains``: by tensor, the artefact's change in the direction of the adapter's, 1 if it is whole.
    ``error``: squared length of the difference of the two, as a share of the change, over all tensors.
    ``missing``: changed tensors that the artefact does not have. ``shares``: by tensor, the length of the
    adapter's change as a share of the tensor's."""

    gains: Mapping[str, float] = field(default_factory=dict)
    error: float = 0.0
    missing: tuple[str, ...] = ()
    shares: Mapping[str, float] = field(default_factory=dict)


def carried(
    base: Mapping[str, np.ndarray], live: Mapping[str, np.ndarray], artefact: Mapping[str, np.ndarray]
) -> Carried:
    gains: dict[str, float] = {}
    shares: dict[str, float] = {}
    missing: list[str] = []
    wrong = total = 0.0
    for name, value in live.items():
        if name not in base or base[name].shape != value.shape:
            continue  # rows were added
        change = value.astype(np.float64) - base[name]
        size, whole = float(np.square(change).sum()), float(np.square(base[name]).sum())
        if size <= 1e-12 * whole:
            continue
        if name not in artefact or artefact[name].shape != value.shape:
            missing.append(name)
            continue
        arrived = artefact[name].astype(np.float64) - base[name]
        gains[name] = float((arrived * change).sum()) / size
        shares[name] = (size / whole) ** 0.5 if whole else float("inf")
        wrong += float(np.square(arrived - change).sum())
        total += size
    return Carried(gains, wrong / total if total else 0.0, tuple(missing), shares)


def distant(measured: Distances, tolerance: Tolerance, *, effect: bool = True) -> list[str]:
    """How the artefact is further from the live adapter than ``tolerance``, one sentence each. effect:
    whether ``measured`` can show what the adapter changes."""
    problems: list[str] = []
    if not np.isfinite([measured.mean, measured.from_base]).all():
        problems.append("its log-probabilities are not finite")
    if effect and measured.base > FAINT and measured.mean >= measured.from_base:
        problems.append("inert: it is nearer to the base than to the adapter")
    limits = {
        "mean KL divergence": (measured.mean, tolerance.kl),
        "99th percentile of the KL divergence": (measured.p99, tolerance.p99),
    }
    if effect:
        limits["share of the adapter's effect that was lost"] = (measured.lost, tolerance.lost)
    problems += [
        f"{name} {value:.3g}, at most {most:g}" for name, (value, most) in limits.items() if not value <= most
    ]
    if measured.top < tolerance.top:
        problems.append(f"equal top tokens {measured.top:.1%}, at least {tolerance.top:.0%}")
    return problems


def reasons(
    far: Sequence[str], stopping: Stops, weights: Carried, tolerance: Tolerance, rounded: float | None
) -> list[str]:
    """Why the artefact is rejected, one sentence each; empty if it is accepted. far: what `distant` says."""
    problems = [*far]
    if problems:
        problems += diagnosis(weights, rounded)
    else:
        problems += uncarried(weights, tolerance, rounded)
    if stopping.undeclared:
        tokens = ", ".join(map(str, stopping.undeclared))
        problems.append(f"it never stops: the trained end token {tokens} is not an end token of the artefact")
    elif stopping.artefact < stopping.live / 2 and _is_shown(stopping):
        problems.append(
            f"it does not stop: {stopping.artefact} of {stopping.n} answers end, live {stopping.live}"
        )
    return problems


def _is_shown(stopping: Stops) -> bool:
    """Whether the answers are enough to say that fewer end than those of the live adapter."""
    return statistics.mcnemar(stopping.gained, stopping.lost) < ENOUGH


def undecided(stopping: Stops) -> tuple[str, ...]:
    """A remark if fewer than half as many answers end, and they are too few to reject the artefact."""
    if stopping.undeclared or stopping.artefact >= stopping.live / 2 or _is_shown(stopping):
        return ()
    return (
        f"{stopping.artefact} of {stopping.n} answers end by themselves, live {stopping.live}: too few to "
        "say whether it stops; measure it on more --rows",
    )


def uncarried(weights: Carried, tolerance: Tolerance, rounded: float | None) -> list[str]:
    """A sentence if the artefact lacks a changed tensor, or one holds less than half of its change and
    neither rounding nor quantising can be the reason. The distances on few rows may not show it."""
    if weights.missing:
        return diagnosis(weights, rounded)
    step = UNROUNDED if tolerance.step and rounded == 1.0 else tolerance.step
    if step is None:
        return []
    lost = [name for name, gain in weights.gains.items() if gain < 0.5 and weights.shares[name] > step]
    if not lost:
        return []
    return [f"{len(lost)} of {len(weights.gains)} changed tensors lost their change: {', '.join(lost[:5])}"]


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
