"""Which rows make which update: a pure function of (seed, step), so that one integer is the whole state of
the data order.

An epoch is a permutation of all groups, and the first may be in a given order. It is cut into updates of
``sequences`` groups; the last update of an epoch is smaller if the division leaves a rest, so that no group
is left out. Within an update, groups are sorted by length and cut into micro-batches within a budget of
tokens, where padding costs least. How an update is cut does not change its sums."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Annotated, Any, NamedTuple

import numpy as np
from pydantic import Field, model_validator

from tunesmith.settings.config import Sensible, Spec
from tunesmith.tokens.template import Tokens

LOOKED_AT = 10_000
"""Updates that are looked at before a longer run begins, or its first epoch if that has more."""
PER_CALL = 24
"""Fixed cost of one pass over the device, in tokens."""
FORWARD_TOKENS = 512
"""On the device at once where no gradient is computed: matrix products are at full speed from here on."""


class BatchSpec(Spec):
    """How many rows an update learns from, and how they are cut into micro-batches."""

    sequences: Annotated[int, Field(ge=1), Sensible(le=1 << 20)] = Field(
        default=8,
        description="rows an optimizer update",
        json_schema_extra={"when": "more if the loss is noisy; LoRA learns better from batches under 32"},
    )
    micro: int | None = Field(
        default=None,
        ge=1,
        description="most rows on the device at once in training; null: no limit",
        json_schema_extra={"when": "fewer if memory runs out"},
    )
    tokens: int | None = Field(
        default=None,
        ge=8,
        description="tokens on the device at once, padding included; null: those of the longest row, and at "
        f"least {FORWARD_TOKENS} where no gradient is computed. Like micro, changes memory and speed, not "
        "the result",
        json_schema_extra={"when": "fewer if memory runs out, more for speed if there is room"},
    )
    pack: bool = Field(
        default=False,
        description="lay the rows of a micro-batch end to end in one, each attending to itself alone: no "
        "padding",
        json_schema_extra={"when": "for many short rows on a GPU"},
    )
    length: Annotated[int, Field(ge=8), Sensible(le=1 << 24)] = Field(
        default=4096,
        description="longest row, in tokens; template.too_long says what happens beyond",
        json_schema_extra={
            "when": "to the longest row that you need: `tunesmith plan` shows the lengths and what they cost"
        },
    )

    @model_validator(mode="after")
    def _micro_fits(self) -> BatchSpec:
        if self.micro is not None and self.micro > self.sequences:
            raise ValueError(f"micro ({self.micro}) is larger than sequences ({self.sequences})")
        return self


class Group(NamedTuple):
    """Sequences that must stay together in a micro-batch: one row, or chosen and rejected of a pair.

    ``reference``: log p of the learned tokens of each sequence before training, if the objective needs it.
    ``mixed``: it comes from ``data.mix``, not from the task's rows. ``distilled``: the base's probabilities
    are learned instead of the tokens; such groups have micro-batches of their own."""

    sequences: tuple[Tokens, ...]
    source: str
    label: bool | None = None
    reference: tuple[float, ...] = ()
    mixed: bool = False
    distilled: bool = False

    @property
    def length(self) -> int:
        """Positions of the longest sequence on the device: the last token is not fed."""
        return max(1, *(len(sequence.ids) - 1 for sequence in self.sequences))

    @property
    def positions(self) -> int:
        """Positions of all its sequences together."""
        return sum(max(1, len(sequence.ids) - 1) for sequence in self.sequences)

    @property
    def tokens(self) -> int:
        return sum(len(sequence.ids) for sequence in self.sequences)

    @property
    def learned(self) -> tuple[float, ...]:
        """Sum of the weights of the learned tokens of each sequence. The first token is never learned:
        nothing predicts it."""
        return tuple(float(sequence.targets[1:].sum()) for sequence in self.sequences)

    @property
    def n_learned(self) -> int:
        """Number of its learned tokens, whatever their weights."""
        return sum(int(np.count_nonzero(sequence.targets[1:])) for sequence in self.sequences)

    @property
    def units(self) -> float:
        """Sum of the weights of all its learned tokens."""
        return sum(self.learned)


class Batch(NamedTuple):
    """What goes to the device, as numpy or MLX arrays. If ``ends`` is None, rows are padded on the right with
    token 0.

    ``tokens`` (N, T) int32. ``positions`` (K,) int32: places in the flattened (N · T) hidden states that
    predict a learned token, ``learned`` (K,) int32 that token, ``weights`` (K,) float32 its weight, ``rows``
    (K,) int32 its sequence. Past the learned tokens of the batch, weights are 0. ``fields`` (S, F) float32:
    numbers that the objective needs for each sequence. ``ends``: where each sequence of a packed row ends."""

    tokens: Any
    positions: Any
    learned: Any
    weights: Any
    rows: Any
    fields: Any
    ends: tuple[int, ...] | None = None


def collate(
    groups: Sequence[Group], *, pack: bool = False, bucket: bool = False, fields: np.ndarray | None = None
) -> Batch:
    """All sequences of ``groups`` in order, padded or packed; with ``bucket``, to one of few sizes
    (`bucketed`).

    The only place where positions shift: ``targets[t]`` of `Tokens` marks token ``t`` by its own index; it is
    predicted by the hidden state before it. The last token predicts nothing and is left out."""
    sequences = [sequence for group in groups for sequence in group.sequences]
    lengths = [len(sequence.ids) - 1 for sequence in sequences]  # the last token is only ever predicted
    if pack:
        ends = np.cumsum(lengths)
        starts = ends - lengths
        tokens = np.zeros((1, max(1, int(ends[-1]))), dtype=np.int32)
        flat = tokens[0]
    else:
        longest = max(1, *lengths)
        width = bucketed(longest) if bucket else longest
        tokens = np.zeros((len(sequences), width), dtype=np.int32)
        starts, ends, flat = np.arange(len(sequences)) * width, None, tokens.reshape(-1)
    parts: list[tuple[np.ndarray, ...]] = []
    for row, (sequence, start, length) in enumerate(zip(sequences, starts, lengths, strict=True)):
        flat[start : start + length] = sequence.ids[:-1]
        (places,) = np.nonzero(sequence.targets[1:])
        parts.append(
            (
                start + places,
                sequence.ids[1:][places],
                sequence.targets[1:][places],
                np.full(len(places), row),
            )
        )
    positions, learned, weights, rows = (np.concatenate(part) for part in zip(*parts, strict=True))
    spare = (0, bucketed(max(1, len(learned))) - len(learned) if bucket else 0)
    return Batch(
        tokens,
        np.pad(positions, spare).astype(np.int32),
        np.pad(learned, spare).astype(np.int32),
        np.pad(weights, spare).astype(np.float32),
        np.pad(rows, spare).astype(np.int32),
        np.zeros((len(sequences), 1), np.float32) if fields is None else fields.astype(np.float32),
        None if ends is None else tuple(int(end) for end in ends),
    )


def bucketed(size: int) -> int:
    """The next larger of few sizes, in steps of a sixteenth to a thirty-second (at least 8): so that a
    compiled step has few shapes, at about 3 % more padding."""
    step = max(8, 1 << max(0, (size - 1).bit_length() - 5))
    return -(-size // step) * step


def forward_tokens(spec: BatchSpec, longest: int) -> int:
    """Tokens of a pass without gradient (`Cut.forward`) over sequences of which the longest has so many."""
    limit = spec.tokens or max(FORWARD_TOKENS, longest)
    trained = limit if spec.micro is None else spec.micro * longest
    return min(limit, max(FORWARD_TOKENS, trained))


@dataclass(frozen=True)
class Cut:
    """How an update is cut into micro-batches. ``tokens``: the budget of a micro-batch; one group may exceed
    it.

    ``each``: sequences of a group, all padded to the longest of the micro-batch.
    """

    tokens: int
    micro: int | None = None
    pack: bool = False
    bucket: bool = False
    each: int = 1

    @classmethod
    def of(cls, spec: BatchSpec, lengths: Sequence[int], bucket: bool = False, each: int = 1) -> Cut:
        return cls(spec.tokens or each * max(lengths, default=1), spec.micro, spec.pack, bucket, each)

    @classmethod
    def around(
        cls, spec: BatchSpec, groups: Sequence[Group], bucket: bool = False
    ) -> tuple[Cut, tuple[int, ...]]:
        """The cut for ``groups``, and the length of each group: of its longest sequence, or, packed, of all
        of them."""
        each = 1 if spec.pack else max((len(group.sequences) for group in groups), default=1)
        lengths = tuple(group.positions if spec.pack else group.length for group in groups)
        return cls.of(spec, lengths, bucket, each), lengths

    @classmethod
    def forward(cls, spec: BatchSpec, groups: Sequence[Group]) -> Cut:
        """The cut of passes without gradient over the sequences of ``groups``. No layer's activations are
        kept, so that a pass has as many tokens as a micro-batch of training may have, and at least
        `FORWARD_TOKENS`, however few rows ``spec.micro`` allows. ``spec.tokens`` is a limit here too."""
        longest = max((group.length for group in groups), default=1)
        return cls(forward_tokens(spec, longest), None, spec.pack)

    def halved(self, lengths: Sequence[int]) -> Cut | None:
        """A cut whose budget is half the tokens of this micro-batch, or None if it is one row."""
        if len(lengths) == 1:
            return None
        return replace(self, tokens=max(self.each * max(lengths), self.size(lengths) // 2))

    def size(self, lengths: Sequence[int]) -> int:
        """Tokens on the device for rows of these lengths, padding included."""
        return sum(lengths) if self.pack else self._rectangle(len(lengths), max(lengths))

    def _rectangle(self, rows: int, longest: int) -> int:
        return rows * self.each * (bucketed(longest) if self.bucket else longest)

    def _fits(self, rows: int, size: int) -> bool:
        return rows == 1 or (size <= self.tokens and (self.micro is None or rows <= self.micro))

    def __call__(self, lengths: Sequence[int], members: Sequence[int]) -> list[list[int]]:
        """``members`` (indices into ``lengths``), longest first, in micro-batches.

        Padded: the cheapest cut of the sorted groups, where a micro-batch costs its tokens plus PER_CALL.
        Packed: first fit."""
        # Longest first, so that the peak of memory, or out of memory, comes at once.
        ordered = sorted(members, key=lambda member: (-lengths[member], member))
        return self._packed(lengths, ordered) if self.pack else self._padded(lengths, ordered)

    def _packed(self, lengths: Sequence[int], ordered: Sequence[int]) -> list[list[int]]:
        bins: list[list[int]] = []
        for member in ordered:
            for row in bins:
                if self._fits(len(row) + 1, sum(lengths[other] for other in row) + lengths[member]):
                    row.append(member)
                    break
            else:
                bins.append([member])
        return bins

    def _padded(self, lengths: Sequence[int], ordered: Sequence[int]) -> list[list[int]]:
        costs, firsts = [0], [0]  # of the cheapest cut of the first n rows; where its last micro-batch begins
        for end in range(1, len(ordered) + 1):
            options: list[tuple[int, int]] = []
            for first in range(end - 1, -1, -1):
                size = self._rectangle(end - first, lengths[ordered[first]])
                if not self._fits(end - first, size):
                    break
                options.append((costs[first] + size + PER_CALL, first))
            cost, first = min(options)
            costs.append(cost)
            firsts.append(first)
        parts: list[list[int]] = []
        end = len(ordered)
        while end:
            parts.append(list(ordered[firsts[end] : end]))
            end = firsts[end]
        return parts[::-1]


@dataclass(frozen=True)
class Plan:
    """The whole schedule of a run.

    lengths: of each group (`Cut.around`). epochs: may be a fraction. steps: if given, overrides ``epochs``.
    positions: of all sequences of each group together, if that differs from its length. first_epoch: the
    order of all groups in the first epoch, if it is not shuffled. distilled: which groups are (`Group`);
    empty if none."""

    lengths: tuple[int, ...]
    sequences: int
    cut: Cut
    seed: int
    epochs: float = 1.0
    max_steps: int | None = None
    positions: tuple[int, ...] = ()
    first_epoch: np.ndarray | None = field(default=None, compare=False)
    distilled: tuple[bool, ...] = ()

    @property
    def steps_per_epoch(self) -> int:
        return math.ceil(len(self.lengths) / self.sequences)

    @property
    def steps(self) -> int:
        """Optimizer updates of the run."""
        return self.max_steps if self.max_steps is not None else math.ceil(self.epochs * self.steps_per_epoch)

    def order(self, epoch: int) -> np.ndarray:
        """(n,) the permutation of all groups for ``epoch``."""
        if epoch == 0 and self.first_epoch is not None:
            return self.first_epoch
        return _permutation(self.seed, epoch, len(self.lengths))

    def easy_first(self, difficulties: Sequence[float]) -> Plan:
        """This plan with its first epoch in the order of ``difficulties`` (n,), lowest first; groups of equal
        difficulty keep the shuffled order."""
        shuffled = _permutation(self.seed, 0, len(self.lengths))
        order = shuffled[np.argsort(np.array(difficulties)[shuffled], kind="stable")]
        return replace(self, first_epoch=order)

    def members(self, step: int) -> list[int]:
        """The groups of update ``step`` (from 0), by index."""
        epoch, position = divmod(step, self.steps_per_epoch)
        return [
            int(member)
            for member in self.order(epoch)[position * self.sequences : (position + 1) * self.sequences]
        ]

    def update(self, step: int, rank: int = 0, ranks: int = 1) -> list[list[int]]:
        """The micro-batches of update ``step`` for ``rank``, the longest rows first; empty if there are too
        few rows.

        Ranks take turns from the longest row to the shortest, so that they finish together.
        """
        members = sorted(self.members(step), key=lambda member: (-self.lengths[member], member))
        if not self.distilled:
            return self.cut(self.lengths, members[rank::ranks])
        kinds = [[member for member in members if self.distilled[member] is kind] for kind in (False, True)]
        micros = [micro for kind in kinds for micro in self.cut(self.lengths, kind[rank::ranks])]
        return sorted(micros, key=lambda micro: -self.lengths[micro[0]])

    def padding_share(self) -> float:
        """Share of the positions on the device in the first epoch (or the run, if shorter) that are
        padding."""
        used, padded, positions = 0, 0, self.positions or self.lengths
        for step in range(min(self.steps, self.steps_per_epoch)):
            for micro in self.update(step):
                used += sum(positions[member] for member in micro)
                padded += self.cut.size([self.lengths[member] for member in micro])
        return 1 - used / padded if padded else 0.0

    @property
    def looked_at(self) -> range:
        """The updates that are looked at before the run begins: each row is in one of them."""
        return range(min(self.steps, max(LOOKED_AT, self.steps_per_epoch)))

    def largest(self, ranks: int = 1) -> list[int]:
        """The micro-batch with the most tokens on the device of the updates that are looked at, on any
        rank."""
        return max(self.largest_of_each_kind(ranks), key=self._size)

    def largest_of_each_kind(self, ranks: int = 1) -> list[list[int]]:
        """The same for distilled micro-batches and for others: one of the two is the peak of memory."""
        kinds: dict[bool, list[list[int]]] = {}
        for step in self.looked_at:
            for rank in range(ranks):
                for micro in self.update(step, rank, ranks):
                    kind = bool(self.distilled) and self.distilled[micro[0]]
                    kinds[kind] = [max([*kinds.get(kind, []), micro], key=self._size)]
        return [micro for _, (micro,) in sorted(kinds.items())]

    def _size(self, micro: Sequence[int]) -> int:
        return self.cut.size([self.lengths[member] for member in micro])


@functools.lru_cache(maxsize=2)
def _permutation(seed: int, epoch: int, count: int) -> np.ndarray:
    order = np.random.Generator(np.random.PCG64([seed, epoch])).permutation(count)
    order.flags.writeable = False
    return order
