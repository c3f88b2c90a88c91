"""Families that compute something else are refused by name; those without their window have a longest row."""

from __future__ import annotations

import json

import pytest
from parity import families as compared
from parity import family_table

import tiny
from tunesmith.errors import ModelError
from tunesmith.model import families, loading, vocabulary

QWEN = {
    "model_type": "qwen2",
    "sliding_window": 4096,
    "max_position_embeddings": 32768,
    "num_hidden_layers": 4,
}


def test_a_refused_family_is_named_with_the_reason_before_its_weights_are_read(tmp_path):
    tiny.write_model(tmp_path, 64)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"model_type": "olmo"}))
    with pytest.raises(ModelError, match=r"of type olmo are refused: .*ai2-olmo"):
        loading.load(loading.ModelSpec(path=str(tmp_path)))


def test_a_family_that_is_neither_proven_nor_refused_is_named():
    assert families.doubt({"model_type": "llama"}) is None
    assert families.doubt({"model_type": "olmo"}) is None
    assert "type bitnet have not been compared" in str(families.doubt({"model_type": "bitnet"}))


def test_no_family_is_both_proven_and_refused():
    assert not families.PROVEN & families.REFUSED.keys()
    assert len(families.PROVEN) >= 60


@pytest.mark.parametrize(
    ("settings", "length"),
    [
        ({"use_sliding_window": False}, None),
        ({"use_sliding_window": True, "max_window_layers": 4}, None),
        ({"use_sliding_window": True, "max_window_layers": 2}, 4096),
        ({"layer_types": ["full_attention"] * 4}, None),
        ({"layer_types": ["full_attention", "sliding_attention"] * 2}, 4096),
        ({"use_sliding_window": True, "max_position_embeddings": 2048}, None),
        ({"use_sliding_window": True, "sliding_window": None}, None),
        ({"model_type": "gemma2"}, 4096),
        ({"model_type": "gemma3_text"}, None),
        ({"model_type": "mistral3", "text_config": {"sliding_window": 1024}}, 1024),
    ],
)
def test_the_window_is_the_longest_row_where_mlx_lm_ignores_it(settings, length):
    assert families.exact_length({**QWEN, **settings}) == length


def test_experts_of_qwen2_moe_that_are_normalised_are_refused():
    assert families.refusal({"model_type": "qwen2_moe", "norm_topk_prob": False}) is None
    assert "norm_topk_prob" in str(families.refusal({"model_type": "qwen2_moe", "norm_topk_prob": True}))


def test_the_page_of_models_shows_each_family_that_is_compared_and_each_that_is_refused():
    page = family_table.rows(family_table.PAGE.read_text())
    assert list(page) == [family.name for family in compared.FAMILIES]
    assert len(page) >= 80
    exact = {row[1].strip("`") for row in page.values() if row[2].startswith("exact")}
    refused = {row[1].strip("`") for row in page.values() if row[2].startswith("refused")}
    assert exact == families.PROVEN
    assert families.REFUSED.keys() <= refused
    assert not any("wrong" in cell for row in page.values() for cell in row)


def test_sequences_beyond_an_ignored_window_are_errors_with_their_place(tmp_path):
    tiny.write_model(tmp_path, 64, kind="mistral")
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"sliding_window": 8}))
    net = loading.load(loading.ModelSpec(path=str(tmp_path))).net
    vocabulary.require_known(net, [("row", [1] * 8)])
    with pytest.raises(ModelError, match="row: 9 tokens, and the model is computed right for 8"):
        vocabulary.require_known(net, [("row", [1] * 9)])
