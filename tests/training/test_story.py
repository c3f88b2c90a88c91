"""What is said of a model before it is trained."""

from __future__ import annotations

import json

import pytest

import tiny
from tunesmith.runs.config import RunConfig
from tunesmith.training import story


@pytest.mark.parametrize(("kind", "warned"), [("llama", False), ("xverse", True)])
def test_a_family_that_was_not_compared_is_warned_of_by_name(kind, warned, tmp_path):
    tiny.write_model(tmp_path, 64)
    config = json.loads((tmp_path / "config.json").read_text()) | {"model_type": kind}
    (tmp_path / "config.json").write_text(json.dumps(config))
    notices = []
    story.open_model(RunConfig(model={"path": str(tmp_path)}, data={"train": "x.jsonl"}), [], notices.append)
    texts = [notice.what for notice in notices if "compared" in notice.what]
    assert [kind in text for text in texts] == [True] * warned
