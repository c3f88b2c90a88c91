"""Exported artefacts as readers see them: what they cost, and what they keep of the live adapter."""

from __future__ import annotations

from collections.abc import Sequence

from tunesmith.display.console import size
from tunesmith.display.words import number
from tunesmith.reports.measures import interval, title
from tunesmith.runs.artefacts import OWN_READER, Distances, Exported

HEAD = (
    "kind",
    "size",
    "memory",
    "speed, 95 % interval",
    "KL from live, 95 % interval",
    "effect kept",
    "equal top tokens",
    "loss, less live, 95 % interval",
    "accepted",
)
LEAD = (
    "Each artefact was reloaded in a fresh process and compared with the live adapter on held-out rows. KL "
    "and loss are in nats a token. Memory and speed are of one answer at a time on the machine that exported "
    "it."
)


def cells(artefact: Exported) -> tuple[str, ...]:
    """A row under `HEAD`."""
    kl, cost = artefact.distances, artefact.cost
    return (
        artefact.kind,
        size(artefact.size_bytes),
        "–" if cost is None else size(cost.memory_bytes),
        "–" if cost is None else interval(cost.speed),
        divergence(kl),
        "–" if kl.survived is None else number(kl.survived, "%"),
        number(kl.top, "%"),
        "–" if artefact.loss is None else interval(artefact.loss, of="delta", bare=True),
        "yes" if artefact.accepted else "rejected",
    )


def divergence(kl: Distances) -> str:
    """The mean with its interval."""
    ends = "" if kl.low is None or kl.high is None else f" ({kl.low:.2g} to {kl.high:.2g})"
    return f"{kl.mean:.2g}{ends}"


def notes(artefacts: Sequence[Exported]) -> list[str]:
    """For each artefact: why it was rejected, the tasks that it was asked, and where it lies."""
    lines: list[str] = []
    for artefact in artefacts:
        parts = [f"checkpoint {artefact.checkpoint}, {artefact.rows} rows, in {artefact.path.name}"]
        if artefact.judged_by != OWN_READER:
            parts.append(f"judged by {artefact.judged_by}")
        parts += [f"rejected: {reason}" for reason in artefact.reasons]
        parts += [
            f"{title(score)} {interval(score)}, less live {interval(score, of='delta')}"
            for score in artefact.scores
        ]
        lines.append(f"{artefact.kind}: {'; '.join(parts)}")
    return lines
