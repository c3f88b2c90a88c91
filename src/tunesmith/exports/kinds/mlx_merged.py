"""A merged model in mlx-lm's layout, in the dtype of the base or quantised after merging.

Merging into quantised weights and quantising again erases the update. So the base is expanded, merged in
float32, rounded once to the dtype of its files, and then quantised. QA-LoRA alone is merged into the biases
of a base of the same bits, whose codes and scales stay."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import ClassVar, Literal

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_unflatten

from tunesmith.adapters import QALoRA, merging
from tunesmith.events import Sink
from tunesmith.exports import stored, weights
from tunesmith.exports.kind import (
    ROUNDED,
    ArtefactNotes,
    ExportKind,
    Reloaded,
    Tolerance,
    Tuned,
    declared_ends,
    plain,
    refuse,
    register,
    require_class_of_mlx_lm,
)
from tunesmith.model import loading
from tunesmith.model.loading import ModelSpec
from tunesmith.model.stored import places, tensors
from tunesmith.model.vocabulary import ExtendedEmbedding, ExtendedHead
from tunesmith.runs import opening
from tunesmith.runs.directory import Run


class _MLXModel(ExportKind):
    """Abstract. ``bits``: None for the dtype of the base."""

    bits: ClassVar[Literal[4, 8] | None] = None

    def accepts(self, tuned: Tuned) -> None:
        require_class_of_mlx_lm(tuned, self.name)
        if tuned.source.resize_embeddings and self._fuses(tuned):
            what = f"{self.name}: rows were added to the embedding of a base whose codes are kept"
            raise refuse(what, "--to hf or --to mlx-merged writes them")

    def write(self, tuned: Tuned, folder: Path, notify: Sink) -> ArtefactNotes:
        loaded, base = tuned.loaded, tuned.loaded.path
        codes = {name: tensor.code for name, tensor in tensors(base).items()}
        usual = Counter(code for code in codes.values() if code in stored.CODES).most_common(1)[0][0]
        code_of = {
            place.name: codes[name]
            for name, place in places(loaded.net, base, loaded.config).items()
            if codes[name] in stored.CODES
        }

        def dtype_of(name: str) -> mx.Dtype:
            return stored.CODES[code_of.get(name, usual)][1]

        stored.copy_settings(base, tuned.tokenizer, folder)
        (folder / "model.safetensors.index.json").unlink(missing_ok=True)
        packing = ("quantization", "quantization_config")
        config = {key: value for key, value in tuned.base_config.items() if key not in packing}
        notes, vocabulary = ArtefactNotes(), None
        if self._fuses(tuned):
            packed = loading.load_packed(tuned.source)
            config |= {key: packed.config["quantization"] for key in packing}
            survived = merging.save_packed(loaded.net, packed.net, dtype_of, folder)
            notes = ArtefactNotes(survived, ("codes and scales are those of the base: only biases changed",))
        else:
            vocabulary = _join_rows(loaded.net)
            config, n_dense = merging.save_dense(loaded.net, config, dtype_of, folder, self.bits)
            if n_dense:
                what = f"{n_dense} layers are not quantised: their width is not a multiple of {merging.GROUP}"
                notes = ArtefactNotes(remarks=(what,))
        (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        if vocabulary is not None:
            stored.write_vocabulary(folder, vocabulary)
        stored.write_ends(folder, tuned.renderer.eos_ids)
        return notes

    def _fuses(self, tuned: Tuned) -> bool:
        """Whether the adapter can be merged into the quantised base as it is."""
        quantisation = tuned.loaded.config.get("quantization", {})
        adapter = tuned.config.adapter
        alone = isinstance(adapter, QALoRA) and not adapter.full_modules and tuned.source.adapter is None
        return alone and quantisation.get("bits") == self.bits

    def reload(self, folder: Path, source: ModelSpec, run: Run, notify: Sink) -> Reloaded:
        loaded = merging.load(plain(source, folder), notify)
        renderer = opening.renderer_of(run, folder)
        return Reloaded(loaded.net, renderer, declared_ends(folder, renderer))


def _join_rows(net: nn.Module) -> int | None:
    """Put plain tables in place of those that rows were added to; returns the size of the vocabulary, or None
    if there are none."""
    merging.merge(net)
    tables: dict[str, nn.Module] = {}
    sizes: list[int] = []
    dense = weights.dense(net)
    for name, module in net.named_modules():
        if isinstance(module, ExtendedEmbedding | ExtendedHead):
            weight = dense[f"{name}.weight"]()
            size, width = weight.shape
            if isinstance(module, ExtendedEmbedding):
                table: nn.Embedding | nn.Linear = nn.Embedding(size, width)
            else:
                table = nn.Linear(width, size, bias=f"{name}.bias" in dense)
            if f"{name}.bias" in dense:
                table.bias = dense[f"{name}.bias"]()
            table.weight = weight
            tables[name] = table
            sizes.append(size)
    net.update_modules(tree_unflatten(list(tables.items())))
    return max(sizes, default=None)


@register
class MLXMerged(_MLXModel):
    name: ClassVar[str] = "mlx-merged"
    what: ClassVar[str] = "merged model in mlx-lm's layout, in the dtype of the base"
    tolerance: ClassVar[Tolerance] = Tolerance(kl=0.005, p99=0.05, top=0.97, lost=0.1, step=ROUNDED)
    more_precise: ClassVar[str | None] = "mlx"


@register
class MLX8(_MLXModel):
    name: ClassVar[str] = "mlx-8bit"
    what: ClassVar[str] = "merged model in mlx-lm's layout, quantised to 8 bits"
    tolerance: ClassVar[Tolerance] = Tolerance(kl=0.02, p99=0.2, top=0.95, lost=0.25)
    more_precise: ClassVar[str | None] = "mlx-merged"
    bits: ClassVar[Literal[4, 8] | None] = 8


@register
class MLX4(_MLXModel):
    name: ClassVar[str] = "mlx-4bit"
    what: ClassVar[str] = "merged model in mlx-lm's layout, quantised to 4 bits"
    tolerance: ClassVar[Tolerance] = Tolerance(kl=0.1, p99=2.0, top=0.85, lost=0.5)
    more_precise: ClassVar[str | None] = "mlx-8bit"
    bits: ClassVar[Literal[4, 8] | None] = 4
