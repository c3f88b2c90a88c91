"""The importance matrix is what llama.cpp means by it: mean squares of the inputs of each matrix, measured on
the tokens that the run learned from."""

from __future__ import annotations

from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

import tiny
import tunesmith
from tunesmith.errors import ExportError, SetupError
from tunesmith.events import Sink, silent
from tunesmith.exports import gate, importance
from tunesmith.exports.kind import ArtefactNotes, Importance, Tuned
from tunesmith.exports.kinds.gguf import GGUFF32
from tunesmith.model.gguf import ggml
from tunesmith.runs import opening


@pytest.fixture(scope="module")
def run(tmp_path_factory, tiny_model) -> Path:
    folder = tmp_path_factory.mktemp("importance")
    rows = tiny.write_rows(folder / "rows.jsonl", tiny.conversations(24))
    sets = ["loop.steps=6", "optimizer.learning_rate=0.01", "adapter.targets=[q_proj, down_proj]"]
    config = tunesmith.configure(model=str(tiny_model), data=[str(rows)], sets=sets)
    tunesmith.train(config, out=folder / "run")
    return folder / "run"


def test_columns_are_the_mean_squares_of_the_inputs(run):
    """Recomputed for the first block from the embedding alone."""
    opened = opening.find(run).open()
    opened.attach()
    net = opened.loaded.net
    rows = [[5, 9, 40, 7], [12, 3, 77]]
    columns = importance.mean_squares(net, rows)
    block = net.model.layers[0]
    inputs = mx.concatenate([block.input_layernorm(net.model.embed_tokens(mx.array(ids))) for ids in rows])
    expected = np.square(np.array(inputs)).mean(axis=0)
    for part in ("q_proj", "k_proj", "v_proj"):
        measured = columns[f"model.layers.0.self_attn.{part}.weight"]
        np.testing.assert_allclose(measured, expected, rtol=1e-5)
    linear = {name for name, module in net.named_modules() if isinstance(module, nn.Linear)}
    names = {name.removesuffix(".linear") for name in linear if ".layers." in name}
    assert {name for name in columns if ".layers." in name} == {f"{name}.weight" for name in names}


def test_what_is_measured_computes_as_before(run):
    opened = opening.find(run).open()
    opened.attach()
    ids = mx.array([[5, 9, 40, 7]])
    before = np.array(opened.loaded.net(ids))
    importance.mean_squares(opened.loaded.net, [[1, 2, 3]])
    assert np.array_equal(before, np.array(opened.loaded.net(ids)))


def test_a_column_that_no_row_uses_keeps_a_little_weight():
    weights = importance._weights(np.array([0.0, 2.0, 4.0]))
    assert weights.tolist() == [2 * importance.FLOOR, 2.0, 4.0]


def test_the_first_tokens_are_taken_and_no_more_than_the_limit():
    sequences = [[1, 2, 3], [], [4, 5, 6], [7]]
    assert importance.first_tokens(sequences, 5) == [[1, 2, 3], [4, 5]]
    assert importance.first_tokens(sequences, 100) == [[1, 2, 3], [4, 5, 6], [7]]


class Weighed(GGUFF32):
    """Asks for an importance matrix, but needs no llama.cpp."""

    def importance(self, tuned: Tuned, notify: Sink) -> Importance:
        return importance.of_run(tuned, self.name, "", notify)


def test_the_artefacts_of_one_gate_measure_the_inputs_once(run, tmp_path, monkeypatch):
    def written(of: gate.Gate, name: str) -> ArtefactNotes:
        (folder := tmp_path / name).mkdir()
        return of._written(Weighed(), folder)[1]

    several = gate.Gate(opening.find(run), gate.Scope(rows=2), tmp_path, silent)
    first = written(several, "first")
    assert first.importance is not None and first.importance.rows > 0 and first.importance.columns
    monkeypatch.setattr(importance, "mean_squares", None)
    second = written(several, "second")
    assert second.importance is first.importance and second.quantised == first.quantised
    another = gate.Gate(opening.find(run), gate.Scope(rows=2), tmp_path, silent)
    with pytest.raises(TypeError):
        written(another, "third")


def without_llama_cpp() -> None:
    raise SetupError("llama.cpp is not installed (the package xllamacpp)", hint=ggml.EXTRA)


def test_without_the_extra_a_k_quant_is_refused_by_its_name_before_anything_is_read(run, monkeypatch):
    monkeypatch.setattr(ggml, "library", without_llama_cpp)
    monkeypatch.setattr(opening.Source, "open", None)
    for kind in ("gguf:q4_k_m", "gguf:q5_k_m", "gguf:q6_k", "ollama:q4_k_m"):
        with pytest.raises(SetupError) as caught:
            tunesmith.export(run, to=kind, rows=2)
        assert "not installed" in str(caught.value) and "tunesmith[gguf]" in str(caught.value)
    assert not (run / "exports").exists()


def test_training_rows_that_are_gone_are_named(run, tmp_path, monkeypatch):
    monkeypatch.setattr(ggml, "library", lambda: None)
    (data,) = (run.parent).glob("rows.jsonl")
    data.rename(tmp_path / "elsewhere.jsonl")
    try:
        with pytest.raises(ExportError, match="training rows, which are gone"):
            tunesmith.export(run, to="gguf-q4_k_m", rows=2)
    finally:
        (tmp_path / "elsewhere.jsonl").rename(data)


def test_without_llama_cpp_a_gguf_file_is_judged_by_our_own_reader_and_it_is_said(run, tmp_path, monkeypatch):
    monkeypatch.setattr(ggml, "library", without_llama_cpp)
    exported = tunesmith.export(run, to="gguf-q8_0", out=tmp_path / "out", rows=2)
    assert exported.judged_by == "tunesmith" and exported.own_reading is None and exported.cost is None
    assert any("judged by tunesmith's own reader" in remark for remark in exported.remarks)
