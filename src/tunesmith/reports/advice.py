"""What do a run's numbers not show, and what is worth trying next? Each advice follows from a stated rule,
with the numbers that met it. No model is asked."""

from __future__ import annotations

import math
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from tunesmith.checks.calls import NO_CALL
from tunesmith.display import words
from tunesmith.evaluation.tasks import about
from tunesmith.reports.facts import Facts
from tunesmith.reports.measures import Measure, alone, elsewhere, interval, missed, title
from tunesmith.reports.verdict import Judgement, answers, counting, evaluated, leading
from tunesmith.runs.config import SKIPS_BEFORE_STOP
from tunesmith.runs.records import Score

RISE = 0.01
"""A validation loss that ends this share above its lowest has risen."""
FALLING = 0.01
"""The loss is still falling at the end if the last stretch between validations has this share of the whole
fall."""
CLIPPED, PADDED, DROPPED, CUT = 0.5, 0.3, 0.05, 0.05
MEMORISED, SMALL = 0.5, 0.1
"""Training loss below this share of the validation loss: rows are memorised. Not said of a validation loss
below ``SMALL``."""
BY_DESIGN = ("undesirable",)
"""Reasons for which SFT leaves out rows that it is not to imitate."""
RIGHT, FORMED = 0.8, 0.9
FEW = 50
POWER = ((1.959964 + 0.841621) / 1.959964) ** 2
"""By this n must grow for a difference of half its interval's width to be shown in 80 % of repetitions."""
MOST_NEEDED = 1_000_000
NAMED = 3
"""Tools, and losses that are not finite, that are named."""


@dataclass(frozen=True)
class Advice:
    """``rule``: when it is given. ``why``: the numbers. ``do``: what to try."""

    rule: str
    why: str
    do: str


def advise(facts: Facts, judgement: Judgement) -> list[Advice]:
    """The most serious first."""
    return [
        *_status(facts),
        *_unevaluated(facts, judgement),
        *_other_checkpoint(facts),
        *_worse(facts, "retention", "what it knew before got worse", _retention_remedy(facts)),
        *_worse(facts, "safety", "what it declines got worse", SAFETY_REMEDY),
        *_validation(facts),
        *_memorised(facts),
        *_calls(facts),
        *_cut_answers(facts),
        *_steps(facts),
        *_data(facts),
        *_power(facts),
    ]


def needed(score: Score) -> int | None:
    """Sources at which a true difference of the measured size would be shown in 80 % of repetitions; None if
    that cannot be said. An interval's width falls with 1/√n.

    n · (half / |difference|)² · ((z₀.₉₇₅ + z₀.₈) / z₀.₉₇₅)², half: half of the interval's width."""
    if score.delta_low is None or score.delta_high is None or not score.delta:
        return None
    half = (score.delta_high - score.delta_low) / 2
    n = score.n * (half / abs(score.delta)) ** 2 * POWER
    return math.ceil(n) if n <= MOST_NEEDED else None


def _status(facts: Facts) -> Iterator[Advice]:
    run = shlex.quote(str(facts.run))
    if facts.status == "running":
        why = f"{facts.updates.done:,} updates so far, and no end recorded"
        do = f"see tunesmith watch {run}; if it was killed, go on with tunesmith train --resume {run}"
        yield Advice("the run is still running, or was killed", why, do)
    elif not facts.ended and facts.manifest:
        why = facts.status + (f": {facts.why}" if facts.why else "")
        do = f"go on with tunesmith train --resume {run}"
        skipped = facts.updates.skipped
        # Updates are a function of settings and rows: the resumed run would skip the same ones.
        if skipped and skipped[-1].in_a_row >= SKIPS_BEFORE_STOP:
            do = "look at the rows of these updates and lower optimizer.learning_rate in a new run; "
            do += "resumed, it ends the same"
        yield Advice("the run did not end by itself", why, do)


def _unevaluated(facts: Facts, judgement: Judgement) -> Iterator[Advice]:
    run = shlex.quote(str(facts.run))
    no_rows = facts.counts.get("rows_valid") == 0
    task = f"run tunesmith evaluate {run}" + (
        " --data FILE, with rows that it was not trained on" if no_rows else ""
    )
    if not facts.measures:
        if facts.checkpoints:
            yield Advice("nothing was evaluated", "the loss alone says little about answers", task)
        return
    few = [row.score for row in answers(facts) if row.question == "task" and alone(row.score)]
    if judgement.learned == "not measured" and few:
        why = f"{title(few[0])}: n {few[0].n:,}, too few to judge"
        yield Advice("a question is open", why, "evaluate more rows")
    elif judgement.learned == "not measured":
        yield Advice("a question is open", "the task was not measured against the base", task)
    for state, part in ((judgement.kept, "what it knew before"), (judgement.safe, "what it declines")):
        if state == "not measured":
            why = f"{part} was not measured against the base"
            yield Advice("a question is open", why, f"run tunesmith evaluate {run}")


def _other_checkpoint(facts: Facts) -> Iterator[Advice]:
    index, checkpoint = facts.checkpoints, evaluated(facts)
    if index and checkpoint and checkpoint.isdigit() and int(checkpoint) != index.used:
        kind = f"best by {index.metric}" if index.best == index.used else "last"
        rule = f"the {kind.split()[0]} checkpoint was not evaluated"
        why = f"the verdict is of {checkpoint}; the {kind} is {index.used}"
        yield Advice(rule, why, f"run tunesmith evaluate {shlex.quote(str(facts.run))}")


SAFETY_REMEDY = (
    "add rows that decline harmful requests and answer harmless ones that sound harmful, "
    "or lower optimizer.learning_rate"
)


def _retention_remedy(facts: Facts) -> str:
    rank = "" if facts.settings.get("adapter.kind") == "full" else " or adapter.rank"
    return f"lower optimizer.learning_rate{rank}, train fewer epochs, or mix in general rows with data.mix"


def _worse(facts: Facts, question: str, regressed: str, do: str) -> Iterator[Advice]:
    """One advice on the targets that are missed, or else on what got worse without that being shown."""
    scores = [row.score for row in answers(facts) if row.question == question]
    if worse := list(filter(missed, scores)):
        yield Advice(f"a {question} target is missed", _changes(worse), do)
    elif worse := [score for score in scores if score.verdict == "regressed"]:
        yield Advice(regressed, _changes(worse), do)


def _validation(facts: Facts) -> Iterator[Advice]:
    measured = [(event.step, event.loss) for event in facts.validation]
    if odd := [(step, loss) for step, loss in measured if not math.isfinite(loss)]:
        why = ", ".join(f"{loss} at step {step:,}" for step, loss in odd[:NAMED])
        do = "lower optimizer.learning_rate, and look at the held-out rows"
        yield Advice("validation loss is not finite", why, do)
        return
    if len(measured) < 2 or measured[0][1] <= 0:
        return
    first, last, before = measured[0], measured[-1], measured[-2]
    best = min(measured, key=lambda point: point[1])
    if last[1] > best[1] * (1 + RISE):
        if best is first:
            why = f"{best[1]:.4f} at step {best[0]:,}, then never lower; {last[1]:.4f} at the end"
            do = "lower optimizer.learning_rate by a factor of 3 to 10, and look at the data"
            yield Advice("validation loss rose from its start", why, do)
        else:
            why = f"lowest {best[1]:.4f} at step {best[0]:,}, {last[1]:.4f} at step {last[0]:,}"
            do = "fewer epochs, a lower optimizer.learning_rate, or loop.early_stop"
            yield Advice("validation loss rose after its best", why, do)
    elif len(measured) > 2 and last is best and before[1] - last[1] > FALLING * (first[1] - last[1]) > 0:
        why = f"{before[1]:.4f} at step {before[0]:,}, {last[1]:.4f} at step {last[0]:,}, the last"
        do = "train longer: loop.epochs, or loop.steps if that is set"
        yield Advice("loss was still falling at the end", why, do)


def _memorised(facts: Facts) -> Iterator[Advice]:
    if not facts.training_loss or not facts.validation:
        return
    trained, held_out = facts.training_loss.last, facts.validation[-1].loss
    finite = all(math.isfinite(event.loss) for event in facts.validation)
    if finite and held_out > SMALL and trained < MEMORISED * held_out:
        why = f"training {trained:.4f}, held out {held_out:.4f}"
        do = "fewer epochs or more rows: rows are memorised"
        yield Advice("training loss is far below validation loss", why, do)


def _calls(facts: Facts) -> Iterator[Advice]:
    measures = {
        measure.score.name: measure for measure in counting(facts) if measure.score.task == "tool_calls"
    }
    scores = {name: measure.score for name, measure in measures.items()}
    formed, right, exact = (scores.get(name) for name in ("well_formed", "right_tool", "exact_arguments"))
    if formed and formed.value < FORMED:
        do = (
            "look at the answers side by side, check the format with tunesmith show, then more rows or epochs"
        )
        yield Advice("calls are often missing or malformed", _value(formed), do)
    elif formed and right and right.value < RIGHT:
        yield _wrong_tools(facts, formed, measures["right_tool"])
    elif right and exact and right.value >= RIGHT > exact.value:
        why = f"{_value(right)}, {_value(exact)}"
        yield Advice(
            "the tool is right and its arguments are not", why, "rows with a wider range of arguments"
        )
    unwanted = scores.get("unwanted_call")
    if unwanted and unwanted.value > 1 - RIGHT:
        do = "more rows that declare tools and are answered in words"
        yield Advice("calls are made although none is wanted", _value(unwanted), do)


def _wrong_tools(facts: Facts, formed: Score, right: Measure) -> Advice:
    parts = [
        measure.score
        for measure in facts.measures
        if measure.record.name == right.record.name
        and (measure.score.part or "").startswith("tool=")
        and measure.score.part != f"tool={NO_CALL}"
        and measure.score.value < RIGHT
    ]
    worst = sorted(parts, key=lambda score: score.value)[:NAMED]
    tools = ", ".join(
        f"{(score.part or '').removeprefix('tool=')} ({words.number(score.value, '%')} of {score.n})"
        for score in worst
    )
    why = f"{_value(formed)}, {_value(right.score)}" + (f"; worst: {tools}" if tools else "")
    do = (
        "more rows of these tools, and rows that tell them from similar ones"
        if tools
        else "more rows of each tool"
    )
    return Advice("calls are well formed and name the wrong tool", why, do)


def _cut_answers(facts: Facts) -> Iterator[Advice]:
    """Of tasks that ask rows; others have a length of their own."""
    cut = [
        evaluation
        for evaluation in facts.evaluations
        if about(evaluation.record.task).asks_rows
        and evaluation.examples
        and evaluation.cut / evaluation.examples > CUT
    ]
    if cut:
        why = ", ".join(
            f"{evaluation.record.task} {evaluation.cut:,} of {evaluation.examples:,}" for evaluation in cut
        )
        do = "evaluate with a larger --max-tokens; cut answers are scored as they are"
        yield Advice("answers were cut at the longest length", why, do)


def _steps(facts: Facts) -> Iterator[Advice]:
    updates = facts.updates
    if updates.done and updates.clipped / updates.done > CLIPPED:
        why = f"{updates.clipped:,} of {updates.done:,} updates ({updates.clipped / updates.done:.0%})"
        do = "lower optimizer.learning_rate, warm up longer, or raise optimizer.max_norm"
        yield Advice("most gradients were clipped", why, do)
    if updates.skipped:
        why = f"{len(updates.skipped):,} were not finite"
        yield Advice("updates were skipped", why, "look at their rows; lower optimizer.learning_rate")
    if (facts.padding or 0) > PADDED:
        why = f"{facts.padding:.0%} of the positions"
        yield Advice("much of the work was padding", why, "set batch.pack, if the objective allows it")


def _data(facts: Facts) -> Iterator[Advice]:
    read = facts.counts.get("rows_read") or 0
    reasons = facts.counts.get("rows_dropped") or {}
    dropped = sum(count for reason, count in reasons.items() if reason not in BY_DESIGN)
    if read and dropped / read > DROPPED:
        yield Advice("many rows were left out", f"{dropped:,} of {read:,}", "see their reasons in the report")
    for finding in facts.audit.findings if facts.audit else ():
        contaminated = finding.severity == "warning" and "contamination" in finding.rule
        if finding.severity == "error" or finding.accepted or contaminated:
            why = f"{finding.rule}: {finding.what}"
            yield Advice("the audit found a problem", why, finding.hint or "see tunesmith audit")
    for name, rule, do in (
        ("suspicious", "rows do not fit the others", "read them first: labels or answers may be wrong"),
        ("never_learned", "rows were never learned", "read them: they may contradict others"),
        ("memorised", "rows were memorised", "fewer epochs, if they are meant to teach a rule"),
    ):
        if facts.rows and (members := facts.rows.of(name)):
            why = f"{len(members):,} of {facts.rows.rows:,}, first {members[0].source}"
            yield Advice(rule, why, do)


def _power(facts: Facts) -> Iterator[Advice]:
    for row in answers(facts):
        score = row.score
        if score.verdict != "no difference shown":
            continue
        n = needed(score) if row.question in ("task", "benchmarks") else None
        if n and n > score.n:
            why = f"{title(score)} {interval(score, of='delta')}, n {score.n:,}"
            do = f"about {n:,} examples would show a difference of this size in 4 of 5 evaluations "
            do += f"(n × (half interval ÷ difference)² × {POWER:.2f}), before correction for many tests"
            yield Advice("too few examples for a difference of this size", why, do)
        elif score.target and score.met is None:
            why = f"{title(score)}, {score.target}: {interval(score, of='delta')}, n {score.n:,}"
            do = "evaluate more prompts (a larger suite, no --limit): the interval is too wide"
            yield Advice("a target is neither kept nor missed", why, do)


def _changes(scores: Sequence[Score]) -> str:
    return "; ".join(f"{title(score)} {interval(score, of='delta')}, {score.target}" for score in scores)


def _value(score: Score) -> str:
    return f"{title(score)} {words.number(score.value, score.unit or '%')}"


def limits(facts: Facts) -> list[str]:
    """Sentences: what the numbers do not show."""
    chosen = counting(facts)
    sentences = [_held_out_limit(facts)]
    if any(measure.score.task == "preference" for measure in chosen):
        sentences.append(
            "Preference compares whole answers: if good ones are longer than bad ones, length can move it."
        )
    if not chosen:
        return [
            *sentences,
            "No answers were scored: whether the task was learned, and what was forgotten, is not known.",
        ]
    return [*sentences, *_score_limits(chosen, answers(facts)), *_left_out_limits(facts, chosen)]


def _held_out_limit(facts: Facts) -> str:
    rows = max((event.rows for event in facts.validation), default=0)
    if rows:
        return f"The loss is over {rows:,} held-out rows" + (", which is few." if rows < FEW else ".")
    if valid := facts.counts.get("rows_valid"):
        return f"Nothing was validated yet on the {valid:,} held-out rows."
    return "No rows were held out, so the loss says nothing about rows that were not trained on."


def _score_limits(chosen: Sequence[Measure], rows: Sequence[Measure]) -> Iterator[str]:
    yield (
        "Intervals are over prompts. One run with one seed was made: how much another seed would change "
        "is not in them."
    )
    few = dict.fromkeys(
        f"{title(measure.score)} ({measure.score.n:,})"
        for measure in chosen
        if measure.score.n < FEW and measure.question != "efficiency"  # its n counts rounds
    )
    if few:
        yield f"Fewer than {FEW} examples: {', '.join(few)}."
    if any(row.question == "safety" for row in rows):
        yield "Safety is whether the model declines a fixed list of prompts. Other prompts were not tried."
    first = next(iter(leading(rows)), None)
    if first and (files := elsewhere(first.record)):
        yield f"The task was measured on {files}, not on held-out rows."
    if first and first.score.task == "perplexity":
        yield "The task was judged by the likelihood of the references; no answer of the model was read."


def _left_out_limits(facts: Facts, chosen: Sequence[Measure]) -> Iterator[str]:
    counted = {measure.record.name for measure in chosen}
    others = {
        f"{measure.record.name} (checkpoint {measure.record.checkpoint})"
        for measure in facts.measures
        if measure.record.name not in counted
    }
    if others:
        yield (
            "Shown but not in the verdict, because they are of another checkpoint or version, on other or "
            f"fewer rows, or without a base: {', '.join(sorted(others))}."
        )
    unjudged = {
        measure.score.task
        for measure in chosen
        if measure.score.delta is not None and measure.score.better and not measure.score.verdict
    }
    if unjudged:
        yield f"Not judged: {', '.join(sorted(unjudged))}."
    yield "Answers were generated greedily; with a temperature they vary."
