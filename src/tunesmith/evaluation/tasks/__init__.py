"""What a task is: what it asks of a model, and how each answer becomes a score.

A task holds its items. ``measure`` asks one model, ``score`` turns what came back into one ExampleScore an
item, so base and tuned are asked the same things and scored by the same code. One task is one file;
``evaluation.TASKS`` is the registry."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol, TypeVar

import mlx.nn as nn
from pydantic import Field

from tunesmith.data.formats import JSON, Example
from tunesmith.evaluation.statistics import Statistic, summarise
from tunesmith.evaluation.subject import Subject
from tunesmith.events import Sink, silent
from tunesmith.runs.records import ExampleScore, Score
from tunesmith.settings.config import Spec
from tunesmith.tokens.batches import BatchSpec
from tunesmith.tokens.template import Renderer, Row, TemplateSpec


class EvaluationSpec(Spec):
    """What is asked of base and tuned."""

    limit: int | None = Field(
        default=None, ge=1, description="only the first rows of the data, and items of each suite"
    )
    max_tokens: int = Field(default=256, ge=1, description="longest answer to a row of the data")
    batch_size: int | None = Field(
        default=None, ge=1, description="answers generated at once; null: 32 on a CPU, else 16"
    )
    knowledge: tuple[str, ...] = Field(
        default=(), description="files of multiple-choice items; none: the suite in the package"
    )
    text: tuple[str, ...] = Field(
        default=(), description="files of general text; none: the suite in the package"
    )
    chats: tuple[str, ...] = Field(
        default=(), description="files of plain prompts; none: the suite in the package"
    )
    safety: tuple[str, ...] = Field(
        default=(), description="files of harmful and harmless prompts; none: the suite in the package"
    )
    benchmarks: tuple[str, ...] = Field(
        default=(), description="tasks of lm-evaluation-harness, as mmlu or hellaswag"
    )
    benchmark_data: str | None = Field(
        default=None, description="folder with the benchmarks' files; null: the hub"
    )
    shots: int = Field(default=0, ge=0, description="solved examples before each question of a benchmark")
    allow_code: bool = Field(
        default=False, description="run code that the model writes, shut in a separate process"
    )
    embed: bool = Field(
        default=True, description="compare answers with references by the base's token embeddings, too"
    )


@dataclass(frozen=True)
class Material:
    """All that tasks make their items of. ``everything``: rows as read; ``imitated``: those that say what is
    to be said.

    ``rows``: the imitated ones as tokens, as training would have them. ``net``: the base, while tasks are
    built."""

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


Measured = TypeVar("Measured")


class Task(Protocol[Measured]):
    """``version`` changes whenever a score could change for the same answers. ``identity``: hash of items and
    settings.

    ``parts``: keys of `ExampleScore.detail` by whose values headline statistics are also shown apart.
    ``cached``: a base's scores may be kept for the next evaluation. ``needs_base``: it measures a difference
    only, so without a base it is left out."""

    name: str
    version: str
    statistics: tuple[Statistic, ...]
    parts: tuple[str, ...]
    cached: bool
    needs_base: bool

    @property
    def identity(self) -> str: ...

    def measure(self, subject: Subject) -> list[Measured]:
        """One measurement an item, in order."""
        ...

    def score(self, items: Sequence[Measured]) -> list[ExampleScore]:
        """One score a measurement, order kept."""
        ...

    def summarise(
        self, base: Sequence[ExampleScore] | None, tuned: Sequence[ExampleScore], seed: int
    ) -> list[Score]:
        """The scores of all examples together; a task whose numbers are no ratios of sums has its own."""
        return summarise(self, base, tuned, seed)


Builder = Callable[[Material], Sequence[Task]]
"""The tasks of one name for some material; none, with a notice, where it has nothing to ask."""


def digest(*parts: JSON | Mapping[str, JSON] | Sequence[JSON]) -> str:
    """16 hex digits of the sha256 of ``parts`` as canonical JSON."""
    return hashlib.sha256(
        json.dumps(parts, sort_keys=True, ensure_ascii=False).encode("utf-8", "surrogatepass")
    ).hexdigest()[:16]
