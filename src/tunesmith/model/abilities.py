"""What a model can do besides a plain pass: each ability is tried on a few tokens, once for a model.

Architectures differ (sliding windows, recurrent layers, bodies of another name), and no field of config.json
says which shortcut gives the same numbers as the plain way. So both ways are computed and compared."""

from __future__ import annotations

import functools
from collections.abc import Callable

import mlx.core as mx
import mlx.nn as nn

from tunesmith.model import kernels, logprobs
from tunesmith.model.loading import evaluating

TOLERANCE = 1e-3
"""Largest difference, as a share of the largest value, between two ways to compute the same."""


def agree(
    net: nn.Module, both: Callable[[], tuple[mx.array, mx.array]], tolerance: float = TOLERANCE
) -> bool:
    """Whether the two arrays that ``both`` computes with ``net``, in evaluation mode, are equal within
    ``tolerance``; False if the architecture cannot compute one of them."""
    with evaluating(net):
        try:
            shortcut, plain = (values.astype(mx.float32) for values in both())
        except (KeyError, TypeError, ValueError, AttributeError, IndexError):
            return False
        if shortcut.shape != plain.shape:
            return False
        return bool(mx.abs(plain - shortcut).max() <= tolerance * mx.abs(plain).max())


def once(trial: Callable[[nn.Module], bool]) -> Callable[[nn.Module], bool]:
    """``trial``, whose result is kept with the model."""

    @functools.wraps(trial)
    def remembered(net: nn.Module) -> bool:
        answers: dict[str, bool] = vars(net).setdefault("_abilities", {})
        if trial.__name__ not in answers:
            answers[trial.__name__] = trial(net)
        return answers[trial.__name__]

    return remembered


@once
def splits(net: nn.Module) -> bool:
    """Whether head and body can be called apart: head(features(x)) = net(x). False if `bodies` does not find
    the body."""
    ids = mx.arange(8, dtype=mx.int32)[None]
    return agree(net, lambda: (logprobs.head(net, logprobs.features(net, ids)[0]), net(ids)[0]))


@once
def packs(net: nn.Module) -> bool:
    """Whether rows laid end to end give each row's own hidden states."""
    first, second = mx.array([[3, 1, 4, 1, 5]]), mx.array([[2, 7, 1]])

    def both() -> tuple[mx.array, mx.array]:
        packed = net(mx.concatenate([first, second], axis=1), cache=kernels.packed(net, (5, 8)))
        return packed, mx.concatenate([net(first), net(second)], axis=1)

    return agree(net, both)


@once
def continues(net: nn.Module) -> bool:
    """Whether several answers after cached prompts, one or two at once, give what each gives after its whole
    prompt."""
    prompts, answers = mx.array([[3, 1, 4], [2, 7, 1]]), mx.array([[1, 5, 9, 2], [6, 5, 3, 5], [8, 9, 7, 9]])

    def both() -> tuple[mx.array, mx.array]:
        parts: list[mx.array] = []
        wholes: list[mx.array] = []
        for first, rows in (prompts[:1], [0, 0, 0]), (prompts, [1, 0, 1]):
            cache = kernels.prompt(net, first)
            parts.append(net(answers, cache=cache if len(first) == 1 else kernels.each_after(cache, rows)))
            wholes.append(net(mx.concatenate([first[mx.array(rows)], answers], axis=1))[:, first.shape[1] :])
        return mx.concatenate(parts), mx.concatenate(wholes)

    return agree(net, both)
