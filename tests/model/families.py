"""Tiny random models of mlx-lm's families, made in memory by its own classes."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_map, tree_map_with_path

import tiny
from tunesmith.model import kernels, mends, windows

SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "vocab_size": 96,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 4096,
    "num_hidden_layers": 4,
    "tie_word_embeddings": False,
}
MAMBA = {"mamba_num_heads": 4, "mamba_head_dim": 16, "ssm_state_size": 8, "n_groups": 2, "conv_kernel": 4}
LLAMA4 = {
    "attention_bias": False,
    "attention_chunk_size": 64,
    "interleave_moe_layer_step": 2,
    "intermediate_size_mlp": 64,
    "num_experts_per_tok": 1,
    "num_local_experts": 2,
    "rope_scaling": None,
    "rope_theta": 10000.0,
    "use_qk_norm": True,
}
LINEAR_ATTENTION = {
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "full_attention_interval": 2,
}

WRAPPERS: dict[str, dict[str, Any]] = {
    "gemma3": {"model_type": "gemma3_text", "sliding_window_pattern": 2},
    "gemma4": {
        "model_type": "gemma4_text",
        "global_head_dim": 8,
        "hidden_size_per_layer_input": 0,
        "num_kv_shared_layers": 0,
        "sliding_window_pattern": 2,
        "use_double_wide_mlp": False,
        "tie_word_embeddings": True,
    },
    "qwen3_5": {"model_type": "qwen3_5_text", **LINEAR_ATTENTION},
    "mistral3": {"model_type": "llama"},
    "mistral3/ministral3": {
        "model_type": "ministral3",
        "rope_parameters": {
            "rope_theta": 1e4,
            "llama_4_scaling_beta": 0.1,
            "original_max_position_embeddings": 4096,
        },
    },
    "qwen3_vl": {"model_type": "qwen3", "rope_theta": 10000.0},
    "llama4": {"model_type": "llama4_text", **LLAMA4},
}
"""Multimodal models, with the settings of the text model inside."""

FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "gemma2": {},
    "recurrent_gemma": {
        "attention_bias": False,
        "conv1d_width": 4,
        "logits_soft_cap": 30.0,
        "rope_theta": 10000.0,
        "attention_window_size": 64,
        "block_types": ["recurrent", "attention"],
        "num_key_value_heads": 1,
    },
    "mamba": {
        "state_size": 8,
        "conv_kernel": 4,
        "use_bias": False,
        "use_conv_bias": True,
        "time_step_rank": 4,
    },
    "jamba": {
        "attn_layer_offset": 1,
        "attn_layer_period": 2,
        "expert_layer_offset": 1,
        "expert_layer_period": 2,
        "mamba_d_conv": 4,
        "mamba_d_state": 8,
        "mamba_expand": 2,
        "num_experts": 2,
        "num_experts_per_tok": 1,
    },
    "nemotron_h": {
        "hybrid_override_pattern": ["M", "-", "*", "M"],
        "attention_bias": False,
        "mamba_proj_bias": False,
        "mlp_bias": False,
        "layer_norm_epsilon": 1e-5,
        "use_bias": False,
        "use_conv_bias": True,
        **MAMBA,
    },
    "lfm2": {
        "norm_eps": 1e-5,
        "conv_bias": False,
        "conv_L_cache": 3,
        "block_dim": 32,
        "block_multiple_of": 8,
        "block_ffn_dim_multiplier": 1.0,
        "block_auto_adjust_ff_dim": False,
        "block_ff_dim": 64,
        "full_attn_idxs": [1, 3],
        "layer_types": ["conv", "full_attention", "conv", "full_attention"],
    },
    "granitemoehybrid": {
        "attention_bias": False,
        "embedding_multiplier": 2.0,
        "attention_multiplier": 0.25,
        "logits_scaling": 2.0,
        "residual_multiplier": 0.5,
        "layer_types": ["mamba", "attention", "mamba", "mamba"],
        "shared_intermediate_size": 64,
        "mamba_n_heads": 4,
        "mamba_d_head": 16,
        "mamba_proj_bias": False,
        "mamba_d_state": 8,
        "mamba_d_conv": 4,
        "mamba_n_groups": 1,
        "mamba_conv_bias": True,
    },
    "phi3": {"rope_theta": 10000.0},
}


def made(name: str, seed: int = 0, **settings: Any) -> nn.Module:
    """A frozen random model of a family, or of a wrapper with its text model inside, as `loading.load` leaves
    it."""
    family = name.split("/")[0]
    module = importlib.import_module(f"mlx_lm.models.{family}")
    if name in WRAPPERS:
        text = SIZES | WRAPPERS[name] | settings
        # The wrappers of Gemma overwrite the inner size of the vocabulary with the outer one.
        config = {"model_type": family, "vocab_size": text["vocab_size"], "text_config": text}
    else:
        config = SIZES | {"model_type": family} | FAMILIES.get(name, {}) | settings
    net = module.Model.__new__(module.Model)
    nn.Module.__init__(net)
    net.__init__(module.ModelArgs.from_dict(config))
    mx.random.seed(seed)
    net.update(tree_map_with_path(_random, net.parameters()))
    kernels.install(net)
    mends.install(net, config)
    windows.install(net, config)
    net.eval()
    net.freeze()
    mx.eval(net.parameters())
    return net


def write_wrapper(name: str, folder: Path) -> Path:
    """The folder of a model with a tokenizer, its weights those of `made`."""
    folder.mkdir(parents=True)
    size = tiny.write_tokenizer(folder)
    net = made(name, vocab_size=size)
    flat: Any = tree_flatten(net.parameters())
    mx.save_safetensors(str(folder / "model.safetensors"), dict(flat))
    text = SIZES | WRAPPERS[name] | {"vocab_size": size}
    config = {"model_type": name.split("/")[0], "vocab_size": size, "text_config": text}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def _random(name: str, value: mx.array) -> mx.array:
    """Weights far enough from zero that logits depend on every layer; recurrences stay stable."""
    if name.endswith(("A_log", "dt_bias", ".D", "inv_freq", "layer_scalar")):
        return value
    noise = mx.random.normal(value.shape, dtype=value.dtype)
    return value + 0.1 * noise if value.ndim == 1 else noise * value.shape[-1] ** -0.5


def moved(parameters: Any) -> Any:
    """``parameters`` off their start, so that each has a gradient."""
    return tree_map(lambda value: value + 0.05 * mx.random.normal(value.shape), parameters)
