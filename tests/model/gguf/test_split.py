"""A model split into several GGUF files is the model in one; a part that is missing or foreign is named."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from gguf import GGUFReader, GGUFWriter

import tiny
import tunesmith
from gguf_files import write_gguf
from processes import cache_folder
from tunesmith.errors import ModelError
from tunesmith.model import kernels, loading
from tunesmith.model.gguf import reading

IDS = mx.array([[5, 77, 130, 9, 262, 33, 71, 12]])


@pytest.fixture(autouse=True)
def _cache(tmp_path, monkeypatch):
    kernels.missing()  # compiled before, in the cache of all tests
    monkeypatch.setenv("TUNESMITH_CACHE", str(cache_folder(tmp_path / "cache")))


def split(path: Path, folder: Path, most_tensors: int, small_first: bool = False) -> list[Path]:
    """The file written again by the gguf package, in parts of at most so many tensors."""
    folder.mkdir()
    reader = GGUFReader(path)
    writer = GGUFWriter(
        folder / "m.gguf", "llama", split_max_tensors=most_tensors, small_first_shard=small_first
    )
    for field in reader.fields.values():
        if not field.name.startswith("GGUF.") and field.name != "general.architecture":
            inner = field.types[-1] if len(field.types) > 1 else None
            writer.add_key_value(field.name, field.contents(), field.types[0], inner)
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return sorted(folder.iterdir())


def logits(path: Path) -> np.ndarray:
    return np.array(loading.load(loading.ModelSpec(path=str(path))).net(IDS).astype(mx.float32))


@pytest.fixture
def whole(tmp_path, tiny_model) -> Path:
    return write_gguf(tmp_path / "whole.gguf", tiny_model, "Q8_0")


def test_a_header_is_what_the_librarys_own_reader_reads(whole):
    ours, theirs = reading.Reader(whole), GGUFReader(whole)
    assert type(ours.data) is np.ndarray and type(theirs.data) is np.memmap  # else ours is not needed
    assert list(ours.fields) == list(theirs.fields)
    for field in theirs.fields.values():
        assert ours.fields[field.name].contents() == field.contents()
        assert ours.fields[field.name].types == field.types
    assert [tensor.name for tensor in ours.tensors] == [tensor.name for tensor in theirs.tensors]
    for own, other in zip(ours.tensors, theirs.tensors, strict=True):
        assert np.array_equal(own.data, other.data) and own.tensor_type == other.tensor_type


@pytest.mark.parametrize("small_first", [False, True])
def test_the_parts_are_the_model_in_one_file(small_first, whole, tmp_path):
    parts = split(whole, tmp_path / "parts", 7, small_first=small_first)
    assert len(parts) == (4 if small_first else 3)
    assert parts[0].name == f"m-00001-of-{len(parts):05}.gguf"
    assert np.array_equal(logits(parts[0]), logits(whole))


def test_any_change_of_a_part_is_another_model(whole, tmp_path, tiny_model):
    parts = split(whole, tmp_path / "parts", 7)
    first = loading.resolve(str(parts[0]), dtype="float32")
    assert loading.resolve(str(parts[0]), dtype="float32") == first
    other = tmp_path / "other"
    shutil.copytree(tiny_model, other)
    tiny.write_model(other, json.loads((other / "config.json").read_text())["vocab_size"], seed=9)
    changed = split(write_gguf(tmp_path / "other.gguf", other, "Q8_0"), tmp_path / "others", 7)
    shutil.copy(changed[2], parts[2])
    assert loading.resolve(str(parts[0]), dtype="float32") != first


def test_a_missing_part_is_named(whole, tmp_path):
    parts = split(whole, tmp_path / "parts", 7)
    parts[1].unlink()
    with pytest.raises(ModelError, match=r"1 of 3 parts of the model are missing:\n  m-00002-of-00003\.gguf"):
        logits(parts[0])


def test_a_later_part_names_the_first(whole, tmp_path):
    parts = split(whole, tmp_path / "parts", 7)
    with pytest.raises(ModelError, match="is part 2 of 3 of a model") as refused:
        logits(parts[1])
    assert refused.value.hint == f"give the first: {parts[0]}"


def test_parts_of_different_models_are_not_joined(whole, tmp_path):
    parts = split(whole, tmp_path / "parts", 7)
    others = split(whole, tmp_path / "others", 8)
    shutil.copy(others[1], parts[1])
    with pytest.raises(ModelError, match="has a tensor twice in its parts"):
        logits(parts[0])
    shutil.copy(parts[2], parts[1])
    with pytest.raises(ModelError, match="says that it is part 3 of 3"):
        logits(parts[0])


def test_a_renamed_part_says_how_parts_are_named(whole, tmp_path):
    parts = split(whole, tmp_path / "parts", 7)
    alone = parts[0].rename(parts[0].with_name("model.gguf"))
    with pytest.raises(ModelError, match="is one of 3 parts of a model") as refused:
        logits(alone)
    assert "model-00001-of-00003.gguf: give the first" in refused.value.hint


def test_a_split_base_is_trained_and_exported_as_one_file(whole, tmp_path):
    parts = split(whole, tmp_path / "parts", 7)
    rows = tiny.write_rows(tmp_path / "rows.jsonl", tiny.conversations(12))
    sets = ["loop.steps=3", "optimizer.learning_rate=0.01"]
    config = tunesmith.configure(model=str(parts[0]), data=[str(rows)], sets=sets)
    run = tunesmith.train(config, out=tmp_path / "run")
    exported = tunesmith.export(run.path, to="gguf-f32", rows=2)
    assert (exported.own_reading or exported.distances).mean < 1e-6
    (file,) = exported.path.glob("*.gguf")
    assert not [name for name in GGUFReader(file).fields if name.startswith("split.")]
