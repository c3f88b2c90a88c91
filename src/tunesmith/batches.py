"""Which rows make which update: a pure function of (seed, step), so that a cursor of one integer is the whole state.

An epoch is a permutation of all groups, cut into updates of ``sequences`` groups; the last update of an epoch is smaller
when the division leaves a rest, so no group is ever left out. Inside an update, groups are sorted by length and cut into
micro-batches, which takes most of the padding away and changes no sum.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from pydantic import Field, model_validator

from tunesmith.config import Spec
from tunesmith.template import Tokens


class BatchSpec(Spec):
    """How many rows an update learns from, and how they are cut for the device."""

    sequences: int = Field(default=8, ge=1, description="rows of one optimizer update")
    micro: int | None = Field(
        default=None, ge=1, description="rows on the device at once; null: 2. Changes memory and speed, not the result"
    )
    length: int = Field(default=4096, ge=8, description="longest row, in tokens; template.too_long says what happens beyond")

    @model_validator(mode="after")
    def _micro_fits(self) -> BatchSpec:
        if self.micro is not None and self.micro > self.sequences:
            raise ValueError(f"micro ({self.micro}) is larger than sequences ({self.sequences})")
        return self

    @property
    def at_once(self) -> int:
        return self.micro or min(2, self.sequences)


class Group(NamedTuple):
    """Sequences that must stay together in a micro-batch: one row for SFT, chosen and rejected for DPO."""

    sequences: tuple[Tokens, ...]
    source: str

    @property
    def length(self) -> int:
        return max(len(sequence.ids) for sequence in self.sequences)

    @property
    def tokens(self) -> int:
        return sum(len(sequence.ids) for sequence in self.sequences)

    @property
    def units(self) -> float:
        """Sum of the weights of the learned tokens. The first token has nothing before it and is never learned."""
        return float(sum(sequence.targets[1:].sum() for sequence in self.sequences))


class Batch(NamedTuple):
    """``tokens`` (N, T) int32, ``targets`` (N, T) float32: padded on the right, the padding never a target."""

    tokens: np.ndarray
    targets: np.ndarray


def collate(groups: Sequence[Group]) -> Batch:
    """All sequences of ``groups`` in order, padded on the right with token 0 and target 0."""
    sequences = [sequence for group in groups for sequence in group.sequences]
    length = max(len(sequence.ids) for sequence in sequences)
    tokens = np.zeros((len(sequences), length), dtype=np.int32)
    targets = np.zeros((len(sequences), length), dtype=np.float32)
    for row, sequence in enumerate(sequences):
        tokens[row, : len(sequence.ids)] = sequence.ids
        targets[row, : len(sequence.ids)] = sequence.targets
    return Batch(tokens, targets)


@dataclass(frozen=True)
class Plan:
    """The whole schedule of a run.

    lengths: tokens of each group. epochs: may be a fraction. steps: if given, overrides ``epochs``.
    """

    lengths: tuple[int, ...]
    sequences: int
    micro: int
    seed: int
    epochs: float = 1.0
    max_steps: int | None = None

    @property
    def steps_per_epoch(self) -> int:
        return math.ceil(len(self.lengths) / self.sequences)

    @property
    def steps(self) -> int:
        """Optimizer updates of the run."""
        return self.max_steps if self.max_steps is not None else math.ceil(self.epochs * self.steps_per_epoch)

    def order(self, epoch: int) -> np.ndarray:
        """(n,) the permutation of all groups for ``epoch``."""
        return np.random.Generator(np.random.PCG64([self.seed, epoch])).permutation(len(self.lengths))

    def update(self, step: int) -> list[list[int]]:
        """The micro-batches of update ``step`` (from 0) as indices of groups, the longest first."""
        epoch, position = divmod(step, self.steps_per_epoch)
        members = self.order(epoch)[position * self.sequences : (position + 1) * self.sequences]
        # Longest first: the peak of memory, and a failure for want of it, come at once.
        ordered = sorted((int(member) for member in members), key=lambda member: (-self.lengths[member], member))
        return cut(ordered, self.micro)

    def padding_share(self) -> float:
        """Share of the positions on the device in the first epoch (or the run, if shorter) that are padding."""
        used = padded = 0
        for step in range(min(self.steps, self.steps_per_epoch)):
            for micro in self.update(step):
                used += sum(self.lengths[member] for member in micro)
                padded += len(micro) * max(self.lengths[member] for member in micro)
        return 1 - used / padded if padded else 0.0


def cut(members: Sequence[int], size: int) -> list[list[int]]:
    """``members`` in runs of ``size``, the last one shorter when it must be."""
    return [list(members[start : start + size]) for start in range(0, len(members), size)]


def by_length(lengths: Sequence[int], size: int) -> list[list[int]]:
    """All indices once, like with like, in runs of ``size``: the order of validation."""
    return cut(sorted(range(len(lengths)), key=lambda index: (-lengths[index], index)), size)
