"""``data.mix``: rows of other files are trained on as asked, never held out, and counted apart."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from pathlib import Path

import pytest
from training import mixed_rows
from typer.testing import CliRunner

import tiny
import tunesmith
from tunesmith import events
from tunesmith.cli import app
from tunesmith.errors import ConfigError, DataError, ResumeMismatch
from tunesmith.reports.facts import read_log
from tunesmith.reports.summary import summarise
from tunesmith.runs import checkpoints
from tunesmith.runs.directory import Run
from tunesmith.training import preparation


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> dict[str, Path]:
    return mixed_rows.written(tmp_path_factory.mktemp("mix"))


def settings(tiny_model: Path, files: dict[str, Path], mix: str | None, *sets: str):
    chosen = [*mixed_rows.SETS, *sets] + (
        [] if mix is None else [f"data.mix=[{{path: {files['general']}, {mix}}}]"]
    )
    return tunesmith.configure(model=str(tiny_model), data=[str(files["task"])], sets=chosen)


@pytest.fixture(scope="module")
def mixed(tmp_path_factory, tiny_model, files) -> Run:
    out = tmp_path_factory.mktemp("mixed") / "run"
    tunesmith.train(settings(tiny_model, files, "share: 0.5"), out=out)
    return Run.open(out)


def of(run: Run, kind: type) -> list:
    return [event for event in events.read(run.path / "events.jsonl") if isinstance(event, kind)]


def final(run: Run) -> list[bytes]:
    folder = checkpoints.choose(run, "last")
    return [(folder / name).read_bytes() for name in ("adapters.safetensors", "optimizer.safetensors")]


def test_an_epoch_has_each_task_row_once_and_the_share_of_mixed_rows(tiny_model, files):
    prepared = preparation.prepare(settings(tiny_model, files, "share: 0.5").spec)
    alone = preparation.prepare(settings(tiny_model, files, None).spec)
    members = [
        member for step in range(prepared.plan.steps_per_epoch) for member in prepared.plan.members(step)
    ]
    assert sorted(members) == list(range(len(prepared.train)))
    task = [group for group in prepared.train if not group.mixed]
    counts = Counter(group.source for group in prepared.train if group.mixed)
    assert [group.source for group in task] == [group.source for group in alone.train]
    assert counts.total() == len(task) == 16 and set(counts.values()) == {1, 2} and len(counts) == 12
    assert [group.source for group in prepared.valid] == [group.source for group in alone.valid]
    assert all("task.jsonl" in group.source for group in prepared.valid)


def test_rows_are_repeated_as_often_as_asked(tiny_model, files):
    prepared = preparation.prepare(settings(tiny_model, files, "repeat: 3").spec)
    counts = Counter(group.source for group in prepared.train if group.mixed)
    assert len(counts) == 12 and set(counts.values()) == {3}


def test_a_weight_counts_in_the_loss_as_so_many_repeats(tiny_model, files, tmp_path):
    """Whole epochs in one update: three of each row, or each row three times as heavy."""
    found = []
    for name, mix in (("thrice", "repeat: 3"), ("heavy", "repeat: 1, weight: 3")):
        sets = ["batch.sequences=99", "batch.micro=9", "loop.steps=2", "adapter.dropout=0"]
        tunesmith.train(settings(tiny_model, files, mix, *sets), out=tmp_path / name)
        found.append(of(Run.open(tmp_path / name), events.StepDone))
    for thrice, heavy in zip(*found, strict=True):
        for name in ("loss", "task_loss", "mixed_loss", "units", "mixed_units", "gradient_norm"):
            assert getattr(heavy, name) == pytest.approx(getattr(thrice, name), rel=1e-4), name
        assert heavy.learned < thrice.learned == thrice.units


def test_a_weight_is_refused_where_answers_are_compared(tiny_model, files):
    with pytest.raises(ConfigError, match=r"data\.mix: weight is for sft: kto compares answers"):
        settings(tiny_model, files, "repeat: 1, weight: 2", "objective=kto")


def test_counts_and_losses_are_kept_apart(mixed):
    counts = json.loads((mixed.path / "data" / "plan.json").read_text())
    assert counts["rows_train"] == 16 and counts["rows_valid"] == 4 and counts["rows_read"] == 32
    entry = counts["mix"]["general.jsonl"]
    assert (entry["rows"], entry["rows_an_epoch"]) == (12, 16)
    steps = of(mixed, events.StepDone)
    assert sum(step.units for step in steps) == 2 * counts["supervised_tokens"]
    assert sum(step.mixed_units for step in steps) == 2 * entry["supervised_tokens"]
    for step, rows in zip(steps, of(mixed, events.RowLosses), strict=True):
        assert all("task.jsonl" in source for source in rows.losses)
        total = sum(rows.losses[source] * rows.units[source] for source in rows.losses)
        if rows.losses:
            assert step.task_units == sum(rows.units.values())
            assert step.task_loss == pytest.approx(total / step.task_units, rel=1e-4)
    assert {event.rows for event in of(mixed, events.Validated)} == {4}


def test_the_report_says_the_loss_of_mixed_rows(mixed):
    summary = summarise(mixed.path, read_log(mixed.path))
    loss = summary.facts.training_loss
    assert loss is not None and loss.mixed_first is not None and loss.mixed_last is not None
    assert f"of the mixed rows went from {loss.mixed_first:.4f} to {loss.mixed_last:.4f}" in summary.loss
    tunesmith.report(mixed.path)
    assert "training, mixed rows" in (mixed.path / "report.html").read_text()
    assert "general.jsonl.rows_an_epoch" in (mixed.path / "report.md").read_text()
    assert "16 rows an epoch of general.jsonl" in (mixed.path / "model_card.md").read_text()


@pytest.mark.parametrize("step", [0, 4])
def test_a_mixed_run_is_resumed_to_the_byte(mixed, tmp_path, step):
    died = Run.open(shutil.copytree(mixed.path, tmp_path / "died"))
    for later in mixed.checkpoints():
        if later > step:
            shutil.rmtree(died.checkpoint(later))
    died.mark("running")
    tunesmith.train(resume=died.path)
    assert final(died) == final(mixed)


def test_a_changed_mixed_file_is_not_resumed(tiny_model, files, tmp_path):
    copies = {name: Path(shutil.copy(path, tmp_path)) for name, path in files.items()}
    tunesmith.train(settings(tiny_model, copies, "share: 0.2", "loop.steps=2"), out=tmp_path / "run")
    Run.open(tmp_path / "run").mark("running")
    with copies["general"].open("a") as stream:
        stream.write(json.dumps({"prompt": "new", "completion": "row"}) + "\n")
    with pytest.raises(ResumeMismatch, match=r"general\.jsonl"):
        tunesmith.train(resume=tmp_path / "run")


def test_a_held_out_prompt_among_the_mixed_rows_is_found(tiny_model, files, tmp_path):
    held_out = preparation.prepare(settings(tiny_model, files, None).spec).valid[0].source
    line = int(held_out.rpartition(":")[2])
    leak = files["task"].read_text().splitlines()[line - 1]
    copies = {name: Path(shutil.copy(path, tmp_path)) for name, path in files.items()}
    with copies["general"].open("a") as stream:
        stream.write(leak + "\n")
    notices: list[events.Event] = []
    preparation.prepare(settings(tiny_model, copies, "share: 0.2").spec, notices.append)
    texts = [(notice.what, notice.count) for notice in notices if isinstance(notice, events.Notice)]
    assert ("held-out rows whose prompt is also in the training rows", 1) in texts
    with pytest.raises(DataError, match=r"contamination\.validation_exact"):
        preparation.prepare(settings(tiny_model, copies, "share: 0.2", "audit.before_training=true").spec)


def test_a_file_is_not_both_the_task_and_mixed_in(tiny_model, files):
    same = {"task": files["task"], "general": files["task"]}
    with pytest.raises(DataError, match="given twice"):
        preparation.prepare(settings(tiny_model, same, "share: 0.2").spec)


def test_a_mixed_file_of_which_nothing_can_be_learned_is_refused(tiny_model, files, tmp_path):
    bad = [{"messages": row["conversations"], "label": False} for row in tiny.conversations(3, seed=9)]
    others = {"task": files["task"], "general": tiny.write_rows(tmp_path / "bad.jsonl", bad)}
    with pytest.raises(DataError, match="can learn none of these rows"):
        preparation.prepare(settings(tiny_model, others, "share: 0.2").spec)


def test_mixed_rows_are_shown_apart_and_counted(mixed, tiny_model, files, tmp_path):
    mix = f"data.mix=[{{path: {files['general']}, share: 0.5}}]"
    words = ["show", "--model", str(tiny_model), str(files["task"]), "--set", mix]
    result = CliRunner().invoke(app, [*words, "--limit", "3"], catch_exceptions=False)
    heads = [line for line in result.stdout.splitlines() if line.startswith("── ")]
    assert [("task.jsonl" in head, "general.jsonl" in head) for head in heads] == (
        [(True, False)] * 3 + [(False, True)] * 3
    )
    assert "data.mix: general.jsonl: 3 rows shown of the first 3" in result.stderr
    printed = CliRunner().invoke(app, [*words, "--json"], catch_exceptions=False).stdout.splitlines()
    assert Counter(json.loads(line)["mix"] for line in printed) == {None: 20, "general.jsonl": 12}
    shown, _ = tunesmith.show([str(mixed.path)])
    assert len(shown.rows) == 4 and len(shown.mixed["general.jsonl"].rows) == 12


def test_the_rows_of_a_run_are_shown_where_its_mixed_files_are_gone(mixed, tmp_path):
    shutil.copytree(mixed.path, tmp_path / "run")
    config = tmp_path / "run" / "config.yaml"
    config.write_text(config.read_text().replace("general.jsonl", "gone.jsonl"))
    heard: list[events.Event] = []
    shown, _ = tunesmith.show([str(tmp_path / "run")], notify=heard.append)
    assert len(shown.rows) == 4 and not shown.mixed
    (notice,) = [event for event in heard if isinstance(event, events.Notice) and "not shown" in event.what]
    assert notice.level == "warning" and "gone.jsonl" in str(notice.where)
