"""Which of the given answers does a model find likeliest? Multiple choice, without generating text.

A choice is scored as the continuation of the question, Σ log p of its tokens (Brown et al. 2020, section
2.4), as a sum and divided by its bytes, which does not disadvantage long choices: lm-evaluation-harness's
``acc`` and ``acc_bytes`` (for English ``acc_norm``, which counts letters). The prompt is plain text, without
chat template or solved examples: ``Question: …\\nAnswer:``, then a space and the choice. Files may have the
schema of the hub's MMLU, ARC, HellaSwag, WinoGrande, PIQA or TruthfulQA (mc1); the prompts of HellaSwag,
WinoGrande and PIQA are those of the harness."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from typing import NamedTuple, cast

import numpy as np

from tunesmith.data.formats import JSON
from tunesmith.errors import DataError, TemplateError
from tunesmith.evaluation.statistics import Statistic, Target
from tunesmith.evaluation.subject import Subject
from tunesmith.evaluation.suites import Entry, require_finite
from tunesmith.evaluation.tasks import Meaning, Task, digest
from tunesmith.events import Notice, Sink
from tunesmith.runs.records import ExampleScore
from tunesmith.tokens.batches import Group
from tunesmith.tokens.template import Renderer, Tokens

SCHEMAS = (
    "question, choices, answer (the package's suite, MMLU) · question, choices, answerKey (ARC) · "
    "ctx, endings, label (HellaSwag) · sentence, option1, option2, answer (WinoGrande) · "
    "goal, sol1, sol2, label (PIQA) · question, mc1_targets (TruthfulQA)"
)


class ChoiceQuestion(NamedTuple):
    """``contexts``: the text before each choice. ``choices``: the continuations that are scored. ``shown``:
    the choices for readers. ``answer``: index of the right one."""

    source: str
    category: str
    asked: str
    contexts: tuple[str, ...]
    choices: tuple[str, ...]
    shown: tuple[str, ...]
    answer: int


class ScoredQuestion(NamedTuple):
    """``logps``: Σ log p in nats of each choice."""

    question: ChoiceQuestion
    logps: tuple[float, ...]


class _Fields(NamedTuple):
    """What a schema says: the question, its choices as they stand in the row, and the index of the right one.

    ``contexts``: the text before each choice, empty for the usual prompt. ``shown``: the choices for readers,
    empty if they are those that are scored."""

    asked: str
    texts: object
    answer: object
    contexts: tuple[str, ...] = ()
    shown: tuple[str, ...] = ()


def question(entry: Entry) -> ChoiceQuestion:
    """The question of a row, by the schema that its keys show. Raises DataError with the row's place."""
    keys = entry.row.keys()
    reader = next((reader for required, reader in _READERS if required <= keys), None)
    if reader is None:
        message = f"no schema of multiple choice has the keys {', '.join(sorted(keys))}"
        raise DataError(message, where=entry.source)
    fields = reader(entry)
    texts = fields.texts if isinstance(fields.texts, list) else []
    if len(texts) < 2 or not all(isinstance(text, str) and text.strip() for text in texts):
        raise DataError("the choices must be two or more texts", where=entry.source)
    answer = fields.answer
    choices = tuple(str(text).strip() for text in texts)
    if type(answer) is not int or not 0 <= answer < len(choices):
        raise DataError(f"no choice is marked as the right one of {len(choices)}", where=entry.source)
    contexts = fields.contexts or (f"Question: {fields.asked}\nAnswer:",)
    contexts = contexts * len(choices) if len(contexts) == 1 else contexts
    category = entry.kind("category", "subject")
    return ChoiceQuestion(
        entry.source, category, fields.asked, contexts, choices, fields.shown or choices, answer
    )


def _arc(entry: Entry) -> _Fields:
    options, key = entry.row["choices"], entry.row["answerKey"]
    texts = options.get("text") if isinstance(options, dict) else None
    labels = options.get("label") if isinstance(options, dict) else None
    answer = labels.index(key) if isinstance(labels, list) and key in labels else None
    return _Fields(entry.words("question"), texts, answer)


def _mmlu(entry: Entry) -> _Fields:
    return _Fields(entry.words("question"), entry.row["choices"], entry.row["answer"])


def _truthfulqa(entry: Entry) -> _Fields:
    targets = entry.row["mc1_targets"]
    texts = targets.get("choices") if isinstance(targets, dict) else None
    labels = targets.get("labels") if isinstance(targets, dict) else None
    answer = labels.index(1) if isinstance(labels, list) and labels.count(1) == 1 else None
    return _Fields(entry.words("question"), texts, answer)


def _hellaswag(entry: Entry) -> _Fields:
    row = entry.row
    parts = [part for key in ("ctx_a", "ctx_b") if isinstance(part := row.get(key), str)]
    context = f"{parts[0]} {parts[1].capitalize()}" if len(parts) == 2 else entry.words("ctx")
    context = _plain(f"{row['activity_label']}: {context}" if row.get("activity_label") else context)
    endings = row["endings"]
    if isinstance(endings, list):
        endings = [_plain(text) if isinstance(text, str) else text for text in endings]
    return _Fields(context or entry.words("question"), endings, _number(row["label"]), (context,))


def _winogrande(entry: Entry) -> _Fields:
    sentence = entry.words("sentence")
    before, blank, after = sentence.partition("_")
    if not blank or not after.strip():
        raise DataError("the sentence has no _ with words behind it", where=entry.source)
    shown = entry.words("option1"), entry.words("option2")
    answer = (_number(entry.row["answer"]) or 0) - 1
    return _Fields(sentence, [after.strip()] * 2, answer, tuple(before + option for option in shown), shown)


def _piqa(entry: Entry) -> _Fields:
    row = entry.row
    return _Fields(entry.words("goal"), [row["sol1"], row["sol2"]], _number(row["label"]))


_READERS: tuple[tuple[set[str], Callable[[Entry], _Fields]], ...] = (
    ({"question", "choices", "answerKey"}, _arc),
    ({"question", "choices", "answer"}, _mmlu),
    ({"question", "mc1_targets"}, _truthfulqa),
    ({"ctx", "endings", "label"}, _hellaswag),
    ({"sentence", "option1", "option2", "answer"}, _winogrande),
    ({"goal", "sol1", "sol2", "label"}, _piqa),
)
"""Schemas by the keys that they require, the first that fits."""


def _number(value: JSON) -> int | None:
    return int(text) if (text := str(value)).isdecimal() else None


def _plain(text: str) -> str:
    """Without what is left of WikiHow's markup in HellaSwag, as lm-evaluation-harness removes it."""
    return re.sub(r"\[.*?\]", "", text.strip().replace(" [title]", ". ")).replace("  ", " ")


def continuation(renderer: Renderer, context: str, rest: str) -> tuple[Tokens, bool]:
    """The tokens of ``context + rest``, those of ``rest`` marked as targets; and whether a token spans the
    boundary, so that the targets begin before the end of ``context``.

    The first token is never a target: nothing predicts it."""
    before, whole = renderer.text_prompt(context), renderer.text_prompt(context + rest)
    pairs = enumerate(zip(before, whole, strict=False))
    parted = (place for place, (token, other) in pairs if token != other)
    start = min(max(next(parted, len(before)), 1), len(whole) - 1)
    targets = np.zeros(len(whole), np.float32)
    targets[start:] = 1
    return Tokens(np.array(whole, np.int32), targets), start < len(before)


class MultipleChoice(Task[ScoredQuestion]):
    """``value``: whether the right choice has the highest log p a byte."""

    name, version = "drift.knowledge", "1"
    statistics = (
        Statistic(
            "accuracy",
            lambda score: score.value,
            share=True,
            better="higher",
            headline=True,
            target=Target(share=0.95),
        ),
        Statistic(
            "accuracy_sums", lambda score: cast(float, score.detail["right_sum"]), share=True, better="higher"
        ),
        Statistic(
            "confidence",
            lambda score: cast(float, score.detail["confidence"]),
            better="higher",
            unit="%",
            target=Target(share=0.95),
        ),
    )
    parts = ("category",)
    question, title, asks = "retention", "General knowledge", "multiple-choice questions on general topics"
    options, files = ("knowledge",), "knowledge"
    meanings = (
        Meaning("accuracy", "General knowledge", "how often the right choice is the likeliest"),
        Meaning(
            "accuracy_sums",
            "General knowledge, by sums",
            "the same by the sum of log-probabilities, which disadvantages long choices",
        ),
        Meaning(
            "confidence",
            "Confidence in the right choice",
            "probability of the right choice among those offered",
        ),
    )

    def __init__(self, questions: Sequence[ChoiceQuestion], renderer: Renderer, notify: Sink) -> None:
        """Raises DataError if a text cannot be encoded."""
        self.questions = list(questions)
        self._groups: list[Group] = []
        merged = 0
        for question in self.questions:
            texts = [f" {choice}" for choice in question.choices]
            try:
                pairs = [continuation(renderer, *both) for both in zip(question.contexts, texts, strict=True)]
            except TemplateError as error:
                raise DataError(error.what, where=question.source, hint=error.hint) from error
            merged += sum(early for _, early in pairs)
            self._groups.append(Group(tuple(tokens for tokens, _ in pairs), question.source))
        if merged:
            text = f"{self.name}: choices whose first token includes the end of the question: scored with it"
            notify(Notice(text, count=merged))

    @property
    def identity(self) -> str:
        return digest(self.name, self.version, [list(map(_json, question)) for question in self.questions])

    def measure(self, subject: Subject) -> list[ScoredQuestion]:
        sums = subject.logps(self._groups, "choices")
        return [
            ScoredQuestion(question, tuple(logp for logp, _ in choices))
            for question, choices in zip(self.questions, sums, strict=True)
        ]

    def score(self, items: Sequence[ScoredQuestion]) -> list[ExampleScore]:
        """detail: category, right_sum (by Σ log p), confidence (softmax over the choices of log p a byte),
        chosen. A tie for the first place is wrong."""
        values = [(question.source, logp) for question, logps in items for logp in logps]
        require_finite(self.name, values)
        return [_score(*item) for item in items]


def _score(question: ChoiceQuestion, logps: tuple[float, ...]) -> ExampleScore:
    per_byte = [logp / len(choice.encode()) for logp, choice in zip(logps, question.choices, strict=True)]
    best, right = max(per_byte), question.answer
    chosen = per_byte.index(best)

    pairs = list(zip(question.contexts, question.choices, strict=True))
    # Some of MMLU's questions list a choice twice.
    others = [index for index, pair in enumerate(pairs) if pair != pairs[right]]

    def first(values: Sequence[float]) -> float:
        return float(all(values[right] > values[other] for other in others))

    confidence = math.exp(per_byte[right] - best) / sum(math.exp(value - best) for value in per_byte)
    detail: dict[str, JSON] = {
        "category": question.category,
        "right_sum": first(logps),
        "confidence": confidence,
        "chosen": chosen,
    }
    shown = question.shown
    return ExampleScore(
        question.source, first(per_byte), 1.0, detail, question.asked, shown[right], shown[chosen]
    )


def _json(value: str | int | tuple[str, ...]) -> JSON:
    return list(value) if isinstance(value, tuple) else value
