"""The adapter alone, in PEFT's layout: for transformers, vLLM and SGLang."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, ClassVar

import mlx.core as mx
from mlx.utils import tree_unflatten

from tunesmith.adapters import DoRALinear, LoRAExperts, LoRALinear, adapted, files
from tunesmith.adapters.specs import DTYPES, Full
from tunesmith.errors import ExportError
from tunesmith.events import Sink
from tunesmith.exports.kind import (
    UNROUNDED,
    ArtefactNotes,
    ExportKind,
    Reloaded,
    Tolerance,
    Tuned,
    declared_ends,
    plain,
    refuse,
    register,
    require_stored_base,
)
from tunesmith.model import loading
from tunesmith.model.loading import ModelSpec
from tunesmith.model.stored import places
from tunesmith.runs import opening
from tunesmith.runs.directory import Run

WEIGHTS, CONFIG, PREFIX = "adapter_model.safetensors", "adapter_config.json", "base_model.model."
MAGNITUDE = "lora_magnitude_vector"


@register
class PEFTAdapter(ExportKind):
    name: ClassVar[str] = "peft"
    what: ClassVar[str] = "adapter for transformers with PEFT, vLLM and SGLang"
    stands_alone: ClassVar[bool] = False
    tolerance: ClassVar[Tolerance] = Tolerance(kl=1e-4, p99=1e-3, top=0.99, lost=0.01, step=UNROUNDED)

    def accepts(self, tuned: Tuned) -> None:
        require_stored_base(tuned, self.name)
        instead = "--to hf writes a merged model that stands alone"
        if isinstance(tuned.config.adapter, Full):
            raise refuse("peft: the weights were trained in full: there is no adapter", instead)
        config = tuned.base_config
        if {"quantization", "quantization_config"} & config.keys():
            what = "peft: the base is quantised by MLX, and transformers cannot load it"
            raise refuse(what, "--to mlx keeps the adapter for mlx-lm, --to mlx-merged stands alone")
        if "text_config" in config:
            raise refuse("peft: the base is a text model inside a multimodal one", instead)

    def write(self, tuned: Tuned, folder: Path, notify: Sink) -> ArtefactNotes:
        layers, spec = adapted(tuned.loaded.net), tuned.config.adapter
        if isinstance(spec, Full) or any(isinstance(layer, LoRAExperts) for layer in layers.values()):
            hint = "--to hf, or --to mlx"
            raise ExportError("peft: routed experts are adapted, which PEFT stores in another way", hint=hint)
        names = _stored_names(tuned)
        if missing := sorted(layers.keys() - names.keys()):
            message = f"peft: the base's files have no layer of the name {missing[0]}"
            raise ExportError(message, hint="--to mlx")
        tensors: dict[str, mx.array] = {}
        dtype = DTYPES[spec.dtype]
        for name, layer in layers.items():
            assert isinstance(layer, LoRALinear)  # layers of experts were refused
            module = PREFIX + names[name]
            tensors[f"{module}.lora_A.weight"] = layer.expanded_a().T.astype(dtype)
            tensors[f"{module}.lora_B.weight"] = layer.lora_b.T
            if isinstance(layer, DoRALinear):
                tensors[f"{module}.{MAGNITUDE}"] = layer.m
        (folder / WEIGHTS).write_bytes(files.serialised(tensors, "pt"))
        settings = {
            "peft_type": "LORA",
            "task_type": "CAUSAL_LM",
            "base_model_name_or_path": tuned.source.path,
            "revision": tuned.source.revision,
            "r": spec.rank,
            "lora_alpha": int(spec.alpha) if spec.alpha == int(spec.alpha) else spec.alpha,
            "lora_dropout": spec.dropout,
            "use_rslora": spec.rank_stabilised,
            "use_dora": spec.kind == "dora",
            "target_modules": sorted(names[name] for name in layers),
            "bias": "none",
            "fan_in_fan_out": False,
            "inference_mode": True,
        }
        (folder / CONFIG).write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
        return ArtefactNotes(remarks=("vLLM does not load DoRA",) if spec.kind == "dora" else ())

    def reload(self, folder: Path, source: ModelSpec, run: Run, notify: Sink) -> Reloaded:
        loaded = loading.load(plain(source), notify)
        renderer = opening.renderer_of(run, source.tokenizer or loaded.path)
        stored = places(loaded.net, loaded.path, loaded.config)
        problems = _apply(loaded.net, folder, {name: place.name for name, place in stored.items()})
        return Reloaded(loaded.net, renderer, declared_ends(loaded.path, renderer), tuple(problems))


def _stored_names(tuned: Tuned) -> dict[str, str]:
    """Name of a layer in the net → its name in the base's files."""
    found = places(tuned.loaded.net, tuned.loaded.path, tuned.loaded.config)
    suffix = ".weight"
    return {
        place.name.removesuffix(suffix): name.removesuffix(suffix)
        for name, place in found.items()
        if name.endswith(suffix) and place.expert is None
    }


def _apply(net: Any, folder: Path, places: dict[str, str]) -> list[str]:
    """Put the adapter in place as PEFT reads it; returns what matches nothing. A layer that a factor does not
    fit is left out."""
    settings = json.loads((folder / CONFIG).read_text("utf-8"))
    tensors, modules = files.read_tensors(folder / WEIGHTS), dict(net.named_modules())
    rank = settings["r"]
    scale = settings["lora_alpha"] / (rank**0.5 if settings.get("use_rslora") else rank)
    problems: list[str] = []
    for name in sorted(name.removesuffix(".lora_A.weight") for name in tensors if ".lora_A." in name):
        a, b = tensors[f"{name}.lora_A.weight"], tensors[f"{name}.lora_B.weight"]
        place = places.get(f"{name.removeprefix(PREFIX)}.weight", "").removesuffix(".weight")
        linear: Any = modules.get(place)
        if linear is None or name.removeprefix(PREFIX) not in settings["target_modules"]:
            problems.append(f"{name} matches no layer of the base")
            continue
        if (b.shape[0], a.shape[1]) != linear.weight.shape or a.shape[0] != rank:
            problems.append(f"{name}: factors {a.shape}, {b.shape} do not fit a weight {linear.weight.shape}")
            continue
        kind = DoRALinear if settings.get("use_dora") else LoRALinear
        layer = kind(linear, rank, scale, 0.0, mx.random.key(0))
        layer.lora_a, layer.lora_b = a.T, b.T
        if isinstance(layer, DoRALinear):
            layer.m = tensors[f"{name}.{MAGNITUDE}"]
        net.update_modules(tree_unflatten([(place, layer)]))
    net.eval()
    return problems
