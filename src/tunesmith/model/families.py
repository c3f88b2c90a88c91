"""What is known of each family of models: proven, or refused.

A family is proven if the logits of a tiny random model equal those of transformers on torch, from files in
the layout of transformers 5 and in the layout before it (tests/parity/test_families.py, docs/models.md)."""

from __future__ import annotations

from typing import Any

Config = dict[str, Any]

_OWN_KEYS = "without a cache, mlx-lm's layers that share keys and values compute their own"

REFUSED = {"gemma3n": _OWN_KEYS, "gemma3n_text": _OWN_KEYS}
"""Why a family cannot be used, by model type: mlx-lm loads it, or ends the process, and computes something
else."""

PROVEN = frozenset(
    "afmoe apertus arcee cohere cohere2 deepseek_v2 deepseek_v3 dots1 ernie4_5 ernie4_5_moe exaone4"
    " exaone_moe falcon_h1 falcon_mamba gemma gemma2 gemma3 gemma3_text gemma4 gemma4_text glm glm4"
    " glm4_moe glm4_moe_lite gpt2 gpt_bigcode gpt_neox gpt_oss gptj granite granitemoe"
    " granitemoehybrid helium hunyuan_v1_dense internlm3 jamba lfm2 lfm2_moe llama llama4 llama4_text"
    " mamba mamba2 minicpm3 minimax_m2 ministral3 mistral mistral3 mixtral nanochat nemotron"
    " nemotron_h olmo olmo2 olmo3 olmoe phi phi3 phimoe qwen2 qwen2_5_vl qwen2_moe qwen2_vl qwen3"
    " qwen3_5 qwen3_5_text qwen3_moe qwen3_next qwen3_vl recurrent_gemma seed_oss smollm3 solar_open"
    " stablelm starcoder2 youtu".split()
)
"""Model types whose logits equal transformers'."""


def refusal(config: Config) -> str | None:
    """Why the model of ``config`` cannot be computed as its authors meant; None if nothing is known
    against it."""
    kind = str(config.get("model_type"))
    if kind == "olmo" and "hidden_size" not in config:
        return "the layout of ai2-olmo is not read; take the folder whose name ends in -hf"
    if kind == "olmo" and config.get("clip_qkv") is not None:
        return "clip_qkv: queries, keys and values are not clipped"
    if kind == "nanochat" and config.get("final_logit_softcapping", 15.0) != 15.0:
        return "final_logit_softcapping: mlx-lm's nanochat has 15"
    return REFUSED.get(kind)


def doubt(config: Config) -> str | None:
    """What a user should know before training a family that is neither proven nor refused; None otherwise."""
    kind = str(config.get("model_type"))
    if kind in PROVEN or refusal(config) is not None:
        return None
    return f"models of type {kind} have not been compared with transformers: their numbers may be wrong"


def longrope_range(config: Config) -> int | None:
    """The length, in tokens, up to which LongRoPE has its short factors; None if they never change."""
    settings = _text(config)
    scaling = settings.get("rope_scaling") or settings.get("rope_parameters")
    if not isinstance(scaling, dict) or scaling.get("rope_type", scaling.get("type")) != "longrope":
        return None
    if scaling.get("short_factor") == scaling.get("long_factor"):
        return None
    name = "original_max_position_embeddings"
    return scaling.get(name) or settings.get(name)


def depends_on_positions(config: Config) -> bool:
    """Whether from some position on the position of a token matters, not only its distance to others: too
    late to show in a trial on a few tokens. LongRoPE's factors change, and Ministral 3 scales its queries."""
    rope = _text(config).get("rope_parameters")
    scales = isinstance(rope, dict) and bool(rope.get("llama_4_scaling_beta"))
    return scales or longrope_range(config) is not None


def _text(config: Config) -> Config:
    """The settings of the text model, and of the wrapper what it does not set."""
    text = config.get("text_config")
    return {**config, **text} if isinstance(text, dict) else config
