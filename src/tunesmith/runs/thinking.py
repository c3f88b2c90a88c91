"""How thinking stands in a run: which answers are learned with their reasoning, and what prompts ask for."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypedDict

from tunesmith.settings.config import JSON


class Reasoning(TypedDict):
    """The entry ``reasoning`` of data/plan.json. ``switch``: the variable of the template that turns thinking
    on and off, or null. ``decided_by``: the rows, or the setting that decides for all."""

    answers: int
    with_reasoning: int
    switch: str | None
    decided_by: str


def line(thinking: bool, reasoning: Reasoning) -> str | None:
    """In one line, or None if there are no answers, or none has reasoning and the template has no switch."""
    if not reasoning["answers"]:
        return None
    counts = f"{reasoning['with_reasoning']:,} of {reasoning['answers']:,} answers have reasoning"
    if reasoning["switch"] is not None:
        return f"thinking is {'on' if thinking else 'off'} in prompts: {counts}"
    return f"{counts}, and it is learned" if reasoning["with_reasoning"] else None


def of_counts(counts: Mapping[str, JSON]) -> str | None:
    """The line of a run's plan; None if the run is older than the entry, or has nothing to say."""
    reasoning = counts.get("reasoning")
    if not isinstance(reasoning, dict):
        return None
    switch, numbers = reasoning.get("switch"), [reasoning.get(key) for key in ("answers", "with_reasoning")]
    if not all(isinstance(number, int) for number in numbers):
        return None
    answers, learned = (int(str(number)) for number in numbers)
    entry = Reasoning(
        answers=answers,
        with_reasoning=learned,
        switch=switch if isinstance(switch, str) else None,
        decided_by=str(reasoning.get("decided_by")),
    )
    return line(counts.get("thinking") is True, entry)
