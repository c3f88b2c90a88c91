"""Does a program that the model writes pass its tests? HumanEval: Chen et al. 2021, arXiv 2107.03374.

A problem is the signature and docstring of a function. The model continues it, and the function is run
against unit tests in `sandbox`. The number is the paper's pass@1 for one greedy answer: the share of problems
whose tests all pass. An answer is cut where the paper stops sampling: before the next line that starts a
class, a definition, a comment, a condition or a print. Unlike in OpenAI's checker, a program may start
neither threads nor processes, and may import the standard library only."""

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
from tunesmith.evaluation.sandbox.sandbox import Limits, Outcome, ProgramTests
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


class TestedProgram(NamedTuple):
    problem: Program
    completion: str
    outcome: Outcome


def truncate(completion: str, stops: Sequence[str] = STOPS) -> str:
    """``completion`` up to the first of ``stops``."""
    ends = (end for stop in stops if (end := completion.find(stop)) >= 0)
    return completion[: min(ends, default=len(completion))]


def completion(problem: Program, answer: str) -> str:
    """The part of ``answer`` that continues the prompt: its beginning, or the code of its first fenced block.

    A block that defines the function again is used whole, since it replaces the prompt's definition."""
    first = next((line for line in answer.splitlines() if line.strip()), "")
    opening = _OPENING.search(answer)
    if first[:1].isspace() or opening is None:  # it continues the function's body
        return truncate(answer, (*STOPS, _CLOSING))
    code = truncate(answer[opening.end() :], (_CLOSING,))
    return (
        f"\n{code}\n"
        if re.search(rf"^def {re.escape(problem.entry_point)}\b", code, re.MULTILINE)
        else truncate(code)
    )


def check(problem: Program, completion: str, limits: Limits | None = None) -> Outcome:
    """The outcome of the tests. Raises SetupError if code cannot be sandboxed here."""
    tests = ProgramTests(problem.test, problem.entry_point, _reference(problem))
    return sandbox.judge(problem.prompt + completion, tests, limits)


def _reference(problem: Program) -> str:
    """What the prompt defines beside the function; tests use it."""
    whole = problem.prompt + problem.canonical_solution
    try:
        compile(whole, problem.task_id, "exec", dont_inherit=True)
    except (SyntaxError, ValueError):
        return problem.prompt  # a signature with its docstring is whole
    return whole


class Programs(Task[TestedProgram]):
    """``version`` changes with the code that is run. Tests have a time limit: a program that exceeds it
    beside others runs again alone."""

    name = "benchmark.humaneval"
    version = "2"
    statistics = (
        Statistic("pass@1", lambda example: example.value, share=True, better="higher", headline=True),
    )
    question, title, asks = "benchmarks", "HumanEval", "`--benchmark humaneval`: functions to write"
    options = ("allow_code",)
    by_default = False
    meanings = (Meaning("pass@1", "HumanEval", "share of problems whose program passes all its tests"),)

    def __init__(self, problems: Sequence[Program], notify: Sink = events.silent) -> None:
        self.problems, self.notify, self.limits = tuple(problems), notify, Limits()

    @property
    def identity(self) -> str:
        return digest(
            [asdict(problem) for problem in self.problems],
            asdict(self.limits),
            MAX_TOKENS,
            STOPS,
            platform.python_version(),
        )

    def measure(self, subject: Subject) -> list[TestedProgram]:
        """Greedy continuations of the prompts as plain text, each run in its tests. Raises SetupError before
        the model is asked.

        Ranks share the answers; the first rank alone runs the programs, and the others return nothing."""
        sandbox.require()
        answers = subject.answers([problem.prompt for problem in self.problems], MAX_TOKENS, self.name)
        pairs = zip(self.problems, answers, strict=True)
        pieces = [completion(problem, answer.text) for problem, answer in pairs]
        open_ended = sum(
            answer.cut and answer.text == piece for answer, piece in zip(answers, pieces, strict=True)
        )
        if open_ended:
            text = (
                f"{self.name}, {subject.side}: answers cut at {MAX_TOKENS} tokens, before the function ended"
            )
            self.notify(Notice(text, level="warning", count=open_ended))
        if not subject.ranks.writes:
            return []
        tick = subject.ticker(f"{self.name}: tests")
        ran: list[TestedProgram] = []
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            outcomes = pool.map(
                lambda problem, piece: check(problem, piece, self.limits), self.problems, pieces
            )
            for problem, piece, outcome in zip(self.problems, pieces, outcomes, strict=True):
                ran.append(TestedProgram(problem, piece, outcome))
                tick(len(ran), len(pieces))
        slow = [index for index, tested in enumerate(ran) if tested.outcome.status == "timeout"]
        tick = subject.ticker(f"{self.name}: tests that took too long, each alone")
        for done, index in enumerate(slow, 1):
            again = check(ran[index].problem, ran[index].completion, self.limits)
            ran[index] = ran[index]._replace(outcome=again)
            tick(done, len(slow))
        return ran

    def score(self, items: Sequence[TestedProgram]) -> list[ExampleScore]:
        """``value``: 1 if all tests passed."""
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
    """The problems of JSONL ``files`` in HumanEval's format. Raises DataError listing rows in another format,
    and duplicates."""
    programs: dict[str, Program] = {}
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
                    f"{source}: entry_point is not the name of a function: {program.entry_point[:40]!r}"
                )
            elif programs.setdefault(program.task_id, program) is not program:
                problems.append(f"{source}: the task_id {program.task_id!r} is there twice")
    if problems:
        hint = f"each row of HumanEval has {', '.join(field.name for field in fields(Program))}"
        raise DataError(
            f"{len(problems)} rows are not problems of HumanEval\n{listing(problems)}",
            where=str(files[0]),
            hint=hint,
        )
    return list(programs.values())


def build_from(files: Sequence[Path], material: Material) -> list[Task]:
    """HumanEval over the problems of ``files``; none, with a notice, if they have none.

    Raises EvaluationError if running code was not allowed, SetupError if this machine cannot sandbox it."""
    problems = read(files)
    if not problems:
        material.notify(
            Notice("humaneval: the files have no problems, so it is not measured", level="warning")
        )
        return []
    limit = material.spec.limit
    chosen = problems[:limit]
    if not material.spec.allow_code:
        message = f"humaneval runs {len(chosen)} programs that the model writes, sandboxed, "
        message += "without network or files"
        raise EvaluationError(message, where="allow_code", hint="--allow-code allows it")
    sandbox.require()
    if len(chosen) < len(problems):
        text = f"humaneval: only the first {limit} of {len(problems)} problems are asked"
        material.notify(Notice(text, level="warning", count=len(problems) - len(chosen)))
    return [Programs(chosen, material.notify)]
