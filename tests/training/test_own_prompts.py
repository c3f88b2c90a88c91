"""``loop.prompts``: the user's own prompts are answered at samples and checkpoints, and shown as a grid."""

from __future__ import annotations

import pytest

import tiny
import tunesmith
from tunesmith import events
from tunesmith.runs import checkpoints
from tunesmith.runs.directory import Run

SETS = [
    "loop.steps=5",
    "loop.sample_every=4",
    "loop.samples=1",
    "loop.sample_tokens=4",
    "loop.save_every=2",
    "loop.keep_best=false",
    "batch.sequences=2",
    "adapter.rank=2",
    "audit.before_training=false",
]


@pytest.fixture(scope="module")
def runs(tmp_path_factory, tiny_model) -> dict[str, Run]:
    """A run with own prompts and one without."""
    folder = tmp_path_factory.mktemp("prompts")
    rows = tiny.write_rows(folder / "rows.jsonl", tiny.conversations(10))
    (folder / "own.txt").write_text("the cat\nmy note about | tools\n")
    runs: dict[str, Run] = {}
    for name, value in (("own", folder / "own.txt"), ("none", "[]")):
        settings = tunesmith.configure(
            model=str(tiny_model), data=[str(rows)], sets=[*SETS, f"loop.prompts={value}"]
        )
        tunesmith.train(settings, out=folder / name)
        runs[name] = Run.open(folder / name)
    (folder / "own.txt").unlink()
    return runs


def sampled(run: Run, own: bool) -> list[tuple[int, str]]:
    log = events.read(run.path / "events.jsonl")
    chosen = [
        event for event in log if isinstance(event, events.Sampled) and (event.reference is None) == own
    ]
    return [(event.step, event.prompt) for event in chosen]


def test_own_prompts_are_answered_at_samples_and_checkpoints(runs):
    prompts = ("the cat", "my note about | tools")
    assert sampled(runs["own"], own=True) == [(step, prompt) for step in (0, 2, 4, 5) for prompt in prompts]
    assert [step for step, _ in sampled(runs["own"], own=False)] == [0, 4, 5]
    assert sampled(runs["own"], own=False) == sampled(runs["none"], own=False)
    assert sampled(runs["none"], own=True) == []


def test_own_prompts_move_no_weight(runs):
    files = [checkpoints.choose(run, "last") / "adapters.safetensors" for run in runs.values()]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_settings_hold_the_texts_so_that_the_file_may_go(runs):
    assert runs["own"].config.loop.prompts == ("the cat", "my note about | tools")


def test_the_report_has_a_grid_of_prompts_and_steps(runs):
    tunesmith.report(runs["own"].path)
    html = (runs["own"].path / "report.html").read_text()
    grid = html[html.index("Own prompts by step") :]
    grid = grid[: grid.index("</table>")]
    assert [f"step {step}</th>" in grid for step in (0, 2, 4, 5)] == [True] * 4
    assert grid.count("<tr>") == 3 and grid.count("<td") == 8 and "the cat" in grid
    text = (runs["own"].path / "report.md").read_text()
    assert "<th>step 2</th>" in text
    tunesmith.report(runs["none"].path)
    assert "Own prompts by step" not in (runs["none"].path / "report.html").read_text()
