"""A score as readers see it: its title in words, its value with unit and interval, and what came of its
target."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import PurePath
from typing import Literal

from tunesmith.display.charts import Difference
from tunesmith.display.words import SIGNS, number
from tunesmith.evaluation.tasks import Question, about
from tunesmith.runs.directory import VALID
from tunesmith.runs.records import Record, Score


@dataclass(frozen=True)
class Measure:
    """A score, and the record it is from."""

    score: Score
    record: Record

    @property
    def question(self) -> Question:
        return about(self.score.task).question


FEW = 8
"""Fewer examples hardly show a difference, however large: the interval is that of the few."""


def title(score: Score) -> str:
    """In words: "Harmful requests refused", "Right tool, tool=search"."""
    return about(score.task).title_of(score.name, score.part)


def identifier(score: Score) -> str:
    """Task, statistic and part: "tool_calls", "drift.text perplexity", "tool_calls right_tool,
    tool=search"."""
    name = "" if score.name == score.task.rpartition(".")[2] else f" {score.name}"
    return f"{score.task}{name}" + (f", {score.part}" if score.part else "")


def label(score: Score) -> str:
    """The title, with the identifier in brackets if that says more."""
    return title(score) if title(score) == identifier(score) else f"{title(score)} ({identifier(score)})"


def interval(score: Score, *, of: Literal["value", "delta", "base"] = "value", bare: bool = False) -> str:
    """ "50.0 % (41.2 to 58.8)"; the base's value has no interval. bare: without the unit."""
    if of == "base":
        return number(score.base, score.unit, bare=bare)
    signed = of == "delta"
    value, low, high = (
        (score.delta, score.delta_low, score.delta_high) if signed else (score.value, score.low, score.high)
    )
    text = number(value, score.unit, signed=signed, bare=bare)
    if low is None or high is None:
        return text
    ends = (number(end, score.unit, signed=signed, bare=True) for end in (low, high))
    return f"{text} ({' to '.join(ends)})"


def met(score: Score) -> str:
    """What came of the target: kept, missed, not shown; "" if there is none."""
    if not score.target:
        return ""
    return "not shown" if score.met is None else "kept" if score.met else "missed"


def missed(score: Score) -> bool:
    """Whether the target is missed by a change for the worse. A gain may be beyond a target that bounds the
    change, and its verdict may be lost in the correction for many tests."""
    if not score.target or score.met is not False:
        return False
    gain = (score.delta or 0.0) * {"higher": 1, "lower": -1}.get(score.better or "", 0)
    return {"improved": False, "regressed": True}.get(score.verdict or "", gain <= 0)


def alone(score: Score) -> bool:
    """Whether the score has a base and no interval: too few examples."""
    return score.better is not None and score.delta is not None and score.delta_low is None


def reached(score: Score) -> str:
    """ "84.6 % of the base" if the target is a share of the base, else ""."""
    if not score.base or "of the base" not in (score.target or ""):
        return ""
    return f"{number(score.value / score.base, '%')} of the base"


def too_few(score: Score) -> bool:
    """Whether its examples are too few to show a difference, although the interval excludes 0."""
    low, high = score.delta_low, score.delta_high
    beyond = low is not None and high is not None and low * high > 0
    return beyond and score.verdict == "no difference shown" and score.n < FEW


def answer(score: Score) -> str:
    """In a few words: what came of the target, then the verdict."""
    parts = [f"target {met(score)}"] if score.target else []
    parts += ["too few to judge" if too_few(score) else score.verdict] if score.verdict else []
    if score.delta is None:
        return "; ".join([*parts, "base not asked"])
    return "; ".join(parts) or "not judged"


def subset(record: Record) -> str:
    """ "limited by --limit 20" if only some rows or items were asked, else ""."""
    return f"limited by --limit {record.limit}" if record.limit else ""


def elsewhere(record: Record) -> str | None:
    """The data files that were named, without their folders; None for held-out rows or a suite."""
    if record.data in (VALID, None):
        return None
    paths = record.data if isinstance(record.data, tuple) else (record.data,)
    return ", ".join(PurePath(str(path)).name for path in paths)


def differences(scores: Sequence[Score]) -> list[Difference]:
    """A row of the forest plot for each score with a base and a better direction."""
    rows: list[Difference] = []
    for score in scores:
        if score.delta is None or not score.better or not math.isfinite(score.delta):
            continue
        factor = (100.0 if score.unit == "%" else 1.0) * (-1 if score.better == "lower" else 1)
        gain, low, high = (
            None if value is None else factor * value
            for value in (score.delta, score.delta_low, score.delta_high)
        )
        if low is not None and high is not None:
            low, high = sorted((low, high))
        label, sign = title(score), SIGNS.get(score.verdict or "", "")
        remarks = " ".join(filter(None, [sign, answer(score)])) + f"; n {score.n:,}"
        remarks += "; less is better" if score.better == "lower" else ""
        scale = "points" if score.unit in ("%", "points") else score.unit or label
        change = interval(score, of="delta")
        rows.append(Difference(label, remarks, gain or 0.0, low, high, change, score.verdict, scale))
    return rows
