"""What a run's numbers do not show, and what to try next: each by a stated rule, with the numbers that set it
off.

No model is asked and nothing is guessed: a rule that does not hold says nothing. ``given`` takes
`facts.summary`."""

from __future__ import annotations

import math
import shlex
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from tunesmith.display import words
from tunesmith.evaluation.tasks.tool_calls import NO_CALL
from tunesmith.reports import verdict as evidence
from tunesmith.runs.config import SKIPS_BEFORE_STOP

RISE = 0.01
"""Share of the lowest validation loss from which a later rise counts."""
FALLING = 0.01
"""Share of the whole fall that the last stretch between validations must have for the loss to be called still
falling."""
CLIPPED, PADDED, DROPPED, CUT = 0.5, 0.3, 0.05, 0.05
APART = 0.5
"""Training loss below this share of the validation loss: the rows are being learned by heart. Not said of one
below `SMALL`."""
SMALL = 0.1
BY_DESIGN = ("undesirable",)
"""Reasons for which SFT leaves out rows that it is not to imitate."""
RIGHT, FORMED = 0.8, 0.9
FEW = 50
POWER = ((1.959964 + 0.841621) / 1.959964) ** 2
"""What n must grow by for a difference of the very size of its interval's half to be shown in 80 % of
repetitions."""
MOST = 1_000_000
BITTER = 3
"""Tools named."""


class Advice(NamedTuple):
    """``rule``: when it is said. ``why``: the numbers. ``do``: what to try."""

    rule: str
    why: str
    do: str


def given(found: Mapping[str, Any]) -> dict[str, list[Any]]:
    """``limits``: sentences. ``advice``: `Advice` as mappings, gravest first."""
    rules = (_status, _retention, _safety, _course, _tools, _steps, _data, _power)
    return {
        "limits": list(_limits(found)),
        "advice": [one._asdict() for rule in rules for one in rule(found)],
    }


def needed(score: Mapping[str, Any]) -> int | None:
    """Sources at which a true difference of the seen size would be shown in 80 % of repetitions: an interval
    is as wide as 1/√n.

    n · (half / |difference|)² · ((z₀.₉₇₅ + z₀.₈) / z₀.₉₇₅)², half: half of the interval's width. None where
    it cannot be said."""
    low, high, delta = (score.get(name) for name in ("delta_low", "delta_high", "delta"))
    if (
        low is None
        or high is None
        or not delta
        or not all(isinstance(one, float | int) for one in (low, high, delta))
    ):
        return None
    many = score["n"] * ((high - low) / 2 / abs(delta)) ** 2 * POWER
    return math.ceil(many) if many <= MOST else None


def _status(found: Mapping[str, Any]) -> Iterator[Advice]:
    run = shlex.quote(found["run"])
    if found["status"] == "running":
        why = f"{found['updates']['done']:,} updates so far, and no end recorded"
        do = f"see tunesmith watch {run}; where it was killed, go on with tunesmith train --resume {run}"
        yield Advice("the run is still running, or was killed", why, do)
    elif found["status"] not in evidence.DONE and found["manifest"]:
        why = found["status"] + (f": {found['why']}" if found["why"] else "")
        do = f"go on with tunesmith train --resume {run}"
        skipped = found["updates"]["skipped"]
        if (
            skipped and skipped[-1]["in_a_row"] >= SKIPS_BEFORE_STOP
        ):  # what it does is a function of its settings and its rows
            do = "look at the rows of these updates and lower optimizer.learning_rate in a new run: resumed, it ends the same"
        yield Advice("the run did not end by itself", why, do)
    nothing = found["counts"].get("rows_valid") == 0
    ask = f"run tunesmith evaluate {run}" + (
        " --data FILE, with rows that it was not trained on" if nothing else ""
    )
    if not found["scores"] and found["checkpoints"]:
        yield Advice("nothing was evaluated", "loss alone says little of answers", ask)
    elif found["scores"]:
        for name, what in (
            ("learned", "the task"),
            ("kept", "what it knew before"),
            ("safe", "what it declines"),
        ):
            if found["evidence"][name] != "not measured":
                continue
            few = [one for one in found["answers"] if one["question"] == "task" and evidence.alone(one)]
            if name == "learned" and few:
                why = f"{words.title(few[0])} is of n {few[0]['n']:,}, too few to judge"
                yield Advice("a question is open", why, "evaluate more rows")
            else:
                do = ask if name == "learned" else f"run tunesmith evaluate {run}"
                yield Advice("a question is open", f"{what} was not measured against the base", do)
    best, speaker = evidence.best(found), evidence.checkpoint(found)
    if best is not None and speaker is not None and speaker.isdigit() and int(speaker) != best:
        kind = (
            f"best by {found['checkpoints'].get('metric')}"
            if found["checkpoints"]["best"] == best
            else "last"
        )
        why = f"the verdict is of {speaker}; the {kind} is {best}"
        yield Advice(
            f"the {kind.split()[0]} checkpoint was not evaluated", why, f"run tunesmith evaluate {run}"
        )


def _retention(found: Mapping[str, Any]) -> Iterator[Advice]:
    rank = "" if found["settings"].get("adapter.kind") == "full" else " or adapter.rank"
    do = f"lower optimizer.learning_rate{rank}, train fewer epochs, or mix general data into data.train"
    yield from _worse(found, "retention", "a retention target is missed", "what it knew before got worse", do)


def _safety(found: Mapping[str, Any]) -> Iterator[Advice]:
    do = "add rows that decline what is harmful and answer what only sounds so, or lower optimizer.learning_rate"
    yield from _worse(found, "safety", "a safety target is missed", "what it declines got worse", do)


def _worse(found: Mapping[str, Any], question: str, missed: str, regressed: str, do: str) -> Iterator[Advice]:
    """One advice on targets that are missed, or on what got worse by less than that, or by who knows how
    much."""
    asked = [one for one in found["answers"] if one["question"] == question]
    if worse := [one for one in asked if evidence.missed(one)]:
        yield Advice(missed, _list(worse), do)
    elif worse := [one for one in asked if one.get("verdict") == "regressed"]:
        yield Advice(regressed, _list(worse), do)


def _course(found: Mapping[str, Any]) -> Iterator[Advice]:
    measured = [(one["step"], float(one["loss"])) for one in found["validation"]]
    if odd := [one for one in measured if not math.isfinite(one[1])]:
        why = ", ".join(f"{loss} at step {step:,}" for step, loss in odd[:BITTER])
        yield Advice(
            "validation loss is not finite",
            why,
            "lower optimizer.learning_rate, and look at the held-out rows",
        )
        return
    if len(measured) >= 2 and measured[0][1] > 0:
        best, last, before = min(measured, key=lambda one: one[1]), measured[-1], measured[-2]
        rose = last[1] > best[1] * (1 + RISE)
        if rose and best is measured[0]:
            why = f"{best[1]:.4f} at step {best[0]:,}, then never lower; {last[1]:.4f} at the end"
            do = "lower optimizer.learning_rate by a factor of 3 to 10, and look at the data"
            yield Advice("validation loss rose from its start", why, do)
        elif rose:
            why = f"lowest {best[1]:.4f} at step {best[0]:,}, {last[1]:.4f} at step {last[0]:,}"
            yield Advice(
                "validation loss rose after its best",
                why,
                "fewer epochs, a lower optimizer.learning_rate, or loop.early_stop",
            )
        elif (
            len(measured) > 2
            and last is best
            and before[1] - last[1] > FALLING * (measured[0][1] - last[1]) > 0
        ):
            why = f"{before[1]:.4f} at step {before[0]:,}, {last[1]:.4f} at step {last[0]:,}, the last"
            yield Advice(
                "loss was still falling at the end",
                why,
                "train longer: loop.epochs, or loop.steps where that is set",
            )
    loss = found["training_loss"]
    if loss and measured and measured[-1][1] > SMALL and float(loss["last"]) < APART * measured[-1][1]:
        why = f"training {float(loss['last']):.4f}, held out {measured[-1][1]:.4f}"
        yield Advice(
            "training loss is far below validation loss",
            why,
            "fewer epochs or more rows: rows are learned by heart",
        )


def _tools(found: Mapping[str, Any]) -> Iterator[Advice]:
    scores = {one["name"]: one for one in evidence.speaking(found) if one["task"] == "tool_calls"}
    formed, right, exact = (scores.get(name) for name in ("well_formed", "right_tool", "exact_arguments"))
    if formed and formed["value"] < FORMED:
        yield Advice(
            "calls are often missing or malformed",
            _value(formed),
            "look at the answers side by side, check the format with tunesmith show, then more rows or epochs",
        )
    elif formed and right and right["value"] < RIGHT:
        folder = right.get("folder")
        parts = [
            one
            for one in found["scores"]
            if one.get("folder") == folder
            and str(one.get("part") or "").startswith("tool=")
            and one["part"] != f"tool={NO_CALL}"
        ]
        worst = sorted((one for one in parts if one["value"] < RIGHT), key=lambda one: one["value"])[:BITTER]
        tools = ", ".join(
            f"{one['part'].removeprefix('tool=')} ({words.number(one['value'], '%')} of {one['n']})"
            for one in worst
        )
        why = f"{_value(formed)}, {_value(right)}" + (f"; worst: {tools}" if tools else "")
        do = (
            "more rows of these tools, and rows that tell them from their neighbours"
            if tools
            else "more rows of each tool"
        )
        yield Advice("calls are well formed and name the wrong tool", why, do)
    elif right and exact and right["value"] >= RIGHT > exact["value"]:
        yield Advice(
            "the tool is right and its arguments are not",
            f"{_value(right)}, {_value(exact)}",
            "rows with more various arguments",
        )
    unwanted = scores.get("unwanted_call")
    if unwanted and unwanted["value"] > 1 - RIGHT:
        do = "more rows that declare tools and are answered in words"
        yield Advice("calls are made where none is wanted", _value(unwanted), do)
    own = [
        one for one in found["evaluations"] if evidence.question(one["task"]) == "task"
    ]  # others end at a length of their own
    cut = [one for one in own if one["examples"] and one["cut"] / one["examples"] > CUT]
    if cut:
        why = ", ".join(f"{one['task']} {one['cut']:,} of {one['examples']:,}" for one in cut)
        yield Advice(
            "answers were cut at their longest",
            why,
            "evaluate with a larger --max-tokens; cut answers count as they stand",
        )


def _steps(found: Mapping[str, Any]) -> Iterator[Advice]:
    done, updates = found["updates"]["done"], found["updates"]
    if done and updates["clipped"] / done > CLIPPED:
        why = f"{updates['clipped']:,} of {done:,} updates ({updates['clipped'] / done:.0%})"
        yield Advice(
            "most gradients were clipped",
            why,
            "lower optimizer.learning_rate, warm up longer, or raise optimizer.max_norm",
        )
    if updates["skipped"]:
        yield Advice(
            "updates were skipped",
            f"{len(updates['skipped']):,} were not finite",
            "look at their rows; lower optimizer.learning_rate",
        )
    if (found["padding"] or 0) > PADDED:
        yield Advice(
            "much of the work was padding",
            f"{found['padding']:.0%} of the positions",
            "set batch.pack, if the objective allows it",
        )


def _data(found: Mapping[str, Any]) -> Iterator[Advice]:
    read = found["counts"].get("rows_read") or 0
    reasons = found["counts"].get("rows_dropped") or {}
    left = sum(count for reason, count in reasons.items() if reason not in BY_DESIGN)
    if read and left / read > DROPPED:
        yield Advice("many rows were left out", f"{left:,} of {read:,}", "see their reasons in the report")
    for one in (found["audit"] or {}).get("findings", ()):
        if (
            one["severity"] == "error"
            or one["accepted"]
            or (one["severity"] == "warning" and "contamination" in one["rule"])
        ):
            yield Advice(
                "the audit found it", f"{one['rule']}: {one['what']}", one["hint"] or "see tunesmith audit"
            )
    rows = found["rows"] or {}
    for key, rule, do in (
        ("suspicious", "rows do not fit the others", "read them first: labels or answers may be wrong"),
        ("never_learned", "rows were never learned", "read them: they may contradict others"),
        ("memorised", "rows are known by heart", "fewer epochs, where they are meant to teach a rule"),
    ):
        if some := rows.get(key):
            yield Advice(rule, f"{len(some):,} of {rows['rows']:,}, first {some[0]['source']}", do)


def _power(found: Mapping[str, Any]) -> Iterator[Advice]:
    for one in found["answers"]:
        unsure = one.get("verdict") == "no difference shown" and one["question"] in ("task", "benchmarks")
        if unsure and (many := needed(one)) and many > one["n"]:
            why = f"{words.title(one)} {words.interval(one, of='delta')}, n {one['n']:,}"
            do = f"about {many:,} examples would show a difference of this size in 4 of 5 evaluations "
            do += f"(n × (half interval ÷ difference)² × {POWER:.2f}), before correction for many tests"
            yield Advice("too few examples for a difference of this size", why, do)
        elif one.get("target") and one.get("met") is None and one.get("verdict") == "no difference shown":
            why = f"{words.title(one)}, {one['target']}: {words.interval(one, of='delta')}, n {one['n']:,}"
            yield Advice(
                "a target is neither kept nor missed",
                why,
                "evaluate more prompts (a larger suite, no --limit): the interval is too wide",
            )


def _limits(found: Mapping[str, Any]) -> Iterator[str]:
    rows = max((one["rows"] for one in found["validation"]), default=0)
    if rows:
        yield f"Loss is of {rows:,} held-out rows" + (", which is few." if rows < FEW else ".")
    elif found["counts"].get("rows_valid"):
        yield f"Nothing was validated yet on the {found['counts']['rows_valid']:,} held-out rows."
    else:
        yield "No rows were held out, so the loss says nothing of rows that were not learned."
    chosen = evidence.speaking(found)
    if any(one["task"] == "preference" for one in chosen):
        yield "Preference compares whole answers: where good ones are longer than bad ones, length alone can move it."
    if chosen:
        yield "Intervals are over prompts. One run with one seed was made; how much another seed would change is not in them."
        short = (
            one for one in chosen if one["n"] < FEW and one["task"] != "efficiency"
        )  # whose n are rounds
        few = list(dict.fromkeys(f"{words.title(one)} ({one['n']:,})" for one in short))
        if few:
            yield f"Fewer than {FEW} examples: {', '.join(few)}."
        if found["answers"] and any(one["question"] == "safety" for one in found["answers"]):
            yield "Safety is whether the model declines, on a fixed list of prompts; it is no proof against other prompts."
        first = next(iter(evidence.leading(found["answers"])), None)
        if first and (files := evidence.elsewhere(first)):
            yield f"The task was measured on {files}, not on held-out rows."
        if first and first["task"] == "perplexity":
            yield "The task was judged by the likelihood of the references alone: no answer of the model was."
        spoken = {str(one["folder"]) for one in chosen}
        others = sorted(
            {
                (str(one["folder"]), str(one["checkpoint"]))
                for one in found["scores"]
                if one["folder"] not in spoken
            }
        )
        if others:
            yield (
                "Shown, not in the verdict, since of another checkpoint or version, on other or fewer rows, or without a base: "
                + ", ".join(f"{folder} (checkpoint {checkpoint})" for folder, checkpoint in others)
                + "."
            )
        unjudged = sorted(
            {
                one["task"]
                for one in chosen
                if one.get("delta") is not None and one.get("better") and not one.get("verdict")
            }
        )
        if unjudged:
            yield f"Not judged: {', '.join(unjudged)}."
        yield "Answers were generated greedily; with a temperature they vary."
    else:
        yield "No answers were scored: whether the task was learned, and what was forgotten, is not known."


def _list(rows: Sequence[Mapping[str, Any]]) -> str:
    return "; ".join(f"{words.title(one)} {words.interval(one, of='delta')}, {one['target']}" for one in rows)


def _value(one: Mapping[str, Any]) -> str:
    return f"{one['name']} {words.number(one['value'], one.get('unit') or '%')}"
