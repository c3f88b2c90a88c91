"""What is trainable: LoRA, DoRA, QA-LoRA or the weights themselves, as settings that attach to a model.

Initial values are functions of (seed, tensor name). In a mixture of experts the routed experts are adapted
like other layers, routers only if a target names them (`mixtures`)."""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from functools import partial
from typing import Any, ClassVar, Literal, NamedTuple, Self

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_unflatten
from pydantic import Field

from tunesmith.adapters.experts import DoRAExperts, LoRAExperts, is_experts
from tunesmith.adapters.layers import (
    DoRALinear,
    Linear,
    LoRALinear,
    QALoRALinear,
    adapted,
    dims,
    group_size,
    key_from,
    trainable,
)
from tunesmith.adapters.mixtures import Mixture
from tunesmith.errors import ConfigError, listing
from tunesmith.events import Notice
from tunesmith.model import vocabulary, wrap
from tunesmith.settings.config import Spec, Texts


class Attached(NamedTuple):
    """``trainable`` and ``total`` count parameters (of a quantised weight, its elements). ``tensors``: the
    sorted names of the trainable ones. ``coverage``: in one line, which layers are adapted and which are
    not."""

    trainable: int
    total: int
    tensors: tuple[str, ...]
    coverage: str = ""
    notices: tuple[Notice, ...] = ()


AUTO, ALL_LINEAR = "auto", "all-linear"
ATTENTION = ("q_proj", "v_proj")
"""What `AUTO` means where every block has them."""

START = (
    "run, checkpoint, or folder that PEFT or mlx-lm saved, whose adapter, of the same shape, is trained "
    "further instead of a new one"
)


DEFAULT_RANK = 16
DTYPES = {"float32": mx.float32, "bfloat16": mx.bfloat16, "float16": mx.float16}


class _LowRank(Spec):
    rank: int = Field(
        DEFAULT_RANK,
        ge=1,
        description="rank of the update, of each expert's own in routed experts; at most the smaller side of "
        "each adapted weight",
        json_schema_extra={
            "when": "higher if the training loss stays high on many rows; lower to save memory"
        },
    )
    alpha: float = Field(
        32.0,
        gt=0,
        description="the update is scaled by alpha / rank",
        json_schema_extra={"when": "rather change learning_rate: both scale the update"},
    )
    dropout: float = Field(
        0.0,
        ge=0,
        lt=1,
        description="share of the branch's inputs set to zero in training",
        json_schema_extra={"when": "above 0 if the validation loss rises while the training loss falls"},
    )
    targets: Texts = Field(
        (AUTO,),
        min_length=1,
        description="linear layers and routed experts by name, suffix (mlp.up_proj) or pattern (*_proj); "
        "all-linear: all of them in the blocks, but no router; auto: q_proj and v_proj, or all-linear if a "
        "block does not have both",
        json_schema_extra={
            "when": "all-linear if q_proj and v_proj learn too little; fewer layers against forgetting"
        },
    )
    layers: int | None = Field(
        None,
        ge=1,
        description="only the last n blocks; null: all",
        json_schema_extra={"when": "fewer to save memory and time, or against forgetting"},
    )
    rank_stabilised: bool = Field(
        False,
        description="scale by alpha / sqrt(rank) instead (arXiv 2312.03732)",
        json_schema_extra={"when": "for large ranks, where alpha / rank makes the update small"},
    )
    dtype: Literal["float32", "bfloat16", "float16"] = Field(
        "float32",
        description="what A and B are held, trained and saved in; the optimizer's state, DoRA's magnitudes "
        "and full_modules stay float32",
        json_schema_extra={
            "when": "bfloat16 halves the adapter's memory and loses small updates: only if memory is short"
        },
    )
    full_modules: Texts = Field(
        (),
        description="modules trained in full beside it, such as input_layernorm",
        json_schema_extra={"when": "to train norms, or the embedding for new tokens, beside the adapter"},
    )
    start: str | None = Field(
        None, description=START, json_schema_extra={"when": "to go on with more or other rows"}
    )
    _layer: ClassVar[type[LoRALinear]]
    _experts: ClassVar[type[LoRAExperts]]

    @property
    def scale(self) -> float:
        """s in W + s·(A·B)ᵀ"""
        return self.alpha / (math.sqrt(self.rank) if self.rank_stabilised else self.rank)

    def settled(self, net: nn.Module) -> Self:
        """With the targets that ``auto`` means for ``net``."""
        if self.targets != (AUTO,):
            return self
        everywhere = all(reached == n_blocks for reached, n_blocks in map(partial(reach, net), ATTENTION))
        return self.model_copy(update={"targets": ATTENTION if everywhere else (ALL_LINEAR,)})

    def attach(
        self, net: nn.Module, seed: int, recorded: Collection[str] | None = None, *, lazily: bool = False
    ) -> Attached:
        """Freeze ``net`` and put adapter layers in place of its targets; A is drawn from (seed, tensor name).

        With ``layers``, a module outside the blocks is reached only by its plain name, not by a pattern.
        recorded: names of the layers that a saved adapter adapts: whether experts, routers and layers one
        output wide are adapted is taken from there. lazily: what is trained is computed, and the base read
        for it, when it is first used. Raises ConfigError and leaves ``net`` as it was if a
        target matches nothing, the rank is too large, a full module is quantised or also adapted, or ``net``
        has adapters already."""
        targets = self.settled(net).targets
        chosen = _select(net, targets, self.layers, "adapter.targets", full=False, recorded=recorded)
        if self._layer is QALoRALinear:
            _require_groups(chosen)
        small = self._too_small(chosen)
        full = _select(net, self.full_modules, self.layers, "adapter.full_modules", full=True)
        if both := sorted(full.keys() & chosen.keys()):
            raise ConfigError(f"{both[0]} is both adapted and trained in full", where="adapter.full_modules")
        mixture = Mixture.of(_adaptable(net))
        net.freeze()
        for name, linear in chosen.items():
            kind = self._experts if name in mixture.experts else self._layer
            layer = kind(linear, self.rank, self.scale, self.dropout, key_from(seed, f"{name}.lora_a"))
            layer.held_in(DTYPES[self.dtype])
            net.update_modules(tree_unflatten([(name, layer)]))
            if not lazily:
                mx.eval(layer.trainable_parameters())  # of DoRA: one expanded weight at a time
        notices = (*small, *mixture.notices(chosen, dora=self._layer is DoRALinear))
        return _unfreeze(net, full, lazily)._replace(coverage=mixture.coverage(chosen), notices=notices)

    def _too_small(self, chosen: Mapping[str, nn.Module]) -> list[Notice]:
        """A notice if the rank is more than some of the layers can hold. Raises ConfigError if it was set to
        such a value, which the default was not."""
        sides = {name: self._layer.sides(linear) for name, linear in chosen.items()}
        small = {name: sizes for name, sizes in sides.items() if min(sizes) < self.rank}
        if not small:
            return []
        name, sizes = next(iter(small.items()))
        if self.rank > DEFAULT_RANK:
            message = f"rank {self.rank} is more than {name} (in, out = {sizes}) can hold"
            raise ConfigError(message, where="adapter.rank", hint="a smaller rank, or other adapter.targets")
        text = f"rank {self.rank} is more than some adapted layers can hold: {name} (in, out = {sizes}) has "
        text += f"an update of rank {min(sizes)} at most, and more parameters than it needs"
        return [Notice(text, count=len(small), where="adapter.rank")]


class LoRA(_LowRank):
    """A frozen base with a low-rank update beside chosen linear layers; over a quantised base it is QLoRA."""

    kind: Literal["lora"] = "lora"
    _layer: ClassVar[type[LoRALinear]] = LoRALinear
    _experts: ClassVar[type[LoRAExperts]] = LoRAExperts


class DoRA(_LowRank):
    """LoRA with a learned magnitude for each output row: closer to full training at low ranks, slower."""

    kind: Literal["dora"] = "dora"
    _layer: ClassVar[type[LoRALinear]] = DoRALinear
    _experts: ClassVar[type[LoRAExperts]] = DoRAExperts


class QALoRA(_LowRank):
    """LoRA over a quantised base that reads sums over quantisation groups: it is merged into the base at its
    own bits, without loss."""

    kind: Literal["qalora"] = "qalora"
    _layer: ClassVar[type[LoRALinear]] = QALoRALinear
    _experts: ClassVar[type[LoRAExperts]] = LoRAExperts


class Full(Spec):
    """The weights themselves, in float32."""

    targets: Texts = Field(
        ("*",),
        min_length=1,
        description="modules by name or pattern, with everything inside them",
        json_schema_extra={"when": "to train only some modules"},
    )
    layers: int | None = Field(
        None,
        ge=1,
        description="only the last n blocks; null: all",
        json_schema_extra={"when": "fewer to save memory and time, or against forgetting"},
    )
    start: str | None = Field(
        None, description=START, json_schema_extra={"when": "to go on with more or other rows"}
    )
    kind: Literal["full"] = "full"

    def settled(self, net: nn.Module) -> Self:
        """As it is: its targets are the same for every model."""
        return self

    def attach(
        self, net: nn.Module, seed: int, recorded: Collection[str] | None = None, *, lazily: bool = False
    ) -> Attached:
        """Freeze ``net`` except the targets, which become float32. No random number is drawn, and
        ``recorded`` means nothing. lazily, and what is raised: as for `LoRA.attach`."""
        full = _select(net, self.targets, self.layers, "adapter.targets", full=True)
        net.freeze()
        return _unfreeze(net, full, lazily)._replace(coverage=f"{len(full)} modules are trained in full")


AdapterSpec = LoRA | DoRA | QALoRA | Full


def blocks_of(net: nn.Module, last: int | None = None) -> list[str]:
    """Name prefixes of the ``last`` transformer blocks in order; of all if None."""
    blocks: Any = net.layers
    names = {id(module): f"{name}." for name, module in net.named_modules()}
    return [names[id(block)] for block in blocks][-(last or 0) :]


def reach(net: nn.Module, target: str) -> tuple[int, int]:
    """(blocks of ``net`` with a linear layer that ``target`` means, all blocks), before adapters."""
    blocks = tuple(blocks_of(net))
    linear = [name for name, module in net.named_modules() if isinstance(module, Linear)]
    matches = _matching(target, linear, full=False)
    reached = {block for name in matches for block in blocks if name.startswith(block)}
    return len(reached), len(blocks)


def _weights(module: nn.Module) -> dict[str, mx.array]:
    """The floating-point parameters that ``module`` itself holds."""
    arrays = {name: value for name, value in module.items() if isinstance(value, mx.array) and name[0] != "_"}
    return {name: value for name, value in arrays.items() if mx.issubdtype(value.dtype, mx.floating)}


def _adaptable(net: nn.Module) -> dict[str, Any]:
    """The linear layers and layers of experts by name."""
    return {
        name: module
        for name, module in net.named_modules()
        if isinstance(module, Linear) or is_experts(module)
    }


def _select(
    net: nn.Module,
    targets: Sequence[str],
    layers: int | None,
    where: str,
    *,
    full: bool,
    recorded: Collection[str] | None = None,
) -> dict[str, Any]:
    """By name the linear layers and layers of experts that ``targets`` mean; or, if ``full``, the modules
    with weights that are targets or inside them."""
    if adapted(net):
        hint = "merge them, or load it again"
        raise ConfigError("the model has adapters already", where="adapter", hint=hint)
    blocks, last = tuple(blocks_of(net)), tuple(blocks_of(net, layers))
    if layers is not None and layers > len(blocks):
        raise ConfigError(f"{layers} is more than the model's {len(blocks)} blocks", where="adapter.layers")
    if full:
        modules = {name: module for name, module in net.named_modules() if _weights(module)}
    else:
        modules = _adaptable(net)
    mixture = Mixture.of({} if full else modules)
    chosen: set[str] = set()
    for target in targets:
        # With `layers` a pattern stays inside the last blocks; a plain name may also mean what is outside all
        # blocks.
        outside = target != ALL_LINEAR and (layers is None or not any(sign in target for sign in "*?["))
        reachable = [
            name for name in modules if name.startswith(last) or (outside and not name.startswith(blocks))
        ]
        matches = _matching(target, reachable, full)
        if not matches:
            message = f"{target!r} matches no {'module' if full else 'linear layer'}"
            message += "" if layers is None else f" in the last {layers} blocks"
            raise ConfigError(message, where=where, hint=_other_targets(target, modules, full))
        chosen |= matches - mixture.spared(target, recorded)
    if targets and not chosen:
        names = ", ".join(map(repr, targets))
        message = f"{names} means only routers, or layers one output wide, which have no low-rank update"
        raise ConfigError(message, where=where, hint="name routers outright, such as mlp.gate")
    if packed := [name for name in sorted(chosen) if full and "scales" in modules[name]]:
        hint = "leave out model.quantize, or train LoRA or DoRA over the quantised model"
        raise ConfigError(f"{packed[0]} is quantised: its weights cannot be trained", where=where, hint=hint)
    return {name: modules[name] for name in sorted(chosen)}


def _require_groups(chosen: Mapping[str, nn.Module]) -> None:
    """Raises ConfigError, which names them, if layers have no biases of a quantisation to be merged into."""
    problems: list[str] = []
    for name, module in chosen.items():
        if is_experts(module):
            problems.append(f"{name}: it is a layer of routed experts")
        elif group_size(module) is None:
            problems.append(f"{name} (width {dims(module)[0]}): it is not quantised with biases")
    if problems:
        message = f"qalora cannot adapt {len(problems)} of {len(chosen)} layers\n{listing(problems)}"
        hint = "set model.quantize: 4 and a model.group_size that divides the widths, leave them out of "
        raise ConfigError(message, where="adapter.targets", hint=hint + "adapter.targets, or take lora")


def _matching(target: str, names: Iterable[str], full: bool) -> set[str]:
    # The dot in front makes a plain name match whole words only.
    patterns = [f"*.{target}", f"*.{target}.*"] if full else [f"*.{target}"]
    if target == ALL_LINEAR:
        patterns = ["*"]
    return {name for name in names if any(fnmatchcase(f".{name}", pattern) for pattern in patterns)}


def _other_targets(target: str, names: Iterable[str], full: bool) -> str:
    """The hint for a target that matches nothing: what it could have been."""
    words = {word for name in names for word in name.split(".")[0 if full else -1 :]}
    choices = sorted(word for word in words if not word.isdigit())
    close = difflib.get_close_matches(target.rsplit(".", 1)[-1], choices, n=1)
    return (f"did you mean {close[0]!r}? " if close else "") + f"the model has {', '.join(choices)}"


def _rounding(dtype: mx.Dtype) -> Callable[[type[nn.Module]], wrap.Call]:
    """Outputs in ``dtype``: one float32 weight would turn all later activations to float32."""

    def call_of(kind: type[nn.Module]) -> wrap.Call:
        def call(self: nn.Module, *args: mx.array) -> mx.array:
            return kind.__call__(self, *args).astype(dtype)

        return call

    return call_of


def _unfreeze(net: nn.Module, full: Mapping[str, nn.Module], lazily: bool) -> Attached:
    """Make the weights of ``full`` float32 and trainable, and the rows that were added for new tokens, and
    count. lazily: they are computed when they are first used."""
    for module in vocabulary.extended(net):
        module.unfreeze(recurse=False, keys=list(_weights(module)))
    for module in full.values():
        weights = _weights(module)
        module.update({key: value.astype(mx.float32) for key, value in weights.items()})
        module.unfreeze(recurse=False, keys=list(weights))
        dtype = next(iter(weights.values())).dtype
        if dtype != mx.float32:
            wrap.replace([module], _rounding(dtype))
    tensors, total = trainable(net), 0
    if not lazily:
        mx.eval(tensors)
    for _, module in net.named_modules():
        packed = "scales" in module
        total += module.weight.size * 32 // module.bits if packed else 0
        total += sum(
            value.size
            for key, value in _weights(module).items()
            if not packed or key not in ("scales", "biases")
        )
    return Attached(sum(value.size for value in tensors.values()), total, tuple(tensors))
