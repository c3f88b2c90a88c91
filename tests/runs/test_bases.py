"""A GGUF file and the folders that it was converted to are told as one base."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

import tiny
import tunesmith
from gguf_files import write_gguf
from tunesmith import events
from tunesmith.errors import ModelError
from tunesmith.model import kernels, loading
from tunesmith.model.gguf import source
from tunesmith.runs import bases
from tunesmith.runs.directory import Run
from tunesmith.runs.registry import list_runs


def train(folder: Path, model: Path, *sets: str) -> Path:
    rows = folder.parent.parent / "rows.jsonl"
    if not rows.exists():
        tiny.write_rows(rows, tiny.conversations(24))
    sets = ("loop.steps=2", "data.valid=0.25", "adapter.rank=2", "loop.samples=0", *sets)
    tunesmith.train(tunesmith.configure(model=str(model), data=[str(rows)], sets=list(sets)), out=folder)
    return folder


@pytest.fixture(scope="module")
def runs(tmp_path_factory, tiny_model) -> Iterator[dict[str, Path]]:
    """Runs on a GGUF file, on the folder that it was converted to, and on the file in another dtype."""
    folder = tmp_path_factory.mktemp("bases")
    file = write_gguf(folder / "base.gguf", tiny_model)
    kernels.missing()  # compiled before, in the cache of all tests
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TUNESMITH_CACHE", str(folder / "cache"))
        made = {"file": train(folder / "runs" / "file", file)}
        converted = loading.resolve(str(file), dtype="auto")
        made["folder"] = train(folder / "runs" / "folder", converted)
        made["half"] = train(folder / "runs" / "half", file, "model.dtype=float16")
        yield made


def test_the_list_and_the_comparison_name_the_file(runs, tmp_path):
    file = runs["file"].parent.parent / "base.gguf"
    assert {run.model for run in list_runs(runs["file"].parent)} == {str(file)}
    compared = tunesmith.compare([runs["file"], runs["folder"]], out=tmp_path / "comparison")
    assert not {"model.path", "base"} & {row.key for row in (*compared.settings, *compared.others)}
    assert Run(runs["folder"]).config.model.path != str(file)


def test_they_are_composed(runs, tmp_path):
    notices: list[events.Event] = []
    weights = {path: 1.0 for path in runs.values()}
    tunesmith.compose(weights, out=tmp_path / "mixed", notify=notices.append)
    told = [notice.what for notice in notices if isinstance(notice, events.Notice)]
    assert "the sources were trained on one GGUF file in other dtypes: that of file is used" in told
    assert len(tunesmith.generate(tmp_path / "mixed", ["my note"], max_tokens=2)) == 1


def test_a_folder_whose_weights_were_replaced_is_another_base(runs, tmp_path):
    converted = Path(Run(runs["folder"]).config.model.path)
    changed = shutil.copytree(converted, tmp_path / "changed")
    tiny.write_model(changed, 320, seed=9)
    assert source.read(changed) is not None
    stranger = train(tmp_path / "runs" / "stranger", changed)
    assert bases.named(str(changed), Run(stranger).hashes["base"]) == str(changed)
    with pytest.raises(ModelError, match="another base than"):
        tunesmith.compose({runs["half"]: 1.0, stranger: 1.0}, out=tmp_path / "out")


def test_an_adapter_that_was_merged_into_it_makes_another_base(runs, tmp_path):
    file = runs["half"].parent.parent / "base.gguf"
    above = train(tmp_path / "runs" / "above", file, f"model.adapter={runs['file']}")
    assert not bases.are_same(Run(above), Run(runs["file"]))
    assert bases.are_same(Run(runs["half"]), Run(runs["file"]))
