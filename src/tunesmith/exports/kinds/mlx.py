"""The adapter alone, in mlx-lm's layout."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

from tunesmith.adapters import QALoRA, files
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
    require_class_of_mlx_lm,
    require_stored_base,
)
from tunesmith.model import loading
from tunesmith.model.loading import ModelSpec
from tunesmith.runs import opening
from tunesmith.runs.directory import Run


@register
class MLXAdapter(ExportKind):
    name: ClassVar[str] = "mlx"
    what: ClassVar[str] = "adapter for mlx-lm (--adapter-path)"
    stands_alone: ClassVar[bool] = False
    tolerance: ClassVar[Tolerance] = Tolerance(kl=1e-4, p99=1e-3, top=0.99, lost=0.01, step=UNROUNDED)

    def accepts(self, tuned: Tuned) -> None:
        require_class_of_mlx_lm(tuned, self.name)
        require_stored_base(tuned, self.name)
        if files.has_dora_on_experts(tuned.checkpoint):
            raise refuse("mlx: mlx-lm has no DoRA on routed experts", "--to mlx-merged")

    def write(self, tuned: Tuned, folder: Path, notify: Sink) -> ArtefactNotes:
        adapter = tuned.config.adapter
        if isinstance(adapter, QALoRA):
            files.save_as_lora(tuned.loaded.net, adapter, folder)
        else:
            files.copy_without_start(tuned.checkpoint, folder)
        return ArtefactNotes(
            remarks=(f"use: mlx_lm.generate --model {tuned.loaded.path} --adapter-path <folder>",)
        )

    def reload(self, folder: Path, source: ModelSpec, run: Run, notify: Sink) -> Reloaded:
        loaded = loading.load(plain(source), notify)
        renderer = opening.renderer_of(run, source.tokenizer or loaded.path)
        merge = files.load_by_mlx_lm(loaded.net, folder)
        return Reloaded(loaded.net, renderer, declared_ends(loaded.path, renderer), merge=merge)
