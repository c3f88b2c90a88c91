"""How every family of `families` is trained: gradients of LoRA and DoRA against PEFT on torch, batches
against single rows, quantised folders against the weights that their numbers stand for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal, NamedTuple
from unittest import mock

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten
from parity import families
from parity.families import Family

from tunesmith import adapters
from tunesmith.adapters.specs import blocks_of
from tunesmith.errors import ModelError
from tunesmith.model import abilities, loading
from tunesmith.runs.config import RunConfig
from tunesmith.tokens.batches import Group
from tunesmith.tokens.template import Tokens
from tunesmith.training.gradients import Gradients, checkpointed, dropout_key

TOLERANCE = 1e-5
"""Largest difference of a loss or a gradient, as a share of the largest entry of all gradients."""
TENSOR_TOLERANCE = 1e-4
"""The same, as a share of the largest entry of the same tensor: some are a thousandth of others."""
SENSITIVE = {"gemma4", "gemma4_text", "jamba", "qwen3_5", "qwen3_5_text", "qwen3_next"}
"""Model types that amplify rounding: their tolerances are `SENSITIVITY` times as large. Between
transformers' two forms of the gated delta rule, gradients of Qwen3-Next differ by 5e-5."""
SENSITIVITY = 20
RANK, ALPHA = 4, 8.0
LENGTHS = (40, 23, 31)
"""Tokens of the rows of a batch: together longer than the pretraining that `families.LONG` extends."""
Kind = Literal["lora", "dora"]
Bits = Literal[4, 8]
BITS: tuple[Bits, ...] = (4, 8)


def loaded(folder: Path, **settings: Any) -> loading.Loaded:
    return loading.load(loading.ModelSpec(path=str(folder), **settings))


def token_rows(lengths: Sequence[int] = LENGTHS) -> list[np.ndarray]:
    """Random rows of ``lengths``."""
    random = np.random.default_rng(3)
    return [random.integers(3, families.VOCABULARY, length) for length in lengths]


def groups_of(rows: Sequence[np.ndarray]) -> list[Group]:
    """Rows whose every token is learned."""
    return [Group((Tokens(row.astype(np.int32), np.ones(len(row), np.float32)),), "row") for row in rows]


class Slopes(NamedTuple):
    """Sum of the losses of some rows, and its gradients by tensor name."""

    loss: float
    gradients: Mapping[str, np.ndarray]


def slopes(net: nn.Module, rows: Sequence[np.ndarray], *, pack: bool = False) -> Slopes:
    """By the code that training uses."""
    config = RunConfig.model_validate(
        {"model": {"path": "model"}, "data": {"train": "rows.jsonl"}, "batch": {"pack": pack}}
    )
    net.train()
    (loss, _), tree = Gradients(net, config)(groups_of(rows), dropout_key(0, 0, 0))
    flat: Any = tree_flatten(tree)
    return Slopes(loss.item(), {name: np.array(value) for name, value in flat})


class Error(NamedTuple):
    """Largest difference of loss and gradients: as a share of the largest entry of all gradients, and of the
    largest entry of the same tensor, which is named."""

    of_all: float
    of_tensor: float
    tensor: str

    def is_within(self, tolerances: float) -> bool:
        """Whether both are at most so many times the tolerance."""
        return self.of_all <= tolerances * TOLERANCE and self.of_tensor <= tolerances * TENSOR_TOLERANCE


def error(found: Slopes, expected: Slopes) -> Error:
    """Not exact if an entry is not finite."""
    assert found.gradients.keys() == expected.gradients.keys() and found.gradients
    differences = {
        name: np.abs(found.gradients[name] - value).max() for name, value in expected.gradients.items()
    }
    sizes = {name: np.abs(value).max() for name, value in expected.gradients.items()}
    loss = abs(found.loss - expected.loss) / abs(expected.loss)
    shares = {name: float(differences[name] / sizes[name]) for name in sizes}
    worst = max(shares, key=lambda name: shares[name] if np.isfinite(shares[name]) else np.inf)
    of_all = float(np.max(list(differences.values())) / np.max(list(sizes.values())))
    return Error(float(np.maximum(loss, of_all)), shares[worst], worst)


# Gradients of LoRA and DoRA against PEFT


class Layer(NamedTuple):
    """A linear layer of ours and the one of transformers that has its weight. ``factors``: (out,) what the
    rows of ``theirs`` were multiplied by (muP's multipliers in Falcon-H1)."""

    ours: str
    theirs: str
    factors: np.ndarray


def matching_layers(net: nn.Module, text: Any) -> list[Layer]:
    """The linear layers in blocks of ``net`` whose weight is also a linear layer's of ``text``."""
    import torch
    from transformers.pytorch_utils import Conv1D

    theirs: dict[str, np.ndarray] = {}
    for name, module in text.named_modules():
        if type(module) in (torch.nn.Linear, Conv1D):  # a router's subclass returns more than logits
            weight = module.weight.detach().numpy()
            theirs[name] = weight.T if isinstance(module, Conv1D) else weight
    blocks, matches = tuple(blocks_of(net)), []
    for name, module in net.named_modules():
        if not isinstance(module, nn.Linear) or len(module.weight) == 1 or not name.startswith(blocks):
            continue
        if name.endswith("dt_proj"):  # Mamba of transformers reads its weight past PEFT's layer
            continue
        weight = np.array(module.weight)
        for other, value in theirs.items():
            if value.shape == weight.shape:
                factors = (weight * value).sum(1) / np.maximum((value * value).sum(1), 1e-30)
                if np.abs(weight - factors[:, None] * value).max() <= 1e-6 * np.abs(weight).max():
                    matches.append(Layer(name, other, factors))
                    del theirs[other]
                    break
    return matches


def with_peft(text: Any, layers: Sequence[Layer], kind: Kind) -> dict[str, Any]:
    """``text`` gets PEFT's adapter, moved off its start; its adapted layers by name."""
    import peft
    import torch

    names = [layer.theirs for layer in layers]
    config = peft.LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=names, use_dora=kind == "dora")
    with (
        # Mamba's kernels for GPUs read the weight of out_proj past PEFT's layer, which it therefore refuses.
        mock.patch("peft.tuners.tuners_utils._check_lora_target_modules_mamba"),
        # In a mixture, a name such as up_proj would mean the routed experts.
        mock.patch("peft.utils.transformers_weight_conversion.convert_peft_config_for_transformers"),
    ):
        peft.inject_adapter_in_model(config, text)
    adapted = {name: text.get_submodule(name) for name in names}
    random = np.random.default_rng(5)
    with torch.no_grad():
        for module in adapted.values():
            for part in (module.lora_A["default"], module.lora_B["default"]):
                part.weight.copy_(torch.tensor(random.normal(0, 0.1, tuple(part.weight.shape))))
            if kind == "dora":
                lengths = module.lora_magnitude_vector["default"].weight
                lengths.mul_(torch.tensor(random.uniform(0.8, 1.2, len(lengths))))
    return adapted


def in_our_layout(
    layers: Sequence[Layer], adapted: Mapping[str, Any], *, slope: bool
) -> dict[str, np.ndarray]:
    """PEFT's tensors, or their gradients, under our names."""
    tensors: dict[str, np.ndarray] = {}
    for layer in layers:
        module = adapted[layer.theirs]
        parts = {"lora_a": module.lora_A["default"], "lora_b": module.lora_B["default"]}
        if "default" in module.lora_magnitude_vector:
            parts["m"] = module.lora_magnitude_vector["default"]
        for name, part in parts.items():
            value = (part.weight.grad if slope else part.weight.detach()).numpy().T
            factors = (
                1.0 if name == "lora_a" else layer.factors if name == "lora_b" else np.abs(layer.factors)
            )
            tensors[f"{layer.ours}.{name}"] = value / factors if slope else value * factors
    return tensors


class Compared(NamedTuple):
    """``n_layers``: how many linear layers were compared. ``left``: last words of the names of others."""

    error: Error
    n_layers: int
    left: tuple[str, ...]


def adapter_error(folder: Path, text: Any, kind: Kind) -> Compared:
    """Loss and gradients of an adapter on all linear layers of the model in ``folder`` that ``text`` has too,
    against PEFT over ``text``."""
    import torch

    net = loaded(folder).net
    layers = matching_layers(net, text)
    matched = {layer.ours for layer in layers}
    blocks = tuple(blocks_of(net))
    linear = {name for name, module in net.named_modules() if isinstance(module, nn.Linear)}
    left = {name.rsplit(".", 1)[-1] for name in linear - matched if name.startswith(blocks)}
    rows = token_rows((families.LENGTH, families.LENGTH))
    spec = adapters.LoRA if kind == "lora" else adapters.DoRA
    spec(rank=RANK, alpha=ALPHA, targets=tuple(matched)).attach(net, 0)
    adapted = with_peft(text, layers, kind)
    start = in_our_layout(layers, adapted, slope=False)
    assert start.keys() == adapters.trainable(net).keys()
    net.load_weights([(name, mx.array(np.ascontiguousarray(value))) for name, value in start.items()], False)

    ids = torch.tensor(np.stack(rows))
    logits = text(ids).logits[:, :-1].flatten(0, 1)
    loss = torch.nn.functional.cross_entropy(logits, ids[:, 1:].flatten(), reduction="sum")
    loss.backward()
    expected = Slopes(loss.item(), in_our_layout(layers, adapted, slope=True))
    return Compared(error(slopes(net, rows), expected), len(layers), tuple(sorted(left)))


# Padded, packed and recomputed batches against single rows


def adapted_net(net: nn.Module, targets: Sequence[str] = ("all-linear",)) -> nn.Module:
    """``net`` with LoRA moved off its start."""
    adapters.LoRA(rank=RANK, alpha=ALPHA, targets=tuple(targets)).attach(net, 0)
    random = np.random.default_rng(7)
    values = [
        (name, mx.array(random.normal(0, 0.1, value.shape).astype(np.float32)))
        for name, value in adapters.trainable(net).items()
    ]
    return net.load_weights(values, False)


class Batches(NamedTuple):
    """Errors against single rows; of a packed batch None if the model cannot pack."""

    padded: Error
    recomputed: Error
    packed: Error | None


def batch_errors(folder: Path) -> Batches:
    net, rows = loaded(folder).net, token_rows()
    packs = abilities.packs(net)
    adapted_net(net)
    single = [slopes(net, [row]) for row in rows]
    names = single[0].gradients
    expected = Slopes(
        sum(part.loss for part in single),
        {name: sum(part.gradients[name] for part in single) for name in names},
    )
    padded = error(slopes(net, rows), expected)
    net.train()
    with checkpointed(net):
        recomputed = error(slopes(net, rows), expected)
    packed = error(slopes(net, rows, pack=True), expected) if packs else None
    return Batches(padded, recomputed, packed)


# Quantised folders


def unpacked(layer: Any) -> np.ndarray:
    """The numbers that a quantised layer's weights stand for, in float64."""
    packed, bits, size = np.array(layer["weight"]), layer.bits, layer.group_size
    per_word = 32 // bits
    shifts = np.arange(per_word, dtype=np.uint32) * bits
    codes = ((packed[..., None] >> shifts) & (2**bits - 1)).reshape(*packed.shape[:-1], -1)
    scales, biases = (np.array(layer[name].astype(mx.float32), np.float64) for name in ("scales", "biases"))
    return codes * scales.repeat(size, -1) + biases.repeat(size, -1)


class Quantised(NamedTuple):
    """Errors against the weights that the numbers stand for: of layers that stay quantised, as on a GPU, and
    of the float32 weights that a CPU makes of them."""

    kept: Error
    expanded: Error


def quantised_errors(plain: Path, quantised: Path, bits: Bits) -> Quantised:
    """``quantised``: a folder that mlx-lm quantised, or ``plain``, which is then quantised when it is
    loaded."""
    settings: dict[str, Any] = {"dtype": "float32"}
    if quantised == plain:
        settings |= {"quantize": bits, "group_size": families.GROUP_SIZE}
    with mock.patch.object(loading, "_on_cpu", return_value=False):
        kept = loaded(quantised, **settings)
    packed: dict[str, Any] = {name: module for name, module in kept.net.named_modules() if "scales" in module}
    assert packed
    net = loaded(plain).net
    values = [
        (f"{name}.weight", mx.array(unpacked(layer).astype(np.float32))) for name, layer in packed.items()
    ]
    net.load_weights(values, False)
    rows = token_rows()
    expected = slopes(adapted_net(net), rows)
    expanded = loaded(quantised, **settings).net
    return Quantised(
        error(slopes(adapted_net(kept.net), rows), expected),
        error(slopes(adapted_net(expanded), rows), expected),
    )


# What the table says


def verdict(family: Family, errors: Sequence[Error]) -> str:
    tolerances = SENSITIVITY if family.model_type in SENSITIVE else 1
    if all(error.is_within(tolerances) for error in errors):
        return "exact"
    worst = max(errors, key=lambda error: error.of_all)
    return f"wrong: {worst.of_all:.1e} of the largest, {worst.of_tensor:.1e} of {worst.tensor}"


def trained_cells(family: Family, folder: Path) -> list[str]:
    """What the table says of adapters and of batches, for a model that is not refused."""
    families.save(families.build(family), folder)
    kinds: tuple[Kind, ...] = ("lora", "dora")
    texts = [families.text_model(families.build(family)) for _ in kinds]
    adapter_errors = [adapter_error(folder, *pair).error for pair in zip(texts, kinds, strict=True)]
    batches = batch_errors(folder)
    refused = "" if batches.packed else "; packing is refused"
    batch_verdict = verdict(family, [batches.padded, batches.recomputed, *filter(None, [batches.packed])])
    return [verdict(family, adapter_errors), batch_verdict + refused]


def quantised_cell(family: Family, folder: Path) -> str:
    """What the table says of quantised weights."""
    new, old = folder / "new", folder / "old"
    families.save(families.build(family), new)
    if family.old:
        families.write_old_layout(new, old)
    pairs = [quantised_errors(new, new, bits) for bits in BITS]
    for bits in () if family.rounded else BITS:
        written = families.converted(old if family.old else new, folder / str(bits), bits)
        with suppress(ModelError):  # mlx-lm left something out, as the column of its layout says
            pairs += [] if written is None else [quantised_errors(new, written, bits)]
    return verdict(family, [error for pair in pairs for error in pair])
