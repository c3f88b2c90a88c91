"""How much does each column of a matrix matter? The mean square of its input over the run's own training
rows, which llama.cpp calls the importance matrix: quantisation then errs least where the inputs are large."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from tunesmith import adapters, events
from tunesmith.adapters import merging
from tunesmith.adapters.layers import LoRALinear
from tunesmith.events import Notice, Sink
from tunesmith.exports import training_rows
from tunesmith.exports.kind import Importance, Tuned
from tunesmith.exports.weights import INSIDE
from tunesmith.model import abilities, logprobs, wrap

TOKENS = 1 << 14
"""Tokens that are measured at most."""
FLOOR = 1e-6
"""Least weight of a column, as a share of the mean of its matrix: a column that no row used still has values
that another text may use."""


def of_run(tuned: Tuned, kind: str, instead: str, notify: Sink) -> Importance:
    """That of ``tuned``, if it is known; else measure the live adapter on training rows in the order of the
    first epoch. Raises ExportError, in the name of ``kind``, if the rows cannot be made again. instead: what
    to do then."""
    if tuned.importance is not None:
        return tuned.importance
    prepared = training_rows.prepare(tuned.run, tuned.config, kind, instead, events.silent)
    sequences = [
        sequence.ids[:-1].tolist()  # nothing is predicted from the last token
        for group in training_rows.first_epoch(prepared)
        for sequence in group.sequences
    ]
    chosen = first_tokens(sequences, TOKENS)
    notify(Notice(f"measuring the inputs of each matrix on {len(chosen)} training rows"))
    net = merging.load(tuned.located).net
    adapters.load(net, tuned.checkpoint)
    columns = mean_squares(net, chosen, events.ticker(notify, "training rows"))
    return Importance(columns, len(chosen), sum(map(len, chosen)))


def first_tokens(sequences: Sequence[list[int]], limit: int) -> list[list[int]]:
    """The first sequences, together of at most ``limit`` tokens; the last one may be cut."""
    chosen: list[list[int]] = []
    left = limit
    for ids in sequences:
        if left == 0:
            break
        if ids:
            chosen.append(ids[:left])
            left -= len(chosen[-1])
    return chosen


def mean_squares(
    net: nn.Module,
    sequences: Sequence[list[int]],
    tick: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, np.ndarray]:
    """By the name of the weight of each linear layer, the mean square of each of its inputs. tick: called
    with the number of sequences that are done, and of all."""
    layers = _linear_layers(net)
    names = {id(layer): name.removeprefix(INSIDE) for name, layer in layers.items()}
    sums: dict[str, mx.array] = {}
    counts: dict[str, int] = {}

    def measured(kind: type[nn.Module]) -> Callable[..., Any]:
        plain: Any = kind.__call__

        def call(layer: nn.Module, x: mx.array) -> mx.array:
            name = f"{names[id(layer)]}.weight"
            rows = x.reshape(-1, x.shape[-1]).astype(mx.float32)
            sums[name] = sums.get(name, mx.zeros(rows.shape[-1])) + mx.square(rows).sum(axis=0)
            counts[name] = counts.get(name, 0) + len(rows)
            return plain(layer, x)

        return call

    net.eval()
    splits = abilities.splits(net)
    with wrap.replaced(layers.values(), measured):
        for done, ids in enumerate(sequences, start=1):
            row = mx.array(ids)[None]
            mx.eval(logprobs.features(net, row) if splits else net(row), sums)
            tick(done, len(sequences))
    return {name: _weights(np.array(sums[name]) / counts[name]) for name in sums}


def _linear_layers(net: nn.Module) -> dict[str, nn.Module]:
    """The layers of one matrix, by name; of an adapted layer the adapter, not the layer inside it."""
    layers: dict[str, nn.Module] = {}
    for name, module in net.named_modules():
        owner = name.rpartition(".")[0]
        if owner not in layers and _is_linear(module):
            layers[name] = module
    return layers


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear | nn.QuantizedLinear | LoRALinear)


def _weights(means: np.ndarray) -> np.ndarray:
    return np.maximum(means, FLOOR * means.mean())
