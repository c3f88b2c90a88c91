"""``loop.best: adherence``: answers to held-out prompts decide the best checkpoint and the early stop."""

from __future__ import annotations

import json
import shutil

import pytest

import tiny
import tunesmith
from tunesmith import events
from tunesmith.errors import ConfigError
from tunesmith.reports.facts import read_log
from tunesmith.reports.summary import summarise
from tunesmith.runs import checkpoints
from tunesmith.runs.directory import Run

SETS = [
    "loop.steps=30",
    "loop.validate_every=3",
    "loop.samples=0",
    "loop.sample_tokens=6",
    "loop.save_every=1",
    "loop.keep_last=99",
    "batch.sequences=4",
    "adapter.rank=2",
    "adapter.targets=all-linear",
    "optimizer.learning_rate=0.03",
    "audit.before_training=false",
]


@pytest.fixture(scope="module")
def runs(tmp_path_factory, tiny_model) -> dict[str, Run]:
    """All rows have one answer, which a large rate soon learns: adherence rises from 0. One run stops by
    adherence, the other by loss."""
    folder = tmp_path_factory.mktemp("adherence")
    answered = [
        [{"role": "user", "content": f"{number} cat"}, {"role": "assistant", "content": "a mat"}]
        for number in range(20)
    ]
    rows = tiny.write_rows(folder / "rows.jsonl", [{"messages": turns} for turns in answered])
    runs: dict[str, Run] = {}
    for name in ("adherence", "loss"):
        sets = [*SETS, f"loop.best={name}", "loop.early_stop=2"]
        settings = tunesmith.configure(model=str(tiny_model), data=[str(rows)], sets=sets)
        tunesmith.train(settings, out=folder / name)
        runs[name] = Run.open(folder / name)
    return runs


def validations(run: Run) -> list[events.Validated]:
    return [event for event in events.read(run.path / "events.jsonl") if isinstance(event, events.Validated)]


def test_the_best_is_the_first_of_the_highest_adherence(runs):
    values = [event.adherence for event in validations(runs["adherence"])]
    best = values.index(max(values))
    assert values[0] < values[best]
    index = json.loads((runs["adherence"].path / "checkpoints" / "index.json").read_text())
    assert (index["metric"], index["best_value"]) == ("validation adherence", values[best])
    assert index["best"] == validations(runs["adherence"])[best].step
    assert len(values) == best + 1 + 2, "it stops after two validations without a new best"


def test_the_loss_decides_otherwise_and_no_prompt_is_answered(runs):
    assert {event.adherence for event in validations(runs["loss"])} == {None}
    assert len(validations(runs["loss"])) != len(validations(runs["adherence"]))


def test_answers_move_no_weight(runs):
    files = [runs[name].checkpoint(3) / "adapters.safetensors" for name in ("adherence", "loss")]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_a_resumed_run_stops_where_it_would_have(runs, tmp_path):
    straight = runs["adherence"]
    died = Run.open(shutil.copytree(straight.path, tmp_path / "died"))
    for step in straight.checkpoints():
        if step > 4:
            shutil.rmtree(died.checkpoint(step))
    died.mark("running")
    tunesmith.train(resume=died.path)
    assert [event.adherence for event in validations(died)] == [
        event.adherence for event in validations(straight)
    ]
    last = [checkpoints.choose(run, "last") / "adapters.safetensors" for run in (died, straight)]
    assert last[0].read_bytes() == last[1].read_bytes()


def test_the_report_has_the_course_and_the_cost(runs):
    run = runs["adherence"]
    summary = summarise(run.path, read_log(run.path))
    assert summary.facts.time.scoring_s > 0
    tunesmith.report(run.path)
    assert "Adherence to the references" in (run.path / "report.html").read_text()
    text = (run.path / "report.md").read_text()
    assert "best so far | adherence" in text and "answers scored at validations" in text


@pytest.mark.parametrize(
    "sets",
    [
        ["loop.best=adherence", "data.valid=0"],
        ["loop.best=adherence", "loop.adherence_prompts=0"],
        ["loop.adherence_prompts=4", "data.valid=0"],
    ],
)
def test_adherence_needs_held_out_prompts(tiny_model, sets):
    with pytest.raises(ConfigError):
        tunesmith.configure(model=str(tiny_model), data=["rows.jsonl"], sets=sets)
