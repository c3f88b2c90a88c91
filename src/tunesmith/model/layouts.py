"""config.json as mlx-lm's model classes read it, whichever release of transformers wrote it.

transformers 5 moved and renamed settings: `rope_parameters` holds the rotary settings (for each layer type in
some families), `layer_types` stands for a period of sliding windows, experts are counted under another name.
mlx-lm reads the names of transformers 4, and uses its own default where one is missing. `translate` adds the
names that mlx-lm reads. Files are not changed."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import mlx.core as mx

Config = dict[str, Any]

_SAME_COUNT = ("num_experts", "num_local_experts", "n_routed_experts")
"""Names of the number of routed experts."""


SHIFTED_NORMS = (
    ".input_layernorm.weight",
    ".post_attention_layernorm.weight",
    "model.norm.weight",
    ".q_norm.weight",
    ".k_norm.weight",
)


def translate(config: Config) -> Config:
    """A copy of ``config`` with the names that mlx-lm reads, also in the text model of a multimodal one.

    Raises ValueError if the settings cannot be expressed in these names."""
    translated = _translate_text(config)
    text = config.get("text_config")
    if isinstance(text, dict):
        if "tie_word_embeddings" in config:  # of the two places, transformers reads the outer one
            text = {**text, "tie_word_embeddings": config["tie_word_embeddings"]}
        translated["text_config"] = _translate_text(text)
        if "vocab_size" in text:  # the wrappers of Gemma overwrite the inner value with the outer one
            translated.setdefault("vocab_size", text["vocab_size"])
    return translated


def _translate_text(config: Config) -> Config:
    translated = dict(config)
    _add_rope(translated)
    counts = [translated[name] for name in _SAME_COUNT if name in translated]
    if counts:
        for name in _SAME_COUNT:
            translated.setdefault(name, counts[0])
    family = _FAMILIES.get(str(config.get("model_type")))
    if family is not None:
        family(translated)
    return translated


def _add_rope(config: Config) -> None:
    """`rope_theta`, `rope_scaling`, `partial_rotary_factor` from `rope_parameters`. Of settings by layer type
    these are the ones of full attention; `rope_local_base_freq` is the base of sliding attention."""
    parameters = config.get("rope_parameters")
    if not isinstance(parameters, dict) or config.get("rope_scaling"):
        _mend_scaling(config)
        return
    local = parameters.get("sliding_attention")
    if isinstance(local, dict) and "rope_theta" in local:
        config["rope_local_base_freq"] = local["rope_theta"]
    full = parameters.get("full_attention", local)
    flat = dict(full) if isinstance(full, dict) else dict(parameters)
    for name in ("rope_theta", "partial_rotary_factor"):
        if name in flat:
            config[name] = flat.pop(name)
    rope_type = flat.get("rope_type", flat.get("type", "default"))
    scaling = {name: value for name, value in flat.items() if value is not None}
    original = scaling.get("original_max_position_embeddings")
    if rope_type != "default" and original is not None:
        config.setdefault("original_max_position_embeddings", original)
    # some classes read `type`, others `rope_type`
    config["rope_scaling"] = scaling | {"rope_type": rope_type, "type": rope_type}
    _mend_scaling(config)


def _mend_scaling(config: Config) -> None:
    """Leave out a scaling that does nothing, and write YaRN's factor of attention as mlx-lm reads it."""
    scaling = config.get("rope_scaling")
    if not isinstance(scaling, dict):
        return
    rope_type = scaling.get("rope_type", scaling.get("type", "default"))
    factor, attention = scaling.get("factor"), scaling.get("attention_factor")
    if rope_type == "default":
        config["rope_scaling"] = None
    elif rope_type == "yarn" and factor and factor > 1 and attention is not None:
        # mlx-lm multiplies queries and keys by 0.1 mscale ln(factor) + 1
        mscale = (attention - 1.0) / (0.1 * math.log(factor))
        config["rope_scaling"] = scaling | {"mscale": mscale, "mscale_all_dim": 0}


def _period(config: Config) -> int | None:
    """n if every n-th layer attends to all positions and the others through a window; None if the layers are
    not listed. Raises ValueError if they have no such period."""
    types = config.get("layer_types")
    if not isinstance(types, list):
        return None
    full = [number for number, name in enumerate(types, start=1) if name == "full_attention"]
    period = full[0] if full else len(types) + 1
    if full != list(range(period, len(types) + 1, period)):
        kind = config.get("model_type")
        raise ValueError(f"layer_types: mlx-lm's {kind} needs one full_attention layer in every n layers")
    return period


def _windows_by_number(config: Config) -> None:
    period = _period(config)
    if period is not None:
        config["sliding_window_pattern"] = period


def _windows_by_letters(config: Config) -> None:
    """EXAONE 4: "LLLG", or None without a window: then all layers have rotary embeddings, else only those
    with the window."""
    period = _period(config)
    if config.get("sliding_window") is None:
        config["sliding_window"] = config["sliding_window_pattern"] = None
    elif period == 1:
        raise ValueError(
            "layer_types: mlx-lm's exaone4 needs a layer with the window, or sliding_window: null"
        )
    elif period is not None:
        config["sliding_window_pattern"] = "L" * (period - 1) + "G"
    _head_dim(config)


def _head_dim(config: Config) -> None:
    if config.get("head_dim") is None:
        config["head_dim"] = config["hidden_size"] // config["num_attention_heads"]


def _mistral(config: Config) -> None:
    """All layers have the window (`windows`), which mlx-lm's class would give to those listed here only."""
    config.pop("layer_types", None)


def _gpt_neox(config: Config) -> None:
    if "rope_theta" in config:
        config["rotary_emb_base"] = config["rope_theta"]
    if "partial_rotary_factor" in config:
        config["rotary_pct"] = config["partial_rotary_factor"]


def _gpt2(config: Config) -> None:
    config.setdefault("n_ctx", config.get("n_positions"))


def _apertus(config: Config) -> None:
    config.setdefault("mlp_bias", False)
    config.setdefault("post_norm", False)
    config.setdefault("qk_norm", True)


def _minimax(config: Config) -> None:
    _head_dim(config)
    if "rotary_dim" not in config:
        config["rotary_dim"] = int(config["head_dim"] * config.get("partial_rotary_factor", 1.0))
    config.setdefault("shared_intermediate_size", 0)  # not read


def _deepseek_v2(config: Config) -> None:
    """The class needs YaRN; with a factor of 1 it gives the plain frequencies."""
    if not config.get("rope_scaling"):
        config["rope_scaling"] = {"type": "yarn", "factor": 1.0, "original_max_position_embeddings": 4096}


def _minicpm3(config: Config) -> None:
    """The class needs LongRoPE; factors of 1 give the plain frequencies."""
    config.setdefault("tie_word_embeddings", True)
    if not config.get("rope_scaling"):
        ones = [1.0] * (config["qk_rope_head_dim"] // 2)
        config["rope_scaling"] = {
            "type": "longrope",
            "rope_type": "longrope",
            "short_factor": ones,
            "long_factor": ones,
            "original_max_position_embeddings": config["max_position_embeddings"],
        }


def _nemotron_h(config: Config) -> None:
    """transformers bounds time steps from below by `time_step_min`, which mlx-lm does not read."""
    _by_older_layer_names(config)
    if "time_step_min" in config:
        config["time_step_limit"] = (config["time_step_min"], math.inf)


def _olmo(config: Config) -> None:
    config.setdefault("rms_norm_eps", 1e-5)  # the class needs it, `mends.complete` replaces the norms


def _alone(config: Config) -> None:
    """A text model that mlx-lm has only inside its wrapper."""
    config["text_config"] = dict(config)


def _lfm2(config: Config) -> None:
    config.setdefault("block_dim", config["hidden_size"])


def _exaone_moe(config: Config) -> None:
    if isinstance(config.get("mlp_layer_types"), list):
        config.setdefault("is_moe_layer", [name == "sparse" for name in config["mlp_layer_types"]])


def _solar_open(config: Config) -> None:
    config.setdefault("first_k_dense_replace", 0)
    config.setdefault("partial_rotary_factor", 1.0)


def _gemma4(config: Config) -> None:
    """The layers that attend to all positions have heads of another size, listed layer by layer."""
    of_layers, types = config.get("per_layer_config"), config.get("layer_types")
    if not isinstance(of_layers, dict) or not isinstance(types, list):
        return
    full = [str(number) for number, name in enumerate(types) if name == "full_attention"]
    if set(of_layers) - set(full):
        raise ValueError("per_layer_config: only layers of full_attention can differ")
    for name, global_name in (
        ("head_dim", "global_head_dim"),
        ("num_key_value_heads", "num_global_key_value_heads"),
    ):
        values = [of_layers.get(number, {}).get(name, config.get(name)) for number in full]
        if len(set(values)) > 1:
            raise ValueError(f"per_layer_config: {name} must be the same in all layers of full_attention")
        if values:
            config[global_name] = values[0]


def _by_older_layer_names(config: Config) -> None:
    names = {"full_attention": "attention", "linear_attention": "mamba"}
    for key in ("layer_types", "layers_block_type"):
        if isinstance(config.get(key), list):
            config[key] = [names.get(name, name) for name in config[key]]


def _jamba(config: Config) -> None:
    """mlx-lm places experts where (layer + offset) is a multiple of the period, transformers where the
    number of the layer leaves the offset."""
    _by_older_layer_names(config)
    period = config.get("expert_layer_period", 2)
    config["expert_layer_offset"] = -config.get("expert_layer_offset", 1) % period


def _full_attention_interval(config: Config) -> None:
    types = config.get("layer_types")
    if isinstance(types, list) and "full_attention_interval" not in config:
        config["full_attention_interval"] = _period(
            {**config, "layer_types": ["x" if name != "full_attention" else name for name in types]}
        )


_FAMILIES: dict[str, Callable[[Config], None]] = {
    "apertus": _apertus,
    "cohere2": _windows_by_number,
    "deepseek_v2": _deepseek_v2,
    "exaone_moe": _exaone_moe,
    "gemma4_text": _gemma4,
    "llama4_text": _alone,
    "lfm2": _lfm2,
    "minicpm3": _minicpm3,
    "mistral": _mistral,
    "nemotron_h": _nemotron_h,
    "olmo": _olmo,
    "solar_open": _solar_open,
    "ernie4_5": _head_dim,
    "exaone4": _windows_by_letters,
    "gemma3_text": _windows_by_number,
    "gpt2": _gpt2,
    "gpt_neox": _gpt_neox,
    "granitemoehybrid": _by_older_layer_names,
    "jamba": _jamba,
    "minimax": _minimax,
    "minimax_m2": _minimax,
    "qwen3_5_text": _full_attention_interval,
    "qwen3_5_moe_text": _full_attention_interval,
    "qwen3_next": _full_attention_interval,
}
"""What a family needs besides, by model type."""

_CLASSES = {
    "arcee": "llama",
    "llama4_text": "llama4",
    "olmo": "llama",
    "qwen3_5_moe_text": "qwen3_5_moe",
    "qwen3_5_text": "qwen3_5",
    "youtu": "youtu_llm",
}
"""Model types whose class mlx-lm has under another name, or for a family that differs in what
`mends.complete` builds."""


def has_class(config: Config) -> bool:
    """Whether mlx-lm has a class of the name that ``config`` gives."""
    return config.get("model_type") not in _CLASSES


def with_class(config: Config) -> Config:
    """``config`` with the model type under which mlx-lm has its class."""
    kind = config.get("model_type")
    return {**config, "model_type": _CLASSES[kind]} if kind in _CLASSES else config


def rename(config: Config, weights: dict[str, mx.array]) -> dict[str, mx.array]:
    """``weights`` under the names, and in the shapes, that mlx-lm's class of this family reads."""
    family = _WEIGHTS.get(str(config.get("model_type")))
    return weights if family is None else family(weights, config)


def _gpt_neox_head(weights: dict[str, mx.array], config: Config) -> dict[str, mx.array]:
    return {
        ("embed_out.weight" if name == "lm_head.weight" else name): value for name, value in weights.items()
    }


def _without_prefix(weights: dict[str, mx.array], config: Config) -> dict[str, mx.array]:
    return {name.removeprefix("transformer."): value for name, value in weights.items()}


def _into_wrapper(weights: dict[str, mx.array], config: Config) -> dict[str, mx.array]:
    return {f"language_model.{name}": value for name, value in weights.items()}


def _gpt_oss_experts(weights: dict[str, mx.array], config: Config) -> dict[str, mx.array]:
    """Experts that are not quantised are stored input by output, with gate and up in turns."""
    if not any(name.endswith(".experts.gate_up_proj") for name in weights):
        return weights
    renamed: dict[str, mx.array] = {}
    for name, value in weights.items():
        if name.endswith(".experts.gate_up_proj"):
            prefix = name.removesuffix("gate_up_proj")
            renamed[f"{prefix}gate_proj.weight"] = value[..., ::2].swapaxes(1, 2)
            renamed[f"{prefix}up_proj.weight"] = value[..., 1::2].swapaxes(1, 2)
        elif name.endswith(".experts.gate_up_proj_bias"):
            prefix = name.removesuffix("gate_up_proj_bias")
            renamed[f"{prefix}gate_proj.bias"], renamed[f"{prefix}up_proj.bias"] = (
                value[..., ::2],
                value[..., 1::2],
            )
        elif name.endswith(".experts.down_proj"):
            renamed[f"{name}.weight"] = value.swapaxes(1, 2)
        elif name.endswith(".experts.down_proj_bias"):
            renamed[name.removesuffix("_bias") + ".bias"] = value
        else:
            renamed[name] = value
    return renamed


def _ernie_moe_bias(weights: dict[str, mx.array], config: Config) -> dict[str, mx.array]:
    """The bias by which the router chooses experts, under the name of `mends`: mlx-lm drops the original."""
    if not any("mlp.experts." in name or "selection_bias" in name for name in weights):
        raise ValueError(
            "mlx-lm left out the bias by which the router chooses experts when it wrote this folder"
        )
    return {
        name.replace("moe_statics.e_score_correction_bias", "selection_bias"): value.flatten()
        if name.endswith("e_score_correction_bias")
        else value
        for name, value in weights.items()
    }


_NANOCHAT = {
    "model.embed_tokens": "transformer.wte",
    "model.layers": "transformer.h",
    "self_attn.q_proj": "attn.c_q",
    "self_attn.k_proj": "attn.c_k",
    "self_attn.v_proj": "attn.c_v",
    "self_attn.o_proj": "attn.c_proj",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
}
"""Names of transformers, and those of nanochat's own files, which mlx-lm reads."""


def _nanochat(weights: dict[str, mx.array], config: Config) -> dict[str, mx.array]:
    def renamed(name: str) -> str:
        for theirs, ours in _NANOCHAT.items():
            name = name.replace(theirs, ours)
        return name

    return {renamed(name): value for name, value in weights.items()}


def _falcon_h1(weights: dict[str, mx.array], config: Config) -> dict[str, mx.array]:
    """mlx-lm multiplies weights by muP's multipliers, also in its own files, but leaves out those of keys and
    values."""
    factors = {
        "k_proj": config.get("key_multiplier", 1.0),
        "v_proj": config.get("attention_in_multiplier", 1.0),
    }

    def factor(name: str) -> float:
        layer, _, tensor = name.rpartition(".")
        scaled = ("scales", "biases") if f"{layer}.scales" in weights else ("weight",)
        return factors.get(layer.rpartition(".self_attn.")[2], 1.0) if tensor in scaled else 1.0

    wide = _in_float32(weights, config)
    return {name: value if factor(name) == 1.0 else value * factor(name) for name, value in wide.items()}


def _in_float32(weights: dict[str, mx.array], config: Config) -> dict[str, mx.array]:
    """mlx-lm adds 1 to the norms of Qwen3-Next and Qwen3.5, and multiplies weights of Falcon-H1: in bfloat16
    that rounds. On a CPU the weights become float32 anyway, here before that arithmetic."""
    if mx.default_device().type != mx.DeviceType.cpu:
        return weights
    return {name: _widened(value) for name, value in weights.items()}


def _with_shifted_norms(weights: dict[str, mx.array], config: Config) -> dict[str, mx.array]:
    """The norms are float32 on every device, and stay so (`mends`)."""
    wide = _in_float32(weights, config)
    return {name: _widened(value) if is_shifted_norm(name) else value for name, value in wide.items()}


def is_shifted_norm(name: str) -> bool:
    """Whether the tensor is the weight of a norm that Qwen3-Next and Qwen3.5 store without the 1."""
    return name.endswith(SHIFTED_NORMS)


def _widened(value: mx.array) -> mx.array:
    return value.astype(mx.float32) if value.dtype in (mx.bfloat16, mx.float16) else value


_WEIGHTS: dict[str, Callable[[dict[str, mx.array], Config], dict[str, mx.array]]] = {
    "ernie4_5_moe": _ernie_moe_bias,
    "falcon_h1": _falcon_h1,
    "nanochat": _nanochat,
    "llama4_text": _into_wrapper,
    "gpt2": _without_prefix,
    "qwen3_5": _with_shifted_norms,
    "qwen3_5_moe": _with_shifted_norms,
    "qwen3_5_moe_text": _with_shifted_norms,
    "qwen3_5_text": _with_shifted_norms,
    "qwen3_next": _with_shifted_norms,
    "gpt_neox": _gpt_neox_head,
    "gpt_oss": _gpt_oss_experts,
}
"""How a family's weights are renamed, by model type."""
