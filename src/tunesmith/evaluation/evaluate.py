"""Ask the base and the tuned model the same things, and say how sure the difference is.

Reads a run directory only (or, on request, other rows). The base is the run's own model before its adapter is
attached, so both sides share weights, tokenizer, prompts and order. What a model scored is kept under a hash
of all that decides it, so nothing is measured twice, and an evaluation that was stopped goes on."""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from itertools import islice
from pathlib import Path
from typing import Any

from mlx.utils import tree_flatten

from tunesmith import events
from tunesmith.adapters import layers as adapters
from tunesmith.data import formats
from tunesmith.data.formats import Example
from tunesmith.data.sources import sha256
from tunesmith.errors import EvaluationError
from tunesmith.evaluation.statistics import change, judge
from tunesmith.evaluation.subject import Subject
from tunesmith.evaluation.tasks import (
    Builder,
    EvaluationSpec,
    Material,
    Task,
    adherence,
    benchmarks,
    digest,
    drift,
    efficiency,
    perplexity,
    preference,
    tool_calls,
)
from tunesmith.events import Notice, Sink
from tunesmith.files import write_json
from tunesmith.learning.objectives.sft import SFT
from tunesmith.machine import backend, ranks
from tunesmith.model import loading as models
from tunesmith.model.loading import Loaded
from tunesmith.runs import records
from tunesmith.runs.directory import EVALS, VALID, Run
from tunesmith.runs.records import ExampleRecord, ExampleScore, Record, Score
from tunesmith.tokens import renderers, template
from tunesmith.tokens.template import Renderer

TASKS: dict[str, Builder] = {
    "perplexity": perplexity.build,
    "adherence": adherence.build,
    "tool_calls": tool_calls.build,
    "preference": preference.build,
    "drift": drift.build,
    "efficiency": efficiency.build,
    "benchmarks": benchmarks.build,
}
SUITE = ("perplexity", "adherence", "tool_calls", "preference", "drift", "efficiency")
"""What is measured where nothing is named; benchmarks need a package and are named."""
ONLY_FOR = {
    "drift": ("knowledge", "text", "chats", "safety"),
    "benchmarks": ("benchmarks", "benchmark_data", "shots", "allow_code"),
}
OF_ROWS = frozenset({"perplexity", "adherence", "tool_calls", "preference"})
DECIDING = (
    "tunesmith",
    "mlx",
    "mlx-lm",
    "sacrebleu",
    "rapidfuzz",
    "py3langid",
    "pygarble",
    "jsonschema",
    "regex",
)
"""Packages by whose version a score can change."""
IMITATED = SFT()
"""Whatever the objective was, tasks ask how well the model says what is to be said: demonstrations,
desirable, chosen."""


@dataclass(frozen=True)
class Answered:
    """One prompt with both answers; ``base`` is None where only the tuned model was asked."""

    prompt: str
    reference: str
    base: str | None
    tuned: str
    source: str


@dataclass(frozen=True)
class Evaluation:
    """``answers``: of the first task that has some."""

    run: Run
    checkpoint: Path
    scores: list[Score]
    answers: list[Answered]

    def summary(self) -> dict[str, Any]:
        return {
            "run": str(self.run.path),
            "checkpoint": self.checkpoint.name,
            "scores": [{**asdict(score), "base": score.base} for score in self.scores],
        }


def evaluate(
    run: Run,
    *,
    data: Sequence[str] = (),
    checkpoint: str = "best",
    model: str | None = None,
    tasks: Sequence[str] = SUITE,
    base: bool = True,
    fresh: bool = False,
    spec: EvaluationSpec | None = None,
    notify: Sink = events.silent,
) -> Evaluation | None:
    """Scores of ``tasks`` for the checkpoint, paired with the base's; written to ``evals/<task>@<version>/``.

    data: files to measure on instead of the run's held-out rows. model: where its model lies now, None: where
    it was trained. base: also measure the model without its adapter. fresh: measure again what is known. None
    on ranks but the first, which share the questions and write nothing. Raises EvaluationError where nothing
    can be measured, or what was named cannot."""
    unknown = [task for task in tasks if task not in TASKS]
    if unknown:
        whole = unknown[0].partition(".")[0]
        hint = f"it is part of {whole}: --task {whole}" if whole in TASKS else f"tasks: {', '.join(TASKS)}"
        raise EvaluationError(f"no task is called {unknown[0]!r}", hint=hint)
    spec = spec or EvaluationSpec()
    if "benchmarks" in tasks and not spec.benchmarks:
        raise EvaluationError(
            "no benchmark is named", where="benchmarks", hint="--benchmark mmlu, hellaswag, …"
        )
    for task, options in ONLY_FOR.items():
        if task not in tasks and (given := [name for name in options if getattr(spec, name)]):
            also = "--benchmark NAME" if task == "benchmarks" else f"--task {task}"
            raise EvaluationError(
                f"is for {task}, which is not among the tasks", where=given[0], hint=f"{also} as well"
            )
    among = ranks.join(notify)
    notify = notify if among.writes else events.silent
    if data and not OF_ROWS & {*tasks}:
        raise EvaluationError(
            f"no task of {', '.join(tasks)} asks rows",
            where="data",
            hint=f"--task {', '.join(sorted(OF_ROWS))}",
        )
    folder = run.choose(checkpoint, notify)
    config = run.settings(model)
    data = [str(Path(path).expanduser().resolve()) for path in data]
    everything, imitated, hashes = _examples(run, data, tasks, spec.limit, notify)
    loaded = models.load(config.model, notify)
    renderer = renderers.load(config.model.tokenizer or loaded.path, config.template.renderer)
    run.require_base(loaded.fingerprint, renderer.fingerprint)
    rendered = template.render(imitated, renderer, config.template, config.batch.length)
    for row in rendered.dropped:
        notify(Notice(f"perplexity: not measured: {row.message}", level="warning", where=row.source))
    material = Material(
        everything,
        imitated,
        rendered.rows,
        renderer,
        config.template,
        config.batch,
        spec,
        config.loop.seed,
        notify,
        loaded.net,
    )
    built = list(_built(material, [task for task in tasks if everything or task not in OF_ROWS], base))
    if not built:
        raise EvaluationError(
            f"nothing could be measured of {', '.join(tasks)}", hint="what was said before this tells why"
        )
    weights = _weights(loaded)
    among.require_agreement(
        [(task.name, task.version, task.identity) for task in built], weights, folder.name
    )
    measure = _Measure(loaded, weights, renderer, folder, spec, material, fresh, among)
    before = [measure(task, "base") for task in built] if base else [None] * len(built)
    adapters.load(loaded.net, folder)
    answers: list[Answered] = []
    # The run's evidence: its best checkpoint on all held-out rows and the package's suites, beside the base.
    # The rest is apart.
    other = [] if folder == run.choose("best") else [f"step{folder.name}"]
    family = [
        *_named(data),
        *other,
        *([f"first{spec.limit}"] if spec.limit else []),
        *([] if base else ["tuned"]),
    ]
    written: list[str] = []
    for task, old in zip(built, before, strict=True):
        new = measure(task, "tuned")
        if not among.writes:
            continue
        scored = task.summarise(old and old.scores, new.scores, config.loop.seed)
        of_rows = task.name in OF_ROWS
        name = [f"{task.name}@{task.version}", *_named(_files(task, spec)), *_shots(task, spec), *family]
        record = Record(
            folder=run.path / EVALS / "+".join(name),
            task=task.name,
            version=task.version,
            checkpoint=folder.name,
            family=tuple(family),
            at=time.time(),
            identity=task.identity,
            settings=spec.model_dump(mode="json"),
            base=weights,
            data=(tuple(data) or VALID) if of_rows else None,
            unseen=not hashes & _learned(run) if data and of_rows else None,
            n=len(new.scores),
            seconds={"base": old and old.seconds, "tuned": new.seconds},
            kept={"base": old is not None and old.kept, "tuned": new.kept},
            scores=tuple(scored),
        )
        records.write(record, _examples_of(task, old, new))
        written.append(record.name)
        answers = answers or _answers(old, new)
    if not among.writes:
        return None
    judged = _judged(run.path, folder.name, tuple(family))
    return Evaluation(run, folder, [score for name in written for score in judged[name]], answers)


def _weights(loaded: Loaded) -> str:
    """What the base is made of, as it is held: files, merged adapter, quantisation, precision."""
    flat: Any = tree_flatten(loaded.net.parameters())
    return digest(
        loaded.fingerprint, loaded.config.get("quantization"), sorted({str(value.dtype) for _, value in flat})
    )


def _files(task: Task, spec: EvaluationSpec) -> Sequence[str]:
    """Those that take the place of the task's own suite."""
    of = {
        "drift.knowledge": spec.knowledge,
        "drift.text": spec.text,
        "drift.chat": spec.chats,
        "drift.safety": spec.safety,
    }
    return of.get(task.name, ())


def _shots(task: Task, spec: EvaluationSpec) -> list[str]:
    return [f"{spec.shots}shots"] if spec.shots and task.name.startswith("benchmark.") else []


def _named(paths: Sequence[str]) -> list[str]:
    """One part of a folder's name for these files, which files of the same name elsewhere do not share."""
    if not paths:
        return []
    return [
        "+".join(Path(path).stem for path in paths)[:40]
        + "-"
        + digest([str(Path(path).resolve()) for path in paths])[:6]
    ]


@dataclass(frozen=True)
class _Known:
    """``seconds``: what measuring took, also where it was done earlier (``kept``)."""

    scores: list[ExampleScore]
    seconds: float
    kept: bool


@dataclass
class _Measure:
    """One side of one task, from what is kept or by asking the model."""

    loaded: Loaded
    weights: str
    renderer: Renderer
    adapter: Path
    spec: EvaluationSpec
    material: Material
    fresh: bool
    ranks: ranks.Ranks
    _subject: Subject | None = None

    def __call__(self, task: Task, side: str) -> _Known:
        notify = self.material.notify
        if self._subject is None or self._subject.side != side:
            at_once = self.spec.batch_size or (
                32 if backend.setup().kind == "cpu" else 16
            )  # a GPU holds the weights too
            self._subject = Subject(
                self.loaded.net,
                self.renderer,
                "base" if side == "base" else "tuned",
                self.material.batch,
                at_once,
                notify,
                self.ranks,
            )
        adapter = (
            []
            if side == "base"
            else [sha256(self.adapter / name) for name in (adapters.WEIGHTS, adapters.CONFIG)]
        )
        key = digest(
            task.name,
            task.version,
            task.identity,
            self.weights,
            adapter,
            self.renderer.fingerprint,
            self.material.batch.length,
            backend.setup().kind,
            {package: version(package) for package in DECIDING},
        )
        place = backend.cache_folder() / "evaluations" / f"{key}.json"
        subject = self._subject
        kept = _read(place) if task.cached and not self.fresh and self.ranks.writes else ""
        if kept := self.ranks.from_first(kept):  # what the first rank knows, none need measure
            known, heard = _parsed(kept)
            subject.heard = {**heard, **subject.heard}
            notify(Notice(f"{side}: {task.name} is known from before: {len(known.scores):,} examples"))
            return known
        before, start = len(subject.heard), time.perf_counter()
        scores = task.score(task.measure(subject))
        known = _Known(scores, time.perf_counter() - start, False)
        if task.cached and self.ranks.writes:
            place.parent.mkdir(parents=True, exist_ok=True)
            new = dict(islice(subject.heard.items(), before, None))
            write_json(
                place, {"seconds": known.seconds, "scores": [asdict(score) for score in scores], "heard": new}
            )
        return known


def _parsed(kept: str) -> tuple[_Known, dict[str, Any]]:
    found = json.loads(kept)
    return _Known([ExampleScore(**score) for score in found["scores"]], found["seconds"], True), {
        **found["heard"]
    }


def _read(place: Path) -> str:
    """What is kept there; nothing where nothing is, or nothing that can be understood."""
    try:
        kept = place.read_text(encoding="utf-8")
        _parsed(kept)
        return kept
    except (OSError, ValueError, KeyError, TypeError):
        return ""


def _built(material: Material, tasks: Sequence[str], base: bool) -> Iterator[Task]:
    for name in dict.fromkeys(tasks):
        for task in TASKS[name](material):
            if task.needs_base and not base:
                material.notify(Notice(f"{task.name}: it needs the base, which was left out: not measured"))
            else:
                yield task


def _learned(run: Run) -> set[str]:
    """SHA-256 of the files that training rows were taken from."""
    files = {Path(path): value for path, value in run.manifest["hashes"]["data"].items()}
    return {
        value
        for path, value in files.items()
        if {str(path), *map(str, path.parents)} & {*run.config.data.train}
    }


def _examples(
    run: Run, data: Sequence[str], tasks: Sequence[str], limit: int | None, notify: Sink
) -> tuple[list[Example], list[Example], set[str]]:
    """All rows, those that say what is to be said, and their files' SHA-256; none where no task asks rows, or
    there are none."""
    config = run.config
    asking = [task for task in dict.fromkeys(tasks) if task in OF_ROWS]
    if not asking and not data:
        return [], [], set()
    paths = list(data) or [str(run.path / VALID)]
    # The run's own held-out rows are written in one layout, whatever the files of the user look like.
    held_out = Path(paths[0])
    if data or (held_out.is_file() and held_out.stat().st_size):
        read = formats.read(paths, config.data if data else config.data.model_copy(update={"format": "auto"}))
    else:
        read = None
    if read is None or not read.rows:
        if data or len(asking) == len(set(tasks)):
            what, hint = (
                ("has no rows", "give another file") if data else ("has no held-out rows", "give --data FILE")
            )
            raise EvaluationError(what, where=paths[0], hint=hint)
        notify(
            Notice(
                f"no rows are held out: not measured: {', '.join(asking)}",
                level="warning",
                hint="give --data FILE",
            )
        )
        return [], [], set()
    formats.require(read, config.data.max_dropped)
    if read.dropped:
        notify(Notice("rows that could not be read", level="warning", count=len(read.dropped)))
    imitate = config.objective if isinstance(config.objective, SFT) else IMITATED
    everything = read.examples[:limit]
    if len({Path(path).name for path in read.files}) == len(
        read.files
    ):  # what is asked is the same wherever its file lies
        above = "" if data else "data/"
        everything = [replace(one, source=above + Path(one.source).name) for one in everything]
    if len(everything) < len(read.examples):
        notify(Notice(f"only the first {limit} of {len(read.examples)} rows are measured", level="warning"))
    examples, left_out, _ = imitate.select(everything)
    for reason, count in Counter(reason for _, reason in left_out).items():
        notify(Notice(f"rows not asked for loss and calls: {reason}", count=count))
    return everything, examples, {*read.files.values()}


def _answers(before: _Known | None, after: _Known) -> list[Answered]:
    pairs = zip(before.scores if before else [None] * len(after.scores), after.scores, strict=True)
    return [
        Answered(
            tuned.prompt, tuned.reference, None if base is None else base.answer, tuned.answer, tuned.source
        )
        for base, tuned in pairs
        if tuned.prompt is not None and tuned.reference is not None and tuned.answer is not None
    ]


def _examples_of(task: Task, before: _Known | None, after: _Known) -> list[ExampleRecord]:
    """The lines of a record's examples, paired with the base's scores if it was measured."""
    headlines = [statistic for statistic in task.statistics if statistic.headline]
    examples: list[ExampleRecord] = []
    for index, tuned in enumerate(after.scores):
        example = ExampleRecord(
            tuned.source, tuned.units, tuned.prompt, tuned.reference, tuned.value, tuned.detail, tuned.answer
        )
        if before is not None:
            base = before.scores[index]
            headline = next((statistic for statistic in headlines if statistic.of(tuned) is not None), None)
            example = replace(
                example,
                base=base.value,
                base_detail=base.detail,
                base_answer=base.answer,
                change=headline and change(headline, headline.of(base), headline.of(tuned)),
            )
        examples.append(example)
    return examples


def _judged(run_dir: Path, checkpoint: str, family: tuple[str, ...]) -> dict[str, tuple[Score, ...]]:
    """By folder: the evaluations of ``checkpoint`` of one family, their verdicts corrected together, and
    written so.

    Only the version of a task that was measured last counts."""
    newest: dict[str, Record] = {}
    for record in records.read(run_dir)[0]:
        if (record.family, record.checkpoint) == (family, checkpoint):  # older ones have no family
            name = record.name.replace(f"@{record.version}", "", 1)
            newest[name] = max(newest.get(name, record), record, key=lambda record: record.at or 0.0)
    together = [newest[name] for name in sorted(newest)]
    every = [replace(score, verdict=None, p_corrected=None) for record in together for score in record.scores]
    verdicts = iter(judge(every))
    folders: dict[str, tuple[Score, ...]] = {}
    for record in together:
        folders[record.name] = tuple(next(verdicts) for _ in record.scores)
        records.write_scores(record, folders[record.name])
    return folders
