"""Ask base and tuned model the same questions, and measure how sure their difference is.

Reads a run directory only (or, on request, other rows). The base is the run's own model before its adapter is
attached, so both sides share weights, tokenizer, prompts and order. Scores are cached under a hash of all
that decides them, so nothing is measured twice, and an interrupted evaluation continues."""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Collection, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field, replace
from importlib.metadata import version
from itertools import islice
from pathlib import Path
from typing import Any

import mlx.nn as nn
from mlx.utils import tree_flatten

from tunesmith import adapters, events
from tunesmith.data import folders, formats
from tunesmith.data.examples import prompt_key
from tunesmith.data.formats import Example
from tunesmith.data.sources import sha256
from tunesmith.display.notebook import NotebookResult
from tunesmith.engine.engine import notify_if_separate
from tunesmith.errors import EvaluationError
from tunesmith.evaluation import tasks as registry
from tunesmith.evaluation.statistics import change, judge
from tunesmith.evaluation.subject import Side, Subject
from tunesmith.evaluation.tasks import EvaluationSpec, Material, Task, TaskGroup, digest
from tunesmith.events import Notice, Sink
from tunesmith.files import write_json
from tunesmith.learning.objectives.sft import SFT
from tunesmith.machine import backend, ranks
from tunesmith.model.loading import Loaded
from tunesmith.runs import checkpoints, opening, records
from tunesmith.runs.directory import EVALS, VALID, Run
from tunesmith.runs.records import ExampleRecord, ExampleScore, Record, Score
from tunesmith.tokens import template
from tunesmith.tokens.template import Renderer

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
"""Packages whose version can change a score."""
CACHE_HINT = "make the cache folder writable, or name another: TUNESMITH_CACHE=FOLDER"
IMITATED = SFT()
"""Selects the rows to imitate (demonstrations, desirable, chosen), whatever the run's objective was."""


@dataclass(frozen=True)
class AnsweredPrompt:
    """One prompt with both answers; ``base`` is None if only the tuned model was asked."""

    prompt: str
    reference: str
    base: str | None
    tuned: str
    source: str


@dataclass(frozen=True)
class Evaluation(NotebookResult):
    """``scores``: of the tasks measured now. ``answers``: of the first task that has some."""

    run: Run
    checkpoint: Path
    scores: list[Score]
    answers: list[AnsweredPrompt]

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
    tasks: Sequence[str] = (),
    base: bool = True,
    fresh: bool = False,
    spec: EvaluationSpec | None = None,
    notify: Sink = events.silent,
) -> Evaluation | None:
    """Scores of ``tasks`` for the checkpoint, paired with the base's; written to ``evals/<task>@<version>/``.

    data: files to measure on instead of the run's held-out rows. model: where the run's model is now, None:
    where it was when it was trained. tasks: none means `tasks.suite`. base: also measure the model without
    its adapter. fresh: measure again what is cached. None on ranks other than the first, which share the
    questions and write nothing. Raises EvaluationError if nothing can be measured, or a task that was named
    cannot."""
    spec = spec or EvaluationSpec()
    groups = _chosen(tasks or registry.suite(), spec, data)
    among = ranks.join(notify)
    notify = notify if among.writes else events.silent
    folder = checkpoints.choose(run, checkpoint, notify)
    with run.evaluating(notify) if among.writes else nullcontext(), checkpoints.held(folder):
        return _evaluated(run, folder, groups, among, data, model, base, fresh, spec, notify)


def _evaluated(
    run: Run,
    folder: Path,
    groups: Sequence[TaskGroup],
    among: ranks.Ranks,
    data: Sequence[str],
    model: str | None,
    base: bool,
    fresh: bool,
    spec: EvaluationSpec,
    notify: Sink,
) -> Evaluation | None:
    """What `evaluate` gives for the checkpoint in ``folder``, while no other process evaluates the run."""
    source = opening.of_run(run, folder, model)
    data = [str(Path(path).expanduser().resolve()) for path in data]
    rows = rows_of(run, data, groups, spec.limit, notify)
    config, opened = run.config, source.open(notify)
    loaded, renderer = opened.loaded, opened.renderer
    notify_if_separate(loaded.net, notify)
    material = material_of(run, rows, loaded.net, renderer, spec, notify)
    built = build_tasks(material, groups, base)
    weights = weights_digest(loaded)
    stated = [(task.name, task.version, task.identity) for task in built]
    among.require_agreement(stated, weights, folder.name)
    measure = CachedMeasure(loaded, weights, folder, material, fresh, among)
    before = [measure(task, "base") for task in built] if base else [None] * len(built)
    opened.attach()
    family = _family(run, folder, data, spec.limit, base)
    writer = _Writer(run, folder, spec, weights, tuple(data), rows.unseen(run) if data else None, family)
    for task, measured in zip(built, before, strict=True):
        tuned = measure(task, "tuned")
        if among.writes:
            writer.write(task, measured, tuned, config.loop.seed)
    return writer.evaluation(notify) if among.writes else None


def _chosen(names: Sequence[str], spec: EvaluationSpec, data: Sequence[str]) -> list[TaskGroup]:
    """The tasks to measure. Raises EvaluationError for names and options that do not fit together."""
    if "benchmarks" in names and not spec.benchmarks:
        raise EvaluationError(
            "no benchmark is named", where="benchmarks", hint="--benchmark mmlu, hellaswag, …"
        )
    groups = registry.require(names, spec)
    if data and not any(group.asks_rows for group in groups):
        usable = sorted(group.name for group in registry.groups().values() if group.asks_rows)
        message = f"no task of {', '.join(names)} asks rows"
        raise EvaluationError(message, where="data", hint=f"--task {', '.join(usable)}")
    return groups


def material_of(
    run: Run, rows: EvaluationRows, net: nn.Module, renderer: Renderer, spec: EvaluationSpec, notify: Sink
) -> Material:
    """What tasks are built from: ``rows``, rendered as ``run`` renders them. net: the base."""
    config = run.config
    rendered = template.render(rows.imitated, renderer, config.template, config.batch.length)
    for row in rendered.dropped:
        notify(Notice(f"perplexity: not measured: {row.message}", level="warning", where=row.source))
    return Material(
        rows.all,
        rows.imitated,
        rendered.rows,
        renderer,
        config.template,
        config.batch,
        spec,
        config.loop.seed,
        notify,
        net,
    )


def build_tasks(material: Material, groups: Sequence[TaskGroup], base: bool) -> list[Task]:
    """The tasks that can be measured. Raises EvaluationError if there is none."""
    built: list[Task] = []
    for group in groups:
        if group.asks_rows and not material.everything:
            continue
        for task in group.build(material):
            if task.needs_base and not base:
                text = f"{task.name}: it needs the base, which was left out: not measured"
                material.notify(Notice(text))
            else:
                built.append(task)
    if not built:
        names = ", ".join(group.name for group in groups)
        raise EvaluationError(f"nothing could be measured of {names}", hint="the messages above say why")
    return built


def _family(run: Run, checkpoint: Path, data: Sequence[str], limit: int | None, base: bool) -> list[str]:
    """What sets an evaluation apart from the run's main evidence: its best checkpoint on all held-out rows
    and the package's suites, with a base."""
    family = _file_label(data)
    family += [] if checkpoint == checkpoints.choose(run, "best") else [f"step{checkpoint.name}"]
    family += [f"first{limit}"] if limit else []
    return family + ([] if base else ["tuned"])


def weights_digest(loaded: Loaded) -> str:
    """Digest of the base's weights as they are loaded: files, merged adapter, quantisation, precision."""
    flat: Any = tree_flatten(loaded.net.parameters())
    return digest(
        loaded.fingerprint, loaded.config.get("quantization"), sorted({str(value.dtype) for _, value in flat})
    )


def _file_label(paths: Sequence[str]) -> list[str]:
    """One part of a folder's name for these files; files of the same names elsewhere have another."""
    if not paths:
        return []
    names = "+".join(Path(path).stem for path in paths)[:40]
    return [f"{names}-{digest([str(Path(path).resolve()) for path in paths])[:6]}"]


@dataclass(frozen=True)
class Measurement:
    """One side of one task. ``seconds``: what measuring took, if ``cached`` in an earlier evaluation."""

    scores: list[ExampleScore]
    seconds: float
    cached: bool


@dataclass
class CachedMeasure:
    """Measures one side of one task, from the cache or by asking the model."""

    loaded: Loaded
    weights: str
    adapter: Path
    material: Material
    fresh: bool
    ranks: ranks.Ranks
    _subjects: dict[Side, Subject] = field(default_factory=dict)
    _uncached: list[Path] = field(default_factory=list)

    def __call__(self, task: Task, side: Side) -> Measurement:
        subject, path = self._subject(side), self._path(task, side)
        content = _read(path) if task.cached and not self.fresh and self.ranks.writes else ""
        if content := self.ranks.from_first(content):  # what the first rank has cached, no rank measures
            cached, heard = _parsed(content)
            subject.heard = {**heard, **subject.heard}
            text = f"{side}: {task.name} is cached: {len(cached.scores):,} examples"
            self.material.notify(Notice(text))
            return cached
        before, start = len(subject.heard), time.perf_counter()
        scores = task.score(task.measure(subject))
        measured = Measurement(scores, time.perf_counter() - start, False)
        if task.cached and self.ranks.writes:
            heard = dict(islice(subject.heard.items(), before, None))
            rows = [asdict(score) for score in scores]
            self._cache(path, {"seconds": measured.seconds, "scores": rows, "heard": heard})
        return measured

    def _cache(self, path: Path, content: object) -> None:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_json(path, content)
        except OSError as error:
            if self._uncached:
                return
            self._uncached.append(path)
            text = f"scores are not cached, so that they are measured again next time: {error}"
            self.material.notify(Notice(text, level="warning", where=str(path.parent), hint=CACHE_HINT))

    def _subject(self, side: Side) -> Subject:
        """The model on one side; tasks share what it answered. The other side's answers are dropped."""
        if side not in self._subjects:
            # 16 on a GPU, whose memory also holds the weights
            size = self.material.spec.batch_size or (64 if backend.setup().kind == "cpu" else 16)
            material = self.material
            self._subjects = {
                side: Subject(
                    self.loaded.net,
                    material.renderer,
                    side,
                    material.batch,
                    size,
                    material.notify,
                    self.ranks,
                )
            }
        return self._subjects[side]

    def _path(self, task: Task, side: Side) -> Path:
        """Where the scores are cached, by a hash of all that decides them."""
        files = (adapters.WEIGHTS, adapters.CONFIG)
        key = digest(
            task.name,
            task.version,
            task.identity,
            self.weights,
            [] if side == "base" else [sha256(self.adapter / name) for name in files],
            self.material.renderer.fingerprint,
            self.material.batch.length,
            backend.setup().kind,
            {package: version(package) for package in DECIDING},
        )
        return backend.cache_folder() / "evaluations" / f"{key}.json"


def _parsed(content: str) -> tuple[Measurement, dict[str, Any]]:
    """The cached measurement, and what the model answered."""
    stored = json.loads(content)
    scores = [ExampleScore(**score) for score in stored["scores"]]
    return Measurement(scores, stored["seconds"], True), {**stored["heard"]}


def _read(path: Path) -> str:
    """The cached content; empty if there is none, or none that can be read."""
    try:
        content = path.read_text(encoding="utf-8")
        _parsed(content)
        return content
    except (OSError, ValueError, KeyError, TypeError):
        return ""


@dataclass(frozen=True)
class EvaluationRows:
    """``all``: rows as read. ``imitated``: those whose answers are targets. ``hashes``: SHA-256 of their
    files."""

    all: list[Example] = field(default_factory=list)
    imitated: list[Example] = field(default_factory=list)
    hashes: frozenset[str] = frozenset()

    def unseen(self, run: Run) -> bool:
        """Whether no file of these rows was trained on."""
        return not self.hashes & _learned(run)


def _learned(run: Run) -> set[str]:
    """SHA-256 of the files that training rows were taken from."""
    files = {Path(path): value for path, value in run.hashes["data"].items()}
    return {
        value
        for path, value in files.items()
        if {str(path), *map(str, path.parents)} & {*run.config.data.trained_on}
    }


def rows_of(
    run: Run,
    data: Sequence[str],
    groups: Sequence[TaskGroup],
    limit: int | None,
    notify: Sink,
    *,
    without: Collection[str] = (),
) -> EvaluationRows:
    """The rows of ``data``, or those that the run held out; empty if no task asks rows, or none are held out
    and other tasks can be measured. without: prompts (`examples.prompt_key`) whose rows are left out; the
    caller says so."""
    asking = [group.name for group in groups if group.asks_rows]
    if not asking and not data:
        return EvaluationRows()
    for text in folders.copies(data):
        notify(Notice(text))
    read = _read_rows(run, data)
    if read is not None and without:
        rows = [row for row in read.examples if prompt_key(row) not in without]
        read = read._replace(examples=rows, rows=len(rows) + len(read.dropped))
    if read is None or not read.rows:
        if data:
            raise EvaluationError("has no rows", where=data[0], hint="give another file")
        if len(asking) == len(groups):
            where, hint = str(run.path / VALID), "give --data FILE"
            raise EvaluationError("has no held-out rows", where=where, hint=hint)
        text = f"no rows are held out: not measured: {', '.join(asking)}"
        notify(Notice(text, level="warning", hint="give --data FILE"))
        return EvaluationRows()
    formats.require(read, run.config.data.max_dropped)
    if read.dropped:
        notify(Notice("rows that could not be read", level="warning", count=len(read.dropped)))
    rows = read.examples[:limit]
    names = {Path(path).name for path in read.files}
    if len(names) == len(read.files):  # a question is the same wherever its file is
        above = "" if data else "data/"
        rows = [replace(row, source=above + Path(row.source).name) for row in rows]
    if len(rows) < len(read.examples):
        notify(Notice(f"only the first {limit} of {len(read.examples)} rows are measured", level="warning"))
    objective = run.config.objective
    imitated, left_out, _ = (objective if isinstance(objective, SFT) else IMITATED).select(rows)
    for reason, count in Counter(reason for _, reason in left_out).items():
        notify(Notice(f"rows left out of loss and calls: {reason}", count=count))
    return EvaluationRows(rows, imitated, frozenset(read.files.values()))


def _read_rows(run: Run, data: Sequence[str]) -> formats.Read | None:
    """None if no rows were held out."""
    if data:
        return formats.read(data, run.config.data)
    held_out = run.path / VALID
    if not held_out.is_file() or not held_out.stat().st_size:
        return None
    # Held-out rows are written in one layout, whatever the format of the user's files.
    return formats.read([str(held_out)], run.config.data.model_copy(update={"format": "auto"}))


@dataclass
class _Writer:
    """Writes the record of each task; then judges those of the family together.

    ``unseen``: none of ``data`` was trained on, None without data."""

    run: Run
    checkpoint: Path
    spec: EvaluationSpec
    weights: str
    data: tuple[str, ...]
    unseen: bool | None
    family: list[str]
    _written: list[str] = field(default_factory=list)
    _answers: list[AnsweredPrompt] = field(default_factory=list)

    def write(self, task: Task, base: Measurement | None, tuned: Measurement, seed: int) -> None:
        files = getattr(self.spec, task.files) if task.files else ()
        described = registry.about(task.name)
        options = registry.groups()[described.group].options
        shots = [f"{self.spec.shots}shots"] if self.spec.shots and "shots" in options else []
        name = [f"{task.name}@{task.version}", *_file_label(files), *shots, *self.family]
        record = Record(
            folder=self.run.path / EVALS / "+".join(name),
            task=task.name,
            version=task.version,
            checkpoint=self.checkpoint.name,
            family=tuple(self.family),
            at=time.time(),
            identity=task.identity,
            settings=self.spec.model_dump(mode="json"),
            base=self.weights,
            data=(self.data or VALID) if task.asks_rows else None,
            unseen=self.unseen if task.asks_rows else None,
            n=len(tuned.scores),
            seconds={"base": base and base.seconds, "tuned": tuned.seconds},
            kept={"base": base is not None and base.cached, "tuned": tuned.cached},
            scores=tuple(task.summarise(base and base.scores, tuned.scores, seed)),
        )
        with self.run.writable():
            records.write(record, _examples(task, base, tuned))
        self._written.append(record.name)
        self._answers = self._answers or _answers(base, tuned)

    def evaluation(self, notify: Sink) -> Evaluation:
        judged = _judged(self.run.path, self.checkpoint.name, tuple(self.family), notify)
        scores = [score for name in self._written for score in judged[name]]
        return Evaluation(self.run, self.checkpoint, scores, self._answers)


def _examples(task: Task, base: Measurement | None, tuned: Measurement) -> list[ExampleRecord]:
    """The examples as they are recorded, paired with the base's scores if it was measured."""
    headlines = [statistic for statistic in task.statistics if statistic.headline]
    examples: list[ExampleRecord] = []
    for index, score in enumerate(tuned.scores):
        example = ExampleRecord(
            score.source, score.units, score.prompt, score.reference, score.value, score.detail, score.answer
        )
        if base is not None:
            other = base.scores[index]
            headline = next((statistic for statistic in headlines if statistic.of(score) is not None), None)
            example = replace(
                example,
                base=other.value,
                base_detail=other.detail,
                base_answer=other.answer,
                change=headline and change(headline, headline.of(other), headline.of(score)),
            )
        examples.append(example)
    return examples


def _answers(base: Measurement | None, tuned: Measurement) -> list[AnsweredPrompt]:
    pairs = zip(base.scores if base else [None] * len(tuned.scores), tuned.scores, strict=True)
    return [
        AnsweredPrompt(
            score.prompt, score.reference, None if other is None else other.answer, score.answer, score.source
        )
        for other, score in pairs
        if score.prompt is not None and score.reference is not None and score.answer is not None
    ]


def _judged(
    run_dir: Path, checkpoint: str, family: tuple[str, ...], notify: Sink
) -> dict[str, tuple[Score, ...]]:
    """By folder: the evaluations of ``checkpoint`` of one family, their verdicts corrected together, and
    written so.

    Only the version of a task that was measured last counts."""
    newest: dict[str, Record] = {}
    readable, damaged = records.read(run_dir)
    for error in damaged:
        notify(
            Notice(f"an evaluation is left out of the correction for many tests: {error}", level="warning")
        )
    for record in readable:
        if (record.family, record.checkpoint) == (family, checkpoint):  # older ones have no family
            name = record.name.replace(f"@{record.version}", "", 1)
            newest[name] = max(newest.get(name, record), record, key=lambda record: record.at or 0.0)
    together = [newest[name] for name in sorted(newest)]
    every = [replace(score, verdict=None, p_corrected=None) for record in together for score in record.scores]
    verdicts = iter(judge(every))
    folders: dict[str, tuple[Score, ...]] = {}
    for record in together:
        folders[record.name] = tuple(next(verdicts) for _ in record.scores)
        with Run(run_dir).writable():
            records.write_scores(record, folders[record.name])
    return folders
