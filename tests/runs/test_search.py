"""Runs are looked for by one rule: at most four folders deep, never inside a run, never in hidden folders."""

from __future__ import annotations

from pathlib import Path

import pytest
from runs import planted

from tunesmith.runs import ancestry, pruning, search, tags
from tunesmith.runs.registry import list_runs


@pytest.fixture
def runs(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    for name in ("a", "x/b", "x/y/c", "x/y/z/d", "x/y/z/deep/e", ".hidden/f", "a/exports/g"):
        planted.run(Path("runs") / name)
    return Path("runs")


SEEN = ["a", "x/b", "x/y/c", "x/y/z/d"]


def test_four_folders_deep_and_no_deeper(runs):
    assert [str(path.relative_to(runs)) for path in search.folders(runs)] == SEEN


def test_the_list_the_tags_and_the_pruning_see_the_same_runs(runs):
    assert sorted(str(run.path.relative_to(runs)) for run in list_runs(runs)) == SEEN
    tags.add(runs / "x/y/z/d", "tool:1")
    assert tags.find("tool:1") == tags.find("runs/tool:1") == runs / "x/y/z/d"
    for name in SEEN[:3]:
        (runs / name / "frozen").mkdir()
    caches = [item.run for item in pruning.prune(runs).proposed if item.kind == "cache"]
    assert [str(path.relative_to(runs)) for path in caches] == SEEN[:3]


def test_a_run_in_another_folder_that_uses_a_checkpoint_is_seen(runs):
    used = runs / "x" / "b" / "checkpoints" / "000010"
    planted.run(Path("experiments/sweep/user"), start=used, seed=5)
    (child,) = ancestry.lineage(runs / "x" / "b").children
    assert child.run.path == Path("experiments/sweep/user")


def test_a_folder_that_links_to_itself_ends_the_search(runs):
    (runs / "x" / "round").symlink_to("..")
    (runs / "x" / "self").symlink_to("self")
    assert [str(path.relative_to(runs)) for path in search.folders(runs)] == SEEN


def test_runs_behind_a_link_are_those_of_the_current_folder(tmp_path, monkeypatch):
    run = planted.run(tmp_path / "disk" / "runs" / "a")
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    assert search.around(run) == tmp_path / "disk"
    Path("runs").symlink_to(tmp_path / "disk" / "runs")
    assert search.around(Path("runs/a")) == search.around(run) == Path()
