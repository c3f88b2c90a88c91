"""Loss of a model on the learned tokens of held-out rows, in nats a token, and perplexity = e to that.

The loss is a ratio of sums over all rows, Σ nats / Σ tokens; neither batching nor the order of rows changes
it. Answers that are not imitated (labelled undesirable, or the rejected side of a pair) have a loss of their
own, for which neither direction is better. Models with different tokenizers cannot be compared by these
numbers: their tokens differ."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from tunesmith.checks.parsers import parse
from tunesmith.data.formats import (
    JSON,
    Completion,
    Conversation,
    Demonstration,
    Document,
    Example,
    Judged,
    Preference,
)
from tunesmith.errors import EvaluationError, listing
from tunesmith.evaluation.statistics import Statistic
from tunesmith.evaluation.subject import Subject
from tunesmith.evaluation.tasks import Material, Meaning, Task, digest, register
from tunesmith.events import Notice
from tunesmith.runs.records import ExampleScore
from tunesmith.tokens.batches import Group
from tunesmith.tokens.template import Row, render

UNWANTED = ("undesirable", "rejected")
CATEGORIES = ("type", "category", "task")
"""Keys of rows that may name the row's category; the first that some row has is used."""
MAX_CATEGORIES = 20
"""With more values than these, a key names rows rather than categories."""
OPENING = 300
"""Characters of the prompt that are recorded."""


class RowLoss(NamedTuple):
    """``nats``: Σ −log p over the learned tokens. ``units``: Σ of their weights. ``about``: labels of the
    row."""

    source: str
    nats: float
    units: float
    about: dict[str, JSON] | None = None
    prompt: str | None = None


class PerplexityRow(NamedTuple):
    """``group``: one row. ``about``: its label and type, and its category if it has one; or the reason why it
    is not imitated."""

    group: Group
    about: dict[str, JSON]
    prompt: str


def _wanted(score: ExampleScore) -> float | None:
    return None if "unwanted" in score.detail else score.value


def _loss_of(kind: str) -> Statistic:
    def of(score: ExampleScore) -> float | None:
        return score.value if score.detail.get("unwanted") == kind else None

    return Statistic(f"loss_{kind}", of, unit="nats")


class Perplexity(Task[RowLoss]):
    name = "perplexity"
    version = "1"
    statistics = (
        Statistic("perplexity", _wanted, np.exp, better="lower", headline=True, change=0.01),
        Statistic("loss", _wanted, better="lower", change=0.01, unit="nats"),
        *map(_loss_of, UNWANTED),
    )
    parts = ("label", "type", "category")
    question, rank = "task", 3
    title, asks, asks_rows = "Perplexity on held-out rows", "held-out rows", True
    meanings = (
        Meaning(
            "perplexity",
            "Perplexity on held-out rows",
            "e to the mean loss a token: the model is as uncertain as between so many equally likely tokens",
        ),
        Meaning("loss", "Loss on held-out rows", "mean −log p a token of the answers to imitate, in nats"),
        Meaning(
            "loss_undesirable",
            "Loss on undesirable answers",
            "the same on answers labelled undesirable, which are not imitated; neither direction is better",
        ),
        Meaning(
            "loss_rejected",
            "Loss on rejected answers",
            "the same on the rejected answers of pairs; neither direction is better",
        ),
    )

    def __init__(self, items: Sequence[PerplexityRow] = ()) -> None:
        self.items = items

    @property
    def identity(self) -> str:
        """Hash of the tokens, and of which are learned."""
        hashes = [
            hashlib.sha256(part.tobytes())
            for item in self.items
            for row in item.group.sequences
            for part in row
        ]
        return digest(
            [item.hexdigest() for item in hashes], [[item.group.source, item.about] for item in self.items]
        )

    def measure(self, subject: Subject) -> list[RowLoss]:
        sums = subject.logps([item.group for item in self.items], "loss")
        return [
            RowLoss(
                item.group.source,
                -sum(logp for logp, _ in row),
                sum(units for _, units in row),
                item.about,
                item.prompt,
            )
            for item, row in zip(self.items, sums, strict=True)
        ]

    def score(self, items: Sequence[RowLoss]) -> list[ExampleScore]:
        """``value``: mean nats a token; ``units``: tokens. Raises EvaluationError naming the rows without a
        finite loss."""
        bad = [
            f"{row.source}: loss {row.nats:g} nats over {row.units:g} learned tokens"
            for row in items
            if not (math.isfinite(row.nats) and 0 < row.units < math.inf)
        ]
        if bad:  # leaving them out would make the model look better than it is
            message = f"{len(bad)} of {len(items)} rows have no usable loss\n{listing(bad)}"
            hint = "a row needs a learned token; a loss that is not finite means that the model has diverged"
            raise EvaluationError(message, hint=hint)
        return [
            ExampleScore(
                row.source,
                row.nats / row.units,
                row.units,
                {"nats": row.nats, **(row.about or {})},
                row.prompt,
            )
            for row in items
        ]


@register(Perplexity)
def build(material: Material) -> list[Perplexity]:
    """The task for all rows with tokens that are learned, or that are not to be imitated; none without
    such rows."""
    read = {example.source: example for example in material.everything}
    imitated = {example.source: example for example in material.imitated}
    key = _category(material)
    items = [_item(row, imitated[row.source], _label(read[row.source]), key) for row in material.rows]
    unwanted = {
        example.source: example for example in map(_unwanted, material.everything) if example is not None
    }
    unwanted = {
        source: example for source, example in unwanted.items() if example is not imitated.get(source)
    }
    spec = material.template.model_copy(
        update={"too_long": "cut" if material.template.too_long == "cut" else "drop"}
    )
    rendered = render(list(unwanted.values()), material.renderer, spec, material.batch.length)
    for row in rendered.dropped:
        material.notify(Notice(f"perplexity: not measured: {row.message}", level="warning", where=row.source))
    for row in rendered.rows:
        reason: JSON = "rejected" if isinstance(read[row.source], Preference) else "undesirable"
        item = _item(row, unwanted[row.source], reason, None)
        items.append(item._replace(about={"unwanted": reason}))  # no label or type: parts are of the rest
    if not items:
        material.notify(Notice("perplexity: no row has an answer to score, so it is not measured"))
    return [Perplexity(items)] if items else []


def _category(material: Material) -> str | None:
    """The key of the rows that names their category, if any does."""
    for key in CATEGORIES:
        if kinds := {
            kind for example in material.imitated if isinstance(kind := example.metadata.get(key), str)
        }:
            if len(kinds) <= MAX_CATEGORIES:
                return key
            text = f"perplexity: {key} has more than {MAX_CATEGORIES} values: not shown apart"
            material.notify(Notice(text, count=len(kinds)))
    return None


def _unwanted(example: Example) -> Example | None:
    """The part of ``example`` that is not to be imitated, if any."""
    if isinstance(example, Preference):
        return Demonstration(example.rejected, source=example.source, metadata=example.metadata)
    return example if _label(example) == "undesirable" else None


def _item(row: Row, example: Example, label: JSON, key: str | None) -> PerplexityRow:
    about: dict[str, JSON] = {"label": label, "type": _type(row, example)}
    if key is not None and isinstance(kind := example.metadata.get(key), str):
        about["category"] = kind
    return PerplexityRow(Group((row.tokens,), row.source, row.label), about, _opening(example))


def _label(example: Example) -> str:
    if isinstance(example, Preference):
        return "chosen"
    label = example.desirable if isinstance(example, Judged) else example.label
    return "none" if label is None else "desirable" if label else "undesirable"


def _type(row: Row, example: Example) -> str:
    """Whether the learned answers of ``row`` are calls, words, or both."""
    if isinstance(example, Document):
        return "text"
    if isinstance(example, Completion):
        return "call" if parse(example.completion) else "words"
    messages = _conversation(example).messages[: row.turn + 1]
    answers = [message for message in messages if message.role == "assistant" and message.learn is not False]
    learned = row.tokens.targets >= 1
    starts = int(learned[0]) + int((learned[1:] & ~learned[:-1]).sum())  # one a learned answer
    called = {bool(message.calls or parse(message.content)) for message in answers[-max(1, starts) :]}
    return "call and words" if len(called) > 1 else "call" if True in called else "words"


def _conversation(example: Demonstration | Judged | Preference) -> Conversation:
    return example.chosen if isinstance(example, Preference) else example.conversation


def _opening(example: Example) -> str:
    if isinstance(example, Document):
        return example.text[:OPENING]
    if isinstance(example, Completion):
        return example.prompt[:OPENING]
    prompts = [message.content for message in _conversation(example).messages if message.role == "user"]
    return prompts[0][:OPENING] if prompts else ""
