"""Log-probabilities of given tokens from hidden states, without ever holding the logits of a whole batch.

Only positions that predict a learned token come here. They meet the output projection in chunks, and each
chunk's gradient is made beside its value (cross-entropy's gradient is known as soon as its softmax is), so
that logits live for one chunk. The way from hidden states to logits is the model's own code with its body
left out: tied or quantised heads, adapters on the head, scaled and soft-capped logits come out as the model
makes them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten, tree_unflatten

from tunesmith.model import bodies, kernels
from tunesmith.tokens.batches import Batch

LogProbs = Callable[[nn.Module, Batch], mx.array]
AsBase = Callable[[], AbstractContextManager[None]]
"""Inside it, a model with an adapter computes what its base does."""
CHUNK = 1 << 24  # logits at once: 64 MiB in float32


class _ComputedBody:
    """Stands for the body of a model: returns hidden states that were computed earlier, and has the body's
    weights for a tied head."""

    def __init__(self, body: Any, hidden: mx.array) -> None:
        self._body, self._hidden = body, hidden

    def __call__(self, *args: Any, **options: Any) -> mx.array:
        return self._hidden

    def __getattr__(self, name: str) -> Any:
        return getattr(self._body, name)


class _HeadOnly:
    """A text model whose body is a `_ComputedBody`."""

    def __init__(self, net: nn.Module, hidden: mx.array) -> None:
        self._net = net
        setattr(self, bodies.body_name(net), _ComputedBody(bodies.body(net), hidden))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._net, name)

    def __contains__(self, name: str) -> bool:
        return name in self._net


def features(net: nn.Module, ids: mx.array, **options: Any) -> mx.array:
    """(N, T) int32 → (N, T, D): hidden states after the last norm. For models where
    `abilities.splits` holds."""
    return bodies.body(net)(ids, **({"cache": None} | options))


def head(net: nn.Module, hidden: mx.array) -> mx.array:
    """(K, D) → (K, V) logits by the model's own code. For models where `abilities.splits` holds."""
    text = bodies.text_model(net)
    code: Any = type(text).__call__
    return code(_HeadOnly(text, hidden[None]), mx.zeros((1, len(hidden)), mx.int32))[0]


def chosen(net: nn.Module, hidden: mx.array, targets: mx.array) -> mx.array:
    """(K,) float32 log p of ``targets`` (K,) given ``hidden`` (K, D). For models where `abilities.splits`
    holds."""
    return _Chunks(net, targets, _rows_at_once(net, hidden), kernels.token_logprobs)(hidden)


def likeness(net: nn.Module, hidden: mx.array, base_hidden: mx.array, as_base: AsBase) -> mx.array:
    """(K,) float32 −KL(base‖net) in nats of the next token's probabilities, given ``hidden`` (K, D) of
    ``net`` and of its base; 0 where they are the same. Only ``net`` gets a gradient. For models where
    `abilities.splits` holds."""

    def compared(logits: mx.array, base_hidden: mx.array) -> mx.array:
        with as_base():
            base = head(net, base_hidden)
        return -kernels.divergences(base, logits)

    # Half as many at once: there are two sets of logits.
    chunks = _Chunks(net, base_hidden, max(1, _rows_at_once(net, hidden) // 2), compared)
    return chunks(hidden)


def _rows_at_once(net: nn.Module, hidden: mx.array) -> int:
    return max(1, CHUNK // head(net, hidden[:1]).shape[-1])


@dataclass
class _Chunks:
    """The positions of a batch, ``rows`` of them at a time. ``of_logits``: logits (k, V), the rows of
    ``targets`` (K, …) for them → (k,) the value of each position."""

    net: nn.Module
    targets: mx.array
    rows: int
    of_logits: Callable[[mx.array, mx.array], mx.array]

    def __call__(self, hidden: mx.array) -> mx.array:
        if not self.net.training:  # nobody will ask for the gradient
            return self.in_turn(hidden)
        names, weights = _trainable(self.net)
        return self.with_trained_head(hidden, names, weights) if names else self.with_frozen_head(hidden)

    @property
    def starts(self) -> range:
        return range(0, len(self.targets), self.rows)

    def part(self, values: mx.array, start: int) -> mx.array:
        return values[start : start + self.rows]

    def values(self, hidden: mx.array, start: int) -> mx.array:
        return self.of_logits(head(self.net, hidden), self.part(self.targets, start))

    def in_turn(self, hidden: mx.array) -> mx.array:
        values: list[mx.array] = []
        for start in self.starts:
            values.append(self.values(_after(self.part(hidden, start), values[-1:]), start))
        return mx.concatenate(values)

    def with_frozen_head(self, hidden: mx.array) -> mx.array:
        """Each chunk's gradient is made beside its value."""

        def forward(hidden: mx.array) -> tuple[mx.array, mx.array]:
            """The values, and the gradient of their sum: rows do not mix, so it is each value's own."""
            values: list[mx.array] = []
            slopes: list[mx.array] = []
            for start in self.starts:
                part = _after(self.part(hidden, start), [*values[-1:], *slopes[-1:]])
                (value,), (slope,) = mx.vjp(
                    lambda part, start=start: self.values(part, start), [part], [mx.ones(part.shape[:1])]
                )
                values.append(value)
                slopes.append(slope)
            return mx.concatenate(values), mx.concatenate(slopes)

        def backward(
            primal: mx.array, cotangents: tuple[mx.array, mx.array], results: tuple[mx.array, mx.array]
        ) -> mx.array:
            return (cotangents[0][:, None] * results[1]).astype(primal.dtype)

        return kernels.with_gradient(forward, backward)(hidden)[0]

    def with_trained_head(self, hidden: mx.array, names: list[str], weights: list[mx.array]) -> mx.array:
        """Each chunk is computed again in the backward pass: the gradient of the weights needs the cotangent,
        which is not known before."""

        text = bodies.text_model(self.net)

        def place(weights: Sequence[mx.array]) -> None:
            text.update(tree_unflatten(list(zip(names, weights, strict=True))))

        def forward(hidden: mx.array, *weights: mx.array) -> mx.array:
            place(weights)
            return self.in_turn(hidden)

        def backward(
            primals: tuple[mx.array, ...], cotangent: mx.array, result: mx.array
        ) -> tuple[mx.array, ...]:
            hidden, *weights = primals
            slopes: list[mx.array] = []
            sums: list[mx.array] = []
            for start in self.starts:
                part = _after(self.part(hidden, start), [*slopes[-1:], *sums])

                def run(part: mx.array, *weights: mx.array, start: int = start) -> mx.array:
                    place(weights)
                    return self.values(part, start)

                _, (slope, *own) = mx.vjp(run, [part, *weights], [self.part(cotangent, start)])
                slopes.append(slope)
                sums = [total + gradient for total, gradient in zip(sums, own, strict=True)] if sums else own
            place(weights)
            return mx.concatenate(slopes), *sums

        values = kernels.with_gradient(forward, backward)(hidden, *weights)
        place(weights)
        return values


def _after(part: mx.array, made: list[mx.array]) -> mx.array:
    """``part``, but not before ``made``: the logits of one chunk are free before the next are made."""
    later: Any = mx.depends(part, made) if made else part
    return later


def learned_logprobs(
    net: nn.Module, batch: Batch, *, gather: bool = True, prompt: list[kernels.PromptCache] | None = None
) -> mx.array:
    """(K,) float32: log p of each learned token of ``batch`` given ``prompt`` and the tokens before it.

    With ``gather`` only the positions that predict a learned token go through the output projection, in
    chunks (`chosen`), so that logits are never (N, T, V). A batch without learned tokens gives an empty
    array."""
    targets = mx.array(batch.learned)
    if len(targets) == 0:
        return mx.zeros((0,))
    if gather:
        return chosen(net, _learned_rows(features, net, batch, prompt), targets)
    return kernels.token_logprobs(_learned_rows(_logits, net, batch, prompt), targets)


def learned_likeness(net: nn.Module, batch: Batch, as_base: AsBase, *, gather: bool = True) -> mx.array:
    """(K,) float32: −KL(base‖net) in nats where `learned_logprobs` has log p of a learned token: what both
    give to every token there."""
    if len(batch.learned) == 0:
        return mx.zeros((0,))
    compute = features if gather else _logits
    with as_base():
        of_base = mx.stop_gradient(_learned_rows(compute, net, batch))
    own = _learned_rows(compute, net, batch)
    return likeness(net, own, of_base, as_base) if gather else -kernels.divergences(of_base, own)


def _logits(net: nn.Module, ids: mx.array, **options: Any) -> mx.array:
    return net(ids, **options)


def _learned_rows(
    compute: Callable[..., mx.array],
    net: nn.Module,
    batch: Batch,
    prompt: list[kernels.PromptCache] | None = None,
) -> mx.array:
    """(K, …) what ``compute`` gives of ``net`` (N, T, …) at the positions that predict a learned token."""
    options: dict[str, Any] = {} if prompt is None else {"cache": prompt}
    options |= {} if batch.ends is None else {"cache": kernels.packed(net, batch.ends)}
    values, flat = compute(net, mx.array(batch.tokens), **options), mx.array(batch.positions)
    rows = values.reshape(-1, values.shape[-1])
    return _different_rows(rows, flat) if _rising(batch.positions) else rows[flat]


def _take_rows(values: mx.array, places: mx.array) -> mx.array:
    return values[places]


def _take_rows_vjp(
    primals: tuple[mx.array, mx.array], cotangent: mx.array, result: mx.array
) -> tuple[mx.array, mx.array]:
    """Each row of the gradient is looked up. MLX's own gradient adds on one thread, element by element."""
    values, places = primals
    count = len(places)
    none = mx.full((len(values),), count, dtype=mx.int32)
    source = mx.put_along_axis(none, places, mx.arange(count, dtype=mx.int32), axis=0)
    padded = mx.concatenate([cotangent, mx.zeros((1, cotangent.shape[1]), cotangent.dtype)])
    return padded[source], mx.zeros_like(places)


_different_rows = kernels.with_gradient(_take_rows, _take_rows_vjp)
"""values (N, D), places (K,) without repetition → (K, D)"""


def _rising(positions: object) -> bool:
    """Whether no position is there twice; a batch that was rounded up repeats one, and in a compiled step the
    positions are not known."""
    return isinstance(positions, np.ndarray) and bool((np.diff(positions) > 0).all())


def sequence_logps(net: nn.Module, batch: Batch, of_batch: LogProbs = learned_logprobs) -> mx.array:
    """(S,) float32: Σ weight · log p over the learned tokens of each sequence.

    Summed by a product with a one-hot matrix: a scatter adds in no fixed order on a GPU, and runs would not
    resume to the same bytes."""
    owner = mx.array(batch.rows)[None] == mx.arange(len(batch.fields))[:, None]
    return mx.where(owner, mx.array(batch.weights) * of_batch(net, batch), 0).sum(axis=1)


def batch_sums(
    net: nn.Module, batch: Batch, *, gather: bool = True, prompt: list[kernels.PromptCache] | None = None
) -> list[tuple[float, float]]:
    """(Σ weight · log p in nats, Σ weight) of the learned tokens of each sequence, summed in float64."""
    logps = np.array(learned_logprobs(net, batch, gather=gather, prompt=prompt), dtype=np.float64)
    count = len(batch.fields)
    weights = np.array(batch.weights, dtype=np.float64)
    sums = np.bincount(batch.rows, weights * logps, count)
    return list(zip(sums.tolist(), np.bincount(batch.rows, weights, count).tolist(), strict=True))


def _trainable(net: nn.Module) -> tuple[list[str], list[mx.array]]:
    """The trainable tensors that the head may use: those outside the blocks, as the text model names them."""
    flat: Any = tree_flatten(bodies.text_model(net).trainable_parameters())
    blocks = bodies.block_prefixes(net)
    outside = [(name, value) for name, value in flat if not name.startswith(blocks)]
    return [name for name, _ in outside], [value for _, value in outside]
