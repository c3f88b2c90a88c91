"""Laws, through the command line on a tiny random model: what must not depend on how the work is cut or
interrupted."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import forks
import numpy as np
import pytest
from forks import Fork
from safetensors.numpy import load_file
from typer.testing import CliRunner

import tiny
from tunesmith import events
from tunesmith.cli import app
from tunesmith.errors import ModelError
from tunesmith.runs import checkpoints
from tunesmith.runs.directory import Run

SETTINGS = {
    "loop.steps": 8,
    "batch.sequences": 6,
    "batch.micro": 2,
    "optimizer.learning_rate": 0.01,
    "adapter.rank": 4,
    "loop.validate_every": 3,
    "loop.samples": 0,
    "loop.save_every": 2,
    "template.too_long": "refuse",
}


@pytest.fixture(scope="module")
def rows(tmp_path_factory) -> Path:
    return tiny.write_rows(tmp_path_factory.mktemp("rows") / "rows.jsonl", tiny.conversations(32))


@pytest.fixture(scope="module")
def finished(tmp_path_factory, tiny_model, rows) -> Run:
    """A run with `SETTINGS` that has kept all its checkpoints. Tests change a copy of it."""
    return train(tiny_model, rows, tmp_path_factory.mktemp("finished") / "run", loop__keep_last=99)


@pytest.fixture(scope="module")
def saved_each_step(tmp_path_factory, tiny_model, rows) -> Run:
    """The same with dropout, saved at each step."""
    out = tmp_path_factory.mktemp("saved") / "run"
    return train(tiny_model, rows, out, adapter__dropout=0.1, loop__save_every=1, loop__keep_last=99)


@pytest.fixture(scope="module")
def stopped_early(tmp_path_factory, tiny_model, rows) -> Run:
    """With a learning rate that destroys the model: validation never improves on step 0."""
    words = dict(optimizer__learning_rate=30, loop__steps=40, loop__validate_every=1, loop__early_stop=2)
    return train(tiny_model, rows, tmp_path_factory.mktemp("stopped") / "run", **words)


def arguments(model: Path, data: Path, out: Path, **changes: object) -> list[str]:
    settings = SETTINGS | {key.replace("__", "."): value for key, value in changes.items()}
    sets = [
        part for key, value in settings.items() if value is not None for part in ("--set", f"{key}={value}")
    ]
    return ["train", "--model", str(model), "--data", str(data), "--out", str(out), *sets]


def call(*words: str) -> str:
    result = CliRunner().invoke(app, list(words), catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.stdout


def train(model: Path, data: Path, out: Path, **changes: object) -> Run:
    call(*arguments(model, data, out, **changes))
    return Run.open(out)


def copied(run: Run, out: Path) -> Run:
    return Run.open(shutil.copytree(run.path, out))


def losses(run: Run) -> list[float]:
    return [
        event.loss for event in events.read(run.path / "events.jsonl") if isinstance(event, events.StepDone)
    ]


def validations(run: Run) -> list[float]:
    return [
        event.loss for event in events.read(run.path / "events.jsonl") if isinstance(event, events.Validated)
    ]


def final(run: Run) -> dict[str, bytes]:
    folder = checkpoints.choose(run, "last")
    return {name: (folder / name).read_bytes() for name in ("adapters.safetensors", "optimizer.safetensors")}


def agree(one: Run, other: Run, tolerance: float) -> None:
    a, b = (load_file(checkpoints.choose(run, "last") / "adapters.safetensors") for run in (one, other))
    assert a.keys() == b.keys() and len(a) == 8
    for name in a:
        assert np.abs(a[name]).max() > 0, name
        np.testing.assert_allclose(a[name], b[name], atol=tolerance, err_msg=name)


def test_batch_cuts_agree(tiny_model, rows, tmp_path, finished):
    """Sums, not means: 6 × 1 = 3 × 2 = 2 × 3 = 1 × 6, losses and weights (museum 5, mlx-lm 1544)."""
    one, *others = [train(tiny_model, rows, tmp_path / str(micro), batch__micro=micro) for micro in (1, 4, 6)]
    for run in (finished, *others):  # finished: of 3 micro-batches of 2
        np.testing.assert_allclose(losses(run), losses(one), rtol=2e-5)
        np.testing.assert_allclose(validations(run), validations(one), rtol=2e-5)
        agree(run, one, 2e-4)


def test_gradient_checkpointing_with_dropout_changes_nothing(tiny_model, rows, tmp_path, finished):
    """Museum 6: the recomputed layer draws the mask it drew before."""
    runs = [
        train(tiny_model, rows, tmp_path / flag, adapter__dropout=0.3, loop__checkpoint_gradients=flag)
        for flag in ("false", "true")
    ]
    np.testing.assert_allclose(losses(runs[0]), losses(runs[1]), rtol=1e-5)
    agree(*runs, 1e-4)
    assert max(abs(a - b) for a, b in zip(losses(finished), losses(runs[0]), strict=True)) > 1e-3


def test_the_same_settings_give_the_same_bytes(tiny_model, rows, tmp_path):
    first, second = (train(tiny_model, rows, tmp_path / name, adapter__dropout=0.1) for name in "ab")
    assert final(first) == final(second)


@pytest.mark.parametrize("step", [0, 2, 5])
def test_resumed_equals_straight_to_the_byte(saved_each_step, tmp_path, step):
    """A run whose process died after checkpoint ``step`` (0: before any) ends as if nothing had happened."""
    straight, died = saved_each_step, copied(saved_each_step, tmp_path / "died")
    for later in straight.checkpoints():
        if later > step:
            shutil.rmtree(died.checkpoint(later))
    died.mark("running")
    call("train", "--resume", str(died.path))
    assert final(died) == final(straight)
    assert losses(died) == losses(straight) and len(losses(straight)) == 8
    assert validations(died) == validations(straight)
    log = events.read(died.path / "events.jsonl")
    resumed = [event for event in log if isinstance(event, events.Resumed)]
    assert [event.step for event in resumed] == [step]


@pytest.mark.parametrize("damage", ["flip", "cut", "missing", "cursor"])
def test_a_torn_checkpoint_is_named_and_the_one_before_it_is_used(finished, tmp_path, damage):
    straight = copied(finished, tmp_path / "a")
    whole = final(straight)
    folder = straight.checkpoint(8)
    victim = folder / ("cursor.json" if damage == "cursor" else "optimizer.safetensors")
    content = bytearray(victim.read_bytes())
    if damage == "missing":
        victim.unlink()
    else:
        content[len(content) // 2] ^= 1
        victim.write_bytes(content[: len(content) // 2] if damage in ("cut", "cursor") else content)
    straight.mark("running")
    result = CliRunner().invoke(app, ["train", "--resume", str(straight.path)], catch_exceptions=False)
    assert result.exit_code == 0
    assert str(victim) in result.stderr and "the checkpoint before it is used" in result.stderr
    assert final(straight) == whole


def test_resume_refuses_changed_data_and_settings_with_a_diff(tiny_model, rows, tmp_path):
    from tunesmith.errors import ResumeMismatch

    data = tmp_path / "rows.jsonl"
    shutil.copy(rows, data)
    run = train(tiny_model, data, tmp_path / "a")
    run.mark("running")
    with pytest.raises(ResumeMismatch, match=r"optimizer.learning_rate: 0.01 → 0.5"):
        CliRunner().invoke(
            app,
            ["train", "--resume", str(run.path), "--set", "optimizer.learning_rate=0.5"],
            catch_exceptions=False,
        )
    call("train", "--resume", str(run.path), "--set", "loop.keep_last=1")
    run.mark("running")
    with data.open("a") as stream:
        stream.write(json.dumps(tiny.conversations(1, seed=5)[0]) + "\n")
    with pytest.raises(ResumeMismatch, match=r"rows.jsonl"):
        CliRunner().invoke(app, ["train", "--resume", str(run.path)], catch_exceptions=False)


def test_a_run_goes_on_where_its_model_was_moved(tiny_model, rows, tmp_path):
    moved = Path(shutil.copytree(tiny_model, tmp_path / "moved"))
    run = train(moved, rows, tmp_path / "a", loop__keep_last=99)
    whole = final(run)
    for later in (4, 6, 8):
        shutil.rmtree(run.checkpoint(later))
    run.mark("running")
    moved.rename(tmp_path / "there")
    with pytest.raises(ModelError, match="moved: does not exist"):
        CliRunner().invoke(app, ["train", "--resume", str(run.path)], catch_exceptions=False)
    call("train", "--resume", str(run.path), "--set", f"model.path={tmp_path / 'there'}")
    assert final(run) == whole


def test_every_row_is_trained_once_an_epoch_and_validated(tiny_model, tmp_path):
    """Museum 3: 27 rows in updates of 4 leave a rest of 3; it is trained too. Counts from the run's own
    log."""
    data = tiny.write_rows(tmp_path / "rows.jsonl", tiny.conversations(27))
    out = tmp_path / "run"
    counts = json.loads(
        call(*arguments(tiny_model, data, out, loop__steps=None, loop__epochs=2), "--dry-run", "--json")
    )
    assert not out.exists()
    assert (
        counts["rows_read"] == 27 == counts["rows_train"] + counts["rows_valid"]
        and counts["rows_dropped"] == {}
    )
    run = train(tiny_model, data, out, loop__steps=None, loop__epochs=2)
    log = list(events.read(run.path / "events.jsonl"))
    steps = [event for event in log if isinstance(event, events.StepDone)]
    assert len(steps) == counts["steps"] == 2 * -(-counts["sequences_train"] // 6)
    assert sum(event.units for event in steps) == 2 * counts["supervised_tokens"]
    assert {event.rows for event in log if isinstance(event, events.Validated)} == {counts["sequences_valid"]}


def test_resume_after_an_early_stop_does_no_further_update(stopped_early, tmp_path):
    run = copied(stopped_early, tmp_path / "run")
    whole, count = final(run), len(losses(run))
    run.mark("running")
    call("train", "--resume", str(run.path))
    assert final(run) == whole and len(losses(run)) == count and run.manifest["status"] == "stopped_early"


def test_torn_checkpoints_never_push_out_good_ones(tiny_model, rows, tmp_path):
    run = train(tiny_model, rows, tmp_path / "run", loop__keep_last=9, loop__save_every=1)
    whole = final(run)
    for step in (7, 8):
        (run.checkpoint(step) / "optimizer.safetensors").write_bytes(b"torn")
    run.mark("running")
    call("train", "--resume", str(run.path), "--set", "loop.keep_last=1")
    assert final(run) == whole and run.checkpoints()[-1] == 8
    assert len(list((run.path / "checkpoints").glob("torn-*"))) == 2


def test_a_log_that_lost_its_end_is_mended_and_told(finished, tmp_path):
    run = copied(finished, tmp_path / "run")
    log = run.path / "events.jsonl"
    log.write_bytes(log.read_bytes()[: checkpoints.read(run, 8).events_bytes - 50])
    run.mark("running")
    call("train", "--resume", str(run.path))
    told = [event.what for event in events.read(log) if isinstance(event, events.Notice)]
    assert any("the log lost its end" in text for text in told)


def test_what_a_killed_save_left_behind_is_swept(finished, tmp_path):
    run = copied(finished, tmp_path / "run")
    (run.path / "checkpoints" / ".000009.0c92cabf").mkdir()
    run.mark("running")
    call("train", "--resume", str(run.path))
    assert not list((run.path / "checkpoints").glob(".*"))


def test_a_checkpoint_that_a_kill_after_the_last_save_left_is_removed(finished, tmp_path):
    run = copied(finished, tmp_path / "run")
    assert len(run.checkpoints()) > 2
    run.mark("running")
    call("train", "--resume", str(run.path), "--set", "loop.keep_last=1")
    assert run.checkpoints() == sorted({8, checkpoints.read(run, 8).best_step})


def spawn(words: list[str], log: Path) -> Fork:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    log.write_text("")
    return forks.shared().start(["tunesmith", *words], environment, Path.cwd(), log, log)


def wait_for(process: Fork, path: Path, size: int) -> None:
    deadline = time.monotonic() + 300
    while process.poll() is None and (not path.exists() or path.stat().st_size <= size):
        assert time.monotonic() < deadline, "the run did not start"
        time.sleep(0.002)


def killed(model: Path, rows: Path, tmp_path: Path, kills: int) -> None:
    """One run, killed with SIGKILL ``kills`` times at random moments and resumed each time, equals the
    straight run.

    Every update is saved, so that most of the time is spent inside saves.
    """
    changes = dict(
        adapter__dropout=0.1,
        loop__save_every=1,
        loop__steps=25 * kills,
        loop__validate_every=7,
        loop__keep_last=2,
    )
    words = arguments(model, rows, tmp_path / "straight", **changes)
    told = tmp_path / "told.txt"
    assert spawn(words, told).wait() == 0, told.read_text()
    out = tmp_path / "killed"
    log, moments, died = out / "events.jsonl", random.Random(0), 0
    while True:
        words = ["train", "--resume", str(out)] if out.exists() else arguments(model, rows, out, **changes)
        size = log.stat().st_size if log.exists() else 0
        process = spawn(words, told)
        if died < kills:
            wait_for(process, log, 0 if died == 0 else size)
            time.sleep(moments.random() * 0.4)
            process.send_signal(signal.SIGKILL)
        code = process.wait()
        if code == 0:
            break
        assert code == -signal.SIGKILL, told.read_text()
        died += 1
    assert died >= kills, f"only {died} kills landed"
    assert not list((out / "checkpoints").glob(".*")), "a killed save left its draft"
    assert final(Run(out)) == final(Run(tmp_path / "straight"))
    assert losses(Run(out)) == losses(Run(tmp_path / "straight")) and len(losses(Run(out))) == 25 * kills


def test_killed_at_any_moment_then_resumed_equals_straight(tiny_model, rows, tmp_path):
    killed(tiny_model, rows, tmp_path, 3)


@pytest.mark.sweep
def test_killed_at_twenty_random_moments_then_resumed_equals_straight(tiny_model, rows, tmp_path):
    killed(tiny_model, rows, tmp_path, 20)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_finishes_the_step_saves_and_says_how_to_go_on(tiny_model, rows, tmp_path, number):
    out, told = tmp_path / "run", tmp_path / "told.txt"
    process = spawn(
        arguments(tiny_model, rows, out, loop__steps=4000, loop__save_every=0, loop__validate_every=0), told
    )
    wait_for(process, out / "events.jsonl", 3000)
    process.send_signal(number)
    process.wait()
    run = Run.open(out)
    assert process.returncode == 130 and run.manifest["status"] == "interrupted"
    assert f"tunesmith train --resume {out}" in told.read_text()
    (step,) = run.checkpoints()
    assert 0 < step < 4000 and len(losses(run)) == step


def test_a_disk_that_is_full_is_noticed_before_the_write(tiny_model, rows, tmp_path, monkeypatch):
    from tunesmith.errors import DiskFull

    run = train(tiny_model, rows, tmp_path / "run", loop__steps=4)
    before = final(run)
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    with pytest.raises(DiskFull, match="are free") as caught:
        train(tiny_model, rows, tmp_path / "other", loop__steps=4)
    assert "make room" in str(caught.value)
    assert Run(tmp_path / "other").checkpoints() == [] and final(run) == before


def test_a_disk_that_fills_up_during_the_write_loses_nothing(tiny_model, rows, tmp_path):
    """A real refusal by the kernel: files may not grow beyond what the first save has written."""
    run = train(tiny_model, rows, tmp_path / "run", loop__save_every=2, loop__keep_last=9, adapter__rank=8)
    shutil.rmtree(run.checkpoint(8))
    run.mark("running")
    code = (
        "import resource, signal, sys; signal.signal(signal.SIGXFSZ, signal.SIG_IGN); "
        "resource.setrlimit(resource.RLIMIT_FSIZE, (20000, 20000)); sys.argv[0] = 'tunesmith'; "
        "from tunesmith.cli import main; main()"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, "train", "--resume", str(run.path)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 6, done.stderr
    assert "the disk is full" in done.stderr and "make room" in done.stderr
    assert 8 not in run.checkpoints() and 6 in run.checkpoints()
    assert not [entry for entry in (run.path / "checkpoints").iterdir() if entry.name.startswith(".")]
    call("train", "--resume", str(run.path))
    assert run.checkpoints()[-1] == 8


def test_two_processes_do_not_train_one_run(finished, tmp_path):
    from tunesmith.errors import DataError

    run = copied(finished, tmp_path / "run")
    run.mark("running")
    with run.lock(), pytest.raises(DataError, match="another process"):
        CliRunner().invoke(app, ["train", "--resume", str(run.path)], catch_exceptions=False)


def test_early_stopping_and_best(stopped_early):
    run = stopped_early
    assert run.manifest["status"] == "stopped_early"
    index = json.loads((run.path / "checkpoints" / "index.json").read_text())
    seen = validations(run)
    assert index["best_value"] == pytest.approx(min(seen)) and seen.index(min(seen)) == len(seen) - 3 == (
        index["best"] or 0
    )
