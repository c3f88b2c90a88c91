"""The renderer of a run that is opened has the run's settings and the run's date."""

from __future__ import annotations

from datetime import date
from pathlib import Path

import pytest

from tunesmith.errors import ConfigError, DataError
from tunesmith.runs import directory, manifest, opening
from tunesmith.runs.config import RunConfig
from tunesmith.runs.directory import Run


def created(folder: Path, facts: dict[str, str]) -> Run:
    config = {
        "model": {"path": "model"},
        "data": {"train": ("rows.jsonl",), "text_control": "letters"},
        "template": {"text_end": "turn", "words_beside_calls": "drop_words"},
    }
    hashes = {"data": {"rows.jsonl": "d1"}, "template": "7e", "base": "ba"}
    return Run.create(folder / "run", RunConfig.model_validate(config), {}, {"hashes": hashes, **facts})


def test_its_renderer_follows_its_settings(tmp_path, tiny_model):
    renderer = opening.renderer_of(created(tmp_path, {}), tiny_model)
    assert renderer.ends_text_as_turn
    assert (renderer.words_beside_calls, renderer.text_control) == ("drop_words", "letters")


@pytest.mark.parametrize("facts", [{"day": "2025-01-02"}, {}], ids=["recorded", "older"])
def test_its_date_is_the_recorded_one_else_that_of_its_creation(tmp_path, facts):
    run = created(tmp_path, {"created": "2025-01-03T00:00:01+00:00", **facts})
    assert manifest.recorded(run).day == date(2025, 1, 2 if facts else 3)


def test_a_date_that_is_not_one_is_named(tmp_path):
    run = created(tmp_path, {"day": "the second"})
    with pytest.raises(DataError, match="'the second' is not a date") as caught:
        manifest.recorded(run)
    assert caught.value.where == str(run.path / "manifest.json") and caught.value.hint == directory.RESTORE


def test_the_manifest_holds_the_date_of_the_template(tmp_path):
    config = RunConfig.model_validate({"model": {"path": "model"}, "data": {"train": ("rows.jsonl",)}})
    assert manifest.facts(config, {}, day=date(2025, 1, 2))["day"] == "2025-01-02"


def test_a_mistyped_run_is_not_looked_up_on_the_hub(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "experiments").mkdir()
    for target in ("runs/nosuch", "./runs/nosuch", "runs/nosuch/checkpoints/000010"):
        with pytest.raises(DataError, match="is not a run\nhint: tunesmith runs lists the runs"):
            opening.find(target)
    with pytest.raises(DataError, match="is neither a run nor a model here") as caught:
        opening.find("experiments/nosuch")
    assert "tunesmith runs --folder experiments" in str(caught.value)
    for target in ("owner/name", "experiments/model.gguf", "/nowhere/model", "gpt2"):
        assert opening.find(target).model.path == target


@pytest.mark.parametrize("damage", ["", "- a", "model: [", "{}", "folder"])
def test_settings_of_a_run_that_are_damaged_are_told_with_what_to_do(tmp_path, damage):
    run = created(tmp_path, {})
    file = run.path / "config.yaml"
    file.unlink()
    if damage == "folder":
        file.mkdir()
    else:
        file.write_text(damage)
    with pytest.raises(ConfigError) as caught:
        _ = run.config
    assert str(file) in str(caught.value) and caught.value.hint
