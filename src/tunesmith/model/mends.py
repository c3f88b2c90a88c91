"""Faults of mlx-lm's models that are mended here, each in a subclass of the layer that has it, or in a value
that its constructor left out. Every mend is held against transformers in tests/parity."""

from __future__ import annotations

import importlib
import math
import types
from collections.abc import Callable
from typing import Any, cast

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from tunesmith.model import bodies, kernels, layouts, wrap

Config = dict[str, Any]


def install(net: nn.Module, config: Config) -> None:
    """Mend the layers of ``net`` that need it. ``config``: its settings in the names of mlx-lm."""
    text = config.get("text_config")
    settings = text if isinstance(text, dict) else config
    _ropes(net, settings)
    family = _FAMILIES.get(str(settings.get("model_type")))
    if family is not None:
        family(net, settings)


def completes(config: Config) -> bool:
    """Whether `complete` changes what mlx-lm's class builds."""
    return config.get("model_type") in _LAYERS


def complete(net: nn.Module, config: Config) -> None:
    """Give ``net``, before weights are read, the layers that mlx-lm's class has otherwise or leaves out."""
    family = _LAYERS.get(str(config.get("model_type")))
    if family is not None:
        family(net)


def _ropes(net: nn.Module, config: Config) -> None:
    from mlx_lm.models.rope_utils import SuScaledRoPE, YarnRoPE

    scaling = config.get("rope_scaling")
    if not isinstance(scaling, dict):
        return
    if scaling.get("rope_type") == "yarn" and scaling.get("truncate") is False:
        for module in _of(net, YarnRoPE):
            module._freqs = yarn_wavelengths(module.dims, config["rope_theta"], scaling)
    if scaling.get("rope_type") == "longrope":
        ropes = _of(net, SuScaledRoPE)
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
    scaled = x.at[..., : rope.dim].multiply(rope._scale)

    def turned(freqs: mx.array) -> mx.array:
        options: Any = {"traditional": False, "base": None, "scale": 1.0, "offset": offset}
        return kernels.rope(scaled, rope.dim, **options, freqs=freqs)

    last = x.shape[-2] + offset
    if isinstance(last, int):
        return turned(rope._freqs if last > rope.original_max_position_embeddings else rope._short)
    is_long = last.reshape(-1, 1, 1, 1) > rope.original_max_position_embeddings  # each row has its own offset
    return mx.where(is_long, turned(rope._freqs), turned(rope._short))


def _partial_rotary(net: nn.Module, config: Config) -> None:
    """GLM turns only the first half of a head's dimensions."""
    from mlx_lm.models import glm

    for module in _of(net, glm.GLMAttention):
        module.rope.dims = int(module.head_dim * config.get("partial_rotary_factor", 0.5))


def _recurrent_gemma(net: nn.Module, config: Config) -> None:
    """mlx-lm does not read the base of RecurrentGemma's rotary embedding nor the epsilon of the norms in its
    blocks, and the gradient of its recurrence can be infinite."""
    from mlx_lm.models import recurrent_gemma

    for module in _of(net, recurrent_gemma.LocalAttentionBlock):
        module.rope.base = config["rope_theta"]
    for module in _of(net, recurrent_gemma.RMSNorm):
        module.eps = config["rms_norm_eps"]
    wrap.replace(_of(net, recurrent_gemma.RGLRU), lambda kind: _rglru)


STEEPEST = 1000.0
"""Bound of the slope of the square root in RG-LRU, as Griffin's authors (arXiv 2402.19427) and transformers
have it."""


def _root_vjp(primal: mx.array, cotangent: mx.array, result: mx.array) -> mx.array:
    return cotangent * mx.rsqrt(mx.maximum(4 * primal, STEEPEST**-2))


_root: Callable[[mx.array], mx.array] = kernels.with_gradient(mx.sqrt, _root_vjp)
"""The square root, whose slope is bounded."""


def _rglru(layer: Any, x: mx.array, cache: mx.array | None = None) -> tuple[mx.array, mx.array]:
    """RG-LRU: (B, T, D) → the same, and the last state (B, D). Where the decay a rounds to 1, the slope of
    sqrt(1 - a²) is infinite in mlx-lm, and times zero at the first position not a number."""
    from mlx_lm.models import recurrent_gemma

    def gate(weight: mx.array, bias: mx.array) -> mx.array:
        heads = x.reshape(*x.shape[:2], layer.num_heads, layer.head_dim).swapaxes(1, 2)
        return mx.sigmoid(((heads @ weight).swapaxes(1, 2) + bias).flatten(2, 3))

    log_decay = -8.0 * gate(layer.recurrent_gate_weight, layer.recurrent_gate_bias)
    log_decay = log_decay * nn.softplus(layer.recurrent_param)
    size = _root(1 - mx.exp(2 * log_decay))
    if cache is None:
        size = mx.concatenate([mx.ones_like(size[:, :1]), size[:, 1:]], axis=1)
    inputs = x * gate(layer.input_gate_weight, layer.input_gate_bias) * size.astype(x.dtype)
    return recurrent_gemma.rnn_scan(x=inputs, a=mx.exp(log_decay), h0=cache)


def _gemma(net: nn.Module, config: Config) -> None:
    """Gemma's GELU is the tanh approximation, also where the file says "gelu"."""
    from mlx_lm.models import gemma

    def call(layer: Any, x: mx.array) -> mx.array:
        return layer.down_proj(kernels.gelu_approx(layer.gate_proj(x)) * layer.up_proj(x))

    wrap.replace(_of(net, gemma.MLP), lambda kind: call)


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

    wrap.replace(_of(net, gemma2.Attention), call_of)


_MLPS = {
    "gpt_bigcode": ("activation_function", "gelu_pytorch_tanh", "c_fc", "c_proj"),
    "gpt_neox": ("hidden_act", "gelu", "dense_h_to_4h", "dense_4h_to_h"),
    "starcoder2": ("hidden_act", "gelu_pytorch_tanh", "c_fc", "c_proj"),
}
"""By model type: the setting that names the activation, its default, the layers before and after it."""


def _mlp(net: nn.Module, config: Config) -> None:
    """GELU or its tanh approximation, as the settings say; mlx-lm always takes the other one, or a faster
    approximation."""
    family = str(config["model_type"])
    setting, default, first, last = _MLPS[family]
    activation = nn.gelu if config.get(setting, default) == "gelu" else kernels.gelu_approx

    def call(layer: Any, x: mx.array) -> mx.array:
        return layer[last](activation(layer[first](x)))

    classes = importlib.import_module(f"mlx_lm.models.{family}")
    wrap.replace(_of(net, classes.MLP), lambda kind: call)


def _llama4(net: nn.Module, config: Config) -> None:
    """mlx-lm has another epsilon in Llama 4's norm of queries and keys."""
    from mlx_lm.models import llama4

    epsilon = config["rms_norm_eps"]

    def call_of(kind: type[nn.Module]) -> wrap.Call:
        code: Any = kind.__call__
        core = code.__globals__["mx"]

        def rms_norm(x: mx.array, weight: mx.array | None, eps: float) -> mx.array:
            return core.fast.rms_norm(x, weight, epsilon)

        fast = types.SimpleNamespace(**(vars(core.fast) | {"rms_norm": rms_norm}))
        return wrap.rebound(code, {"mx": types.SimpleNamespace(**(vars(core) | {"fast": fast}))})

    wrap.replace(_of(net, llama4.Attention), call_of)


def _latent_norms(net: nn.Module, config: Config) -> None:
    """The norms of the latents have an epsilon of 1e-6; mlx-lm takes `rms_norm_eps` or MLX's default."""
    for name, module in net.named_modules():
        if isinstance(module, nn.RMSNorm) and name.endswith(("q_a_layernorm", "kv_a_layernorm")):
            module.eps = 1e-6


def _minicpm3(net: nn.Module, config: Config) -> None:
    """mlx-lm does not divide the hidden states before a tied head."""
    _latent_norms(net, config)
    if not config.get("tie_word_embeddings"):
        return

    def call(model: Any, inputs: mx.array, mask: Any = None, cache: Any = None) -> mx.array:
        hidden = model.model(inputs, mask, cache)
        return model.model.embed_tokens.as_linear(
            hidden / (model.args.hidden_size / model.args.dim_model_base)
        )

    wrap.replace([net], lambda kind: call)


def _nanochat(net: nn.Module, config: Config) -> None:
    """mlx-lm does not read the epsilon of nanochat's norms."""
    from mlx_lm.models import nanochat

    epsilon = config.get("rms_norm_eps")
    if epsilon is None:
        return

    def rms_norm(x: mx.array) -> mx.array:
        return mx.fast.rms_norm(x, None, epsilon)

    kinds = (nanochat.Attention, nanochat.TransformerBlock, nanochat.NanoChatModel)
    modules = [module for kind in kinds for module in _of(net, kind)]
    wrap.replace(modules, lambda kind: wrap.rebound(kind.__call__, {"rms_norm": rms_norm}))


def _jamba(net: nn.Module, config: Config) -> None:
    """Jamba weighs its chosen experts with the softmax over all of them; mlx-lm with that over the chosen."""
    from mlx_lm.models import jamba

    def call(layer: Any, x: mx.array) -> mx.array:
        chosen, weights = _best(mx.softmax(layer.router(x), axis=-1, precise=True), layer.num_experts_per_tok)
        return (layer.switch_mlp(x, chosen) * weights[..., None]).sum(axis=-2)

    wrap.replace(_of(net, jamba.JambaSparseMoeBlock), lambda kind: call)


def _qwen2_moe(net: nn.Module, config: Config) -> None:
    """mlx-lm does not read `norm_topk_prob`: the weights of the chosen experts add up to 1."""
    from mlx_lm.models import qwen2_moe

    if not config.get("norm_topk_prob"):
        return

    def call(layer: Any, x: mx.array) -> mx.array:
        chosen, weights = _best(mx.softmax(layer.gate(x), axis=-1, precise=True), layer.top_k)
        weights = weights / weights.sum(axis=-1, keepdims=True)
        y = (layer.switch_mlp(x, chosen) * weights[..., None]).sum(axis=-2)
        return y + mx.sigmoid(layer.shared_expert_gate(x)) * layer.shared_expert(x)

    wrap.replace(_of(net, qwen2_moe.Qwen2MoeSparseMoeBlock), lambda kind: call)


def _ernie_moe(net: nn.Module, config: Config) -> None:
    """ERNIE 4.5 chooses experts by probability plus a bias, which mlx-lm leaves out."""
    from mlx_lm.models import ernie4_5_moe

    least = config.get("moe_norm_min", 1e-12)

    def call(layer: Any, x: mx.array) -> mx.array:
        probabilities = layer.gate_act(layer.gate(x).astype(mx.float32))
        chosen, _ = _best(probabilities + layer.selection_bias, layer.k)
        weights = mx.take_along_axis(probabilities, chosen, axis=-1)
        weights = weights / mx.maximum(weights.sum(axis=-1, keepdims=True), least)
        y = layer.switch_mlp(x, chosen)
        y = (y * weights[..., None]).sum(axis=-2).astype(y.dtype)
        return y if layer.shared_experts is None else y + layer.shared_experts(x)

    wrap.replace(_of(net, ernie4_5_moe.Ernie4_5_MoeMLP), lambda kind: call)


def _arcee_layers(net: nn.Module) -> None:
    """Arcee is Llama with the MLP of Nemotron: two layers and a squared ReLU."""
    from mlx_lm.models import nemotron

    blocks: Any = net.layers
    for block in blocks:
        block.mlp = nemotron.MLP(block.args)


def _olmo_layers(net: nn.Module) -> None:
    """OLMo 1 is Llama whose norms subtract the mean and have no weights."""
    arguments: Any = net.args
    blocks: Any = net.layers
    norms = [(bodies.body(net), "norm")]
    norms += [(block, name) for block in blocks for name in ("input_layernorm", "post_attention_layernorm")]
    for module, name in norms:
        module[name] = nn.LayerNorm(arguments.hidden_size, eps=1e-5, affine=False)


def _ernie_moe_layers(net: nn.Module) -> None:
    from mlx_lm.models import ernie4_5_moe

    for block in _of(net, ernie4_5_moe.Ernie4_5_MoeMLP):
        block.selection_bias = mx.zeros((block.args.moe_num_experts,))


_LAYERS: dict[str, Callable[[nn.Module], None]] = {
    "arcee": _arcee_layers,
    "ernie4_5_moe": _ernie_moe_layers,
    "olmo": _olmo_layers,
}
"""What is built otherwise than by mlx-lm's class, by model type."""


def _best(scores: mx.array, count: int) -> tuple[mx.array, mx.array]:
    """Numbers (..., count) of the experts with the highest ``scores`` (..., experts), and their scores."""
    chosen = mx.stop_gradient(mx.argpartition(-scores, kth=count - 1, axis=-1)[..., :count])
    return chosen, mx.take_along_axis(scores, chosen, axis=-1)


def _of(net: nn.Module, kind: type[nn.Module]) -> list[Any]:
    """The modules of ``net`` of class ``kind``."""
    return [module for module in net.modules() if isinstance(module, kind)]


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
    "ernie4_5_moe": _ernie_moe,
    "gemma": _gemma,
    "gemma2": _gemma2,
    "glm": _partial_rotary,
    "glm4_moe_lite": _latent_norms,
    "gpt_bigcode": _mlp,
    "gpt_neox": _mlp,
    "jamba": _jamba,
    "llama4": _llama4,
    "llama4_text": _llama4,
    "minicpm3": _minicpm3,
    "nanochat": _nanochat,
    "qwen2_moe": _qwen2_moe,
    "qwen3_5_moe_text": _shifted_norms,
    "qwen3_5_text": _shifted_norms,
    "qwen3_next": _shifted_norms,
    "recurrent_gemma": _recurrent_gemma,
    "starcoder2": _mlp,
}
"""What is mended besides rotary embeddings, by model type."""
