"""What is trainable: LoRA, DoRA or the weights themselves; attached, saved, loaded, measured and merged.

LoRA (arXiv 2106.09685) adds s·(x·A)·B to a frozen linear layer; DoRA (arXiv 2402.09353) gives each output row a learned
length beside it. Layers and files keep mlx-lm's names (``linear``, ``lora_a``, ``lora_b``, ``m``) and layout, so that
mlx-lm reads what is saved here. Parameters are float32 whatever the base is; activations keep the base's dtype. Nothing
draws from the global random state. Experts of mixture layers are not linear layers: they are not adapted.
"""

from __future__ import annotations

import difflib
import functools
import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from itertools import accumulate
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, NamedTuple, TypeVar

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten, tree_unflatten
from pydantic import BeforeValidator, Field
from safetensors.numpy import save_file

from tunesmith.config import Spec
from tunesmith.errors import ConfigError, ModelError, TrainingError, listing

WEIGHTS = "adapters.safetensors"
CONFIG = "adapter_config.json"
ALL_LINEAR = "all-linear"

# Rows of zeros (a padded vocabulary) have no direction: the floor keeps 0/0 out and leaves them at zero.
_SMALLEST_ROW = 1e-24

Linear = nn.Linear | nn.QuantizedLinear
M = TypeVar("M", bound=nn.Module)
_one_name = BeforeValidator(lambda value: (value,) if isinstance(value, str) else value, tuple[str, ...] | str)
Names = Annotated[tuple[str, ...], _one_name]


class Attached(NamedTuple):
    """``trainable`` and ``total`` count parameters (a quantised weight counts its elements); names are sorted."""

    trainable: int
    total: int
    tensors: tuple[str, ...]


# ---- layers


class LoRALinear(nn.Module):
    """y = W·x + b + s·(x·A)·B beside a frozen linear layer, quantised or not.

    ``lora_a`` (in, r) is uniform within ±1/sqrt(in) and drawn from ``key`` alone; ``lora_b`` (r, out) is zero.
    ``dropout`` acts on the input of the branch only, with a mask drawn from the key that ``seed_dropout`` sets: the
    layer draws the same mask each time it is run with that key, as a recomputed forward pass must.
    """

    def __init__(self, linear: Linear, rank: int, scale: float, dropout: float, key: mx.array) -> None:
        super().__init__()
        inputs, outputs = _dims(linear)
        bound = inputs**-0.5
        self.linear = linear
        self.scale = scale
        self.dropout = dropout
        self.lora_a = mx.random.uniform(-bound, bound, (inputs, rank), key=key)
        self.lora_b = mx.zeros((rank, outputs))
        self._key: mx.array | None = None
        self.train(linear.training)

    def branch(self, x: mx.array) -> mx.array:
        """(..., out) s·(dropout(x)·A)·B. Raises TrainingError when a mask is due and no key was set."""
        if self.training and self.dropout > 0:
            if self._key is None:
                hint = "call adapters.seed_dropout(net, key) before the forward pass, or net.eval()"
                raise TrainingError("adapter dropout has no key to draw its mask from", hint=hint)
            keep = mx.random.bernoulli(1 - self.dropout, x.shape, key=self._key)
            x = mx.where(keep, x * (1 / (1 - self.dropout)), 0)
        return ((x @ self.lora_a) * self.scale) @ self.lora_b

    def __call__(self, x: mx.array) -> mx.array:
        """(..., in) → (..., out) in the dtype of the frozen layer's output."""
        y = self.linear(x)
        return y + self.branch(x).astype(y.dtype)

    @functools.cached_property
    def rows(self) -> mx.array:
        """(out,) squared length of each row of the frozen weight, float32; the weight is expanded once for it."""
        rows = mx.square(_dense(self.linear)).sum(axis=1)
        mx.eval(rows)
        return rows

    def overlap(self) -> tuple[mx.array, mx.array]:
        """(out,), (out,) per row W·Δ and ‖Δ‖², where Δ = s·(A·B)ᵀ: neither W nor Δ is formed. No gradient."""
        a, b = mx.stop_gradient(self.lora_a), mx.stop_gradient(self.lora_b)
        across = self.scale * (b * _product(self.linear, a.T)).sum(axis=0)
        return across, self.scale**2 * (b * ((a.T @ a) @ b)).sum(axis=0)

    def change(self) -> mx.array:
        """() Frobenius norm of merged weight minus frozen weight."""
        return mx.sqrt(mx.maximum(self.overlap()[1].sum(), 0))

    def merged_weight(self) -> mx.array:
        """(out, in) the weight of the plain layer that computes the same, float32."""
        return _dense(self.linear) + self.scale * (self.lora_a @ self.lora_b).T


class DoRALinear(LoRALinear):
    """y = m·(V·x)/‖V‖ + b with V = W + Δ, lengths by row; ‖V‖ is held constant in the gradient (paper, section 4.3).

    ``m`` (out,) starts as the row lengths of W, so that the layer starts equal to its base.
    """

    def __init__(self, linear: Linear, rank: int, scale: float, dropout: float, key: mx.array) -> None:
        super().__init__(linear, rank, scale, dropout, key)
        self.m = mx.sqrt(mx.maximum(self.rows, _SMALLEST_ROW))

    def lengths(self) -> mx.array:
        """(out,) ‖V‖ per row, without gradient."""
        across, own = self.overlap()
        return mx.sqrt(mx.maximum(self.rows + 2 * across + own, _SMALLEST_ROW))

    def __call__(self, x: mx.array) -> mx.array:
        y = _product(self.linear, x)
        # In float32 up to the end: in half precision m/‖V‖ could not move by less than 0.4 %.
        out = ((self.m / self.lengths()) * (y.astype(mx.float32) + self.branch(x))).astype(y.dtype)
        return out + self.linear.bias if "bias" in self.linear else out

    def change(self) -> mx.array:
        # ‖c·V − W‖² with c·V − W = (c − 1)·W + c·Δ: every term is as small as the change, so nothing cancels.
        (across, own), c = self.overlap(), self.m / self.lengths()
        squares = mx.square(c - 1) * self.rows + 2 * c * (c - 1) * across + mx.square(c) * own
        return mx.sqrt(mx.maximum(squares.sum(), 0))

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


def _dense(linear: Linear) -> mx.array:
    """(out, in) the weight in float32."""
    if not isinstance(linear, nn.QuantizedLinear):
        return linear.weight.astype(mx.float32)
    packing: Any = {"group_size": linear.group_size, "bits": linear.bits, "mode": linear.mode}
    held: Any = [linear.scales, linear.get("biases")]
    if linear.mode == "affine":
        # The result has the dtype of the scales; in float32 it is exactly what quantized_matmul multiplies with.
        held = [value.astype(mx.float32) for value in held]
    return mx.dequantize(linear.weight, *held, **packing).astype(mx.float32)


def _fold(*parts: object) -> mx.array:
    """(2,) uint32: a random key that is a function of ``parts``."""
    digest = hashlib.sha256("\0".join(map(str, parts)).encode()).digest()
    return mx.array(np.frombuffer(digest[:8], dtype="<u4"))


# ---- what is trainable


_TARGETS = (
    "linear layers by name (q_proj), dotted suffix (self_attn.q_proj) or pattern (*_proj); "
    "all-linear is every one inside the transformer blocks"
)


class _LowRank(Spec):
    rank: int = Field(16, ge=1, description="width of the update; at most the smaller side of each adapted weight")
    alpha: float = Field(32.0, gt=0, description="the update is scaled by alpha / rank")
    dropout: float = Field(0.0, ge=0, lt=1, description="share of the branch's inputs set to zero in training")
    targets: Names = Field(("q_proj", "v_proj"), min_length=1, description=_TARGETS)
    layers: int | None = Field(None, ge=1, description="only the last n blocks; null is all")
    rank_stabilised: bool = Field(False, description="scale by alpha / sqrt(rank) instead (arXiv 2312.03732)")
    full_modules: Names = Field((), description="modules trained in full beside it, such as input_layernorm")
    _layer: ClassVar[type[LoRALinear]]

    @property
    def scale(self) -> float:
        """s in W + s·(A·B)ᵀ"""
        return self.alpha / (math.sqrt(self.rank) if self.rank_stabilised else self.rank)

    def attach(self, net: nn.Module, seed: int) -> Attached:
        """Freeze ``net`` and put adapter layers in place of its targets; A is drawn from (seed, tensor name).

        Where ``layers`` is set, a module outside the blocks is reached by its plain name only, not by a pattern.
        Raises ConfigError, with ``net`` untouched, for a target that matches nothing, a rank that is too large, a full
        module that is quantised or adapted too, and a net that has adapters already.
        """
        linears = {name: module for name, module in _modules(net).items() if isinstance(module, Linear)}
        chosen = _select(net, linears, self.targets, self.layers, "adapter.targets")
        for name, linear in chosen.items():
            if self.rank > min(_dims(linear)):
                what = f"rank {self.rank} is more than {name} (in, out = {_dims(linear)}) can hold"
                raise ConfigError(what, where="adapter.rank", hint="a smaller rank, or other adapter.targets")
        full = _owners(net, self.full_modules, self.layers, "adapter.full_modules")
        if both := sorted(full.keys() & chosen.keys()):
            raise ConfigError(f"{both[0]} is both adapted and trained in full", where="adapter.full_modules")
        net.freeze()
        for name, linear in chosen.items():
            key = _fold(seed, f"{name}.lora_a")
            _replace(net, name, self._layer(linear, self.rank, self.scale, self.dropout, key))
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

    targets: Names = Field(("*",), min_length=1, description="modules by name or pattern, with all inside them")
    layers: int | None = Field(None, ge=1, description="only the last n blocks; null is all")
    kind: Literal["full"] = "full"

    def attach(self, net: nn.Module, seed: int) -> Attached:
        """Freeze ``net`` except the targets, which become float32. Nothing is drawn: ``seed`` plays no part.

        Raises ConfigError for a target that matches nothing or that is quantised.
        """
        full = _owners(net, self.targets, self.layers, "adapter.targets")
        net.freeze()
        return _unfreeze(net, full)


AdapterSpec = LoRA | DoRA | Full
_KINDS: dict[str, type[LoRA] | type[DoRA] | type[Full]] = {"lora": LoRA, "dora": DoRA, "full": Full}


def _modules(net: nn.Module) -> dict[str, nn.Module]:
    """By name, so that results and messages have one order. Raises ConfigError for a net that has adapters."""
    if _adapted(net):
        raise ConfigError("the model has adapters already", where="adapter", hint="merge them, or load it again")
    return dict(sorted(net.named_modules(), key=lambda item: item[0]))


def _adapted(net: nn.Module) -> dict[str, LoRALinear]:
    return dict(sorted((name, layer) for name, layer in net.named_modules() if isinstance(layer, LoRALinear)))


def _replace(net: nn.Module, name: str, module: nn.Module) -> None:
    net.update_modules(tree_unflatten([(name, module)]))


def _blocks(net: nn.Module) -> list[str]:
    """Name prefixes of the transformer blocks, in order."""
    blocks: Any = net.layers
    names = {id(module): f"{name}." for name, module in net.named_modules()}
    return [names[id(block)] for block in blocks]


def _select(
    net: nn.Module, modules: Mapping[str, M], targets: Sequence[str], layers: int | None, where: str, parts: bool = False
) -> dict[str, M]:
    """Those of ``modules`` that a target means; with ``parts`` a target also means all modules inside it.

    Raises ConfigError for a target that means none of them.
    """
    blocks = _blocks(net)
    if layers is not None and layers > len(blocks):
        raise ConfigError(f"{layers} is more than the model's {len(blocks)} blocks", where="adapter.layers")
    last = tuple(blocks[-(layers or 0) :])

    def means(target: str, name: str) -> bool:
        inside, pattern = name.startswith(tuple(blocks)), any(sign in target for sign in "*?[")
        if not name.startswith(last) and (inside or (pattern and layers is not None)):
            return False
        if target == ALL_LINEAR:
            return inside
        # A dot in front makes a plain suffix match whole words only.
        paths = [f".{path}" for path in (accumulate(name.split("."), "{}.{}".format) if parts else [name])]
        return any(fnmatchcase(path, f"*.{target}") if pattern else path.endswith(f".{target}") for path in paths)

    chosen: set[str] = set()
    for target in targets:
        found = {name for name in modules if means(target, name)}
        if not found:
            words = {word for name in modules for word in (name.split(".") if parts else name.split(".")[-1:])}
            there = sorted(word for word in words if not word.isdigit())
            close = difflib.get_close_matches(target.rsplit(".", 1)[-1], there, n=1)
            what = f"{target!r} matches no {'module' if parts else 'linear layer'}"
            what += "" if layers is None else f" in the last {layers} blocks"
            hint = f"did you mean {close[0]!r}? " if close else ""
            raise ConfigError(what, where=where, hint=f"{hint}the model has {', '.join(there)}")
        chosen |= found
    return {name: module for name, module in modules.items() if name in chosen}


def _weights(module: nn.Module) -> dict[str, mx.array]:
    """The floating-point parameters that ``module`` itself holds."""
    held = {name: value for name, value in module.items() if isinstance(value, mx.array) and name[0] != "_"}
    return {name: value for name, value in held.items() if mx.issubdtype(value.dtype, mx.floating)}


def _owners(net: nn.Module, targets: Sequence[str], layers: int | None, where: str) -> dict[str, nn.Module]:
    """The modules holding parameters that ``targets`` mean. Raises ConfigError where one is quantised."""
    owners = {name: module for name, module in _modules(net).items() if _weights(module)}
    chosen = _select(net, owners, targets, layers, where, parts=True)
    if packed := [name for name, module in chosen.items() if "scales" in module]:
        hint = "leave out model.quantize, or train LoRA or DoRA over the quantised model"
        raise ConfigError(f"{packed[0]} is quantised: its weights cannot be trained", where=where, hint=hint)
    return chosen


@functools.cache
def _rounded(kind: type[nn.Module], dtype: mx.Dtype) -> type[nn.Module]:
    """``kind`` with its output in ``dtype``: one float32 weight would turn all later activations to float32."""

    def call(self: nn.Module, *args: mx.array) -> mx.array:
        return kind.__call__(self, *args).astype(dtype)

    return type(kind.__name__, (kind,), {"__call__": call, "__doc__": kind.__doc__})


def _unfreeze(net: nn.Module, full: Mapping[str, nn.Module]) -> Attached:
    """Make the weights of ``full`` float32 and trainable, and count."""
    for module in full.values():
        weights = _weights(module)
        for key, value in weights.items():
            module[key] = value.astype(mx.float32)
        module.unfreeze(recurse=False, keys=list(weights))
        dtype = next(iter(weights.values())).dtype
        if dtype != mx.float32:
            module.__class__ = _rounded(type(module), dtype)
    tensors = trainable(net)
    mx.eval(tensors)
    total = sum(value.size for value in _flat(net.parameters()).values())
    for _, module in net.named_modules():
        if "scales" in module:
            packed = module.weight.size + module.scales.size + (module.biases.size if "biases" in module else 0)
            total += module.weight.size * 32 // module.bits - packed
    return Attached(sum(value.size for value in tensors.values()), total, tuple(tensors))


def _flat(tree: Mapping[str, Any]) -> dict[str, mx.array]:
    flat: Any = tree_flatten(tree)
    return dict(sorted(flat))


def trainable(net: nn.Module) -> dict[str, mx.array]:
    """The parameters that receive gradient, sorted by name."""
    return _flat(net.trainable_parameters())


def seed_dropout(net: nn.Module, key: mx.array) -> None:
    """Give each adapter layer its own mask key, a function of ``key`` (2,) uint32 and the layer's name.

    Call it before each forward pass that should have new masks; ``key`` may be an argument of a compiled function.
    """
    for name, layer in _adapted(net).items():
        # Past nn.Module's own __setattr__, so that the key is no part of the module's parameters or state.
        object.__setattr__(layer, "_key", mx.bitwise_xor(key, _fold("dropout", name)))


# ---- files


def save(net: nn.Module, spec: AdapterSpec, folder: Path) -> None:
    """Write the trainable tensors and their description into ``folder``: the same bytes for the same values.

    mlx-lm reads LoRA, DoRA and Full; it refuses by name the tensors of ``full_modules``. Not atomic.
    """
    folder.mkdir(parents=True, exist_ok=True)
    blocks = _blocks(net)
    config: dict[str, object] = {"fine_tune_type": spec.kind, "num_layers": len(blocks)}
    if not isinstance(spec, Full):
        # mlx-lm looks a key up in the last num_layers blocks, by its name in the block, then in the whole model.
        names, last = list(_adapted(net)), blocks[-(spec.layers or 0) :]
        inside = [{name.removeprefix(block) for name in names if name.startswith(block)} for block in last]
        outside = [name for name in names if not name.startswith(tuple(last))]
        alike = all(found == inside[0] for found in inside)
        keys = sorted(inside[0]) + outside if alike else names
        parameters = {"rank": spec.rank, "scale": spec.scale, "dropout": spec.dropout, "keys": keys}
        config |= {"num_layers": len(last), "lora_parameters": parameters}
    config["tunesmith"] = {"adapter": spec.model_dump(mode="json")}
    (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    tensors = {name: np.array(value) for name, value in trainable(net).items()}
    save_file(tensors, folder / WEIGHTS, metadata={"format": "mlx"})


def load(net: nn.Module, folder: Path) -> AdapterSpec:
    """Attach the adapter in ``folder``, written here or by mlx-lm, to ``net``; returns what it is.

    Raises ModelError where it cannot be read or a tensor does not fit; ``net`` may then be attached already.
    """
    try:
        spec = _read_spec(json.loads((folder / CONFIG).read_text(encoding="utf-8")), len(_blocks(net)))
        spec.attach(net, seed=0)
    except (OSError, ValueError, TypeError, KeyError, ConfigError) as error:
        text = f"{CONFIG} does not fit or cannot be read: {type(error).__name__}: {error}"
        raise ModelError(text, where=str(folder)) from error
    load_tensors(net, folder)
    return spec


def _read_spec(config: dict[str, Any], n_blocks: int) -> AdapterSpec:
    """Raises KeyError or ValueError (pydantic's ValidationError is one) for a description that is not understood."""
    if "tunesmith" in config:
        block = config["tunesmith"]["adapter"]
        return _KINDS[block["kind"]].model_validate(block)
    name, layers = config.get("fine_tune_type", "lora"), config["num_layers"]
    if name not in _KINDS:
        raise ValueError(f"fine_tune_type {name!r} is not one of {', '.join(_KINDS)}")
    # mlx-lm counts 0 and -1 as all blocks.
    values: dict[str, Any] = {"layers": layers if 0 < layers < n_blocks else None}
    if name != "full":
        found = config["lora_parameters"]
        values |= {"rank": found["rank"], "alpha": found["scale"] * found["rank"], "dropout": found["dropout"]}
        values["targets"] = tuple(found.get("keys") or (ALL_LINEAR,))
    return _KINDS[name].model_validate(values)


def load_tensors(net: nn.Module, folder: Path) -> None:
    """Fill the trainable tensors of ``net`` from ``folder``.

    Raises ModelError, with ``net`` untouched, listing every tensor that is missing, unexpected or of another shape.
    """
    try:
        saved: Any = mx.load(str(folder / WEIGHTS))
    except (OSError, RuntimeError) as error:
        raise ModelError(f"{WEIGHTS} cannot be read: {error}", where=str(folder)) from error
    there = trainable(net)
    problems = [f"{name} {there[name].shape}: missing" for name in there if name not in saved]
    problems += [f"{name} {saved[name].shape}: not in the model" for name in sorted(saved) if name not in there]
    both = [name for name in there if name in saved and saved[name].shape != there[name].shape]
    problems += [f"{name} {saved[name].shape}: the model has {there[name].shape}" for name in both]
    if problems:
        what = f"{len(problems)} tensors of the adapter do not fit the model\n{listing(problems)}"
        raise ModelError(what, where=str(folder), hint="an adapter fits only the model that it was trained on")
    net.update(tree_unflatten([(name, value.astype(mx.float32)) for name, value in saved.items()]))
    mx.eval(trainable(net))


# ---- measured and merged


def growth(net: nn.Module) -> dict[str, tuple[float, float]]:
    """For each adapted weight ‖ΔW‖F and ‖ΔW‖F / ‖W‖F, with ΔW = merged − frozen; the change is never formed.

    Modules trained in full are left out: their initial values are not kept.
    """
    found: Any = {name: (layer.change(), mx.sqrt(layer.rows.sum())) for name, layer in _adapted(net).items()}
    mx.eval(found)
    return {name: (change.item(), change.item() / norm.item()) for name, (change, norm) in found.items()}


def merge(net: nn.Module) -> int:
    """Put a plain frozen nn.Linear in place of every adapter layer; returns how many.

    A quantised base is expanded, to the dtype of its scales: packing it again would erase the update.
    """
    layers = _adapted(net)
    for name, layer in layers.items():
        base: Any = layer.linear
        dtype = (base.scales if "scales" in base else base.weight).dtype
        plain = nn.Linear(1, 1, bias=False)
        plain.weight = layer.merged_weight().astype(dtype if mx.issubdtype(dtype, mx.floating) else mx.bfloat16)
        if "bias" in base:
            plain.bias = base.bias
        mx.eval(plain.parameters())  # one expanded weight at a time
        plain.freeze().train(base.training)
        _replace(net, name, plain)
    return len(layers)
