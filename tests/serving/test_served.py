"""What is served, and what is refused: everything as it was trained and evaluated."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

import tiny
import tunesmith
from tunesmith.errors import ConfigError, DataError
from tunesmith.serving.rejections import UnknownModel
from tunesmith.serving.served import NamedRun, open_models

SETS = ["loop.steps=1", "audit.before_training=false", "loop.samples=0", "data.valid=0"]


def trained(folder: Path, model: Path, *sets: str) -> NamedRun:
    data = tiny.write_rows(folder.with_suffix(".jsonl"), tiny.conversations(8))
    tunesmith.train(tunesmith.configure(model=str(model), data=[str(data)], sets=[*SETS, *sets]), out=folder)
    return NamedRun(str(folder))


@pytest.fixture(scope="module")
def full(tmp_path_factory, tiny_model) -> NamedRun:
    return trained(tmp_path_factory.mktemp("full") / "whole", tiny_model, "adapter.kind=full")


def named(path: Path | str, name: str | None = None) -> NamedRun:
    return NamedRun(str(path), name)


@pytest.mark.parametrize(
    ("text", "path", "name"),
    [
        ("runs/a", "runs/a", None),
        ("writer=runs/a", "runs/a", "writer"),
        ("mytool:2", "mytool:2", None),
        ("runs/a=b", "runs/a=b", None),
        ("=x", "=x", None),
        ("x=", "x=", None),
    ],
)
def test_a_run_may_be_given_a_name(text, path, name):
    assert NamedRun.parse(text) == NamedRun(path, name)


def test_a_folder_with_an_equals_sign_is_a_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a=b").mkdir()
    assert NamedRun.parse("a=b") == NamedRun("a=b")


def test_a_run_answers_to_its_name_its_tags_and_its_path(served_runs, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(served_runs["writer"], copy)
    (copy / "tags.json").write_text(json.dumps({"tags": ["tool:1", "tool:best"]}))
    models = open_models([named(copy, "mine"), named(served_runs["caller"])])
    for name in ("mine", "tool:1", "tool:best", str(copy), None):
        assert models.resolve(name) is models.entries[0]
    assert models.resolve("base") is models.resolve("tiny-llama") is models.base
    with pytest.raises(UnknownModel, match="copy"):
        models.resolve("copy")


def test_the_same_weights_have_the_same_digest(served_runs, tmp_path):
    shutil.copytree(served_runs["writer"], tmp_path / "again")
    models = open_models([named(path) for path in (*served_runs.values(), tmp_path / "again")])
    writer, caller, again = (models.by_name[name].digest for name in ("writer", "caller", "again"))
    assert writer == again != caller
    assert len({writer, caller, models.resolve("base").digest}) == 3


def test_the_renderer_is_that_of_the_run(served_runs):
    from tunesmith.runs import opening

    models = open_models([named(served_runs["writer"])])
    expected = opening.find(served_runs["writer"]).open().renderer
    assert models.entries[0].renderer.fingerprint == expected.fingerprint


def test_a_run_of_another_base_is_refused_with_the_reason(served_runs, tmp_path):
    folder = tmp_path / "other"
    folder.mkdir()
    tiny.write_model(folder, tiny.write_tokenizer(folder), seed=1)
    other = trained(tmp_path / "elsewhere", folder)
    with pytest.raises(ConfigError, match="another base"):
        open_models([named(served_runs["writer"]), other])


def test_a_run_whose_base_was_held_otherwise_is_refused(served_runs, tmp_path, tiny_model):
    quantised = trained(tmp_path / "quantised", tiny_model, "model.quantize=4", "model.group_size=32")
    with pytest.raises(ConfigError, match=r"model\.quantize=4"):
        open_models([named(served_runs["writer"]), quantised])
    assert open_models([quantised]).entries[0].name == "quantised"


def test_whole_weights_are_served_alone(full, served_runs):
    models = open_models([full])
    assert [served.name for served in models.entries] == ["whole"]
    assert models.entries[0].adapter is None and models.base is None
    for targets in ([full, named(served_runs["writer"])], [named(served_runs["writer"]), full]):
        with pytest.raises(ConfigError, match="whole modules"):
            open_models(targets)


def test_two_models_cannot_have_one_name(served_runs):
    writer, caller = served_runs.values()
    for targets in ([named(writer, "a"), named(caller, "a")], [named(writer, "base")]):
        with pytest.raises(ConfigError, match="name"):
            open_models(targets)


def test_a_plain_model_is_served_alone(tiny_model, served_runs):
    for models in (open_models([named(tiny_model)]), open_models([], model=str(tiny_model))):
        assert [served.names for served in models.entries] == [("tiny-llama", "base")]
    for targets in (
        [named(tiny_model), named(served_runs["writer"])],
        [named(served_runs["writer"]), named(tiny_model)],
    ):
        with pytest.raises(ConfigError):
            open_models(targets)
    with pytest.raises(ConfigError, match="nothing"):
        open_models([])
    with pytest.raises(DataError):
        open_models([named("runs/nobody")])
