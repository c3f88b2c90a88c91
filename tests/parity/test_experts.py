"""LoRA on routed experts equals PEFT's ``target_parameters`` over transformers on torch: logits, and the
gradients of every adapter tensor, to 1e-5.

transformers holds gate and up as one parameter, whose update has one A for both: here each of the two has
that A, and the sum of their gradients is PEFT's."""

from __future__ import annotations

import importlib
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from adapters.mixtures import FAMILIES, HOLDERS, SIZES
from mlx.utils import tree_flatten

from tunesmith import adapters

pytestmark = [pytest.mark.parity, pytest.mark.filterwarnings("ignore")]

RANK, ALPHA = 3, 6.0
IDS = np.array([[1, 5, 9, 33, 2, 8], [7, 7, 3, 60, 21, 4]])
LONG = (np.arange(80).reshape(2, 40) * 37 + 11) % 64
DEEPSEEK = {
    "intermediate_size": 64,
    "moe_intermediate_size": 96,
    "n_shared_experts": 1,
    "n_routed_experts": 4,
    "routed_scaling_factor": 1.5,
    "kv_lora_rank": 16,
    "q_lora_rank": None,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 16,
    "v_head_dim": 16,
    "topk_method": "greedy",
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 0,
    "num_key_value_heads": 2,
}
SETTINGS = {family: {**SIZES, **settings} for family, settings in FAMILIES.items()}
SETTINGS["deepseek_v2"] = {**SIZES, **DEEPSEEK}
UNSCALED = {"deepseek_v2": {"rope_scaling": {"factor": 1.0}}}
"""What mlx-lm's model needs, beside `SETTINGS`, to leave rotary embeddings unscaled."""


def halves(family: str, value: np.ndarray, axis: int) -> tuple[np.ndarray, np.ndarray]:
    """Gate and up of what transformers holds as one."""
    width = value.shape[axis]
    places = np.arange(width).reshape(-1, 2).T if family == "gpt_oss" else np.arange(width).reshape(2, -1)
    return np.take(value, places[0], axis), np.take(value, places[1], axis)


def ours(family: str, name: str) -> str:
    """The name that mlx-lm's model has for a module of experts, or for a tensor outside of them."""
    holder = HOLDERS.get(family, "mlp.switch_mlp")
    name = name.replace("mlp.experts", holder)
    return name.replace(".mlp.gate.", f".{holder.split('.')[0]}.gate.")


def torch_model(family: str) -> Any:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    rotary = {"rope_parameters": {"rope_type": "default", "rope_theta": SIZES["rope_theta"]}}
    settings = {key: value for key, value in SETTINGS[family].items() if key != "rope_theta"}
    config = AutoConfig.for_model(family, **settings, **rotary, attn_implementation="eager")
    model = AutoModelForCausalLM.from_config(config).float().eval()
    random = np.random.Generator(np.random.PCG64(4))
    with torch.no_grad():
        for name, value in sorted(model.named_parameters()):
            drawn = random.normal(0, 0.3, tuple(value.shape)).astype(np.float32)
            value.copy_(torch.from_numpy(drawn + (value.ndim == 1 and "norm" in name)))
    return model


def mlx_model(family: str, model: Any) -> Any:
    """mlx-lm's model with the weights of ``model``."""
    module = importlib.import_module(f"mlx_lm.models.{family}")
    settings = {"model_type": family, **SETTINGS[family], **UNSCALED.get(family, {})}
    net = module.Model(module.ModelArgs.from_dict(settings))
    weights: dict[str, np.ndarray] = {}
    for name, value in model.state_dict().items():
        array, parts = value.numpy(), name.split(".")
        if "experts" not in parts:
            weights[ours(family, name)] = array
            continue
        prefix = ours(family, ".".join(parts[:-1]))
        last = parts[-1].removesuffix("_bias")
        kind = "bias" if parts[-1].endswith("_bias") else "weight"
        if family == "gpt_oss" and kind == "weight":
            array = array.swapaxes(1, 2)
        if last == "down_proj":
            weights[f"{prefix}.down_proj.{kind}"] = array
        else:
            gate, up = halves(family, array, 1)
            weights |= {f"{prefix}.gate_proj.{kind}": gate, f"{prefix}.up_proj.{kind}": up}
    net.load_weights([(name, mx.array(np.ascontiguousarray(value))) for name, value in weights.items()])
    return net.eval()


def adapted(family: str) -> tuple[Any, dict[str, Any]]:
    """The model with PEFT's adapter, moved off its start; its expert layers by our name of their module and
    their parameter."""
    import peft
    import torch
    from peft.tuners.lora.layer import ParamWrapper

    settings = peft.LoraConfig(
        r=RANK,
        lora_alpha=ALPHA,
        target_modules=[],
        target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
    )
    model = torch_model(family)
    plain = mlx_model(family, model)
    wrapped = peft.get_peft_model(model, settings)
    layers: dict[str, Any] = {}
    random = np.random.Generator(np.random.PCG64(8))
    for name, module in wrapped.named_modules():
        if isinstance(module, ParamWrapper):
            place = name.removeprefix("base_model.model.").removesuffix(".base_layer")
            layers[f"{ours(family, place)}.{module.parameter_name}"] = module
            for part in (module.lora_A["default"], module.lora_B["default"]):
                drawn = random.normal(0, 0.2, tuple(part.weight.shape)).astype(np.float32)
                with torch.no_grad():
                    part.weight.copy_(torch.from_numpy(drawn))
    return (wrapped, plain), layers


def in_our_layout(family: str, layers: dict[str, Any], values: Any) -> dict[str, np.ndarray]:
    """Tensor name → value, of what ``values`` takes from the weight of each part: itself or its gradient."""
    tensors: dict[str, np.ndarray] = {}
    for name, layer in layers.items():
        a, b = (values(part["default"].weight).numpy() for part in (layer.lora_A, layer.lora_B))
        a = a.reshape(layer.num_experts, RANK, -1)
        b = b.reshape(len(b), RANK, layer.num_experts).transpose(2, 0, 1)
        if name.endswith("down_proj"):
            tensors |= {f"{name}.lora_a": a, f"{name}.lora_b": b}
            continue
        for word, half in zip(("gate_proj", "up_proj"), halves(family, b, 1), strict=True):
            place = name.replace("gate_up_proj", word)
            tensors |= {f"{place}.lora_a": a, f"{place}.lora_b": half}
    return tensors


@pytest.mark.parametrize("ids", [IDS, LONG], ids=["unsorted", "sorted"])
@pytest.mark.parametrize("family", SETTINGS)
def test_logits_and_gradients_equal_peft(family, ids):
    import torch

    (wrapped, net), layers = adapted(family)
    assert len(layers) == 4
    holder = HOLDERS.get(family, "mlp.switch_mlp")
    spec = adapters.LoRA(rank=RANK, alpha=ALPHA, targets=(f"{holder}.*",))
    spec.attach(net, 0)
    start = in_our_layout(family, layers, lambda weight: weight.detach())
    assert start.keys() == adapters.trainable(net).keys() and len(start) == 12
    net.load_weights([(name, mx.array(np.ascontiguousarray(value))) for name, value in start.items()], False)

    cotangent = np.random.Generator(np.random.PCG64(6)).normal(size=(*ids.shape, 64)).astype(np.float32)
    expected = wrapped(input_ids=torch.from_numpy(ids)).logits
    (expected * torch.from_numpy(cotangent)).mean().backward()

    def loss(tree):
        net.update(tree)
        logits = net(mx.array(ids))
        return (logits * mx.array(cotangent)).mean(), logits

    (_, logits), tree = mx.value_and_grad(loss)(net.trainable_parameters())
    close(logits, expected.detach().numpy())
    slopes = {name: np.array(value) for name, value in tree_flatten(tree)}
    theirs = in_our_layout(family, layers, lambda weight: weight.grad)
    for name, slope in theirs.items():
        assert np.abs(slope).max() > 0
        if name.endswith("gate_proj.lora_a"):
            close(slopes[name] + slopes[name.replace("gate_proj", "up_proj")], slope)
        elif not name.endswith("up_proj.lora_a"):
            close(slopes[name], slope)


def close(found: Any, expected: np.ndarray) -> None:
    np.testing.assert_allclose(np.array(found), expected, rtol=0, atol=1e-5 * np.abs(expected).max())
