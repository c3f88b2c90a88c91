"""A GGUF file of each architecture computes what mlx-lm's class computes from the same weights; keys and
tensors that are missing or unknown are named."""

from __future__ import annotations

import importlib
import json
import random
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFValueType, quants
from gguf.gguf_writer import GGUFValue
from mlx.utils import tree_flatten

import gguf_files
from tunesmith.errors import ModelError
from tunesmith.model import kernels, layouts, loading
from tunesmith.model.gguf import conversion
from tunesmith.model.gguf.architectures import ARCHITECTURES, REQUIRED
from tunesmith.model.gguf.weights import TENSOR_TYPES

IDS = mx.array([[5, 77, 130, 9, 262, 33, 71, 12, 201, 4, 90, 17, 55, 6, 300, 41, 8, 111, 23, 2]])
SIZES: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-5,
    "vocab_size": 320,
    "max_position_embeddings": 64,
    "rope_theta": 50_000.0,
    "tie_word_embeddings": False,
}
HEADS = {"head_dim": 32}
YARN = {"rope_type": "yarn", "type": "yarn", "factor": 4.0, "original_max_position_embeddings": 8}
EXPERTS = {"num_experts_per_tok": 2}
GRANITE = {
    "attention_multiplier": 0.2,
    "embedding_multiplier": 1.5,
    "residual_multiplier": 0.22,
    "logits_scaling": 3.0,
    "attention_bias": False,
    "mlp_bias": False,
}
GEMMA2 = {
    **HEADS,
    "rope_theta": 10_000.0,
    "query_pre_attn_scalar": 32,
    "attn_logit_softcapping": 50.0,
    "final_logit_softcapping": 30.0,
    "sliding_window": 64,
}
GPT_OSS = {
    **HEADS,
    **EXPERTS,
    "intermediate_size": 64,
    "num_local_experts": 4,
    "sliding_window": 8,
    "layer_types": ["sliding_attention", "full_attention"] * 3,
    "rope_scaling": YARN | {"beta_fast": 32.0, "beta_slow": 1.0, "truncate": False},
}
LONGROPE = {
    "rope_type": "longrope",
    "type": "longrope",
    "short_factor": [1.0, 1.25, 1.5, 1.75],
    "long_factor": [1.0, 2.0, 3.0, 4.0],
}
MINISTRAL = {
    "rope_scaling": None,
    "rope_parameters": {
        **YARN,
        "rope_theta": 50_000.0,
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
        "llama_4_scaling_beta": 0.1,
    },
}
MODELS: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "llama"},
    "llama, linear": {
        "model_type": "llama",
        "rope_scaling": {"rope_type": "linear", "type": "linear", "factor": 4.0},
    },
    "qwen2, yarn": {"model_type": "qwen2", "rope_scaling": YARN},
    "qwen3": {"model_type": "qwen3", **HEADS},
    "qwen3moe": {
        "model_type": "qwen3_moe",
        **HEADS,
        **EXPERTS,
        "num_experts": 4,
        "moe_intermediate_size": 32,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "norm_topk_prob": True,
    },
    "gemma2": {"model_type": "gemma2", **GEMMA2},
    "gemma3": {
        "model_type": "gemma3_text",
        **HEADS,
        "query_pre_attn_scalar": 32,
        "sliding_window": 8,
        "rope_scaling": {"rope_type": "linear", "factor": 8.0},
    },
    "phi3": {"model_type": "phi3"},
    "phi3, longrope": {
        "model_type": "phi3",
        "partial_rotary_factor": 0.5,
        "original_max_position_embeddings": 16,
        "rope_scaling": LONGROPE,
    },
    "granite": {"model_type": "granite", **GRANITE},
    "gpt-oss": {"model_type": "gpt_oss", **GPT_OSS},
    "mistral3": {"model_type": "ministral3", **HEADS, **MINISTRAL},
    "mistral3 without yarn": {"model_type": "mistral", **HEADS},
}
TIED = ("gemma2", "gemma3_text")


@pytest.fixture(autouse=True)
def _cache(tmp_path, monkeypatch):
    kernels.missing()  # compiled before, in the cache of all tests
    monkeypatch.setenv("TUNESMITH_CACHE", str(tmp_path / "cache"))


def random_weights(config: dict[str, Any]) -> dict[str, np.ndarray]:
    """By mlx-lm's names. Norms near 1, or near 0 where the model adds 1."""
    kind = {"mistral": "llama"}.get(config["model_type"], config["model_type"])
    module = importlib.import_module(f"mlx_lm.models.{kind}")
    net: nn.Module = module.Model(module.ModelArgs.from_dict(layouts.translate(config)))
    generator = np.random.Generator(np.random.PCG64(7))
    weights = {}
    for name, value in tree_flatten(net.parameters()):
        assert isinstance(value, mx.array)
        scale = 0.1 if value.ndim == 1 or name.endswith("bias") else value.shape[-1] ** -0.5
        centre = 0.0 if config["model_type"] in TIED or not name.endswith("norm.weight") else 1.0
        weights[name] = (centre + scale * generator.normal(size=value.shape)).astype(np.float32)
    if config["model_type"] in TIED:
        weights.pop("lm_head.weight", None)
    return weights


def expected_logits(folder: Path, config: dict[str, Any], weights: dict[str, np.ndarray]) -> np.ndarray:
    """Of the same weights, loaded from a folder in mlx-lm's layout."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    mx.save_safetensors(
        str(folder / "model.safetensors"), {name: mx.array(value) for name, value in weights.items()}
    )
    return logits(folder)


def logits(path: Path) -> np.ndarray:
    return np.array(loading.load(loading.ModelSpec(path=str(path), dtype="float32")).net(IDS))


@pytest.mark.parametrize("name", MODELS)
def test_a_file_of_each_architecture_computes_what_its_weights_compute(tmp_path, name):
    config = SIZES | MODELS[name]
    weights = random_weights(config)
    path = gguf_files.write(tmp_path / "m.gguf", config, weights, gguf_files.alphabet())
    expected = expected_logits(tmp_path / "mlx", config, weights)
    given = logits(path)
    assert np.abs(given - expected).max() <= 1e-5 * np.abs(expected).max()


@pytest.mark.parametrize("kind", ["F16", "Q8_0", "Q4_0"])
@pytest.mark.parametrize("name", ["qwen3moe", "gemma3", "gpt-oss", "mistral3"])
def test_quantised_matrices_are_dequantised_exactly(tmp_path, name, kind):
    config = SIZES | MODELS[name]
    weights = random_weights(config)
    path = gguf_files.write(tmp_path / "m.gguf", config, weights, gguf_files.alphabet(), kind)
    rounded = {
        key: gguf_files.quantised(value, kind) if value.ndim > 1 and "bias" not in key else value
        for key, value in weights.items()
    }
    expected = expected_logits(tmp_path / "mlx", config, rounded)
    assert np.abs(logits(path) - expected).max() <= 1e-5 * np.abs(expected).max()


def test_mxfp4_experts_keep_their_bits(tmp_path):
    config = SIZES | MODELS["gpt-oss"]
    weights = random_weights(config)
    path = gguf_files.write(tmp_path / "m.gguf", config, weights, gguf_files.alphabet(), "MXFP4")
    rounded = {
        key: gguf_files.quantised(value, "MXFP4") if "experts" in key and value.ndim == 3 else value
        for key, value in weights.items()
    }
    expected = expected_logits(tmp_path / "mlx", config, rounded)
    assert np.abs(logits(path) - expected).max() <= 1e-5 * np.abs(expected).max()
    folder = loading.resolve(str(path), dtype="float32")
    stored = mx.load(str(folder / "model.safetensors"))
    layer = "model.layers.0.mlp.experts"
    assert isinstance(stored, dict)
    blocks, scales = stored[f"{layer}.down_proj_blocks"], stored[f"{layer}.down_proj_scales"]
    assert blocks.dtype == scales.dtype == mx.uint8 and blocks.shape == (4, 64, 2, 16)
    values = mx.dequantize(
        blocks.view(mx.uint32).flatten(-2), scales, group_size=32, bits=4, mode="mxfp4", dtype=mx.float32
    )
    np.testing.assert_array_equal(np.array(values), rounded[f"{layer}.down_proj.weight"])


def refused(tmp_path: Path, name: str, change: gguf_files.Change) -> str:
    config = SIZES | MODELS[name]
    path = gguf_files.write(
        tmp_path / "m.gguf", config, random_weights(config), gguf_files.alphabet(), change=change
    )
    with pytest.raises(ModelError) as caught:
        conversion.convert(path, "float32")
    assert str(caught.value).startswith(str(path)) and caught.value.hint
    return str(caught.value)


@pytest.mark.parametrize("name", [name for name in MODELS if name in ARCHITECTURES])
def test_every_key_that_an_architecture_needs_is_missed_by_name(tmp_path, name):
    needed = [f"{name}.{key}" for key in (*REQUIRED, *ARCHITECTURES[name].keys)]

    def change(writer, tensors):
        for key in needed:
            del writer.kv_data[0][key]

    text = refused(tmp_path, name, change)
    assert [key for key in needed if f"{key} is missing" not in text] == []


@pytest.mark.parametrize("name", [name for name in MODELS if name in ARCHITECTURES])
def test_every_kind_of_tensor_is_missed_by_name_and_every_other_is_unknown(tmp_path, name):
    gone: list[str] = []

    def change(writer, tensors):
        gone.extend([*(name for name in tensors if name.startswith("blk.5.")), "output_norm.weight"][-14:])
        for tensor in gone:
            del tensors[tensor]
        tensors["blk.6.attn_norm.weight"] = np.ones(64, np.float32)
        tensors["blk.0.ssm_a.weight"] = np.ones(64, np.float32)

    text = refused(tmp_path, name, change)
    assert [tensor for tensor in gone if f"tensor {tensor} is missing" not in text] == []
    assert "tensor blk.6.attn_norm.weight is not understood" in text
    assert "tensor blk.0.ssm_a.weight is not understood" in text


def drop(*keys: str) -> gguf_files.Change:
    def change(writer, tensors):
        for key in keys:
            del writer.kv_data[0][key]

    return change


def value(method: str, number: float) -> gguf_files.Change:
    """Write the key anew, by the writer's method."""

    def change(writer, tensors):
        written = dict(writer.kv_data[0])
        writer.kv_data[0].clear()
        getattr(writer, method)(number)
        writer.kv_data[0] = written | writer.kv_data[0]

    return change


def head(writer: Any, tensors: dict[str, np.ndarray]) -> None:
    tensors["output.weight"] = tensors["token_embd.weight"]


def headless(writer: Any, tensors: dict[str, np.ndarray]) -> None:
    del tensors["output.weight"]


def uneven_experts(writer: Any, tensors: dict[str, np.ndarray]) -> None:
    tensors["blk.0.ffn_up_exps.weight"] = tensors["blk.0.ffn_up_exps.weight"][:, :32]


def no_number(writer: Any, tensors: dict[str, np.ndarray]) -> None:
    writer.kv_data[0]["granite.logit_scale"] = GGUFValue(value="x", type=GGUFValueType.STRING)


def no_tokens(writer: Any, tensors: dict[str, np.ndarray]) -> None:
    writer.kv_data[0]["tokenizer.ggml.tokens"] = GGUFValue(value=5, type=GGUFValueType.UINT32)


def flat_experts(writer: Any, tensors: dict[str, np.ndarray]) -> None:
    tensors["blk.0.ffn_up_exps.weight"] = tensors["blk.0.ffn_up_exps.weight"][0]


@pytest.mark.parametrize(
    ("name", "change", "words"),
    [
        ("gemma2", head, "tensor output.weight is not understood"),
        ("gpt-oss", headless, "tensor output.weight is missing"),
        ("gpt-oss", uneven_experts, "blk.0.ffn_gate_exps.weight and blk.0.ffn_up_exps.weight differ"),
        ("gemma3", value("add_final_logit_softcapping", 30.0), "gemma3.final_logit_softcapping = 30.0"),
        ("qwen3", value("add_sliding_window", 8), "qwen3.attention.sliding_window = 8"),
        (
            "phi3, longrope",
            value("add_rope_scaling_attn_factors", 1.5),
            "phi3.rope.scaling.attn_factor is 1.5",
        ),
        ("granite", value("add_rope_scaling_finetuned", False), "granite.rope.scaling.finetuned = False"),
        ("mistral3", drop("mistral3.attention.temperature_scale"), "temperature_scale is missing"),
        (
            "mistral3",
            drop("mistral3.rope.scaling.original_context_length"),
            "mistral3.rope.scaling.original_context_length is missing",
        ),
        ("mistral3", value("add_rope_scaling_yarn_log_mul", 0.5), "yarn_log_multiplier = 0.5 is not"),
        ("mistral3", value("add_attn_temperature_length", 16), "temperature_length = 16 is not understood"),
        ("qwen3", value("add_rope_dimension_count", 8), "qwen3.rope.dimension_count is 8, a head has 32"),
        ("qwen2, yarn", value("add_rope_scaling_yarn_attn_factor", 1.2), "yarn_attn_factor = 1.2"),
        ("llama", value("add_rope_scaling_factor", 2.0), "llama.rope.scaling.factor = 2.0"),
        ("llama", lambda writer, tensors: writer.add_uint16("split.count", 3), "is one of 3 parts"),
        ("llama", value("add_block_count", 1 << 30), "llama.block_count is 1073741824, the file has"),
        ("llama", value("add_head_count", 0), "llama.attention.head_count = 0 is not a whole number from 1"),
        ("llama", value("add_key_length", 31), "a head has 31 dimensions, an even number expected"),
        ("gemma2", value("add_layer_norm_rms_eps", float("nan")), "epsilon = nan is not a number from 0"),
        ("qwen3moe", flat_experts, "tensor blk.0.ffn_up_exps.weight has 2 dimensions, 3 expected"),
        ("llama", no_tokens, "has values in its header that cannot be used"),
        ("granite", no_number, "granite.logit_scale = 'x' is not a number from 0"),
    ],
)
def test_what_the_model_type_does_not_have_is_refused_by_name(tmp_path, name, change, words):
    assert words in refused(tmp_path, name, change)


def test_the_types_that_can_be_read_are_those_that_the_gguf_package_dequantises():
    read = set()
    for kind in GGMLQuantizationType:
        size = {"F32": 4, "F16": 2}.get(kind.name) or GGML_QUANT_SIZES[kind][1]
        try:
            quants.dequantize(np.zeros((1, size), np.uint8), kind)
            read.add(kind.name)
        except NotImplementedError:
            pass
    assert read == TENSOR_TYPES


@pytest.mark.parametrize(
    ("name", "keys", "values"),
    [
        ("gemma3", ("attention.sliding_window_pattern", "rope.freq_base_swa"), {}),
        ("llama", ("attention.head_count_kv",), {"num_key_value_heads": 4}),
        ("phi3", ("rope.dimension_count", "rope.scaling.original_context_length"), {}),
        (
            "granite",
            ("attention.scale", "embedding_scale", "residual_scale"),
            {"attention_multiplier": 0.25, "embedding_multiplier": 1.0, "residual_multiplier": 1.0},
        ),
    ],
)
def test_a_key_that_may_be_missing_has_the_value_of_llama_cpp(tmp_path, name, keys, values):
    config = SIZES | MODELS[name] | values
    weights = random_weights(config)
    change = drop(*(f"{name}.{key}" for key in keys))
    path = gguf_files.write(tmp_path / "m.gguf", config, weights, gguf_files.alphabet(), change=change)
    expected = expected_logits(tmp_path / "mlx", config, weights)
    assert np.abs(logits(path) - expected).max() <= 1e-5 * np.abs(expected).max()


@pytest.mark.parametrize(("name", "layers"), [("gemma2", 46), ("gemma3", 62)])
def test_queries_of_gemma_27b_are_scaled_by_the_width_over_the_heads(tmp_path, name, layers):
    config = SIZES | MODELS[name]

    def read(count: int) -> Any:
        size = config | {"num_hidden_layers": count}
        path = tmp_path / f"{count}.gguf"
        gguf_files.write(path, size, random_weights(size), gguf_files.alphabet())
        folder = conversion.convert(path, "float32")
        return json.loads((folder / "config.json").read_text())["query_pre_attn_scalar"]

    assert (read(2), read(layers)) == (32, 16)


def test_yarn_of_gpt_oss_is_not_rounded(tmp_path):
    config = SIZES | MODELS["gpt-oss"]
    path = gguf_files.write(tmp_path / "m.gguf", config, random_weights(config), gguf_files.alphabet())
    read = json.loads((conversion.convert(path, "float32") / "config.json").read_text())
    assert read["rope_scaling"] == config["rope_scaling"] and read["layer_types"] == config["layer_types"]


def test_any_value_of_any_key_is_read_or_refused(tmp_path):
    """Every key of a header under some values that it cannot have: an error at most, never another one."""
    values: list[tuple[Any, GGUFValueType]] = [
        (0, GGUFValueType.UINT32),
        (-3, GGUFValueType.INT32),
        (1 << 31, GGUFValueType.UINT32),
        (float("nan"), GGUFValueType.FLOAT32),
        ("x", GGUFValueType.STRING),
        ([1, 2], GGUFValueType.ARRAY),
    ]
    source = random.Random(3)
    refusals = 0
    for name in ("llama", "gemma3", "phi3, longrope", "gpt-oss", "mistral3"):
        config = SIZES | MODELS[name] | {"num_hidden_layers": 2}
        if "layer_types" in config:
            config["layer_types"] = config["layer_types"][:2]
        tensors = random_weights(config)
        for number in range(25):

            def change(writer, tensors):
                key = source.choice(list(writer.kv_data[0]))
                spoiled, kind = source.choice(values)
                inner = GGUFValueType.INT32 if kind == GGUFValueType.ARRAY else None
                writer.kv_data[0][key] = GGUFValue(value=spoiled, type=kind, sub_type=inner)

            path = tmp_path / f"{number}.gguf"
            gguf_files.write(path, config, tensors, gguf_files.alphabet(), change=change)
            try:
                conversion.convert(path, "float32")
            except ModelError as error:
                refusals += 1
                assert error.where == str(path) and error.hint
    assert refusals > 60


def test_a_large_rotary_base_is_read(tmp_path):
    config = SIZES | MODELS["llama"] | {"rope_theta": 3.6e9}
    path = gguf_files.write(tmp_path / "m.gguf", config, random_weights(config), gguf_files.alphabet())
    read = json.loads((conversion.convert(path, "float32") / "config.json").read_text())
    assert read["rope_theta"] == pytest.approx(3.6e9)
