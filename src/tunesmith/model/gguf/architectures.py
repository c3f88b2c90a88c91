"""The architectures of llama.cpp that can be read: their keys, their tensors, and the config.json they mean.

What llama.cpp holds in its code instead of the file, such as the period of Gemma's sliding windows, is
written here with its value."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from tunesmith.errors import ModelError
from tunesmith.model.gguf.metadata import Metadata

REQUIRED = (
    "block_count embedding_length feed_forward_length attention.head_count attention.layer_norm_rms_epsilon"
).split()
OPTIONAL = (
    "context_length attention.head_count_kv attention.key_length attention.value_length rope.freq_base "
    "rope.dimension_count rope.scaling.type rope.scaling.factor rope.scaling.original_context_length "
    "rope.scaling.finetuned "
    "vocab_size tensor_data_layout"
).split()
YARN = "rope.scaling.yarn_beta_fast rope.scaling.yarn_beta_slow".split()
NEUTRAL = {"rope.scaling.yarn_ext_factor": 1.0, "rope.scale_linear": 1.0, "expert_gating_func": 1}
"""Values of keys that say what would be done without the key."""

TOP = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
ATTENTION = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
}
FEED_FORWARD = {"ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj"}
LLAMA = {**ATTENTION, "ffn_norm": "post_attention_layernorm", **FEED_FORWARD}
HEAD_NORMS = {"attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm"}
GEMMA = {
    **ATTENTION,
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    **FEED_FORWARD,
    "post_ffw_norm": "post_feedforward_layernorm",
}
BIASES = frozenset("attn_q attn_k attn_v attn_output ffn_gate ffn_up ffn_down".split())
EXPERTS = frozenset("ffn_gate_exps ffn_up_exps ffn_down_exps".split())
"""Stacks of the experts' matrices, (experts, rows, columns)."""

Config = dict[str, Any]
Value = bool | int | float | str | list[str] | list[int] | list[float]
Values = dict[str, Value]
"""Keys of the header and their values."""


class Architecture(NamedTuple):
    """``parts``: the tensors of a block, all of them needed, and their names in Hugging Face's layout, which
    is empty for a stack of experts. ``settings``: what config.json holds besides the settings that all
    architectures share. ``biases``: the parts that may have a bias. ``biased``: the parts that must have one.
    ``keys``: needed besides REQUIRED. ``more_keys``: read if they are there. ``scalings``: the rotary
    scalings of the model type. ``interleaved``: rows of queries and keys are stored in pairs. ``shifted``:
    norms are stored with the 1 that the model adds. ``head``: whether there is an output matrix besides the
    embedding; None if either is possible. ``values``: the inverse of ``settings``; None if files of the
    architecture are only read."""

    model_type: str
    class_name: str
    parts: dict[str, str]
    settings: Callable[[Metadata, Config], Config]
    biases: frozenset[str] = frozenset()
    biased: frozenset[str] = frozenset()
    keys: tuple[str, ...] = ()
    more_keys: tuple[str, ...] = ()
    scalings: tuple[str, ...] = ()
    interleaved: bool = False
    shifted: bool = False
    head: bool | None = None
    values: Callable[[Config], Values] | None = None

    def known_keys(self) -> set[str]:
        yarn = YARN if "yarn" in self.scalings else ()
        return {*REQUIRED, *OPTIONAL, *self.keys, *self.more_keys, *yarn}


def settings(architecture: Architecture, metadata: Metadata) -> Config:
    """The values of config.json that the metadata means.

    Raises ModelError if values contradict each other, or if the model type cannot express them."""
    values = metadata.values
    heads, width = values["attention.head_count"], values["embedding_length"]
    head = values.get("attention.key_length", width // heads)
    for key in ("attention.value_length", "rope.dimension_count"):
        partial = key == "rope.dimension_count" and architecture.model_type == "phi3"
        if values.get(key, head) != head and not partial:
            raise ModelError(f"{metadata.key(key)} is {values[key]}, a head has {head}")
    if head % 2:
        raise ModelError(f"a head has {head} dimensions, an even number expected")
    shared: Config = {
        "architectures": [architecture.class_name],
        "model_type": architecture.model_type,
        "vocab_size": int(metadata.tensors["token_embd.weight"].shape[1]),
        "tie_word_embeddings": "output.weight" not in metadata.tensors,
        "hidden_size": width,
        "num_hidden_layers": values["block_count"],
        "intermediate_size": values["feed_forward_length"],
        "num_attention_heads": heads,
        "num_key_value_heads": values.get("attention.head_count_kv", heads),
        "head_dim": head,
        "rms_norm_eps": metadata.number("attention.layer_norm_rms_epsilon"),
        "max_position_embeddings": values.get("context_length", 2048),
        "rope_theta": float(values.get("rope.freq_base", 10000.0)),
        "rope_scaling": _scaling(architecture, metadata),
        "attention_bias": "blk.0.attn_q.bias" in metadata.tensors,
        "mlp_bias": "blk.0.ffn_up.bias" in metadata.tensors,
    }
    return shared | architecture.settings(metadata, shared)


class Description(NamedTuple):
    """A model's settings as a file holds them: ``values`` by key, without the name of the architecture, and
    ``factors``, the tensors of rotary frequencies."""

    values: Values
    factors: dict[str, np.ndarray]


def complete(config: Config) -> Config:
    """``config`` with the number and the size of heads, which may follow from others."""
    heads = config["num_attention_heads"]
    head = config.get("head_dim") or config["hidden_size"] // heads
    return {**config, "head_dim": head, "num_key_value_heads": config.get("num_key_value_heads") or heads}


def describe(architecture: Architecture, config: Config, n_tokens: int) -> Description:
    """The inverse of `settings`. ``config``: as `complete` makes it. n_tokens: rows of the embedding.

    Raises ModelError if the file cannot hold the rotary scaling."""
    assert architecture.values is not None
    heads, head = config["num_attention_heads"], config["head_dim"]
    values: Values = {
        "block_count": config["num_hidden_layers"],
        "context_length": config.get("max_position_embeddings") or 2048,
        "embedding_length": config["hidden_size"],
        "feed_forward_length": config["intermediate_size"],
        "attention.head_count": heads,
        "attention.head_count_kv": config["num_key_value_heads"],
        "attention.key_length": head,
        "attention.value_length": head,
        "attention.layer_norm_rms_epsilon": float(config["rms_norm_eps"]),
        "rope.freq_base": float(config.get("rope_theta") or 10000.0),
        "rope.dimension_count": head,
        "vocab_size": n_tokens,
    }
    scaling, factors = _described_scaling(architecture, config, head)
    return Description(values | scaling | architecture.values(config), factors)


def _described_scaling(
    architecture: Architecture, config: Config, head: int
) -> tuple[Values, dict[str, np.ndarray]]:
    scaling = config.get("rope_scaling")
    kind = "default" if not scaling else scaling.get("rope_type", scaling.get("type", "default"))
    if not scaling or kind == "default":
        return {}, {}
    if kind == "llama3" and architecture.model_type == "llama":
        shape = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
        if wrong := [name for name, value in shape.items() if scaling[name] != value]:
            raise ModelError(f"rope_scaling.{wrong[0]} is {scaling[wrong[0]]}, {shape[wrong[0]]} expected")
        factors = _llama3_factors(scaling["factor"], config.get("rope_theta") or 10000.0, head, 8192)
        return {}, {"rope_freqs.weight": factors.astype(np.float32)}
    if kind in ("longrope", "su") and "longrope" in architecture.scalings:
        names = {f"rope_factors_{name}.weight": scaling[f"{name}_factor"] for name in ("long", "short")}
        return {}, {name: np.array(factors, np.float32) for name, factors in names.items()}
    if kind not in architecture.scalings or scaling.get("truncate") is False:
        raise ModelError(f"rope_scaling is of type {kind}, which the file cannot hold")
    values: Values = {"rope.scaling.type": kind, "rope.scaling.factor": float(scaling["factor"])}
    if kind == "yarn":
        if scaling.get("mscale", 1.0) != 1.0 or scaling.get("mscale_all_dim", 0) != 0:
            raise ModelError("rope_scaling has a factor of attention, which the file cannot hold")
        values["rope.scaling.original_context_length"] = scaling["original_max_position_embeddings"]
        values |= {
            key: float(scaling[name])
            for key in YARN
            if (name := key.removeprefix("rope.scaling.yarn_")) in scaling
        }
    return values, {}


def _scaling(architecture: Architecture, metadata: Metadata) -> Config | None:
    """`rope_scaling` of config.json for linear scaling and YaRN; None without a scaling, and for those that
    are given by tensors."""
    kind = metadata.values.get("rope.scaling.type", "none")
    factor = metadata.number("rope.scaling.factor", 1.0)
    if kind in ("none", "") and factor == 1.0:
        return None
    if kind not in architecture.scalings:
        name = "rope.scaling.factor" if kind in ("none", "") else "rope.scaling.type"
        raise metadata.unknown(metadata.values[name], name)
    if kind == "longrope":
        return None
    if kind == "linear":
        return {"rope_type": "linear", "type": "linear", "factor": factor}
    scaling = {
        "rope_type": "yarn",
        "type": "yarn",
        "factor": factor,
        "original_max_position_embeddings": int(metadata.number("rope.scaling.original_context_length")),
    }
    for key in YARN:
        if key in metadata.values:
            scaling[key.removeprefix("rope.scaling.yarn_")] = metadata.number(key)
    return scaling


def _llama(metadata: Metadata, shared: Config) -> Config:
    factors = metadata.factors("rope_freqs.weight")
    if factors is None:
        return {}
    return {"rope_scaling": _llama3_scaling(factors, shared["rope_theta"], shared["head_dim"])}


def _llama3_scaling(given: np.ndarray, theta: float, head: int) -> Config:
    """The rule of Llama 3.1 that gives these factors of the (head / 2,) frequencies."""
    original = 8192
    expected = _llama3_factors(float(given.max()), theta, head, original)
    if given.shape != expected.shape or not np.allclose(given, expected, rtol=1e-3):
        raise ModelError("rope_freqs.weight does not follow Llama 3.1's rule")
    return {
        "rope_type": "llama3",
        "factor": float(given.max()),
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": original,
    }


def _llama3_factors(factor: float, theta: float, head: int, original: int) -> np.ndarray:
    wave = 2 * np.pi * theta ** (np.arange(0, head, 2) / head)
    smooth = np.clip((original / wave - 1.0) / 3.0, 0.0, 1.0)
    return 1.0 / ((1.0 - smooth) / factor + smooth)


def _nothing(metadata: Metadata, shared: Config) -> Config:
    return {}


def _smollm3(metadata: Metadata, shared: Config) -> Config:
    """Every fourth layer has no rotary embedding, which the file does not say."""
    return {"no_rope_layer_interval": 4, "sliding_window": None, "use_sliding_window": False}


def _qwen3_moe(metadata: Metadata, shared: Config) -> Config:
    return {
        "num_experts": metadata.values["expert_count"],
        "num_experts_per_tok": metadata.values["expert_used_count"],
        "moe_intermediate_size": metadata.values["expert_feed_forward_length"],
        "norm_topk_prob": True,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
    }


def _query_scale(shared: Config, layers_of_27b: int) -> Config:
    """The scale of queries is that of a head, but in the models of 27B that of the width over the heads."""
    large = shared["num_hidden_layers"] == layers_of_27b
    width = shared["hidden_size"] // shared["num_attention_heads"] if large else shared["head_dim"]
    return {"query_pre_attn_scalar": width, "hidden_activation": "gelu_pytorch_tanh"}


def _gemma2(metadata: Metadata, shared: Config) -> Config:
    return {
        **_query_scale(shared, layers_of_27b=46),
        "attn_logit_softcapping": metadata.number("attn_logit_softcapping"),
        "final_logit_softcapping": metadata.number("final_logit_softcapping"),
        "sliding_window": metadata.values["attention.sliding_window"],
    }


def _gemma3(metadata: Metadata, shared: Config) -> Config:
    return {
        **_query_scale(shared, layers_of_27b=62),
        "sliding_window": metadata.values["attention.sliding_window"],
        "sliding_window_pattern": metadata.values.get("attention.sliding_window_pattern", 6),
        "rope_local_base_freq": float(metadata.values.get("rope.freq_base_swa", 10000.0)),
    }


def _phi3(metadata: Metadata, shared: Config) -> Config:
    """Short and long factors of LongRoPE are tensors. The factor of attention must be the one that follows
    from the lengths, since config.json does not have another."""
    head = shared["hidden_size"] // shared["num_attention_heads"]
    if shared["head_dim"] != head:
        raise ModelError(f"{metadata.key('attention.key_length')} is {shared['head_dim']}, not {head}")
    rotary = metadata.values.get("rope.dimension_count", head)
    longest = shared["max_position_embeddings"]
    original = int(metadata.number("rope.scaling.original_context_length", longest))
    phi3: Config = {
        "partial_rotary_factor": rotary / head,
        "original_max_position_embeddings": original,
        "sliding_window": metadata.values.get("attention.sliding_window") or None,
        "pad_token_id": None,  # else transformers takes 32000
    }
    short, long = (metadata.factors(f"rope_factors_{name}.weight") for name in ("short", "long"))
    if (short is None) != (long is None):
        raise ModelError(f"tensor rope_factors_{'short' if short is None else 'long'}.weight is missing")
    if short is None or long is None:
        return phi3
    if not len(short) == len(long) == rotary // 2:
        raise ModelError(f"{len(short)} short and {len(long)} long rope factors, {rotary // 2} expected")
    attention = _longrope_attention(longest, original)
    given = metadata.number("rope.scaling.attn_factor", 1.0)
    if abs(given - attention) > 1e-5:
        raise ModelError(f"{metadata.key('rope.scaling.attn_factor')} is {given}, {attention:.6f} expected")
    phi3["rope_scaling"] = {
        "rope_type": "longrope",
        "type": "longrope",
        "short_factor": short.tolist(),
        "long_factor": long.tolist(),
    }
    return phi3


def _longrope_attention(longest: int, original: int) -> float:
    """The factor that LongRoPE multiplies attention with."""
    ratio = longest / original
    return math.sqrt(1 + math.log(ratio) / math.log(original)) if ratio > 1 else 1.0


def _granite(metadata: Metadata, shared: Config) -> Config:
    if metadata.values.get("rope.scaling.finetuned") is False:
        raise metadata.unknown(False, "rope.scaling.finetuned")  # no rotary embedding at all
    if shared["head_dim"] != shared["hidden_size"] // shared["num_attention_heads"]:
        raise metadata.unknown(shared["head_dim"], "attention.key_length")
    return {
        "logits_scaling": metadata.number("logit_scale"),
        "attention_multiplier": metadata.number("attention.scale", 0.0) or shared["head_dim"] ** -0.5,
        "embedding_multiplier": metadata.number("embedding_scale", 0.0) or 1.0,
        "residual_multiplier": metadata.number("residual_scale", 0.0) or 1.0,
    }


def _gpt_oss(metadata: Metadata, shared: Config) -> Config:
    """Every second layer, from the first, attends through the window. YaRN's range is not rounded to whole
    dimensions, which the file does not say and llama.cpp does not do."""
    scaling, theta = shared["rope_scaling"], shared["rope_theta"]
    width = metadata.values["expert_feed_forward_length"]
    return {
        # without a scaling, transformers takes that of the released models unless it is told
        **({} if scaling else {"rope_parameters": {"rope_type": "default", "rope_theta": theta}}),
        "rope_scaling": scaling and scaling | {"truncate": False},
        "intermediate_size": width,
        "num_local_experts": metadata.values["expert_count"],
        "num_experts_per_tok": metadata.values["expert_used_count"],
        "sliding_window": metadata.values["attention.sliding_window"],
        "layer_types": [
            "full_attention" if number % 2 else "sliding_attention"
            for number in range(shared["num_hidden_layers"])
        ],
        "swiglu_limit": 7.0,
        "hidden_act": "silu",
    }


def _mistral3(metadata: Metadata, shared: Config) -> Config:
    """Ministral 3, whose queries are scaled by position; without that, Mistral."""
    beta = metadata.number("attention.temperature_scale", 0.0)
    scaling = shared["rope_scaling"]
    if not beta and scaling is None:
        return {"architectures": ["MistralForCausalLM"], "model_type": "mistral", "sliding_window": None}
    if not beta or scaling is None:
        name = "attention.temperature_scale" if scaling else "rope.scaling.type"
        raise ModelError(f"{metadata.key(name)} is missing")
    multiplier = metadata.number("rope.scaling.yarn_log_multiplier")
    if multiplier != 1.0:
        raise metadata.unknown(multiplier, "rope.scaling.yarn_log_multiplier")
    original = scaling["original_max_position_embeddings"]
    if metadata.number("attention.temperature_length", original) != original:
        raise metadata.unknown(
            metadata.values["attention.temperature_length"], "attention.temperature_length"
        )
    yarn = scaling | {"mscale": 1.0, "mscale_all_dim": multiplier, "llama_4_scaling_beta": beta}
    return {
        "rope_scaling": None,
        "rope_parameters": yarn | {"rope_theta": shared["rope_theta"]},
        "sliding_window": None,
    }


def _no_values(config: Config) -> Values:
    return {}


def _gemma2_values(config: Config) -> Values:
    return {
        "attn_logit_softcapping": float(config["attn_logit_softcapping"]),
        "final_logit_softcapping": float(config["final_logit_softcapping"]),
        "attention.sliding_window": config.get("sliding_window") or 4096,
    }


def _gemma3_values(config: Config) -> Values:
    return {
        "attention.sliding_window": config["sliding_window"],
        "attention.sliding_window_pattern": config["sliding_window_pattern"],
        "rope.freq_base_swa": float(config["rope_local_base_freq"]),
    }


def _phi3_values(config: Config) -> Values:
    head = config["hidden_size"] // config["num_attention_heads"]
    longest, scaled = config["max_position_embeddings"], bool(config.get("rope_scaling"))
    original = config["original_max_position_embeddings"] if scaled else longest
    values: Values = {
        "rope.dimension_count": int(head * config.get("partial_rotary_factor", 1.0)),
        "rope.scaling.original_context_length": original,
        "attention.sliding_window": config.get("sliding_window") or 0,
    }
    if scaled:
        values["rope.scaling.attn_factor"] = _longrope_attention(longest, original)
    return values


_EXPERT_KEYS = ("expert_count", "expert_used_count", "expert_feed_forward_length")

ARCHITECTURES = {
    "llama": Architecture(
        "llama",
        "LlamaForCausalLM",
        LLAMA,
        _llama,
        biases=BIASES,
        scalings=("linear", "yarn"),
        interleaved=True,
        values=_no_values,
    ),
    "qwen2": Architecture(
        "qwen2",
        "Qwen2ForCausalLM",
        LLAMA,
        _nothing,
        biases=BIASES,
        scalings=("linear", "yarn"),
        values=_no_values,
    ),
    "qwen3": Architecture(
        "qwen3",
        "Qwen3ForCausalLM",
        LLAMA | HEAD_NORMS,
        _nothing,
        keys=("attention.key_length", "rope.freq_base"),
        scalings=("linear", "yarn"),
        values=_no_values,
    ),
    "qwen3moe": Architecture(
        "qwen3_moe",
        "Qwen3MoeForCausalLM",
        {
            **ATTENTION,
            **HEAD_NORMS,
            "ffn_norm": "post_attention_layernorm",
            "ffn_gate_inp": "mlp.gate",
            **dict.fromkeys(sorted(EXPERTS), ""),
        },
        _qwen3_moe,
        keys=("attention.key_length", "rope.freq_base", *_EXPERT_KEYS),
        scalings=("linear", "yarn"),
    ),
    "gemma2": Architecture(
        "gemma2",
        "Gemma2ForCausalLM",
        GEMMA,
        _gemma2,
        keys=(
            "attention.key_length",
            "attn_logit_softcapping",
            "final_logit_softcapping",
            "attention.sliding_window",
        ),
        shifted=True,
        head=False,
        values=_gemma2_values,
    ),
    "gemma3": Architecture(
        "gemma3_text",
        "Gemma3ForCausalLM",
        GEMMA | HEAD_NORMS,
        _gemma3,
        keys=("attention.key_length", "attention.sliding_window", "rope.freq_base"),
        more_keys=("attention.sliding_window_pattern", "rope.freq_base_swa"),
        scalings=("linear",),
        shifted=True,
        head=False,
        values=_gemma3_values,
    ),
    "phi3": Architecture(
        "phi3",
        "Phi3ForCausalLM",
        {
            "attn_norm": "input_layernorm",
            "attn_qkv": "self_attn.qkv_proj",
            "attn_output": "self_attn.o_proj",
            "ffn_norm": "post_attention_layernorm",
            "ffn_up": "mlp.gate_up_proj",
            "ffn_down": "mlp.down_proj",
        },
        _phi3,
        keys=("rope.freq_base", "context_length"),
        more_keys=("attention.sliding_window", "rope.scaling.attn_factor"),
        scalings=("longrope",),
        values=_phi3_values,
    ),
    "granite": Architecture(
        "granite",
        "GraniteForCausalLM",
        LLAMA,
        _granite,
        biases=BIASES,
        keys=("logit_scale", "rope.freq_base"),
        more_keys=("attention.scale", "embedding_scale", "residual_scale"),
        interleaved=True,
    ),
    "gpt-oss": Architecture(
        "gpt_oss",
        "GptOssForCausalLM",
        {
            **ATTENTION,
            "attn_sinks": "self_attn.sinks",
            "post_attention_norm": "post_attention_layernorm",
            "ffn_gate_inp": "mlp.router",
            **dict.fromkeys(sorted(EXPERTS), ""),
        },
        _gpt_oss,
        biased=frozenset({"attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate_inp", *EXPERTS}),
        keys=("attention.key_length", "attention.sliding_window", "rope.freq_base", *_EXPERT_KEYS),
        scalings=("yarn",),
        head=True,
    ),
    "mistral3": Architecture(
        "ministral3",
        "Ministral3ForCausalLM",
        LLAMA,
        _mistral3,
        keys=("rope.freq_base",),
        more_keys=(
            "attention.temperature_scale",
            "attention.temperature_length",
            "rope.scaling.yarn_log_multiplier",
        ),
        scalings=("yarn",),
        interleaved=True,
    ),
    "smollm3": Architecture(
        "smollm3",
        "SmolLM3ForCausalLM",
        LLAMA,
        _smollm3,
        keys=("rope.freq_base",),
        scalings=("linear", "yarn"),
        interleaved=True,
        values=_no_values,
    ),
}
"""By the name in general.architecture."""
