"""What a stage found. Everything is plain JSON, and may be sent to others."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, TypedDict

Unit = Literal["learned tokens/s", "tokens/s", "GFLOP/s", "GB", "s", "ratio", "relative"]
LESS_IS_BETTER: frozenset[Unit] = frozenset({"GB", "s", "relative"})


class Deviation(TypedDict):
    """``error``: the largest difference from what ``what`` should be, relative to its size; None if it is not
    a finite number, which is a failure too."""

    what: str
    error: float | None
    limit: float


class MeasuredFigure(TypedDict):
    """``name`` is the same on all machines."""

    name: str
    value: float
    unit: Unit


class Findings(TypedDict):
    """``notes``: how the figures were measured, if that differs between machines."""

    deviations: list[Deviation]
    figures: list[MeasuredFigure]
    notes: list[str]


class StageResult(Findings):
    """``reason``: why it failed or was skipped."""

    stage: str
    status: Literal["ok", "fail", "skipped"]
    reason: str | None
    seconds: float


class SkippedStage(Exception):
    """This machine cannot take the stage; the message says why."""


def deviation(what: str, error: float, limit: float) -> Deviation:
    return {"what": what, "error": float(error) if math.isfinite(error) else None, "limit": limit}


def figure(name: str, value: float, unit: Unit) -> MeasuredFigure:
    return {"name": name, "value": float(value), "unit": unit}


def largest(deviations: Sequence[Deviation], name: str) -> list[MeasuredFigure]:
    """The largest of ``deviations`` as the figure ``name``; nothing if one of them is not finite."""
    errors = [found["error"] for found in deviations if found["error"] is not None]
    return [figure(name, max(errors), "relative")] if len(errors) == len(deviations) else []


def holds(found: Deviation) -> bool:
    return found["error"] is not None and found["error"] <= found["limit"]
