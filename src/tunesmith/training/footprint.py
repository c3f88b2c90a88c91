"""How much memory does an update need, and what else does a run need at other moments? A function of shapes
and settings.

MLX keeps for the backward pass what the gradients of each operation read: the input of each norm, queries,
keys, values and result of attention, gate and up of an MLP, and the input of each trained layer. The factors
below were fitted to the peaks that `bench/plan.py` measures on a Linux CPU."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tunesmith.model.logprobs import CHUNK
from tunesmith.training.anatomy import Anatomy, Projection

LOGIT_COPIES = 4.0
"""Logits, their exponentials, their gradient and its product: float32 arrays of a chunk at once."""
TRAINED_LOGIT_COPIES = 5.5
"""The same if weights in or after the head are trained; between 4 and 6 were measured."""
DISTILLED_LOGIT_COPIES = 5.5
"""Further ones beside the base's logits, its probabilities and their product (three runs of SmolLM2-135M)."""
AHEAD_INNER, AHEAD_WIDTH = 3.0, 8.0
"""Results of a block that nothing reads again and that are not freed yet, since MLX allocates some operations
ahead: in units of the block's widest result and of the hidden states."""
AROUND_HEAD = 4.0
"""Arrays of hidden states at the head: normed, gathered, their gradient, and the block's result."""
STATES = {"adamw": 2, "adam": 2, "adamax": 2, "adadelta": 2, "adafactor": 0.02}
"""Arrays of the size of the trained weights that an optimizer holds; others hold one."""
STEPPING = {"adafactor": 1.95, "sgd": 1.6, "lion": 2.65, "muon": 2.95, "adadelta": 3.05, "adagrad": 2.3}
"""Further arrays of that size while it makes its step, gradients included; others need `STEPPING_ELSE`."""
STEPPING_ELSE = 2.05
STEPPING_LARGEST = 3.4
"""Temporary arrays of the size of the largest trained tensor, beside gradients, if that needs more."""
INSTRUMENTED = 5.0
"""The same beside all others in a step whose changes are measured."""
MEASURING = 3.0
"""Float32 arrays of the largest adapted matrix while the growth of the adapter is measured."""


@dataclass(frozen=True, slots=True)
class Micro:
    """A micro-batch. ``tokens``: positions on the device, padding included; ``learned``: of them, those that
    predict a learned token. ``distilled``: compared with the base, which passes over them too."""

    tokens: int
    learned: int
    distilled: bool = False


@dataclass(frozen=True, slots=True)
class Moment:
    """Bytes above weights, adapter and optimizer state at one moment of a run."""

    name: str
    gradients: float
    activations: float
    logits: float
    other: float = 0.0

    @property
    def total(self) -> float:
        return self.gradients + self.activations + self.logits + self.other


def retained(block: Sequence[Projection]) -> int:
    """Elements that one token leaves in ``block`` for the backward pass."""
    results = sum(part.rows * part.outputs for part in block)
    attended = sum(part.inputs for part in block if part.of_attention)
    magnitudes = sum(part.rows * part.outputs for part in block if part.trained == "magnitudes")
    ranks = sum(part.rows * part.rank for part in block)
    return results + attended + magnitudes + ranks + _read_again(block)


def _read_again(block: Sequence[Projection]) -> int:
    """Elements of the inputs of trained layers: layers side by side share one."""
    inputs = {
        (part.name.rpartition(".")[0], part.inputs, part.of_attention): part.rows * part.inputs
        for part in block
        if part.trained != "no"
    }
    return sum(inputs.values())


def _ahead(anatomy: Anatomy) -> float:
    """Elements of one token that wait to be freed (`AHEAD_INNER`), without those that are kept anyway."""
    block = max(anatomy.blocks, key=retained)
    widest = max((part.rows * part.outputs for part in block), default=0)
    fresh = AHEAD_INNER * widest + AHEAD_WIDTH * anatomy.width
    return max(4.0 * anatomy.width, fresh - max(0, _read_again(block) - anatomy.width))


def logits_bytes(anatomy: Anatomy, micro: Micro) -> float:
    """Of one copy of the logits that exist at once."""
    if not anatomy.separable:
        return 4.0 * micro.tokens * anatomy.vocabulary
    rows = max(1, CHUNK // anatomy.vocabulary // (2 if micro.distilled else 1))
    return 4.0 * min(micro.learned, rows) * anatomy.vocabulary


def training(anatomy: Anatomy, micro: Micro, *, recomputed: bool, several: bool) -> Moment:
    """The moment of forward and backward pass at which most memory is in use. several: whether an update has
    several micro-batches, whose gradients are summed."""
    size, summed = anatomy.element, float(anatomy.gradient_bytes if several else 0)
    above = anatomy.blocks[anatomy.first :]
    blocks = [retained(block) for block in above]
    ahead = size * micro.tokens * _ahead(anatomy)
    stored = float(size * micro.tokens * (anatomy.width * len(above) if recomputed else sum(blocks)))
    hidden = size * AROUND_HEAD * (micro.tokens + micro.learned) / 2 * anatomy.width
    untied = 0.0 if anatomy.tied else 0.5 * anatomy.outside_bytes
    copies = TRAINED_LOGIT_COPIES if anatomy.outside_bytes else LOGIT_COPIES
    copies += DISTILLED_LOGIT_COPIES if micro.distilled else 0.0
    at_head = Moment(
        "the loss of the largest micro-batch",
        summed + untied,
        stored + ahead + hidden,
        copies * logits_bytes(anatomy, micro),
    )
    block = float(size * micro.tokens * max(blocks))
    backward = Moment(
        "the backward pass of the largest micro-batch",
        summed + (anatomy.gradient_bytes / len(above) if recomputed else 0.0),
        stored + (block if recomputed else 0.0) + ahead,
        0.0,
    )
    end = Moment("the end of the backward pass", summed + anatomy.gradient_bytes, block + ahead, 0.0)
    return max((at_head, backward, end), key=lambda moment: moment.total)


def state_bytes(anatomy: Anatomy, optimizer: str) -> float:
    return STATES.get(optimizer, 1) * anatomy.gradient_bytes


def stepping(anatomy: Anatomy, optimizer: str, *, instrumented: bool) -> Moment:
    """The optimizer's own step. instrumented: whether the change of each weight is measured in some of
    them."""
    arrays, largest = STEPPING.get(optimizer, STEPPING_ELSE), anatomy.largest_trained_bytes
    whole = max((arrays - 1) * anatomy.gradient_bytes, STEPPING_LARGEST * largest)
    temporary = INSTRUMENTED * largest if instrumented else 0.0
    return Moment("the optimizer's step", anatomy.gradient_bytes, 0.0, 0.0, whole + temporary)


def scoring(name: str, anatomy: Anatomy, micro: Micro) -> Moment:
    """A pass without gradients over a micro-batch of other rows, such as the held-out ones."""
    ahead = anatomy.element * micro.tokens * (_ahead(anatomy) + AROUND_HEAD * anatomy.width)
    return Moment(name, 0.0, ahead, 0.75 * LOGIT_COPIES * logits_bytes(anatomy, micro))


def sampling(anatomy: Anatomy, rows: int, prompt: int, answer: int) -> Moment:
    """Answers to ``rows`` prompts of up to ``prompt`` tokens, at once: the cache of keys and values, and the
    pass that reads the prompts."""
    cache = rows * (anatomy.cache_fixed + anatomy.cache_bytes * (prompt + answer))
    reading = anatomy.element * rows * prompt * _ahead(anatomy)
    return Moment("sampling", 0.0, reading, 4.0 * 3 * rows * anatomy.vocabulary, float(2 * cache))


def measuring(anatomy: Anatomy) -> Moment:
    """The growth of each adapted matrix, one after the other, in float32."""
    return Moment("measuring the adapter", 0.0, 0.0, 0.0, MEASURING * 4 * anatomy.largest)
