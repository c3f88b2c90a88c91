"""What do the words of a report mean? Numbers are explained by their tasks; units and statistics here."""

from __future__ import annotations

from tunesmith.evaluation.tasks import about, place
from tunesmith.reports.measures import label
from tunesmith.reports.summary import Summary

MEANINGS = {
    "nats": "unit of log-probability: a token of probability p costs −ln p nats; 0.693 nats are one bit",
    "points": "differences of shares, in per cent; of adherence, on its scale of 0 to 100",
    "95 % interval": "of 100 ranges made in this way from other prompts, 95 hold the true number",
    "n": "how many prompts, rows or pairs a number is over; for speeds and memory: rounds",
    "p, corrected": "how often chance alone gives so large a change, corrected for the number of tests "
    "(Holm); below 0.05 counts",
    "effective rank": "number of directions in which a weight changed by a similar amount: e to the entropy "
    "of its singular values",
    "robust z": "distance of a row's loss from its neighbours', in units of a spread that ignores outliers "
    "(median and MAD)",
}


def meanings(summary: Summary) -> dict[str, str]:
    """Each number, unit and statistic that the report shows, with its meaning."""
    scores = {
        (measure.score.task, measure.score.name): measure.score
        for measure in summary.facts.measures
        if measure.score.part is None
    }
    glossary: dict[str, str] = {}
    for task in sorted({task for task, _ in scores}, key=place):
        for meaning in about(task).meanings:
            if score := scores.get((task, meaning.number)):
                glossary[label(score)] = meaning.text
    units = {measure.score.unit for measure in summary.facts.measures}
    shown = units | ({"nats"} if ("perplexity", "perplexity") in scores else set())
    shown |= {"points"} if "%" in units else set()
    shown |= {"95 % interval", "n", "p, corrected"} if units else set()
    shown |= {"effective rank"} if summary.facts.growth else set()
    shown |= {"robust z"} if summary.facts.rows else set()
    return glossary | {word: meaning for word, meaning in MEANINGS.items() if word in shown}
