"""What is minimised. An objective is data (its YAML block) and behaviour (its rows and its loss) in one file.

Every objective here is a function of one number a sequence, Σ weight · log p over its learned tokens, so all
of them share one way through the model, chunked head, packing and compiled steps included. Losses are sums
over units, never means: accumulation, validation and ranks are then right by construction."""

from __future__ import annotations

from abc import abstractmethod
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, NamedTuple

import mlx.core as mx
import numpy as np

from tunesmith.data.formats import Example
from tunesmith.settings.config import Spec
from tunesmith.tokens.batches import Group
from tunesmith.tokens.template import Row


class Selected(NamedTuple):
    """``left_out``: with the reason. ``notes``: what was done to rows that their author may not expect, with
    counts."""

    examples: list[Example]
    left_out: list[tuple[Example, str]]
    notes: Counter[str]


class Objective(Spec):
    """Abstract. A concrete objective is final and has a ``kind``."""

    needs_reference: ClassVar[bool] = False
    unit: ClassVar[str] = "nats a learned token"
    """What the loss is: its unit, and what it is a mean over."""
    suits: ClassVar[Mapping[str, Any]] = {}
    """Defaults of other settings under this objective: key path → value."""
    watched: ClassVar[tuple[str, ...]] = ()
    """Names of `metrics`; the first two are the rewards of what is to be learned and of what is to be
    avoided."""

    @abstractmethod
    def select(self, examples: Sequence[Example]) -> Selected:
        """The examples that this objective can learn from."""

    @abstractmethod
    def groups(self, rows: Sequence[Row]) -> list[Group]:
        """Rows put together as they must stay together in a micro-batch."""

    @abstractmethod
    def fields(self, groups: Sequence[Group], baseline: float) -> np.ndarray:
        """(S, F) what `losses` needs to know of each sequence. ``baseline``: the number of the update that
        `twins` gave."""

    @abstractmethod
    def losses(self, logps: mx.array, fields: mx.array) -> mx.array:
        """(S,) float32 Σ weight · log p of each sequence and its fields → (U,) losses; their sum is
        minimised."""

    def units(self, group: Group) -> float:
        """What the sum of the losses of ``group`` is divided by."""
        return 1.0

    def require(self, groups: Sequence[Group], seen: Sequence[Example]) -> None:
        """Raises DataError where the training rows cannot serve. ``seen``: what was read."""

    def settled(self, groups: Sequence[Group]) -> tuple[Objective, list[str]]:
        """With what depends on the training rows filled in, and what is to be said of it: remarks, warnings
        marked by ``!``."""
        return self, []

    def twins(
        self, groups: Sequence[Group], salt: int, spares: Sequence[Group], limit: int
    ) -> tuple[list[Group], Counter[str]]:
        """Sequences beside the rows of an update whose log-ratio to the reference is the update's baseline;
        none: 0.

        spares: more rows to make them from. And what there is to count.
        """
        return [], Counter()

    def imitated(self, group: Group) -> tuple[bool, ...]:
        """Which sequences are to become likelier: perplexity is theirs."""
        return (True,) * len(group.sequences)

    def metrics(self, groups: Sequence[Group], logps: np.ndarray) -> dict[str, float]:
        """Some of `watched`, of ``logps`` (S,) float64 over the sequences of ``groups``."""
        return {}


NOISE = 1e-3
"""Nats within which two log-ratios are taken as equal: sums of float32 differ so much by how rows are cut."""


def won(difference: np.ndarray) -> np.ndarray:
    """1 where a difference of log-ratios in nats is above 0, 0.5 where it is none."""
    return (difference > NOISE) + 0.5 * (np.abs(difference) <= NOISE)


def ranked(higher: np.ndarray, lower: np.ndarray) -> float:
    """Share of all pairs of one of each in which ``higher`` is larger; chance is 0.5 (Mann and Whitney
    1947)."""
    return float(won(higher[:, None] - lower[None, :]).mean())
