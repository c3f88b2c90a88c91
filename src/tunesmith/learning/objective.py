"""What an objective is: settings (its YAML block) and behaviour (its rows and its loss) in one file of
``objectives``.

Every objective is a function of one number a sequence, Σ weight · log p over its learned tokens. All of them
thus share one way through the model: chunked head, packing and compiled steps included. Losses are sums over
units, never means, so that accumulation, validation and ranks are right by construction."""

from __future__ import annotations

from abc import abstractmethod
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal, NamedTuple

import mlx.core as mx
import numpy as np

from tunesmith.data.formats import Example
from tunesmith.settings.config import Family
from tunesmith.tokens.batches import Group
from tunesmith.tokens.template import Row


class Selected(NamedTuple):
    """``left_out``: with the reason. ``notes``: changes to rows that their author may not expect, with
    counts."""

    examples: list[Example]
    left_out: list[tuple[Example, str]]
    notes: Counter[str]


class Remark(NamedTuple):
    """What an objective tells about the training rows."""

    text: str
    level: Literal["info", "warning"] = "info"


class Objective(Family):
    """Abstract. A concrete objective is final and has a ``kind``, by which settings name it."""

    folder: ClassVar[str] = "tunesmith.learning.objectives"
    needs_reference: ClassVar[bool] = False
    unit: ClassVar[str] = "nats a learned token"
    """The unit of the loss: what it is a mean over."""
    suits: ClassVar[Mapping[str, Any]] = {}
    """Defaults of other settings under this objective: key path → value."""
    watched: ClassVar[tuple[str, ...]] = ()
    """Names of `metrics`. The first two are the rewards of the answers to learn and of those to avoid."""
    hints: ClassVar[Mapping[str, str]] = {}
    """Reason for which `select` leaves examples out → what learns them."""
    learns_prompts: ClassVar[bool] = False
    """Whether ``template.prompt_weight`` applies."""
    sums_tokens: ClassVar[bool] = False
    """Whether the loss is a sum over learned tokens, so that ``weight`` and ``distill`` of ``data.mix``
    apply: minus a divergence may then stand for log p."""

    @abstractmethod
    def select(self, examples: Sequence[Example]) -> Selected:
        """The examples that this objective can learn from."""

    @abstractmethod
    def groups(self, rows: Sequence[Row]) -> list[Group]:
        """Rows in groups that must stay together in a micro-batch."""

    @abstractmethod
    def fields(self, groups: Sequence[Group], baseline: float) -> np.ndarray:
        """(S, F) inputs of `losses` beside the log-probabilities. ``baseline``: as
        `baseline` gives it."""

    @abstractmethod
    def losses(self, logps: mx.array, fields: mx.array) -> mx.array:
        """(S,) float32 Σ weight · log p of each sequence and its fields → (U,) losses; their sum is
        minimised."""

    def units(self, group: Group) -> float:
        """The share of ``group`` in the number that the sum of losses is divided by."""
        return 1.0

    def require(self, groups: Sequence[Group], seen: Sequence[Example]) -> None:
        """Raises DataError if the training rows do not suit. ``seen``: all examples that were read."""

    def settled(self, groups: Sequence[Group]) -> tuple[Objective, list[Remark]]:
        """The objective with the settings that depend on the training rows filled in, and remarks on them."""
        return self, []

    def twins(
        self, groups: Sequence[Group], salt: int, spares: Sequence[Group], limit: int
    ) -> tuple[list[Group], Counter[str]]:
        """Mismatched pairs, from which `baseline` is measured, and notes with counts.

        spares: more rows to make them from."""
        return [], Counter()

    def baseline(self, pairs: Sequence[Group], logps: np.ndarray) -> tuple[float, dict[str, float]]:
        """What log-ratios are compared with, from the `twins` and their log-probabilities now (S,); and its
        metrics."""
        return 0.0, {}

    def imitated(self, group: Group) -> tuple[bool, ...]:
        """Which sequences are to become likelier. Perplexity is measured on these."""
        return (True,) * len(group.sequences)

    def metrics(self, groups: Sequence[Group], logps: np.ndarray) -> dict[str, float]:
        """Values of `watched` from ``logps`` (S,) float64 of the sequences of ``groups``; those that are
        known."""
        return {}


NOISE = 1e-3
"""Nats within which two log-ratios count as equal: float32 sums differ by so much with the cut into
batches."""


def won(difference: np.ndarray) -> np.ndarray:
    """1 where a difference of log-ratios (nats) is above 0, 0.5 where it is 0 (within NOISE)."""
    return (difference > NOISE) + 0.5 * (np.abs(difference) <= NOISE)


def ranked(higher: np.ndarray, lower: np.ndarray) -> float:
    """Share of all pairs in which the one of ``higher`` is larger; chance is 0.5 (Mann and Whitney 1947)."""
    return float(won(higher[:, None] - lower[None, :]).mean())
