"""Adapters that PEFT saved: adapter_model.safetensors and adapter_config.json.

The tensors decide which layers are adapted and with which rank, the settings how the update is scaled. A
layer is found by its name in the base's own files, which are named as in transformers. Tensors that belong
to no update are modules that were trained in full. What the adapters here cannot compute is refused by
name."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

import mlx.core as mx
from mlx.utils import tree_flatten
from pydantic import BaseModel, ConfigDict, Field

from tunesmith.adapters import files
from tunesmith.adapters.attachment import Adapter
from tunesmith.adapters.specs import DoRA, LoRA
from tunesmith.errors import ModelError, listing
from tunesmith.events import Notice, Sink
from tunesmith.files import checked
from tunesmith.model.loading import Loaded
from tunesmith.model.stored import places

PREFIX, MAGNITUDE = "base_model.model.", "lora_magnitude_vector"
PLAIN_STARTS = ("gaussian", "orthogonal", "eva")
"""Values of init_lora_weights that leave the base as it is; pissa, olora, loftq and others change it."""
CHANGES_RESULT = (
    "alora_invocation_tokens",
    "arrow_config",
    "kasa_config",
    "layer_replication",
    "lora_bias",
    "monteclora_config",
    "target_parameters",
    "trainable_token_indices",
    "use_bdlora",
    "use_qalora",
)
"""Settings of PEFT that change what an adapter computes."""
WITHOUT_EFFECT = frozenset(
    "auto_mapping corda_config ensure_weight_tying eva_config exclude_modules fan_in_fan_out inference_mode "
    "layers_pattern layers_to_transform loftq_config lora_ga_config megatron_config megatron_core "
    "modules_to_save peft_version qalora_group_size revision runtime_config target_modules task_type "
    "velora_config".split()
)
"""Settings that say how an adapter was begun, or which layers it has, which the tensors say too."""


class PEFTSettings(BaseModel):
    """adapter_config.json of PEFT. Settings that are not fields are in ``model_extra``."""

    model_config = ConfigDict(extra="allow")

    peft_type: str
    r: int = Field(8, ge=1)
    lora_alpha: float = Field(8, gt=0)
    lora_dropout: float = Field(0.0, ge=0, lt=1)
    bias: str = "none"
    use_rslora: bool = False
    use_dora: bool = False
    rank_pattern: dict[str, int] | None = None
    alpha_pattern: dict[str, float] | None = None
    init_lora_weights: bool | str | None = True
    base_model_name_or_path: str | None = None

    def rank(self, module: str) -> int:
        """The rank of the update beside ``module``."""
        return _of_pattern(self.rank_pattern, module, self.r)

    def alpha(self, module: str) -> float:
        return _of_pattern(self.alpha_pattern, module, self.lora_alpha)


_Value = TypeVar("_Value", int, float)


def _of_pattern(patterns: Mapping[str, _Value] | None, module: str, usual: _Value) -> _Value:
    """The value of the first pattern that the end of the name matches, as PEFT chooses it."""
    for pattern, value in (patterns or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            return value
    return usual


def read(folder: Path, loaded: Loaded, notify: Sink) -> tuple[Adapter, ...]:
    """The adapter in ``folder``, in one part for each rank and scale. Raises ModelError if it cannot be read,
    has what cannot be expressed, or names a layer that the base does not have."""
    settings = _settings(folder, notify)
    tensors = files.read_tensors(folder / files.PEFT_WEIGHTS)
    in_net = _names_in_net(loaded)
    layers = sorted(
        name.removesuffix(".lora_A.weight") for name in tensors if name.endswith(".lora_A.weight")
    )
    parts: dict[tuple[int, float], dict[str, mx.array]] = {}
    full: dict[str, mx.array] = {}
    problems: list[str] = []
    for layer in layers:
        module = layer.removeprefix(PREFIX)
        update = _update(tensors, layer, settings)
        if f"{module}.weight" not in in_net:
            problems.append(f"{layer} is not a layer of the base")
        elif isinstance(update, str):
            problems.append(update)
        else:
            name = in_net[f"{module}.weight"].removesuffix(".weight")
            part = parts.setdefault((settings.rank(module), settings.alpha(module)), {})
            part |= {f"{name}.{suffix}": tensor for suffix, tensor in update.items()}
    for name, tensor in tensors.items():  # what belongs to no update
        if name.removeprefix(PREFIX) in in_net:
            full[in_net[name.removeprefix(PREFIX)]] = tensor
        else:
            problems.append(f"{name} is not a tensor that is read")
    if problems:
        message = f"{len(problems)} parts of the adapter cannot be used:\n{listing(sorted(problems))}"
        hint = (
            "an adapter fits only the model that it was trained on; LoRA and DoRA of linear layers are read"
        )
        raise ModelError(message, where=str(folder), hint=hint)
    if not parts:
        raise ModelError("the adapter has no LoRA tensors", where=str(folder))
    return tuple(_adapters(parts, full, settings, str(folder)))


def _settings(folder: Path, notify: Sink) -> PEFTSettings:
    """The settings beside the tensors. Raises ModelError if some of them cannot be expressed."""
    where = f"{folder / files.CONFIG}"
    settings = checked(files.read_settings(folder), PEFTSettings, where, ModelError, None)
    hint = "merge it in PEFT (merge_and_unload) and give the merged model"
    if settings.peft_type != "LORA":
        message = f"is an adapter of PEFT's type {settings.peft_type}; LORA is read"
        raise ModelError(message, where=where, hint=hint)
    extra = {key: value for key, value in (settings.model_extra or {}).items() if value}
    refused = [key for key in CHANGES_RESULT if key in extra]
    refused += ["bias"] if settings.bias != "none" else []
    start = settings.init_lora_weights
    refused += ["init_lora_weights"] if isinstance(start, str) and start not in PLAIN_STARTS else []
    if refused:
        values = {**extra, "bias": settings.bias, "init_lora_weights": start}
        named = ", ".join(f"{key}: {values[key]}" for key in refused)
        raise ModelError(f"has settings that cannot be expressed ({named})", where=where, hint=hint)
    if unknown := sorted(extra.keys() - WITHOUT_EFFECT):
        text = f"settings of PEFT that are not known here are ignored: {', '.join(unknown)}"
        notify(Notice(text, level="warning", count=len(unknown), where=where))
    return settings


def _names_in_net(loaded: Loaded) -> dict[str, str]:
    """Name in the base's files → name in the net; also the names of the net itself, for modules that are
    stored otherwise."""
    flat: Any = tree_flatten(loaded.net.parameters())
    stored = places(loaded.net, loaded.path, loaded.config)
    whole = {name: place.name for name, place in stored.items() if place.expert is None}
    return {name: name for name, _ in flat} | whole


def _update(tensors: dict[str, mx.array], layer: str, settings: PEFTSettings) -> dict[str, mx.array] | str:
    """The tensors of one layer's update, taken from ``tensors``, by the last part of their names in an
    adapted model; or what is wrong with them."""
    a = tensors.pop(f"{layer}.lora_A.weight")
    b = tensors.pop(f"{layer}.lora_B.weight", None)
    magnitudes = [tensors.pop(f"{layer}.{MAGNITUDE}{end}", None) for end in ("", ".weight")]
    magnitude = next((tensor for tensor in magnitudes if tensor is not None), None)
    rank = settings.rank(layer.removeprefix(PREFIX))
    if b is None:
        return f"{layer} has lora_A and no lora_B"
    if a.ndim != 2 or b.ndim != 2 or a.shape[0] != rank or b.shape[1] != rank:
        return f"{layer}: factors {a.shape} and {b.shape} are not of rank {rank}, which the settings say"
    if (magnitude is not None) != settings.use_dora:
        return (
            f"{layer} has {'no' if settings.use_dora else 'a'} magnitude, and use_dora is {settings.use_dora}"
        )
    update = {"lora_a": a.T, "lora_b": b.T}
    return update if magnitude is None else update | {"m": magnitude.reshape(-1)}


def _adapters(
    parts: Mapping[tuple[int, float], Mapping[str, mx.array]],
    full: Mapping[str, mx.array],
    settings: PEFTSettings,
    source: str,
) -> Iterator[Adapter]:
    """One adapter for each rank and alpha; the first also has the modules that were trained in full."""
    kind = DoRA if settings.use_dora else LoRA
    for number, ((rank, alpha), tensors) in enumerate(parts.items()):
        layers = tuple(sorted({name.rpartition(".")[0] for name in tensors}))
        beside = full if number == 0 else {}
        values: dict[str, object] = {
            "rank": rank,
            "alpha": alpha,
            "dropout": settings.lora_dropout,
            "rank_stabilised": settings.use_rslora,
            "targets": layers,
            "full_modules": tuple(sorted({name.rpartition(".")[0] for name in beside})),
        }
        spec = kind.model_validate(values)
        yield Adapter(spec, {**tensors, **beside}, source, layers)
