"""Faults of mlx-lm's models that are mended here, each in a subclass of the layer that has it, or in a value
that its constructor left out. Every mend is held against transformers in tests/parity."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, cast

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from tunesmith.model import kernels, layouts, wrap

Config = dict[str, Any]


def install(net: nn.Module, config: Config) -> None:
    """Mend the layers of ``net`` that need it. ``config``: its settings in the names of mlx-lm."""
    text = config.get("text_config")
    settings = text if isinstance(text, dict) else config
    _ropes(net, settings)
    family = _FAMILIES.get(str(settings.get("model_type")))
    if family is not None:
        family(net, settings)


def _ropes(net: nn.Module, config: Config) -> None:
    from mlx_lm.models.rope_utils import SuScaledRoPE, YarnRoPE

    scaling = config.get("rope_scaling")
    if not isinstance(scaling, dict):
        return
    if scaling.get("rope_type") == "yarn" and scaling.get("truncate") is False:
        for module in net.modules():
            if isinstance(module, YarnRoPE):
                module._freqs = yarn_wavelengths(module.dims, config["rope_theta"], scaling)
    if scaling.get("rope_type") == "longrope":
        ropes = [module for module in net.modules() if isinstance(module, SuScaledRoPE)]
        for module in ropes:
            base = config["rope_theta"] ** (mx.arange(0, module.dim, 2, dtype=mx.float32) / module.dim)
            module._short = mx.array(scaling["short_factor"], dtype=mx.float32) * base
            if scaling.get("attention_factor") is not None:
                module._scale = scaling["attention_factor"]
        wrap.replace(ropes, lambda kind: _longrope)


def yarn_wavelengths(dims: int, base: float, scaling: Config) -> mx.array:
    """(dims / 2,) wavelengths, over 2π, of YaRN (arXiv 2309.00071) whose range of dimensions is not rounded
    to whole numbers: `truncate: false`, which mlx-lm does not read."""
    factor, original = scaling["factor"], scaling["original_max_position_embeddings"]

    def dimension(rotations: float) -> float:
        return dims * math.log(original / (rotations * 2 * math.pi)) / (2 * math.log(base))

    low = max(dimension(scaling.get("beta_fast") or 32), 0)
    high = min(dimension(scaling.get("beta_slow") or 1), dims - 1)
    ramp = mx.clip((mx.arange(dims // 2, dtype=mx.float32) - low) / max(high - low, 0.001), 0, 1)
    plain = base ** (mx.arange(0, dims, 2, dtype=mx.float32) / dims)
    return 1 / ((1 - ramp) / plain + ramp / (factor * plain))


def _longrope(rope: Any, x: mx.array, offset: int | mx.array = 0) -> mx.array:
    """LongRoPE's short factors up to the length of pretraining, the long ones beyond; mlx-lm always takes the
    long ones."""
    last = x.shape[-2] + (offset.max() if isinstance(offset, mx.array) else offset)
    if isinstance(last, int):
        freqs = rope._freqs if last > rope.original_max_position_embeddings else rope._short
    else:
        freqs = mx.where(last > rope.original_max_position_embeddings, rope._freqs, rope._short)
    scaled = x.at[..., : rope.dim].multiply(rope._scale)
    return kernels.rope(scaled, rope.dim, traditional=False, base=None, scale=1.0, offset=offset, freqs=freqs)


def _partial_rotary(net: nn.Module, config: Config) -> None:
    """GLM turns only the first half of a head's dimensions."""
    from mlx_lm.models import glm

    for module in net.modules():
        if isinstance(module, glm.GLMAttention):
            module.rope.dims = int(module.head_dim * config.get("partial_rotary_factor", 0.5))


def _recurrent_gemma(net: nn.Module, config: Config) -> None:
    """mlx-lm does not read the base of RecurrentGemma's rotary embedding."""
    from mlx_lm.models import recurrent_gemma

    for module in net.modules():
        if isinstance(module, recurrent_gemma.LocalAttentionBlock):
            module.rope.base = config["rope_theta"]


def _activation(name: str) -> Callable[[mx.array], mx.array]:
    return nn.gelu if name == "gelu" else kernels.gelu_approx


def _gemma(net: nn.Module, config: Config) -> None:
    """Gemma's GELU is the tanh approximation, also where the file says "gelu"."""
    from mlx_lm.models import gemma

    def call(layer: Any, x: mx.array) -> mx.array:
        return layer.down_proj(kernels.gelu_approx(layer.gate_proj(x)) * layer.up_proj(x))

    wrap.replace([module for module in net.modules() if isinstance(module, gemma.MLP)], lambda kind: call)


def _gemma2(net: nn.Module, config: Config) -> None:
    """Gemma 2 computes scores of (B, key heads, queries a key head, T, S); a batch's mask is (B, 1, T, S).
    mlx-lm fails, or where the batch is as large as the key heads, gives each head the mask of a row."""
    from mlx_lm.models import gemma2

    def call_of(kind: type[nn.Module]) -> wrap.Call:
        def call(layer: Any, x: mx.array, mask: Any = None, cache: Any = None) -> mx.array:
            if isinstance(mask, mx.array) and mask.ndim == 4 and layer.repeats > 1:
                mask = mask[:, :, None]
            return kind.__call__(layer, x, mask, cache)

        return call

    wrap.replace([module for module in net.modules() if isinstance(module, gemma2.Attention)], call_of)


def _starcoder2(net: nn.Module, config: Config) -> None:
    from mlx_lm.models import starcoder2

    activation = _activation(config.get("hidden_act", "gelu_pytorch_tanh"))

    def call(layer: Any, x: mx.array) -> mx.array:
        return layer.c_proj(activation(layer.c_fc(x)))

    wrap.replace(
        [module for module in net.modules() if isinstance(module, starcoder2.MLP)], lambda kind: call
    )


def _gpt_bigcode(net: nn.Module, config: Config) -> None:
    from mlx_lm.models import gpt_bigcode

    activation = _activation(config.get("activation_function", "gelu_pytorch_tanh"))

    def call(layer: Any, x: mx.array) -> mx.array:
        return layer.c_proj(activation(layer.c_fc(x)))

    wrap.replace(
        [module for module in net.modules() if isinstance(module, gpt_bigcode.MLP)], lambda kind: call
    )


def _gpt_neox(net: nn.Module, config: Config) -> None:
    from mlx_lm.models import gpt_neox

    activation = _activation(config.get("hidden_act", "gelu"))

    def call(layer: Any, x: mx.array) -> mx.array:
        return layer.dense_4h_to_h(activation(layer.dense_h_to_4h(x)))

    wrap.replace([module for module in net.modules() if isinstance(module, gpt_neox.MLP)], lambda kind: call)


def _jamba(net: nn.Module, config: Config) -> None:
    """Jamba weighs its chosen experts with the softmax over all of them; mlx-lm with that over the chosen."""
    from mlx_lm.models import jamba

    def call(layer: Any, x: mx.array) -> mx.array:
        weights = mx.softmax(layer.router(x), axis=-1, precise=True)
        n_chosen = layer.num_experts_per_tok
        chosen = mx.stop_gradient(mx.argpartition(-weights, kth=n_chosen - 1, axis=-1)[..., :n_chosen])
        scores = mx.take_along_axis(weights, chosen, axis=-1)
        return (layer.switch_mlp(x, chosen) * scores[..., None]).sum(axis=-2)

    blocks = [module for module in net.modules() if isinstance(module, jamba.JambaSparseMoeBlock)]
    wrap.replace(blocks, lambda kind: call)


def _shifted_norms(net: nn.Module, config: Config) -> None:
    """The norms of Qwen3-Next and Qwen3.5 multiply by 1 + w, which bfloat16 would round: they compute in
    float32, as in transformers, whatever the dtype of the rest."""
    norms = [module for name, module in net.named_modules() if layouts.is_shifted_norm(f"{name}.weight")]
    wide = [norm for norm in norms if cast(mx.array, norm["weight"]).dtype == mx.float32]

    def call_of(kind: type[nn.Module]) -> wrap.Call:
        def call(norm: nn.Module, x: mx.array) -> mx.array:
            return kind.__call__(norm, x.astype(mx.float32)).astype(x.dtype)

        return call

    wrap.replace(wide, call_of)


def in_float32(net: nn.Module, config: Config) -> dict[str, mx.array]:
    """The parameters of ``net`` that stay in float32 if the rest gets another dtype."""
    text = config.get("text_config")
    settings = text if isinstance(text, dict) else config
    if _FAMILIES.get(str(settings.get("model_type"))) is not _shifted_norms:
        return {}
    parameters: Any = tree_flatten(net.parameters())
    return {name: value for name, value in parameters if layouts.is_shifted_norm(name)}


_FAMILIES: dict[str, Callable[[nn.Module, Config], None]] = {
    "gemma": _gemma,
    "gemma2": _gemma2,
    "glm": _partial_rotary,
    "gpt_bigcode": _gpt_bigcode,
    "gpt_neox": _gpt_neox,
    "jamba": _jamba,
    "qwen3_5_moe_text": _shifted_norms,
    "qwen3_5_text": _shifted_norms,
    "qwen3_next": _shifted_norms,
    "recurrent_gemma": _recurrent_gemma,
    "starcoder2": _starcoder2,
}
"""What is mended besides rotary embeddings, by model type."""
