"""Pruning proposes what nobody needs, deletes only on request, and never what is in use."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
from pathlib import Path

import pytest
from runs import planted
from typer.testing import CliRunner

from tunesmith.cli import app
from tunesmith.errors import ConfigError
from tunesmith.runs import tags
from tunesmith.runs.directory import Run
from tunesmith.runs.pruning import prune
from tunesmith.runs.registry import is_training, list_runs


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
    failed = planted.run(folder / "failed", status="failed", seed=5)
    planted.run(folder / "again", day=2, seed=5)
    assert "failed" in proposed(folder)
    planted.run(folder / "b", start=failed / "checkpoints" / "000010", seed=2)
    assert "failed" not in proposed(folder)
    failed.rename(folder / "renamed")
    assert "renamed" not in proposed(folder)


def test_the_user_may_have_a_damaged_manifest(folder):
    user = planted.run(folder / "b", start=folder / "a" / "checkpoints" / "000010")
    (user / "manifest.json").write_text("{")
    assert proposed(folder) == {"a/checkpoints/000030"}


@pytest.mark.parametrize("steps", [(), (10,)])
@pytest.mark.parametrize(("status", "goes"), [("failed", (True, False)), ("interrupted", (True, False))])
def test_failed_runs_and_those_without_a_checkpoint_can_go(folder, status, goes, steps):
    """A full disk is a failure too: a run with a checkpoint goes on once there is room."""
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
    failed = planted.run(folder / "failed", status="failed", seed=5)
    planted.run(folder / "again", day=2, seed=5)
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
    assert (
        "it failed before its first checkpoint" in listed
        and "--delete" in listed
        and (folder / "failed").is_dir()
    )
    content = json.loads(CliRunner().invoke(app, [*words, "--json"]).stdout)
    assert len(content["proposed"]) == 3 and content["deleted"] == []
    gone = CliRunner().invoke(app, [*words, "--delete"], catch_exceptions=False)
    assert gone.exit_code == 0 and "are free now" in gone.stdout and not (folder / "failed").exists()
    assert CliRunner().invoke(app, words).stdout == "nothing can go\n"


@pytest.mark.parametrize("name", ["0-latest", "latest"])
def test_a_link_beside_a_run_is_not_a_second_run(folder, name):
    (folder / name).symlink_to("a")
    assert [run.name for run in list_runs(folder)] == ["a"]
    assert proposed(folder, only=["run"]) == set()
    prune(folder, delete=True)
    assert Run(folder / "a").checkpoints() == [20, 40]


def test_nothing_of_a_run_that_is_reached_by_a_link_can_go(folder, tmp_path):
    planted.run(tmp_path / "elsewhere" / "failed", status="failed", steps=())
    (folder / "linked").symlink_to(tmp_path / "elsewhere" / "failed")
    (folder / "sweep").symlink_to(tmp_path / "elsewhere")
    assert proposed(folder, only=["run"]) == set()


def test_neither_a_run_nor_its_copy_can_go(folder):
    shutil.copytree(folder / "a", folder / "copy")
    assert proposed(folder, only=["run"]) == set()


def test_what_is_left_of_a_run_that_could_not_be_deleted_is_named(folder, monkeypatch):
    planted.run(folder / "failed", status="failed", steps=())

    def fail(path: Path) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(shutil, "rmtree", fail)
    ((_, why),) = prune(folder, delete=True, only=["run"]).refused
    assert "Permission denied: what is left lies in" in why and Path(why.split(" in ")[-1]).is_dir()


@pytest.mark.parametrize("absolute", [True, False])
@pytest.mark.parametrize(
    ("key", "replacement"),
    [
        ("model", "path: {}"),
        ("model", "path: /models/smol\n  tokenizer: {}"),
        ("data", "train: [{}]"),
        ("data", "train: [/rows]\n  valid: [{}]"),
    ],
)
def test_a_run_whose_export_or_data_another_names_in_its_settings_stays(folder, key, replacement, absolute):
    planted.run(folder / "old", seed=5)
    planted.run(folder / "new", day=2, seed=5)
    config = planted.run(folder / "b", seed=2) / "config.yaml"
    assert proposed(folder, only=["run"]) == {"old"}
    named = (folder if absolute else Path("runs")) / "old" / "exports" / "hf"
    line = {"model": "path: /models/smol", "data": "train: [/data/rows.jsonl]"}[key]
    config.write_text(config.read_text().replace(line, replacement.format(named)))
    assert proposed(folder, only=["run"]) == set()


def test_a_cache_that_another_run_names_stays(folder):
    cache = folder / "a" / "exports" / "hf.rejected"
    cache.mkdir(parents=True)
    assert proposed(folder, only=["cache"]) == {"a/exports/hf.rejected"}
    planted.run(folder / "b", model=str(cache))
    assert proposed(folder, only=["cache"]) == set()


@pytest.mark.parametrize("accepted", [True, False])
def test_a_run_with_an_export_that_was_accepted_stays(folder, accepted):
    planted.export(planted.run(folder / "old", seed=5), "hf", accepted=accepted)
    planted.run(folder / "new", day=2, seed=5)
    assert proposed(folder, only=["run"]) == (set() if accepted else {"old"})


def test_without_locks_nothing_is_deleted_and_training_is_still_seen(folder, monkeypatch):
    def unsupported(*_: object) -> None:
        raise OSError(errno.ENOTSUP, "Operation not supported")

    failed = planted.run(folder / "failed", status="failed", steps=())
    monkeypatch.setattr(fcntl, "flock", unsupported)
    with Run(folder / "a").lock():
        assert is_training(folder / "a")
        refused = dict(prune(folder, delete=True).refused)
        assert is_training(folder / "a")
    assert "another process is training" in refused[folder / "a" / "checkpoints" / "000010"]
    assert "no locks" in refused[failed] and failed.is_dir()
    assert Run(folder / "a").checkpoints() == [10, 20, 30, 40] and not is_training(folder / "a")


def test_what_was_refused_is_not_free(folder):
    failed = planted.run(folder / "failed", status="failed", steps=())
    (failed / "events.jsonl").write_bytes(bytes(3_000_000))
    handle = os.open(failed / ".lock", os.O_CREAT | os.O_RDWR)
    fcntl.flock(handle, fcntl.LOCK_EX)
    words = ["runs", "prune", "--folder", str(folder), "--only", "run", "--delete"]
    result = CliRunner().invoke(app, words, catch_exceptions=False)
    os.close(handle)
    assert result.exit_code == 3 and "0.0 MB are free now" in result.stdout


def test_a_cache_that_stays_is_not_reported_as_deleted(folder, monkeypatch):
    cache = folder / "a" / "frozen"
    cache.mkdir()

    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(os, "rmdir", refuse)
    result = prune(folder, only=["cache"], delete=True)
    assert not result.deleted and "Permission denied" in result.refused[0][1] and cache.is_dir()


def test_a_run_beside_the_pruned_folder_is_a_user(folder, tmp_path, monkeypatch):
    old = planted.run(folder / "sweep" / "old", seed=5)
    planted.run(folder / "sweep" / "new", day=2, seed=5)
    assert proposed(folder / "sweep") == {"old"}
    planted.run(folder / "b", start=old / "checkpoints" / "000010")
    assert proposed(folder / "sweep") == set()
    monkeypatch.chdir(tmp_path)
    assert proposed(Path("runs/sweep")) == set()
