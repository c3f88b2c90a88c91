"""Numbers with unit and sign, and texts shortened and made safe to show."""

from __future__ import annotations

import json
import math
from typing import Any

from tunesmith.display.console import size
from tunesmith.display.text import escaped

SIGNS = {"improved": "+", "regressed": "–", "unchanged": "=", "no difference shown": "="}
"""A change without colour."""
TONES = {"improved": "good", "regressed": "error", "unchanged": "soft", "no difference shown": "soft"}
"""Style classes of ``base.html``."""
STATES = {
    "stopped_early": "stopped early",
    "unfinished": "not finished, with no end recorded",
    "running": "still running, or was killed",
}
"""The statuses of a run that are called by other words than their names."""


def number(value: float | None, unit: str = "", *, signed: bool = False, bare: bool = False) -> str:
    """``0.5, "%"`` is "50.0 %", and as a difference (``signed``) "+50.0 points"; "–" for None. ``bare``:
    without the unit."""
    if value is None:
        return "–"
    value = float(value)
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


def cut(text: str | None, limit: int) -> str | None:
    """The first ``limit`` letters of ``text``, with how many are left out, and without letters that UTF-8 or
    a page cannot hold."""
    if text is None:
        return None
    left = len(text) - limit
    return escaped(text if left <= 0 else f"{text[:limit]}… ({left:,} more letters)")


def setting(value: Any) -> str:
    """A setting as a reader would write it: lists without brackets, texts without quotes, the rest as
    JSON."""
    if isinstance(value, list):
        return ", ".join(map(setting, value))
    return value if isinstance(value, str) else json.dumps(value, default=str)
