"""A run that was trained is listed, and its tag serves every verb that asks a run."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

import tiny
from tunesmith.cli import app


@pytest.fixture(scope="module")
def place(tmp_path_factory, tiny_model) -> Path:
    """A folder with ``runs/first``, tagged tool:1."""
    folder = tmp_path_factory.mktemp("register")
    tiny.write_rows(folder / "rows.jsonl", tiny.conversations(24))
    (folder / "model").symlink_to(tiny_model)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        verb("train --model model --data rows.jsonl --set loop.steps=2 --out runs/first")
        verb("tag runs/first tool:1")
    return folder


@pytest.fixture(autouse=True)
def inside(place, monkeypatch) -> None:
    monkeypatch.chdir(place)


def verb(line: str, input: str = "") -> str:
    result = CliRunner().invoke(app, line.split(), input=input, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.stdout


def test_a_trained_run_is_listed_without_a_fault(place):
    (run,) = json.loads(verb("runs --json --where tag=tool:1"))
    assert (run["name"], run["objective"], run["state"], run["faults"]) == ("first", "sft", "completed", [])
    assert run["best"]["metric"] == "validation loss" and "loss" in run["verdict"]
    assert run["data"] == [str((place / "rows.jsonl").resolve())]


@pytest.mark.parametrize(
    "line",
    [
        "generate tool:1 --prompt hello --max-tokens 2",
        "chat tool:1 --max-tokens 2",
        "evaluate tool:1 --task perplexity --limit 2",
        "report tool:1",
        "watch tool:1 --once",
        "export tool:1 --to mlx --rows 2",
        "train --resume tool:1",
        "runs show tool:1",
    ],
)
def test_a_tag_serves_where_a_run_is_asked(line):
    verb(line)


def test_a_tag_serves_as_the_start_of_another_run_and_both_are_compared(place):
    train = "train --model model --data rows.jsonl --set loop.steps=2"
    verb(f"{train} --set adapter.start=tool:1 --out runs/second")
    assert str(place / "runs" / "first") in (place / "runs" / "second" / "config.yaml").read_text()
    shown = json.loads(verb("runs show tool:1 --json"))
    assert [child["path"] for child in shown["used_by"]] == ["runs/second"]
    assert "nothing under the current folder" in verb("runs show runs/second")
    verb("compare tool:1 runs/second")
    verb(f"{train} --dry-run --set model.adapter=tool:1")
