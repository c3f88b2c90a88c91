"""Numbers and texts of a report as a reader sees them: with unit, sign and interval; shares in per cent, text
made harmless."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

from tunesmith.display.console import size
from tunesmith.display.text import escaped

SIGNS = {"improved": "+", "regressed": "–", "unchanged": "=", "no difference shown": "="}
"""How a change is told without colour."""
TONES = {"improved": "good", "regressed": "error", "unchanged": "soft", "no difference shown": "soft"}
"""Style classes of ``base.html``."""
STATES = {
    "stopped_early": "stopped early",
    "unfinished": "not finished, with no end recorded",
    "running": "still running, or was killed",
}
"""What a run's status is called, where that is not its name."""


def subset(score: Mapping[str, Any]) -> str:
    """Says so where not all rows, items, or documents of a benchmark were asked, else nothing."""
    return f"limited by --limit {score['limit']}" if score.get("limit") else ""


def number(value: float | None, unit: str = "", *, signed: bool = False, bare: bool = False) -> str:
    """``0.5, "%"`` is "50.0 %", and as a difference (``signed``) "+50.0 points"; "–" for none. ``bare``:
    without the unit."""
    if value is None:
        return "–"
    value = float(value)  # report.json writes what is not finite as its name
    if not math.isfinite(value):
        return str(value)
    if unit == "bytes":
        return ("−" if value < 0 else "+" if signed else "") + size(abs(value))
    if unit == "%":
        return f"{100 * value:{'+' if signed else ''}.1f}" + ("" if bare else " points" if signed else " %")
    text = (
        f"{value:{'+' if signed else ''},.4g}" if abs(value) < 1e5 else f"{value:{'+' if signed else ''},.0f}"
    )
    return text if bare or not unit else f"{text} {unit}"


def interval(score: Mapping[str, Any], *, of: str = "value", bare: bool = False) -> str:
    """``of``: "value", "delta" or "base". "50.0 % (41.2 to 58.8)"; a base has no interval of its own."""
    unit, signed = score.get("unit") or "", of == "delta"
    if of == "base":
        return number(base(score), unit, bare=bare)
    names = ("delta_low", "delta_high") if signed else ("low", "high")
    low, high = (score.get(name) for name in names)
    text = number(score.get(of), unit, signed=signed, bare=bare)
    if low is None or high is None:
        return text
    return f"{text} ({number(low, unit, signed=signed, bare=True)} to {number(high, unit, signed=signed, bare=True)})"


def base(score: Mapping[str, Any]) -> float | None:
    """What the base scored; None where it was not asked."""
    return None if score.get("delta") is None else float(score["value"]) - float(score["delta"])


def named(score: Mapping[str, Any]) -> str:
    """The statistic and the part it is of: "right_tool, tool=search"."""
    name = str(score["name"])
    return f"{name}, {score['part']}" if score.get("part") else name


def title(score: Mapping[str, Any]) -> str:
    """The task and what of it: "tool_calls", "drift.text perplexity", "tool_calls right_tool,
    tool=search"."""
    task, name = str(score["task"]), named(score)
    if score["name"] != task.rpartition(".")[2]:
        return f"{task} {name}"
    return task + name.removeprefix(str(score["name"]))


def met(score: Mapping[str, Any]) -> str:
    """What came of a target: kept, missed, not shown; "" where there is none."""
    return (
        "" if not score.get("target") else {True: "kept", False: "missed"}.get(score.get("met"), "not shown")
    )  # type: ignore[arg-type]


def reached(score: Mapping[str, Any]) -> str:
    """Where a target is a share of the base, what share it is: "84.6 % of the base"; else nothing."""
    was = base(score)
    return (
        f"{number(float(score['value']) / was, '%')} of the base"
        if was and "of the base" in (score.get("target") or "")
        else ""
    )


def cut(text: str | None, limit: int) -> str | None:
    """``text`` of at most ``limit`` letters, saying how many are left out; no letter that UTF-8 or a page
    cannot hold."""
    if text is None:
        return None
    left = len(text) - limit
    return escaped(text if left <= 0 else f"{text[:limit]}… ({left:,} more letters)")


def setting(value: Any) -> str:
    """A setting as one would write it: lists without brackets, the rest as JSON; text as it is."""
    if isinstance(value, list):
        return ", ".join(map(setting, value))
    return value if isinstance(value, str) else json.dumps(value, default=str)
