"""``doctor --model`` tells a model that is computed as transformers computes it from one that is not."""

from __future__ import annotations

import json

import pytest

import tiny
from tunesmith.model import loading
from tunesmith.preflight import examination

pytestmark = pytest.mark.parity


@pytest.mark.parametrize("first", [None, 2])
def test_a_model_of_transformers_is_proven_and_another_theta_is_found(tmp_path, monkeypatch, first):
    folder = tmp_path / "model"
    folder.mkdir()
    tiny.write_model(folder, tiny.write_tokenizer(folder), layers=4)
    if first is not None:
        monkeypatch.setattr(examination, "COMPARED_BYTES", 0)
    loaded = loading.load(loading.ModelSpec(path=str(folder)))
    good = examination._parity(loaded)
    assert good.problem is None and "worst error" in good.value
    assert ("first 2 layers" in good.value) == (first is not None)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"rope_theta": 500.0}))
    bad = examination._parity(loaded)  # loaded with the theta of before
    assert bad.problem == "fail" and bad.hint is not None
