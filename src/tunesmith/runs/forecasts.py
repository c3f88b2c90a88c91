"""What a run was expected to need, beside what it needed: ``plan.json`` in its directory.

Nothing that a run computes depends on this file: a resumed run does not need it. Runs of 0.1.0 have none."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal

from tunesmith.errors import DataError
from tunesmith.files import read_json, write_json
from tunesmith.runs.directory import FORECAST, Run

VERSION = 1
RENEW = "remove it: it only compares what was expected with what was measured; no run needs it"


@dataclass(frozen=True, slots=True)
class Amount:
    """An estimate with the interval that covers nine of ten measured values."""

    value: float
    low: float
    high: float

    def __add__(self, other: Amount) -> Amount:
        return Amount(self.value + other.value, self.low + other.low, self.high + other.high)

    def covers(self, measured: float) -> bool:
        return self.low <= measured <= self.high


@dataclass(frozen=True, slots=True)
class Term:
    """One part of what is needed. ``note``: what it consists of, or when it is needed."""

    name: str
    amount: Amount
    note: str = ""


@dataclass(frozen=True, slots=True)
class Forecast:
    """What a run needs. ``memory``: the parts of ``peak``, in bytes of MLX's allocator, at the moment
    ``moment`` at which it is reached. ``beside``: what is needed at other moments, or outside of MLX.
    ``program``: bytes of the process outside of MLX. ``ceiling``, ``others``: as in `machine.memory.Room`.
    ``disk``: bytes that the run writes. ``update_s``, ``total_s``: seconds of an update, on average, and of
    the whole run. ``basis``: what time and memory were computed from. ``swap``: bytes that the machine could
    swap out."""

    memory: tuple[Term, ...]
    moment: str
    peak: Amount
    beside: tuple[Term, ...]
    program: int
    ceiling: int
    others: int
    disk: tuple[Term, ...]
    steps: int
    update_s: Amount
    total_s: Amount
    basis: Literal["shapes", "measured updates"]
    swap: int = 0

    @property
    def needed(self) -> Amount:
        """Bytes of the whole process at its peak."""
        return self.peak + Amount(self.program, self.program, self.program)

    @property
    def cannot_fit(self) -> bool:
        """Whether even the low end of the interval is above what the machine has."""
        return self.needed.low > self.ceiling

    @property
    def may_not_fit(self) -> bool:
        """Whether the high end is above what other programs leave."""
        return self.needed.high > max(0, self.ceiling - self.others)


@dataclass(frozen=True, slots=True)
class MeasuredRun:
    """What a run needed. ``peak``: bytes of MLX's allocator from the first update on, without what the
    process held before the run; ``resident``: of the process. ``update_s``: median seconds of an update.
    ``total_s``: of this and earlier sessions of the run. ``steps``: updates that were made."""

    peak: int
    resident: int
    update_s: float
    total_s: float
    steps: int
    status: str


@dataclass(frozen=True, slots=True)
class PlanFile:
    """``plan.json``. ``measured`` is None until the run ends."""

    version: int
    predicted: Forecast
    measured: MeasuredRun | None = None


def read(run: Run) -> PlanFile | None:
    """None if the run has none. Raises DataError if it cannot be read."""
    path = run.path / FORECAST
    if not path.exists() and not path.is_symlink():
        return None
    return read_json(path, PlanFile, DataError, RENEW)


def write(run: Run, predicted: Forecast, measured: MeasuredRun | None = None) -> None:
    plan = PlanFile(VERSION, predicted, measured)
    write_json(run.path / FORECAST, json.loads(json.dumps(asdict(plan))))


def joined(before: MeasuredRun | None, now: MeasuredRun) -> MeasuredRun:
    """The outcome of a run that was resumed: the higher peak, and all updates."""
    if before is None:
        return now
    peak, resident = max(before.peak, now.peak), max(before.resident, now.resident)
    return replace(now, peak=peak, resident=resident)


@dataclass(frozen=True, slots=True)
class Error:
    """How far a forecast was from what was measured; 0.1 is ten per cent too much."""

    run: Path
    plan: PlanFile
    peak: float
    update: float
    total: float
    covered: bool


def errors(runs: Sequence[tuple[Path, PlanFile]]) -> list[Error]:
    """Of the runs that have ended."""
    rows: list[Error] = []
    for path, plan in runs:
        measured, predicted = plan.measured, plan.predicted
        if measured is None or not (measured.peak and measured.update_s):
            continue
        finished = measured.steps >= predicted.steps
        rows.append(
            Error(
                path,
                plan,
                predicted.peak.value / measured.peak - 1,
                predicted.update_s.value / measured.update_s - 1,
                predicted.total_s.value / measured.total_s - 1 if finished else float("nan"),
                predicted.peak.covers(measured.peak),
            )
        )
    return rows
