"""Tiny mixtures of experts with random weights, as mlx-lm's own classes."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten, tree_map
from safetensors.numpy import save_file

import tiny

SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "rms_norm_eps": 1e-5,
    "num_experts_per_tok": 2,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
}
FAMILIES = {
    "qwen3_moe": {
        "num_experts": 4,
        "intermediate_size": 64,
        "moe_intermediate_size": 96,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "head_dim": 16,
        "max_position_embeddings": 128,
        "norm_topk_prob": True,
    },
    "qwen2_moe": {
        "num_experts": 4,
        "intermediate_size": 64,
        "moe_intermediate_size": 96,
        "shared_expert_intermediate_size": 64,
    },
    "mixtral": {"num_local_experts": 4, "intermediate_size": 96},
    "olmoe": {"num_experts": 4, "intermediate_size": 96, "norm_topk_prob": False},
    "gpt_oss": {
        "num_local_experts": 4,
        "intermediate_size": 96,
        "head_dim": 16,
        "sliding_window": 128,
        "layer_types": ["sliding_attention", "full_attention"],
    },
}
HOLDERS = {"mixtral": "block_sparse_moe.switch_mlp", "gpt_oss": "mlp.experts"}
"""Where a block has its experts, where it is not ``mlp.switch_mlp``."""


def fresh(
    family: str = "qwen3_moe", bits: int | None = None, dtype: mx.Dtype = mx.float32, **changes: object
) -> nn.Module:
    """All but the adapter is the same each time."""
    module = importlib.import_module(f"mlx_lm.models.{family}")
    settings = {"model_type": family, **SIZES, **FAMILIES[family], **changes}
    net = module.Model(module.ModelArgs.from_dict(settings))
    random = np.random.Generator(np.random.PCG64(5))
    net.update(
        tree_map(
            lambda value: mx.array(random.normal(0, 0.3, value.shape).astype(np.float32) + (value.ndim == 1)),
            net.parameters(),
        )
    )
    net.set_dtype(dtype)
    if bits is not None:
        nn.quantize(net, group_size=32, bits=bits)
    mx.eval(net.parameters())
    return net.eval()


def expert_layers(family: str) -> list[str]:
    """Names of the layers of experts of `fresh`."""
    holder = HOLDERS.get(family, "mlp.switch_mlp")
    names = ("down_proj", "gate_proj", "up_proj")
    return [f"model.layers.{block}.{holder}.{name}" for block in (0, 1) for name in names]


def write(folder: Path, family: str = "qwen3_moe") -> Path:
    """A model folder with weights of `fresh` and a tokenizer."""
    folder.mkdir(parents=True, exist_ok=True)
    vocabulary = tiny.write_tokenizer(folder)
    changes = {"vocab_size": vocabulary, "hidden_size": 64}
    net = fresh(family, **changes)
    settings = {"model_type": family, **SIZES, **FAMILIES[family], **changes}
    (folder / "config.json").write_text(json.dumps(settings))
    flat: Any = tree_flatten(net.parameters())
    tensors = {name: np.array(value) for name, value in flat}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "mlx"})
    return folder
