"""Does a program that the model writes pass its tests? HumanEval: Chen et al. 2021, arXiv 2107.03374.

A problem is the head of a function with its description. The model continues it, and the function is run
against unit tests in `sandbox`. The number is the paper's pass@1 for one greedy answer: the share of problems
whose tests all pass. An answer is cut where the paper stops to sample: before the next line that starts a
class, a definition, a comment, a condition or a print. Unlike in OpenAI's checker a program may start neither
threads nor processes, and may import the standard library only."""

from __future__ import annotations

import os
import platform
import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import NamedTuple

from tunesmith import events
from tunesmith.data import sources
from tunesmith.data.examples import BadRow
from tunesmith.errors import DataError, EvaluationError, listing
from tunesmith.evaluation.sandbox import sandbox
from tunesmith.evaluation.sandbox.sandbox import Limits, Outcome
from tunesmith.evaluation.statistics import Statistic
from tunesmith.evaluation.subject import Subject
from tunesmith.evaluation.tasks import Material, Meaning, Task, digest
from tunesmith.events import Notice, Sink
from tunesmith.runs.records import ExampleScore

MAX_TOKENS = 512
STOPS = ("\nclass", "\ndef", "\n#", "\nif", "\nprint")
_OPENING = re.compile(r"^```[^\n`]*\n", re.MULTILINE)
_CLOSING = "\n```"


@dataclass(frozen=True, slots=True)
class Program:
    """A row of HumanEval. ``test`` defines ``check``, which gets the function named ``entry_point``."""

    task_id: str
    prompt: str
    entry_point: str
    canonical_solution: str
    test: str


class Ran(NamedTuple):
    problem: Program
    completion: str
    outcome: Outcome


def truncate(completion: str, stops: Sequence[str] = STOPS) -> str:
    """``completion`` up to the first of ``stops``."""
    return completion[
        : min((at for stop in stops if (at := completion.find(stop)) >= 0), default=len(completion))
    ]


def completion(problem: Program, answer: str) -> str:
    """What of ``answer`` comes after the prompt: its continuation, or the code of its first fenced block.

    A block that defines the function anew is kept whole, as it replaces the prompt's.
    """
    first = next((line for line in answer.splitlines() if line.strip()), "")
    opening = _OPENING.search(answer)
    if first[:1].isspace() or opening is None:  # it goes on with the function's body
        return truncate(answer, (*STOPS, _CLOSING))
    code = truncate(answer[opening.end() :], (_CLOSING,))
    return (
        f"\n{code}\n"
        if re.search(rf"^def {re.escape(problem.entry_point)}\b", code, re.MULTILINE)
        else truncate(code)
    )


def check(problem: Program, completion: str, limits: Limits | None = None) -> Outcome:
    """What became of the function in its tests. Raises SetupError where it cannot be run shut in."""
    parts = (problem.prompt + completion, problem.test, f"check({problem.entry_point})")
    return sandbox.run("\n".join(parts), limits)


class Programs(Task[Ran]):
    """``version`` changes with what is run. The tests' time is on the clock: what ran too long beside others
    runs again alone."""

    name = "benchmark.humaneval"
    version = "1"
    statistics = (
        Statistic("pass@1", lambda example: example.value, share=True, better="higher", headline=True),
    )
    question, title, asks = "benchmarks", "HumanEval", "`--benchmark humaneval`: functions to write"
    options = ("allow_code",)
    by_default = False
    meanings = (Meaning("pass@1", "HumanEval", "share of problems whose program passes all its tests"),)

    def __init__(
        self, problems: Sequence[Program], notify: Sink = events.silent, limits: Limits | None = None
    ) -> None:
        self.problems, self.notify, self.limits = tuple(problems), notify, limits or Limits()

    @property
    def identity(self) -> str:
        return digest(
            [asdict(problem) for problem in self.problems],
            asdict(self.limits),
            MAX_TOKENS,
            STOPS,
            platform.python_version(),
        )

    def measure(self, subject: Subject) -> list[Ran]:
        """Greedy continuations of the prompts as plain text, each run in its tests. Raises SetupError before
        it asks.

        All ranks share the answers; the first alone runs them, and the others return nothing.
        """
        sandbox.require()
        said = subject.answers([problem.prompt for problem in self.problems], MAX_TOKENS, self.name)
        pieces = [completion(problem, one.text) for problem, one in zip(self.problems, said, strict=True)]
        open_ended = sum(one.cut and one.text == piece for one, piece in zip(said, pieces, strict=True))
        if open_ended:
            what = f"{self.name}, {subject.side}: answers cut at {MAX_TOKENS} tokens, before the function's end was seen"
            self.notify(Notice(what, level="warning", count=open_ended))
        if not subject.ranks.writes:
            return []
        tick = subject.ticker(f"{self.name}: tests")
        ran: list[Ran] = []
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            outcomes = pool.map(
                lambda problem, piece: check(problem, piece, self.limits), self.problems, pieces
            )
            for problem, piece, outcome in zip(self.problems, pieces, outcomes, strict=True):
                ran.append(Ran(problem, piece, outcome))
                tick(len(ran), len(pieces))
        slow = [at for at, one in enumerate(ran) if one.outcome.status == "timeout"]
        tick = subject.ticker(f"{self.name}: tests that took too long, each alone")
        for done, at in enumerate(slow, 1):
            ran[at] = ran[at]._replace(outcome=check(ran[at].problem, ran[at].completion, self.limits))
            tick(done, len(slow))
        return ran

    def score(self, items: Sequence[Ran]) -> list[ExampleScore]:
        """``value``: 1 where all tests passed."""
        return [
            ExampleScore(
                problem.task_id,
                float(outcome.status == "passed"),
                detail={"status": outcome.status, "error": outcome.error},
                prompt=problem.prompt,
                reference=problem.canonical_solution,
                answer=piece,
            )
            for problem, piece, outcome in items
        ]


def read(files: Sequence[Path]) -> list[Program]:
    """The problems of JSONL ``files`` in HumanEval's form. Raises DataError with all rows that are not, or
    come twice."""
    found: dict[str, Program] = {}
    problems: list[str] = []
    for path in sources.files(files):
        for source, text in sources.raws(path):
            row = sources.value(text)
            if isinstance(row, BadRow) or not isinstance(row, dict):
                problems.append(f"{source}: not a JSON object")
                continue
            values = [row.get(field.name) for field in fields(Program)]
            program = Program(*map(str, values))
            if lacking := [
                field.name
                for field, value in zip(fields(Program), values, strict=True)
                if not isinstance(value, str)
            ]:
                problems.append(f"{source}: no text under {', '.join(lacking)}")
            elif not program.entry_point.isidentifier():
                problems.append(
                    f"{source}: entry_point is no name of a function: {program.entry_point[:40]!r}"
                )
            elif found.setdefault(program.task_id, program) is not program:
                problems.append(f"{source}: the task_id {program.task_id!r} is there twice")
    if problems:
        hint = f"each row of HumanEval has {', '.join(field.name for field in fields(Program))}"
        raise DataError(
            f"{len(problems)} rows are no problems of HumanEval\n{listing(problems)}",
            where=str(files[0]),
            hint=hint,
        )
    return list(found.values())


def build_from(files: Sequence[Path], material: Material) -> list[Task]:
    """HumanEval over the problems of ``files``; none, with a notice, where they hold none.

    Raises EvaluationError where running code is not allowed, SetupError where this machine cannot shut it in.
    """
    problems = read(files)
    if not problems:
        material.notify(
            Notice("humaneval: the files hold no problem, so it is not measured", level="warning")
        )
        return []
    limit = material.spec.limit
    asked = problems[:limit]
    if not material.spec.allow_code:
        raise EvaluationError(
            f"humaneval runs {len(asked)} programs that the model writes on this machine: each shut in, without network or files",
            where="allow_code",
            hint="--allow-code allows it",
        )
    sandbox.require()
    if len(asked) < len(problems):
        what = f"humaneval: only the first {limit} of {len(problems)} problems are asked"
        material.notify(Notice(what, level="warning", count=len(problems) - len(asked)))
    return [Programs(asked, material.notify)]
