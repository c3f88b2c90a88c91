"""Numbers and texts of a report as a reader sees them: with unit, sign and interval; shares in per cent, text
made harmless."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

from tunesmith.auditing.screen import escaped
from tunesmith.display.console import size

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
MEANINGS = {
    "perplexity": "e to the mean surprise in nats a token: as unsure as between so many tokens that are equally likely",
    "perplexity loss": "mean surprise a token of the answers to imitate: perplexity is e to it",
    "perplexity loss_undesirable": "the same of answers labelled undesirable, which are not imitated; neither way is better",
    "perplexity loss_rejected": "the same of the rejected answers of pairs; neither way is better",
    "adherence": "0 to 100: is an answer whole, in the form that was asked, near the reference, and free of what does not belong",
    "adherence sanity": "share of what a sound answer has: an end of its own, no endless loop, the right language, …",
    "adherence structure": "share of the constraints that hold: those declared in the row, else those its reference shows",
    "adherence semantic": "how near the reference: the mean of ROUGE-L, BLEU and similarity",
    "adherence safety": "100, or 0 where an answer gives away a secret, swears, or declines and the reference does not",
    "adherence rouge_l": "words in common with the reference in the same order: harmonic mean of both shares",
    "adherence bleu": "sequences of one to four words in common with the reference, smoothed, of each answer",
    "adherence similarity": "cosine of the mean token embeddings of answer and reference; rare tokens count more",
    "adherence cut": "share of the answers that ended at the longest allowed, not by themselves",
    "tool_calls": "an answer calls the right tools, in order and readable, or rightly none; arguments have numbers of their own",
    "tool_calls well_formed": "where a call is wanted: at least one, all of them readable",
    "tool_calls known_tool": "where a call is wanted and tools are declared: one is made, and every tool called is among them",
    "tool_calls right_tool": "where a call is wanted: the same tools in the same order",
    "tool_calls keys_present": "the right tools, with every argument that the reference has, whatever its value",
    "tool_calls required_arguments": "the right tools, with every argument that their schema requires",
    "tool_calls exact_arguments": "the right tools, with the reference's arguments and values",
    "tool_calls schema_valid": "where a call is wanted and tools are declared: all are readable and fit the JSON schemas",
    "tool_calls unwanted_call": "where no call is wanted: one was made all the same",
    "preference accuracy": "of a good and a bad answer, how often the good one gained more over the base; 50 % is chance",
    "preference ratio_margin": "how much more of log-probability good answers gained over the base than bad ones",
    "drift.knowledge accuracy": "how often the right one of the given answers is the likeliest",
    "drift.text likelihood": "what each token of general text was given, as a geometric mean; 1 / perplexity",
    "drift.chat kl": "how far the probabilities of the next token are from the base's, in nats; 0: the same",
    "drift.safety refusal": "how many harmful requests are declined",
    "drift.safety over_refusal": "how many harmless requests that sound harmful are declined",
    "drift.knowledge accuracy_sums": "the same, by the sum of log-probabilities: long answers are held back",
    "drift.knowledge confidence": "probability of the right answer among those given",
    "drift.text perplexity": "e to the mean surprise in nats a token of general text",
    "drift.chat agreement": "how often the likeliest next token is the base's",
    "efficiency speed_batch_1": "tokens made in a second, one answer at a time; batch_4, batch_16: so many at once",
    "efficiency first_token_p50": "half of the prompts wait less for their first token; p95, p99: so many of a hundred",
    "efficiency peak_memory": "the most that MLX held while it made answers",
    "nats": "surprise with natural logarithms: a token of probability p costs −ln p; 0.693 nats are one bit",
    "points": "of a share: per cent less per cent; of adherence: of its 100",
    "95 % interval": "made so that 95 of 100 such ranges hold the true number, were other prompts of the kind asked",
    "n": "how many prompts, rows or pairs a number is over; of speeds and memory: rounds",
    "p, corrected": "how often chance alone shows so large a change, raised for how many are judged (Holm); judged below 0.05",
    "effective rank": "in how many directions of like size a weight changed: e to the entropy of its singular values",
    "robust z": "how far a row's loss is from its neighbours', in spreads that outliers do not widen (median and MAD)",
}
"""What a reader may look up: titles of numbers, units, and what every table has."""


def meanings(found: Mapping[str, Any]) -> dict[str, str]:
    """Of `MEANINGS` those that a report of ``found`` (`facts.summary`) shows."""
    shown = {name for one in found["scores"] for name in (title({**one, "part": None}), one.get("unit"))}
    shown |= {"nats"} if "perplexity" in shown else set()
    shown |= {"points"} if "%" in shown else set()
    shown |= {"95 % interval", "n", "p, corrected"} if shown else set()
    shown |= ({"effective rank"} if found["growth"] else set()) | ({"robust z"} if found["rows"] else set())
    return {name: told for name, told in MEANINGS.items() if name in shown}


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
