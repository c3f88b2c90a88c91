"""What is minimised. An objective is data (its YAML block) and behaviour (its rows and its loss) in one file.

Every objective here is a function of one number a sequence, Σ weight · log p over its learned tokens, so all
of them share one way through the model, chunked head, packing and compiled steps included. Losses are sums
over units, never means: accumulation, validation and ranks are then right by construction."""

from __future__ import annotations

from abc import abstractmethod
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, NamedTuple

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from tunesmith.data.formats import Example
from tunesmith.model import kernels, logprobs
from tunesmith.settings.config import Spec
from tunesmith.tokens.batches import Batch, Group
from tunesmith.tokens.template import Row

LogProbs = Callable[[nn.Module, Batch], mx.array]


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


def learned_logprobs(
    net: nn.Module, batch: Batch, *, gather: bool = True, prompt: list[kernels.Prompt] | None = None
) -> mx.array:
    """(K,) float32: log p of each learned token of ``batch`` given those before it in its sequence, and
    ``prompt`` before all.

    With ``gather`` only the positions that predict a learned token meet the output projection, in chunks
    (`logprobs.chosen`), so logits are never (N, T, V). A batch with no target gives an empty array."""
    targets, flat = mx.array(batch.learned), mx.array(batch.positions)
    if len(targets) == 0:
        return mx.zeros((0,))
    ids = mx.array(batch.tokens)
    options: dict[str, Any] = {} if prompt is None else {"cache": prompt}
    options |= {} if batch.ends is None else {"cache": kernels.packed(net, batch.ends)}
    options |= {} if batch.states is None else {"input_embeddings": batch.states}
    if gather:
        hidden = logprobs.features(net, ids, **options)
        return logprobs.chosen(net, hidden.reshape(-1, hidden.shape[-1])[flat], targets)
    logits = net(ids, **options)
    return kernels.token_logprobs(logits.reshape(-1, logits.shape[-1])[flat], targets)


def sequence_logps(net: nn.Module, batch: Batch, of_batch: LogProbs = learned_logprobs) -> mx.array:
    """(S,) float32: Σ weight · log p over the learned tokens of each sequence.

    Summed as a product with who owns which token: a scatter would add in no fixed order on a GPU, and runs
    would not resume to the byte."""
    owner = mx.array(batch.rows)[None] == mx.arange(len(batch.fields))[:, None]
    return mx.where(owner, mx.array(batch.weights) * of_batch(net, batch), 0).sum(axis=1)


def sequence_sums(
    net: nn.Module, batch: Batch, *, gather: bool = True, prompt: list[kernels.Prompt] | None = None
) -> list[tuple[float, float]]:
    """(Σ weight · log p in nats, Σ weight) of the learned tokens of each sequence, added in float64."""
    logps = np.array(learned_logprobs(net, batch, gather=gather, prompt=prompt), dtype=np.float64)
    count = len(batch.fields)
    weights = np.array(batch.weights, dtype=np.float64)
    sums = np.bincount(batch.rows, weights * logps, count)
    return list(zip(sums.tolist(), np.bincount(batch.rows, weights, count).tolist(), strict=True))


NOISE = 1e-3
"""Nats within which two log-ratios are taken as equal: sums of float32 differ so much by how rows are cut."""


def won(difference: np.ndarray) -> np.ndarray:
    """1 where a difference of log-ratios in nats is above 0, 0.5 where it is none."""
    return (difference > NOISE) + 0.5 * (np.abs(difference) <= NOISE)


def ranked(higher: np.ndarray, lower: np.ndarray) -> float:
    """Share of all pairs of one of each in which ``higher`` is larger; chance is 0.5 (Mann and Whitney
    1947)."""
    return float(won(higher[:, None] - lower[None, :]).mean())
