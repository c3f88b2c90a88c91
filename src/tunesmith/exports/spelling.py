"""The spellings of a kind of export. MLX is not loaded."""

from __future__ import annotations

SHORT = {"gguf": "gguf-q8_0", "mlx-16": "mlx-merged", "mlx-8": "mlx-8bit", "mlx-4": "mlx-4bit"}
"""Other names of kinds."""


def full_name(name: str) -> str:
    """The name of the kind that is spelled ``name``: ``gguf:q8_0`` and ``gguf`` are ``gguf-q8_0``."""
    name = name.replace(":", "-", 1)
    return SHORT.get(name, name)
