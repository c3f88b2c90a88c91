"""What an update computes, layer by layer, from the shapes of a model with its adapter.

No weight is read: the shapes are in the headers of the files, and MLX builds the model of them without
evaluating it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from tunesmith.adapters import AdapterLayer, DoRALinear
from tunesmith.adapters.experts import DoRAExperts, is_experts
from tunesmith.adapters.layers import Linear, dims
from tunesmith.adapters.specs import blocks_of
from tunesmith.engine import caches
from tunesmith.engine.caches import CacheGrowth
from tunesmith.model import bodies, logprobs

OUTPUT_PROJECTIONS = ("o_proj", "out_proj", "dense", "wo", "c_proj")
"""What architectures call the layer that reads the result of attention."""
CHOSEN = ("num_experts_per_tok", "num_experts_per_token", "experts_per_token", "moe_topk", "top_k_experts")
"""What config.json calls the number of experts that a token is sent to."""

Trained = Literal["no", "low rank", "magnitudes", "full"]


@dataclass(frozen=True, slots=True)
class Projection:
    """A linear layer, or a layer of routed experts, in a block. ``rows``: rows that it multiplies for each
    token: the number of experts that a token is sent to, else 1. ``held``: experts in memory. ``rank``: of
    the update, 0 without one. ``trained``: "magnitudes" is DoRA."""

    name: str
    inputs: int
    outputs: int
    rows: int
    held: int
    trained: Trained
    rank: int

    @property
    def of_attention(self) -> bool:
        """Whether it reads the result of attention."""
        parent, _, name = self.name.rpartition(".")
        return name in OUTPUT_PROJECTIONS and "mlp" not in parent and "expert" not in parent

    @property
    def weights(self) -> int:
        """Of one expert."""
        return self.inputs * self.outputs


@dataclass(frozen=True, slots=True)
class Anatomy:
    """``width``: of the hidden states; ``vocabulary``: logits of a position. ``blocks``: the projections of
    each block; ``first``: the lowest block with a trainable tensor. ``weights_bytes``, ``adapter_bytes``:
    what is frozen, and what is trained; ``gradient_bytes``: its gradients, which are summed in float32, as
    the optimizer's state is; ``outside_bytes``: what is trained outside of the blocks. ``tied``:
    whether the head is the embedding. ``element``: bytes of an element of the activations. ``cache_bytes``,
    ``cache_fixed``: keys and values of a token in generation, and of a row. ``largest``: elements of the
    largest matrix that is adapted; ``largest_trained_bytes``: of one tensor. ``separable``: whether body and
    head can be called apart. ``recurrent``: whether a block has no attention."""

    width: int
    vocabulary: int
    blocks: tuple[tuple[Projection, ...], ...]
    first: int
    weights_bytes: int
    adapter_bytes: int
    gradient_bytes: int
    outside_bytes: int
    tied: bool
    element: int
    cache_bytes: int
    cache_fixed: int
    largest: int
    largest_trained_bytes: int
    separable: bool
    recurrent: bool

    @property
    def active_weights(self) -> int:
        """Weights of the blocks that one token meets."""
        return sum(part.weights * part.rows for block in self.blocks for part in block)

    @property
    def held_weights(self) -> int:
        """Weights of the blocks in memory, all experts included."""
        return sum(part.weights * part.held for block in self.blocks for part in block)


def of(net: nn.Module, settings: Mapping[str, Any]) -> Anatomy:
    """net: with its adapter attached, evaluated or not. settings: its config.json."""
    trainable: Any = tree_flatten(net.trainable_parameters())
    trained = {name: value.nbytes for name, value in trainable}
    prefixes = blocks_of(net)
    chosen = _chosen(settings)
    projections = _projections(net, chosen)
    blocks = tuple(tuple(part for part in projections if part.name.startswith(prefix)) for prefix in prefixes)
    levels = [
        level for level, prefix in enumerate(prefixes) if any(name.startswith(prefix) for name in trained)
    ]
    outside = {name: size for name, size in trained.items() if not name.startswith(tuple(prefixes))}
    feeds_blocks = any("embed" in name or "wte" in name for name in outside)
    ids = mx.zeros((1, 1), mx.int32)
    hidden = None
    try:
        hidden = logprobs.features(net, ids)
        n_logits = logprobs.head(net, hidden[0]).shape[-1]
    except (KeyError, TypeError, ValueError, AttributeError, IndexError):
        n_logits = net(ids).shape[-1]
    width = hidden.shape[-1] if hidden is not None else max(part.inputs for part in blocks[0])
    growths = _cache_growth(net)
    adapted = [part.weights for part in projections if part.trained in ("low rank", "magnitudes")]
    flat: Any = tree_flatten(net.parameters())
    adapter_bytes = sum(trained.values())
    return Anatomy(
        width,
        n_logits,
        blocks,
        0 if feeds_blocks or not levels else min(levels),
        sum(value.nbytes for _, value in flat) - adapter_bytes,
        adapter_bytes,
        sum(4 * value.size for _, value in trainable),
        sum(outside.values()),
        "lm_head" not in bodies.text_model(net) or bodies.text_model(net)["lm_head"] is None,
        (hidden if hidden is not None else net(ids)).dtype.size,
        sum(growth.each for growth in growths),
        sum(growth.fixed for growth in growths),
        max(adapted, default=0),
        max(trained.values(), default=0),
        hidden is not None,
        any(not any(part.of_attention for part in block) for block in blocks),
    )


def _cache_growth(net: nn.Module) -> list[CacheGrowth]:
    """Empty for an architecture whose cache cannot be tried without weights."""
    try:
        return caches.growth(net, None)
    except (KeyError, TypeError, ValueError, AttributeError, IndexError):
        return []


def _chosen(settings: Mapping[str, Any]) -> int:
    """The number of experts that a token is sent to; 1 if config.json does not say it."""
    text = settings.get("text_config")
    for part in (settings, text if isinstance(text, Mapping) else {}):
        for key in CHOSEN:
            if isinstance(part.get(key), int):
                return part[key]
    return 1


def _projections(net: nn.Module, chosen: int) -> list[Projection]:
    """All linear layers and layers of experts of ``net``."""
    parts: list[Projection] = []
    adapters: tuple[str, ...] = ()
    for name, module in sorted(net.named_modules(), key=lambda pair: pair[0]):
        if isinstance(module, AdapterLayer):
            adapters = (*adapters, f"{name}.")
            dora = isinstance(module, DoRALinear | DoRAExperts)
            rank = module.lora_a.shape[-2] if is_experts(module.linear) else module.lora_a.shape[-1]
            parts.append(_projection(name, module.linear, chosen, "magnitudes" if dora else "low rank", rank))
        elif (isinstance(module, Linear) or is_experts(module)) and not name.startswith(adapters or ("\0",)):
            full = bool(tree_flatten(module.trainable_parameters()))
            parts.append(_projection(name, module, chosen, "full" if full else "no", 0))
    return parts


def _projection(name: str, linear: nn.Module, chosen: int, trained: Trained, rank: int) -> Projection:
    inputs, outputs = dims(linear)
    experts = len(linear["weight"]) if is_experts(linear) else 1
    return Projection(name, inputs, outputs, min(chosen, experts), experts, trained, rank)
