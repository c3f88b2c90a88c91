"""A folder in mlx-lm's layout: train is trained on, valid is held out, test is neither, and all of it is
said."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import tunesmith
from tunesmith import events
from tunesmith.data import folders


def fill(folder: Path, *names: str) -> Path:
    for name in names:
        file = folder / name
        file.parent.mkdir(parents=True, exist_ok=True)
        stem = name.replace("/", " ")
        file.write_text("".join(json.dumps({"text": f"the cat {stem} {n}"}) + "\n" for n in range(3)))
    return folder


def settings(model: Path, folder: Path, *sets: str):
    return tunesmith.configure(model=str(model), data=[str(folder)], sets=["loop.steps=1", *sets])


def test_train_is_trained_on_and_valid_held_out(tmp_path, tiny_model):
    folder = fill(tmp_path / "data", "train.jsonl", "valid.jsonl", "test.jsonl")
    resolved = settings(tiny_model, folder)
    assert resolved.spec.data.train == (str(folder / "train.jsonl"),)
    assert resolved.spec.data.valid == (str(folder / "valid.jsonl"),)
    assert resolved.origins["data.valid"] == f"the files of {folder}"
    assert resolved.notes == (
        f"{folder}: train.jsonl to train on; valid.jsonl held out, instead of a share of the training rows; "
        f"test.jsonl not trained on: tunesmith evaluate RUN --data {folder / 'test.jsonl'}",
    )


def test_the_parts_of_a_folder_are_information_and_no_warning(tmp_path, tiny_model):
    resolved = settings(tiny_model, fill(tmp_path / "data", "train.jsonl", "valid.jsonl"))
    heard: list[events.Event] = []
    tunesmith.plan(resolved, notify=heard.append)
    rendered, _ = tunesmith.show([str(tmp_path / "data")], model=str(tiny_model), notify=heard.append)
    tunesmith.train(resolved, out=tmp_path / "run", notify=heard.append)
    said = [event for event in heard if isinstance(event, events.Notice) and event.what == resolved.notes[0]]
    assert [(event.level, event.where) for event in said] == [("info", "data.train")] * 3
    assert resolved.notes[0] not in rendered.notes


@pytest.mark.parametrize(
    ("names", "train", "valid", "test"),
    [
        (["train.jsonl", "validation.jsonl"], ["train.jsonl"], ["validation.jsonl"], []),
        (["train.jsonl", "test.jsonl"], ["train.jsonl"], [], ["test.jsonl"]),
        (
            ["train-00000-of-00002.json", "train-00001-of-00002.json", "Test-00000-of-00001.json"],
            ["train-00000-of-00002.json", "train-00001-of-00002.json"],
            [],
            ["Test-00000-of-00001.json"],
        ),
        (
            ["sub/train.jsonl", "sub/dev.jsonl", "more.jsonl"],
            ["more.jsonl", "sub/train.jsonl"],
            ["sub/dev.jsonl"],
            [],
        ),
        (
            ["train-00000-of-00001-a09b74b3ef9c3b56.json", "test-00000-of-00001-5b0c34a1f0e2d977.json"],
            ["train-00000-of-00001-a09b74b3ef9c3b56.json"],
            [],
            ["test-00000-of-00001-5b0c34a1f0e2d977.json"],
        ),
        (
            ["data/train_sft-00000-of-00001.json", "data/test_sft-00000-of-00001.json"],
            ["data/train_sft-00000-of-00001.json"],
            [],
            ["data/test_sft-00000-of-00001.json"],
        ),
        (
            ["en/train/0.jsonl", "en/validation/part/0.jsonl", "en/test/test.jsonl"],
            ["en/train/0.jsonl"],
            ["en/validation/part/0.jsonl"],
            ["en/test/test.jsonl"],
        ),
    ],
)
def test_siblings_of_the_layout(tmp_path, names, train, valid, test):
    fill(tmp_path, *names)
    parts = folders.parts([str(tmp_path)])
    assert parts is not None
    found = [[str(Path(file).relative_to(tmp_path)) for file in side] for side in parts[:3]]
    assert found == [train, valid, test]


@pytest.mark.parametrize(
    "names",
    [["a.jsonl", "b.jsonl"], ["train.jsonl", "more.jsonl"], ["valid.jsonl"], ["test.jsonl", "x.jsonl"]],
)
def test_other_folders_are_read_whole(tmp_path, tiny_model, names):
    folder = fill(tmp_path / "data", *names)
    resolved = settings(tiny_model, folder)
    assert resolved.spec.data.train == (str(folder),) and resolved.notes == ()


def test_a_file_that_is_none_of_the_parts_is_not_read_and_named(tmp_path, tiny_model):
    folder = fill(tmp_path / "data", "train.jsonl", "valid.jsonl", "notes.jsonl")
    (note,) = settings(tiny_model, folder).notes
    assert "notes.jsonl not read" in note


def test_files_in_folders_named_as_parts_are_told_with_their_folder(tmp_path, tiny_model):
    folder = fill(tmp_path / "data", "train/0.jsonl", "test/0.jsonl")
    (note,) = settings(tiny_model, folder).notes
    assert "train/0.jsonl to train on; test/0.jsonl not trained on" in note


def test_held_out_files_that_are_named_stay(tmp_path, tiny_model):
    folder = fill(tmp_path / "data", "train.jsonl", "valid.jsonl")
    other = fill(tmp_path / "other", "mine.jsonl") / "mine.jsonl"
    resolved = settings(tiny_model, folder, f"data.valid={other}")
    assert resolved.spec.data.valid == (str(other),)
    assert "valid.jsonl neither trained on nor held out" in resolved.notes[0]
    nothing = settings(tiny_model, folder, "data.valid=0")
    assert nothing.spec.data.valid == 0 and nothing.spec.data.train == (str(folder / "train.jsonl"),)
    named = settings(tiny_model, folder, f"data.valid={folder / 'valid.jsonl'}")
    assert "neither" not in named.notes[0]


def test_a_run_counts_only_the_rows_of_train_and_valid(tmp_path, tiny_model):
    folder = fill(tmp_path / "data", "train.jsonl", "valid.jsonl", "test.jsonl")
    heard = []
    counts = tunesmith.plan(
        settings(tiny_model, folder, "audit.before_training=false"), notify=heard.append
    ).counts
    assert (counts["rows_train"], counts["rows_valid"], counts["rows_read"]) == (3, 3, 6)
    assert any("test.jsonl not trained on" in getattr(notice, "what", "") for notice in heard)


def test_tables_beside_json_of_the_same_name_are_told_with_their_number(tmp_path, tiny_model):
    folder = fill(tmp_path / "data", "a.jsonl", "b.jsonl", "sub/c.jsonl")
    for name in ("a.csv", "b.csv", "c.csv"):  # the last is not beside c.jsonl
        (folder / name).write_text("text\nthe cat\n")
    text = f"{folder}: 2 tables not read, beside JSON of the same name (a.csv, b.csv): name them to read them"
    assert settings(tiny_model, folder).notes == (text,)
    told: list[str] = []
    tunesmith.plan(settings(tiny_model, folder), notify=lambda event: told.append(getattr(event, "what", "")))
    assert text in told
    (folder / "a.csv").unlink()
    assert "1 table not read" in settings(tiny_model, folder).notes[0]
    (folder / "b.csv").unlink()
    assert settings(tiny_model, folder).notes == ()
