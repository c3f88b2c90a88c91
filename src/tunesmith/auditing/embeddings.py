"""Texts as vectors by the user's base model: the mean of the last layer's hidden states over a text's
tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import mlx.core as mx
import numpy as np

from tunesmith.errors import ModelError
from tunesmith.model import abilities, logprobs, vocabulary
from tunesmith.model import loading as model
from tunesmith.tokens.template import Refused, Renderer

TOKENS = 128  # of a text, from its beginning
AT_ONCE = 4096  # tokens in a forward pass, padding included


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
        batch: list[int] = []
        tick(0, len(ids))
        for place in sorted(
            range(len(ids)), key=lambda place: len(ids[place])
        ):  # like with like: little padding
            if batch and (len(batch) + 1) * len(ids[place]) > AT_ONCE:
                vectors |= dict(zip(batch, _means(net, [ids[member] for member in batch]), strict=True))
                tick(len(vectors), len(ids))
                batch = []
            batch.append(place)
        vectors |= (
            dict(zip(batch, _means(net, [ids[member] for member in batch]), strict=True)) if batch else {}
        )
        tick(len(ids), len(ids))
        return np.stack([vectors[place] for place in range(len(ids))])

    return embed


def _ids(renderer: Renderer, text: str, known: int) -> list[int]:
    """At least one id, all below ``known`` (`tokenisation` reports the others). A text that cannot be encoded
    as text (`content` reports it) becomes the end token alone."""
    try:
        ids = renderer.text_prompt(text)[:TOKENS]
    except Refused:
        ids = []
    return [token for token in ids or [renderer.eos_ids[0]] if token < known] or [0]


def _means(net: model.nn.Module, rows: list[list[int]]) -> np.ndarray:
    """(N, D). Padding stands at the end, where causal attention keeps it away from the tokens that count."""
    longest = max(map(len, rows))
    ids = mx.array([row + [0] * (longest - len(row)) for row in rows], dtype=mx.int32)
    counted = mx.array([[1.0] * len(row) + [0.0] * (longest - len(row)) for row in rows])
    with model.evaluating(net):
        hidden = logprobs.features(net, ids).astype(mx.float32)
        means = (hidden * counted[..., None]).sum(axis=1) / counted.sum(axis=1, keepdims=True)
        mx.eval(means)
    return np.array(means)
