"""Families that compute something else are refused by name; the page of models shows each."""

from __future__ import annotations

import json

import pytest
from parity import families as compared
from parity import family_table

import tiny
from tunesmith.errors import ModelError
from tunesmith.model import families, loading


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
