"""Supervised fine-tuning: the negative log-likelihood of the learned tokens, every token of weight one
counted equally."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import ClassVar, Literal

import mlx.core as mx
import numpy as np
from pydantic import Field

from tunesmith.data.formats import Demonstration, Example, Judged, Preference
from tunesmith.learning.objective import Objective, Selected
from tunesmith.tokens.batches import Group
from tunesmith.tokens.template import Row

PAIRS = "pairs of which only the chosen answer is learned: objective=dpo compares both"


class SFT(Objective):
    """Learns from demonstrations, from the desirable of judged rows, and from the chosen side of
    preferences."""

    kind: Literal["sft"] = "sft"
    hints: ClassVar[Mapping[str, str]] = {
        "undesirable": "objective=kto learns from both labels, objective.undesirable=learn imitates all"
    }
    learns_prompts: ClassVar[bool] = True
    sums_tokens: ClassVar[bool] = True
    undesirable: Literal["leave_out", "learn"] = Field(
        default="leave_out",
        description="rows labelled bad: leave_out (counted), or learn them like the others",
        json_schema_extra={"when": "learn only if the labels are to be ignored"},
    )

    def select(self, examples: Sequence[Example]) -> Selected:
        left = [example for example in examples if self.undesirable == "leave_out" and _undesirable(example)]
        out = {id(example) for example in left}
        chosen = [_chosen(example) for example in examples if id(example) not in out]
        pairs = sum(isinstance(example, Preference) for example in examples)
        notes = Counter({PAIRS: pairs} if pairs else {})
        return Selected(chosen, [(example, "undesirable") for example in left], notes)

    def groups(self, rows: Sequence[Row]) -> list[Group]:
        return [Group((row.tokens,), row.source) for row in rows]

    def units(self, group: Group) -> float:
        return group.units

    def fields(self, groups: Sequence[Group], baseline: float) -> np.ndarray:
        return np.zeros((len(groups), 1))

    def losses(self, logps: mx.array, fields: mx.array) -> mx.array:
        return -logps


def _chosen(example: Example) -> Example:
    if isinstance(example, Preference):
        return Demonstration(example.chosen, source=example.source, metadata=example.metadata)
    return example


def _undesirable(example: Example) -> bool:
    if isinstance(example, Judged):
        return not example.desirable
    return getattr(example, "label", None) is False
