"""The list of runs says what their folders say, quickly, and a damaged folder is listed with its faults."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import threading
import time
import tracemalloc
from io import StringIO
from pathlib import Path

import pytest
from runs import planted
from typer.testing import CliRunner

import tiny
from tunesmith.cli import app
from tunesmith.errors import ConfigError, DataError
from tunesmith.files import read_regular
from tunesmith.runs import registry, screen, tags
from tunesmith.runs.directory import Run
from tunesmith.runs.registry import list_runs
from tunesmith.settings import origins


@pytest.fixture
def folder(tmp_path) -> Path:
    runs = tmp_path / "runs"
    planted.run(runs / "first", day=1, best_value=0.7, report={"verdict": "Ship it: better", "ship": True})
    planted.run(runs / "second", day=2, objective="kto", model="/models/large", best_value=0.4)
    planted.run(runs / "third", day=3, status="failed", steps=(), data="/data/calls.jsonl")
    return runs


def names(runs: list[registry.RegisteredRun]) -> list[str]:
    return [run.name for run in runs]


def test_a_run_is_listed_with_what_its_folder_holds(folder):
    tags.add(folder / "first", "tool:1")
    run = list_runs(folder, where=["name=first"])[0]
    assert (run.model, run.data, run.objective) == ("/models/smol", ("/data/rows.jsonl",), "sft")
    assert run.best == registry.BestValue(0.7, "validation loss", 10)
    assert (run.verdict, run.ship, run.state, run.tags) == ("Ship it: better", True, "completed", ("tool:1",))
    assert run.created == "2026-11-01T05:04:16+00:00" and run.faults == ()
    files = [path for path in run.path.rglob("*") if path.is_file()]
    assert run.size_bytes == sum(path.stat().st_size for path in files) and len(files) >= 6


def test_no_more_of_a_file_is_read_than_is_looked_at(folder, monkeypatch):
    assert read_regular(tiny.write_rows(folder / "rows", [{"a": 1}]), 4) == b'{"a"'
    (folder / "first" / registry.LOCK).write_bytes(b"process 1 on elsewhere\n" + bytes(1 << 26))
    monkeypatch.setattr(origins, "RECORDED", origins.Bounds(10, None, 10))
    settings = folder / "settings.yaml"
    settings.write_bytes(b"a: b\nc: d\n" + bytes(1 << 26))  # cut within, it would not be YAML
    tracemalloc.start()
    try:
        assert not registry.is_training(folder / "first")
        assert origins.skim(settings) == {"a": "b", "c": "d"}
        assert tracemalloc.get_traced_memory()[1] < 1 << 25
    finally:
        tracemalloc.stop()


def test_runs_one_folder_deeper_and_nothing_else_are_listed(folder):
    planted.run(folder / "sweep" / "deep")
    planted.run(folder / "first" / "exports" / "not-listed")
    planted.run(folder / ".draft")
    (folder / "notes").mkdir()
    (folder / "notes.txt").write_text("")
    (folder / "loop").symlink_to("loop")
    assert sorted(names(list_runs(folder))) == ["deep", "first", "second", "third"]


@pytest.mark.parametrize(
    ("sort", "expected"),
    [
        ("created", ["third", "second", "first"]),
        ("name", ["first", "second", "third"]),
        ("best", ["second", "first", "third"]),
        ("model", ["second", "first", "third"]),
        ("size", ["first", "second", "third"]),
        ("state", ["first", "second", "third"]),
    ],
)
def test_they_are_sorted_and_those_without_a_value_come_last(folder, sort, expected):
    assert names(list_runs(folder, sort=sort)) == expected


def test_the_other_way_round_those_without_a_value_still_come_last(folder):
    assert names(list_runs(folder, sort="best", reverse=True)) == ["first", "second", "third"]


@pytest.mark.parametrize(
    ("condition", "expected"),
    [
        ("objective=kto", ["second"]),
        ("objective!=kto", ["first", "third"]),
        ("best<0.5", ["second"]),
        ("best >= 0.7", ["first"]),
        ("data=CALLS", ["third"]),
        ("state=failed", ["third"]),
        ("ship=yes", ["first"]),
        ("tag=tool", ["second"]),
        ("tag=", ["first", "second", "third"]),
        ("size>1kB", []),
        ("size<1GB", ["first", "second", "third"]),
    ],
)
def test_conditions_select_runs(folder, condition, expected):
    tags.add(folder / "second", "tool:1")
    assert sorted(names(list_runs(folder, where=[condition]))) == expected


def test_all_conditions_must_hold(folder):
    assert names(list_runs(folder, where=["model=smol", "state=completed"])) == ["first"]


@pytest.mark.parametrize("condition", ["", "best", "colour=red", "best<small", "name<3", "size>3 apples"])
def test_what_is_not_a_condition_is_refused(folder, condition):
    with pytest.raises(ConfigError, match="is not"):
        list_runs(folder, where=[condition])


def test_an_unknown_sort_or_folder_is_refused(folder):
    with pytest.raises(ConfigError, match="cannot sort by 'colour'"):
        list_runs(folder, sort="colour")
    with pytest.raises(DataError, match="there is no such folder"):
        list_runs(folder / "none")
    with pytest.raises(DataError, match="is not a folder"):
        list_runs(folder / "first" / "manifest.json")


DAMAGE = ["", "{", "[]", "null", "\x00\xff", '{"status": 3}', '{"model": 1}', '{"tags": 1}']


@pytest.mark.parametrize("content", DAMAGE)
@pytest.mark.parametrize(
    "file", ["manifest.json", "config.yaml", "checkpoints/index.json", "report.json", "tags.json"]
)
def test_a_damaged_file_is_a_fault_and_the_rest_is_listed(folder, file, content):
    (folder / "first" / file).write_text(content, encoding="latin-1")
    assert len(list_runs(folder)) == 3
    run = registry.read(folder / "first")
    harmless = (file, content) in {
        ("checkpoints/index.json", '{"status": 3}'),
        ("checkpoints/index.json", '{"model": 1}'),
        ("checkpoints/index.json", '{"tags": 1}'),
        ("report.json", '{"status": 3}'),
        ("report.json", '{"model": 1}'),
        ("report.json", '{"tags": 1}'),
    }
    assert harmless or (len(run.faults) == 1 and file in run.faults[0]), run.faults
    result = CliRunner().invoke(app, ["runs", "--folder", str(folder)], catch_exceptions=False)
    assert result.exit_code == 0 and ("damaged" in result.stdout) is not harmless
    json.loads(CliRunner().invoke(app, ["runs", "--folder", str(folder), "--json"]).stdout)


@pytest.mark.parametrize("file", ["manifest.json", "config.yaml", "report.json", "tags.json"])
def test_a_folder_in_the_place_of_a_file_is_a_fault(folder, file):
    (folder / "first" / file).unlink(missing_ok=True)
    (folder / "first" / file).mkdir()
    assert len(registry.read(folder / "first").faults) == 1


@pytest.mark.parametrize(
    "file", ["manifest.json", "config.yaml", "checkpoints/index.json", "report.json", "tags.json"]
)
def test_a_pipe_in_the_place_of_a_file_is_a_fault(folder, file):
    (folder / "first" / file).unlink(missing_ok=True)
    os.mkfifo(folder / "first" / file)
    read: list[registry.RegisteredRun] = []
    thread = threading.Thread(target=lambda: read.append(registry.read(folder / "first")), daemon=True)
    thread.start()
    thread.join(10)
    assert read and len(read[0].faults) == 1


def test_a_pipe_in_the_place_of_the_lock_is_not_a_training(folder):
    os.mkfifo(folder / "first" / ".lock")
    trained: list[bool] = []
    thread = threading.Thread(
        target=lambda: trained.append(registry.is_training(folder / "first")), daemon=True
    )
    thread.start()
    thread.join(10)
    assert trained == [False]


def test_what_is_left_of_a_run_without_manifest_is_listed(folder):
    (folder / "first" / "manifest.json").unlink()
    run = registry.read(folder / "first")
    assert "first" in names(list_runs(folder)) and run.state is None and "manifest.json" in run.faults[0]


def test_a_run_that_a_process_trains_is_running_and_a_killed_one_died(folder):
    path = planted.run(folder / "fourth", status="running")
    with Run.open(path).lock():
        assert registry.read(path).state == "running"
    assert registry.read(path).state == "died"
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    (path / ".lock").write_text(f"process {ended.pid} on {socket.gethostname()}\n")
    assert registry.read(path).state == "died"
    (path / ".lock").write_text("process 1 on another-machine\n")
    assert registry.read(path).state == "running"


def test_listing_does_not_take_the_lock_of_a_training_that_begins(folder, monkeypatch):
    path = planted.run(folder / "fourth", status="running")
    import fcntl

    monkeypatch.setattr(fcntl, "flock", lambda *_: pytest.fail("a lock was taken"))
    registry.read(path)


def test_the_verdict_of_a_run_that_goes_on_is_not_that_of_before(folder):
    path = planted.run(folder / "fourth", status="running", report={"verdict": "Ship it", "ship": True})
    with Run.open(path).lock():
        assert registry.read(path).verdict is None
    assert registry.read(path).verdict == "Ship it"


def test_a_best_value_that_is_not_a_number_is_written_as_json_can(folder):
    planted.run(folder / "fourth", best_value=float("nan"))
    result = CliRunner().invoke(app, ["runs", "--folder", str(folder), "--json"], catch_exceptions=False)

    def refuse(name: str) -> None:
        raise AssertionError(name)

    (run,) = [run for run in json.loads(result.stdout, parse_constant=refuse) if run["name"] == "fourth"]
    assert run["best"]["value"] == "nan"


@pytest.mark.parametrize("columns", [60, 200])
def test_the_list_shows_every_run_at_any_width(folder, columns):
    from rich.console import Console

    tags.add(folder / "first", "tool:1")
    console = Console(width=columns, record=True, file=StringIO())
    screen.render(list_runs(folder), folder, console)
    text = console.export_text()
    for word in ("first", "second", "third", "large", "kto", "tool:1", "Ship it", "failed", "0.4", "3 runs"):
        assert word in text, word
    assert max(map(len, text.splitlines())) <= columns


def test_hundreds_of_runs_are_listed_in_seconds(tmp_path):
    complete = (Path(__file__).parents[1] / "fixtures/runs-0.1.0/kto/config.yaml").read_text()
    complete = complete.replace("@ROOT@", "/root")
    for number in range(300):
        path = planted.run(tmp_path / f"run{number}", steps=(1, 2, 3), best=1)
        (path / "config.yaml").write_text(complete)
    begin = time.process_time()
    assert len(list_runs(tmp_path)) == 300
    assert time.process_time() - begin < 3


def test_files_that_are_mixed_in_are_listed(folder):
    config = folder / "first" / "config.yaml"
    mix = "  mix:\n  - {path: [/data/general.jsonl], share: 0.2}\n  - {path: /data/more.jsonl, repeat: 2}\n"
    config.write_text(config.read_text().replace("objective:", f"{mix}objective:"))
    run = next(run for run in list_runs(folder) if run.name == "first")
    assert run.mixed == ("/data/general.jsonl", "/data/more.jsonl") and not run.faults
    assert run.data == ("/data/rows.jsonl",)
    out = CliRunner().invoke(app, ["runs", "show", str(folder / "first")], env={"COLUMNS": "200"}).stdout
    assert "mixed in: /data/general.jsonl" in out
