"""The values and tensor names of one GGUF file, and what is wrong with them."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from gguf import ReaderTensor

from tunesmith.errors import ModelError

FACTORS = ("rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight")
"""Tensors that belong to the settings, not to the weights."""


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

    def factors(self, name: str) -> np.ndarray | None:
        """The float32 values of one of FACTORS; None if the file does not have it."""
        tensor = self.tensors.get(name)
        return None if tensor is None else np.asarray(tensor.data, np.float32).ravel()

    def unknown(self, value: Any, name: str) -> ModelError:
        return ModelError(f"{self.key(name)} = {value!r} is not understood")
