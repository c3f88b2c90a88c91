"""What is trainable: LoRA, DoRA or the weights themselves; attached, saved, loaded, measured and merged.

LoRA (arXiv 2106.09685) adds s·(x·A)·B to a frozen linear layer; DoRA (arXiv 2402.09353) gives each output row
a learned length beside it. Layers and files keep mlx-lm's names and layout, so that mlx-lm reads what is
saved here. Parameters are float32 whatever the base is; activations keep the base's dtype. Initial values and
masks come from keys, never from the global random state. Experts of mixture layers are not linear layers:
they are not adapted."""

from __future__ import annotations

import difflib
import functools
import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, NamedTuple

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import safetensors.numpy
from mlx.utils import tree_flatten, tree_unflatten
from pydantic import BeforeValidator, Field, TypeAdapter

from tunesmith.errors import ConfigError, ModelError, TrainingError, listing
from tunesmith.settings.config import Spec

WEIGHTS = "adapters.safetensors"
CONFIG = "adapter_config.json"

Linear = nn.Linear | nn.QuantizedLinear
Names = Annotated[
    tuple[str, ...], BeforeValidator(lambda v: (v,) if isinstance(v, str) else v, tuple[str, ...] | str)
]


class Attached(NamedTuple):
    """``trainable`` and ``total`` count parameters (a quantised weight counts its elements); names are
    sorted."""

    trainable: int
    total: int
    tensors: tuple[str, ...]


class LoRALinear(nn.Module):
    """y = W·x + b + s·(x·A)·B beside a frozen linear layer, quantised or not.

    ``lora_a`` (in, r) is uniform within ±1/sqrt(in), drawn from ``key`` alone; ``lora_b`` (r, out) is zero.
    ``dropout`` acts on the input of the branch; its mask is a function of the key that ``seed_dropout`` sets,
    as a recomputed forward pass needs."""

    def __init__(self, linear: Linear, rank: int, scale: float, dropout: float, key: mx.array) -> None:
        super().__init__()
        inputs, outputs = _dims(linear)
        bound = inputs**-0.5
        self.linear, self.scale, self.dropout = linear, scale, dropout
        self.lora_a = mx.random.uniform(-bound, bound, (inputs, rank), key=key)
        self.lora_b = mx.zeros((rank, outputs))
        self._key: mx.array | None = None
        self.train(linear.training)

    def branch(self, x: mx.array) -> mx.array:
        """(..., out) s·(dropout(x)·A)·B. Raises TrainingError when a mask is due and no key was set."""
        if self.training and self.dropout > 0:
            if self._key is None:
                hint = "call adapters.seed_dropout(net, key) first, or net.eval()"
                raise TrainingError("adapter dropout has no key to draw its mask from", hint=hint)
            keep = mx.random.bernoulli(1 - self.dropout, x.shape, key=self._key)
            x = mx.where(keep, x * (1 / (1 - self.dropout)), 0)
        return ((x @ self.lora_a) * self.scale) @ self.lora_b

    def __call__(self, x: mx.array) -> mx.array:
        """(..., in) → (..., out) in the dtype of the frozen layer's output."""
        y = self.linear(x)
        return y + self.branch(x).astype(y.dtype)

    def merged_weight(self) -> mx.array:
        """(out, in) the weight of the plain layer that computes the same, float32."""
        return dense(self.linear) + self.scale * (self.lora_a @ self.lora_b).T


class DoRALinear(LoRALinear):
    """y = m·(V·x)/‖V‖ + b with V = W + Δ, lengths by row; ‖V‖ is held constant in the gradient (paper,
    section 4.3)."""

    def __init__(self, linear: Linear, rank: int, scale: float, dropout: float, key: mx.array) -> None:
        super().__init__(linear, rank, scale, dropout, key)
        self._rows = mx.square(dense(linear)).sum(axis=1)
        self.m = self.lengths()  # (out,) so that the layer starts equal to its base
        mx.eval(self._rows, self.m)  # one expanded weight at a time

    def lengths(self) -> mx.array:
        """(out,) ‖V‖ per row from ‖W‖² + 2·W·Δ + ‖Δ‖²: neither W nor Δ is formed. No gradient."""
        a, b = mx.stop_gradient(self.lora_a), mx.stop_gradient(self.lora_b)
        across = 2 * self.scale * (b * _product(self.linear, a.T)).sum(axis=0)
        own = self.scale**2 * (b * ((a.T @ a) @ b)).sum(axis=0)
        # The floor keeps rows of zeros (a padded vocabulary) at zero, not 0/0.
        return mx.sqrt(mx.maximum(self._rows + across + own, 1e-24))

    def __call__(self, x: mx.array) -> mx.array:
        y = _product(self.linear, x)
        # In float32 up to the end: in half precision m/‖V‖ could not move by less than 0.4 %.
        out = ((self.m / self.lengths()) * (y.astype(mx.float32) + self.branch(x))).astype(y.dtype)
        return out + self.linear.bias if "bias" in self.linear else out

    def merged_weight(self) -> mx.array:
        return (self.m / self.lengths())[:, None] * super().merged_weight()


def _dims(linear: Linear) -> tuple[int, int]:
    """(in, out)"""
    outputs, inputs = linear.weight.shape
    return (inputs * 32 // linear.bits if isinstance(linear, nn.QuantizedLinear) else inputs), outputs


def _product(linear: Linear, x: mx.array) -> mx.array:
    """(..., in) → (..., out) x·Wᵀ without the bias; a quantised weight stays packed."""
    if not isinstance(linear, nn.QuantizedLinear):
        return x @ linear.weight.T
    packing: Any = {"group_size": linear.group_size, "bits": linear.bits, "mode": linear.mode}
    return mx.quantized_matmul(x, linear.weight, linear.scales, linear.get("biases"), **packing)


def dense(linear: Linear) -> mx.array:
    """(out, in) the weight in float32."""
    if not isinstance(linear, nn.QuantizedLinear):
        return linear.weight.astype(mx.float32)
    held: Any = [linear.scales, linear.get("biases")]
    if linear.mode == "affine":
        # The result has the dtype of the scales; in float32 it is exactly what quantized_matmul multiplies
        # with.
        held = [value.astype(mx.float32) for value in held]
    packing: Any = {"group_size": linear.group_size, "bits": linear.bits, "mode": linear.mode}
    return mx.dequantize(linear.weight, *held, **packing).astype(mx.float32)


def _fold(*parts: object) -> mx.array:
    """(2,) uint32: a random key that is a function of ``parts``."""
    digest = hashlib.sha256("\0".join(map(str, parts)).encode()).digest()
    return mx.array(np.frombuffer(digest[:8], dtype="<u4"))


START = "run or checkpoint that training goes on from: its adapter, of the same shape, instead of a new one"


class _LowRank(Spec):
    rank: int = Field(
        16, ge=1, description="width of the update; at most the smaller side of each adapted weight"
    )
    alpha: float = Field(32.0, gt=0, description="the update is scaled by alpha / rank")
    dropout: float = Field(
        0.0, ge=0, lt=1, description="share of the branch's inputs set to zero in training"
    )
    targets: Names = Field(
        ("q_proj", "v_proj"),
        min_length=1,
        description="linear layers by name, suffix (mlp.up_proj) or pattern (*_proj); all-linear is each one in the blocks",
    )
    layers: int | None = Field(None, ge=1, description="only the last n blocks; null is all")
    rank_stabilised: bool = Field(False, description="scale by alpha / sqrt(rank) instead (arXiv 2312.03732)")
    full_modules: Names = Field((), description="modules trained in full beside it, such as input_layernorm")
    start: str | None = Field(None, description=START)
    _layer: ClassVar[type[LoRALinear]]

    @property
    def scale(self) -> float:
        """s in W + s·(A·B)ᵀ"""
        return self.alpha / (math.sqrt(self.rank) if self.rank_stabilised else self.rank)

    def attach(self, net: nn.Module, seed: int) -> Attached:
        """Freeze ``net`` and put adapter layers in place of its targets; A is drawn from (seed, tensor name).

        With ``layers``, what is outside the blocks is reached by its plain name only. Raises ConfigError,
        with ``net`` untouched, where a target matches nothing, the rank is too large, or a full module is
        quantised or adapted too, or ``net`` already."""
        chosen = _select(net, self.targets, self.layers, "adapter.targets", full=False)
        for name, linear in chosen.items():
            if self.rank > min(_dims(linear)):
                what = f"rank {self.rank} is more than {name} (in, out = {_dims(linear)}) can hold"
                raise ConfigError(what, where="adapter.rank", hint="a smaller rank, or other adapter.targets")
        full = _select(net, self.full_modules, self.layers, "adapter.full_modules", full=True)
        if both := sorted(full.keys() & chosen.keys()):
            raise ConfigError(f"{both[0]} is both adapted and trained in full", where="adapter.full_modules")
        net.freeze()
        for name, linear in chosen.items():
            layer = self._layer(linear, self.rank, self.scale, self.dropout, _fold(seed, f"{name}.lora_a"))
            net.update_modules(tree_unflatten([(name, layer)]))
        return _unfreeze(net, full)


class LoRA(_LowRank):
    """A frozen base with a low-rank update beside chosen linear layers; over a quantised base it is QLoRA."""

    kind: Literal["lora"] = "lora"
    _layer: ClassVar[type[LoRALinear]] = LoRALinear


class DoRA(_LowRank):
    """LoRA with a learned length for each output row: nearer to full training at low ranks, slower a step."""

    kind: Literal["dora"] = "dora"
    _layer: ClassVar[type[LoRALinear]] = DoRALinear


class Full(Spec):
    """The weights themselves, in float32."""

    targets: Names = Field(
        ("*",), min_length=1, description="modules by name or pattern, with all inside them"
    )
    layers: int | None = Field(None, ge=1, description="only the last n blocks; null is all")
    start: str | None = Field(None, description=START)
    kind: Literal["full"] = "full"

    def attach(self, net: nn.Module, seed: int) -> Attached:
        """Freeze ``net`` but the targets, which become float32; nothing is drawn. Raises ConfigError as
        LoRA's does."""
        full = _select(net, self.targets, self.layers, "adapter.targets", full=True)
        net.freeze()
        return _unfreeze(net, full)


AdapterSpec = LoRA | DoRA | Full


def _adapted(net: nn.Module) -> dict[str, LoRALinear]:
    return dict(sorted((name, layer) for name, layer in net.named_modules() if isinstance(layer, LoRALinear)))


def _blocks(net: nn.Module, last: int | None) -> list[str]:
    """Name prefixes of the ``last`` transformer blocks (None: all), in order."""
    blocks: Any = net.layers
    names = {id(module): f"{name}." for name, module in net.named_modules()}
    return [names[id(block)] for block in blocks][-(last or 0) :]


def _weights(module: nn.Module) -> dict[str, mx.array]:
    """The floating-point parameters that ``module`` itself holds."""
    arrays = {name: value for name, value in module.items() if isinstance(value, mx.array) and name[0] != "_"}
    return {name: value for name, value in arrays.items() if mx.issubdtype(value.dtype, mx.floating)}


def _select(
    net: nn.Module, targets: Sequence[str], layers: int | None, where: str, *, full: bool
) -> dict[str, Any]:
    """By name the linear layers that ``targets`` mean, or with ``full`` the modules with weights, at and
    inside the targets."""
    if _adapted(net):
        raise ConfigError(
            "the model has adapters already", where="adapter", hint="merge them, or load it again"
        )
    blocks, last = tuple(_blocks(net, None)), tuple(_blocks(net, layers))
    if layers is not None and layers > len(blocks):
        raise ConfigError(f"{layers} is more than the model's {len(blocks)} blocks", where="adapter.layers")
    modules = {
        name: module
        for name, module in net.named_modules()
        if (_weights(module) if full else isinstance(module, Linear))
    }
    chosen: set[str] = set()
    for target in targets:
        # With `layers` a pattern stays inside the last blocks; a plain name may also mean what is outside all
        # blocks.
        outside = target != "all-linear" and (layers is None or not any(sign in target for sign in "*?["))
        near = [
            name for name in modules if name.startswith(last) or (outside and not name.startswith(blocks))
        ]
        # The dot in front makes a plain name match whole words only.
        globs = (
            ["*"] if target == "all-linear" else [f"*.{target}", f"*.{target}.*"] if full else [f"*.{target}"]
        )
        found = {name for name in near if any(fnmatchcase(f".{name}", glob) for glob in globs)}
        if not found:
            words = {word for name in modules for word in name.split(".")[0 if full else -1 :]}
            there = sorted(word for word in words if not word.isdigit())
            close = difflib.get_close_matches(target.rsplit(".", 1)[-1], there, n=1)
            what = f"{target!r} matches no {'module' if full else 'linear layer'}"
            what += "" if layers is None else f" in the last {layers} blocks"
            hint = f"did you mean {close[0]!r}? " if close else ""
            raise ConfigError(what, where=where, hint=f"{hint}the model has {', '.join(there)}")
        chosen |= found
    if packed := [name for name in sorted(chosen) if full and "scales" in modules[name]]:
        hint = "leave out model.quantize, or train LoRA or DoRA over the quantised model"
        raise ConfigError(f"{packed[0]} is quantised: its weights cannot be trained", where=where, hint=hint)
    return {name: modules[name] for name in sorted(chosen)}


@functools.cache
def _rounded(kind: type[nn.Module], dtype: mx.Dtype) -> type[nn.Module]:
    """``kind`` with its output in ``dtype``: one float32 weight would turn all later activations to
    float32."""

    def call(self: nn.Module, *args: mx.array) -> mx.array:
        return kind.__call__(self, *args).astype(dtype)

    return type(kind.__name__, (kind,), {"__call__": call, "__doc__": kind.__doc__})


def _unfreeze(net: nn.Module, full: Mapping[str, nn.Module]) -> Attached:
    """Make the weights of ``full`` float32 and trainable, and count."""
    for module in full.values():
        weights = _weights(module)
        module.update({key: value.astype(mx.float32) for key, value in weights.items()})
        module.unfreeze(recurse=False, keys=list(weights))
        dtype = next(iter(weights.values())).dtype
        if dtype != mx.float32:
            module.__class__ = _rounded(type(module), dtype)
    tensors, total = trainable(net), 0
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


def trainable(net: nn.Module) -> dict[str, mx.array]:
    """The parameters that receive gradient, sorted by name."""
    flat: Any = tree_flatten(net.trainable_parameters())
    return dict(sorted(flat))


def seed_dropout(net: nn.Module, key: mx.array) -> None:
    """Give each adapter layer its mask key for the next pass: a function of ``key`` (2,) uint32, traced or
    not, and its name."""
    for name, layer in _adapted(net).items():
        # Past nn.Module's own __setattr__, so that the key is no part of the module's parameters or state.
        object.__setattr__(layer, "_key", mx.bitwise_xor(key, _fold("dropout", name)))


def save(net: nn.Module, spec: AdapterSpec, folder: Path) -> None:
    """Write the trainable tensors and what they are, not atomically. mlx-lm reads it, but refuses
    ``full_modules`` by name."""
    folder.mkdir(parents=True, exist_ok=True)
    config: dict[str, object] = {"fine_tune_type": spec.kind, "num_layers": len(_blocks(net, spec.layers))}
    if not isinstance(spec, Full):
        config["lora_parameters"] = {
            "rank": spec.rank,
            "scale": spec.scale,
            "dropout": spec.dropout,
            "keys": list(_adapted(net)),
        }
    config["tunesmith"] = {"adapter": spec.model_dump(mode="json")}
    (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    tensors = {name: np.array(value) for name, value in trainable(net).items()}
    (folder / WEIGHTS).write_bytes(safetensors.numpy.save(tensors, metadata={"format": "mlx"}))


def load(net: nn.Module, folder: Path) -> AdapterSpec:
    """Attach what `save` wrote; returns the spec. Raises ModelError where it cannot be read or used; ``net``
    may have changed."""
    spec = described(folder)
    try:
        spec.attach(net, seed=0)
    except ConfigError as error:
        raise _unfit(folder, error) from error
    load_tensors(net, folder)
    return spec


def described(folder: Path) -> AdapterSpec:
    """The spec of what `save` wrote. Raises ModelError where it cannot be read."""
    try:
        found = json.loads((folder / CONFIG).read_text(encoding="utf-8"))["tunesmith"]["adapter"]
        kinds: TypeAdapter[AdapterSpec] = TypeAdapter(Annotated[AdapterSpec, Field(discriminator="kind")])
        return kinds.validate_python(found)
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise _unfit(folder, error) from error


def _unfit(folder: Path, error: Exception) -> ModelError:
    what = f"{CONFIG} does not fit or cannot be read: {type(error).__name__}: {error}"
    return ModelError(what, where=str(folder), hint="give a folder that tunesmith saved, and its model")


def go_on(net: nn.Module, spec: AdapterSpec, folder: Path) -> None:
    """Fill the adapter that ``spec`` attached with what ``folder`` holds. Raises ConfigError where they are
    not of one shape."""
    free = {"start", "dropout"}
    was, now = (one.model_dump(mode="json", exclude=free) for one in (described(folder), spec))
    for one in (was, now):  # their order means nothing
        one |= {key: sorted(value) for key, value in one.items() if isinstance(value, list)}
    if was != now:
        wrong = [
            f"adapter.{key} is {now.get(key)}, there {was.get(key)}"
            for key in sorted(was | now)
            if was.get(key) != now.get(key)
        ]
        wrong = (
            wrong if was["kind"] == now["kind"] else [f"adapter.kind is {now['kind']}, there {was['kind']}"]
        )
        hint = "give the same, or model.adapter instead: it is merged into the base, and the new adapter may have any shape"
        raise ConfigError(
            f"the adapter of {folder} has another shape: {'; '.join(wrong)}", where="adapter.start", hint=hint
        )
    load_tensors(net, folder)


def load_tensors(net: nn.Module, folder: Path) -> None:
    """Fill the trainable tensors of ``net``. Raises ModelError, with ``net`` untouched, listing all tensors
    that do not fit."""
    try:
        saved: Any = mx.load(str(folder / WEIGHTS))
    except (OSError, RuntimeError) as error:
        raise ModelError(f"{WEIGHTS} cannot be read: {error}", where=str(folder)) from error
    there = {name: value.shape for name, value in trainable(net).items()}
    found = {name: value.shape for name, value in saved.items()}
    problems = [
        f"{name}: {found.get(name, 'missing')} in the file, {there.get(name, 'not')} in the model"
        for name in sorted(there | found)
        if there.get(name) != found.get(name)
    ]
    if problems:
        what = f"{len(problems)} tensors of the adapter do not fit the model\n{listing(problems)}"
        raise ModelError(
            what, where=str(folder), hint="an adapter fits only the model that it was trained on"
        )
    net.update(tree_unflatten([(name, value.astype(mx.float32)) for name, value in saved.items()]))
    mx.eval(trainable(net))


def merge(net: nn.Module) -> int:
    """Put a dense frozen nn.Linear in place of each adapter layer, as packing again would erase the update;
    returns how many."""
    layers = _adapted(net)
    for name, layer in layers.items():
        base: Any = layer.linear
        dtype = (base.scales if "scales" in base else base.weight).dtype
        plain = nn.Linear(1, 1, bias=False)
        plain.weight = layer.merged_weight().astype(
            dtype if mx.issubdtype(dtype, mx.floating) else mx.bfloat16
        )
        if "bias" in base:
            plain.bias = base.bias
        mx.eval(plain.parameters())  # one expanded weight at a time
        plain.freeze().train(base.training)
        net.update_modules(tree_unflatten([(name, plain)]))
    return len(layers)
