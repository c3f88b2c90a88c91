"""What is minimised. An objective is data (its YAML block) and behaviour (its groups and its loss) in one file.

Losses return sums, never means: accumulation, validation and ranks are then right by construction.
"""

from __future__ import annotations

from abc import abstractmethod
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, NamedTuple

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from tunesmith import kernels, logprobs
from tunesmith.batches import Batch, Group
from tunesmith.config import Spec
from tunesmith.formats import Example
from tunesmith.template import Row

LogProbs = Callable[[nn.Module, Batch], mx.array]


class Sums(NamedTuple):
    """``loss`` () float32: sum over units. ``units`` () float32: what to divide it by. ``metrics``: further sums."""

    loss: mx.array
    units: mx.array
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


def learned_logprobs(net: nn.Module, batch: Batch, *, gather: bool = True) -> mx.array:
    """(K,) float32: log p of each learned token of ``batch`` given those before it in its sequence.

    With ``gather`` only the positions that predict a learned token meet the output projection, in chunks (`logprobs.chosen`), so
    logits are never (N, T, V). A batch with no target gives an empty array.
    """
    targets, flat = mx.array(batch.learned), mx.array(batch.positions)
    if len(targets) == 0:
        return mx.zeros((0,))
    ids = mx.array(batch.tokens)
    options: dict[str, Any] = {} if batch.ends is None else {"cache": kernels.packed(net, batch.ends)}
    options |= {} if batch.states is None else {"input_embeddings": batch.states}
    if gather:
        hidden = logprobs.features(net, ids, **options)
        return logprobs.chosen(net, hidden.reshape(-1, hidden.shape[-1])[flat], targets)
    logits = net(ids, **options)
    return kernels.token_logprobs(logits.reshape(-1, logits.shape[-1])[flat], targets)


def sequence_sums(net: nn.Module, batch: Batch, count: int, *, gather: bool = True) -> list[tuple[float, float]]:
    """(−Σ weight · log p in nats, Σ weight) of the learned tokens of each of ``count`` sequences, added in float64."""
    logps = np.array(learned_logprobs(net, batch, gather=gather), dtype=np.float64)
    weights = np.array(batch.weights, dtype=np.float64)
    losses = np.bincount(batch.rows, -weights * logps, count)
    return list(zip(losses.tolist(), np.bincount(batch.rows, weights, count).tolist(), strict=True))
