"""The training rows that an export reads again are those that the run learned, and none that it holds out."""

from __future__ import annotations

from pathlib import Path

import pytest

import tiny
import tunesmith
from tunesmith import events
from tunesmith.data import formats
from tunesmith.data.formats import DataSpec
from tunesmith.errors import ExportError
from tunesmith.exports import fidelity, training_rows
from tunesmith.runs.directory import VALID, Run

QUICK = ["loop.steps=2", "adapter.rank=2"]


def train(folder: Path, model: Path, seed: int, *sets: str) -> Path:
    folder.mkdir()
    rows = tiny.write_rows(folder / "rows.jsonl", tiny.conversations(24, seed))
    config = tunesmith.configure(model=str(model), data=[str(rows)], sets=[*QUICK, *sets])
    tunesmith.train(config, out=folder / "run")
    return folder / "run"


@pytest.fixture(scope="module")
def mixture(tmp_path_factory, tiny_model) -> Path:
    """The second source holds out the rows of a file."""
    folder = tmp_path_factory.mktemp("sources")
    valid = tiny.write_rows(folder / "valid.jsonl", tiny.conversations(6, 2))
    first = train(folder / "one", tiny_model, 0, "data.valid=0.25", "loop.seed=3")
    second = train(folder / "two", tiny_model, 1, f"data.valid=[{valid}]")
    tunesmith.compose({str(first): 0.5, str(second): 0.5}, out=folder / "mixed")
    return folder / "mixed"


def prepared(path: Path):
    run = Run.open(path)
    return training_rows.prepare(run, run.config, "test", "", events.silent)


def prompts(path: Path) -> set[str]:
    read = formats.read([str(path)], DataSpec(train=(str(path),), valid=0.0))
    return set(map(formats.prompt_key, read.examples))


def test_rows_that_a_composed_run_holds_out_are_not_among_its_training_rows(mixture):
    made = prepared(mixture)
    held_out = prompts(mixture / VALID)
    sources = {group.source for group in made.train}
    learned = 0
    for number, place in enumerate(("one", "two")):
        path = mixture.parent / place / "rows.jsonl"
        read = formats.read([str(path)], DataSpec(train=(str(path),), valid=0.0))
        for example in read.examples:
            assert (example.source in sources) == (formats.prompt_key(example) not in held_out)
            learned += example.source in sources
        assert any(source.startswith(str(path)) for source in sources), number
    assert 24 < learned == len(made.train) < 48
    assert len(made.valid) == len((mixture / VALID).read_text().splitlines()) > 6


def test_a_composed_run_is_exported_with_its_rows(mixture, tmp_path):
    exported = tunesmith.export(mixture, to="cluster", out=tmp_path / "out", rows=2)
    rows = {side: (exported.path / "rows" / f"{side}.jsonl").read_text() for side in ("train", "valid")}
    counts = {side: len(text.splitlines()) for side, text in rows.items()}
    made = prepared(mixture)
    assert counts == {"train": len(made.train), "valid": len(made.valid)}


def test_a_training_file_of_a_source_that_changed_is_named(mixture):
    path = mixture.parent / "two" / "rows.jsonl"
    text = path.read_text()
    path.write_text(text + "\n")
    try:
        with pytest.raises(ExportError, match="changed since the run was trained") as caught:
            prepared(mixture)
        assert caught.value.where == str(path)
    finally:
        path.write_text(text)


def test_held_out_rows_of_which_none_can_be_read_are_an_error_with_their_file_and_the_cure(
    tmp_path, tiny_model
):
    run = Run.open(train(tmp_path / "one", tiny_model, 0, "data.valid=0.25"))
    (run.path / VALID).write_text('{"other": 1}\n{}\n')
    with pytest.raises(ExportError, match=r"valid\.jsonl: no row can be read\n.*valid\.jsonl:1: ") as caught:
        fidelity.examples(run, run.config, 4)
    assert caught.value.hint is not None and "delete the file" in caught.value.hint
    (run.path / VALID).unlink()
    assert len(fidelity.examples(run, run.config, 4)) == 4
