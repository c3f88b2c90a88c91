"""What is trained beside or inside the weights? LoRA, DoRA, QA-LoRA and full modules: specs that settings
name, layers that compute (of one matrix, and of routed experts), values that attach to a model and detach
again, files that mlx-lm reads."""

from tunesmith.adapters.attachment import Adapter, Handle
from tunesmith.adapters.experts import DoRAExperts, LoRAExperts
from tunesmith.adapters.files import (
    CONFIG,
    WEIGHTS,
    attached,
    has_dora_on_experts,
    load,
    load_tensors,
    read,
    read_layers,
    read_spec,
    save,
)
from tunesmith.adapters.layers import (
    AdapterLayer,
    DoRALinear,
    LoRALinear,
    QALoRALinear,
    adapted,
    bypassed,
    dense,
    seed_dropout,
    trainable,
)
from tunesmith.adapters.merging import merge
from tunesmith.adapters.routing import Routing, routed
from tunesmith.adapters.specs import AdapterSpec, Attached, DoRA, Full, LoRA, QALoRA

__all__ = [
    "CONFIG",
    "WEIGHTS",
    "Adapter",
    "AdapterLayer",
    "AdapterSpec",
    "Attached",
    "DoRA",
    "DoRAExperts",
    "DoRALinear",
    "Full",
    "Handle",
    "LoRA",
    "LoRAExperts",
    "LoRALinear",
    "QALoRA",
    "QALoRALinear",
    "Routing",
    "adapted",
    "attached",
    "bypassed",
    "dense",
    "has_dora_on_experts",
    "load",
    "load_tensors",
    "merge",
    "read",
    "read_layers",
    "read_spec",
    "routed",
    "save",
    "seed_dropout",
    "trainable",
]
