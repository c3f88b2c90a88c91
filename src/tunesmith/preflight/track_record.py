"""How far were the forecasts of runs from what was measured?"""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass
from pathlib import Path

from tunesmith import events
from tunesmith.display.console import size
from tunesmith.errors import DataError
from tunesmith.events import Notice, Sink
from tunesmith.runs import forecasts
from tunesmith.runs.directory import Run
from tunesmith.runs.forecasts import Error, PlanFile
from tunesmith.runs.search import folders


@dataclass(frozen=True)
class TrackRecord:
    """``errors``: of each run that has ended and has a ``plan.json``. ``without``: runs that have none, or
    have not ended."""

    errors: tuple[Error, ...]
    without: int

    def to_json(self) -> dict[str, object]:
        rows = [
            {
                "run": str(error.run),
                "peak_predicted": error.plan.predicted.peak.value,
                "peak_measured": error.plan.measured.peak if error.plan.measured else None,
                "peak_error": error.peak,
                "peak_covered": error.covered,
                "update_error": error.update,
                "total_error": None if math.isnan(error.total) else error.total,
                "basis": error.plan.predicted.basis,
            }
            for error in self.errors
        ]
        return {"runs": rows, "without": self.without}

    def lines(self) -> list[str]:
        if not self.errors:
            return [f"no run with a forecast has ended yet ({self.without:,} without)"]
        lines = [f"{'predicted':>12}{'measured':>12}{'peak':>9}{'update':>9}{'in all':>9}  run"]
        for error in self.errors:
            measured = error.plan.measured
            assert measured is not None  # only runs that have ended are listed
            sizes = f"{size(error.plan.predicted.peak.value):>12}{size(measured.peak):>12}"
            shares = "".join(f"{_share(value):>9}" for value in (error.peak, error.update, error.total))
            outside = "" if error.covered else "  outside of its interval"
            lines.append(f"{sizes}{shares}  {error.run.name}{outside}")
        peaks = [abs(error.peak) for error in self.errors]
        covered = sum(error.covered for error in self.errors)
        lines.append(
            f"peak of memory: {statistics.median(peaks):.0%} off in the median, {max(peaks):.0%} at most; "
            f"{covered:,} of {len(peaks):,} inside of their intervals"
        )
        return lines


def _share(value: float) -> str:
    return "–" if math.isnan(value) else f"{value:+.0%}"


def track_record(folder: Path, notify: Sink = events.silent) -> TrackRecord:
    """Of the runs under ``folder``. A ``plan.json`` that cannot be read is named in a warning."""
    plans: list[tuple[Path, PlanFile]] = []
    n_runs = 0
    for path in folders(folder):
        n_runs += 1
        try:
            plan = forecasts.read(Run(path))
        except DataError as error:
            notify(Notice(error.what, level="warning", where=error.where, hint=error.hint))
            continue
        if plan is not None:
            plans.append((path, plan))
    errors = tuple(forecasts.errors(plans))
    return TrackRecord(errors, n_runs - len(errors))
