"""Which of given answers does a model find likeliest? Multiple choice without a word generated.

An answer is scored as the continuation of the question, Σ log p of its tokens (Brown et al. 2020, section
2.4), as it is and for each byte of the answer, where long answers are not at a disadvantage:
lm-evaluation-harness's ``acc`` and ``acc_bytes`` (for English ``acc_norm``, which counts letters). Plain
text, no chat template, no solved example before it: ``Question: …\\nAnswer:``, then a space and the answer.
Files may have the schema of the hub's MMLU, ARC, HellaSwag, WinoGrande, PIQA or TruthfulQA (mc1); HellaSwag,
WinoGrande and PIQA are put as the harness puts them."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
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
    "question, choices, answer (ours, MMLU) · question, choices, answerKey (ARC) · ctx, endings, label (HellaSwag) · "
    "sentence, option1, option2, answer (WinoGrande) · goal, sol1, sol2, label (PIQA) · question, mc1_targets (TruthfulQA)"
)


class Question(NamedTuple):
    """``contexts``: the text before each choice. ``choices``: as they are compared. ``shown``: as they are
    read. One is right."""

    source: str
    category: str
    asked: str
    contexts: tuple[str, ...]
    choices: tuple[str, ...]
    shown: tuple[str, ...]
    answer: int


class Scored(NamedTuple):
    """``logps``: Σ log p in nats of each choice."""

    question: Question
    logps: tuple[float, ...]


def question(entry: Entry) -> Question:
    """The question of a row, its schema told by its keys. Raises DataError with the row's place."""
    row, answer = entry.row, None
    texts: object = None
    context, asked = None, ""
    contexts: tuple[str, ...] = ()
    keys = row.keys()
    if {"question", "choices", "answerKey"} <= keys:
        options = row["choices"]
        texts = options.get("text") if isinstance(options, dict) else None
        labels = options.get("label") if isinstance(options, dict) else None
        answer = (
            labels.index(row["answerKey"])
            if isinstance(labels, list) and row["answerKey"] in labels
            else None
        )
    elif {"question", "choices", "answer"} <= keys:
        texts, answer = row["choices"], row["answer"]
    elif {"question", "mc1_targets"} <= keys:
        targets = row["mc1_targets"]
        texts, labels = (
            (targets.get("choices"), targets.get("labels")) if isinstance(targets, dict) else (None, None)
        )
        answer = labels.index(1) if isinstance(labels, list) and labels.count(1) == 1 else None
    elif {"ctx", "endings", "label"} <= keys:
        parts = [part for key in ("ctx_a", "ctx_b") if isinstance(part := row.get(key), str)]
        asked = f"{parts[0]} {parts[1].capitalize()}" if len(parts) == 2 else entry.words("ctx")
        asked = context = _plain(f"{row['activity_label']}: {asked}" if row.get("activity_label") else asked)
        texts, answer = row["endings"], _number(row["label"])
        texts = (
            [_plain(text) if isinstance(text, str) else text for text in texts]
            if isinstance(texts, list)
            else None
        )
    elif {"sentence", "option1", "option2", "answer"} <= keys:
        asked = entry.words("sentence")
        before, blank, after = asked.partition("_")
        if not blank or not after.strip():
            raise DataError("the sentence has no _ with words behind it", where=entry.source)
        shown = (entry.words("option1"), entry.words("option2"))
        contexts, texts = tuple(before + option for option in shown), [after.strip()] * 2
        answer = (_number(row["answer"]) or 0) - 1
    elif {"goal", "sol1", "sol2", "label"} <= keys:
        asked, texts, answer = entry.words("goal"), [row["sol1"], row["sol2"]], _number(row["label"])
    else:
        raise DataError(
            f"no schema of multiple choice has the keys {', '.join(sorted(keys))}", where=entry.source
        )
    asked = asked or entry.words("question")
    if (
        not isinstance(texts, list)
        or len(texts) < 2
        or not all(isinstance(text, str) and text.strip() for text in texts)
    ):
        raise DataError("the choices must be two or more texts", where=entry.source)
    found = tuple(str(text).strip() for text in texts)
    if type(answer) is not int or not 0 <= answer < len(found):
        raise DataError(f"no choice is marked as the right one of {len(found)}", where=entry.source)
    shown = found if not contexts else (str(row["option1"]), str(row["option2"]))
    context = f"Question: {asked}\nAnswer:" if context is None else context
    contexts = contexts or (context,) * len(found)
    return Question(entry.source, entry.kind("category", "subject"), asked, contexts, found, shown, answer)


def _number(value: JSON) -> int | None:
    return int(text) if (text := str(value)).isdecimal() else None


def _plain(text: str) -> str:
    """Without what is left of WikiHow's markup in HellaSwag, as lm-evaluation-harness removes it."""
    return re.sub(r"\[.*?\]", "", text.strip().replace(" [title]", ". ")).replace("  ", " ")


def continuation(renderer: Renderer, context: str, rest: str) -> tuple[Tokens, bool]:
    """``context + rest`` as one text, marked from where its tokens leave those of ``context``; whether they
    part before its end.

    The first token of all is never marked: nothing predicts it.
    """
    before, whole = renderer.text_prompt(context), renderer.text_prompt(context + rest)
    parted = (at for at, (one, other) in enumerate(zip(before, whole, strict=False)) if one != other)
    start = min(max(next(parted, len(before)), 1), len(whole) - 1)
    targets = np.zeros(len(whole), np.float32)
    targets[start:] = 1
    return Tokens(np.array(whole, np.int32), targets), start < len(before)


class MultipleChoice(Task[Scored]):
    """``value``: whether the likeliest choice for each of its bytes is the right one."""

    name, version = "drift.knowledge", "1"
    statistics = (
        Statistic(
            "accuracy",
            lambda one: one.value,
            share=True,
            better="higher",
            headline=True,
            target=Target(share=0.95),
        ),
        Statistic(
            "accuracy_sums", lambda one: cast(float, one.detail["right_sum"]), share=True, better="higher"
        ),
        Statistic(
            "confidence",
            lambda one: cast(float, one.detail["confidence"]),
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

    def __init__(self, questions: Sequence[Question], renderer: Renderer, notify: Sink) -> None:
        """Raises DataError where a text cannot be encoded."""
        self.questions = list(questions)
        self._groups: list[Group] = []
        merged = 0
        for one in self.questions:
            texts = [f" {choice}" for choice in one.choices]
            try:
                pairs = [continuation(renderer, *both) for both in zip(one.contexts, texts, strict=True)]
            except TemplateError as error:
                raise DataError(error.what, where=one.source, hint=error.hint) from error
            merged += sum(early for _, early in pairs)
            self._groups.append(Group(tuple(tokens for tokens, _ in pairs), one.source))
        if merged:
            what = f"{self.name}: choices whose first token reaches back into the question: it is scored with them"
            notify(Notice(what, count=merged))

    @property
    def identity(self) -> str:
        return digest(self.name, self.version, [list(map(_json, one)) for one in self.questions])

    def measure(self, subject: Subject) -> list[Scored]:
        sums = subject.logps(self._groups, "choices")
        return [
            Scored(one, tuple(logp for logp, _ in pairs))
            for one, pairs in zip(self.questions, sums, strict=True)
        ]

    def score(self, items: Sequence[Scored]) -> list[ExampleScore]:
        """detail: category, right_sum (by Σ log p), confidence (softmax over the choices of log p a byte),
        chosen.

        A tie for the first place is wrong.
        """
        require_finite(self.name, [(one.source, logp) for one, logps in items for logp in logps])
        return [_score(*item) for item in items]


def _score(asked: Question, logps: tuple[float, ...]) -> ExampleScore:
    each = [logp / len(choice.encode()) for logp, choice in zip(logps, asked.choices, strict=True)]
    best, right = max(each), asked.answer
    chosen = each.index(best)

    pairs = list(zip(asked.contexts, asked.choices, strict=True))
    others = [
        at for at, pair in enumerate(pairs) if pair != pairs[right]
    ]  # some of MMLU's choices stand there twice

    def first(values: Sequence[float]) -> float:
        return float(all(values[right] > values[at] for at in others))

    confidence = math.exp(each[right] - best) / sum(math.exp(one - best) for one in each)
    detail: dict[str, JSON] = {
        "category": asked.category,
        "right_sum": first(logps),
        "confidence": confidence,
        "chosen": chosen,
    }
    shown = asked.shown
    return ExampleScore(asked.source, first(each), 1.0, detail, asked.asked, shown[right], shown[chosen])


def _json(value: str | int | tuple[str, ...]) -> JSON:
    return list(value) if isinstance(value, tuple) else value
