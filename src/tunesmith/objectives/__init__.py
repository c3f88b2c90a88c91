"""What is minimised. An objective is data (its YAML block) and behaviour (its groups and its loss) in one file.

Losses return sums, never means: accumulation, validation and ranks are then right by construction.
"""

from __future__ import annotations

from abc import abstractmethod
from collections import Counter
from collections.abc import Callable, Sequence
from typing import ClassVar, NamedTuple

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from tunesmith import model
from tunesmith.batches import Batch, Group
from tunesmith.config import Spec
from tunesmith.formats import Example
from tunesmith.template import Row

LogProbs = Callable[[nn.Module, Batch], "tuple[mx.array, mx.array]"]


class Sums(NamedTuple):
    """``loss`` () float32: sum over units. ``units``: what to divide it by. ``metrics``: further sums."""

    loss: mx.array
    units: float
    metrics: dict[str, mx.array]


class Objective(Spec):
    """Abstract. A concrete objective is final and has a ``kind``."""

    needs_reference: ClassVar[bool]

    @abstractmethod
    def select(self, examples: Sequence[Example]) -> tuple[list[Example], Counter[str]]:
        """The examples that this objective can learn from, and how many it leaves out for which reason."""

    @abstractmethod
    def groups(self, rows: Sequence[Row]) -> list[Group]:
        """Rows put together as they must stay together in a micro-batch."""

    @abstractmethod
    def loss(self, net: nn.Module, batch: Batch, logprobs: LogProbs) -> Sums:
        """The sum of the loss over the units of ``batch``."""


def learned_logprobs(net: nn.Module, batch: Batch, *, gather: bool = True) -> tuple[mx.array, mx.array]:
    """log p of each learned token given those before it, and its weight: (K,) float32 and (K,) float32.

    The only place where positions shift: ``batch.targets[n, t]`` marks token ``t`` by its own index, and its log-probability
    is read from the position before. With ``gather`` only the positions that predict a learned token meet the output
    projection, so logits are (K, V) instead of (N, T, V). A batch with no target gives two empty arrays.
    """
    rows, positions = np.nonzero(batch.targets[:, 1:])
    weights = mx.array(batch.targets[:, 1:][rows, positions])
    if len(rows) == 0:
        return mx.zeros((0,)), weights
    inputs = mx.array(batch.tokens[:, :-1])
    flat = mx.array(rows * inputs.shape[1] + positions)
    if gather:
        hidden = model.features(net, inputs)
        logits = model.head(net, hidden.reshape(-1, hidden.shape[-1])[flat])
    else:
        logits = net(inputs)
        logits = logits.reshape(-1, logits.shape[-1])[flat]
    targets = mx.array(batch.tokens[:, 1:][rows, positions])
    return -mx.fast.cross_entropy(logits.astype(mx.float32), targets), weights


def sequence_sums(net: nn.Module, batch: Batch, *, gather: bool = True) -> list[tuple[float, float]]:
    """(−Σ weight · log p in nats, Σ weight) of the learned tokens of each sequence of ``batch``, added in float64."""
    logps, weights = learned_logprobs(net, batch, gather=gather)
    rows = np.nonzero(batch.targets[:, 1:])[0]
    count = len(batch.tokens)
    weight = np.array(weights, dtype=np.float64)
    losses = np.bincount(rows, -weight * np.array(logps, dtype=np.float64), count)
    return list(zip(losses.tolist(), np.bincount(rows, weight, count).tolist(), strict=True))
