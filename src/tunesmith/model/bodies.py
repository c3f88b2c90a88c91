"""Where the parts of a model lie: the text model inside a multimodal wrapper, and its body, which makes
hidden states of tokens. What the text model does after its body is its head.

Wrappers (Gemma 3 and 4, Qwen3.5, Mistral 3, Qwen3-VL, Llama 4, …) name their text model ``language_model``;
mlx-lm leaves out their vision weights."""

from __future__ import annotations

import mlx.nn as nn

BODIES = ("model", "backbone", "transformer")
"""What text models call their body."""


def text_model(net: nn.Module) -> nn.Module:
    """The text model inside a wrapper; ``net`` itself if it is not a wrapper."""
    while "language_model" in net:
        net = net["language_model"]
    return net


def body_name(net: nn.Module) -> str:
    """What the text model inside ``net`` calls its body. Raises KeyError if it has none of these names."""
    text = text_model(net)
    for name in BODIES:
        if name in text:
            return name
    raise KeyError(f"none of {', '.join(BODIES)} is in {type(text).__name__}")


def body(net: nn.Module) -> nn.Module:
    """The body of the text model inside ``net``. Raises KeyError as `body_name` does."""
    return text_model(net)[body_name(net)]


def block_prefixes(net: nn.Module) -> tuple[str, ...]:
    """How the names of tensors in the blocks begin, as the text model inside ``net`` names them: a body holds
    its blocks in lists."""
    name = body_name(net)
    lists = {child: value for child, value in body(net).items() if isinstance(value, list)}
    return tuple(
        f"{name}.{child}."
        for child, value in lists.items()
        if any(isinstance(block, nn.Module) for block in value)
    )
