"""``doctor --model``: what is said of a model is what is so."""

from __future__ import annotations

import json
from pathlib import Path

import mlx.core as mx
import pytest
from model.families import made

import tunesmith
from tunesmith.adapters.layers import adapted
from tunesmith.model.loading import Loaded
from tunesmith.preflight import examination


def findings(name: str, **config: object) -> dict[str, examination.Observation]:
    """What is said of a tiny model of a family that lies nowhere on disk."""
    loaded = Loaded(made(name), Path("/nowhere"), {"model_type": name, "vocab_size": 96, **config}, "", "")
    return {finding.name: finding for finding in examination.examine(loaded)}


def test_a_wrapper_and_a_hybrid_are_described():
    found = findings("qwen3_5", text_config={"model_type": "qwen3_5_text", "rope_parameters": {}})
    assert found["family"].value == (
        "qwen3_5 (of which qwen3_5_text, the text model), 4 blocks; config.json as transformers 5 writes it; "
        "proven against transformers"
    )
    assert "2 q_proj" in found["targets"].value and found["targets"].value.endswith("in 4 of 4 blocks")
    assert found["abilities"].value.startswith(
        "the head is split: yes; answers are batched: yes; rows can be"
    )


def test_what_is_slow_is_a_warning():
    found = findings("mamba")["abilities"]
    assert found.problem == "warn" and found.hint == "answers are generated one by one"
    assert "answers are batched: no" in found.value


def test_a_family_that_was_not_compared_is_a_warning():
    found = findings("llama", model_type="bitnet")["family"]
    assert found.problem == "warn" and "not proven" in found.value and "bitnet" in str(found.hint)


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"rope_theta": 1e4, "torch_dtype": "float32"}, "before 5"),
        ({"rope_parameters": {"rope_theta": 1e4}}, "transformers 5"),
        ({"dtype": "float32"}, "transformers 5"),
        ({"text_config": {"rope_parameters": {}}}, "transformers 5"),
    ],
)
def test_the_layout_of_config_json_is_recognised(config, words):
    assert words in examination.layout(config)


def test_the_model_is_left_as_it_was():
    net = made("llama")
    ids, loaded = mx.array([[1, 2, 3]]), Loaded(net, Path("/nowhere"), {"model_type": "llama"}, "", "")
    before = net(ids)
    examination.examine(loaded)
    assert not adapted(net) and mx.array_equal(net(ids), before)


def test_doctor_lists_all_of_it(tiny_model):
    checks = {
        check["name"]: check for check in tunesmith.doctor(model=str(tiny_model), overfit=False)["checks"]
    }
    assert checks["family"]["value"] == (
        "llama, 2 blocks; config.json as transformers wrote it before 5; proven against transformers"
    )
    assert "not quantised, computed in float32" in checks["weights"]["value"]
    assert checks["targets"]["value"] == "auto adapts 2 q_proj, 2 v_proj: in 2 of 2 blocks"
    assert all(checks[name]["status"] == "ok" for name in ("family", "weights", "targets", "abilities"))


def test_tokens_of_images_are_not_compared_at():
    config = {"vocab_size": 8, "image_token_id": 3, "text_config": {"vocab_size": 8, "pad_token_id": 0}}
    ids = examination._ids(config)
    assert len(ids) == examination.LENGTH and not {0, 3} & set(ids)
    assert json.dumps(ids)
