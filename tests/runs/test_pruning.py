"""Pruning proposes what nobody needs, deletes only on request, and never what is in use."""

from __future__ import annotations

import fcntl
import json
import os
from pathlib import Path

import pytest
from runs import planted
from typer.testing import CliRunner

from tunesmith.cli import app
from tunesmith.errors import ConfigError
from tunesmith.runs import tags
from tunesmith.runs.directory import Run
from tunesmith.runs.pruning import prune


def proposed(folder: Path, **options) -> set[str]:
    return {str(item.path.relative_to(folder)) for item in prune(folder, **options).proposed}


@pytest.fixture
def folder(tmp_path) -> Path:
    """Runs of four checkpoints, of which the second is the best."""
    runs = tmp_path / "runs"
    planted.run(runs / "a", steps=(10, 20, 30, 40), best=20, seed=1)
    return runs


def test_checkpoints_but_best_and_last_can_go(folder):
    assert proposed(folder) == {"a/checkpoints/000010", "a/checkpoints/000030"}
    assert (folder / "a" / "checkpoints" / "000010").is_dir()  # nothing was deleted


def test_deleting_leaves_best_last_and_an_index_of_them(folder):
    pruning = prune(folder, delete=True)
    assert len(pruning.deleted) == 2 and not pruning.refused
    assert Run(folder / "a").checkpoints() == [20, 40]
    assert json.loads((folder / "a" / "checkpoints" / "index.json").read_text())["kept"] == [20, 40]
    assert proposed(folder) == set()


def test_a_tag_protects_all_of_a_run(folder):
    planted.run(folder / "failed", status="failed", steps=())
    for name in ("a", "failed"):
        tags.add(folder / name, f"{name}:1")
    assert proposed(folder) == set()


def test_a_tag_that_is_given_after_the_proposal_protects(folder, monkeypatch):
    from tunesmith.runs import pruning

    items = list(pruning._proposed(folder))
    monkeypatch.setattr(pruning, "_proposed", lambda _: items)
    tags.add(folder / "a", "tool:1")
    result = prune(folder, delete=True)
    assert not result.deleted and [why for _, why in result.refused] == ["its run has a tag"] * 2
    assert Run(folder / "a").checkpoints() == [10, 20, 30, 40]


def test_a_checkpoint_from_which_another_run_starts_stays(folder):
    planted.run(folder / "b", start=folder / "a" / "checkpoints" / "000010")
    assert proposed(folder) == {"a/checkpoints/000030"}


def test_a_run_that_another_uses_stays_although_it_failed_and_was_moved(folder):
    failed = planted.run(folder / "failed", status="failed")
    planted.run(folder / "b", start=failed / "checkpoints" / "000010", seed=2)
    assert "failed" not in proposed(folder)
    failed.rename(folder / "renamed")
    assert "renamed" not in proposed(folder)


def test_the_user_may_have_a_damaged_manifest(folder):
    user = planted.run(folder / "b", start=folder / "a" / "checkpoints" / "000010")
    (user / "manifest.json").write_text("{")
    assert proposed(folder) == {"a/checkpoints/000030"}


@pytest.mark.parametrize("steps", [(), (10,)])
@pytest.mark.parametrize(("status", "goes"), [("failed", (True, True)), ("interrupted", (True, False))])
def test_failed_runs_and_those_without_a_checkpoint_can_go(folder, status, goes, steps):
    planted.run(folder / "b", status=status, steps=steps)
    assert ("b" in proposed(folder)) is goes[len(steps)]


def test_a_run_that_was_done_again_can_go(folder):
    planted.run(folder / "old", day=1, seed=5)
    planted.run(folder / "new", day=2, seed=5)
    planted.run(folder / "other", day=2, seed=6)
    assert proposed(folder, only=["run"]) == {"old"}
    tags.add(folder / "old", "tool:1")
    assert proposed(folder, only=["run"]) == set()


def test_a_run_that_was_done_again_but_not_finished_protects_the_old_one(folder):
    planted.run(folder / "old", day=1, seed=5)
    planted.run(folder / "new", day=2, seed=5, status="interrupted")
    assert proposed(folder, only=["run"]) == set()


def test_what_is_being_trained_stays(folder):
    path = planted.run(folder / "b", status="running", steps=(), day=1)
    planted.run(folder / "again", day=2)  # which would make it one that was done again
    with Run(path).lock():
        assert "b" not in proposed(folder)
    assert "b" in proposed(folder)  # its process died


def test_a_training_that_begins_after_the_proposal_is_not_disturbed(folder):
    ready, done = os.pipe(), os.pipe()
    if (pid := os.fork()) == 0:
        with Run(folder / "a").lock():
            os.write(ready[1], b"x")
            os.read(done[0], 1)
        os._exit(0)
    os.read(ready[0], 1)
    try:
        result = prune(folder, delete=True)
    finally:
        os.write(done[1], b"x")
        os.waitpid(pid, 0)
    assert not result.deleted and "another process is training this run" in result.refused[0][1]


def test_a_checkpoint_or_run_that_another_process_reads_stays(folder):
    failed = planted.run(folder / "failed", status="failed")
    handles = [os.open(failed / "checkpoints" / "000010", os.O_RDONLY)]
    handles.append(os.open(folder / "a" / "checkpoints" / "000010", os.O_RDONLY))
    for handle in handles:
        fcntl.flock(handle, fcntl.LOCK_SH)
    result = prune(folder, delete=True)
    for handle in handles:
        os.close(handle)
    assert {path.name for path, _ in result.refused} == {"failed", "000010"}
    assert failed.is_dir() and Run(folder / "a").checkpoints() == [10, 20, 40]


def test_caches_can_go(folder):
    for name in ("frozen", "checkpoints/torn-000010-abc", "exports/hf.rejected", "exports/hf"):
        (folder / "a" / name).mkdir(parents=True)
        (folder / "a" / name / "file").write_bytes(b"x" * 1000)
    assert proposed(folder, only=["cache"]) == {
        "a/frozen",
        "a/checkpoints/torn-000010-abc",
        "a/exports/hf.rejected",
    }
    assert len(prune(folder, only=["cache"], delete=True).deleted) == 3
    assert (folder / "a" / "exports" / "hf" / "file").exists()


def test_nothing_of_a_damaged_or_unfinished_run_can_go(folder):
    (folder / "a" / "report.json").write_text("{")
    planted.run(folder / "b", status="interrupted", steps=(10, 20, 30), best=10)
    assert proposed(folder) == set()


def test_an_unknown_kind_is_refused(folder):
    with pytest.raises(ConfigError, match="cannot prune 'everything'"):
        prune(folder, only=["everything"])


def test_the_verb_lists_and_deletes_on_request(folder):
    planted.run(folder / "failed", status="failed", steps=())
    words = ["runs", "prune", "--folder", str(folder)]
    listed = CliRunner().invoke(app, words, catch_exceptions=False).stdout
    assert "its training failed" in listed and "--delete" in listed and (folder / "failed").is_dir()
    content = json.loads(CliRunner().invoke(app, [*words, "--json"]).stdout)
    assert len(content["proposed"]) == 3 and content["deleted"] == []
    gone = CliRunner().invoke(app, [*words, "--delete"], catch_exceptions=False)
    assert gone.exit_code == 0 and "are free now" in gone.stdout and not (folder / "failed").exists()
    assert CliRunner().invoke(app, words).stdout == "nothing can go\n"
