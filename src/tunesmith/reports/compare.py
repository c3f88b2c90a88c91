"""Which of several runs is better, how sure that is, and what it costs: settings, curves and paired
differences side by side.

Reads run directories only. One run is the one that the others are held against: every difference is other −
that one, on the same prompts (`paired`), and all of them are judged together, so the more is compared the
more a difference must show. Two of the others are not held against each other; name one of them with
``against`` for that."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import accumulate
from pathlib import Path
from typing import Any

from tunesmith.data.sources import sha256
from tunesmith.display import words
from tunesmith.display.console import duration, size
from tunesmith.display.text import many
from tunesmith.errors import ConfigError, DataError
from tunesmith.evaluation import pairing as paired
from tunesmith.evaluation.pairing import PairedExample, PairedRecords
from tunesmith.evaluation.statistics import judge
from tunesmith.evaluation.tasks import about
from tunesmith.events import Notice, Sink, StepDone, Validated, silent
from tunesmith.reports import summary as facts
from tunesmith.reports import verdict as evidence
from tunesmith.runs.directory import EVALS, ORIGIN, VALID, Run
from tunesmith.runs.records import Record, Score
from tunesmith.settings.config import flat

PAGE, TEXT, MACHINE = "compare.html", "compare.md", "compare.json"
MARK = "tunesmith compare"
"""By it files are known as ones that may be replaced; it is among their first letters."""
UNSEEN = "FILE"
SAID = {"improved": "better", "regressed": "worse", "no difference shown": "no difference shown"}


@dataclass(frozen=True)
class Ran:
    """One run. ``letter``: what it is called beside others. ``found``: `facts.summary`. ``training``: (step,
    tokens, loss) of each update, smoothed. ``validation``: (step, tokens, loss). ``held_out``: SHA-256 of its
    held-out rows, "" for none."""

    letter: str
    name: str
    path: Path
    found: dict[str, Any]
    unit: str
    training: list[tuple[int, int, float]]
    validation: list[tuple[int, int, float]]
    settings: dict[str, Any]
    origins: dict[str, str]
    held_out: str
    evaluations: list[Record]

    def __str__(self) -> str:
        return f"{self.letter} ({self.name})"


@dataclass(frozen=True)
class Row:
    """A setting or fact that is not the same in all runs: one value a run, and where each was set ("" where
    that is nowhere)."""

    key: str
    told: list[Any]
    origins: list[str]


@dataclass(frozen=True)
class Against:
    """One run held against the first. ``refused``: what was not compared, why, and the command that would
    mend it."""

    run: Ran
    held: list[PairedRecords]
    refused: list[tuple[str, str, str | None]]
    sentence: str


@dataclass(frozen=True)
class Comparison:
    """``runs``: the one that the others are held against is first. ``tone``: good, warning or note."""

    verdict: str
    tone: str
    runs: list[Ran]
    settings: list[Row]
    others: list[Row]
    against: list[Against]
    out: Path

    @property
    def tests(self) -> int:
        """How many headline differences were judged together."""
        return sum(
            score.headline and score.verdict is not None
            for one in self.against
            for held in one.held
            for score in held.scores
        )

    def to_json(self) -> dict[str, Any]:
        """All of it; numbers that are not finite become their names (``"nan"``, ``"inf"``)."""
        runs = [
            {
                **{
                    key: value
                    for key, value in asdict(replace(run, evaluations=[], found={})).items()
                    if key not in ("found", "evaluations")
                },
                "path": str(run.path),
                **{
                    key: run.found[key]
                    for key in ("status", "updates", "time", "tokens_per_second", "memory_peak", "weights")
                },
            }
            for run in self.runs
        ]
        against = [
            {
                "run": one.run.letter,
                "sentence": one.sentence,
                "compared": [
                    {
                        "task": held.second.task,
                        "version": held.second.version,
                        "rows": held.second.variant,
                        "note": held.note,
                        "identity": held.second.identity,
                        "base": held.second.base,
                        "checkpoints": [held.first.checkpoint, held.second.checkpoint],
                        "scores": [{**asdict(score), "against": score.base} for score in held.scores],
                        "changes": Counter(pair.change for pair in held.examples if pair.change),
                        "prompts": [pair._asdict() for pair in held.examples],
                    }
                    for held in one.held
                ],
                "not_compared": [
                    dict(zip(("what", "why", "command"), refused, strict=True)) for refused in one.refused
                ],
            }
            for one in self.against
        ]
        found = {
            "generator": MARK,
            "verdict": self.verdict,
            "tests": self.tests,
            "runs": runs,
            "against": against,
        }
        found |= {
            "settings": [asdict(row) for row in self.settings],
            "others": [asdict(row) for row in self.others],
        }
        return json.loads(json.dumps(found), parse_constant=lambda name: str(float(name)))


def compare(
    run_dirs: Sequence[Path], out: Path, against: Path | None = None, notify: Sink = silent
) -> Comparison:
    """Hold runs against the first of them, or against ``against``; three files go to ``out``.

    Raises DataError where one is no run or there are not two, ConfigError where ``out`` holds what is not its
    own."""
    from tunesmith.reports import comparison

    folders = [*([against] if against is not None else []), *run_dirs]
    known: dict[Path, Path] = {}
    for folder in folders:
        known.setdefault(Run.open(folder).path.resolve(), folder)
    paths = list(known.values())
    if len(paths) < 2:
        where = ", ".join(map(str, folders)) or None
        raise DataError(
            "one run alone cannot be compared", where=where, hint="name two run directories or more"
        )
    if twice := len(run_dirs) - len({folder.resolve() for folder in run_dirs}):
        notify(Notice("a run that is named twice is compared once", level="warning", count=twice))
    check(out)
    called = zip(paths, _letters(len(paths)), _names(paths), strict=True)
    runs = [_read(path, letter, name, notify) for path, letter, name in called]
    first = runs[0]
    found = [paired.pair(first.evaluations, run.evaluations) for run in runs[1:]]
    every = judge([score for held, _ in found for each in held for score in each.scores])
    judged = iter(every)
    tests = sum(score.headline and score.verdict is not None for score in every)
    sides: list[Against] = []
    for run, (held, refused) in zip(runs[1:], found, strict=True):
        held = [replace(each, scores=[next(judged) for _ in each.scores]) for each in held]
        mended = [_refusal(first, run, one) for one in refused]
        for what, why, command in mended:
            notify(
                Notice(
                    f"{first.letter} and {run.letter}: not compared: {what}: {why}",
                    level="warning",
                    hint=command,
                )
            )
        for each in held:
            if each.note:
                notify(Notice(each.note, level="warning"))
        sides.append(Against(run, held, mended, _sentence(first, run, held, tests)))
    verdict, tone = _verdict(first, sides)
    whole = Comparison(verdict, tone, runs, _settings(runs), _others(runs), sides, out)
    comparison.write(whole)
    return whole


def check(out: Path) -> None:
    """Raises ConfigError where ``out`` is no folder, or holds a file of one of our names that is not ours."""
    hint = "name a folder that does not exist yet with --out, or remove this"
    if out.exists() and not out.is_dir():
        raise ConfigError("is no folder", where=str(out), hint=hint)
    for path in (out / name for name in (PAGE, TEXT, MACHINE)):
        if path.is_file():
            with path.open("rb") as stream:
                if MARK.encode() in stream.read(4096):
                    continue
        if path.exists():
            raise ConfigError(
                "was not made by tunesmith compare, so it is not replaced", where=str(path), hint=hint
            )


def _letters(count: int) -> list[str]:
    """A, B, … Z, A2, B2, …"""
    return [chr(ord("A") + at % 26) + (str(at // 26 + 1) if at >= 26 else "") for at in range(count)]


def _names(paths: Sequence[Path]) -> list[str]:
    """The folder of each, with as much of what is above it as tells them apart."""
    parts = [path.resolve().parts for path in paths]
    deep = next(
        deep
        for deep in range(1, 1 + max(map(len, parts)))
        if len({each[-deep:] for each in parts}) == len(parts)
    )
    return ["/".join(each[-deep:]) for each in parts]


def _read(path: Path, letter: str, name: str, notify: Sink) -> Ran:
    log = facts.log(path)
    steps = facts.only(log, StepDone)
    window = max(1, len(steps) // 20)
    tokens = dict(
        zip(
            (0, *(step.step for step in steps)),
            accumulate((step.tokens for step in steps), initial=0),
            strict=True,
        )
    )
    smooth = facts.trailing([step.loss for step in steps], window, [step.units for step in steps])
    training = [(step.step, tokens[step.step], loss) for step, loss in zip(steps, smooth, strict=True)]
    validation = [
        (one.step, tokens[one.step], one.loss) for one in facts.only(log, Validated) if one.step in tokens
    ]
    evaluations, older = paired.recorded(path)
    for record in older:
        what = f"{letter}: {EVALS}/{record.name} is of an older version of tunesmith, and not compared"
        notify(Notice(what, level="warning", where=str(path), hint=paired.command(record)))
    origins = json.loads((path / ORIGIN).read_text(encoding="utf-8")) if (path / ORIGIN).exists() else {}
    held_out = sha256(path / VALID) if (path / VALID).exists() and (path / VALID).stat().st_size else ""
    return Ran(
        letter,
        name,
        path,
        facts.summary(path),
        facts.unit(log),
        training,
        validation,
        facts.settings(path),
        origins,
        held_out,
        evaluations,
    )


def _rows(values: Sequence[dict[str, Any]], origins: Sequence[dict[str, str]]) -> list[Row]:
    """The keys whose values are not the same everywhere; "–" where a run has none."""
    keys = dict.fromkeys(key for each in values for key in each)
    rows = [
        Row(key, [each.get(key, "–") for each in values], [each.get(key, "") for each in origins])
        for key in keys
    ]
    return [row for row in rows if any(json.dumps(value) != json.dumps(row.told[0]) for value in row.told)]


def _settings(runs: Sequence[Ran]) -> list[Row]:
    return _rows([run.settings for run in runs], [run.origins for run in runs])


def _others(runs: Sequence[Ran]) -> list[Row]:
    """Hashes, versions, machine and origin; data by what is in the files, wherever they lie."""
    found: list[dict[str, Any]] = []
    for run in runs:
        manifest = run.found["manifest"]
        hashes = manifest.get("hashes", {})
        told = {"data": ", ".join(sorted(one[:12] for one in flat(hashes.get("data", {})).values()))}
        told |= {
            "held-out rows": run.held_out[:12] or "none",
            "rows learned from": run.found["counts"].get("rows_train"),
        }
        told |= {key: str(hashes.get(key))[:12] for key in ("base", "template")}
        told |= {"loss": run.unit, "status": run.found["status"]}
        told |= flat({key: manifest.get(key) or {} for key in ("versions", "machine", "lineage", "accepted")})
        found.append(told)
    return _rows(found, [{} for _ in runs])


def _refusal(first: Ran, run: Ran, one: paired.UnpairedRecord) -> tuple[str, str, str | None]:
    """What, why and the command that would mend it."""
    what, about, why, lacking = (
        f"{one.record.task}{one.record.variant}",
        one.record,
        one.reason,
        one.missing_in == "second",
    )
    if one.missing_in is not None:
        why = f"{(first, run)[lacking].letter} was not evaluated on it"
    apart = about.data == VALID and first.held_out != run.held_out and "other bases" not in why
    if apart:  # the usual command would ask each its own
        about = replace(about, data=(UNSEEN,))
        why += f"; the runs held out other rows, so both need the same: {UNSEEN} of rows that neither was trained on"
    commands = [paired.command(about, each.path) for each in (first, run)]
    if one.missing_in is None or apart:
        return what, why, "; ".join(commands) if apart or one.reason.startswith("version") else None
    return what, why, commands[lacking]


# The verdict


def _sentence(first: Ran, run: Ran, held: Sequence[PairedRecords], tests: int) -> str:
    """How ``run`` does against ``first``: at the task, at all else, and what it costs."""
    leading = lead(held)
    if leading is None:
        which = "it" if held else "both"
        text = f"whether {run} or {first} is better at the task is not known, since no evaluation of {which} can be compared"
    else:
        score = leading[1]
        values = " against ".join(words.number(value, score.unit) for value in (score.value, score.base))
        moved = words.interval(asdict(score), of="delta").replace("(", "(95 % interval ")
        told = f"{words.title(asdict(score))} {values}, {moved} on the same {many(score.n, 'row')}"
        if score.p_corrected is not None:
            told += f", p {probable(score.p_corrected)}" + (
                f", corrected for {tests} comparisons" if tests > 1 else ""
            )
        shown = {"improved": f"{run} is better than {first}", "regressed": f"{run} is worse than {first}"}
        text = (
            f"{shown.get(score.verdict or '', f'no difference is shown between {run} and {first}')} ({told})"
        )
    rest = [
        score
        for each in held
        for score in each.scores
        if score.headline and score.part is None and (leading is None or score is not leading[1])
    ]
    for verdict in ("improved", "regressed"):
        moved = [one for one in rest if one.verdict == verdict]
        if some := [
            f"{words.title(asdict(one))} {words.number(one.delta, one.unit, signed=True)}" for one in moved
        ]:
            text += (
                f"; {'also ' if verdict == 'improved' and leading else ''}{SAID[verdict]}: {', '.join(some)}"
            )
    for family, what in (("retention", "what the base knew"), ("safety", "safety")):
        some = [one for one in rest if evidence.question(one.task) == family]
        if not some:
            text += f"; {what} was not compared"
        elif not any(one.verdict in ("improved", "regressed") for one in some):
            text += f"; {what}: {'no difference shown' if any(one.verdict for one in some) else 'not judged'}"
    return f"{text}; {_cost(first, run)}."


def _cost(first: Ran, run: Ran) -> str:
    told: list[str] = []
    spent = [each.found["time"]["training_s"] for each in (run, first)]
    if all(spent):
        told.append(f"its updates took {duration(spent[0])} against {duration(spent[1])}")
    peaks = [each.found["memory_peak"].get("peak") for each in (run, first)]
    if all(peaks):
        told.append(f"at most {size(peaks[0])} against {size(peaks[1])}")
    return " and ".join(told) or "what it costs is not recorded"


def _verdict(first: Ran, sides: Sequence[Against]) -> tuple[str, str]:
    """One sentence about all runs, and its tone."""
    leads = [lead(side.held) for side in sides]
    gains = [
        -math.inf
        if one is None or one[1].delta is None
        else one[1].delta * (-1 if one[1].better == "lower" else 1)
        for one in leads
    ]
    won = [one is not None and one[1].verdict == "improved" for one in leads]
    count = sum(won)
    # Only one number, of the same prompts, ranks: a share cannot be held against a perplexity.
    alike = len({(one[1].task, one[1].name, one[0].second.identity) for one in leads if one is not None}) == 1
    best = max(range(len(sides)), key=lambda at: (won[at], gains[at]))
    spoken = [sides[best]] if alike or len(sides) == 1 else sides
    worse = any(
        score.headline and score.part is None and score.verdict == "regressed"
        for side in spoken
        for held in side.held
        for score in held.scores
    )
    tone = "warning" if worse else "good" if count else "note"
    if len(sides) == 1:
        return spoken[0].sentence[0].upper() + spoken[0].sentence[1:], tone
    better = f"{count or 'none'} {'is' if count < 2 else 'are'} shown to be better"
    head = f"Of {len(sides)} runs held against {first.letter}, {better}; "
    if alike:
        head += "the furthest ahead: " if count else f"{spoken[0].run.letter} comes nearest: "
    else:
        head += "they are not ranked, since no one number is compared in all: "
    return head + " ".join(one.sentence for one in spoken), tone


def lead(held: Sequence[PairedRecords]) -> tuple[PairedRecords, Score] | None:
    """The headline of the task that is nearest to what users see, on all rows rather than some."""
    headlines = [
        (each, score)
        for each in held
        for score in each.scores
        if score.headline and score.part is None and about(score.task).question in ("task", "benchmarks")
    ]

    def place(headline: tuple[PairedRecords, Score]) -> tuple[bool, int, int]:
        described = about(headline[1].task)
        return described.question != "task", described.rank, len(headline[0].second.variant)

    return min(headlines, key=place, default=None)


def probable(value: float) -> str:
    """A p value as it is told."""
    return "< 0.001" if value < 0.001 else f"{value:.3f}"


def read_side_by_side(held: PairedRecords, limit: int) -> Iterator[tuple[str, list[PairedExample], int]]:
    """What changed, its prompts (``limit`` at most; those that got worse first), and how many more there
    are."""
    for name in ("regressed", "improved", "unchanged", None):
        found = [
            pair
            for pair in held.examples
            if pair.change == name and (pair.first_answer, pair.second_answer) != (None, None)
        ]
        found.sort(key=lambda pair: pair.first_answer == pair.second_answer)
        if found:
            yield (
                {"regressed": "worse", "improved": "better", "unchanged": "unchanged"}.get(
                    name or "", "not ranked"
                ),
                found[:limit],
                max(0, len(found) - limit),
            )
