"""A tag names one run under a folder, and serves wherever a run is asked."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from runs import planted
from typer.testing import CliRunner

from tunesmith.cli import app
from tunesmith.errors import ConfigError, DataError
from tunesmith.runs import lineage, opening, tags
from tunesmith.runs.directory import Run


@pytest.fixture
def runs(tmp_path, monkeypatch) -> Path:
    """The folder ``runs`` with two runs, a and b, seen from the folder that holds it."""
    monkeypatch.chdir(tmp_path)
    planted.run(Path("runs/a"))
    planted.run(Path("runs/b"))
    return Path("runs")


def test_a_tag_is_the_run_that_has_it(runs):
    tags.add(runs / "a", "tool:1")
    tags.add(runs / "b", "tool:2")
    assert tags.find("tool:1") == Run.open("tool:1").path == runs / "a"
    assert tags.find("runs/tool:2") == runs / "b"
    assert json.loads((runs / "b" / "tags.json").read_text()) == {"tags": ["tool:2"]}


def test_a_run_in_a_folder_of_the_folder_is_found(runs):
    planted.run(runs / "sweep" / "c")
    tags.add(runs / "sweep" / "c", "tool:3")
    assert tags.find("tool:3") == runs / "sweep" / "c"
    with pytest.raises(DataError, match="has the tag"):
        tags.add(runs / "a", "tool:3")


def test_a_path_that_exists_is_not_a_tag(runs):
    tags.add(runs / "a", "tool:1")
    planted.run(Path("tool:1"))
    assert tags.find("tool:1") == Path("tool:1")


def test_a_tag_that_no_run_has_is_an_error_with_the_folder(runs):
    with pytest.raises(DataError, match="no run under the current folder has this tag") as caught:
        opening.find("tool:9")
    assert "tunesmith runs" in str(caught.value)
    with pytest.raises(DataError, match="no run under elsewhere has this tag"):
        tags.find("elsewhere/tool:9")


def test_an_ambiguous_tag_is_an_error_that_names_both(runs):
    for name in ("a", "b"):  # as by a copy of a folder
        (runs / name / "tags.json").write_text('{"tags": ["tool:1"]}')
    with pytest.raises(DataError, match="ambiguous: runs/a and runs/b have it"):
        tags.find("tool:1")


@pytest.mark.parametrize("name", ["0-latest", "latest"])
def test_a_link_beside_a_run_is_not_another_run_with_its_tag(runs, name):
    (runs / name).symlink_to("a")
    tags.add(runs / "a", "tool:1")
    assert tags.find("tool:1") == runs / "a"


def test_the_hint_of_an_ambiguous_tag_ends_the_ambiguity(runs):
    for name in ("experiments/s1/a", "experiments/s2/b"):  # as by a copy of a folder
        (planted.run(Path(name)) / "tags.json").write_text('{"tags": ["tool:1"]}')
    with pytest.raises(DataError, match="ambiguous") as caught:
        tags.find("experiments/tool:1")
    command = (caught.value.hint or "").partition("tunesmith ")[2].split()
    assert CliRunner().invoke(app, command, catch_exceptions=False).exit_code == 0
    assert tags.find("experiments/tool:1") == Path("experiments/s1/a")


def test_a_tag_is_moved_only_on_request(runs):
    tags.add(runs / "a", "tool:1")
    tags.add(runs / "a", "tool:latest")
    with pytest.raises(DataError, match="runs/a has the tag tool:1") as caught:
        tags.add(runs / "b", "tool:1")
    assert "--move" in str(caught.value) and tags.read(runs / "b") == []
    tags.add(runs / "b", "tool:1", move=True)
    assert (tags.read(runs / "a"), tags.read(runs / "b")) == (["tool:latest"], ["tool:1"])


def test_a_tag_is_taken_from_a_run_in_any_folder_around(runs):
    tags.add(runs / "a", "tool:1")
    far = planted.run(Path("experiments/s1/rank-8/c"))
    with pytest.raises(DataError, match="runs/a has the tag tool:1"):
        tags.add(far, "tool:1")
    tags.add(far, "tool:1", move=True)
    assert tags.read(runs / "a") == [] and tags.find("tool:1") == far
    tags.add(runs / "b", "tool:1", move=True)
    assert tags.read(far) == [] and tags.find("tool:1") == runs / "b"


def test_a_tag_outside_the_current_folder_is_taken_from_the_folder_beside(tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    first, second = (planted.run(tmp_path / "there" / name) for name in ("s1/a", "s2/b"))
    tags.add(first, "tool:1")
    with pytest.raises(DataError, match="s1/a has the tag"):
        tags.add(second, "tool:1")
    tags.add(second, "tool:1", move=True)
    assert tags.find(tmp_path / "there" / "tool:1") == second and tags.read(first) == []


def test_the_same_tag_twice_is_one_tag(runs):
    tags.add(runs / "a", "tool:1")
    tags.add(runs / "a", "tool:1")
    assert tags.read(runs / "a") == ["tool:1"]


def test_of_two_processes_that_give_a_tag_at_once_one_does(runs):
    outcomes: list[str] = []
    together = threading.Barrier(2)

    def give(name: str) -> None:
        together.wait()
        try:
            tags.add(runs / name, "tool:1")
            outcomes.append(name)
        except DataError:
            outcomes.append("refused")

    threads = [threading.Thread(target=give, args=(name,)) for name in ("a", "b")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert outcomes.count("refused") == 1
    assert tags.find("tool:1") == runs / next(name for name in outcomes if name != "refused")


_GIVE = """
import sys
from pathlib import Path
from tunesmith.errors import DataError
from tunesmith.runs import tags
try:
    tags.add(Path(sys.argv[1]), "tool:1")
    print("given")
except DataError:
    print("refused")
"""


@pytest.mark.parametrize(("holding", "waiting"), [("", "runs"), ("runs", ""), ("runs", "elsewhere")])
def test_processes_in_different_folders_change_tags_one_after_the_other(
    runs, tmp_path, monkeypatch, holding, waiting
):
    for folder in {holding, waiting}:
        (tmp_path / folder).mkdir(exist_ok=True)
    monkeypatch.chdir(tmp_path / holding)
    with tags._alone(tmp_path / "runs" / "a"):
        words = [sys.executable, "-c", _GIVE, str(tmp_path / "runs" / "b")]
        other = subprocess.Popen(words, cwd=tmp_path / waiting, stdout=subprocess.PIPE, text=True)
        with pytest.raises(subprocess.TimeoutExpired):
            other.wait(timeout=5.0)
        tags._write(tmp_path / "runs" / "a", ["tool:1"])
    assert other.communicate(timeout=60.0)[0] == "refused\n"


def test_processes_that_search_different_folders_do_not_wait_for_each_other(tmp_path, monkeypatch):
    first, second = (planted.run(tmp_path / name / "runs" / "a") for name in ("one", "two"))
    monkeypatch.chdir(tmp_path / "one")
    with tags._alone(first):
        words = [sys.executable, "-c", _GIVE, str(second)]
        given = subprocess.run(
            words, cwd=tmp_path / "two", stdout=subprocess.PIPE, text=True, timeout=60.0, check=True
        )
    assert given.stdout == "given\n"


@pytest.mark.parametrize("place", ["1/2/3/4", ".hidden", "runs/a"])
def test_a_run_that_no_search_finds_gets_no_tag_but_the_hint_gives_it_one(runs, tmp_path, monkeypatch, place):
    run = planted.run(Path(place) / "deep run")
    with pytest.raises(DataError, match="would not be found under the current folder") as caught:
        tags.add(run, "tool:1")
    assert tags.read(run) == []
    folder, command = (caught.value.hint or "").partition("cd ")[2].split(" && tunesmith ")
    monkeypatch.chdir(folder)
    assert CliRunner().invoke(app, shlex.split(command), catch_exceptions=False).exit_code == 0
    assert tags.find("tool:1").samefile(tmp_path / run)


def test_a_run_five_folders_deep_under_runs_is_found_and_its_tag_is_its_own(runs):
    far = planted.run(runs / "1" / "2" / "3" / "c")
    tags.add(far, "tool:1")
    assert tags.find("tool:1") == far
    with pytest.raises(DataError, match="runs/1/2/3/c has the tag"):
        tags.add(runs / "a", "tool:1")


@pytest.mark.parametrize("name", ["tool", "tool:", ":1", "a/b:1", "a:b:c", "tool 1:2", "", "ä:1", "-x:1"])
def test_what_is_not_a_name_and_a_version_is_refused(runs, name):
    with pytest.raises(ConfigError, match="is not a tag"):
        tags.add(runs / "a", name)


@pytest.mark.parametrize("content", ["", "{", "[]", '{"tags": "x"}', '{"tags": [1]}', "\xff"])
def test_damaged_tags_name_no_run_and_are_reported_where_they_are(runs, content):
    tags.add(runs / "b", "tool:1")
    (runs / "a" / "tags.json").write_text(content, encoding="latin-1")
    assert tags.find("tool:1") == runs / "b"
    result = CliRunner().invoke(app, ["tag", "runs/a"])
    assert isinstance(result.exception, DataError) and "runs/a/tags.json" in str(result.exception)


def test_a_start_may_be_a_tag(runs):
    tags.add(runs / "a", "tool:1")
    adapter = runs / "a" / "checkpoints" / "000010"
    assert tags.find("tool:1") / "checkpoints" / "000010" == adapter
    with pytest.raises(DataError, match="no run under the current folder has this tag"):
        lineage._checkpoint("tool:9", "adapter.start")


def test_the_verb_gives_prints_moves_and_removes(runs):
    def tag(*words: str) -> str:
        result = CliRunner().invoke(app, ["tag", *words], catch_exceptions=False)
        assert result.exit_code == 0
        return result.stdout

    assert tag("runs/a") == "no tags\n"
    assert tag("runs/a", "tool:1") == "tool:1\n"
    assert tag("tool:1", "tool:latest") == "tool:1\ntool:latest\n"
    assert json.loads(tag("runs/b", "tool:latest", "--move", "--json")) == ["tool:latest"]
    assert tag("runs/a", "tool:1", "--remove") == "no tags\n"
    for words in (["runs/a", "--move"], ["runs/a", "x:1", "--move", "--remove"]):
        assert isinstance(CliRunner().invoke(app, ["tag", *words]).exception, ConfigError)
    assert isinstance(CliRunner().invoke(app, ["tag", "runs/a", "x:1", "--remove"]).exception, DataError)
