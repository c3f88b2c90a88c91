"""Rows of other files beside the task's training rows, so that a model keeps what it could do before: which
files, and how many of their rows an epoch has.

Experience replay against forgetting: Scialom et al., "Fine-tuned Language Models are Continual Learners"
(arXiv 2205.12393). Of a distilled entry not its tokens are learned but the base's probabilities of every next
token: knowledge distillation (Hinton et al., arXiv 1503.02531, at a temperature of 1) with the base as
teacher. Dark experience replay (Buzzega et al., arXiv 2004.07211) compares with logits stored in training."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import numpy as np
from pydantic import Field, model_validator

from tunesmith.settings.config import Sensible, Spec, Texts

STREAM = 19
"""Keeps the random numbers of the draw apart from those that the seed gives elsewhere."""


class MixSpec(Spec):
    """Files whose rows are trained on beside those of ``data.train``. They are never held out."""

    path: Texts = Field(
        min_length=1,
        description="files or folders, as in data.train",
        json_schema_extra={"when": "to rows like those that the model must not forget"},
    )
    share: float | None = Field(
        default=None,
        gt=0,
        lt=1,
        description="share of these rows in all rows of an epoch; or give repeat",
        json_schema_extra={"when": "more if general text or knowledge still gets worse"},
    )
    repeat: Annotated[int | None, Field(ge=1), Sensible(le=1000)] = Field(
        default=None,
        description="how often an epoch has each of these rows; or give share",
        json_schema_extra={"when": "instead of share, if few rows must be seen a certain number of times"},
    )
    weight: Annotated[float, Field(gt=0), Sensible(le=1000)] = Field(
        default=1.0,
        description="weight of each of their learned tokens; the task's have 1",
        json_schema_extra={"when": "more instead of more rows, if what they keep still gets worse"},
    )
    distill: bool = Field(
        default=False,
        description="learn the probabilities that the base gives to every token at these places (their "
        "Kullback-Leibler divergence), not the tokens; sft with an adapter",
        json_schema_extra={"when": "to keep what the base says: with its own answers, or any rows like them"},
    )

    @model_validator(mode="after")
    def _share_or_repeat(self) -> MixSpec:
        if (self.share is None) == (self.repeat is None):
            raise ValueError("give share or repeat, one of them")
        return self


def require_room(mix: Sequence[MixSpec]) -> None:
    """Raises ValueError if the shares leave no room for the rows of the task."""
    if (total := sum(entry.share or 0.0 for entry in mix)) >= 1:
        raise ValueError(f"the shares of data.mix add up to {total:g}, and must be less than 1")


def names(mix: Sequence[MixSpec]) -> list[str]:
    """The files of each entry of ``mix``; with their folders if two entries have files of the same names."""
    short = [", ".join(Path(path).name for path in entry.path) for entry in mix]
    return short if len(set(short)) == len(short) else [", ".join(entry.path) for entry in mix]


def rows_an_epoch(mix: Sequence[MixSpec], task: int, rows: Sequence[int]) -> list[int]:
    """How many rows of each entry of ``mix`` an epoch has, beside ``task`` rows of the task. ``rows``: how
    many each entry holds. A share is of all rows of the epoch, the task's and the mixed ones."""
    repeated = [(entry.repeat or 0) * count for entry, count in zip(mix, rows, strict=True)]
    whole = (task + sum(repeated)) / (1 - sum(entry.share or 0.0 for entry in mix))
    return [
        count if entry.share is None else max(1, round(entry.share * whole))
        for entry, count in zip(mix, repeated, strict=True)
    ]


def draw(rows: int, wanted: int, seed: int, entry: int) -> list[int]:
    """(wanted,) which of ``rows`` rows an epoch has: each as often as the others, or once more. The rows that
    come once more are drawn by ``seed``; those drawn for a smaller number are among those for a larger one.
    ``entry``: the place in ``data.mix``."""
    whole, rest = divmod(wanted, rows)
    order = np.random.Generator(np.random.PCG64([seed, STREAM, entry])).permutation(rows)
    return [*range(rows)] * whole + sorted(order[:rest].tolist())
