from __future__ import annotations

import json
from dataclasses import replace

import pytest

from tunesmith.errors import EvaluationError
from tunesmith.runs import records
from tunesmith.runs.records import ExampleRecord, Record, Score


@pytest.fixture
def record(tmp_path) -> Record:
    return Record(
        folder=tmp_path / "evals" / "tool_calls@2+first5",
        task="tool_calls",
        version="2",
        checkpoint="000004",
        family=("first5",),
        at=12.5,
        identity="1d" * 8,
        settings={"limit": 5, "benchmarks": []},
        base="ba" * 8,
        data=("/data/rows.jsonl",),
        n=2,
        seconds={"base": None, "tuned": 1.5},
        kept={"base": False, "tuned": True},
        scores=(Score("tool_calls", "2", "right", 0.5, 0.1, 0.9, 2, sources=(1, 1, 0), headline=True),),
    )


EXAMPLES = [
    ExampleRecord("rows.jsonl:1", 1.0, "a\u2028b", "c", 1.0, {"cut": True}, "c", 0.0, {}, "d", "improved"),
    ExampleRecord("rows.jsonl:2", 1.0, None, None, 0.0, {}, None),
]


def test_what_is_written_is_read_back(record, tmp_path):
    records.write(record, EXAMPLES)
    assert records.read(tmp_path) == ([record], [])
    assert list(record.examples()) == EXAMPLES
    assert [example.cut for example in EXAMPLES] == [True, False]
    assert (record.variant, record.limit, record.run_dir, record.comparable) == ("+first5", 5, tmp_path, True)


def test_the_files_are_those_of_0_1_0(record):
    """Key by key and in order; ``unseen`` only where files were given, the base's keys only with a base."""
    names = ["task", "version", "checkpoint", "family", "at", "identity", "settings", "base", "data"]
    for unseen, more in ((None, []), (False, ["unseen"])):
        records.write(replace(record, unseen=unseen), EXAMPLES)
        content = json.loads((record.folder / "score.json").read_text())
        assert list(content) == [*names, *more, "n", "seconds", "kept", "scores"]
    lines = [json.loads(line) for line in (record.folder / "examples.jsonl").read_bytes().splitlines()]
    own = ["source", "units", "prompt", "reference", "tuned", "tuned_detail", "tuned_answer"]
    assert list(lines[0]) == [*own, "base", "base_detail", "base_answer", "change"]
    assert list(lines[1]) == own


def test_new_scores_leave_the_rest_as_it_was_written(record, tmp_path):
    records.write(record, EXAMPLES)
    path = record.folder / "score.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"later": "a key of another release"}))
    before = path.read_bytes()
    (known,), _ = records.read(tmp_path)
    records.write_scores(known, known.scores)
    assert path.read_bytes() == before
    records.write_scores(known, [replace(known.scores[0], verdict="improved")])
    content = json.loads(path.read_text())
    assert content["later"] == "a key of another release" and content["scores"][0]["verdict"] == "improved"


def test_a_record_of_an_earlier_release_has_defaults_for_what_it_lacks(tmp_path):
    folder = tmp_path / "evals" / "tool_calls@1"
    folder.mkdir(parents=True)
    score = {
        "task": "tool_calls",
        "version": "1",
        "name": "right",
        "value": 0.75,
        "low": 0.5,
        "high": 0.9,
        "n": 40,
    }
    (folder / "score.json").write_text(json.dumps({"checkpoint": "000060", "scores": [score]}))
    (folder / "examples.jsonl").write_text('{"source": "a:1", "units": 1, "tuned": 1, "tuned_detail": {}}\n')
    ((found,), unreadable) = records.read(tmp_path)
    assert (found.task, found.version, found.family, found.comparable) == ("tool_calls", "1", None, False)
    assert found.scores == (Score(**score),) and not unreadable
    assert list(found.examples()) == [ExampleRecord("a:1", 1.0, None, None, 1.0, {}, None)]


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"scores": [{"name": "right"}]}'])
def test_what_cannot_be_read_is_an_error_beside_the_records_that_can(record, tmp_path, content):
    records.write(record, EXAMPLES)
    torn = tmp_path / "evals" / "adherence@1" / "score.json"
    torn.parent.mkdir()
    torn.write_text(content)
    found, (error,) = records.read(tmp_path)
    assert found == [record]
    assert str(error).startswith(f"{torn}: cannot be read: ") and "tunesmith evaluate" in str(error.hint)


@pytest.mark.parametrize("line", ["{", "3", '{"source": "a:1"}', '{"units": "x", "tuned": 1, "source": "a"}'])
def test_a_torn_example_is_an_error_with_its_line(record, line):
    records.write(record, EXAMPLES)
    with (record.folder / "examples.jsonl").open("a") as file:
        file.write(line)
    with pytest.raises(EvaluationError, match=r"examples\.jsonl:3: cannot be read"):
        list(record.examples())
