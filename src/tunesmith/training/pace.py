"""How long does an update take? A function of shapes, settings and the measured rate of matrix products.

Time is that of the products, at a share of the rate that depends on nothing but the kernels, and that of
passes over the activations. Fitted to `bench/plan.py` on a Linux CPU; two measured updates correct it
(`trial`)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

from tunesmith.tokens.batches import PER_CALL
from tunesmith.training.anatomy import Anatomy, Projection
from tunesmith.training.footprint import Micro, retained

PRODUCT_SHARE = 0.75
"""Share of the rate of large products that those of an update reach."""
READ_BYTES = 5e9
"""Bytes of weights that a step of generation reads in a second."""
ELEMENT_S = 3.9e-9
"""Seconds for each kept element: norms, activations and sums, forward and backward."""
ATTENTION_BACKWARD = 2.5
"""Products of attention's backward pass for each of its forward pass."""
EXPERT_SHARE = 0.1
"""Rate of products of routed experts, whose rows are few, as a share of the others'."""


@dataclass(frozen=True)
class UpdatePace:
    """``rate``: floating-point operations a second of large matrix products. ``share``: of the rate that the
    products of an update reach. ``correction``: measured over computed time, 1 if nothing was measured."""

    anatomy: Anatomy
    recomputed: bool
    rate: float
    share: float = PRODUCT_SHARE
    correction: float = 1.0

    def update(self, micros: Sequence[tuple[Micro, int]]) -> float:
        """Seconds of an update of these micro-batches, each with the length of its rows."""
        return sum(self.micro(micro, length) for micro, length in micros)

    def micro(self, micro: Micro, length: int) -> float:
        """Seconds forward and backward."""
        work, tokens = self._training, micro.tokens + PER_CALL
        products = tokens * (work.products + length * work.attention)
        elements = tokens * work.elements
        seconds = self._seconds(
            products, elements, self._head_rows(micro), 4 if self.anatomy.outside_bytes else 2
        )
        return seconds + (self._base(micro, length) if micro.distilled else 0.0)

    def _base(self, micro: Micro, length: int) -> float:
        """Seconds of the base's pass over a distilled micro-batch; layers below the adapter are shared."""
        work, tokens = _forward(self.anatomy.blocks[self.anatomy.first :]), micro.tokens + PER_CALL
        products = tokens * (work.products + length * work.attention)
        return self._seconds(products, tokens * work.elements, self._head_rows(micro), 1)

    def scoring(self, micro: Micro, length: int) -> float:
        """Seconds of a pass without gradients."""
        work, tokens = self._forward, micro.tokens + PER_CALL
        products = tokens * (work.products + length * work.attention)
        return self._seconds(products, tokens * work.elements, self._head_rows(micro), 1)

    def generating(self, answer: int) -> float:
        """Seconds of ``answer`` steps of generation, each of which reads all weights once."""
        return answer * self.correction * self.anatomy.weights_bytes / READ_BYTES

    def _head_rows(self, micro: Micro) -> int:
        return micro.learned if self.anatomy.separable else micro.tokens

    def _seconds(self, products: float, elements: float, head_rows: int, passes: int) -> float:
        logits = head_rows * self.anatomy.vocabulary
        products += 2.0 * passes * self.anatomy.width * logits
        seconds = products / (self.rate * self.share) + ELEMENT_S * (elements + 2 * passes * logits)
        return self.correction * seconds

    @cached_property
    def _forward(self) -> _Work:
        return _forward(self.anatomy.blocks)

    @cached_property
    def _training(self) -> _Work:
        """Forward in all blocks, backward from the lowest trained one on, and forward again if blocks are
        recomputed."""
        above = self.anatomy.blocks[self.anatomy.first :]
        again = 1 if self.recomputed else 0
        multiplied = sum(2.0 * _multiplied(block) for block in above)
        attended = sum(_attended(block) for block in above)
        elements = sum(retained(block) for block in above)
        trained = sum(_trained(part) for block in above for part in block)
        return _Work(
            self._forward.products + (1 + again) * multiplied + trained,
            self._forward.attention + (ATTENTION_BACKWARD + again) * attended,
            self._forward.elements + (0.6 + 0.4 * again) * elements,
        )


class _Work(NamedTuple):
    """Of one token: operations of products; those of attention for each token of its row; elements."""

    products: float
    attention: float
    elements: float


def _forward(blocks: Sequence[Sequence[Projection]]) -> _Work:
    return _Work(
        sum(2.0 * _multiplied(block) for block in blocks),
        sum(_attended(block) for block in blocks),
        sum(0.4 * retained(block) for block in blocks),
    )


def _multiplied(block: Sequence[Projection]) -> float:
    """Weights that one token meets in ``block``, those of routed experts at their own rate."""
    return sum(part.weights * part.rows / (EXPERT_SHARE if part.held > 1 else 1.0) for part in block)


def _attended(block: Sequence[Projection]) -> float:
    """Operations of causal attention for each token, by each token of its row."""
    return sum(2.0 * part.inputs for part in block if part.of_attention)


def _trained(part: Projection) -> float:
    """Operations for each token of a trained layer beside those of a frozen one."""
    if part.trained == "full":
        return 2.0 * part.weights * part.rows
    return (
        (8.0 if part.trained == "magnitudes" else 6.0) * part.rank * (part.inputs + part.outputs) * part.rows
    )
