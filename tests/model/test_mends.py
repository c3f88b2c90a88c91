"""What mlx-lm's layers compute wrong is mended: values of transformers 5.24, and laws."""

from __future__ import annotations

import json

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten
from mlx_lm.models import ernie4_5_moe, gemma, glm, jamba, llama, minicpm3, nanochat, phi3, qwen2_moe
from mlx_lm.models.recurrent_gemma import RGLRU, LocalAttentionBlock
from mlx_lm.models.rope_utils import initialize_rope
from model.families import SIZES as SIZES_OF_ALL
from model.families import WRAPPERS, made

from tunesmith.model import layouts, loading, mends

LONG = {
    "rope_type": "longrope",
    "type": "longrope",
    "short_factor": [1.0] * 8,
    "long_factor": [4.0] * 8,
    "original_max_position_embeddings": 32,
}
SIZES = {"hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 2}
SIZES |= {"intermediate_size": 96, "rms_norm_eps": 1e-6, "vocab_size": 32}


class Layers(nn.Module):
    """A model of one layer."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer


def close(found, wanted):
    np.testing.assert_allclose(np.array(found), np.array(wanted), rtol=2e-5, atol=2e-5)


def test_yarn_with_a_range_that_is_not_rounded_has_the_wavelengths_of_transformers():
    scaling = {"rope_type": "yarn", "factor": 32.0, "beta_fast": 32.0, "beta_slow": 1.0, "truncate": False}
    scaling["original_max_position_embeddings"] = 4096
    layer = initialize_rope(16, 150000.0, False, scaling)
    net = Layers(layer)
    mends.install(net, {"model_type": "gpt_oss", "rope_theta": 150000.0, "rope_scaling": scaling})
    wanted = [1.0, 4.4362030, 19.6798973, 147.167923, 2190.65771, 54980.289, 243903.719, 1082006.375]
    np.testing.assert_allclose(np.array(layer._freqs), wanted, rtol=1e-5)


def rope():
    """LongRoPE whose short factors change nothing, mended; its scale of queries is 1."""
    layer = initialize_rope(16, 10000.0, False, LONG, 32)
    mends.install(Layers(layer), {"model_type": "phi3", "rope_theta": 10000.0, "rope_scaling": LONG})
    return layer


def test_longrope_takes_its_short_factors_up_to_the_length_of_pretraining():
    x = mx.random.normal((2, 4, 32, 16))
    close(rope()(x), nn.RoPE(16)(x))


def test_longrope_takes_its_long_factors_beyond_that():
    x, base = mx.random.normal((2, 4, 33, 16)), 10000.0 ** (mx.arange(0, 16, 2) / 16)
    wanted = mx.fast.rope(x, 16, traditional=False, base=None, scale=1.0, offset=0, freqs=4 * base)
    close(rope()(x), wanted)


def test_longrope_counts_from_the_offset_of_the_cache_given_as_number_or_array():
    x = mx.random.normal((2, 4, 1, 16))
    for offset in (31, 32):
        close(rope()(x, offset=mx.array([offset, offset])), rope()(x, offset=offset))
    assert np.abs(np.array(rope()(x, offset=32) - nn.RoPE(16)(x, offset=32))).max() > 0.1


def test_each_row_of_a_batch_has_the_factors_of_its_own_length():
    x = mx.random.normal((2, 4, 1, 16))
    both = rope()(x, offset=mx.array([31, 32]))
    close(both[:1], rope()(x[:1], offset=31))
    close(both[1:], rope()(x[1:], offset=32))


def test_glm_turns_a_part_of_each_head():
    net = glm.Model(glm.ModelArgs(model_type="glm", head_dim=16, **SIZES))
    mends.install(net, {"model_type": "glm", "partial_rotary_factor": 0.5})
    assert net.model.layers[0].self_attn.rope.dims == 8


def test_recurrent_gemma_turns_with_the_base_of_its_settings():
    layer, x = LocalAttentionBlock(64, 4, 32), mx.random.normal((1, 4, 9, 16))
    mends.install(
        Layers(layer), {"model_type": "recurrent_gemma", "rope_theta": 50000.0, "rms_norm_eps": 1e-6}
    )
    close(layer.rope(x), nn.RoPE(8, base=50000.0)(x))


def test_the_gradient_of_a_recurrence_without_decay_is_finite():
    """Where a rounds to 1, the slope of sqrt(1 - a²) is infinite; at the first position it is multiplied by
    zero."""
    layer, x = RGLRU(8, 2), mx.random.normal((1, 5, 8))
    layer.recurrent_param = mx.full((8,), -40.0)
    layer.recurrent_gate_weight = mx.random.normal((2, 4, 4))
    before, state = layer(x)
    mends.install(Layers(layer), {"model_type": "recurrent_gemma", "rope_theta": 1e4, "rms_norm_eps": 1e-6})
    after, again = layer(x)
    close(after, before)
    close(again, state)
    slope = np.array(mx.grad(lambda x: layer(x)[0].sum())(x))
    assert np.isfinite(slope).all() and np.abs(slope).max() > 0


def test_gemma_has_the_tanh_approximation_of_gelu():
    net = gemma.Model(gemma.ModelArgs(model_type="gemma", head_dim=16, **SIZES))
    layer, x = net.model.layers[0].mlp, mx.random.normal((3, 64))
    mends.install(net, {"model_type": "gemma", "hidden_act": "gelu"})
    close(layer(x), layer.down_proj(nn.gelu_approx(layer.gate_proj(x)) * layer.up_proj(x)))


def test_jamba_weighs_the_chosen_experts_by_the_softmax_over_all():
    arguments = {"attn_layer_offset": 1, "attn_layer_period": 2, "expert_layer_offset": 0}
    arguments |= {"expert_layer_period": 1, "mamba_d_conv": 4, "mamba_d_state": 8, "mamba_expand": 2}
    arguments |= {"num_experts": 4, "num_experts_per_tok": 2, "max_position_embeddings": 64}
    net = jamba.Model(jamba.ModelArgs(model_type="jamba", **SIZES | {"num_hidden_layers": 2}, **arguments))
    layer, x = net.model.layers[0].feed_forward, mx.random.normal((3, 64))
    mends.install(net, {"model_type": "jamba"})
    weights = np.array(mx.softmax(layer.router(x), axis=-1))
    each = [np.array(layer.switch_mlp(x, mx.full((3, 1), expert))[:, 0]) for expert in range(4)]
    wanted = np.zeros((3, 64), np.float32)
    for row in range(3):
        for expert in np.argsort(-weights[row])[:2]:
            wanted[row] += weights[row, expert] * each[expert][row]
    close(layer(x), wanted)


def shifted_norms(folder, dtype):
    """A Qwen3.5 as transformers stores it in ``dtype``, with norms of w, and those norms by name."""
    net = made("qwen3_5")
    weights = {name: value.astype(dtype) for name, value in tree_flatten(net.parameters())}
    for name, value in weights.items():
        if "conv1d.weight" in name:
            weights[name] = value.moveaxis(2, 1)
    norms = {
        name: 0.1 * mx.random.normal(v.shape) for name, v in weights.items() if layouts.is_shifted_norm(name)
    }
    norms = {name: value.astype(dtype) for name, value in norms.items()}
    folder.mkdir(exist_ok=True)
    mx.save_safetensors(str(folder / "model.safetensors"), weights | norms)
    text = SIZES_OF_ALL | WRAPPERS["qwen3_5"]
    (folder / "config.json").write_text(json.dumps({"model_type": "qwen3_5", "text_config": text}))
    return norms


@pytest.mark.parametrize("dtype", ["auto", "bfloat16", "float16"])
def test_norms_of_qwen3_5_are_added_and_computed_in_float32_on_a_gpu_too(dtype, tmp_path, monkeypatch):
    """Loaded as on a GPU, where the rest stays in half precision."""
    norms = shifted_norms(tmp_path, mx.bfloat16)
    monkeypatch.setattr(mx, "default_device", lambda: mx.Device(mx.gpu, 0))
    net = loading.load(loading.ModelSpec(path=str(tmp_path), dtype=dtype)).net
    monkeypatch.undo()
    half = {"auto": mx.bfloat16, "bfloat16": mx.bfloat16, "float16": mx.float16}[dtype]
    assert net.language_model.model.embed_tokens.weight.dtype == half
    layers = dict(net.named_modules())
    assert len(norms) == 2 * 4 + 1 + 2 * 2
    for name, stored in norms.items():
        norm = layers[name.removesuffix(".weight")]
        assert mx.array_equal(norm.weight, 1 + stored.astype(mx.float32)), name
    x = mx.random.normal((3, 32)).astype(half)
    norm = net.language_model.model.norm
    wide = x.astype(mx.float32)
    expected = wide * mx.rsqrt(mx.square(wide).mean(axis=-1, keepdims=True) + norm.eps) * norm.weight
    np.testing.assert_allclose(
        np.array(norm(x).astype(mx.float32)), np.array(expected.astype(half).astype(mx.float32)), rtol=8e-3
    )
    assert norm(x).dtype == half == net(mx.array([[1, 2, 3]])).dtype


MIXTURE = SIZES | {"moe_intermediate_size": 32, "num_experts": 4, "num_experts_per_tok": 2, "rope_theta": 1e4}
MIXTURE |= {"shared_expert_intermediate_size": 32}


def test_qwen2_moe_normalises_the_weights_of_its_experts_if_the_settings_say_so():
    net = qwen2_moe.Model(qwen2_moe.ModelArgs(model_type="qwen2_moe", **MIXTURE))
    layer, x = net.model.layers[0].mlp, mx.random.normal((3, 64))
    layer.shared_expert.down_proj.weight *= 0
    plain, probabilities = np.array(layer(x)), np.array(mx.softmax(layer.gate(x), axis=-1))
    mends.install(net, {"model_type": "qwen2_moe", "norm_topk_prob": False})
    close(layer(x), plain)
    mends.install(net, {"model_type": "qwen2_moe", "norm_topk_prob": True})
    close(layer(x), plain / np.sort(probabilities)[:, -2:].sum(axis=-1, keepdims=True))


def test_ernie_chooses_experts_by_probability_plus_bias_and_weighs_them_by_probability():
    settings = SIZES | {"max_position_embeddings": 64, "rope_theta": 1e4, "use_bias": False, "moe_k": 1}
    settings |= {"tie_word_embeddings": True, "moe_num_experts": 4, "moe_intermediate_size": 32}
    net = ernie4_5_moe.Model(ernie4_5_moe.ModelArgs(model_type="ernie4_5_moe", **settings))
    config = {"model_type": "ernie4_5_moe"}
    mends.complete(net, config)
    mends.install(net, config)
    layer, x = net.model.layers[0].mlp, mx.random.normal((3, 64))
    layer.selection_bias = mx.array([0.0, 0.0, 2.0, 0.0])
    close(layer(x), layer.switch_mlp(x, mx.full((3, 1), 2))[:, 0])


def test_arcee_has_two_layers_and_a_squared_relu_in_its_mlp():
    net = llama.Model(llama.ModelArgs(model_type="arcee", **SIZES))
    mends.complete(net, {"model_type": "arcee"})
    layer, x = net.layers[0].mlp, mx.random.normal((3, 64))
    close(layer(x), layer.down_proj(mx.square(mx.maximum(layer.up_proj(x), 0))))
    assert "gate_proj" not in layer


def test_olmo_has_norms_without_weights():
    net = llama.Model(llama.ModelArgs(model_type="olmo", **SIZES))
    mends.complete(net, {"model_type": "olmo"})
    x = mx.random.normal((3, 64))
    wanted = (x - x.mean(axis=-1, keepdims=True)) / mx.sqrt(x.var(axis=-1, keepdims=True) + 1e-5)
    for norm in (net.layers[0].input_layernorm, net.layers[0].post_attention_layernorm, net.model.norm):
        close(norm(x), wanted)
        assert not norm.parameters()


def test_minicpm3_divides_before_a_tied_head():
    settings = SIZES | {"dim_model_base": 16, "q_lora_rank": 8, "kv_lora_rank": 8, "qk_nope_head_dim": 8}
    settings |= {"qk_rope_head_dim": 8, "scale_depth": 1.4, "scale_emb": 2.0, "tie_word_embeddings": True}
    settings |= {
        "max_position_embeddings": 64,
        "rope_scaling": LONG | {"short_factor": 1.0, "long_factor": 1.0},
    }
    net = minicpm3.Model(minicpm3.ModelArgs(model_type="minicpm3", **settings))
    ids = mx.array([[3, 1, 4]])
    config = {"model_type": "minicpm3", "tie_word_embeddings": True}
    mends.install(net, config)
    close(net(ids), net.model.embed_tokens.as_linear(net.model(ids)) / 4)
    assert net.layers[0].self_attn.q_a_layernorm.eps == 1e-6


def test_nanochat_has_the_epsilon_of_its_settings():
    net = nanochat.Model(nanochat.ModelArgs(hidden_size=16, num_hidden_layers=1, num_attention_heads=2))
    x = mx.full((1, 1, 16), 1e-3)
    mends.install(net, {"model_type": "nanochat", "rms_norm_eps": 1.0})
    net.transformer.wte = lambda ids: x
    net.transformer.h = [lambda x, mask, cache: x]
    close(net.transformer(mx.array([[0]])), x)


def test_a_model_without_a_fault_keeps_its_classes():
    net = phi3.Model(phi3.ModelArgs(model_type="phi3", **SIZES))
    before = [type(module) for module in net.modules()]
    mends.install(net, {"model_type": "phi3", "rope_scaling": None})
    assert [type(module) for module in net.modules()] == before
