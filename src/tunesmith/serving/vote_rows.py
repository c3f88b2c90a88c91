"""Votes as rows of training data: KTO learns from answers that are good or bad, DPO from pairs.

Votes on the same answers are counted together: the majority decides, and a draw is left out. Secrets and
personal data are replaced by their kind, as far as they have a written form (`checks.content`). What is
written is read again by the reader of `train`, so that a row that it would refuse is left out here."""

from __future__ import annotations

import json
import shlex
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Literal, NamedTuple

from tunesmith.data import formats
from tunesmith.data.examples import prompt_key, write_examples
from tunesmith.data.formats import JSON, DataSpec, Dropped, Example
from tunesmith.data.sources import Raw
from tunesmith.files import draft
from tunesmith.runs.directory import Run
from tunesmith.serving.guardrails import Detection, Guardrail, screened
from tunesmith.serving.guardrails.answers import mapped
from tunesmith.serving.guardrails.kinds.sensitive import PersonalData, Secrets
from tunesmith.serving.votes import THUMBS, Vote

Objective = Literal["kto", "dpo"]
FEW = 10
"""Prompts; of fewer none is held out, since a fifth of them would measure nothing."""
SHAPED_BY = ("model", "template", "adapter")
"""Sections of a run's settings without which its adapter cannot be trained further."""
EVEN = "answers with as many votes for as against"
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
        text = json.dumps(mapped(row, lambda text: screened(text, SCREENS, "output", report)[0]))
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


def train_command(made: VoteRows, path: Path, run: Run | None) -> str:
    """The command that learns from the rows in ``path``: it trains the adapter of ``run`` further, or a new
    one on a model that is to be named if that is None."""
    words = ["tunesmith", "train", "--model", "MODEL" if run is None else run.config.model.path]
    words += ["--data", str(path), "--set", f"objective={made.objective}"]
    if run is not None:
        words += ["--set", f"adapter.start={run.path}"]
        for setting in _settings(run):
            words += ["--set", setting]
    if len({prompt_key(row) for row in made.rows}) < FEW:
        words += ["--set", "data.valid=0"]
    return shlex.join(words)


def _settings(run: Run) -> Iterator[str]:
    """The settings of ``run`` that shape its adapter and are not the default."""
    for section in SHAPED_BY:
        spec = getattr(run.config, section)
        left_out = {"path"} if section == "model" else {"start", "dropout"}
        known = {"path": spec.path} if section == "model" else {}
        usual = type(spec).model_validate(known).model_dump(mode="json")
        if section == "adapter" and spec.kind != "lora":
            yield f"adapter.kind={spec.kind}"
        for key, value in spec.model_dump(mode="json", exclude=left_out).items():
            if value != usual[key]:
                yield f"{section}.{key}={json.dumps(value)}"


def _kto(votes: Sequence[Vote], made: VoteRows) -> Iterator[dict[str, JSON]]:
    """An answer is good if more votes are for it than against it; the answer that is not preferred of two has
    a vote against it."""
    balance: Counter[_Answered] = Counter()
    for vote in votes:
        if vote.verdict == "tie":
            made.left_out["votes for neither of two answers"] += 1
        elif vote.verdict in THUMBS:
            balance[_answers(vote)[0]] += 1 if vote.verdict == "up" else -1
        else:
            preferred, other = _ordered(vote)
            balance[preferred] += 1
            balance[other] -= 1
    for answered, lead in balance.items():
        if lead == 0:
            made.left_out[EVEN] += 1
        else:
            yield {**_prompt(answered, "messages", [json.loads(answered.message)]), "label": lead > 0}


def _dpo(votes: Sequence[Vote], made: VoteRows) -> Iterator[dict[str, JSON]]:
    """Pairs of answers of which one is preferred, or of which one has thumbs up and the other down."""
    wins: list[tuple[_Answered, _Answered]] = []
    for vote in votes:
        if vote.verdict == "tie":
            made.left_out["votes for neither of two answers"] += 1
        elif vote.verdict not in THUMBS:
            preferred, other = _ordered(vote)
            if preferred == other:
                made.left_out["votes on two answers with the same words"] += 1
            else:
                wins.append((preferred, other))
    leads: Counter[tuple[_Answered, _Answered]] = Counter()  # of the first of two answers in their order
    for preferred, other in (*wins, *_opposites(votes, made)):
        first, second = sorted((preferred, other))
        leads[first, second] += 1 if first == preferred else -1
    for (first, second), lead in leads.items():
        if lead == 0:
            made.left_out["pairs with as many votes for one as for the other"] += 1
            continue
        chosen, rejected = (first, second) if lead > 0 else (second, first)
        yield {
            **_prompt(chosen, "messages"),
            "chosen": [json.loads(chosen.message)],
            "rejected": [json.loads(rejected.message)],
        }


def _opposites(votes: Sequence[Vote], made: VoteRows) -> Iterator[tuple[_Answered, _Answered]]:
    """An answer with thumbs up and one with thumbs down on the same prompt."""
    balances: defaultdict[tuple[str, str], Counter[_Answered]] = defaultdict(Counter)
    given: Counter[tuple[str, str]] = Counter()
    for vote in votes:
        if vote.verdict in THUMBS:
            (answered,) = _answers(vote)
            asked = answered.prompt, answered.tools
            balances[asked][answered] += 1 if vote.verdict == "up" else -1
            given[asked] += 1
    for asked, balance in balances.items():
        good = [answered for answered, lead in balance.items() if lead > 0]
        bad = [answered for answered, lead in balance.items() if lead < 0]
        yield from product(good, bad)
        if not (good and bad):
            made.left_out["thumbs without an opposite one on the same prompt"] += given[asked]
        elif even := len(balance) - len(good) - len(bad):
            made.left_out[EVEN] += even


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
