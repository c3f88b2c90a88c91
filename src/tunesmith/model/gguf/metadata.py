"""The values and tensor names of one GGUF file, and what is wrong with them."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
from gguf import ReaderTensor

from tunesmith.errors import ModelError

FACTORS = ("rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight")
"""Tensors that belong to the settings, not to the weights."""
WHOLE = frozenset(
    "block_count embedding_length feed_forward_length context_length vocab_size attention.head_count "
    "attention.head_count_kv attention.key_length attention.value_length rope.dimension_count "
    "rope.scaling.original_context_length expert_count expert_used_count expert_feed_forward_length "
    "attention.sliding_window_pattern".split()
)
"""Keys whose value is a whole number."""
MAY_BE_0 = frozenset({"expert_count", "expert_used_count"})
"""Of them those that may be 0; the others are 1 or more."""
WORDS = frozenset({"rope.scaling.type", "rope.scaling.finetuned", "tensor_data_layout"})
"""Keys whose value is not a number."""


class Metadata(NamedTuple):
    """``values``: the keys under the name of the architecture, without that name. ``tensors``: by name, in
    the order of the file."""

    architecture: str
    values: dict[str, Any]
    tensors: dict[str, ReaderTensor]

    def key(self, name: str) -> str:
        return f"{self.architecture}.{name}"

    def number(self, name: str, default: float | None = None) -> float:
        """The number under ``name``: of a float32, the shortest decimal that means it (1e-05 instead of
        9.99999974e-06). Raises ModelError if it is missing and has no default."""
        value = self.values.get(name, default)
        if value is None:
            raise ModelError(f"{self.key(name)} is missing")
        return float(str(np.float32(value))) if isinstance(value, float) else value

    def wrong_numbers(self, known: set[str]) -> list[str]:
        """The values of the known keys that cannot be what their keys say, one text each. A file has several
        tensors for each block, so that a wrong number of blocks shows before it is used."""
        problems = []
        for name, value in self.values.items():
            whole, n_tensors = name in WHOLE, len(self.tensors)
            if name not in known or name in WORDS:
                continue
            least = 1 if whole and name not in MAY_BE_0 else 0
            fits = isinstance(value, int if whole else (int, float)) and not isinstance(value, bool)
            if not fits or not least <= value < (1 << 31 if whole else math.inf):
                kind = "whole number" if whole else "number"
                problems.append(f"{self.key(name)} = {value!r} is not a {kind} from {least}")
            elif name == "block_count" and value > n_tensors:
                problems.append(f"{self.key(name)} is {value}, the file has {n_tensors} tensors")
        return problems

    def factors(self, name: str) -> np.ndarray | None:
        """The float32 values of one of FACTORS; None if the file does not have it."""
        tensor = self.tensors.get(name)
        return None if tensor is None else np.asarray(tensor.data, np.float32).ravel()

    def unknown(self, value: Any, name: str) -> ModelError:
        return ModelError(f"{self.key(name)} = {value!r} is not understood")
