"""Votes as rows of training data: KTO learns from answers that are good or bad, DPO from pairs.

Votes on the same answers are counted together: the majority decides, and a draw is left out. Secrets and
personal data are replaced by their kind, as far as they have a written form (`checks.content`). What is
written is read again by the reader of `train`, so that a row that it would refuse is left out here."""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, NamedTuple

from tunesmith.data import formats
from tunesmith.data.examples import write_examples
from tunesmith.data.formats import JSON, DataSpec, Dropped, Example
from tunesmith.data.sources import Raw
from tunesmith.files import draft
from tunesmith.serving.guardrails import Detection, Guardrail, screened
from tunesmith.serving.guardrails.kinds.sensitive import PersonalData, Secrets
from tunesmith.serving.votes import THUMBS, Vote

Objective = Literal["kto", "dpo"]
_READ = DataSpec(train=("votes",), valid=0.0)
SCREENS: tuple[Guardrail, ...] = (Secrets(output="redact"), PersonalData(output="redact"))


@dataclass
class VoteRows:
    """``left_out``: reason → votes or rows. ``masked``: kind of secret or personal data → how many."""

    objective: Objective
    rows: list[Example] = field(default_factory=list)
    left_out: Counter[str] = field(default_factory=Counter)
    masked: Counter[str] = field(default_factory=Counter)


class _Answered(NamedTuple):
    """A prompt with an answer, as JSON, to be compared with others."""

    prompt: str
    tools: str
    message: str


def rows(votes: Sequence[Vote], objective: Objective | None = None) -> VoteRows:
    """The rows for an objective. None: DPO if every vote is on two answers, else KTO, which takes both."""
    if objective is None:
        pairs_only = bool(votes) and all(vote.verdict not in THUMBS for vote in votes)
        objective = "dpo" if pairs_only else "kto"
    made = VoteRows(objective)

    def report(detection: Detection) -> None:
        made.masked[detection.kind] += 1

    for row in _kto(votes, made) if objective == "kto" else _dpo(votes, made):
        text = json.dumps(_masked(row, report))
        example = formats.row(Raw("votes", text), _READ)
        if isinstance(example, Dropped):
            made.left_out[example.fault] += 1
        else:
            made.rows.append(example)
    return made


def write(made: VoteRows, path: Path) -> None:
    """JSONL that ``train --data`` takes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with draft(path) as temporary:
        write_examples(made.rows, temporary)


def _kto(votes: Sequence[Vote], made: VoteRows) -> Iterator[dict[str, JSON]]:
    """An answer is good if more votes are for it than against it; the answer that is not preferred of two has
    a vote against it."""
    balance: defaultdict[_Answered, list[int]] = defaultdict(list)
    for vote in votes:
        if vote.verdict == "tie":
            made.left_out["votes for neither of two answers"] += 1
        elif vote.verdict in THUMBS:
            balance[_answers(vote)[0]].append(1 if vote.verdict == "up" else -1)
        else:
            preferred, other = _ordered(vote)
            balance[preferred].append(1)
            balance[other].append(-1)
    for answered, marks in balance.items():
        if sum(marks) == 0:
            made.left_out["answers with as many votes for as against"] += 1
        else:
            yield {**_prompt(answered, "messages", [json.loads(answered.message)]), "label": sum(marks) > 0}


def _dpo(votes: Sequence[Vote], made: VoteRows) -> Iterator[dict[str, JSON]]:
    """Pairs of answers of which one is preferred, or of which one has thumbs up and the other down."""
    wins: Counter[tuple[_Answered, _Answered]] = Counter()
    thumbs: defaultdict[tuple[str, str], Counter[_Answered]] = defaultdict(Counter)
    for vote in votes:
        if vote.verdict == "tie":
            made.left_out["votes for neither of two answers"] += 1
        elif vote.verdict in THUMBS:
            (answered,) = _answers(vote)
            thumbs[answered.prompt, answered.tools][answered] += 1 if vote.verdict == "up" else -1
        elif len({*_answers(vote)}) == 1:
            made.left_out["votes on two answers with the same words"] += 1
        else:
            wins[_ordered(vote)] += 1
    for marks in thumbs.values():
        good, bad = ([it for it, mark in marks.items() if mark * sign > 0] for sign in (1, -1))
        pairs = [(preferred, other) for preferred in good for other in bad]
        wins.update(pairs)
        if not pairs:
            made.left_out["thumbs without an opposite one on the same prompt"] += marks.total() or 1
    done: set[frozenset[_Answered]] = set()
    for preferred, other in list(wins):
        both = frozenset((preferred, other))
        if both in done:
            continue
        done.add(both)
        lead = wins[preferred, other] - wins[other, preferred]
        if lead == 0:
            made.left_out["pairs with as many votes for one as for the other"] += 1
            continue
        chosen, rejected = (preferred, other) if lead > 0 else (other, preferred)
        yield {
            **_prompt(chosen, "messages"),
            "chosen": [json.loads(chosen.message)],
            "rejected": [json.loads(rejected.message)],
        }


def _prompt(answered: _Answered, key: str, answer: Iterable[JSON] = ()) -> dict[str, JSON]:
    tools = json.loads(answered.tools)
    return {key: [*json.loads(answered.prompt), *answer], **({"tools": tools} if tools else {})}


def _answers(vote: Vote) -> list[_Answered]:
    prompt, tools = (json.dumps(part, sort_keys=True) for part in (vote.prompt, vote.tools))
    return [_Answered(prompt, tools, json.dumps(answer.message, sort_keys=True)) for answer in vote.answers]


def _ordered(vote: Vote) -> tuple[_Answered, _Answered]:
    """The preferred answer and the other one."""
    first, second = _answers(vote)
    return (first, second) if vote.verdict == "first" else (second, first)


def _masked(value: JSON, report: Callable[[Detection], None]) -> JSON:
    """``value`` with the secrets and personal data of all its texts replaced."""
    if isinstance(value, str):
        return screened(value, SCREENS, "output", report)[0]
    if isinstance(value, list):
        return [_masked(item, report) for item in value]
    if isinstance(value, dict):
        return {key: _masked(item, report) for key, item in value.items()}
    return value
