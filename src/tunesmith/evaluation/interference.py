"""What does a mixture of adapters keep of each of them? Each source answers its own held-out rows alone, and
the mixture answers the same rows; the difference is paired, by the statistics of the evaluation.

Scores are cached as those of an evaluation are, so a source that was evaluated is not asked again."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from tunesmith import adapters, events
from tunesmith.evaluation import tasks as registry
from tunesmith.evaluation.evaluate import CachedMeasure, build_tasks, material_of, rows_of, weights_digest
from tunesmith.evaluation.statistics import judge
from tunesmith.evaluation.tasks import EvaluationSpec, Task
from tunesmith.events import Notice, Sink
from tunesmith.machine import ranks
from tunesmith.model.loading import Loaded
from tunesmith.runs import checkpoints, opening
from tunesmith.runs.composed import ComposedRun, WeightedRun
from tunesmith.runs.records import ExampleScore, Score


@dataclass(frozen=True)
class KeptEffect:
    """One headline number on the held-out rows of ``source``. ``alone``: of the source, with the difference
    from the base. ``mixed``: of the mixture, with the difference from the source alone."""

    source: str
    alone: Score
    mixed: Score

    @property
    def share(self) -> float | None:
        """The mixture's gain over the base as a share of the source's; None if the source gained nothing."""
        gain = self.alone.delta
        if self.alone.verdict != "improved" or not gain:
            return None
        return (gain + (self.mixed.delta or 0.0)) / gain

    def to_json(self) -> dict[str, Any]:
        return {
            "source": self.source,
            "share": self.share,
            "alone": asdict(self.alone),
            "mixed": asdict(self.mixed),
        }


def measure(
    composed: ComposedRun, *, model: str | None = None, spec: EvaluationSpec, notify: Sink = events.silent
) -> list[KeptEffect]:
    """The headline numbers of all tasks that ask rows, for each source, on its held-out rows whose prompts no
    other source was trained on. A source without such rows is refused. model: path of the base, if it was
    moved.

    Raises EvaluationError if rows cannot be measured."""
    loaded = opening.find(composed.run.path, model=model).open(notify).loaded
    mixture = checkpoints.choose(composed.run)
    names: list[str] = []
    of_alone: list[Score] = []
    of_mixed: list[Score] = []
    for source, seen in zip(composed.sources, composed.seen, strict=True):
        for task, base, alone, mixed in _measured(source, seen, mixture, loaded, spec, notify):
            seed = source.config.loop.seed
            before = {score.name: score for score in task.summarise(base, alone, seed) if not score.part}
            for score in _between(task, base, alone, mixed, seed):
                if score.headline and not score.part:
                    names.append(source.name)
                    of_alone.append(before[score.name])
                    of_mixed.append(replace(score, target=None, met=None))
    return [KeptEffect(*row) for row in zip(names, judge(of_alone), judge(of_mixed), strict=True)]


Sides = tuple[Task, list[ExampleScore], list[ExampleScore], list[ExampleScore]]


def _measured(
    source: WeightedRun,
    seen: frozenset[str],
    mixture: Path,
    loaded: Loaded,
    spec: EvaluationSpec,
    notify: Sink,
) -> Sequence[Sides]:
    """Each task with the scores of base, source and mixture on the source's held-out rows, without the
    prompts in ``seen``."""
    groups = [group for group in registry.groups().values() if group.asks_rows and group.by_default]
    rows = rows_of(source.run, (), groups, spec.limit, notify, without=seen)
    renderer = opening.renderer_of(source.run, source.config.model.tokenizer or loaded.path)
    material = material_of(source.run, rows, loaded.net, renderer, spec, notify)
    tasks = build_tasks(material, groups, base=True)
    weights = weights_digest(loaded)
    sides: list[list[list[ExampleScore]]] = []
    for name, folder in (("base", None), (source.name, source.checkpoint), ("the mixture", mixture)):
        notify(Notice(f"measuring {name} on the held-out rows of {source.name}"))
        side = CachedMeasure(loaded, weights, folder or mixture, material, False, ranks.ONE)
        if folder is None:
            sides.append([side(task, "base").scores for task in tasks])
            continue
        with checkpoints.held(folder), adapters.attached(loaded.net, folder):
            sides.append([side(task, "tuned").scores for task in tasks])
    return list(zip(tasks, *sides, strict=True))


def _between(
    task: Task,
    base: Sequence[ExampleScore],
    alone: Sequence[ExampleScore],
    mixed: Sequence[ExampleScore],
    seed: int,
) -> list[Score]:
    """The scores of the mixture, with differences from the source alone."""
    if task.pairing.scores is None:
        return task.summarise(alone, mixed, seed)
    gains = [
        [replace(score, value=score.value - before.value) for score, before in zip(side, base, strict=True)]
        for side in (alone, mixed)
    ]
    return task.pairing.scores(list(zip(*gains, strict=True)), seed)
