"""Which of several runs is better, how sure is that, and what does it cost?

Reads run directories only. All runs are compared with one of them, the first: every difference is other −
first, on the same prompts (`evaluation.pairing`), and all are judged together, so the more is compared the
larger a difference must be to count. The others are not compared with one another; name another first run
with ``against`` for that."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import accumulate
from pathlib import Path
from typing import Any, Literal, NamedTuple

from tunesmith.data.sources import sha256
from tunesmith.display import words
from tunesmith.display.console import duration, size
from tunesmith.display.notebook import NotebookResult
from tunesmith.display.text import many
from tunesmith.errors import DataError
from tunesmith.evaluation import pairing
from tunesmith.evaluation.pairing import PairedExample, PairedRecords, UnpairedRecord
from tunesmith.evaluation.statistics import judge
from tunesmith.evaluation.tasks import about
from tunesmith.events import Notice, Sink, StepDone, Validated, silent
from tunesmith.reports.facts import given, loss_unit, only, read_log, settings, trailing
from tunesmith.reports.measures import identifier, interval, title
from tunesmith.reports.summary import Summary, ship, summarise
from tunesmith.reports.verdict import TONES, Reason, Tone
from tunesmith.runs import bases
from tunesmith.runs.directory import EVALS, VALID, Run
from tunesmith.runs.records import Record, Score
from tunesmith.settings.config import flat

MARK = "tunesmith compare"
"""Among the first letters of every file of a comparison, so that it is known as one that may be replaced."""
UNSEEN = "FILE"
SAID = {"improved": "better", "regressed": "worse", "no difference shown": "no difference shown"}

Outcome = Literal["better", "worse", "no_difference", "unknown"]


class CurvePoint(NamedTuple):
    step: int
    tokens: int
    loss: float


@dataclass(frozen=True)
class ComparedRun:
    """One run. ``letter``: its short name. ``training``: the loss of each update, smoothed. ``held_out``:
    SHA-256 of its held-out rows, "" if there are none. ``records``: those that can be compared."""

    letter: str
    name: str
    path: Path
    summary: Summary
    unit: str
    training: list[CurvePoint]
    validation: list[CurvePoint]
    settings: dict[str, Any]
    origins: dict[str, str]
    held_out: str
    records: list[Record]

    def __str__(self) -> str:
        return f"{self.letter} ({self.name})"


@dataclass(frozen=True)
class DifferingRow:
    """A setting or fact that is not the same in all runs. ``values``: one a run. ``origins``: where each was
    set, "" if nowhere."""

    key: str
    values: list[Any]
    origins: list[str]


class Uncompared(NamedTuple):
    """An evaluation that was not compared. ``command``: what would make it comparable."""

    what: str
    why: str
    command: str | None


@dataclass(frozen=True)
class RunAgainstFirst:
    """One run compared with the first. ``verdict``: one line. ``reasons``: what is worse first."""

    run: ComparedRun
    pairs: list[PairedRecords]
    uncompared: list[Uncompared]
    verdict: str
    reasons: tuple[Reason, ...]

    @property
    def outcome(self) -> Outcome:
        """Of the leading headline."""
        leading = lead(self.pairs)
        verdict = leading and leading[1].verdict
        outcomes: dict[str, Outcome] = {
            "improved": "better",
            "regressed": "worse",
            "no difference shown": "no_difference",
        }
        return outcomes.get(verdict or "", "unknown")


@dataclass(frozen=True)
class RunComparison(NotebookResult):
    """``verdict``: one line. ``reasons``: of the other run, or of several one for each. ``tone``: good,
    warning or note. ``runs``: the one with which the others are compared is first. ``out``: the folder of its
    files."""

    verdict: str
    reasons: tuple[Reason, ...]
    tone: Tone
    runs: list[ComparedRun]
    settings: list[DifferingRow]
    others: list[DifferingRow]
    sides: list[RunAgainstFirst]
    out: Path

    @property
    def lines(self) -> list[str]:
        """The verdict, then its reasons."""
        return [self.verdict, *(reason.line for reason in self.reasons)]

    @property
    def tests(self) -> int:
        """How many headline differences were judged together."""
        return sum(
            score.headline and score.verdict is not None
            for side in self.sides
            for pair in side.pairs
            for score in pair.scores
        )

    def to_json(self) -> dict[str, Any]:
        """The content of ``compare.json``; numbers that are not finite become their names ("nan", "inf")."""
        content = {
            "generator": MARK,
            "verdict": self.verdict,
            "reasons": [asdict(reason) for reason in self.reasons],
            "tests": self.tests,
            "runs": [_run_content(run) for run in self.runs],
            "against": [_side_content(side) for side in self.sides],
            "settings": [_row_content(row) for row in self.settings],
            "others": [_row_content(row) for row in self.others],
        }
        return json.loads(json.dumps(content), parse_constant=lambda name: str(float(name)))


def _run_content(run: ComparedRun) -> dict[str, Any]:
    facts = run.summary.facts
    return {
        "letter": run.letter,
        "name": run.name,
        "path": str(run.path),
        "unit": run.unit,
        "training": run.training,
        "validation": run.validation,
        "settings": run.settings,
        "origins": run.origins,
        "held_out": run.held_out,
        "status": facts.status,
        "updates": asdict(facts.updates),
        "time": asdict(facts.time),
        "tokens_per_second": asdict(facts.speeds),
        "memory_peak": facts.memory_peak,
        "weights": facts.weights and asdict(facts.weights),
        **ship(run.summary),
    }


def _side_content(side: RunAgainstFirst) -> dict[str, Any]:
    compared = [
        {
            "task": pair.second.task,
            "version": pair.second.version,
            "rows": pair.second.variant,
            "note": pair.note,
            "identity": pair.second.identity,
            "base": pair.second.base,
            "checkpoints": [pair.first.checkpoint, pair.second.checkpoint],
            "scores": [{**asdict(score), "against": score.base} for score in pair.scores],
            "changes": Counter(example.change for example in pair.examples if example.change),
            "prompts": [example._asdict() for example in pair.examples],
        }
        for pair in side.pairs
    ]
    return {
        "run": side.run.letter,
        "outcome": side.outcome,
        "verdict": side.verdict,
        "reasons": [asdict(reason) for reason in side.reasons],
        "compared": compared,
        "not_compared": [uncompared._asdict() for uncompared in side.uncompared],
    }


def _row_content(row: DifferingRow) -> dict[str, Any]:
    return {"key": row.key, "told": row.values, "origins": row.origins}


def compare(
    run_dirs: Sequence[Path], out: Path, against: Path | None = None, notify: Sink = silent
) -> RunComparison:
    """Compare runs with the first of them, or with ``against``. Nothing is written.

    Raises DataError if one is not a run, or if fewer than two are named."""
    runs = _runs(run_dirs, against, notify)
    first = runs[0]
    paired = [pairing.pair(first.records, run.records) for run in runs[1:]]
    every = judge([score for pairs, _ in paired for pair in pairs for score in pair.scores])
    judged = iter(every)
    tests = sum(score.headline and score.verdict is not None for score in every)
    sides: list[RunAgainstFirst] = []
    for run, (unjudged, unpaired) in zip(runs[1:], paired, strict=True):
        pairs = [replace(pair, scores=[next(judged) for _ in pair.scores]) for pair in unjudged]
        remedies = [_remedy(first, run, record) for record in unpaired]
        uncompared = [remedy.uncompared for remedy in remedies]
        _tell_uncompared(first, run, remedies, notify)
        for pair in pairs:
            if pair.note:
                notify(Notice(pair.note, level="warning"))
        reasons = sorted(_reasons(first, run, pairs, tests), key=lambda reason: TONES.index(reason.tone))
        sides.append(RunAgainstFirst(run, pairs, uncompared, _outcome(first, run, pairs), tuple(reasons)))
    verdict, spoken = _verdict(first, sides)
    reasons = spoken[0].reasons if len(spoken) == 1 else tuple(_in_short(side, tests) for side in spoken)
    return RunComparison(
        verdict, reasons, _tone(sides, spoken), runs, _settings(runs), _others(runs), sides, out
    )


def _runs(run_dirs: Sequence[Path], against: Path | None, notify: Sink) -> list[ComparedRun]:
    first = [] if against is None else [Run.open(against).path]
    named_runs = [Run.open(folder).path for folder in run_dirs]
    folders = [*first, *named_runs]
    unique: dict[Path, Path] = {}
    for folder in folders:
        unique.setdefault(folder.resolve(), folder)
    paths = list(unique.values())
    if len(paths) < 2:
        where = ", ".join(map(str, folders)) or None
        hint = "name two run directories or more"
        raise DataError("one run alone cannot be compared", where=where, hint=hint)
    if twice := len(named_runs) - len({folder.resolve() for folder in named_runs}):
        notify(Notice("a run that is named twice is compared once", level="warning", count=twice))
    named = zip(paths, _letters(len(paths)), _names(paths), strict=True)
    return [_read(path, letter, name, notify) for path, letter, name in named]


def _letters(count: int) -> list[str]:
    """A, B, … Z, A2, B2, …"""
    return [
        chr(ord("A") + index % 26) + (str(index // 26 + 1) if index >= 26 else "") for index in range(count)
    ]


def _names(paths: Sequence[Path]) -> list[str]:
    """The folder of each, with as many of its parents as distinguish them."""
    parts = [path.resolve().parts for path in paths]
    depth = next(
        depth
        for depth in range(1, 1 + max(map(len, parts)))
        if len({names[-depth:] for names in parts}) == len(parts)
    )
    return ["/".join(names[-depth:]) for names in parts]


def _read(path: Path, letter: str, name: str, notify: Sink) -> ComparedRun:
    log = read_log(path)
    steps = only(log, StepDone)
    seen = accumulate((step.tokens for step in steps), initial=0)
    tokens = dict(zip((0, *(step.step for step in steps)), seen, strict=True))
    window = max(1, len(steps) // 20)
    task = [step for step in steps if step.task_units]
    losses = trailing([step.task_loss for step in task], window, [step.task_units for step in task])
    records, older = pairing.recorded(path)
    for record in older:
        text = f"{letter}: {EVALS}/{record.name} is of an older version of tunesmith, and not compared"
        notify(Notice(text, level="warning", where=str(path), hint=pairing.command(record)))
    return ComparedRun(
        letter,
        name,
        path,
        summarise(path, log),
        loss_unit(log),
        [CurvePoint(step.step, tokens[step.step], loss) for step, loss in zip(task, losses, strict=True)],
        [
            CurvePoint(event.step, tokens[event.step], event.loss)
            for event in only(log, Validated)
            if event.step in tokens
        ],
        settings(path),
        given(path),
        _held_out(path / VALID),
        records,
    )


def _held_out(valid: Path) -> str:
    """A hash of the held-out rows; "" if there are none. Raises DataError if they are not a file."""
    if not valid.exists():
        return ""
    if not valid.is_file():
        hint = "put the run's held-out rows back, or delete it: the run then counts as one without them"
        raise DataError("is not a file", where=str(valid), hint=hint)
    return sha256(valid) if valid.stat().st_size else ""


def _differing(values: Sequence[dict[str, Any]], origins: Sequence[dict[str, str]]) -> list[DifferingRow]:
    """The keys whose values are not the same in all runs; "–" if a run has none."""
    keys = dict.fromkeys(key for by_key in values for key in by_key)
    rows = [
        DifferingRow(
            key, [by_key.get(key, "–") for by_key in values], [by_key.get(key, "") for by_key in origins]
        )
        for key in keys
    ]
    return [
        row for row in rows if any(json.dumps(value) != json.dumps(row.values[0]) for value in row.values)
    ]


def _settings(runs: Sequence[ComparedRun]) -> list[DifferingRow]:
    """A folder that a GGUF file was converted to is told as that file."""
    every = [dict(run.settings) for run in runs]
    for run, values in zip(runs, every, strict=True):
        if isinstance(path := values.get("model.path"), str):
            base = run.summary.facts.manifest.get("hashes", {}).get("base")
            values["model.path"] = bases.named(path, base)
    return _differing(every, [run.origins for run in runs])


def _others(runs: Sequence[ComparedRun]) -> list[DifferingRow]:
    """Hashes, versions, machine and origin; data by the content of the files, not by their paths."""
    facts: list[dict[str, Any]] = []
    for run in runs:
        manifest = run.summary.facts.manifest
        hashes = manifest.get("hashes", {})
        known = {
            "data": ", ".join(sorted(value[:12] for value in flat(hashes.get("data", {})).values())),
            "held-out rows": run.held_out[:12] or "none",
            "rows trained on": run.summary.facts.counts.get("rows_train"),
            **{key: str(hashes.get(key))[:12] for key in ("base", "template")},
            "loss": run.unit,
            "status": run.summary.facts.status,
        }
        keys = ("versions", "machine", "lineage", "accepted")
        facts.append(known | flat({key: manifest.get(key) or {} for key in keys}))
    return _differing(facts, [{} for _ in runs])


class _Remedy(NamedTuple):
    """Why a record was not compared, and the runs that would have to be evaluated as ``asked`` says."""

    name: str
    why: str
    asked: Record
    runs: tuple[ComparedRun, ...]

    @property
    def uncompared(self) -> Uncompared:
        commands = [pairing.command(self.asked, run.path) for run in self.runs]
        return Uncompared(self.name, self.why, "; ".join(commands) or None)


def _tell_uncompared(first: ComparedRun, run: ComparedRun, remedies: Sequence[_Remedy], notify: Sink) -> None:
    """One warning a reason, with one command for all tasks that can be evaluated at once."""
    by_reason: dict[tuple[str, tuple[str, ...]], list[_Remedy]] = {}
    for remedy in remedies:
        letters = tuple(lacking.letter for lacking in remedy.runs)
        by_reason.setdefault((remedy.why, letters), []).append(remedy)
    for (why, _), alike in by_reason.items():
        names = ", ".join(remedy.name for remedy in alike)
        why = why.replace("evaluated on it", "evaluated on them") if len(alike) > 1 else why
        records = [remedy.asked for remedy in alike]
        commands = [command for each in alike[0].runs for command in pairing.commands(records, each.path)]
        text = f"{first.letter} and {run.letter}: not compared: {names}: {why}"
        notify(Notice(text, level="warning", hint="; ".join(commands) or None))


def _remedy(first: ComparedRun, run: ComparedRun, unpaired: UnpairedRecord) -> _Remedy:
    record, why = unpaired.record, unpaired.reason
    name = f"{record.task}{record.variant}"
    lacking = run if unpaired.missing_in == "second" else first
    if unpaired.missing_in is not None:
        why = f"{lacking.letter} was not evaluated on it"
    other_rows = record.data == VALID and first.held_out != run.held_out and "other bases" not in why
    if other_rows:  # the usual command would ask each run its own held-out rows
        record = replace(record, data=(UNSEEN,))
        why += "; the runs held out other rows, so both need the same: "
        why += f"{UNSEEN} of rows that neither was trained on"
    if unpaired.missing_in is not None and not other_rows:
        return _Remedy(name, why, record, (lacking,))
    mended = other_rows or unpaired.reason.startswith("version")
    return _Remedy(name, why, record, (first, run) if mended else ())


# The verdict


def _outcome(first: ComparedRun, run: ComparedRun, pairs: Sequence[PairedRecords]) -> str:
    """How ``run`` does compared with ``first``, in one line: at the task, and at what else."""
    leading = lead(pairs)
    if leading is None:
        which = "it" if pairs else "both"
        line = f"Whether {run} or {first} is better at the task is not known, "
        line += f"since no evaluation of {which} can be compared"
    else:
        none = f"No difference is shown between {run} and {first} at the task"
        line = {
            "improved": f"{run} is better than {first} at the task",
            "regressed": f"{run} is worse than {first} at the task",
        }.get(leading[1].verdict or "", none)
    for verdict in ("improved", "regressed"):
        titles = [title(score) for score in _others_judged(pairs) if score.verdict == verdict]
        line += f"; {SAID[verdict]}: {', '.join(titles)}" if titles else ""
    return line


def _others_judged(pairs: Sequence[PairedRecords]) -> list[Score]:
    """The headlines but the leading one."""
    leading = lead(pairs)
    return [
        score
        for pair in pairs
        for score in pair.scores
        if score.headline and score.part is None and not (leading and score is leading[1])
    ]


def _reasons(
    first: ComparedRun, run: ComparedRun, pairs: Sequence[PairedRecords], tests: int
) -> Iterator[Reason]:
    """The numbers behind `_outcome`, what was not compared, and what ``run`` costs."""
    if leading := lead(pairs):
        yield _reason("task", " at the task", leading[1], tests)
    others = _others_judged(pairs)
    for score in others:
        if score.verdict in ("improved", "regressed"):
            yield _reason(score.task, "", score, tests)
    for question, name in (("retention", "What the base knew"), ("safety", "Safety")):
        verdicts = [score.verdict for score in others if about(score.task).question == question]
        if not verdicts:
            yield Reason(f"{question}_not_compared", "warning", f"{name} was not compared")
        elif not {"improved", "regressed"} & set(verdicts):
            text = f"{name}: {'no difference shown' if any(verdicts) else 'not judged'}"
            yield Reason(f"{question}_not_shown", "note", text)
    yield Reason("cost", "note", _cost(first, run))


def _reason(code: str, place: str, score: Score, tests: int) -> Reason:
    tones: dict[str, Tone] = {"improved": "good", "regressed": "error"}
    verdict = score.verdict or ""
    text = f"{SAID.get(verdict, 'no difference shown').capitalize()}{place}: {_numbers(score, tests)}"
    return Reason(
        f"{code}_{verdict.replace(' ', '_')}", tones.get(verdict, "note"), text, "", (identifier(score),)
    )


def _numbers(score: Score, tests: int) -> str:
    values = " against ".join(words.number(value, score.unit) for value in (score.value, score.base))
    change = interval(score, of="delta").replace("(", "(95 % interval ")
    numbers = f"{title(score)} {values}, {change} on the same {many(score.n, 'row')}"
    if score.p_corrected is not None:
        numbers += f", p {probability(score.p_corrected)}"
        numbers += f", corrected for {tests} comparisons" if tests > 1 else ""
    return numbers


def _cost(first: ComparedRun, run: ComparedRun) -> str:
    clauses: list[str] = []
    spent = [each.summary.facts.time.training_s for each in (run, first)]
    if all(spent):
        clauses.append(f"its updates took {duration(spent[0])} against {duration(spent[1])}")
    peaks = [each.summary.facts.memory_peak.get("peak", 0) for each in (run, first)]
    if all(peaks):
        clauses.append(f"at most {size(peaks[0])} against {size(peaks[1])}")
    text = " and ".join(clauses) or "what it costs is not recorded"
    return text[0].upper() + text[1:]


def _verdict(first: ComparedRun, sides: Sequence[RunAgainstFirst]) -> tuple[str, Sequence[RunAgainstFirst]]:
    """One line about all runs, and the runs that it speaks of."""
    leads = [lead(side.pairs) for side in sides]
    count = sum(side.outcome == "better" for side in sides)
    # Only one number, of the same prompts, ranks: a share cannot be compared with a perplexity.
    kinds = {(pair.second.identity, score.task, score.name) for pair, score in filter(None, leads)}
    order = [(side.outcome == "better", _gain(leading)) for side, leading in zip(sides, leads, strict=True)]
    best = sides[max(range(len(sides)), key=lambda index: order[index])]
    if len(sides) == 1:
        return best.verdict, sides
    better = f"{count or 'none'} {'is' if count < 2 else 'are'} shown to be better"
    head = f"Of {len(sides)} runs compared with {first.letter}, {better}; "
    if len(kinds) == 1:
        return head + (f"the furthest ahead: {best.run}" if count else f"{best.run} comes nearest"), [best]
    return head + "they are not ranked, since no one number is compared in all", sides


def _tone(sides: Sequence[RunAgainstFirst], spoken: Sequence[RunAgainstFirst]) -> Tone:
    if any(reason.tone == "error" for side in spoken for reason in side.reasons):
        return "warning"
    return "good" if any(side.outcome == "better" for side in sides) else "note"


def _in_short(side: RunAgainstFirst, tests: int) -> Reason:
    """A run of several in one line, with the number that decides."""
    tones: dict[str, Tone] = {"better": "good", "worse": "error", "unknown": "warning"}
    leading = lead(side.pairs)
    numbers = f" ({_numbers(leading[1], tests)})" if leading else ""
    text = side.verdict + numbers
    return Reason(f"{side.run.letter}_{side.outcome}", tones.get(side.outcome, "note"), text)


def _gain(leading: tuple[PairedRecords, Score] | None) -> float:
    if leading is None or leading[1].delta is None:
        return -math.inf
    return leading[1].delta * (-1 if leading[1].better == "lower" else 1)


def lead(pairs: Sequence[PairedRecords]) -> tuple[PairedRecords, Score] | None:
    """The headline of the task that is nearest to what users see, on all rows rather than some."""
    headlines = [
        (pair, score)
        for pair in pairs
        for score in pair.scores
        if score.headline and score.part is None and about(score.task).question in ("task", "benchmarks")
    ]

    def place(headline: tuple[PairedRecords, Score]) -> tuple[bool, int, int]:
        described = about(headline[1].task)
        return described.question != "task", described.rank, len(headline[0].second.variant)

    return min(headlines, key=place, default=None)


def probability(value: float) -> str:
    """A p value with three digits."""
    return "< 0.001" if value < 0.001 else f"{value:.3f}"


class ReadingGroup(NamedTuple):
    """Prompts whose answers changed in the same way; ``more`` are left out."""

    kind: str
    examples: list[PairedExample]
    more: int


def read_side_by_side(pair: PairedRecords, limit: int) -> Iterator[ReadingGroup]:
    """Groups of at most ``limit`` prompts; those that got worse first, in each group those with other answers
    first."""
    kinds = {"regressed": "worse", "improved": "better", "unchanged": "unchanged", None: "not ranked"}
    for change, kind in kinds.items():
        examples = [
            example
            for example in pair.examples
            if example.change == change and (example.first_answer, example.second_answer) != (None, None)
        ]
        examples.sort(key=lambda example: example.first_answer == example.second_answer)
        if examples:
            yield ReadingGroup(kind, examples[:limit], max(0, len(examples) - limit))
