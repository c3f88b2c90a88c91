"""What do the words of a report mean? Numbers are explained by their tasks, units and statistics here."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tunesmith.display import words
from tunesmith.evaluation.tasks import about, place

MEANINGS = {
    "nats": "unit of log-probability: a token of probability p costs −ln p nats; 0.693 nats are one bit",
    "points": "differences of shares, in per cent; of adherence, on its scale of 0 to 100",
    "95 % interval": "of 100 ranges made in this way from other prompts, 95 hold the true number",
    "n": "how many prompts, rows or pairs a number is over; for speeds and memory: rounds",
    "p, corrected": "how often chance alone gives so large a change, corrected for the number of tests (Holm); "
    "below 0.05 counts",
    "effective rank": "number of directions in which a weight changed by a similar amount: e to the entropy "
    "of its singular values",
    "robust z": "distance of a row's loss from its neighbours', in units of a spread that ignores outliers "
    "(median and MAD)",
}


def meanings(summary: Mapping[str, Any]) -> dict[str, str]:
    """Each number, unit and statistic that a report of ``summary`` shows, with its meaning."""
    scores, found = summary["scores"], dict[str, str]()
    numbers = {(str(score["task"]), str(score["name"])) for score in scores}
    tasks = sorted({task for task, _ in numbers}, key=place)
    for task in tasks:
        for number, _, text in about(task).meanings:
            if (task, number) in numbers:
                found[words.title({"task": task, "name": number})] = text
    shown = {score.get("unit") or "" for score in scores}
    shown |= {"nats"} if "perplexity" in found else set()
    shown |= {"points"} if "%" in shown else set()
    shown |= {"95 % interval", "n", "p, corrected"} if scores else set()
    shown |= ({"effective rank"} if summary["growth"] else set()) | (
        {"robust z"} if summary["rows"] else set()
    )
    return found | {name: text for name, text in MEANINGS.items() if name in shown}
