"""GGUF files of tiny models, as llama.cpp's converter writes them: names from the gguf package's table, q and
k of llama-like models with the rows of a head in pairs, Gemma's norms with their 1, experts in stacks."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file

import tiny
from tunesmith.model.gguf.tokenizer import CONTROL, NORMAL

ARCHITECTURES = {
    "llama": "llama",
    "mistral": "mistral3",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
    "qwen3_moe": "qwen3moe",
    "gemma2": "gemma2",
    "gemma3_text": "gemma3",
    "phi3": "phi3",
    "granite": "granite",
    "gpt_oss": "gpt-oss",
    "ministral3": "mistral3",
}
"""By model type."""
PAIRED = ("llama", "mistral", "granite", "ministral3")
SHIFTED = ("gemma2", "gemma3_text")

Change = Callable[[Any, dict[str, np.ndarray]], None]


def write(
    path: Path,
    config: dict[str, Any],
    weights: dict[str, np.ndarray],
    tokenizer: dict[str, Any],
    kind: str = "F32",
    change: Change | None = None,
) -> Path:
    """``config``: in the names of transformers 4. ``weights``: by name in Hugging Face's or mlx-lm's layout.
    ``tokenizer``: values of the header. ``kind``: type of the matrices, of the experts of gpt-oss alone if it
    is MXFP4. ``change(writer, tensors)`` may spoil the file."""
    from gguf import GGUFWriter

    model_type = config["model_type"]
    writer = GGUFWriter(path, ARCHITECTURES[model_type])
    _write_settings(writer, config)
    for key, value in tokenizer.items():
        _write_value(writer, key, value)
    tensors = _tensors(config, weights)
    if change is not None:
        change(writer, tensors)
    for name, value in tensors.items():
        alone = kind == "MXFP4" and "_exps" not in name
        _write_tensor(writer, name, value, "F32" if value.ndim == 1 or "bias" in name or alone else kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def quantised(value: np.ndarray, kind: str) -> np.ndarray:
    """``value`` as it is read back from the type."""
    from gguf import GGMLQuantizationType, quants

    if kind in ("F32", "F16"):
        return value.astype(np.float16).astype(np.float32) if kind == "F16" else value
    to = GGMLQuantizationType[kind]
    return quants.dequantize(quants.quantize(value, to), to)


def byte_tokenizer(tokens: list[str], merges: list[str], pre: str, **more: Any) -> dict[str, Any]:
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.merges": merges,
        **{f"tokenizer.ggml.{key}": value for key, value in more.items()},
    }


def alphabet(pre: str = "gpt-2", n_tokens: int = 0) -> dict[str, Any]:
    """The 256 bytes, two merged tokens, one that no merge makes, and unused ones up to ``n_tokens``."""
    from tokenizers import pre_tokenizers

    tokens = [*sorted(pre_tokenizers.ByteLevel.alphabet()), "12", "Ġa", "XY"]
    tokens += [f"[PAD{number}]" for number in range(len(tokens), n_tokens)]
    return byte_tokenizer(tokens, ["1 2", "Ġ a"], pre)


def _write_value(writer: Any, key: str, value: Any) -> None:
    if isinstance(value, list):
        writer.add_array(key, value)
    elif isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    else:
        writer.add_uint32(key, value)


def _write_tensor(writer: Any, name: str, value: np.ndarray, kind: str) -> None:
    from gguf import GGMLQuantizationType, quants

    if kind in ("F32", "F16"):
        writer.add_tensor(
            name, np.ascontiguousarray(value.astype(np.float16 if kind == "F16" else np.float32))
        )
    else:
        to = GGMLQuantizationType[kind]
        writer.add_tensor(name, quants.quantize(np.ascontiguousarray(value), to), raw_dtype=to)


def _write_settings(writer: Any, config: dict[str, Any]) -> None:
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    if config.get("head_dim") is not None:
        writer.add_key_length(config["head_dim"])
        writer.add_value_length(config["head_dim"])
    parameters = config.get("rope_parameters") or {}
    if config["model_type"] != "gemma2":
        writer.add_rope_freq_base(config.get("rope_theta") or parameters["rope_theta"])
    _write_scaling(writer, config.get("rope_scaling") or parameters)
    if "num_experts_per_tok" in config:
        writer.add_expert_count(config.get("num_experts") or config["num_local_experts"])
        writer.add_expert_used_count(config["num_experts_per_tok"])
        width = "intermediate_size" if config["model_type"] == "gpt_oss" else "moe_intermediate_size"
        writer.add_expert_feed_forward_length(config[width])
    if config["model_type"] in ("gemma2", "gemma3_text", "gpt_oss", "phi3"):
        writer.add_sliding_window(config.get("sliding_window") or 0)
    if config["model_type"] == "gemma3_text":
        writer.add_sliding_window_pattern(config.get("sliding_window_pattern", 6))
        writer.add_rope_freq_base_swa(config.get("rope_local_base_freq", 10_000.0))
    if config["model_type"] == "gemma2":
        writer.add_attn_logit_softcapping(config["attn_logit_softcapping"])
        writer.add_final_logit_softcapping(config["final_logit_softcapping"])
    if config["model_type"] == "granite":
        writer.add_attention_scale(config["attention_multiplier"])
        writer.add_embedding_scale(config["embedding_multiplier"])
        writer.add_residual_scale(config["residual_multiplier"])
        writer.add_logit_scale(config["logits_scaling"])
    if config["model_type"] == "phi3":
        _write_longrope(writer, config)


def _write_scaling(writer: Any, scaling: dict[str, Any]) -> None:
    from gguf import RopeScalingType

    kind = scaling.get("rope_type")
    if kind == "linear":
        writer.add_rope_scaling_type(RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(scaling["factor"])
    elif kind == "yarn":
        writer.add_rope_scaling_type(RopeScalingType.YARN)
        writer.add_rope_scaling_factor(scaling["factor"])
        writer.add_rope_scaling_orig_ctx_len(scaling["original_max_position_embeddings"])
        if "beta_fast" in scaling:
            writer.add_rope_scaling_yarn_beta_fast(scaling["beta_fast"])
            writer.add_rope_scaling_yarn_beta_slow(scaling["beta_slow"])
        if "llama_4_scaling_beta" in scaling:
            writer.add_rope_scaling_yarn_log_mul(scaling["mscale_all_dim"])
            writer.add_attn_temperature_scale(scaling["llama_4_scaling_beta"])


def _write_longrope(writer: Any, config: dict[str, Any]) -> None:
    head = config["hidden_size"] // config["num_attention_heads"]
    writer.add_rope_dimension_count(int(head * config.get("partial_rotary_factor", 1.0)))
    original = config.get("original_max_position_embeddings", config["max_position_embeddings"])
    writer.add_rope_scaling_orig_ctx_len(original)
    scaling = config.get("rope_scaling") or {}
    if "short_factor" in scaling:
        ratio = config["max_position_embeddings"] / original
        writer.add_rope_scaling_attn_factors((1 + np.log(ratio) / np.log(original)) ** 0.5)
        for name in ("long", "short"):
            values = np.array(scaling[f"{name}_factor"], np.float32)
            writer.add_tensor(f"rope_factors_{name}.weight", values)


def _tensors(config: dict[str, Any], weights: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    import gguf

    model_type = config["model_type"]
    names = {name: key for key, name in gguf.MODEL_ARCH_NAMES.items()}
    table = gguf.get_tensor_name_map(names[ARCHITECTURES[model_type]], config["num_hidden_layers"])
    tensors = {}
    for name, value in _with_stacks(weights).items():
        named = table.get_name(name.replace("sinks", "sinks.weight"), try_suffixes=(".weight", ".bias"))
        assert named is not None, name
        if model_type in PAIRED and (".attn_q." in named or ".attn_k." in named):
            heads = config["num_attention_heads" if ".attn_q." in named else "num_key_value_heads"]
            value = in_pairs(value, heads)
        if model_type in SHIFTED and name.endswith("norm.weight"):
            value = value + 1.0
        tensors[named] = value
    return tensors


def in_pairs(weight: np.ndarray, heads: int) -> np.ndarray:
    """Row i of the first half of a head becomes row 2i, row i of the second half row 2i + 1."""
    out = np.empty_like(weight)
    size = weight.shape[0] // heads
    for head in range(heads):
        for row in range(size):
            half, index = divmod(row, size // 2)
            out[head * size + 2 * index + half] = weight[head * size + row]
    return out


def _with_stacks(weights: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Gate, up and down of all experts of a block as one array each, (experts, outputs, inputs)."""
    stacks = {}
    for name, value in weights.items():
        stem, _, last = name.rpartition(".")
        oss = f"{stem}.gate_up_proj_bias" in weights
        if last == "gate_up_proj" and oss:
            stacks[f"{stem}.gate_proj.weight"] = value[..., ::2].swapaxes(1, 2)
            stacks[f"{stem}.up_proj.weight"] = value[..., 1::2].swapaxes(1, 2)
        elif last == "gate_up_proj":
            half = value.shape[1] // 2
            stacks[f"{stem}.gate_proj.weight"], stacks[f"{stem}.up_proj.weight"] = (
                value[:, :half],
                value[:, half:],
            )
        elif last == "gate_up_proj_bias":
            stacks[f"{stem}.gate_proj.bias"], stacks[f"{stem}.up_proj.bias"] = value[:, ::2], value[:, 1::2]
        elif last == "down_proj":
            stacks[f"{stem}.down_proj.weight"] = value.swapaxes(1, 2) if oss else value
        elif last == "down_proj_bias":
            stacks[f"{stem}.down_proj.bias"] = value
        else:
            stacks[name.replace("switch_mlp", "experts")] = value
    return stacks


def write_gguf(
    path: Path, source: Path, kind: str = "F32", change=None, arch: str = "llama", pre: str = "gpt-2"
) -> Path:
    """A GGUF file of a tiny model. ``change(writer, tensors)`` may spoil it."""
    config = json.loads((source / "config.json").read_text()) | {"model_type": arch}
    spelled = json.loads((source / "tokenizer.json").read_text())
    control = {token["content"] for token in spelled["added_tokens"]}
    vocab = sorted(spelled["model"]["vocab"], key=spelled["model"]["vocab"].__getitem__)
    tokenizer = byte_tokenizer(
        vocab,
        [" ".join(merge) for merge in spelled["model"]["merges"]],
        pre,
        token_type=[CONTROL if token in control else NORMAL for token in vocab],
        bos_token_id=1,
        eos_token_id=2,
    ) | {"tokenizer.chat_template": tiny.CHATML}
    return write(path, config, load_file(source / "model.safetensors"), tokenizer, kind, change)
