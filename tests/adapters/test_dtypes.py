"""``adapter.dtype``: low-rank matrices in 16 bits, with all sums in float32."""

from __future__ import annotations

import shutil
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file

import tiny
import tunesmith
from tunesmith.adapters import files
from tunesmith.model import loading
from tunesmith.model.loading import ModelSpec
from tunesmith.runs import checkpoints
from tunesmith.runs.directory import Run
from tunesmith.training import reference

SETS = [
    "loop.steps=6",
    "batch.sequences=4",
    "batch.micro=2",
    "adapter.rank=4",
    "adapter.dropout=0.1",
    "optimizer.learning_rate=0.01",
    "optimizer.weight_decay=0.01",
    "loop.validate_every=0",
    "loop.samples=0",
    "loop.save_every=1",
    "loop.keep_last=99",
    "audit.before_training=false",
]
SHORT = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}


@pytest.fixture(scope="module")
def rows(tmp_path_factory) -> Path:
    return tiny.write_rows(tmp_path_factory.mktemp("rows") / "rows.jsonl", tiny.conversations(16))


def train(model: Path, rows: Path, out: Path, *sets: str) -> Run:
    settings = tunesmith.configure(model=str(model), data=[str(rows)], sets=[*SETS, *sets])
    tunesmith.train(settings, out=out)
    return Run.open(out)


@pytest.fixture(scope="module")
def runs(tmp_path_factory, tiny_model, rows) -> dict[str, Run]:
    folder = tmp_path_factory.mktemp("dtypes")
    return {dtype: train(tiny_model, rows, folder / dtype, f"adapter.dtype={dtype}") for dtype in SHORT}


def last(run: Run) -> Path:
    return checkpoints.choose(run, "last")


def dtypes(path: Path) -> dict[str, str]:
    with safe_open(path, framework="numpy") as file:
        return {name: file.get_slice(name).get_dtype() for name in file.keys()}


def tensors(run: Run) -> dict[str, np.ndarray]:
    loaded = files.read_tensors(last(run) / files.WEIGHTS)
    return {name: np.array(value.astype(mx.float32)) for name, value in loaded.items()}


@pytest.mark.parametrize("dtype", SHORT)
def test_weights_are_saved_in_the_dtype_and_the_optimizer_in_float32(runs, dtype):
    assert set(dtypes(last(runs[dtype]) / files.WEIGHTS).values()) == {SHORT[dtype]}
    state = load_file(last(runs[dtype]) / "optimizer.safetensors")
    moments = [value for value in state.values() if value.ndim == 2]
    assert moments and {value.dtype for value in moments} == {np.dtype(np.float32)}


def test_each_dtype_trains_near_the_others_and_to_other_bits(runs):
    exact = tensors(runs["float32"])
    for dtype, step in (("bfloat16", 2**-8), ("float16", 2**-11)):
        rounded = tensors(runs[dtype])
        far = max(float(np.abs(rounded[name] - exact[name]).max()) for name in exact)
        assert step * 0.01 < far < 0.05, (dtype, far)
        assert all(np.abs(value).max() > 0 for value in rounded.values())


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_16_bit_run_is_resumed_to_the_byte(runs, tmp_path, dtype):
    died = Run.open(shutil.copytree(runs[dtype].path, tmp_path / "died"))
    for step in died.checkpoints():
        if step > 2:
            shutil.rmtree(died.checkpoint(step))
    died.mark("running")
    tunesmith.train(resume=died.path)
    for name in (files.WEIGHTS, "optimizer.safetensors"):
        assert (last(died) / name).read_bytes() == (last(runs[dtype]) / name).read_bytes()


def test_references_of_a_rounded_start_have_another_name(runs, tiny_model, rows):
    loaded = loading.load(ModelSpec(path=str(tiny_model)))

    def name(*sets: str) -> str:
        settings = tunesmith.configure(model=str(tiny_model), data=[str(rows)], sets=[*SETS, *sets])
        return reference.name(reference.facts(settings.spec, loaded))

    start = f"adapter.start={last(runs['float32'])}"
    assert name(start) != name(start, "adapter.dtype=bfloat16")
    assert name() == name("adapter.dtype=bfloat16")  # the adapter changes nothing before training


@pytest.mark.parametrize("dtype", SHORT)
def test_what_is_loaded_is_what_was_saved(runs, tiny_model, tmp_path, dtype):
    loaded = loading.load(ModelSpec(path=str(tiny_model)))
    spec = files.load(loaded.net, last(runs[dtype]))
    files.save(loaded.net, spec, tmp_path)
    assert (tmp_path / files.WEIGHTS).read_bytes() == (last(runs[dtype]) / files.WEIGHTS).read_bytes()


@pytest.mark.parametrize("dtype", SHORT)
def test_peft_gets_the_same_dtype_and_values(runs, tmp_path, dtype):
    result = tunesmith.export(runs[dtype].path, to="peft", out=tmp_path / "peft")
    assert result is not None
    path = next(tmp_path.rglob("adapter_model.safetensors"))
    assert set(dtypes(path).values()) == {SHORT[dtype]}
    stored = {name: np.array(value.astype(mx.float32)) for name, value in files.read_tensors(path).items()}
    wanted = sorted(float(np.abs(value).sum()) for value in tensors(runs[dtype]).values())
    assert sorted(float(np.abs(value).sum()) for value in stored.values()) == pytest.approx(wanted, rel=1e-6)


def test_an_adapter_may_go_on_in_another_dtype(runs, tiny_model, rows, tmp_path):
    start = f"adapter.start={runs['float32'].path}"
    run = train(tiny_model, rows, tmp_path / "on", "adapter.dtype=bfloat16", "loop.steps=1", start)
    assert set(dtypes(last(run) / files.WEIGHTS).values()) == {"BF16"}


def test_magnitudes_of_dora_stay_in_float32(tiny_model, rows, tmp_path):
    run = train(tiny_model, rows, tmp_path / "dora", "adapter.dtype=bfloat16", "adapter.kind=dora")
    stored = dtypes(last(run) / files.WEIGHTS)
    assert {kind for name, kind in stored.items() if name.endswith(".m")} == {"F32"}
    assert {kind for name, kind in stored.items() if ".lora_" in name} == {"BF16"}
