"""Writing a merged model holds one tensor at a time, and says how far it is."""

from __future__ import annotations

import json
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import mlx.core as mx
import pytest
from safetensors.numpy import load_file, save_file

import tiny
import tunesmith
from tunesmith import events
from tunesmith.errors import ExportError
from tunesmith.events import Event, Working
from tunesmith.exports import gate, kind
from tunesmith.runs import checkpoints, opening
from tunesmith.runs.directory import Run

LAYERS, WIDTH = 10, 128
LARGEST = 4 * 2 * WIDTH * WIDTH
"""Bytes of the largest tensor in float32."""


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("deep")
    tiny.write_model(folder, tiny.write_tokenizer(folder), layers=LAYERS, hidden=WIDTH)
    return folder


def train(folder: Path, model: Path, *sets: str) -> Path:
    rows = tiny.write_rows(folder / "rows.jsonl", tiny.conversations(12))
    sets = ("loop.steps=2", "optimizer.learning_rate=0.01", *sets)
    tunesmith.train(
        tunesmith.configure(model=str(model), data=[str(rows)], sets=list(sets)), out=folder / "run"
    )
    return folder / "run"


def write(run: Path, name: str, folder: Path) -> int:
    """Write the artefact; returns the most bytes that MLX held beside those held before."""
    folder.mkdir()
    opened, chosen = Run.open(run), kind.named(name)
    mx.clear_cache()
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    source = opening.of_run(opened, checkpoints.choose(opened, "last"))
    tuned, _ = gate.prepared(source, 2, events.silent)
    chosen.accepts(tuned)
    gate.write(chosen, tuned, folder, events.silent)
    return mx.get_peak_memory() - before


@pytest.mark.parametrize(
    "sets",
    [
        ("adapter.targets=all-linear", "adapter.rank=2"),
        ("adapter.targets=all-linear", "adapter.rank=2", "adapter.kind=dora"),
        ("adapter.kind=full", 'adapter.targets="*"'),
        ("adapter.targets=all-linear", "adapter.rank=2", "model.quantize=8"),
    ],
    ids=["lora", "dora", "full", "quantised"],
)
def test_one_tensor_is_held_at_a_time(sets, model, tmp_path):
    run = train(tmp_path, model, *sets)
    total = sum(file.stat().st_size for file in model.glob("*.safetensors"))
    assert total > 40 * LARGEST
    for name in ("hf", "gguf-f32", "gguf-q8_0"):
        assert write(run, name, tmp_path / name) < 8 * LARGEST, name


def test_an_adapter_that_is_merged_into_the_base_is_merged_one_tensor_at_a_time(model, tmp_path):
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
    first = train(tmp_path / "first", model, "adapter.targets=all-linear", "adapter.rank=2")
    second = train(tmp_path / "second", model, f"model.adapter={first}", "adapter.rank=2")
    assert write(second, "hf", tmp_path / "hf") < 8 * LARGEST


def test_a_base_in_several_files_keeps_them(tmp_path, tiny_model):
    """Their names, headers and index, and the bytes of every tensor that the adapter does not change."""
    base = tmp_path / "base"
    base.mkdir()
    tensors = load_file(tiny_model / "model.safetensors")
    for file in tiny_model.glob("*.json"):
        (base / file.name).write_bytes(file.read_bytes())
    names, places = sorted(tensors), {}
    for number in (1, 2):
        file, part = f"model-0000{number}-of-00002.safetensors", names[number - 1 :: 2]
        save_file({name: tensors[name] for name in part}, base / file, metadata={"format": "pt"})
        places |= dict.fromkeys(part, file)
    index = {"metadata": {}, "weight_map": places}
    (base / "model.safetensors.index.json").write_text(json.dumps(index))
    run = train(tmp_path, base, "adapter.targets=[q_proj]")
    out = tunesmith.export(run, to="hf", rows=2).path
    assert json.loads((out / "model.safetensors.index.json").read_text()) == index
    for file in sorted(set(places.values())):
        before, after = (base / file).read_bytes(), (out / file).read_bytes()
        start = 8 + int.from_bytes(before[:8], "little")
        assert before[:start] == after[:start] and len(before) == len(after)
        for name, entry in json.loads(before[8:start]).items():
            if name != "__metadata__":
                first, end = (start + offset for offset in entry["data_offsets"])
                assert (before[first:end] != after[first:end]) == ("q_proj" in name), name


def test_what_takes_long_is_told(tmp_path, tiny_model):
    heard: list[Event] = []
    run = train(tmp_path, tiny_model)
    tunesmith.export(run, to="hf", rows=2, notify=heard.append)
    last = {event.label: event for event in heard if isinstance(event, Working)}
    sides = ("base: rows", "live adapter: rows", "live adapter: answers")
    child = ("artefact: rows", "artefact: answers", "artefact: speed")
    assert {*sides, "tensors written", *child} <= last.keys()
    assert all(event.done == event.total > 0 for event in last.values())


@contextmanager
def files_of_at_most(size: int) -> Iterator[None]:
    """Inside, a longer file cannot be written, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("name", ["hf", "gguf-f32"])
def test_a_full_disk_is_an_error_that_leaves_nothing(name, model, tmp_path):
    run = train(tmp_path, model)
    with files_of_at_most(2 << 20), pytest.raises(ExportError, match="the disk is full"):
        tunesmith.export(run, to=name, out=tmp_path / "out", rows=2)
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".*"))
