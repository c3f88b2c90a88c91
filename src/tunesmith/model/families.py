"""What is known of each family of models: proven, or refused.

A family is proven if the logits of a tiny random model equal those of transformers on torch, from files in
the layout of transformers 5 and in the layout before it (tests/parity/test_families.py, docs/models.md)."""

from __future__ import annotations

from typing import Any

Config = dict[str, Any]

REFUSED = {
    "ernie4_5_moe": "mlx-lm leaves out the correction bias by which the router chooses experts",
    "minicpm3": "mlx-lm's attention gives other numbers than transformers'",
    "nanochat": "mlx-lm reads only the layout of nanochat's own files",
    "olmo": "mlx-lm reads only the layout of ai2-olmo; OLMo 2 and 3 can be used",
}
"""Why a family cannot be used, by model type: mlx-lm loads it, or ends the process, and computes something
else."""

PROVEN = frozenset(
    "afmoe apertus cohere cohere2 deepseek_v2 deepseek_v3 dots1 ernie4_5 exaone4 exaone_moe"
    " falcon_h1 falcon_mamba gemma gemma2 gemma3 gemma3_text gemma4 gemma4_text glm glm4 glm4_moe"
    " glm4_moe_lite gpt2 gpt_bigcode gpt_neox gpt_oss gptj granite granitemoe granitemoehybrid"
    " helium hunyuan_v1_dense internlm3 jamba lfm2 lfm2_moe llama llama4 llama4_text mamba mamba2"
    " minimax_m2 ministral3 mistral mistral3 mixtral nemotron nemotron_h olmo2 olmo3 olmoe phi"
    " phi3 phimoe qwen2 qwen2_5_vl qwen2_moe qwen2_vl qwen3 qwen3_5 qwen3_5_text qwen3_moe"
    " qwen3_next qwen3_vl recurrent_gemma seed_oss smollm3 solar_open stablelm starcoder2 youtu".split()
)
"""Model types whose logits equal transformers'."""


def refusal(config: Config) -> str | None:
    """Why the model of ``config`` cannot be computed as its authors meant; None if nothing is known
    against it."""
    kind = str(config.get("model_type"))
    if kind == "qwen2_moe" and config.get("norm_topk_prob"):
        return "norm_topk_prob: mlx-lm's qwen2_moe does not normalise the weights of experts"
    return REFUSED.get(kind)


def doubt(config: Config) -> str | None:
    """What a user should know before training a family that is neither proven nor refused; None otherwise."""
    kind = str(config.get("model_type"))
    if kind in PROVEN or refusal(config) is not None:
        return None
    return f"models of type {kind} have not been compared with transformers: their numbers may be wrong"
