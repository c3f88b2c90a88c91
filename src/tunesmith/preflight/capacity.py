"""Which settings of one model fit this machine? For ``doctor --plan``, from the headers of its weights."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from tunesmith import events
from tunesmith.display.console import size
from tunesmith.errors import TunesmithError
from tunesmith.events import Sink
from tunesmith.machine.memory import room
from tunesmith.model import outlines
from tunesmith.model.loading import ModelSpec
from tunesmith.runs.config import RunConfig
from tunesmith.training import anatomy, footprint
from tunesmith.training.anatomy import Anatomy
from tunesmith.training.footprint import Micro
from tunesmith.training.forecast import Outline

TOKENS = 2048
"""Of the row with which settings are compared; all are learned."""
MOST_TOKENS = 1 << 17
"""Of a row of a model that does not say how long its context is."""
CONTEXT = ("max_position_embeddings", "n_positions")
"""The keys of config.json with the length of the context."""
KINDS = {
    "LoRA on all linear layers": {"kind": "lora", "targets": "all-linear"},
    "full weights": {"kind": "full"},
}


class FittingSetting(NamedTuple):
    """``bytes``: of MLX's allocator for one row of ``row`` tokens. ``tokens``: the longest row that fits, 0
    if none does; no row is longer than ``context``."""

    name: str
    row: int
    bytes: float
    tokens: int
    context: int

    def text(self) -> str:
        memory = f"{size(self.bytes)} for a row of {self.row:,} tokens"
        if not self.tokens:
            return f"{memory}: does not fit"
        if self.tokens == self.context:
            return f"{memory}; rows as long as the model's context, {self.context:,} tokens, fit"
        return f"{memory}; rows of up to {self.tokens:,} tokens fit"


def settings(path: str, notify: Sink = events.silent) -> list[FittingSetting]:
    """Full weights and LoRA, as the model is stored and quantised, with kept and recomputed layers. Raises
    ModelError if the model cannot be read."""
    rows: list[FittingSetting] = []
    most = room().free - room().program
    with tempfile.TemporaryDirectory(prefix="tunesmith-plan-") as folder:
        model = outlines.outlined(ModelSpec(path=path), Path(folder), notify)
        for kind, adapter in KINDS.items():
            for bits in (None, 8, 4) if adapter["kind"] == "lora" else (None,):
                outline = _outline(model, bits, adapter)
                if outline is None:  # it is quantised already
                    continue
                for recomputed in (False, True):
                    name = kind + ("" if bits is None else f", {bits} bits")
                    name += ", layers recomputed" if recomputed else ""
                    rows.append(_fitting(name, outline, recomputed, most))
    return rows


def _fitting(name: str, outline: Outline, recomputed: bool, most: float) -> FittingSetting:
    parts = anatomy.of(outline.net, outline.settings)
    context = _context(outline.settings)
    row = min(TOKENS, context)
    needed = _needed(parts, row, recomputed)
    return FittingSetting(name, row, needed, _longest(parts, recomputed, most, context), context)


def _context(settings: Mapping[str, Any]) -> int:
    """Tokens of the model's context, or `MOST_TOKENS` if its config.json does not say."""
    trees = (settings, settings.get("text_config") or {})
    lengths = [tree[key] for tree in trees for key in CONTEXT if isinstance(tree.get(key), int)]
    return lengths[0] if lengths else MOST_TOKENS


def _outline(model: ModelSpec, bits: int | None, adapter: dict[str, str]) -> Outline | None:
    quantised = model.model_copy(update={"quantize": bits})
    tree = {"model": quantised.model_dump(), "data": {"train": ("rows",)}, "adapter": adapter}
    try:
        return Outline.of(RunConfig.model_validate(tree))
    except TunesmithError:
        if bits is None and adapter["kind"] == "lora":
            raise
        return None


def _needed(parts: Anatomy, tokens: int, recomputed: bool) -> float:
    """Bytes at the peak of updates of one row, with AdamW."""
    state = footprint.state_bytes(parts, "adamw")
    moments = [
        footprint.training(parts, Micro(tokens, tokens), recomputed=recomputed, several=True),
        footprint.stepping(parts, "adamw", instrumented=True),
    ]
    above = max(moment.total for moment in moments)
    return parts.weights_bytes + parts.adapter_bytes + state + above


def _longest(parts: Anatomy, recomputed: bool, most: float, context: int) -> int:
    """The longest row up to ``context`` that fits, in steps of 128 tokens; memory grows with it."""
    if _needed(parts, context, recomputed) <= most:
        return context
    low, high = 0, context // 128
    while low < high:
        middle = (low + high + 1) // 2
        fits = _needed(parts, 128 * middle, recomputed) <= most
        low, high = (middle, high) if fits else (low, middle - 1)
    return 128 * low
