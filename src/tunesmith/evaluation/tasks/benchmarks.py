"""How does the model do on public benchmarks? Tasks of EleutherAI's lm-evaluation-harness.

The harness (Gao et al., doi 10.5281/zenodo.12608602; the extra ``benchmarks``) defines the requests, how an
answer is read, and the metrics (`catalogue` finds its tasks and their documents). Its evaluator is not used:
documents are scored one by one, so that base and tuned can be paired. Metrics of a whole corpus, which a
single document does not have, are left out and named. Prompts are plain text as the harness writes them,
answers are greedy. HumanEval runs code, see `programs`. Each rank asks a part of the requests."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from tunesmith.data.formats import JSON
from tunesmith.errors import EvaluationError, TemplateError, TunesmithError
from tunesmith.evaluation import suites
from tunesmith.evaluation.harness import catalogue
from tunesmith.evaluation.statistics import Statistic
from tunesmith.evaluation.subject import Subject
from tunesmith.evaluation.tasks import Material, Task, digest, programs, register
from tunesmith.events import Notice, Sink, ticker
from tunesmith.machine.ranks import Ranks
from tunesmith.runs.records import ExampleScore

if TYPE_CHECKING:
    from lm_eval.api.instance import Instance
    from lm_eval.api.task import ConfigurableTask

VERSION = "1"
"""Of this module, beside the harness's own version of each task."""
CODE = "humaneval"
HEADLINES = ("acc_norm", "prompt_level_strict_acc", "acc", "exact_match")
"""A task's headline is the first of these that it has."""
YES_OR_NO = {"acc", "acc_norm", "acc_bytes", "acc_mutual_info", "exact_match"}
"""Metrics that are 0 or 1 for each document, if the harness computes them itself."""

Responses = tuple[Any, ...]
"""The model's response to each request of one document: (log p, greedy), a log p, or a text."""


@dataclass(frozen=True)
class BenchmarkDocument:
    """A document: its requests, and what readers see of it."""

    source: str
    doc: Mapping[str, Any]
    requests: tuple[Instance, ...]
    prompt: str
    reference: str | None
    choices: tuple[str, ...]


@dataclass(frozen=True)
class BenchmarkPart:
    """The documents of one task of the harness."""

    task: ConfigurableTask
    documents: tuple[BenchmarkDocument, ...]
    labels: dict[str, JSON] = field(default_factory=dict)


class Benchmark(Task[Responses]):
    """Items: each document's responses, those of the first part first."""

    name, version = "benchmark", VERSION  # of a benchmark: its own
    question, title, asks = (
        "benchmarks",
        "The benchmark's own metric",
        "what `--benchmark` names: MMLU, GSM8K, …",
    )
    options = ("benchmarks", "benchmark_data", "shots")
    by_default = False

    def __init__(self, name: str, version: str, parts: Sequence[BenchmarkPart], notify: Sink) -> None:
        self.name, self.version, self._parts = f"benchmark.{name}", f"{version}-{VERSION}", parts
        labels = [
            key for key in ("category", "subject") if len({str(part.labels.get(key)) for part in parts}) > 1
        ]
        self.parts = tuple(labels)
        self.statistics = tuple(_statistics([part.task for part in parts], self.name, notify))
        self._headline = next(statistic.name for statistic in self.statistics if statistic.headline)
        contents: list[JSON] = [
            [
                document.source,
                document.reference,
                repr(document.doc),
                *(repr(each.args) for each in document.requests),
            ]
            for part in parts
            for document in part.documents
        ]
        self._identity = digest(
            self.version, catalogue.HARNESS, [str(part.task.VERSION) for part in parts], contents
        )

    @property
    def identity(self) -> str:
        return self._identity

    def measure(self, subject: Subject) -> list[Responses]:
        from tunesmith.evaluation.harness.requests import language_model

        lm = language_model(subject, self.name)
        requests = [
            request for part in self._parts for document in part.documents for request in document.requests
        ]
        responses: dict[int, Any] = {}
        for kind in dict.fromkeys(request.request_type for request in requests):
            chosen = [request for request in requests if request.request_type == kind]
            ask = {"loglikelihood": lm.loglikelihood, "loglikelihood_rolling": lm.loglikelihood_rolling}.get(
                kind, lm.generate_until
            )
            for request, response in zip(chosen, _shared(subject.ranks, chosen, ask), strict=True):
                responses[id(request)] = response
        documents = [document for part in self._parts for document in part.documents]
        measured = [tuple(responses[id(request)] for request in document.requests) for document in documents]
        logps = [
            (document.source, float(np.ravel(response)[0]))
            for document, of_document in zip(documents, measured, strict=True)
            for response in of_document
            if not isinstance(response, str)
        ]
        suites.require_finite(self.name, logps)
        return measured

    def score(self, items: Sequence[Responses]) -> list[ExampleScore]:
        scores: list[ExampleScore] = []
        left = iter(items)
        for part in self._parts:
            of_part = [next(left) for _ in part.documents]
            answered = [
                [
                    replace(request, resps=[response] * (request.repeats or 1), filtered_resps={})
                    for request, response in zip(document.requests, responses, strict=True)
                ]
                for document, responses in zip(part.documents, of_part, strict=True)
            ]
            for ensemble in part.task._filters:
                ensemble.apply([request for requests in answered for request in requests])
            for document, requests, responses in zip(part.documents, answered, of_part, strict=True):
                scores.append(self._scored(part, document, requests, responses))
        return scores

    def _scored(
        self,
        part: BenchmarkPart,
        document: BenchmarkDocument,
        requests: Sequence[Instance],
        responses: Responses,
    ) -> ExampleScore:
        detail = dict(part.labels)
        units = 1.0
        for ensemble in part.task._filters:
            results = part.task.process_results(
                document.doc, [request.filtered_resps[ensemble.name] for request in requests]
            )
            for metric, value in results.items():
                if isinstance(value, tuple) and metric in ("byte_perplexity", "bits_per_byte"):
                    value, units = value[0] / value[1], float(value[1])
                elif isinstance(value, list | tuple):
                    value = np.mean(value) if metric in catalogue.LEVELS else None
                if value is not None:
                    detail[_named(metric, ensemble.name, part.task)] = float(value)
        names = [statistic.name for statistic in self.statistics]
        value = next((detail[name] for name in names if detail.get(name) is not None), 0.0)
        headline = detail.get(self._headline, value)
        assert isinstance(headline, int | float)
        return ExampleScore(
            document.source,
            float(headline),
            units,
            detail,
            document.prompt,
            document.reference,
            _answer(document, responses, by_length=self._headline == "acc_norm"),
        )


def _shared(ranks: Ranks, requests: Sequence[Instance], ask: Callable[..., list[Any]]) -> list[Any]:
    """The responses of ``ask`` to ``requests``. Each rank asks consecutive ones, which share their beginning;
    then all ranks have all responses."""
    mine = range(len(requests) * ranks.rank // ranks.size, len(requests) * (ranks.rank + 1) // ranks.size)
    own = ask([requests[index] for index in mine], disable_tqdm=True) if mine else []
    if ranks.size == 1:
        return own
    rows = [[*map(ord, response)] if isinstance(response, str) else np.ravel(response) for response in own]
    lengths = np.zeros(len(requests))
    lengths[mine] = [len(row) for row in rows]
    lengths = ranks.total_float(lengths).astype(int)
    table = np.zeros((len(requests), max(1, lengths.max())))
    for index, row in zip(mine, rows, strict=True):
        table[index, : len(row)] = row
    every = [row[:length].tolist() for row, length in zip(ranks.total_float(table), lengths, strict=True)]
    match requests[0].request_type:
        case "loglikelihood":
            return [(logp, bool(greedy)) for logp, greedy in every]
        case "loglikelihood_rolling":
            return [logp for (logp,) in every]
    return ["".join(chr(int(letter)) for letter in row) for row in every]


def _answer(document: BenchmarkDocument, responses: Responses, by_length: bool) -> str:
    """The text that was generated, or the likeliest choice."""
    if not document.choices or isinstance(responses[0], str):
        return str(responses[0])
    logps = [
        logp / max(1, len(choice)) if by_length else logp
        for (logp, _), choice in zip(responses, document.choices, strict=False)
    ]
    return document.choices[int(np.argmax(logps))]


def _named(metric: str, filter: str, task: ConfigurableTask) -> str:
    return metric if len(task._filters) == 1 else f"{metric}, {filter}"


def _statistics(tasks: Sequence[ConfigurableTask], name: str, notify: Sink) -> list[Statistic]:
    """One for each metric that has a number for each document, in the order of the first task that has it;
    one is the headline."""
    from lm_eval.api.registry import get_aggregation

    finishes: dict[Any, Callable[[np.ndarray], np.ndarray]] = {
        get_aggregation("mean"): np.asarray,
        get_aggregation("nanmean"): np.asarray,
        get_aggregation("perplexity"): lambda logp: np.exp(-logp),
        get_aggregation("weighted_perplexity"): lambda logp: np.exp(-logp),
        get_aggregation("bits_per_byte"): lambda logp: -logp / np.log(2),
    }
    statistics: dict[str, Statistic] = {}
    left_out: dict[str, None] = {}
    ranks: dict[str, tuple[int, bool]] = {}
    for task in tasks:
        own = task.config.process_results is None
        for metric, aggregation in task.aggregation().items():
            if (
                aggregation not in finishes or metric == "word_perplexity"
            ):  # its weights are not those of bytes
                left_out[metric] = None
                continue
            for ensemble in task._filters:
                key = _named(metric, ensemble.name, task)
                better = "higher" if task.higher_is_better().get(metric, True) else "lower"
                share = (own and metric in YES_OR_NO) or metric.startswith("prompt_level")
                statistics.setdefault(key, Statistic(key, _reader(key), finishes[aggregation], share, better))
                rank = HEADLINES.index(metric) if metric in HEADLINES else len(HEADLINES)
                # Without training on the mark of the solved examples (gsm8k: ####) an answer can be right.
                ranks.setdefault(key, (rank, ensemble.name != "flexible-extract"))
    if left_out:
        text = f"{name}: metrics that a single document does not have are left out: {', '.join(left_out)}"
        notify(Notice(text, count=len(left_out)))
    if not statistics:
        raise EvaluationError(
            f"{name}: none of its metrics has a number for each document", hint="choose another benchmark"
        )
    first = min(statistics, key=ranks.__getitem__)
    return [replace(statistic, headline=name == first) for name, statistic in statistics.items()]


def _reader(key: str) -> Callable[[ExampleScore], float | None]:
    def read(score: ExampleScore) -> float | None:
        value = score.detail.get(key)
        return float(value) if isinstance(value, int | float) else None

    return read


@register(Benchmark, programs.Programs, group="benchmarks")
def build(material: Material) -> list[Task]:
    """A task for each name of `EvaluationSpec.benchmarks`, as ``hellaswag``, ``mmlu``, ``mmlu:astronomy`` or
    ``mmlu:stem``.

    Raises SetupError without the harness, EvaluationError for an unknown name or missing data."""
    spec, made = material.spec, dict[str, Task]()
    if not spec.benchmarks:
        material.notify(
            Notice("benchmarks: none is named, so none is measured", hint="--benchmark mmlu names one")
        )
    folder = None if spec.benchmark_data is None else Path(spec.benchmark_data).expanduser()
    if folder is not None and not folder.is_dir():
        raise EvaluationError(
            "is not a folder",
            where=f"--benchmark-data {folder}",
            hint="give the folder with the benchmarks' files",
        )
    for name in dict.fromkeys(spec.benchmarks):
        if name == CODE:
            built = _programs(folder, material)
        else:
            catalogue.require()
            with catalogue.warnings_as_notices(material.notify):
                built = [_benchmark(chosen, folder, material) for chosen in catalogue.resolve(name)]
        made |= {task.name: task for task in built}
    return list(made.values())


def _programs(folder: Path | None, material: Material) -> list[Task]:
    if folder is None:
        load = "datasets.load_dataset('openai/openai_humaneval', split='test')"
        hint = f"{load}.to_json('humaneval_test.jsonl') writes it"
        raise EvaluationError(f"{CODE} is read from a file in --benchmark-data", hint=hint)
    path = catalogue.file(folder, [CODE], "test")
    if isinstance(path, catalogue.MissingFile):
        raise _absent(CODE, folder, path)
    return list(programs.build_from([path], material))


def _absent(name: str, folder: Path | None, missing: catalogue.MissingFile) -> EvaluationError:
    return EvaluationError(
        f"the questions of {name} were not found",
        where="the hub" if folder is None else f"--benchmark-data {folder}",
        hint=f"one of these is needed: {', '.join(missing.names)}",
    )


def _benchmark(chosen: catalogue.Chosen, folder: Path | None, material: Material) -> Benchmark:
    limit, left_out = material.spec.limit or sys.maxsize, 0
    parts: list[BenchmarkPart] = []
    absent: list[tuple[str, catalogue.MissingFile]] = []
    tick = ticker(material.notify, f"{chosen.title}: questions")
    for done, leaf in enumerate(chosen.leaves):
        tick(done, len(chosen.leaves))
        task = catalogue.load(leaf, folder, material.spec.shots, material.notify)
        if isinstance(task, catalogue.MissingFile):
            absent.append((leaf.subject, task))
            continue
        above = [group.removeprefix(f"{chosen.leaves[0].groups[0]}_") for group in leaf.groups[1:]]
        left_out += max(0, len(task.task_docs) - limit)
        labels: dict[str, JSON] = {"category": above[-1] if above else None, "subject": leaf.subject}
        parts.append(
            BenchmarkPart(task, tuple(_asked(leaf.name, task, material)), labels if chosen.partial else {})
        )
    if not parts:
        raise _absent(chosen.title, folder, absent[0][1])
    if absent:
        text = f"{chosen.title}: no file for {', '.join(name for name, _ in absent)}: they are not measured"
        material.notify(
            Notice(text, level="warning", count=len(absent), hint=f"one of: {', '.join(absent[0][1].names)}")
        )
    if left_out:
        each = f" of each of its {len(parts)} subjects" if len(parts) > 1 else ""
        text = f"{chosen.title}: only the first {limit} documents{each} are asked"
        material.notify(Notice(text, level="warning", count=left_out))
    if not any(part.documents for part in parts):
        raise EvaluationError(f"{chosen.title}: no document can be asked", where=str(folder or "the hub"))
    return Benchmark(chosen.title, chosen.version, parts, material.notify)


def _asked(name: str, task: ConfigurableTask, material: Material) -> Iterator[BenchmarkDocument]:
    """The documents with their requests, as the harness's evaluator makes them; of each task the first
    ``limit``.

    Documents that contain the text of a control token are left out with a notice, since it would be read as
    the token."""
    limit, shots = material.spec.limit, task.config.num_fewshot
    docs: Any = task.task_docs
    unwritable = Counter[str]()
    for number, doc in enumerate(islice(docs, limit)):
        try:
            context = task.fewshot_context(doc, num_fewshot=shots, gen_prefix=task.doc_to_prefix(doc))
            made = _document(name, number, task, doc, context)
            for text in {text for request in made.requests for text in request.args if isinstance(text, str)}:
                material.renderer.text_prompt(text)
            yield made
        except TemplateError as error:
            unwritable[error.what] += 1
        except Exception as error:  # a template is code and may raise anything
            if isinstance(error, TunesmithError):
                raise
            message = f"cannot be asked with {shots} solved examples: {' '.join(str(error).split())[:200]}"
            raise EvaluationError(
                message, where=f"{name}/{number}", hint="fewer --shots, or other documents"
            ) from error
    for reason, count in unwritable.items():
        material.notify(Notice(f"{name}: documents are left out: {reason}", level="warning", count=count))


def _document(name: str, number: int, task: ConfigurableTask, doc: Any, context: Any) -> BenchmarkDocument:
    about = (name, number, task.config.repeats)
    made = task.construct_requests(
        doc=doc, ctx=context, metadata=about, apply_chat_template=False, chat_template=None
    )
    choices = tuple(task.doc_to_choice(doc)) if task.config.doc_to_choice is not None else ()
    question, gold = task.doc_to_text(doc), task.doc_to_target(doc)
    if task.multiple_input:  # the choices are beginnings of one continuation
        question, gold = gold, question
    gold = gold if isinstance(gold, list) else [gold]
    right = [
        str(choices[target]) if isinstance(target, int) else str(target)
        for target in gold
        if choices or not isinstance(target, int)
    ]
    requests = tuple(made) if isinstance(made, list) else (made,)
    return BenchmarkDocument(
        f"{name}/{number}", doc, requests, str(question), " | ".join(right) or None, choices
    )
