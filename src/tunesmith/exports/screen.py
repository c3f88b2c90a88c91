"""What was measured of an artefact, in lines for the terminal."""

from __future__ import annotations

from collections.abc import Iterator

from tunesmith.display.console import size
from tunesmith.reports.measures import answer, interval, title
from tunesmith.runs.artefacts import Exported
from tunesmith.runs.records import Score


def lines(exported: Exported) -> Iterator[str]:
    kl, stops = exported.distances, exported.stops
    yield (
        f"KL divergence from the live adapter, read by {exported.judged_by}, {kl.n} tokens of "
        f"{exported.rows} rows: mean {kl.mean:.2g}, "
        f"median {kl.median:.2g}, p95 {kl.p95:.2g}, p99 {kl.p99:.2g}, max {kl.max:.2g} nats"
    )
    survived = "" if kl.survived is None else f", {kl.survived:.1%} of the adapter's effect survived"
    yield f"KL divergence of the base from the live adapter: mean {kl.base:.2g} nats{survived}"
    if exported.own_reading is not None:
        yield f"by tunesmith's own reader: mean {exported.own_reading.mean:.2g}"
    yield f"equal top tokens {kl.top:.2%}, RMS Δp {kl.rms_p:.2g}"
    yield (
        f"answers: {stops.equal} of {stops.n} the same, {stops.artefact} end by themselves, live {stops.live}"
    )
    if exported.weights.survived_rounding is not None:
        yield f"rounding left {exported.weights.survived_rounding:.1%} of the change of the weights"
    if exported.loss is not None:
        yield f"loss: {against_live(exported.loss)}"
    yield from (f"{title(score)}: {against_live(score)}" for score in exported.scores)
    cost = f"size {size(exported.size_bytes)}"
    if exported.cost is not None:
        cost += f", loaded in {exported.cost.load_s:.1f} s, memory {size(exported.cost.memory_bytes)}"
        cost += f", {interval(exported.cost.speed)}"
    yield cost
    yield from exported.remarks


def against_live(score: Score) -> str:
    """The artefact's value, and its difference from the live adapter."""
    return f"{interval(score)}, difference from live {interval(score, of='delta')}: {answer(score)}"
