"""Does an artefact do the task as well as the live adapter? Both are asked the tasks of `evaluation`, and
their headlines are compared on the same examples."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TypeAlias

import mlx.nn as nn

from tunesmith.errors import ExportError
from tunesmith.evaluation import evaluate, pairing, statistics, tasks
from tunesmith.evaluation.statistics import TaskStatistics
from tunesmith.evaluation.subject import Subject
from tunesmith.evaluation.tasks import EvaluationSpec
from tunesmith.events import Sink
from tunesmith.machine import backend
from tunesmith.runs.directory import Run
from tunesmith.runs.records import ExampleScore, Score
from tunesmith.tokens.template import Renderer

TaskScores: TypeAlias = Mapping[str, Sequence[ExampleScore]]
"""By task and version ("tool_calls@1"): one score an example."""


def of_the_task() -> tuple[str, ...]:
    """The groups of tasks that answer whether the run learned its task."""
    return tuple(
        group.name
        for group in tasks.groups().values()
        if group.by_default and any(kind.question == "task" for kind in group.kinds)
    )


def measure(
    net: nn.Module, renderer: Renderer, run: Run, names: Sequence[str], limit: int | None, notify: Sink
) -> TaskScores:
    """The scores of one model; empty if no task is named. limit: only the first rows and items. Answers are
    not compared by embeddings, which an artefact may have quantised."""
    if not names:
        return {}
    spec = EvaluationSpec(limit=limit, embed=False)
    groups = tasks.require(names, spec)
    rows = evaluate.rows_of(run, (), groups, limit, notify)
    material = evaluate.material_of(run, rows, net, renderer, spec, notify)
    built = evaluate.build_tasks(material, groups, base=False)
    size = 32 if backend.setup().kind == "cpu" else 16
    subject = Subject(net, renderer, "tuned", run.config.batch, size, notify)
    return {f"{task.name}@{task.version}": task.score(task.measure(subject)) for task in built}


def compare(live: TaskScores, artefact: TaskScores) -> tuple[Score, ...]:
    """The artefact's headlines, with paired differences from the live adapter. Raises ExportError if the two
    were not asked the same."""
    scores: list[Score] = []
    for label, before in live.items():
        name, _, version = label.rpartition("@")
        task = tasks.known(name, version)
        pairs = pairing.paired(before, artefact.get(label, []))
        if pairs is None or task is None:
            raise ExportError(f"{label}: the artefact was not asked the same examples as the live adapter")
        known = TaskStatistics(name, version, task.statistics)
        first = [score for score, _ in pairs]
        second = [replace(score, source=other.source) for other, score in pairs]
        summarised = statistics.summarise(known, first, second, pairing.SEED)
        scores += [replace(score, target=None, met=None) for score in summarised if score.headline]
    return tuple(statistics.judge(scores))
