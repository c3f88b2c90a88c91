"""What a run that forgets is called, on the real model; beside `test_real` in a file of its own, so that both
can run at once."""

from __future__ import annotations

import pytest
from real.test_real import tuned

import tunesmith
from tunesmith.demo import __main__ as demo
from tunesmith.demo import data as demo_data

pytestmark = pytest.mark.real


def test_a_run_that_forgets_is_called_by_its_fault(tmp_path):
    run = tuned(
        demo.fetch_model(tmp_path),
        tmp_path,
        demo_data.generate(),
        loop__steps=12,
        optimizer__learning_rate=0.02,
        optimizer__max_norm="null",
    )
    found = tunesmith.evaluate(run, tasks=["drift"], limit=24, checkpoint="last")
    assert found is not None
    told = {(score.task, score.name): score for score in found.scores if score.part is None}
    assert (
        told["drift.text", "likelihood"].verdict == "regressed"
        and told["drift.text", "likelihood"].met is False
    )
    assert told["drift.chat", "kl"].value > 1
    page = (run / "report.md").read_text()
    assert "Do not ship" in page and "likelihood" in page
