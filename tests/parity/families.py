"""Tiny random models of the families that people fine-tune, made with transformers' own classes, saved in the
layout of transformers 5 and in the layout before it."""

from __future__ import annotations

import contextlib
import copy
import io
import json
import shutil
from pathlib import Path
from typing import Any, NamedTuple

THETA = 50_000.0
"""Not the default of any family, so that a rotary setting that was not read shows."""
VOCABULARY = 128
LENGTH = 40
GROUP_SIZE = 32
"""Weights that share a scale when a model is quantised."""
WINDOW = 512
"""Longer than the prompt."""
SHORT = {"use_sliding_window": True, "sliding_window": 16}

ROPE = {"rope_type": "default", "rope_theta": THETA}
PARTIAL = {**ROPE, "partial_rotary_factor": 0.5}
MROPE = {**ROPE, "mrope_section": [4, 2, 2]}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": THETA,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
YARN = {"rope_type": "yarn", "rope_theta": THETA, "factor": 4.0, "original_max_position_embeddings": 64}
LONG = {
    "rope_type": "longrope",
    "rope_theta": THETA,
    "short_factor": [1.0, 1.1, 1.2, 1.3, 1.4, 1.5, 1.6, 1.7],
    "long_factor": [1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0],
}
ALTERNATING = ["sliding_attention", "full_attention", "sliding_attention", "full_attention"]


class Family(NamedTuple):
    """One row of the table. ``settings`` are added to the sizes that all families share; a size of None is
    left to the family's default. ``wrapper``: the text model lies inside a multimodal one. ``old``: whether
    transformers 4 knew the family. ``rounded``: mlx-lm's conversion adds or multiplies in bfloat16."""

    name: str
    model_type: str
    settings: dict[str, Any]
    wrapper: bool = False
    old: bool = True
    rounded: bool = False


SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "rope_parameters": ROPE,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
HEADS = {"head_dim": 16}
EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 32}
SOFT = {**EXPERTS, "num_experts": 4, "norm_topk_prob": True}
LATENT = {
    **EXPERTS,
    "num_key_value_heads": 4,
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "n_group": 1,
    "topk_group": 1,
    "kv_lora_rank": 16,
    "q_lora_rank": 24,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 16,
    "v_head_dim": 16,
    "first_k_dense_replace": 1,
}
MAMBA2 = {
    "mamba_n_heads": 8,
    "mamba_d_head": 16,
    "mamba_d_state": 16,
    "mamba_n_groups": 1,
    "mamba_chunk_size": 16,
    "mamba_expand": 2,
}
DELTA = {
    "head_dim": 16,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
}
GRANITE = {
    "intermediate_size": 128,  # mlx-lm quantises one layer in groups of 64, whatever was asked
    "embedding_multiplier": 1.5,
    "logits_scaling": 2.0,
    "residual_multiplier": 0.5,
    "attention_multiplier": 0.2,
}
GEMMA3 = {
    **HEADS,
    "query_pre_attn_scalar": 16,
    "sliding_window": WINDOW,
    "layer_types": ALTERNATING,
    "rope_parameters": {
        "sliding_attention": {"rope_type": "default", "rope_theta": 20_000.0},
        "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": THETA},
    },
}
GEMMA4 = {
    **HEADS,
    "global_head_dim": 32,
    "num_global_key_value_heads": 2,
    "hidden_size_per_layer_input": 16,
    "vocab_size_per_layer_input": VOCABULARY,
    "sliding_window": WINDOW,
    "layer_types": ALTERNATING,
    "rope_parameters": {
        "sliding_attention": {"rope_type": "default", "rope_theta": 20_000.0},
        "full_attention": {"rope_type": "proportional", "partial_rotary_factor": 0.25, "rope_theta": THETA},
    },
}
GPT_OSS = {**HEADS, **EXPERTS, "num_local_experts": 4, "sliding_window": WINDOW}
VISION = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}

FAMILIES = (
    Family("llama", "llama", {}),
    Family("llama, llama3 rope", "llama", {"rope_parameters": LLAMA3}),
    Family(
        "llama, linear rope", "llama", {"rope_parameters": {**ROPE, "rope_type": "linear", "factor": 4.0}}
    ),
    Family("llama, yarn", "llama", {"rope_parameters": YARN}),
    Family(
        "llama, yarn with attention_factor", "llama", {"rope_parameters": {**YARN, "attention_factor": 1.3}}
    ),
    Family("mistral", "mistral", {**HEADS, "sliding_window": None}),
    Family("mistral, 16-token window", "mistral", {**HEADS, "sliding_window": 16}),
    Family(
        "ministral3",
        "ministral3",
        {**HEADS, "rope_parameters": {**YARN, "llama_4_scaling_beta": 0.1}},
        old=False,
    ),
    Family("mistral3", "mistral3", {**HEADS, "text_model_type": "mistral"}, wrapper=True),
    Family(
        "mistral3, 16-token window",
        "mistral3",
        {**HEADS, "text_model_type": "mistral", "sliding_window": 16},
        wrapper=True,
    ),
    Family(
        "mistral3 around ministral3",
        "mistral3",
        {**HEADS, "text_model_type": "ministral3", "rope_parameters": {**YARN, "llama_4_scaling_beta": 0.1}},
        wrapper=True,
        old=False,
    ),
    Family("mixtral", "mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2}),
    Family(
        "mixtral, 16-token window",
        "mixtral",
        {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 16},
    ),
    Family("qwen2", "qwen2", {}),
    Family("qwen2, yarn", "qwen2", {"rope_parameters": YARN}),
    Family(
        "qwen2, 16-token window",
        "qwen2",
        {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 2},
    ),
    Family(
        "qwen2_moe", "qwen2_moe", {**SOFT, "norm_topk_prob": False, "shared_expert_intermediate_size": 32}
    ),
    Family("qwen2_moe, norm_topk_prob", "qwen2_moe", {**SOFT, "shared_expert_intermediate_size": 32}),
    Family(
        "qwen2_moe, 16-token window",
        "qwen2_moe",
        {**SOFT, "norm_topk_prob": False, "shared_expert_intermediate_size": 32, **SHORT},
    ),
    Family("qwen3", "qwen3", HEADS),
    Family("qwen3, 16-token window", "qwen3", {**HEADS, **SHORT, "max_window_layers": 3}),
    Family("qwen3_moe", "qwen3_moe", {**HEADS, **SOFT}),
    Family("qwen3_moe, 16-token window", "qwen3_moe", {**HEADS, **SOFT, **SHORT}),
    Family(
        "qwen3_next", "qwen3_next", {**DELTA, **SOFT, "shared_expert_intermediate_size": 32}, rounded=True
    ),
    Family("qwen3_5_text", "qwen3_5_text", DELTA, old=False),
    Family("qwen3_5", "qwen3_5", DELTA, wrapper=True, old=False, rounded=True),
    Family("qwen2_vl", "qwen2_vl", {"rope_parameters": MROPE}, wrapper=True),
    Family(
        "qwen2_vl, 16-token window",
        "qwen2_vl",
        {"rope_parameters": MROPE, **SHORT, "max_window_layers": 1},
        wrapper=True,
    ),
    Family("qwen2_5_vl", "qwen2_5_vl", {"rope_parameters": MROPE}, wrapper=True),
    Family("qwen3_vl", "qwen3_vl", {**HEADS, "rope_parameters": MROPE}, wrapper=True),
    Family("phi", "phi", {"rope_parameters": PARTIAL}),
    Family("phi3", "phi3", {}),
    Family("phi3, 16-token window", "phi3", {"sliding_window": 16}),
    Family("phi3, partial rotary (phi 4 mini)", "phi3", {"rope_parameters": PARTIAL}),
    Family(
        "phi3, longrope within the first range",
        "phi3",
        {"rope_parameters": LONG, "original_max_position_embeddings": 64},
    ),
    Family(
        "phi3, longrope beyond it", "phi3", {"rope_parameters": LONG, "original_max_position_embeddings": 16}
    ),
    Family(
        "phimoe",
        "phimoe",
        {"num_local_experts": 4, "num_experts_per_tok": 2, "attention_bias": True, "lm_head_bias": True},
    ),
    Family(
        "phimoe, 16-token window",
        "phimoe",
        {
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "attention_bias": True,
            "lm_head_bias": True,
            "sliding_window": 16,
        },
    ),
    Family("gemma", "gemma", HEADS),
    Family("gemma2", "gemma2", {**HEADS, "query_pre_attn_scalar": 16, "sliding_window": WINDOW}),
    Family("gemma2, 16-token window", "gemma2", {**HEADS, "query_pre_attn_scalar": 16, "sliding_window": 16}),
    Family("gemma3_text", "gemma3_text", GEMMA3),
    Family("gemma3_text, 16-token window", "gemma3_text", {**GEMMA3, "sliding_window": 16}),
    Family("gemma3", "gemma3", GEMMA3, wrapper=True),
    Family("gemma4_text", "gemma4_text", GEMMA4, old=False),
    Family(
        "gemma4_text, shared keys and values", "gemma4_text", {**GEMMA4, "num_kv_shared_layers": 2}, old=False
    ),
    Family("gemma4", "gemma4", GEMMA4, wrapper=True, old=False),
    Family("olmo", "olmo", {}),
    Family("olmo2", "olmo2", {}),
    Family("olmo3", "olmo3", {"sliding_window": WINDOW, "rope_parameters": None}),
    Family("olmo3, 16-token window", "olmo3", {"sliding_window": 16, "rope_parameters": None}),
    Family("olmoe", "olmoe", {"num_experts": 4, "num_experts_per_tok": 2}),
    Family("smollm3", "smollm3", {}),
    Family("smollm3, 16-token window", "smollm3", SHORT),
    Family("cohere", "cohere", {}),
    Family("cohere2", "cohere2", {**HEADS, "sliding_window": WINDOW}),
    Family("cohere2, 16-token window", "cohere2", {**HEADS, "sliding_window": 16}),
    Family("glm", "glm", {**HEADS, "rope_parameters": PARTIAL}),
    Family("glm4", "glm4", {**HEADS, "rope_parameters": PARTIAL}),
    Family(
        "glm4_moe",
        "glm4_moe",
        {**HEADS, **EXPERTS, "n_routed_experts": 4, "rope_parameters": PARTIAL, "use_qk_norm": True},
    ),
    Family("glm4_moe_lite", "glm4_moe_lite", LATENT, old=False),
    Family(
        "deepseek_v2",
        "deepseek_v2",
        {
            **LATENT,
            "topk_method": "greedy",
            "rope_parameters": {**YARN, "mscale": 1.0, "mscale_all_dim": 0.7},
        },
    ),
    Family("deepseek_v2, no rope scaling", "deepseek_v2", {**LATENT, "topk_method": "greedy"}),
    Family("deepseek_v3", "deepseek_v3", LATENT),
    Family(
        "deepseek_v3, yarn",
        "deepseek_v3",
        {**LATENT, "rope_parameters": {**YARN, "mscale": 1.0, "mscale_all_dim": 1.0}},
    ),
    Family("seed_oss", "seed_oss", HEADS),
    Family("nemotron", "nemotron", {"rope_parameters": PARTIAL}),
    Family(
        "nemotron_h",
        "nemotron_h",
        {
            **HEADS,
            "num_hidden_layers": None,
            "layers_block_type": ["linear_attention", "moe", "full_attention", "mlp"],
            "mamba_num_heads": 8,
            "mamba_head_dim": 16,
            "ssm_state_size": 16,
            "n_groups": 1,
            "chunk_size": 16,
            "n_routed_experts": 4,
            "moe_intermediate_size": 32,
            "moe_shared_expert_intermediate_size": 32,
        },
    ),
    Family("gpt_oss", "gpt_oss", {**GPT_OSS, "rope_parameters": ROPE}),
    Family(
        "gpt_oss, yarn of the released models",
        "gpt_oss",
        {**GPT_OSS, "rope_parameters": {**YARN, "truncate": False}},
    ),
    Family("gpt_oss, 16-token window", "gpt_oss", {**GPT_OSS, "sliding_window": 16, "rope_parameters": ROPE}),
    Family("starcoder2", "starcoder2", {}),
    Family("starcoder2, 16-token window", "starcoder2", {"sliding_window": 16}),
    Family("hunyuan_v1_dense", "hunyuan_v1_dense", HEADS),
    Family(
        "hunyuan_v1_dense, alpha",
        "hunyuan_v1_dense",
        {**HEADS, "rope_parameters": {**ROPE, "rope_type": "dynamic", "alpha": 100.0, "factor": 1.0}},
    ),
    Family("internlm3", "internlm3", HEADS),
    Family("granite", "granite", GRANITE),
    Family("granitemoe", "granitemoe", {**GRANITE, "num_local_experts": 4, "num_experts_per_tok": 2}),
    Family(
        "granitemoehybrid",
        "granitemoehybrid",
        {
            **GRANITE,
            **MAMBA2,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "shared_intermediate_size": 32,
            "position_embedding_type": "rope",
            "layer_types": ["linear_attention", "full_attention", "linear_attention", "full_attention"],
        },
    ),
    Family("stablelm", "stablelm", {"rope_parameters": PARTIAL}),
    Family(
        "lfm2", "lfm2", {"layer_types": ["conv", "full_attention"] * 2, "block_auto_adjust_ff_dim": False}
    ),
    Family(
        "lfm2_moe",
        "lfm2_moe",
        {**EXPERTS, "num_experts": 4, "num_dense_layers": 1, "layer_types": ["conv", "full_attention"] * 2},
    ),
    Family("exaone4", "exaone4", {"sliding_window": WINDOW}),
    Family("exaone4, no window", "exaone4", {"sliding_window": None, "layer_types": ["full_attention"] * 4}),
    Family(
        "exaone_moe",
        "exaone_moe",
        {**HEADS, **EXPERTS, "num_experts": 4, "sliding_window": WINDOW},
        old=False,
    ),
    Family("apertus", "apertus", {"rope_parameters": LLAMA3}),
    Family("ernie4_5", "ernie4_5", {**HEADS, "use_bias": False}),
    Family("ernie4_5_moe", "ernie4_5_moe", {"moe_num_experts": 4, "moe_k": 2, "moe_intermediate_size": 32}),
    Family(
        "minimax_m2",
        "minimax_m2",
        {**HEADS, "num_local_experts": 4, "num_experts_per_tok": 2, "rope_parameters": PARTIAL},
        old=False,
    ),
    Family(
        "dots1",
        "dots1",
        {
            **HEADS,
            **EXPERTS,
            "n_routed_experts": 4,
            "n_shared_experts": 1,
            "first_k_dense_replace": 1,
            "sliding_window": None,
        },
    ),
    Family(
        "dots1, 16-token window",
        "dots1",
        {
            **HEADS,
            **EXPERTS,
            "n_routed_experts": 4,
            "n_shared_experts": 1,
            "first_k_dense_replace": 1,
            "sliding_window": 16,
            "max_window_layers": 2,
        },
    ),
    Family(
        "minicpm3",
        "minicpm3",
        {k: v for k, v in LATENT.items() if "rank" in k or "dim" in k} | {"num_key_value_heads": 4},
    ),
    Family("helium", "helium", HEADS),
    Family("gpt_neox", "gpt_neox", {"rope_parameters": PARTIAL, "intermediate_size": 256}),
    Family("gpt2", "gpt2", {"n_inner": None}),
    Family("gptj", "gptj", {"rotary_dim": 8}),
    Family("gpt_bigcode", "gpt_bigcode", {"n_inner": 96}),
    Family(
        "llama4_text",
        "llama4_text",
        {**HEADS, "num_local_experts": 4, "num_experts_per_tok": 1, "intermediate_size_mlp": 96},
    ),
    Family(
        "llama4",
        "llama4",
        {**HEADS, "num_local_experts": 4, "num_experts_per_tok": 1, "intermediate_size_mlp": 96},
        wrapper=True,
    ),
    Family(
        "jamba",
        "jamba",
        {
            "num_experts": 4,
            "attn_layer_period": 2,
            "attn_layer_offset": 1,
            "mamba_d_state": 8,
            "use_mamba_kernels": False,
        },
    ),
    Family("mamba", "mamba", {"state_size": 8}),
    Family("falcon_mamba", "falcon_mamba", {"state_size": 8}),
    Family(
        "mamba2",
        "mamba2",
        {"state_size": 16, "num_heads": 8, "head_dim": 16, "n_groups": 1, "chunk_size": 16},
    ),
    Family(
        "falcon_h1",
        "falcon_h1",
        {**MAMBA2, "mamba_d_ssm": 128, "key_multiplier": 0.5, "attention_in_multiplier": 0.8, "head_dim": 16},
        rounded=True,
    ),
    Family(
        "afmoe",
        "afmoe",
        {
            **HEADS,
            **EXPERTS,
            "num_experts": 4,
            "num_shared_experts": 1,
            "num_dense_layers": 1,
            "sliding_window": WINDOW,
        },
        old=False,
    ),
    Family(
        "recurrent_gemma",
        "recurrent_gemma",
        {"lru_width": 64, "attention_window_size": WINDOW, "num_key_value_heads": 1},
    ),
    Family("arcee", "arcee", HEADS),
    Family("nanochat", "nanochat", {}, old=False),
    Family(
        "solar_open",
        "solar_open",
        {**HEADS, **EXPERTS, "n_routed_experts": 4, "n_shared_experts": 1},
        old=False,
    ),
    Family(
        "youtu",
        "youtu",
        {k: v for k, v in LATENT.items() if "rank" in k or "dim" in k} | {"num_key_value_heads": 4},
        old=False,
    ),
    Family(
        "gemma3n_text",
        "gemma3n_text",
        {
            **HEADS,
            "sliding_window": WINDOW,
            "rope_parameters": None,
            "num_kv_shared_layers": 1,
            "layer_types": ALTERNATING,
            "hidden_size_per_layer_input": 16,
            "vocab_size_per_layer_input": VOCABULARY,
            "laurel_rank": 8,
        },
    ),
)


def build(family: Family) -> Any:
    """The random model on torch, in float32 and in evaluation mode; the same weights in every call."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

    given = {**SIZES, **family.settings}
    settings = {k: copy.deepcopy(value) for k, value in given.items() if value is not None or k not in SIZES}
    torch.manual_seed(0)
    if family.wrapper:
        inner = settings.pop("text_model_type", None)
        text = {**settings, **({"model_type": inner} if inner else {})}
        config = AutoConfig.for_model(family.model_type, text_config=text, vision_config=VISION)
        model = AutoModelForImageTextToText.from_config(config, attn_implementation="eager")
    else:
        config = AutoConfig.for_model(family.model_type, **settings)
        model = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "A_log" in name or "dt_" in name or "rg_lru" in name:
                continue
            if parameter.ndim >= 2:
                parameter.normal_(std=0.125)
            else:
                parameter.add_(torch.randn_like(parameter) * 0.1)
        for name, buffer in model.named_buffers():
            if name.endswith("e_score_correction_bias"):
                buffer.normal_(std=0.1)
        for tensor in model.state_dict().values():  # files hold bfloat16
            if tensor.is_floating_point():
                tensor.copy_(tensor.bfloat16())
    return model.float().eval()


def save(model: Any, folder: Path) -> None:
    """The folder that transformers 5 writes, its weights in bfloat16."""
    from safetensors.torch import load_file, save_file

    model.save_pretrained(folder)
    file = folder / "model.safetensors"
    tensors = {name: value.bfloat16() for name, value in load_file(file).items()}
    save_file(tensors, file, {"format": "pt"})


def write_old_layout(folder: Path, target: Path) -> None:
    """The same weights with config.json as transformers 4 wrote it."""
    shutil.copytree(folder, target)
    config = json.loads((folder / "config.json").read_text())
    (target / "config.json").write_text(json.dumps(old_config(config), indent=1))


def old_config(config: dict[str, Any]) -> dict[str, Any]:
    """Settings of transformers 5 under the names of transformers 4."""
    old = {key: old_config(value) if key == "text_config" else value for key, value in config.items()}
    if "dtype" in old:
        old["torch_dtype"] = old.pop("dtype")
    rope = old.pop("rope_parameters", None)
    if isinstance(rope, dict) and "full_attention" in rope:
        old["rope_local_base_freq"] = rope["sliding_attention"]["rope_theta"]
        rope = rope["full_attention"]
    if isinstance(rope, dict):
        rope = dict(rope)
        old["rope_theta"] = rope.pop("rope_theta", THETA)
        if "partial_rotary_factor" in rope:
            old["partial_rotary_factor"] = rope.pop("partial_rotary_factor")
        kind = rope["rope_type"]
        old["rope_scaling"] = None if kind == "default" else rope | {"type": kind}
    if old.get("model_type") == "gpt_neox":
        old["rotary_emb_base"], old["rotary_pct"] = old.pop("rope_theta"), old.pop("partial_rotary_factor")
    if old.get("model_type") in ("gemma3_text", "cohere2"):
        old["sliding_window_pattern"] = old.pop("layer_types").index("full_attention") + 1
    if old.get("model_type") == "granitemoehybrid":
        names = {"full_attention": "attention", "linear_attention": "mamba"}
        old["layer_types"] = [names[name] for name in old["layer_types"]]
    if "num_local_experts" in old and old.get("model_type") in ("qwen3_moe", "olmoe"):
        old["num_experts"] = old.pop("num_local_experts")
    return old


def text_model(model: Any) -> Any:
    """The part of a model of transformers that takes ids alone: the wrapper of Llama 4 wants images."""
    return model.language_model if type(model).__name__ == "Llama4ForConditionalGeneration" else model


def converted(folder: Path, target: Path, bits: int | None = None) -> Path | None:
    """The model in ``folder`` as mlx-lm writes it again, quantised if ``bits`` are given; None if mlx-lm
    cannot read it."""
    from mlx_lm import utils

    try:
        net, config = utils.load_model(folder, lazy=True)
    except (ValueError, TypeError, AttributeError, KeyError, SystemExit):
        return None
    if bits is not None:
        with contextlib.redirect_stdout(io.StringIO()):  # it prints
            net, config = utils.quantize_model(net, config, GROUP_SIZE, bits)
    target.mkdir()
    utils.save_model(target, net)
    utils.save_config(config, target / "config.json")
    return target
