"""Settings as transformers 5 writes them give the names that mlx-lm reads; those of transformers 4 stay."""

from __future__ import annotations

import copy
import math

import mlx.core as mx
import numpy as np
import pytest

from tunesmith.model import layouts

PLAIN = {"rope_type": "default", "rope_theta": 500000.0}
LLAMA3 = {
    "factor": 8.0,
    "high_freq_factor": 4.0,
    "low_freq_factor": 1.0,
    "original_max_position_embeddings": 8192,
    "rope_theta": 500000.0,
    "rope_type": "llama3",
}


def config(kind, **settings):
    return {
        "model_type": kind,
        "hidden_size": 64,
        "num_attention_heads": 4,
        "num_hidden_layers": 4,
        **settings,
    }


def test_plain_rotary_settings():
    translated = layouts.translate(config("llama", rope_parameters=PLAIN))
    assert translated["rope_theta"] == 500000.0
    assert translated["rope_scaling"] is None


def test_the_scaling_has_its_type_under_both_names_and_no_base():
    translated = layouts.translate(config("llama", rope_parameters=LLAMA3))
    assert translated["rope_theta"] == 500000.0
    assert translated["rope_scaling"] == {
        "factor": 8.0,
        "high_freq_factor": 4.0,
        "low_freq_factor": 1.0,
        "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
        "type": "llama3",
    }


def test_a_partial_rotation_moves_to_the_top():
    parameters = {"partial_rotary_factor": 0.25, "rope_theta": 10000.0, "rope_type": "default"}
    translated = layouts.translate(config("stablelm", rope_parameters=parameters))
    assert translated["partial_rotary_factor"] == 0.25


def test_settings_without_a_value_are_left_out():
    parameters = {
        "rope_type": "yarn",
        "rope_theta": 1e6,
        "factor": 4.0,
        "beta_fast": None,
        "attention_factor": None,
    }
    scaling = layouts.translate(config("qwen3", rope_parameters=parameters))["rope_scaling"]
    assert scaling == {"rope_type": "yarn", "type": "yarn", "factor": 4.0}


def test_yarns_factor_of_attention_becomes_the_scale_that_gives_it():
    parameters = {"rope_type": "yarn", "rope_theta": 1e6, "factor": 4.0, "attention_factor": 1.3}
    scaling = layouts.translate(config("llama", rope_parameters=parameters))["rope_scaling"]
    assert 0.1 * scaling["mscale"] * math.log(4.0) + 1.0 == pytest.approx(1.3)
    assert scaling["mscale_all_dim"] == 0


def test_gemma_3_has_two_bases_and_a_period():
    parameters = {
        "full_attention": {"factor": 8.0, "rope_theta": 1000000.0, "rope_type": "linear"},
        "sliding_attention": {"rope_theta": 10000.0, "rope_type": "default"},
    }
    types = ["sliding_attention"] * 5 + ["full_attention"] + ["sliding_attention"] * 2
    translated = layouts.translate(config("gemma3_text", rope_parameters=parameters, layer_types=types))
    assert translated["rope_theta"] == 1000000.0
    assert translated["rope_local_base_freq"] == 10000.0
    assert translated["rope_scaling"] == {"factor": 8.0, "rope_type": "linear", "type": "linear"}
    assert translated["sliding_window_pattern"] == 6


def test_layers_without_a_period_are_refused_by_the_name_of_the_setting():
    types = ["sliding_attention", "full_attention", "full_attention", "sliding_attention"]
    with pytest.raises(ValueError, match=r"layer_types: .* cohere2"):
        layouts.translate(config("cohere2", layer_types=types))


def test_exaone_4_has_its_period_in_letters():
    types = ["sliding_attention"] * 3 + ["full_attention"]
    given = config(
        "exaone4", rope_parameters=PLAIN, layer_types=types, sliding_window=4096, sliding_window_pattern=4
    )
    translated = layouts.translate(given)
    assert translated["sliding_window_pattern"] == "LLLG"
    assert translated["head_dim"] == 16


def test_exaone_4_without_a_window_rotates_in_all_layers():
    given = config("exaone4", rope_parameters=PLAIN, layer_types=["full_attention"] * 4, sliding_window=None)
    assert layouts.translate(given)["sliding_window_pattern"] is None


@pytest.mark.parametrize("name", ["num_experts", "num_local_experts", "n_routed_experts"])
def test_the_number_of_experts_has_all_of_its_names(name):
    translated = layouts.translate(config("qwen3_moe", **{name: 8}))
    assert {translated[other] for other in ("num_experts", "num_local_experts", "n_routed_experts")} == {8}


def test_gpt_neox_has_names_of_its_own():
    parameters = {"partial_rotary_factor": 0.25, "rope_theta": 10000, "rope_type": "default"}
    translated = layouts.translate(config("gpt_neox", rope_parameters=parameters))
    assert (translated["rotary_emb_base"], translated["rotary_pct"]) == (10000, 0.25)


def test_minimax_counts_the_dimensions_that_rotate():
    parameters = {"partial_rotary_factor": 0.5, "rope_theta": 5000000.0, "rope_type": "default"}
    assert (
        layouts.translate(config("minimax_m2", head_dim=128, rope_parameters=parameters))["rotary_dim"] == 64
    )


def test_hybrids_have_the_older_names_of_layers():
    types = ["linear_attention", "full_attention"]
    assert layouts.translate(config("granitemoehybrid", layer_types=types))["layer_types"] == [
        "mamba",
        "attention",
    ]


def test_the_text_model_inside_a_wrapper_is_translated():
    text = config("mistral", rope_parameters=PLAIN, vocab_size=131072)
    translated = layouts.translate({"model_type": "mistral3", "text_config": text})
    assert translated["text_config"]["rope_theta"] == 500000.0
    assert translated["vocab_size"] == 131072


def test_the_outer_tie_of_embeddings_counts():
    text = config("mistral", tie_word_embeddings=False)
    translated = layouts.translate(
        {"model_type": "mistral3", "text_config": text, "tie_word_embeddings": True}
    )
    assert translated["text_config"]["tie_word_embeddings"] is True


def test_gemma_4_has_one_size_of_heads_for_the_layers_that_attend_to_all_positions():
    types = ["sliding_attention", "full_attention"] * 2
    sizes = {"1": {"head_dim": 512}, "3": {"head_dim": 512}}
    given = config(
        "gemma4_text", layer_types=types, per_layer_config=sizes, head_dim=256, num_key_value_heads=4
    )
    translated = layouts.translate(given)
    assert (translated["global_head_dim"], translated["num_global_key_value_heads"]) == (512, 4)
    with pytest.raises(ValueError, match="per_layer_config"):
        layouts.translate({**given, "per_layer_config": {"1": {"head_dim": 512}, "3": {"head_dim": 128}}})


def test_jambas_experts_lie_where_transformers_puts_them():
    translated = layouts.translate(config("jamba", expert_layer_period=4, expert_layer_offset=1))
    experts = [n for n in range(8) if (n + translated["expert_layer_offset"]) % 4 == 0]
    assert experts == [1, 5]


def test_settings_in_the_old_layout_stay():
    given = config(
        "llama",
        rope_theta=500000.0,
        rope_scaling={"type": "linear", "factor": 2.0},
        rope_parameters={"rope_theta": 1.0, "rope_type": "default"},
    )
    translated = layouts.translate(given)
    assert translated["rope_theta"] == 500000.0
    assert translated["rope_scaling"] == {"type": "linear", "factor": 2.0}


def test_what_is_given_is_not_changed():
    given = {
        "model_type": "gemma3",
        "text_config": config("gemma3_text", rope_parameters=PLAIN, num_experts=4),
    }
    before = copy.deepcopy(given)
    layouts.translate(given)
    assert given == before


def test_experts_of_gpt_oss_that_are_not_quantised_are_split_and_turned():
    fused = np.arange(2 * 3 * 8, dtype=np.float32).reshape(2, 3, 8)
    prefix = "model.layers.0.mlp.experts."
    weights = {
        f"{prefix}gate_up_proj": mx.array(fused),
        f"{prefix}gate_up_proj_bias": mx.array(fused[:, 0]),
        f"{prefix}down_proj": mx.zeros((2, 4, 3)),
        f"{prefix}down_proj_bias": mx.zeros((2, 3)),
    }
    renamed = layouts.rename({"model_type": "gpt_oss"}, weights)
    np.testing.assert_array_equal(renamed[f"{prefix}gate_proj.weight"], fused[:, :, ::2].transpose(0, 2, 1))
    np.testing.assert_array_equal(renamed[f"{prefix}up_proj.bias"], fused[:, 0, 1::2])
    assert renamed[f"{prefix}down_proj.weight"].shape == (2, 3, 4)
    assert renamed[f"{prefix}down_proj.bias"].shape == (2, 3)


def test_quantised_experts_of_gpt_oss_stay():
    weights = {"model.layers.0.mlp.experts.gate_up_proj_blocks": mx.zeros((2, 8, 1, 16))}
    assert layouts.rename({"model_type": "gpt_oss"}, weights) is weights


@pytest.mark.parametrize("tensors", [["weight"], ["weight", "scales", "biases"]])
def test_falcon_h1_has_its_multipliers_of_keys_and_values_whether_quantised_or_not(tensors):
    prefix = "model.layers.0.self_attn."
    weights = {f"{prefix}{layer}_proj.{tensor}": mx.ones(2) for layer in "qkv" for tensor in tensors}
    settings = {"model_type": "falcon_h1", "key_multiplier": 0.5, "attention_in_multiplier": 0.25}
    renamed = layouts.rename(settings, weights)
    changed = tensors[-1]
    values = [renamed[f"{prefix}{layer}_proj.{changed}"].tolist()[0] for layer in "qkv"]
    assert values == [1.0, 0.5, 0.25]
    if len(tensors) > 1:
        assert renamed[f"{prefix}k_proj.weight"].tolist() == [1.0, 1.0]


@pytest.mark.skipif(mx.default_device().type != mx.DeviceType.cpu, reason="a GPU computes in bfloat16")
def test_norms_to_which_mlx_lm_adds_one_are_float32_before_it_does():
    weights = {"model.norm.weight": mx.array([0.001], mx.bfloat16), "packed": mx.array([7], mx.uint32)}
    renamed = layouts.rename({"model_type": "qwen3_next"}, weights)
    assert (renamed["model.norm.weight"].dtype, renamed["packed"].dtype) == (mx.float32, mx.uint32)
