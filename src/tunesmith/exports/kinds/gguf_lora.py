"""The adapter alone as a GGUF file: for llama.cpp's ``--lora``, beside a GGUF file of the base.

llama.cpp multiplies with alpha / rank, and with 1 if alpha is 0: the scale is in B, and alpha is 0. The A of
QA-LoRA acts on sums over groups of inputs; it is written as the A of the LoRA that computes the same."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import mlx.core as mx
import numpy as np
from gguf import GGMLQuantizationType
from mlx.utils import tree_unflatten

from tunesmith import events
from tunesmith.adapters import LoRALinear, adapted
from tunesmith.adapters.layers import dims
from tunesmith.adapters.specs import Full
from tunesmith.errors import ExportError, ModelError
from tunesmith.events import Sink
from tunesmith.exports.kind import (
    UNROUNDED,
    ArtefactNotes,
    ForLlamaCpp,
    LlamaFiles,
    Reloaded,
    Tolerance,
    Tuned,
    declared_ends,
    plain,
    refuse,
    register,
    require_stored_base,
)
from tunesmith.exports.kinds import gguf
from tunesmith.exports.kinds.gguf import matrix_types, settings
from tunesmith.exports.weights import INSIDE
from tunesmith.model import loading
from tunesmith.model.gguf import weights, writing
from tunesmith.model.gguf.architectures import ARCHITECTURES, Config
from tunesmith.model.gguf.reading import Reader
from tunesmith.model.gguf.writing import Encoding, NewTensor, Slot
from tunesmith.model.loading import ModelSpec
from tunesmith.runs import opening
from tunesmith.runs.directory import Run

FILE = "adapter.gguf"
BASE = "BASE.gguf"
"""Stands for the base in a command, if the base is not a GGUF file."""
ALPHA = "adapter.lora.alpha"
FLOAT32 = GGMLQuantizationType.F32
MERGED = "--to gguf-q8_0 writes a merged model"
MOST_BYTES = 8 << 30
"""Of a base that is written as GGUF only to be read by llama.cpp beside the adapter."""


@register
class GGUFLoRA(ForLlamaCpp):
    name: ClassVar[str] = "gguf-lora"
    what: ClassVar[str] = "adapter for llama.cpp (--lora)"
    tolerance: ClassVar[Tolerance] = Tolerance(kl=1e-4, p99=1e-3, top=0.99, lost=0.01, step=UNROUNDED)
    more_precise: ClassVar[str | None] = "gguf-f32"
    stands_alone: ClassVar[bool] = False

    def accepts(self, tuned: Tuned) -> None:
        if not Path(tuned.source.path).is_file():
            require_stored_base(tuned, self.name)
        source, spec = tuned.source, tuned.config.adapter
        if source.adapter is not None or source.quantize is not None or source.resize_embeddings:
            what = "gguf-lora: the base of this run is not the stored file (model.adapter, model.quantize)"
            raise refuse(what, MERGED)
        if isinstance(spec, Full):
            raise refuse("gguf-lora: the weights were trained in full: there is no adapter", MERGED)
        if spec.kind == "dora" or spec.full_modules:
            what = "gguf-lora: llama.cpp has no DoRA and no modules trained in full beside an adapter"
            raise refuse(what, MERGED)
        try:
            _architecture(settings(tuned.loaded))
        except ModelError as error:
            raise ExportError(f"gguf-lora: {error.what}", hint="--to peft or --to mlx") from error

    def write(self, tuned: Tuned, folder: Path, notify: Sink) -> ArtefactNotes:
        config = settings(tuned.loaded)
        name = _architecture(config)
        layers = adapted(tuned.loaded.net)
        places = {slot.tensor: (file, slot) for file, slot in _slots(name, config).items()}
        tensors: list[NewTensor] = []
        for layer_name, layer in layers.items():
            if not isinstance(layer, LoRALinear):
                raise ExportError("gguf-lora: routed experts are adapted", hint="--to mlx, or --to hf")
            file, slot = places[f"{layer_name.removeprefix(INSIDE)}.weight"]
            b = np.array((layer.factors[1] * layer.scale).T)
            b = weights.in_file(ARCHITECTURES[name], slot.part, b, config)
            tensors.append(_tensor(f"{file}.lora_a", np.array(layer.expanded_a().T)))
            tensors.append(_tensor(f"{file}.lora_b", b))
        values = {
            "general.type": "adapter",
            "general.name": tuned.run.path.name,
            "adapter.type": "lora",
            ALPHA: 0.0,
        }
        writing.write(folder / FILE, name, values, tensors)
        return ArtefactNotes(remarks=_remarks(tuned))

    def llama_files(self, base: Callable[[], Tuned], folder: Path, work: Path) -> LlamaFiles:
        tuned = base()
        stored = Path(tuned.source.path)
        if not stored.is_file():
            stored = work / "base.gguf"
            _write_base(tuned, stored)
        return LlamaFiles(stored, matrix_types(stored), folder / FILE)

    def reload(self, folder: Path, source: ModelSpec, run: Run, notify: Sink) -> Reloaded:
        loaded = loading.load(plain(source), notify)
        renderer = opening.renderer_of(run, source.tokenizer or loaded.path)
        problems = _apply(loaded.net, settings(loaded), Reader(folder / FILE))
        return Reloaded(loaded.net, renderer, declared_ends(loaded.path, renderer), tuple(problems))


def _remarks(tuned: Tuned) -> tuple[str, ...]:
    base = tuned.source.path if Path(tuned.source.path).is_file() else BASE
    use = f"use: llama-server --model {base} --lora {FILE}"
    if base == BASE and {"quantization", "quantization_config"} & tuned.base_config.keys():
        return (use, f"{BASE} must hold the weights that MLX quantised, not those of the original model")
    return (use,)


def _write_base(tuned: Tuned, path: Path) -> None:
    """Write the base in float32, so that nothing but the adapter differs. Raises ExportError if it is too
    large for that, or cannot be written."""
    n_bytes = 4 * sum(make().size for make in gguf.dense(tuned).values())
    if n_bytes > MOST_BYTES:
        raise ExportError(f"the base takes {n_bytes / 1e9:.1f} GB as a GGUF file in float32")
    try:
        gguf.write_new(tuned, path, Encoding("F32"), gguf.dense(tuned), events.silent)
    except ModelError as error:
        raise ExportError(error.what) from error


def _architecture(config: Config) -> str:
    """The name of the architecture whose tensors the adapter changes. Raises ModelError if there is none."""
    by_type = {architecture.model_type: name for name, architecture in ARCHITECTURES.items()}
    return by_type.get(str(config["model_type"])) or writing.architecture_of(config)


def _slots(architecture: str, config: Config) -> dict[str, Slot]:
    return writing.slots(ARCHITECTURES[architecture], config["num_hidden_layers"])


def _tensor(name: str, value: np.ndarray) -> NewTensor:
    content = np.ascontiguousarray(value, np.float32)
    return NewTensor(name, content.shape, FLOAT32, lambda: [content])


def _apply(net: Any, config: Config, reader: Reader) -> list[str]:
    """Put the adapter in place as llama.cpp does; returns what matches nothing, or does not fit."""
    values = {name: field.contents() for name, field in reader.fields.items()}
    architecture = str(values["general.architecture"])
    factors = {tensor.name: np.array(tensor.data) for tensor in reader.tensors}
    modules = {name.removeprefix(INSIDE): (name, module) for name, module in net.named_modules()}
    slots, problems = _slots(architecture, config), []
    for file in sorted(name.removesuffix(".lora_a") for name in factors if name.endswith(".lora_a")):
        a, b = factors[f"{file}.lora_a"], factors[f"{file}.lora_b"]
        slot = slots.get(file)
        name, linear = modules.get(slot.tensor.removesuffix(".weight") if slot else "", ("", None))
        if slot is None or linear is None:
            problems.append(f"{file} matches no layer of the base")
            continue
        if (a.shape[1], b.shape[0]) != dims(linear) or a.shape[0] != b.shape[1]:
            problems.append(f"{file}: factors {a.shape}, {b.shape} do not fit a layer of {dims(linear)}")
            continue
        scale = values[ALPHA] / len(a) if values[ALPHA] else 1.0
        layer = LoRALinear(linear, len(a), scale, 0.0, mx.random.key(0))
        b = weights.from_file(ARCHITECTURES[architecture], slot.part, b, config)
        layer.lora_a, layer.lora_b = mx.array(a.T), mx.array(b.T)
        net.update_modules(tree_unflatten([(name, layer)]))
    net.eval()
    return problems
