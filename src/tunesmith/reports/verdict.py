"""Is the run fit to ship? One line, and the reasons for it.

Three questions decide: was the task learned, was the base's knowledge kept, is the model still safe. They are
answered by the verdicts and targets of the evaluation (corrected for their number); nothing is tested again
here. Only evaluations of one checkpoint count: the best, or if that was not evaluated the one evaluated last.
Of several evaluations of one task one counts: with a base rather than without, on the run's own held-out rows
rather than on others, whole rather than limited, of the newest version. All others are shown and do not
count."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

from tunesmith.display import words
from tunesmith.display.text import escaped
from tunesmith.evaluation.tasks import QUESTIONS, about
from tunesmith.reports.facts import Facts
from tunesmith.reports.measures import (
    Measure,
    alone,
    elsewhere,
    identifier,
    interval,
    met,
    missed,
    reached,
    subset,
    title,
)
from tunesmith.runs.directory import VALID
from tunesmith.runs.records import Score

Tone = Literal["error", "warning", "note", "good"]
TONES: tuple[Tone, ...] = ("error", "warning", "note", "good")
"""The order of the reasons: those against shipping first."""
SIGNS: dict[Tone, str] = {"error": "✗", "warning": "?", "note": "i", "good": "✓"}
"""A tone without colour."""
SHOWN = 3
"""Numbers beside the questions that got worse and are named one by one."""
PROVES_LITTLE = "the task was measured on rows that it may have been trained on"


@dataclass(frozen=True)
class Reason:
    """``code``: for machines. ``brief``: its part of the verdict's line, "" if it has none. ``measures``: the
    identifiers of the numbers in ``text``."""

    code: str
    tone: Tone
    text: str
    brief: str = ""
    measures: tuple[str, ...] = ()

    @property
    def sign(self) -> str:
        return SIGNS[self.tone]

    @property
    def line(self) -> str:
        """As a terminal shows it, with the identifiers."""
        small = f" ({'; '.join(self.measures)})" if self.measures else ""
        return escaped(f"{self.sign} {self.text}.{small}")


class ReasonCode(NamedTuple):
    """What a code means, and what to do about it."""

    tones: tuple[Tone, ...]
    meaning: str
    cure: str


KEEP_MORE = (
    "mix in general rows (`data.mix`; with sft and an adapter, distilled), lower the rate, train fewer "
    "epochs, or lower `adapter.rank`"
)
REFUSE_AS_BEFORE = (
    "mix in harmless requests with answers and harmful ones with refusals (`data.mix`; with sft and an "
    "adapter, distilled), or lower the rate; read the answers, since refusals are found by their words"
)
MEASURE_DRIFT = "`tunesmith evaluate RUN --task drift`"
RESUME = "`tunesmith train --resume RUN`"
CODES = {
    "task_improved": ReasonCode(("good",), "the task is done better than by the base", ""),
    "task_regressed": ReasonCode(
        ("error", "warning"),
        "the task is done worse than by the base; a warning if another number improved",
        "read the answers that got worse; common causes are a rate that is too high, rows that contradict "
        "each other (`tunesmith audit`), and answers cut by `--max-tokens`",
    ),
    "task_not_shown": ReasonCode(
        ("warning",),
        "no difference to the base is shown at the task",
        "if the interval is wide, hold out more rows (`data.valid`) or name more with `--data`; if it is "
        "narrow around 0, train more: a higher rate, more epochs, `adapter.targets=all-linear`",
    ),
    "task_too_few": ReasonCode(
        ("warning",),
        "too few held-out rows for an interval",
        "hold out more rows (`data.valid`), or name a file with `--data`",
    ),
    "task_not_measured": ReasonCode(
        ("warning",),
        "no task was measured",
        "`tunesmith evaluate RUN`; a run without held-out rows needs a file named with `--data`",
    ),
    "retention_kept": ReasonCode(("good",), "what the base knew is kept within the target", ""),
    "retention_better": ReasonCode(
        ("warning",),
        "a number that should stay changed beyond its target, for the better",
        "read the answers",
    ),
    "retention_missed": ReasonCode(("error",), "what the base knew got worse beyond the target", KEEP_MORE),
    "retention_regressed": ReasonCode(
        ("warning",), "it got worse, and whether beyond the target is not shown", KEEP_MORE
    ),
    "retention_not_shown": ReasonCode(
        ("warning",),
        "the interval allows both that the target is met and that it is missed",
        "ask more: `--knowledge` and `--text` name files of your own",
    ),
    "retention_not_measured": ReasonCode(
        ("warning",), "knowledge, general text and chats were not measured", MEASURE_DRIFT
    ),
    "benchmark_regressed": ReasonCode(("warning",), "a public benchmark got worse", KEEP_MORE),
    "safety_kept": ReasonCode(("good",), "refusals are as before within the target", ""),
    "safety_better": ReasonCode(("note",), "safety changed beyond its target, for the better", ""),
    "safety_missed": ReasonCode(
        ("error",), "fewer harmful or more harmless requests are refused, beyond the target", REFUSE_AS_BEFORE
    ),
    "safety_regressed": ReasonCode(
        ("warning",), "it got worse, and whether beyond the target is not shown", REFUSE_AS_BEFORE
    ),
    "safety_not_shown": ReasonCode(
        ("warning",),
        "the interval allows both that the target is met and that it is missed",
        "ask more: `--safety` names a file of your own",
    ),
    "safety_not_measured": ReasonCode(("warning",), "safety was not measured", MEASURE_DRIFT),
    "number_regressed": ReasonCode(
        ("warning",), "another number of the task or of a benchmark got worse", "read the rows that got worse"
    ),
    "part_regressed": ReasonCode(
        ("warning",),
        "a number got worse on a part of the rows, such as the calls of one tool",
        "read these rows, and add rows of their kind",
    ),
    "data_maybe_trained_on": ReasonCode(
        ("warning",),
        "the rows that were asked may have been trained on",
        "ask held-out rows, or files that no training row came from (`--data`)",
    ),
    "evaluation_limited": ReasonCode(("note",), "only a part of the rows was asked", "leave out `--limit`"),
    "checkpoint_not_measured": ReasonCode(
        ("warning",),
        "another checkpoint than the best was measured",
        "`tunesmith evaluate RUN` without `--checkpoint`",
    ),
    "checkpoint_not_best": ReasonCode(
        ("warning",),
        "a checkpoint that was not kept validated better",
        "train again with `loop.keep_best=true`",
    ),
    "run_failed": ReasonCode(("error",), "the run ended with an error", f"remove its cause, then {RESUME}"),
    "run_interrupted": ReasonCode(("warning",), "the run was interrupted", RESUME),
    "run_running": ReasonCode(("warning",), "the run still trains, or was killed", f"wait, or {RESUME}"),
    "run_unfinished": ReasonCode(("warning",), "the run has no recorded end", RESUME),
}
"""Every code of a reason of `judge`."""


@dataclass(frozen=True)
class Judgement:
    """``line``: the verdict in one line, None if nothing was judged. ``ship``: None if that is not shown.
    ``tone``: that of the gravest reason; note if nothing was judged.

    ``learned``: yes, mixed, no (it got worse), not shown, not measured. ``kept``, ``safe``: kept, missed, not
    shown, not measured, or better: targets that bound the change are missed by gains."""

    tone: Tone
    line: str | None
    ship: bool | None
    learned: str
    kept: str
    safe: str
    reasons: tuple[Reason, ...] = ()

    @property
    def text(self) -> str | None:
        """The line and all reasons."""
        return self.line and " ".join([f"{self.line}.", *(f"{reason.text}." for reason in self.reasons)])


def evaluated(facts: Facts) -> str | None:
    """The checkpoint whose evaluations count."""
    records = [evaluation.record for evaluation in facts.evaluations if evaluation.record.checkpoint]
    best = facts.checkpoints and facts.checkpoints.used
    for record in records:
        if record.scores and _step(record.checkpoint) == best:
            return record.checkpoint
    latest = max(
        (record for record in records if record.scores),
        key=lambda record: (record.at or 0.0, str(record.checkpoint)),
        default=None,
    )
    return latest and latest.checkpoint


def _step(name: str | None) -> int | None:
    return int(name) if name and name.isdigit() else None


def counting(facts: Facts, *, parts: bool = False) -> list[Measure]:
    """The scores of the one evaluation of each task that counts, in the order of the questions; parts: with
    those of subsets."""
    checkpoint = evaluated(facts)

    def rank(measure: Measure) -> tuple[bool, bool, bool, bool, str, float, str]:
        record = measure.record
        own = record.data in (VALID, None)
        plain = all(part.startswith("step") for part in record.name.split("+")[1:])
        version = measure.score.version.zfill(9)
        has_base = measure.score.delta is not None
        return has_base, own, record.limit is None, plain, version, record.at or 0.0, record.name

    measures = [measure for measure in facts.measures if measure.record.checkpoint == checkpoint]
    chosen: dict[str, Measure] = {}
    for measure in measures:
        if not measure.score.part:
            task = measure.score.task
            chosen[task] = max(chosen.get(task, measure), measure, key=rank)

    def counts(measure: Measure) -> bool:
        best = chosen.get(measure.score.task)
        same = best and (measure.record.name, measure.score.version) == (best.record.name, best.score.version)
        return bool(same) and (parts or not measure.score.part)

    def place(measure: Measure) -> tuple[int, int, str]:
        task = measure.score.task
        return [*QUESTIONS].index(measure.question), about(task).rank, task

    return sorted(filter(counts, measures), key=place)


def answers(facts: Facts) -> list[Measure]:
    """Of each task its headlines and the scores with a target, or else its first score."""
    rows: list[Measure] = []
    chosen = counting(facts)
    for task in dict.fromkeys(measure.score.task for measure in chosen):
        measures = [measure for measure in chosen if measure.score.task == task]
        rows += [row for row in measures if row.score.headline or row.score.target] or measures[:1]
    return rows


def leading(rows: Sequence[Measure]) -> list[Measure]:
    """Of `answers` those of the judged task that is nearest to what users see."""
    judged = [row for row in rows if row.question == "task" and row.score.verdict]
    return [row for row in judged if row.score.task == judged[0].score.task]


def judge(facts: Facts) -> Judgement:
    """A run that failed, got worse at its task or missed a target is not to be shipped. It is fit if it
    learned its task, met every target, got worse at nothing, and was measured at its best checkpoint on rows
    that it was not trained on."""
    rows = answers(facts)
    by_question = {name: [row.score for row in rows if row.question == name] for name in QUESTIONS}
    judged = leading(rows)
    learned = _learned([row.score for row in judged])
    forgot = [score for score in by_question["benchmarks"] if score.verdict == "regressed"]
    kept, safe = _held(by_question["retention"], forgot), _held(by_question["safety"])
    if learned == kept == safe == "not measured":
        return Judgement("note", None, None, learned, kept, safe)
    reasons = [
        *_task_reasons(learned, [row.score for row in judged], by_question["task"]),
        *_retention_reasons(kept, by_question["retention"], forgot),
        *_safety_reasons(safe, by_question["safety"]),
        *_worse_reasons(facts, [row.score for row in judged], forgot),
        *_measurement_reasons(rows, judged),
        *_checkpoint_reasons(facts),
        *_run_reasons(facts),
    ]
    known = [reason for reason in reasons if not reason.code.startswith("run_")]  # a state may be of later
    assert all(reason.tone in CODES[reason.code].tones for reason in known)
    reasons.sort(key=lambda reason: TONES.index(reason.tone))
    tone = reasons[0].tone if reasons[0].tone != "note" else "good"
    head = {"error": "Do not ship", "warning": "Not shown to be fit to ship"}.get(tone, "Fit to ship")
    briefs = [reason.brief for reason in reasons if reason.brief and reason.tone == tone]
    line = f"{head}: {_joined(list(dict.fromkeys(briefs)))}"
    ship = {"error": False, "good": True}.get(tone)
    return Judgement(tone, line, ship, learned, kept, safe, tuple(reasons))


def _joined(briefs: Sequence[str]) -> str:
    """One sentence: the subject "it" is said once."""
    clauses = [
        brief.removeprefix("it ") if number and briefs[number - 1].startswith("it ") else brief
        for number, brief in enumerate(briefs)
    ]
    if len(clauses) < 2:
        return "".join(clauses)
    return f"{', '.join(clauses[:-1])}, and {clauses[-1]}"


def _learned(scores: Sequence[Score]) -> str:
    verdicts = {score.verdict for score in scores}
    if not scores:
        return "not measured"
    if {"improved", "regressed"} <= verdicts:
        return "mixed"
    return "yes" if "improved" in verdicts else "no" if "regressed" in verdicts else "not shown"


def _aimed(scores: Sequence[Score]) -> list[Score]:
    return [score for score in scores if score.target and score.delta is not None]


def _held(scores: Sequence[Score], worse: Sequence[Score] = ()) -> str:
    aimed = _aimed(scores)
    if any(map(missed, aimed)):
        return "missed"
    if not aimed and not worse:
        return "not measured"
    if worse or any(score.met is None for score in aimed):
        return "not shown"
    return "kept" if all(score.met for score in aimed) else "better"


def _task_reasons(learned: str, judged: Sequence[Score], scores: Sequence[Score]) -> Iterator[Reason]:
    if learned == "not measured":
        if any(map(alone, scores)):
            text = "Too few rows were asked to judge whether it learned the task"
            yield Reason("task_too_few", "warning", text, "too few rows were asked to judge the task")
        else:
            text = "Whether it learned the task was not measured"
            yield Reason("task_not_measured", "warning", text, "whether it learned the task was not measured")
        return
    in_part = " in part" if learned == "mixed" else ""
    for score in judged:
        if score.verdict == "improved":
            brief = f"it learned the task{in_part}"
            yield _reason("task_improved", "good", f"Learned the task{in_part}", score, brief)
        elif score.verdict == "regressed":
            brief = f"it got worse at the task{in_part}"
            tone: Tone = "warning" if in_part else "error"
            yield _reason("task_regressed", tone, f"Got worse at the task{in_part}", score, brief)
        elif learned == "not shown":
            brief = "it is not shown to have learned the task"
            yield _reason("task_not_shown", "warning", "Not shown to have learned the task", score, brief)


def _retention_reasons(state: str, scores: Sequence[Score], forgot: Sequence[Score]) -> Iterator[Reason]:
    aimed = _aimed(scores)
    brief = "it forgot what it knew" if all(map(missed, aimed)) else "it forgot part of what it knew"
    if state == "not measured":
        text = "Whether it kept what it knew was not measured"
        yield Reason("retention_not_measured", "warning", text, text[0].lower() + text[1:])
    for score in aimed:
        if missed(score):
            yield _reason("retention_missed", "error", "Forgot", score, brief)
        elif score.met:
            yield _reason("retention_kept", "good", "Kept", score, "it kept what it knew")
        elif score.met is False:
            yield _reason("retention_better", "warning", "Changed for the better", score)
        else:
            yield _open(
                "retention",
                score,
                "it is not shown to have kept what it knew",
                "some of what it knew got worse",
            )
    for score in forgot:
        yield _reason(
            "benchmark_regressed", "warning", "Got worse at a benchmark", score, "it got worse at a benchmark"
        )


def _safety_reasons(state: str, scores: Sequence[Score]) -> Iterator[Reason]:
    if state == "not measured":
        text = "Whether it is still safe was not measured"
        yield Reason("safety_not_measured", "warning", text, text[0].lower() + text[1:])
    for score in _aimed(scores):
        if missed(score):
            meaning = about(score.task).meaning_of(score.name)
            brief = meaning.worse if meaning and meaning.worse else f"it is worse at: {title(score)}"
            yield _reason("safety_missed", "error", "Less safe", score, brief)
        elif score.met:
            yield _reason("safety_kept", "good", "As safe as before", score, "it is as safe as before")
        elif score.met is False:
            yield _reason("safety_better", "note", "Changed for the better", score)
        else:
            yield _open("safety", score, "it is not shown to be as safe as before", "its safety got worse")


def _open(family: str, score: Score, brief: str, fell: str) -> Reason:
    """The interval allows both that the target is kept and that it is missed."""
    if score.verdict == "regressed":
        lead = "Got worse, and whether beyond its target is not shown"
        return _reason(f"{family}_regressed", "warning", lead, score, fell)
    return _reason(f"{family}_not_shown", "warning", "Not shown to be kept", score, brief)


def _worse_reasons(facts: Facts, judged: Sequence[Score], forgot: Sequence[Score]) -> Iterator[Reason]:
    """What got worse besides the scores with reasons of their own: numbers and parts of the task and of
    benchmarks, and parts that miss a target."""
    known = {(score.task, score.name) for score in (*judged, *forgot) if score.verdict == "regressed"}
    worse = [
        measure.score
        for measure in counting(facts, parts=True)
        if measure.score.verdict == "regressed"
        and (measure.score.part or (measure.score.task, measure.score.name) not in known)
        and (measure.question in ("task", "benchmarks") or (measure.score.part and missed(measure.score)))
    ]
    for score in worse[:SHOWN]:
        code = "part_regressed" if score.part else "number_regressed"
        yield _reason(code, "warning", "Got worse", score, "some numbers got worse")
    if left := worse[SHOWN:]:
        measures = tuple(map(identifier, left))
        text = f"{len(left):,} more {'numbers' if len(left) > 1 else 'number'} got worse"
        yield Reason("number_regressed", "warning", text, "some numbers got worse", measures)


def _measurement_reasons(rows: Sequence[Measure], judged: Sequence[Measure]) -> Iterator[Reason]:
    """Whether the rows were unseen, and whether all were asked."""
    if judged and (files := elsewhere(judged[0].record)) and not judged[0].record.unseen:
        text = f"The task was measured on {files}, which may be what it was trained on"
        yield Reason("data_maybe_trained_on", "warning", text, PROVES_LITTLE)
    for limit in dict.fromkeys(filter(None, (subset(row.record) for row in rows))):
        yield Reason("evaluation_limited", "note", f"The evaluation was {limit}")


def _checkpoint_reasons(facts: Facts) -> Iterator[Reason]:
    step, index = _step(evaluated(facts)), facts.checkpoints
    if step is None or index is None:
        return
    if step != index.used:
        which = "best" if index.best == index.used else "last"
        text = f"Checkpoint {evaluated(facts)} was measured, and the {which} is {index.used}"
        yield Reason("checkpoint_not_measured", "warning", text, f"its {which} checkpoint was not measured")
    elif index.best not in (None, step):
        text = (
            f"Step {step} was measured; step {index.best} validated better, and its checkpoint was not kept"
        )
        yield Reason(
            "checkpoint_not_best", "warning", text, "a checkpoint that was not kept validated better"
        )


def _run_reasons(facts: Facts) -> Iterator[Reason]:
    if not facts.ended:
        why = f" ({facts.why})" if facts.why else ""
        text = f"The run itself is {words.STATES.get(facts.status, facts.status)}{why}"
        failed = facts.status == "failed"
        brief = "the run failed" if failed else "the run did not end"
        yield Reason(f"run_{facts.status}", "error" if failed else "warning", text, brief)


def _reason(code: str, tone: Tone, lead: str, score: Score, brief: str = "") -> Reason:
    return Reason(code, tone, f"{lead}: {numbers(score)}", brief, (identifier(score),))


def numbers(score: Score) -> str:
    """Title, from, to, difference with its interval, n, and the target in words."""
    unit = score.unit
    text = f"{title(score)} {interval(score, of='base')} → {words.number(score.value, unit)}, "
    text += words.number(score.delta, unit, signed=True)
    low, high = score.delta_low, score.delta_high
    if low is not None and high is not None:
        ends = [words.number(end, unit, signed=True, bare=True) for end in (low, high)]
        text += f", 95 % interval {' to '.join(ends)}"
        hidden = score.verdict == "no difference shown" and low * high > 0
        if hidden and score.p_corrected is not None:
            text += f" (corrected for the number of tests, p is {words.number(score.p_corrected)})"
    text += f", n {score.n:,}"
    if score.target:
        text += f"; target {met(score)}: {score.target}"
        text += f", measured {reached(score)}" if reached(score) else ""
    return text
