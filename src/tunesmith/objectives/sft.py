"""Supervised fine-tuning: the negative log-likelihood of the learned tokens, every token of weight one counted equally."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import ClassVar, Literal

import mlx.core as mx
import mlx.nn as nn
from pydantic import Field

from tunesmith.batches import Batch, Group
from tunesmith.formats import Demonstration, Example, Judged, Preference
from tunesmith.objectives import LogProbs, Objective, Sums
from tunesmith.template import Row


class SFT(Objective):
    """Learns from demonstrations, from the desirable of judged rows, and from the chosen side of preferences."""

    kind: Literal["sft"] = "sft"
    undesirable: Literal["leave_out", "learn"] = Field(
        default="leave_out", description="rows labelled false: leave_out (counted), or learn them like the others"
    )
    needs_reference: ClassVar[bool] = False

    def select(self, examples: Sequence[Example]) -> tuple[list[Example], Counter[str]]:
        kept = [_chosen(example) for example in examples if self.undesirable == "learn" or not _undesirable(example)]
        return kept, Counter({"undesirable": len(examples) - len(kept)} if len(kept) < len(examples) else {})

    def groups(self, rows: Sequence[Row]) -> list[Group]:
        return [Group((row.tokens,), row.source) for row in rows]

    def loss(self, net: nn.Module, batch: Batch, logprobs: LogProbs) -> Sums:
        weights = mx.array(batch.weights)
        return Sums(-mx.sum(weights * logprobs(net, batch)), mx.sum(weights), {})


def _chosen(example: Example) -> Example:
    if isinstance(example, Preference):
        return Demonstration(example.chosen, source=example.source, metadata=example.metadata)
    return example


def _undesirable(example: Example) -> bool:
    if isinstance(example, Judged):
        return not example.desirable
    return getattr(example, "label", None) is False
