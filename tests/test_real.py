"""The demonstration itself: SmolLM2-135M from the package registry learns tool calls, and every promise is measured."""

from __future__ import annotations

import importlib
import json
import os
from pathlib import Path

import pytest

import tunesmith
from tunesmith import demo
from tunesmith.run import Run

pytestmark = pytest.mark.real


@pytest.fixture(scope="module")
def shown(tmp_path_factory) -> dict:
    return demo.demo(tmp_path_factory.mktemp("demo"))


def test_the_demo_halves_the_loss_and_learns_the_calls(shown):
    assert shown["val_loss_after"] < shown["val_loss_before"] / 2
    assert shown["tool_calls_before"] < 0.1 and shown["tool_calls_after"] > 0.6
    report = Path(shown["report"])
    assert "tool_calls" in report.read_text() and (report.parent / "curves.png").stat().st_size > 10_000


def test_mlx_lm_reads_the_checkpoint_as_it_is(shown):
    """The same greedy answer through mlx-lm's own loading."""
    run = Run.open(Path(shown["report"]).parent)
    prompt = json.loads((run.path / "evals" / "tool_calls@1" / "examples.jsonl").read_text().splitlines()[0])
    assert prompt["tuned"] in (0.0, 1.0)
    question = "Call Grace at 4 pm."
    (ours,) = tunesmith.generate(run.path, [question], max_tokens=40)
    from tunesmith import model

    mlx_lm = importlib.import_module("mlx_lm")
    folder = model.resolve(run.config.model.path, dtype="auto")
    net, tokenizer = mlx_lm.load(str(folder), adapter_path=str(run.choose("best")))
    ids = tokenizer.apply_chat_template([{"role": "user", "content": question}], add_generation_prompt=True)
    assert mlx_lm.generate(net, tokenizer, ids, max_tokens=40).strip() == ours.strip()


def test_a_demo_model_already_there_is_not_fetched_again(shown, monkeypatch):
    folder = Path(shown["report"]).parents[2] / "model"
    before = {path: os.stat(path).st_mtime_ns for path in folder.iterdir()}
    monkeypatch.setattr(demo.subprocess, "run", None)
    assert demo.fetch_model(folder).suffix == ".gguf"
    assert before == {path: os.stat(path).st_mtime_ns for path in folder.iterdir()} and len(before) == 1
