"""Optimizers of MLX behind one spec, the learning-rate schedule, clipping, and the optimizer's state as named
tensors.

``step`` is one optimizer update everywhere.

Weight decay falls on matrices only, never on vectors such as norms and biases (the usual grouping of
transformers' trainer). It is decoupled (arXiv 1711.05101) but for SGD and Muon, where MLX adds it to the
gradient.

State and updates are float32, whatever the weights are held in."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Annotated, Any, Literal

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
from mlx.utils import tree_flatten, tree_map, tree_unflatten
from pydantic import Field, model_validator

from tunesmith.settings.config import Sensible, Spec

# What each optimizer of MLX takes beside the learning rate.
_TAKES: dict[str, tuple[Callable[..., optim.Optimizer], frozenset[str]]] = {
    "adamw": (optim.AdamW, frozenset({"betas", "eps", "weight_decay"})),
    "adam": (optim.Adam, frozenset({"betas", "eps"})),
    "adamax": (optim.Adamax, frozenset({"betas", "eps"})),
    "adagrad": (optim.Adagrad, frozenset({"eps"})),
    "adadelta": (optim.AdaDelta, frozenset({"eps"})),
    "rmsprop": (optim.RMSprop, frozenset({"eps"})),
    # With its own step size switched off: the rate of the schedule is the rate that is used.
    "adafactor": (
        partial(optim.Adafactor, relative_step=False, scale_parameter=False),
        frozenset({"weight_decay"}),
    ),
    "lion": (optim.Lion, frozenset({"betas", "weight_decay"})),
    "sgd": (optim.SGD, frozenset({"momentum", "weight_decay"})),
    "muon": (optim.Muon, frozenset({"momentum", "weight_decay"})),
}


Beta = Annotated[float, Field(ge=0, lt=1)]


class OptimizerSpec(Spec):
    """How weights move."""

    kind: Literal[
        "adamw", "adam", "adamax", "adagrad", "adadelta", "rmsprop", "adafactor", "lion", "sgd", "muon"
    ] = Field(
        default="adamw",
        description="rule by which gradients become changes",
        json_schema_extra={"when": "adafactor or sgd if the optimizer's state does not fit in memory"},
    )
    learning_rate: Annotated[float, Field(gt=0), Sensible(ge=1e-12, le=100)] = Field(
        default=1e-4,
        description="peak learning rate; LoRA likes 1e-4 to 2e-4",
        json_schema_extra={"when": "first of all: `tunesmith probe` finds it; a tenth for full weights"},
    )
    schedule: Literal["cosine", "linear", "constant"] = Field(
        default="cosine",
        description="from the peak after warm-up towards final_share of it at the end",
        json_schema_extra={"when": "constant if you will train further from the end of the run"},
    )
    warmup_steps: int | None = Field(
        default=None,
        ge=0,
        description="updates of linear warm-up; else warmup_share",
        json_schema_extra={"when": "more if the loss jumps in the first updates"},
    )
    warmup_share: float | None = Field(
        default=None,
        ge=0,
        le=1,
        description="warm-up as a share of all updates",
        json_schema_extra={"when": "instead of warmup_steps, if the number of updates is not known"},
    )
    final_share: float = Field(
        default=0.0,
        ge=0,
        le=1,
        description="learning rate at the end as a share of the peak",
        json_schema_extra={"when": "above 0 if another run will continue this one"},
    )
    max_norm: float | None = Field(
        default=1.0,
        gt=0,
        description="clip the global gradient norm here; null: never",
        json_schema_extra={"when": "lower if single rows throw the loss off"},
    )
    weight_decay: float | None = Field(
        default=None,
        ge=0,
        description="adamw, adafactor, lion, sgd, muon; on matrices only",
        json_schema_extra={"when": "above 0 against overfitting in long runs"},
    )
    betas: tuple[Beta, Beta] | None = Field(
        default=None,
        description="adam, adamw, adamax, lion; null: MLX's default",
        json_schema_extra={
            "when": "a smaller second one if the loss has spikes: large gradients are forgotten sooner"
        },
    )
    eps: float | None = Field(
        default=None,
        gt=0,
        description="adam, adamw, adamax, adagrad, adadelta, rmsprop; null: MLX's default",
        json_schema_extra={"when": "to repeat another program's run"},
    )
    momentum: float | None = Field(
        default=None,
        ge=0,
        lt=1,
        description="sgd, muon; null: MLX's default",
        json_schema_extra={"when": "to repeat another program's run"},
    )

    @model_validator(mode="after")
    def _consistent(self) -> OptimizerSpec:
        if self.warmup_steps is not None and self.warmup_share is not None:
            raise ValueError("warmup_steps and warmup_share are both given; leave one out")
        for name in ("betas", "eps", "momentum", "weight_decay"):
            if getattr(self, name) is not None and name not in _TAKES[self.kind][1]:
                raise ValueError(
                    f"{self.kind} takes no {name}; it takes {', '.join(sorted(_TAKES[self.kind][1]))}"
                )
        return self

    def warmup(self, steps: int) -> int:
        """Updates of warm-up in a run of ``steps``."""
        if self.warmup_steps is not None:
            return self.warmup_steps
        return math.ceil((self.warmup_share or 0.0) * steps)

    def rate(self, step: int, steps: int) -> float:
        """Learning rate of update ``step`` (from 0) of ``steps``.

        As in transformers' ``get_cosine_schedule_with_warmup`` and ``get_linear_schedule_with_warmup``, with
        one shift: the warm-up counts from 1, so that the first update is not wasted on a rate of zero."""
        warmup = self.warmup(steps)
        if step < warmup:
            return self.learning_rate * (step + 1) / warmup
        if self.schedule == "constant":
            return self.learning_rate
        share = min(1.0, (step - warmup) / max(1, steps - warmup))
        remaining = 0.5 * (1 + math.cos(math.pi * share)) if self.schedule == "cosine" else 1 - share
        return self.learning_rate * (self.final_share + (1 - self.final_share) * remaining)


def build(spec: OptimizerSpec, net: nn.Module) -> optim.Optimizer:
    """The optimizer with its state initialised for the trainable tensors of ``net``, and for no other."""

    def make(weight_decay: float | None) -> optim.Optimizer:
        kind, takes = _TAKES[spec.kind]
        options: dict[str, Any] = {
            name: getattr(spec, name) for name in takes - {"weight_decay"} if getattr(spec, name) is not None
        }
        if "weight_decay" in takes:
            options["weight_decay"] = weight_decay or 0.0
        if spec.kind in ("adam", "adamw"):
            options["bias_correction"] = True  # as in the paper and in torch; MLX leaves it out by default
        return kind(learning_rate=spec.learning_rate, **options)

    if spec.weight_decay:
        optimizer = optim.MultiOptimizer(
            [make(spec.weight_decay), make(0.0)], [lambda name, weight: weight.ndim >= 2]
        )
    else:
        optimizer = make(0.0)
    optimizer.init(wide(net.trainable_parameters()))
    return optimizer


def wide(tree: dict) -> dict:
    """Every leaf in float32: sums of 16-bit gradients and the moments of 16-bit weights are kept in it."""
    return tree_map(lambda leaf: leaf.astype(mx.float32), tree)


def move(optimizer: optim.Optimizer, net: nn.Module, gradients: dict, rate: float) -> None:
    """One update in place, not evaluated. It is computed in float32; a 16-bit weight is then rounded to its
    dtype, so that a change below half of its last bit is lost."""
    members = optimizer.optimizers if isinstance(optimizer, optim.MultiOptimizer) else [optimizer]
    for member in members:
        member.learning_rate = rate
    weights = net.trainable_parameters()
    changed = optimizer.apply_gradients(gradients, wide(weights))
    net.update(tree_map(lambda new, old: new.astype(old.dtype), changed, weights))


def apply(optimizer: optim.Optimizer, net: nn.Module, gradients: dict, rate: float) -> None:
    """One update in place, evaluated."""
    move(optimizer, net, gradients, rate)
    mx.eval(net.trainable_parameters(), optimizer.state)


def global_norm(gradients: dict) -> mx.array:
    """() float32: the Euclidean norm over every leaf, inside lists too."""
    leaves: list[Any] = [leaf for _, leaf in tree_flatten(gradients)]
    squares = [mx.sum(mx.square(leaf.astype(mx.float32))) for leaf in leaves]
    return mx.sqrt(mx.sum(mx.stack(squares)))


def clip(gradients: dict, norm: mx.array, max_norm: float) -> dict:
    """Gradients scaled so that their global norm is at most ``max_norm`` (as
    ``torch.nn.utils.clip_grad_norm_``)."""
    scale = mx.minimum(1.0, max_norm / (norm + 1e-6))
    return tree_map(lambda leaf: leaf * scale, gradients)


def state(optimizer: optim.Optimizer) -> dict[str, np.ndarray]:
    """The state as named arrays, for a safetensors file."""
    return {name: np.array(value) for name, value in tree_flatten(optimizer.state)}


def restore(optimizer: optim.Optimizer, tensors: dict[str, np.ndarray]) -> None:
    """Put back what ``state`` gave. Raises KeyError naming the tensors that do not match."""
    expected = {name for name, _ in tree_flatten(optimizer.state)}
    if expected != set(tensors):
        raise KeyError(", ".join(sorted(expected ^ set(tensors))))
    optimizer.state = tree_unflatten([(name, mx.array(value)) for name, value in tensors.items()])
    mx.eval(optimizer.state)
