"""Families that compute something else are refused by name; the page of models shows each."""

from __future__ import annotations

import json

import pytest
from parity import families as compared
from parity import family_table

import tiny
from tunesmith import events
from tunesmith.errors import ModelError
from tunesmith.model import abilities, families, loading


def test_a_refused_family_is_named_with_the_reason_before_its_weights_are_read(tmp_path):
    tiny.write_model(tmp_path, 64)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"model_type": "gemma3n"}))
    with pytest.raises(ModelError, match=r"of type gemma3n are refused: .*keys and values"):
        loading.load(loading.ModelSpec(path=str(tmp_path)))


def test_a_family_that_is_neither_proven_nor_refused_is_named():
    assert families.doubt({"model_type": "llama"}) is None
    assert families.doubt({"model_type": "gemma3n"}) is None
    assert "type bitnet have not been compared" in str(families.doubt({"model_type": "bitnet"}))


def test_no_family_is_both_proven_and_refused():
    assert not families.PROVEN & families.REFUSED.keys()
    assert len(families.PROVEN) >= 60


HF_OLMO = {"model_type": "olmo", "hidden_size": 64}


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        ({"model_type": "olmo", "d_model": 64}, "ai2-olmo"),
        (HF_OLMO | {"clip_qkv": 8.0}, "clip_qkv"),
        (HF_OLMO | {"clip_qkv": None}, None),
        ({"model_type": "nanochat", "final_logit_softcapping": 30.0}, "final_logit_softcapping"),
        ({"model_type": "nanochat"}, None),
        ({"model_type": "qwen2_moe", "norm_topk_prob": True}, None),
    ],
)
def test_settings_that_are_not_computed_are_refused(config, reason):
    refusal = families.refusal(config)
    assert refusal is None if reason is None else reason in str(refusal)


LONG = {"rope_type": "longrope", "short_factor": [1.0, 1.0]}


@pytest.mark.parametrize(
    ("settings", "depends"),
    [
        ({}, False),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, False),
        ({"rope_scaling": LONG | {"long_factor": [1.0, 4.0], "original_max_position_embeddings": 9}}, True),
        ({"rope_scaling": LONG | {"long_factor": [1.0, 1.0]}}, False),
        ({"rope_parameters": {"llama_4_scaling_beta": 0.1}}, True),
        ({"text_config": {"rope_parameters": {"llama_4_scaling_beta": 0.1}}}, True),
    ],
)
def test_scaling_by_the_position_is_seen_in_the_settings(settings, depends):
    assert families.depends_on_positions({"model_type": "x", **settings}) is depends


def test_the_range_of_the_short_factors_is_where_the_settings_have_it():
    long = {"model_type": "phi3", "rope_scaling": LONG | {"long_factor": [1.0, 4.0]}}
    assert families.longrope_range(long | {"original_max_position_embeddings": 4096}) == 4096
    scaling = long["rope_scaling"] | {"original_max_position_embeddings": 8192}
    assert families.longrope_range(long | {"rope_scaling": scaling}) == 8192
    assert families.longrope_range({"model_type": "phi3", "rope_scaling": None}) is None


def test_a_model_that_scales_by_the_position_does_not_pack_its_rows(tmp_path):
    """LongRoPE's factors change at 4096 tokens, which a trial on a few tokens cannot see."""
    tiny.write_model(tmp_path, 64)
    assert abilities.packs(loading.load(loading.ModelSpec(path=str(tmp_path))).net)
    factors = {"short_factor": [1.0] * 8, "long_factor": [4.0] * 8}
    scaling = {"rope_type": "longrope", **factors, "original_max_position_embeddings": 4096}
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"rope_scaling": scaling}))
    heard: list[events.Event] = []
    net = loading.load(loading.ModelSpec(path=str(tmp_path)), heard.append).net
    assert not abilities.packs(net)
    texts = [event.what for event in heard if isinstance(event, events.Notice)]
    assert any("beyond 4,096 tokens" in text for text in texts)


def test_the_page_of_models_shows_each_family_that_is_compared_and_each_that_is_refused():
    text = family_table.PAGE.read_text()
    page = family_table.rows(text)
    assert list(page) == [family.name for family in compared.FAMILIES]
    assert len(page) >= 80
    exact = {row[1].strip("`") for row in page.values() if row[2].startswith("exact")}
    refused = {row[1].strip("`") for row in page.values() if row[2].startswith("refused")}
    assert exact == families.PROVEN
    assert refused <= families.REFUSED.keys()
    assert all(f"`{kind}`" in text for kind in families.REFUSED)
    assert not any("wrong" in cell for row in page.values() for cell in row)
