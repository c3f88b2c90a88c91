"""``tunesmith votes``: which model do users prefer, is that decided, and what can be learned from it?

Two models are compared where users saw both answers, and where an A/B test gave each user one of them: then
the thumbs of the two are paired in the order in which they came, and a pair that differs counts for the one
with the thumb up. If both have the same share of thumbs up, either is as likely to get it (McNemar's
argument, for a sequence). Votes are taken as independent: several of one user are not, so users are counted
too."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import combinations
from pathlib import Path
from typing import Literal

from tunesmith.display.text import many
from tunesmith.errors import ConfigError
from tunesmith.runs import tags
from tunesmith.runs.directory import CONFIG, Run
from tunesmith.serving import vote_rows
from tunesmith.serving import votes as records
from tunesmith.serving.sequential import LEVEL, Outcome, SequentialTest, interval, sequential_test
from tunesmith.serving.vote_rows import Objective
from tunesmith.serving.votes import THUMBS, Vote
from tunesmith.settings.config import JSON


@dataclass(frozen=True)
class ModelPair:
    """``wins``: votes for the first of two models. ``low``, ``high``: of its share of the votes that were not
    ties, at any time. ``evidence``: odds against no difference. ``outcome``: what is decided."""

    by: Literal["side by side", "thumbs"]
    test: str | None
    first: str
    second: str
    wins: int
    losses: int
    ties: int
    blind: int
    users: int
    low: float
    high: float
    evidence: float
    needed_evidence: float
    outcome: Outcome
    decided_after: int | None
    votes_needed: int | None

    @property
    def share(self) -> float:
        return self.wins / max(self.wins + self.losses, 1)

    @property
    def confidence(self) -> str:
        """Of the interval: 95 % if two models are compared, more for each of several pairs."""
        return f"{100 - 100 / self.needed_evidence:.3g} %"


@dataclass(frozen=True)
class Approval:
    """Thumbs of a model. ``low``, ``high``: of its share of thumbs up, at any time."""

    test: str | None
    model: str
    up: int
    down: int
    low: float
    high: float


@dataclass(frozen=True)
class WrittenRows:
    """``command``: what trains with them."""

    path: str
    objective: Objective
    rows: int
    left_out: dict[str, int]
    masked: dict[str, int]
    command: str


@dataclass(frozen=True)
class VoteSummary:
    """All that ``tunesmith votes`` says. ``unreadable``: lines that are not JSON."""

    path: str
    votes: int
    users: int
    unreadable: int
    first_time: str | None
    last_time: str | None
    pairs: tuple[ModelPair, ...]
    approvals: tuple[Approval, ...]
    written: WrittenRows | None = None

    def to_json(self) -> dict[str, JSON]:
        value: dict[str, JSON] = asdict(self)
        return value


def votes(
    path: str | Path, *, to: str | Path | None = None, objective: Objective | None = None
) -> VoteSummary:
    """Summarise a file of votes, or those of a run (its folder or tag). ``to``: also write them as rows for
    ``objective`` (None: DPO if all votes compare two answers, else KTO). Raises DataError if the file cannot
    be read, and ConfigError if ``to`` is the same file."""
    file = tags.find(path)
    if file.is_dir():
        file /= records.VOTES
    if to is not None:
        _require_another_file(file, Path(to))
    every, unreadable = records.read(file)
    written = None
    if to is not None:
        made = vote_rows.rows(every, objective)
        vote_rows.write(made, Path(to))
        run = Run.open(file.parent) if (file.parent / CONFIG).is_file() else None
        written = WrittenRows(
            str(to),
            made.objective,
            len(made.rows),
            dict(made.left_out),
            dict(made.masked),
            vote_rows.train_command(made, Path(to), run),
        )
    names = _names(every)
    return VoteSummary(
        str(file),
        len(every),
        _users(every),
        unreadable,
        min((vote.time for vote in every), default=None),
        max((vote.time for vote in every), default=None),
        tuple(_pairs(every, names)),
        tuple(_approvals(every, names)),
        written,
    )


def _require_another_file(path: Path, to: Path) -> None:
    if path.exists() and to.exists() and path.samefile(to):
        hint = "name another file for the rows"
        raise ConfigError("the rows would replace the votes", where=f"--to {to}", hint=hint)


def lines(summary: VoteSummary) -> list[str]:
    """The summary in words."""
    said = [f"{many(summary.votes, 'vote')} of {many(summary.users, 'user')} in {summary.path}"]
    if summary.unreadable:
        said.append(f"{many(summary.unreadable, 'line')} left out: not JSON, as when a process is killed")
    for pair in map(_leader_first, summary.pairs):
        kind = "side by side" if pair.by == "side by side" else "by thumbs, paired in order"
        said += ["", f"{pair.first} against {pair.second}, {kind}{f' ({pair.test})' if pair.test else ''}"]
        said += [f"  {line}" for line in _pair_lines(pair)]
    for approval in summary.approvals:
        rate = approval.up / (approval.up + approval.down)
        test = f" ({approval.test})" if approval.test else ""
        said += ["", f"{approval.model}{test}: thumbs up {approval.up:,} of {approval.up + approval.down:,}"]
        said.append(f"  {rate:.1%}, 95 % at any time: {approval.low:.1%} to {approval.high:.1%}")
    if summary.written is not None:
        said += ["", *_written_lines(summary.written)]
    return said


def _leader_first(pair: ModelPair) -> ModelPair:
    """The same with the model first that has more votes."""
    if pair.wins >= pair.losses:
        return pair
    turned: dict[str, Outcome] = {"first": "second", "second": "first", "alike": "alike", "open": "open"}
    return replace(
        pair,
        first=pair.second,
        second=pair.first,
        wins=pair.losses,
        losses=pair.wins,
        low=1 - pair.high,
        high=1 - pair.low,
        outcome=turned[pair.outcome],
    )


def _pair_lines(pair: ModelPair) -> Iterator[str]:
    total = pair.wins + pair.losses
    if not total:
        yield f"no vote prefers either yet, {many(pair.ties, 'tie')}"
        return
    blind = f", {pair.blind:,} blind" if pair.by == "side by side" else ""
    yield (
        f"{pair.first} preferred in {pair.wins:,} of {total:,} ({pair.share:.1%}; {pair.confidence} "
        f"at any time: {pair.low:.1%} to {pair.high:.1%}), "
        f"{many(pair.ties, 'tie')}, {many(pair.users, 'user')}{blind}"
    )
    odds = f"evidence {pair.evidence:,.3g} to 1, and {pair.needed_evidence:,.0f} to 1 decides"
    if pair.outcome in ("first", "second"):
        winner = pair.first if pair.outcome == "first" else pair.second
        yield f"decided after {many(pair.decided_after or 0, 'vote')}: {winner} is preferred ({odds})"
    elif pair.outcome == "alike":
        yield "decided: no difference of more than 5 points is left"
    elif pair.votes_needed is not None:
        yield f"not decided ({odds}); at this rate after about {pair.votes_needed:,} more votes"
    else:
        yield f"not decided ({odds})"


def _written_lines(written: WrittenRows) -> Iterator[str]:
    yield f"{many(written.rows, 'row')} for {written.objective.upper()} in {written.path}"
    for reason, count in written.left_out.items():
        yield f"  left out: {count:,}: {reason}"
    masked = ", ".join(f"{kind} {count:,}" for kind, count in written.masked.items())
    yield f"  secrets and personal data replaced: {masked or 'none found'}; names and addresses are not found"
    if written.rows:
        yield f"  learn from them: {written.command}"


def _names(every: Sequence[Vote]) -> dict[tuple[str, str], str]:
    """(model, digest) → name: with the start of the digest if the model was replaced under its name."""
    digests: defaultdict[str, set[str]] = defaultdict(set)
    for vote in every:
        for answer in vote.answers:
            digests[answer.model].add(answer.digest)
    return {
        (model, digest): model if len(of_model) == 1 else f"{model} ({digest[:8]})"
        for model, of_model in digests.items()
        for digest in of_model
    }


def _users(every: Sequence[Vote]) -> int:
    """Users that are named, and one for all others."""
    return len({vote.user for vote in every})


def _pairs(every: Sequence[Vote], names: dict[tuple[str, str], str]) -> Iterator[ModelPair]:
    sides: defaultdict[tuple[str, str], list[tuple[Vote, bool | None]]] = defaultdict(list)
    thumbs: defaultdict[str, defaultdict[str, list[Vote]]] = defaultdict(lambda: defaultdict(list))
    for vote in every:
        models = [names[answer.model, answer.digest] for answer in vote.answers]
        if vote.verdict in THUMBS:
            if vote.test is not None:
                thumbs[vote.test][models[0]].append(vote)
        elif models[0] != models[1]:
            won = None if vote.verdict == "tie" else (vote.verdict == "first") == (models[0] < models[1])
            sides[min(models), max(models)].append((vote, won))
    tested_by_thumbs = [
        (test, first, second)
        for test, by_model in thumbs.items()
        for first, second in combinations(sorted(by_model), 2)
    ]
    level = LEVEL / max(len(sides) + len(tested_by_thumbs), 1)
    for (first, second), given in sides.items():
        test = sequential_test((won for _, won in given), level)
        of_pair = [vote for vote, _ in given]
        yield _pair("side by side", None, first, second, test, of_pair)
    for name, first, second in tested_by_thumbs:
        rivals = thumbs[name][first], thumbs[name][second]
        marks = ((a.verdict == "up", b.verdict == "up") for a, b in zip(*rivals, strict=False))
        test = sequential_test((a if a != b else None for a, b in marks), level)
        yield _pair("thumbs", name, first, second, test, [*rivals[0], *rivals[1]])


def _pair(
    by: Literal["side by side", "thumbs"],
    name: str | None,
    first: str,
    second: str,
    test: SequentialTest,
    of_pair: Sequence[Vote],
) -> ModelPair:
    low, high = test.interval
    return ModelPair(
        by,
        name,
        first,
        second,
        test.wins,
        test.losses,
        test.ties,
        sum(vote.blind for vote in of_pair),
        _users(of_pair),
        low,
        high,
        test.evidence,
        1 / test.level,
        test.outcome,
        test.decided_after,
        test.votes_needed,
    )


def _approvals(every: Sequence[Vote], names: dict[tuple[str, str], str]) -> Iterator[Approval]:
    marks: defaultdict[tuple[str | None, str], list[bool]] = defaultdict(list)
    for vote in every:
        if vote.verdict in THUMBS:
            answer = vote.answers[0]
            marks[vote.test, names[answer.model, answer.digest]].append(vote.verdict == "up")
    for (test, model), ups in marks.items():
        low, high = interval(sum(ups), len(ups) - sum(ups))
        yield Approval(test, model, sum(ups), len(ups) - sum(ups), low, high)
