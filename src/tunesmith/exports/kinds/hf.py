"""A merged model in the base's own layout: its files, in which only the changed tensors are replaced."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

from tunesmith.adapters import merging
from tunesmith.events import Sink
from tunesmith.exports import stored
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
)
from tunesmith.model import vocabulary
from tunesmith.model.loading import ModelSpec
from tunesmith.model.stored import places
from tunesmith.runs import opening
from tunesmith.runs.directory import Run


@register
class Merged(ExportKind):
    name: ClassVar[str] = "hf"
    what: ClassVar[str] = "merged model in the base's own layout, for transformers, vLLM, SGLang and mlx-lm"
    tolerance: ClassVar[Tolerance] = Tolerance(kl=0.005, p99=0.05, top=0.97, lost=0.1, step=ROUNDED)
    more_precise: ClassVar[str | None] = "mlx"

    def accepts(self, tuned: Tuned) -> None:
        config = tuned.base_config
        text = config.get("text_config")
        if {"quantization", "quantization_config"} & {*config, *(text if isinstance(text, dict) else ())}:
            what = "hf: the base's own files are quantised, and quantising again would erase the update"
            raise refuse(what, "train on the model before it was quantised, or keep the adapter: --to mlx")

    def write(self, tuned: Tuned, folder: Path, notify: Sink) -> ArtefactNotes:
        net, base = tuned.loaded.net, tuned.loaded.path
        found = places(net, base, tuned.loaded.config)
        everything = tuned.source.adapter is not None or tuned.source.quantize is not None
        changed = None if everything else stored.changed_names(net)
        stored.require_places(net, found, self.name, everything)
        stored.copy_settings(base, tuned.tokenizer, folder)
        copied = stored.copy_weights(base, folder, tuned.tensors(), found, changed, notify)
        stored.write_ends(folder, tuned.renderer.eos_ids)
        if vocabulary.extended(net):
            stored.write_vocabulary(folder, vocabulary.limits(net).ids)
        use = "use: vllm serve <folder>, or transformers: AutoModelForCausalLM.from_pretrained('<folder>')"
        return ArtefactNotes(copied.survived, (use,))

    def reload(self, folder: Path, source: ModelSpec, run: Run, notify: Sink) -> Reloaded:
        loaded = merging.load(plain(source, folder), notify)
        renderer = opening.renderer_of(run, folder)
        return Reloaded(loaded.net, renderer, declared_ends(folder, renderer))
