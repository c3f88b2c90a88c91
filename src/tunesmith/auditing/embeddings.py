"""Texts as vectors by the user's base model: the mean of the last layer's hidden states over a text's
tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten

from tunesmith.errors import ModelError
from tunesmith.model import abilities, logprobs, vocabulary
from tunesmith.model import loading as model
from tunesmith.tokens.template import Refused, Renderer

TOKENS = 128  # of a text, from its beginning
AT_ONCE = 4096  # tokens in a forward pass, padding included
ARRAYS = 16
"""Hidden states, and outputs of the widest layer, in float32, that are in memory at once at most. Measured
are 9 for SmolLM2-135M and 13 for a model of 64 dimensions, whatever the number of layers and positions."""


def embedder(
    loaded: model.Loaded, renderer: Renderer, tick: Callable[[int, int], None]
) -> Callable[[Sequence[str]], np.ndarray]:
    """A function from n texts to (n, width) float32. Raises ModelError if the model does not expose its
    hidden states."""
    net = loaded.net
    if not abilities.splits(net):
        raise ModelError(
            "this model does not expose its hidden states",
            where=str(loaded.path),
            hint="--no-embed uses TF-IDF instead",
        )

    def embed(texts: Sequence[str]) -> np.ndarray:
        ids = [_ids(renderer, text, vocabulary.limits(net).ids) for text in texts]
        vectors: dict[int, np.ndarray] = {}
        tick(0, len(ids))
        for batch in batches(ids):
            vectors |= dict(zip(batch, means(net, [ids[place] for place in batch]), strict=True))
            tick(len(vectors), len(ids))
        return np.stack([vectors[place] for place in range(len(ids))])

    return embed


def batches(rows: Sequence[Sequence[int]]) -> list[list[int]]:
    """Places of ``rows`` that go through the model together: like with like, since that is little padding."""
    made: list[list[int]] = []
    for place in sorted(range(len(rows)), key=lambda place: len(rows[place])):
        if not made or (len(made[-1]) + 1) * len(rows[place]) > AT_ONCE:
            made.append([])
        made[-1].append(place)
    return made


def _ids(renderer: Renderer, text: str, known: int) -> list[int]:
    """At least one id, all below ``known`` (`tokenisation` reports the others). A text that cannot be encoded
    as text (`content` reports it) becomes the end token alone."""
    try:
        ids = renderer.text_prompt(text)[:TOKENS]
    except Refused:
        ids = []
    return [token for token in ids or [renderer.eos_ids[0]] if token < known] or [0]


def position_bytes(net: model.nn.Module) -> int:
    """Bytes, besides the weights, that `means` needs at most for each position, padding included. For models
    where `abilities.splits` holds."""
    width = logprobs.features(net, mx.zeros((1, 1), mx.int32)).shape[-1]  # never computed
    n_ids = vocabulary.limits(net).ids
    weights: list[tuple[str, mx.array]] = tree_flatten(net.parameters())  # type: ignore[assignment]  # a list
    outputs = [weight.shape[-2] for _, weight in weights if weight.ndim > 1]
    widest = max((size for size in outputs if size != n_ids), default=width)
    return ARRAYS * 4 * (width + widest)


def means(net: model.nn.Module, rows: Sequence[Sequence[int]]) -> np.ndarray:
    """(N, D): the mean of the hidden states of each row. Padding stands at the end, where causal attention
    keeps it away from the tokens that count."""
    longest = max(map(len, rows))
    ids = mx.array([[*row] + [0] * (longest - len(row)) for row in rows], dtype=mx.int32)
    counted = mx.array([[1.0] * len(row) + [0.0] * (longest - len(row)) for row in rows])
    with model.evaluating(net):
        hidden = logprobs.features(net, ids).astype(mx.float32)
        means = (hidden * counted[..., None]).sum(axis=1) / counted.sum(axis=1, keepdims=True)
        mx.eval(means)
    return np.array(means)
