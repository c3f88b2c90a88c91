"""Which settings of one model fit this machine? For ``doctor --plan``, from the headers of its weights."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import NamedTuple

from tunesmith import events
from tunesmith.display.console import size
from tunesmith.errors import TunesmithError
from tunesmith.events import Sink
from tunesmith.machine.memory import room
from tunesmith.model import outlines
from tunesmith.model.loading import ModelSpec
from tunesmith.runs.config import RunConfig
from tunesmith.training import footprint
from tunesmith.training.anatomy import Anatomy
from tunesmith.training.footprint import Micro
from tunesmith.training.forecast import Outline

TOKENS = 2048
"""Of the row with which settings are compared; all are learned."""
MOST_TOKENS = 1 << 17
KINDS = {
    "LoRA on all linear layers": {"kind": "lora", "targets": "all-linear"},
    "full weights": {"kind": "full"},
}


class FittingSetting(NamedTuple):
    """``bytes``: of MLX's allocator for one row of `TOKENS`. ``tokens``: the longest row that fits; 0 if
    none does."""

    name: str
    bytes: float
    tokens: int

    @property
    def fits(self) -> bool:
        return self.tokens >= TOKENS

    def text(self) -> str:
        memory = f"{size(self.bytes)} for a row of {TOKENS:,} tokens"
        if not self.tokens:
            return f"{memory}: does not fit"
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
                anatomy = _anatomy(model, bits, adapter)
                if anatomy is None:  # it is quantised already
                    continue
                for recomputed in (False, True):
                    name = kind + ("" if bits is None else f", {bits} bits")
                    name += ", layers recomputed" if recomputed else ""
                    rows.append(
                        FittingSetting(
                            name, _needed(anatomy, TOKENS, recomputed), _longest(anatomy, recomputed, most)
                        )
                    )
    return rows


def _anatomy(model: ModelSpec, bits: int | None, adapter: dict[str, str]) -> Anatomy | None:
    from tunesmith.training import anatomy

    quantised = model.model_copy(update={"quantize": bits})
    tree = {"model": quantised.model_dump(), "data": {"train": ("rows",)}, "adapter": adapter}
    try:
        outline = Outline.of(RunConfig.model_validate(tree))
    except TunesmithError:
        if bits is None and adapter["kind"] == "lora":
            raise
        return None
    return anatomy.of(outline.net, outline.settings)


def _needed(anatomy: Anatomy, tokens: int, recomputed: bool) -> float:
    """Bytes at the peak of updates of one row, with AdamW."""
    state = footprint.state_bytes(anatomy, "adamw")
    moments = [
        footprint.training(anatomy, Micro(tokens, tokens), recomputed=recomputed, several=True),
        footprint.stepping(anatomy, "adamw", instrumented=True),
    ]
    above = max(moment.total for moment in moments)
    return anatomy.weights_bytes + anatomy.adapter_bytes + state + above


def _longest(anatomy: Anatomy, recomputed: bool, most: float) -> int:
    """The longest row that fits, in steps of 128 tokens; memory grows with it."""
    low, high = 0, MOST_TOKENS // 128
    while low < high:
        middle = (low + high + 1) // 2
        fits = _needed(anatomy, 128 * middle, recomputed) <= most
        low, high = (middle, high) if fits else (low, middle - 1)
    return 128 * low
