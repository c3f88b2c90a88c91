"""Quantising at loading: which layers are, which are not and why, and the settings that record it."""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn
import pytest
from adapters import mixtures

import tiny
from tunesmith.errors import ModelError
from tunesmith.model import loading, quantisation


class Layers(nn.Module):
    """Linear layers of these widths; ``first`` has settings of its own."""

    def __init__(self, **widths: int) -> None:
        super().__init__()
        for name, width in widths.items():
            self[name] = nn.Linear(width, 8)

    @property
    def quant_predicate(self):
        own = {"first": {"group_size": 64, "bits": 8}, "excluded": False}
        return lambda name, module: own.get(name, True)


def test_layers_whose_width_the_group_size_does_not_divide_stay_and_are_said():
    net = Layers(wide=128, odd=96, narrow=40, excluded=24)
    settings, notices = quantisation.quantise(net, 4, 64)
    assert settings == {"group_size": 64, "bits": 4, "mode": "affine"}
    kinds = {name: type(module) for name, module in net.children().items()}
    assert kinds == {"wide": nn.QuantizedLinear, "odd": nn.Linear, "narrow": nn.Linear, "excluded": nn.Linear}
    said = notices[1]
    assert said.level == "warning" and said.count == 2 and said.hint is None
    assert said.what == "not quantised: the width of narrow (40), odd (96) is not a multiple of 64"


def test_a_group_size_that_divides_all_widths_is_named():
    _, notices = quantisation.quantise(Layers(wide=128, odd=96), 4, 128)
    assert notices[1].hint == "model.group_size=32"
    assert [notice.where for notice in quantisation.quantise(Layers(wide=128), 4, 128)[1]] == ["model"]


def test_settings_of_the_model_itself_get_a_group_size_that_divides():
    """mlx-lm's mixtures ask for groups of 64 in their routers, whatever the width."""
    for width, group_size in ((96, 32), (128, 64)):
        net = Layers(first=width, wide=128)
        settings, notices = quantisation.quantise(net, 4, 32)
        assert (net["first"].group_size, net["first"].bits) == (group_size, 8) and len(notices) == 1
        assert settings["first"] == {"group_size": group_size, "bits": 8, "mode": "affine"}


def test_a_model_without_a_layer_to_quantise_is_an_error_that_names_them():
    net = Layers(a=72, b=40)
    with pytest.raises(ModelError, match=r"(?s)no layer .*width of a \(72\), b \(40\).*64.*leave out"):
        quantisation.quantise(net, 4, 64)
    assert {type(module) for module in net.children().values()} == {nn.Linear}
    with pytest.raises(ModelError, match=r"model\.group_size=32"):
        quantisation.quantise(Layers(a=96), 4, 64)


def test_what_is_not_quantised_is_said_when_a_model_is_loaded(tmp_path):
    tiny.write_model(tmp_path, tiny.write_tokenizer(tmp_path), hidden=96)
    notices = []
    loading.load(loading.ModelSpec(path=str(tmp_path), quantize=8, group_size=64), notices.append)
    (said,) = [notice for notice in notices if notice.where == "model.group_size"]
    assert said.count == 13 and "model.embed_tokens (96)" in said.what and "more layers" in said.what


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"])
def test_routed_experts_in_half_precision_on_a_cpu_are_an_error_before_training(dtype, family, tmp_path):
    if mx.default_device().type != mx.DeviceType.cpu:
        pytest.skip("MLX has gathered products of half precision on a GPU")
    path = str(mixtures.write(tmp_path, family))
    with pytest.raises(ModelError, match=rf"(?s)routed experts.*not in {dtype}.*model\.dtype=float32"):
        loading.load(loading.ModelSpec(path=path, dtype=dtype))
    net = loading.load(loading.ModelSpec(path=path, dtype=dtype, quantize=4)).net
    assert net(mx.array([[1, 2]])).dtype == mx.float32
