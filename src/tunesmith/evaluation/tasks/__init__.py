"""What a task is: what it asks of a model, how each answer becomes a score, and what its numbers mean.

A task holds its items. ``measure`` asks one model and ``score`` turns each measurement into one ExampleScore,
so base and tuned are asked the same and scored by the same code. One file in this folder is one task (or a
group of tasks): its classes state what reports, the command line and the documentation say about them, and
`register` makes them known. Nothing else lists tasks."""

from __future__ import annotations

import hashlib
import importlib
import json
import pkgutil
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import ClassVar, Generic, Literal, NamedTuple, TypeVar

import mlx.nn as nn
from pydantic import Field

from tunesmith.data.formats import JSON, Example
from tunesmith.engine.requests import MOST_ANSWER_TOKENS
from tunesmith.errors import EvaluationError
from tunesmith.evaluation.statistics import Statistic, TaskStatistics, summarise
from tunesmith.evaluation.subject import Subject
from tunesmith.events import Sink, silent
from tunesmith.runs.records import ExampleScore, Score
from tunesmith.settings.config import Spec
from tunesmith.tokens.batches import BatchSpec
from tunesmith.tokens.template import Renderer, Row, TemplateSpec

Question = Literal["task", "retention", "safety", "benchmarks", "efficiency", "other"]
QUESTIONS: dict[Question, str] = {
    "task": "Did it learn the task?",
    "retention": "What did it forget?",
    "safety": "Is it still safe?",
    "benchmarks": "How does it do on public benchmarks?",
    "efficiency": "How fast is it?",
    "other": "What else was measured?",
}
"""What a reader wants to know, in the order of the report. Each task answers one of them."""


class EvaluationSpec(Spec):
    """What an evaluation asks base and tuned, and how."""

    limit: int | None = Field(
        default=None,
        ge=1,
        description="only the first rows of the data, items of each suite, and rounds and prompts of the "
        "speed tests",
    )
    max_tokens: int = Field(
        default=256, ge=1, le=MOST_ANSWER_TOKENS, description="longest answer to a row of the data"
    )
    batch_size: int | None = Field(
        default=None, ge=1, description="answers generated at once; null: 64 on a CPU, else 16"
    )
    knowledge: tuple[str, ...] = Field(
        default=(), description="files of multiple-choice items, instead of the package's suite"
    )
    text: tuple[str, ...] = Field(
        default=(), description="files of general text, instead of the package's suite"
    )
    chats: tuple[str, ...] = Field(
        default=(), description="files of plain prompts, instead of the package's suite"
    )
    safety: tuple[str, ...] = Field(
        default=(), description="files of harmful and harmless prompts, instead of the package's suite"
    )
    benchmarks: tuple[str, ...] = Field(
        default=(), description="tasks of lm-evaluation-harness, as mmlu or hellaswag"
    )
    benchmark_data: str | None = Field(
        default=None, description="folder with the benchmarks' files; null: the hub"
    )
    shots: int = Field(default=0, ge=0, description="solved examples before each question of a benchmark")
    allow_code: bool = Field(
        default=False, description="run code that the model writes, in a sandboxed process"
    )
    embed: bool = Field(
        default=True, description="also compare answers with references by the base's token embeddings"
    )


@dataclass(frozen=True)
class Material:
    """Inputs for building tasks. ``everything``: all rows as read. ``imitated``: those whose answers are
    targets (demonstrations, desirable, chosen).

    ``rows``: the tokens of ``imitated``, as training would have them. ``net``: the base model, while tasks
    are built."""

    everything: Sequence[Example]
    imitated: Sequence[Example]
    rows: Sequence[Row]
    renderer: Renderer
    template: TemplateSpec
    batch: BatchSpec
    spec: EvaluationSpec = field(default_factory=EvaluationSpec)
    seed: int = 0
    notify: Sink = silent
    net: nn.Module | None = None


class Meaning(NamedTuple):
    """A number of a task, for readers: ``title`` ("Harmful requests refused"), and ``text``, what it
    measures. ``worse``: how the verdict says that it missed its target ("it refuses fewer harmful
    requests")."""

    number: str
    title: str
    text: str
    worse: str = ""


ExamplePair = tuple[ExampleScore, ExampleScore]
"""One example as two runs scored it."""


@dataclass(frozen=True)
class Pairing:
    """How two runs that were asked the same are compared. ``gains``: by tuned − base of each run, instead of
    by the tuned score.

    ``leading``: the statistic that says how one example moved; None: the task's headline. ``scores``:
    computes the second run's scores less the first's, from a seed; None: by the task's statistics."""

    gains: bool = False
    leading: Statistic | None = None
    scores: Callable[[Sequence[ExamplePair], int], list[Score]] | None = None


Measured = TypeVar("Measured")


class Task(ABC, Generic[Measured]):
    """One kind of measurement, holding the items to be asked.

    ``version`` changes whenever a score could change for the same answers. ``question``: the one it answers;
    of several tasks with one question, the one with the lowest ``rank`` decides the verdict. ``title``, and
    ``meanings`` of its numbers, the most important first: for readers. ``asks``: what it is measured on, in
    words; ``asks_rows``: these are the rows of the data. ``options``: the keys of `EvaluationSpec` that it
    reads besides ``limit`` and ``batch_size``; ``files``: the one that replaces its suite. ``by_default``: it
    is measured if no task is named.

    ``parts``: keys of `ExampleScore.detail` by whose values headline statistics are also shown. ``cached``:
    scores may be kept for the next evaluation. ``needs_base``: it measures a difference only, so it is left
    out without a base."""

    name: str
    version: str
    statistics: tuple[Statistic, ...] = ()
    question: ClassVar[Question] = "other"
    title: ClassVar[str] = ""
    asks: ClassVar[str] = ""
    meanings: ClassVar[tuple[Meaning, ...]] = ()
    rank: ClassVar[int] = 9
    asks_rows: ClassVar[bool] = False
    by_default: ClassVar[bool] = True
    options: ClassVar[tuple[str, ...]] = ()
    files: ClassVar[str | None] = None
    pairing: ClassVar[Pairing] = Pairing()
    parts: tuple[str, ...] = ()
    cached: bool = True
    needs_base: bool = False

    @property
    @abstractmethod
    def identity(self) -> str:
        """Hash of items and settings."""

    @abstractmethod
    def measure(self, subject: Subject) -> list[Measured]:
        """One measurement an item, in order."""

    @abstractmethod
    def score(self, items: Sequence[Measured]) -> list[ExampleScore]:
        """One score a measurement, in order."""

    def summarise(
        self, base: Sequence[ExampleScore] | None, tuned: Sequence[ExampleScore], seed: int
    ) -> list[Score]:
        """The scores of all examples together; overridden by tasks whose numbers are not ratios of sums."""
        statistics = TaskStatistics(self.name, self.version, self.statistics, self.parts)
        return summarise(statistics, base, tuned, seed)


Builder = Callable[[Material], Sequence[Task]]
"""Builds the tasks of a group; none, with a notice, if the material has nothing to ask."""


@dataclass(frozen=True)
class TaskGroup:
    """Tasks that ``--task NAME`` selects together and that are built together; most groups have one."""

    name: str
    kinds: tuple[type[Task], ...]
    build: Builder

    @property
    def asks_rows(self) -> bool:
        return any(kind.asks_rows for kind in self.kinds)

    @property
    def by_default(self) -> bool:
        return any(kind.by_default for kind in self.kinds)

    @property
    def options(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(option for kind in self.kinds for option in kind.options))

    @property
    def opt_in(self) -> tuple[str, ...]:
        """The options that are empty or off by default: who sets one wants this group."""
        return tuple(name for name in self.options if not EvaluationSpec.model_fields[name].default)


_REGISTERED: dict[str, TaskGroup] = {}


def register(*kinds: type[Task], group: str = "") -> Callable[[Builder], Builder]:
    """Decorate the function that builds tasks of these classes. group: their name on the command line, by
    default that of the first class."""

    def add(build: Builder) -> Builder:
        name = group or kinds[0].name
        _REGISTERED[name] = TaskGroup(name, kinds, build)
        return build

    return add


@cache
def _discover() -> None:
    for module in pkgutil.iter_modules(__path__, f"{__name__}."):
        importlib.import_module(module.name)


def groups() -> dict[str, TaskGroup]:
    """All groups of tasks by name, in the order in which they are measured."""
    _discover()
    every = sorted(
        _REGISTERED.values(), key=lambda group: _place(group.kinds[0].question, group.kinds[0].rank)
    )
    return {group.name: group for group in every}


def place(task: str) -> tuple[int, int, str]:
    """Sorts recorded tasks as `groups` does."""
    described = about(task)
    return *_place(described.question, described.rank), task


def _place(question: Question, rank: int) -> tuple[int, int]:
    """By question; of one question, what is nearest to what users see comes last."""
    return list(QUESTIONS).index(question), -rank


def suite() -> list[str]:
    """The names of the groups that are measured if none is named."""
    return [group.name for group in groups().values() if group.by_default]


def require(names: Sequence[str], spec: EvaluationSpec) -> list[TaskGroup]:
    """The groups called ``names``. Raises EvaluationError for an unknown name, and for an option of a group
    that is not among them."""
    every = groups()
    for name in names:
        if name not in every:
            whole = name.partition(".")[0]
            part = f"it is part of {whole}: --task {whole}" if whole in every else None
            raise EvaluationError(f"no task is called {name!r}", hint=part or f"tasks: {', '.join(every)}")
    chosen = [every[name] for name in dict.fromkeys(names)]
    usable = {option for group in chosen for option in group.options}
    for group in every.values():
        for option in group.opt_in:
            if option not in usable and getattr(spec, option):
                message = f"is for {group.name}, which is not among the tasks"
                also = "--benchmark NAME" if group.name == "benchmarks" else f"--task {group.name}"
                raise EvaluationError(message, where=option, hint=f"{also} as well")
    return chosen


def known(task: str, version: str) -> type[Task] | None:
    """The class of a recorded task; None if this release has another version of it, or none."""
    kinds = (kind for group in groups().values() for kind in group.kinds)
    return next((kind for kind in kinds if (kind.name, kind.version) == (task, version)), None)


@dataclass(frozen=True)
class TaskDescription:
    """What reports say of a task by its recorded name, whether or not this release can measure it."""

    name: str
    group: str
    question: Question
    title: str
    rank: int = 9
    asks_rows: bool = False
    files: str | None = None
    meanings: tuple[Meaning, ...] = ()

    def meaning_of(self, number: str) -> Meaning | None:
        return next((meaning for meaning in self.meanings if meaning.number == number), None)

    def title_of(self, number: str, part: str | None = None) -> str:
        """The number in words: "Harmful requests refused", "Right tool, tool=search"."""
        meaning = self.meaning_of(number)
        plain = self.title if number == self.name.rpartition(".")[2] else f"{self.title}, {number}"
        title = meaning.title if meaning else plain
        return f"{title}, {part}" if part else title


def about(task: str) -> TaskDescription:
    """The description of a recorded task. One that is not known shares question and group with the tasks that
    have the same first part of the name."""
    family, _, rest = task.partition(".")
    relative: TaskDescription | None = None
    for group in groups().values():
        for kind in group.kinds:
            if kind.name == task:
                return TaskDescription(
                    task,
                    group.name,
                    kind.question,
                    kind.title,
                    kind.rank,
                    kind.asks_rows,
                    kind.files,
                    kind.meanings,
                )
            if relative is None and kind.name.partition(".")[0] == family:
                title = rest if rest and kind.question == "benchmarks" else task
                relative = TaskDescription(task, group.name, kind.question, title)
    if relative is not None:
        return relative
    own: dict[str, Question] = {question: question for question in QUESTIONS}
    question = "safety" if task.startswith("safety") else own.get(family, "other")
    return TaskDescription(task, family, question, task)


def option_help(name: str) -> str:
    """What the command line says of an option of ``evaluate``; empty if no task and no setting is behind
    it."""
    every = groups().values()
    if name == "task":
        others = [group.name for group in every if not group.by_default]
        return ", ".join([f"{', '.join(suite())} (default: all these)", *others])
    key = name if name in EvaluationSpec.model_fields else f"{name}s"
    if key not in EvaluationSpec.model_fields:
        return ""
    users = [kind.name for group in every for kind in group.kinds if key in kind.options]
    described = EvaluationSpec.model_fields[key].description or ""
    return f"{', '.join(users)}: {described}" if users else described


def table() -> str:
    """The tasks as the table of ``docs/evaluation.md``."""
    lines = ["| `--task` | recorded as | measures | asks | judged by |", "|---|---|---|---|---|"]
    for group in groups().values():
        for kind in group.kinds:
            described = about(kind.name)
            judged = [statistic for statistic in kind.statistics if statistic.headline]
            titles = [described.title_of(statistic.name) for statistic in judged] or [kind.title]
            judged += [kind.pairing.leading] if kind.pairing.leading else []
            by = dict.fromkeys(str(statistic.target or statistic.better or "") for statistic in judged)
            names = f"`{group.name}`", f"`{kind.name}`"
            cells = *names, "; ".join(titles), kind.asks, "; ".join(filter(None, by)) or "–"
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def digest(*parts: JSON | Mapping[str, JSON] | Sequence[JSON]) -> str:
    """16 hex digits of the SHA-256 of ``parts`` as canonical JSON."""
    text = json.dumps(parts, sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:16]
