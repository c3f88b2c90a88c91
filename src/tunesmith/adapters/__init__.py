"""What is trained beside or inside the weights? LoRA, DoRA and full modules: specs that settings name, layers
that compute, values that attach to a model and detach again, files that mlx-lm reads."""

from tunesmith.adapters.attachment import Adapter, Handle
from tunesmith.adapters.files import (
    CONFIG,
    WEIGHTS,
    attached,
    go_on,
    load,
    load_tensors,
    read,
    read_spec,
    save,
)
from tunesmith.adapters.layers import DoRALinear, LoRALinear, dense, seed_dropout, trainable
from tunesmith.adapters.merging import merge
from tunesmith.adapters.routing import Routing, routed
from tunesmith.adapters.specs import AdapterSpec, Attached, DoRA, Full, LoRA

__all__ = [
    "CONFIG",
    "WEIGHTS",
    "Adapter",
    "AdapterSpec",
    "Attached",
    "DoRA",
    "DoRALinear",
    "Full",
    "Handle",
    "LoRA",
    "LoRALinear",
    "Routing",
    "attached",
    "dense",
    "go_on",
    "load",
    "load_tensors",
    "merge",
    "read",
    "read_spec",
    "routed",
    "save",
    "seed_dropout",
    "trainable",
]
