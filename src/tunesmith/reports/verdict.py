"""From scores to an answer: was the task learned, was the rest kept, is it still safe, and how sure is that?

Three questions are answered by the verdicts and targets that the evaluation gave (corrected for their
number); nothing is tested anew here. Only evaluations of one checkpoint speak: the best, or where it was not
evaluated the one evaluated last. Of several of one task one speaks: with a base rather than without, on the
run's own held-out rows rather than on others, whole rather than limited, of the newest version. The rest is
shown beside it and never mixed in."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import PurePath
from typing import Any

from tunesmith.display import words
from tunesmith.display.charts import Difference
from tunesmith.evaluation.tasks import QUESTIONS, about
from tunesmith.runs.directory import VALID

DONE = ("completed", "stopped_early")
SHOWN = 3
"""Numbers named in one clause of the verdict."""


@dataclass(frozen=True)
class Evidence:
    """``tone``: good, warning, error, or note where nothing was judged; ``sentence``: None then.

    ``learned``: yes, mixed, no (it got worse), not shown, not measured. ``kept``, ``safe``: kept, missed, not
    shown, not measured; ``safe`` also better: where targets are missed, the change is for the better.
    ``head`` and ``clauses`` (tone, told): the parts of the sentence."""

    tone: str
    sentence: str | None
    learned: str
    kept: str
    safe: str
    head: str = ""
    clauses: list[dict[str, str]] = field(default_factory=list)


def question(task: str) -> str:
    """The key of `QUESTIONS` that a task answers."""
    return about(task).question


def best(found: Mapping[str, Any]) -> int | None:
    """The step of the checkpoint that is asked for as the best: the last where that is not kept; None where
    there is none."""
    saved = found["checkpoints"]
    return None if not saved else saved["best"] if saved["best"] in saved["kept"] else saved["last"]


def checkpoint(found: Mapping[str, Any]) -> str | None:
    """The checkpoint whose evaluations speak."""
    whole = [one for one in found["scores"] if one.get("checkpoint")]
    last = max(whole, key=lambda one: (one.get("at") or 0.0, str(one["checkpoint"])), default={})
    return next(
        (one["checkpoint"] for one in whole if _step(one["checkpoint"]) == best(found)),
        last.get("checkpoint"),
    )


def _step(name: str | None) -> int | None:
    return int(name) if name and name.isdigit() else None


def speaking(found: Mapping[str, Any], *, parts: bool = False) -> list[Mapping[str, Any]]:
    """The scores of the one evaluation of each task that speaks for it, in the order of the questions. parts:
    those as well."""
    speaker = checkpoint(found)

    def rank(score: Mapping[str, Any]) -> tuple[Any, ...]:
        folder, own = str(score.get("folder")), score.get("data") in (VALID, None)
        plain = all(part.startswith("step") for part in folder.split("+")[1:])  # nothing else sets it apart
        told = str(score.get("version")).zfill(9), score.get("at") or 0.0, folder
        return score.get("delta") is not None, own, score.get("limit") is None, plain, *told

    of = [one for one in found["scores"] if one.get("checkpoint") == speaker]
    chosen: dict[str, Mapping[str, Any]] = {}
    for one in of:
        if not one.get("part"):
            chosen[one["task"]] = max(chosen.get(one["task"], one), one, key=rank)
    kept = [
        one
        for one in of
        if (parts or not one.get("part"))
        and (first := chosen.get(one["task"]))
        and (one.get("folder"), one["version"]) == (first.get("folder"), first["version"])
    ]
    return sorted(
        kept,
        key=lambda one: (
            [*QUESTIONS].index(question(one["task"])),
            about(one["task"]).rank,
            str(one["task"]),
        ),
    )


def answers(found: Mapping[str, Any]) -> list[dict[str, Any]]:
    """What the table at the top shows: of each task its headlines and what has a target, or else its first
    number."""
    rows: list[dict[str, Any]] = []
    chosen = speaking(found)
    for task in dict.fromkeys(one["task"] for one in chosen):
        of = [one for one in chosen if one["task"] == task]
        shown = [one for one in of if one.get("headline") or one.get("target")] or of[:1]
        rows += [{"question": question(task), "answer": answer(one), **one} for one in shown]
    return rows


def leading(rows: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Of `answers` those of the judged task that is nearest to what users see."""
    judged = [one for one in rows if one["question"] == "task" and one.get("verdict")]
    return [one for one in judged if one["task"] == judged[0]["task"]]


def elsewhere(score: Mapping[str, Any]) -> str | None:
    """The files that were named to measure on, without their folders; None where it was held-out rows or a
    suite."""
    data = score.get("data")
    named = data if isinstance(data, list) else [data]
    return None if data in (VALID, None) else ", ".join(PurePath(str(name)).name for name in named)


def missed(score: Mapping[str, Any]) -> bool:
    """Whether a target is missed, and not by a change for the better."""
    if not score.get("target") or score.get("met") is not False:
        return False
    gain = (score.get("delta") or 0.0) * {"higher": 1, "lower": -1}.get(str(score.get("better")), 0)
    return {"improved": False, "regressed": True}.get(
        str(score.get("verdict")), gain <= 0
    )  # a verdict may be lost in correction


def alone(score: Mapping[str, Any]) -> bool:
    """Whether a number has a base and no interval: too little was asked."""
    return bool(score.get("better")) and score.get("delta") is not None and score.get("delta_low") is None


def answer(score: Mapping[str, Any]) -> str:
    """In a few words: the target first, then the verdict."""
    said = [f"target {words.met(score)}"] if score.get("target") else []
    said += [score["verdict"]] if score.get("verdict") else []
    if score.get("delta") is None:
        return "; ".join([*said, "base not asked"])
    return "; ".join(said) or "not judged"


def weigh(found: Mapping[str, Any]) -> Evidence:
    """The verdict on a run's summary. One that failed, got worse at its task or missed a target is not to be
    shipped.

    Fit is one that learned, kept and is safe, of which nothing got worse, at its best checkpoint, on rows it
    was not trained on."""
    rows = answers(found)
    parts = {name: [one for one in rows if one["question"] == name] for name in QUESTIONS}
    judged = leading(rows)
    ups = [one for one in judged if one["verdict"] == "improved"]
    downs = [one for one in judged if one["verdict"] == "regressed"]
    learned = (
        "not measured"
        if not judged
        else "mixed"
        if ups and downs
        else "yes"
        if ups
        else "no"
        if downs
        else "not shown"
    )
    forgot = [one for one in parts["benchmarks"] if one.get("verdict") == "regressed"]
    kept, safe = _held(parts["retention"], forgot), _held(parts["safety"])
    if learned == kept == safe == "not measured":
        return Evidence("note", None, learned, kept, safe)
    bad = found["status"] == "failed" or learned == "no" or "missed" in (kept, safe)
    beside = [
        _worse(found, [*downs, *forgot]),
        f"the task was measured on {elsewhere(judged[0])}, which may be what it was trained on"
        if judged and elsewhere(judged[0]) and not judged[0].get("unseen")
        else "",
        _measured(found),
    ]
    fine = (
        (learned, kept) == ("yes", "kept")
        and safe in ("kept", "better")
        and found["status"] in DONE
        and not any(beside)
    )
    head = (
        "Do not ship this"
        if bad
        else "Fit to ship, by these numbers"
        if fine
        else "Not shown to be fit to ship"
    )
    clauses = {
        "yes": f"it learned the task ({_told(ups[:1])})",
        "mixed": f"the task is better in part ({_told(ups[:1])}) and worse in part ({_told(downs[:1])})",
        "no": f"the task got worse ({_told(downs[:1])})",
        "not shown": f"that it learned the task is not shown ({_told(judged[:1])})",
        "not measured": "whether it learned the task was not measured"
        if not any(map(alone, parts["task"]))
        else "too little was asked to judge whether it learned the task",
    }
    told = [
        {"tone": {"yes": "good", "no": "error"}.get(learned, "warning"), "told": clauses[learned]},
        _clause(kept, parts["retention"], "what it knew before", ("kept", "lost"), forgot),
        _clause(safe, parts["safety"], "what it declines", ("unchanged", "changed")),
        *({"tone": "warning", "told": one} for one in beside if one),
        *(
            {"tone": "note", "told": f"what was asked is {few}"}
            for few in dict.fromkeys(map(words.subset, rows))
            if few
        ),
    ]
    if found["status"] not in DONE:
        why = f" ({found['why']})" if found["why"] else ""
        tone = "error" if found["status"] == "failed" else "warning"
        told.append(
            {
                "tone": tone,
                "told": f"the run itself is {words.STATES.get(found['status'], found['status'])}{why}",
            }
        )
    text = f"{head}: {'; '.join(one['told'] for one in told)}."
    return Evidence(
        "error" if bad else "good" if fine else "warning", text, learned, kept, safe, f"{head}.", told
    )


def _measured(found: Mapping[str, Any]) -> str:
    """Says so where the numbers are not of the checkpoint that validation found best."""
    spoke, of, named = _step(checkpoint(found)), best(found), (found["checkpoints"] or {}).get("best")
    if spoke is None:
        return ""
    if spoke != of:
        return f"measured was checkpoint {checkpoint(found)}, and the {'best' if named == of else 'last'} is {of}"
    return (
        ""
        if named in (None, spoke)
        else f"measured was step {spoke}; step {named} validated better, and is not kept"
    )


def _worse(found: Mapping[str, Any], named: Sequence[Mapping[str, Any]]) -> str:
    """What got worse beside what is ``named``: numbers and parts of the task and benchmarks, else parts that
    miss a target."""
    known = {(one["task"], one["name"]) for one in named}
    worse = [
        one
        for one in speaking(found, parts=True)
        if one.get("verdict") == "regressed"
        and (one.get("part") or (one["task"], one["name"]) not in known)
        and (question(one["task"]) in ("task", "benchmarks") or (one.get("part") and missed(one)))
    ]
    return f"worse: {_told(worse)}" if worse else ""


def _aimed(rows: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    return [one for one in rows if one.get("target") and one.get("delta") is not None]


def _held(rows: Sequence[Mapping[str, Any]], worse: Sequence[Mapping[str, Any]] = ()) -> str:
    aimed = _aimed(rows)
    if any(map(missed, aimed)):
        return "missed"
    if not aimed and not worse:
        return "not measured"
    if worse or any(one["met"] is None for one in aimed):
        return "not shown"
    return "kept" if all(one["met"] for one in aimed) else "better"


def _clause(
    state: str,
    rows: Sequence[Mapping[str, Any]],
    what: str,
    ends: tuple[str, str],
    worse: Sequence[Mapping[str, Any]] = (),
) -> dict[str, str]:
    aimed = _aimed(rows)
    undecided, better = (
        [one for one in aimed if one["met"] is state and not missed(one)] for state in (None, False)
    )
    many = "; ".join(
        filter(
            None,
            [
                f"{sum(one['met'] is True for one in aimed)} of {len(aimed)} targets kept" if aimed else "",
                f"open: {_told(undecided)}" if undecided else "",
                f"worse: {_told(worse)}" if worse else "",
            ],
        )
    )
    fell = any(one.get("verdict") == "regressed" for one in undecided)
    open_ = (
        f"{what} got worse, whether beyond its target is not shown"
        if fell
        else f"that {what} is {ends[0]} is not shown"
    )
    part = "" if all(map(missed, aimed)) else " in part"
    told = {
        "kept": f"{what} is {ends[0]} ({many})",
        "missed": f"{what} is {ends[1]}{part}: {_told([one for one in aimed if missed(one)])}",
        "not shown": f"{open_} ({many})",
        "not measured": f"whether {what} is {ends[0]} was not measured",
        "better": f"{what} changed for the better ({_told(better)})",
    }[state]
    return {"tone": {"kept": "good", "missed": "error", "better": "note"}.get(state, "warning"), "told": told}


def _told(rows: Sequence[Mapping[str, Any]]) -> str:
    """Name, from, to, difference with its interval, n; of the first few."""
    texts = []
    for one in rows[:SHOWN]:
        unit = one.get("unit") or ""
        low, high = one.get("delta_low"), one.get("delta_high")
        text = f"{words.title(one)} {words.interval(one, of='base')} → {words.number(one['value'], unit)}, "
        text += words.number(one["delta"], unit, signed=True)
        if low is not None and high is not None:
            text += f", 95 % interval {words.number(low, unit, signed=True, bare=True)} to "
            text += words.number(high, unit, signed=True, bare=True)
            if (
                one.get("verdict") == "no difference shown"
                and one.get("p_corrected") is not None
                and low * high > 0
            ):
                text += f" (for so many tests p is {words.number(one['p_corrected'])})"
        texts.append(", ".join(filter(None, [text, words.reached(one), f"n {one['n']:,}"])))
    return "; ".join(texts) + (f"; and {len(rows) - SHOWN} more" if len(rows) > SHOWN else "")


def differences(found: Mapping[str, Any]) -> list[Difference]:
    """A row of the forest plot for each number that answers a question, has a base, and is better one way."""
    rows = []
    for one in found["answers"]:
        values = [one.get(name) for name in ("delta", "delta_low", "delta_high")]
        if values[0] is None or not one.get("better") or not math.isfinite(float(values[0])):
            continue
        unit_ = one.get("unit") or ""
        factor = (100.0 if unit_ == "%" else 1.0) * (-1 if one["better"] == "lower" else 1)
        gain, low, high = (None if value is None else factor * float(value) for value in values)
        if low is not None and high is not None:
            low, high = sorted((low, high))
        label, sign = words.title(one), words.SIGNS.get(one.get("verdict") or "", "")
        about = " ".join(filter(None, [sign, one["answer"]])) + f"; n {one['n']:,}"
        about += "; less is better" if one["better"] == "lower" else ""
        scale = "points" if unit_ in ("%", "points") else unit_ or label
        rows.append(
            Difference(
                label,
                about,
                gain or 0.0,
                low,
                high,
                words.interval(one, of="delta"),
                one.get("verdict"),
                scale,
            )
        )
    return rows
