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


PADDED = {mx.float32: 5e-5, mx.float16: 1e-2, mx.bfloat16: 5e-2}
"""The same for batched answers, by dtype. In float32 rounding gives 5e-7, and padding that Nemotron-H reads
as little as 5e-4; in half precision so small an error is below rounding."""


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


def _once(trial: Callable[[nn.Module], bool]) -> Callable[[nn.Module], bool]:
    """``trial``, whose result is cached with the model."""

    @functools.wraps(trial)
    def remembered(net: nn.Module) -> bool:
        answers: dict[str, bool] = vars(net).setdefault("_abilities", {})
        if trial.__name__ not in answers:
            answers[trial.__name__] = trial(net)
        return answers[trial.__name__]

    return remembered


@_once
def splits(net: nn.Module) -> bool:
    """Whether head and body can be called apart: head(features(x)) = net(x). False if `bodies` does not find
    the body."""
    ids = mx.arange(8, dtype=mx.int32)[None]
    return agree(net, lambda: (logprobs.head(net, logprobs.features(net, ids)[0]), net(ids)[0]))


@_once
def packs(net: nn.Module) -> bool:
    """Whether rows laid end to end give each row's own hidden states."""
    first, second = mx.array([[3, 1, 4, 1, 5]]), mx.array([[2, 7, 1]])

    def both() -> tuple[mx.array, mx.array]:
        packed = net(mx.concatenate([first, second], axis=1), cache=kernels.packed(net, (5, 8)))
        return packed, mx.concatenate([net(first), net(second)], axis=1)

    return agree(net, both)


@_once
def continues(net: nn.Module) -> bool:
    """Whether several answers after one cached prompt give what each gives after the whole prompt."""
    prompt, answers = mx.array([[3, 1, 4]]), mx.array([[1, 5, 9, 2], [6, 5, 3, 5]])

    def both() -> tuple[mx.array, mx.array]:
        after = net(answers, cache=kernels.prompt(net, prompt))
        whole = mx.concatenate([mx.broadcast_to(prompt, (2, 3)), answers], axis=1)
        return after, net(whole)[:, 3:]

    return agree(net, both)


PROMPTS = ([3, 1, 4, 1, 5, 9, 2, 6, 5], [2, 7], [1, 8, 2, 8, 1])
"""Prompts of `batches`: of several lengths, so that padding is tried."""
NEW_TOKENS = (2, 4, 3)
"""How many tokens follow each of them, so that rows leave at several times."""


@_once
def batches(net: nn.Module) -> bool:
    """Whether prompts of several lengths, continued in one batch that rows join and leave, get the
    probabilities that each gets alone."""

    def both() -> tuple[mx.array, mx.array]:
        together = _batched(net)
        alone = [_alone(net, prompt, tokens) for prompt, (tokens, _) in zip(PROMPTS, together, strict=True)]
        return mx.concatenate([logprobs for _, logprobs in together]), mx.concatenate(alone)

    return agree(net, both, PADDED[net(mx.zeros((1, 1), mx.int32)).dtype])


def _batched(net: nn.Module) -> list[tuple[list[int], mx.array]]:
    """The new tokens of each of `PROMPTS` and their log-probabilities (T, V), at most two rows at a time."""
    from mlx_lm.generate import BatchGenerator

    stream = mx.default_stream(mx.default_device())
    generator = BatchGenerator(net, completion_batch_size=2, prefill_batch_size=2, stream=stream)
    try:
        numbers = generator.insert(list(PROMPTS), list(NEW_TOKENS))
        tokens: dict[int, list[int]] = {number: [] for number in numbers}
        rows: dict[int, list[mx.array]] = {number: [] for number in numbers}
        while responses := generator.next_generated():
            for response in responses:
                tokens[response.uid].append(response.token)
                rows[response.uid].append(response.logprobs)
    finally:
        generator.close()
    stacked = {number: mx.stack(rows[number]) for number in numbers}
    # MLX's own sum over a long vocabulary is not exact on a CPU.
    return [
        (tokens[number], stacked[number] - kernels.log_sums(stacked[number])[..., None]) for number in numbers
    ]


def _alone(net: nn.Module, prompt: list[int], tokens: list[int]) -> mx.array:
    """(T, V): log-probabilities at the ``tokens`` that follow ``prompt``, one row with a cache of its own."""
    from mlx_lm.models.cache import make_prompt_cache

    cache = make_prompt_cache(net)
    logits = [net(mx.array([prompt]), cache=cache)[0, -1]]
    logits += [net(mx.array([[token]]), cache=cache)[0, -1] for token in tokens[:-1]]
    stacked = mx.stack(logits)
    return stacked - kernels.log_sums(stacked)[..., None]
