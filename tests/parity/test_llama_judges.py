"""llama.cpp as the judge of GGUF files: k-quants by its own quantiser, and faults that it alone can see."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf import GGMLQuantizationType, GGUFReader, quants

import tiny
import tunesmith
from tunesmith import events
from tunesmith.errors import ExportError
from tunesmith.events import Sink
from tunesmith.exports import fidelity, fresh, importance, judging, llama_cpp, training_rows
from tunesmith.exports.kinds import gguf
from tunesmith.model.gguf import ggml, tokenizer_header, writing
from tunesmith.runs import opening
from tunesmith.runs.artefacts import Exported
from tunesmith.runs.directory import Run

pytest.importorskip("xllamacpp")
pytestmark = [pytest.mark.parity, pytest.mark.filterwarnings("ignore")]

BLOCK = ["Q4_K", "Q5_K", "Q6_K", "Q5_0", "Q5_1", "Q8_0"]


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """Rows of 256 values, so that nothing falls back."""
    folder = tmp_path_factory.mktemp("judged")
    base = folder / "base"
    base.mkdir()
    tiny.write_model(base, tiny.write_tokenizer(base) + 5, hidden=256, tied=False, layers=4)
    rows = tiny.write_rows(folder / "rows.jsonl", tiny.conversations(24))
    sets = ["loop.steps=12", "optimizer.learning_rate=0.01", "adapter.targets=all-linear"]
    config = tunesmith.configure(model=str(base), data=[str(rows)], sets=sets)
    tunesmith.train(config, out=folder / "run")
    return folder / "run"


def rejected(run: Path, kind: str, out: Path) -> list[str]:
    with pytest.raises(ExportError, match="rejected"):
        tunesmith.export(run, to=kind, rows=3, out=out)
    return json.loads((out.with_name(out.name + ".rejected") / "export.json").read_text())["reasons"]


def measured(run: Path, kind: str, out: Path, rows: int = 4) -> Exported:
    """An artefact however far it is from the live adapter: most tokens of a random model are equally likely,
    so that few bits change which is on top."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fidelity, "reasons", lambda *args: [])
        return tunesmith.export(run, to=kind, rows=rows, out=out)


@pytest.mark.parametrize("name", BLOCK)
def test_ggml_writes_what_the_gguf_package_reads(name):
    """Error of Gaussian weights by type; in threads as in one."""
    kind = GGMLQuantizationType[name]
    value = np.random.Generator(np.random.PCG64(1)).normal(size=(37, 512)).astype(np.float32)
    content = ggml.quantised(value, kind)
    read = quants.dequantize(content, kind)
    error = np.sqrt(np.square(read - value).mean())
    most = {"Q4_K": 0.08, "Q5_K": 0.04, "Q6_K": 0.02, "Q5_0": 0.06, "Q5_1": 0.05, "Q8_0": 0.006}
    assert error < most[name]
    rows = np.concatenate([ggml.quantised(row[None], kind) for row in value])
    assert np.array_equal(content, rows)


@pytest.mark.parametrize("name", ["Q4_K", "Q5_K", "Q6_K", "Q5_0"])
def test_columns_that_matter_more_are_written_more_exactly(name):
    kind = GGMLQuantizationType[name]
    value = np.random.Generator(np.random.PCG64(2)).normal(size=(64, 512)).astype(np.float32)
    importance = np.ones(512, np.float32)
    importance[::8] = 400.0
    errors = [
        np.square(quants.dequantize(ggml.quantised(value, kind, weights), kind) - value)[:, ::8].mean()
        for weights in (None, importance)
    ]
    assert errors[1] < 0.75 * errors[0]


@pytest.mark.parametrize(
    "kind", ["gguf-f32", "gguf-bf16", "gguf-q8_0", "gguf-q6_k", "gguf-q5_k_m", "gguf-lora"]
)
def test_llama_cpp_judges_files_that_are_made_for_it(run, kind, tmp_path):
    # Equal top tokens differ by CPU: 90.6 and over 92 % of q5_k_m, 94.3 and over 95 % of q6_k.
    if kind in ("gguf-q5_k_m", "gguf-q6_k"):
        exported = measured(run, kind, tmp_path / "out")
    else:
        exported = tunesmith.export(run, to=kind, rows=4, out=tmp_path / "out")
    assert exported.judged_by.startswith("llama.cpp (xllamacpp")
    assert exported.own_reading is not None and exported.cost is not None
    assert exported.cost.memory_bytes > 0 and exported.cost.speed.value > 0
    beside = "memory and speed are those beside a base whose matrices are F32"
    assert (beside in exported.remarks) == (kind == "gguf-lora")
    if kind in ("gguf-f32", "gguf-lora"):
        assert exported.distances.mean < 1e-5 and exported.distances.top == 1


@pytest.mark.parametrize("kind", ["gguf-f32", "gguf-lora"])
def test_an_exact_file_of_a_faint_adapter_is_accepted(kind, tmp_path):
    """llama.cpp holds keys and values in 16 bits, which is a share of what the adapter does."""
    base = tmp_path / "base"
    base.mkdir()
    tiny.write_model(base, tiny.write_tokenizer(base) + 5, hidden=256, tied=False, layers=4)
    rows = tiny.write_rows(tmp_path / "rows.jsonl", tiny.conversations(24))
    config = tunesmith.configure(model=str(base), data=[str(rows)], sets=["loop.steps=2"])
    tunesmith.train(config, out=tmp_path / "run")
    exported = tunesmith.export(tmp_path / "run", to=kind, rows=3, out=tmp_path / "out")
    assert 0.01 < exported.distances.lost < 0.1 and exported.distances.base < 1e-3


def test_a_k_quant_records_its_importance_matrix_and_its_types(run, tmp_path):
    exported = measured(run, "gguf:q4_k_m", tmp_path / "out")
    quantised = exported.quantised
    assert quantised is not None and quantised.narrow == 0
    assert quantised.rows > 0 and quantised.tokens > 0
    assert quantised.weighed == 7 * 4 and sum(quantised.types.values()) == 7 * 4 + 2
    (path,) = exported.path.glob("*.gguf")
    reader = GGUFReader(path)
    assert reader.fields["quantize.imatrix.entries_count"].contents() == 7 * 4
    types = {tensor.name: tensor.tensor_type.name for tensor in reader.tensors}
    assert types["output.weight"] == "Q6_K" and types["blk.0.attn_q.weight"] == "Q4_K"
    record = json.loads((exported.path / "export.json").read_text())
    assert record["quantised"]["tokens"] == quantised.tokens
    again = measured(run, "gguf:q4_k_m", tmp_path / "again")
    (other,) = again.path.glob("*.gguf")
    assert path.read_bytes() == other.read_bytes()


def test_the_importance_matrix_lowers_the_error_where_inputs_are_large(run, tmp_path, monkeypatch):
    """The squared error of each column, weighed by the mean square of its input, over all matrices of the
    blocks."""
    opened = opening.find(run).open()
    opened.attach()
    groups = training_rows.first_epoch(
        training_rows.prepare(Run.open(run), Run.open(run).config, "test", "", events.silent)
    )
    rows = [group.sequences[0].ids[:-1].tolist() for group in groups]
    columns = importance.mean_squares(opened.loaded.net, rows)
    exact = _matrices(measured(run, "gguf-f32", tmp_path / "exact").path)
    weighed = _matrices(measured(run, "gguf:q4_k_m", tmp_path / "weighed").path)
    encoding = writing.Encoding
    monkeypatch.setattr(gguf, "Encoding", lambda kind, importance={}: encoding(kind))
    exported = measured(run, "gguf:q4_k_m", tmp_path / "plain")
    assert exported.quantised is not None and exported.quantised.weighed == 0
    plain = _matrices(exported.path)
    parts = {"self_attn.q_proj": "attn_q", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down"}
    for layer, part in parts.items():
        name = f"blk.1.{part}.weight"
        scale = columns[f"model.layers.1.{layer}.weight"]
        errors = [float((np.square(side[name] - exact[name]) * scale).sum()) for side in (weighed, plain)]
        assert errors[0] < errors[1]


def _matrices(folder: Path) -> dict[str, np.ndarray]:
    (path,) = folder.glob("*.gguf")
    tensors = [tensor for tensor in GGUFReader(path).tensors if len(tensor.shape) > 1]
    return {tensor.name: quants.dequantize(tensor.data, tensor.tensor_type) for tensor in tensors}


def test_rows_of_another_width_are_counted_and_said(tmp_path, tiny_model):
    rows = tiny.write_rows(tmp_path / "rows.jsonl", tiny.conversations(24))
    config = tunesmith.configure(model=str(tiny_model), data=[str(rows)], sets=["loop.steps=6"])
    tunesmith.train(config, out=tmp_path / "run")
    exported = measured(tmp_path / "run", "gguf:q4_k_m", tmp_path / "out", 2)
    assert exported.quantised is not None
    assert exported.quantised.narrow == sum(exported.quantised.types.values()) == 15
    assert any("do not fill blocks of 256 values" in remark for remark in exported.remarks)


def test_a_file_that_gives_other_ids_to_llama_cpp_alone_is_rejected(run, tmp_path, monkeypatch):
    """The token that opens a turn is not marked as a control token, so llama.cpp reads it as letters."""
    values = tokenizer_header.tokenizer_values

    def unmarked(*args):
        made: Any = values(*args)
        types = list(made["tokenizer.ggml.token_type"])
        types[1] = 1
        return made | {"tokenizer.ggml.token_type": types}

    monkeypatch.setattr(tokenizer_header, "tokenizer_values", unmarked)
    monkeypatch.setattr(fresh, "run", _with_the_ids_of_training(fresh.run))
    reasons = rejected(run, "gguf-f32", tmp_path / "out")
    assert any("other ids: llama.cpp gives 3 of 3 prompts" in reason for reason in reasons)


def _with_the_ids_of_training(measure: Any) -> Any:
    """Drop what the own reader says of ids, to see that llama.cpp's alone rejects."""

    def run(job: fresh.Job, folder: Path, notify: Sink) -> fresh.Result:
        result = measure(job, folder, notify)
        problems = [problem for problem in result.problems if not problem.startswith("other ids")]
        return fresh.Result(**{**vars(result), "problems": problems})

    return run


def test_a_file_whose_end_token_llama_cpp_does_not_know_is_rejected(run, tmp_path, monkeypatch):
    plain = judging.by_llama_cpp
    monkeypatch.setattr(
        judging,
        "by_llama_cpp",
        lambda files, tolerance, probes, texts, ends, *others: plain(
            files, tolerance, probes, texts, [*ends, 40], *others
        ),
    )
    reasons = rejected(run, "gguf-f32", tmp_path / "out")
    assert "it never stops: llama.cpp goes on after the trained end token 40" in reasons


def test_a_file_that_llama_cpp_cannot_load_is_rejected_with_its_words(run, tmp_path, monkeypatch):
    """A tensor that our reader does not need, and llama.cpp refuses."""
    plain = judging.by_llama_cpp

    def cut(files, *others):
        content = files.model.read_bytes()
        files.model.write_bytes(content[: len(content) - 4096])
        return plain(files, *others)

    monkeypatch.setattr(judging, "by_llama_cpp", cut)
    assert any("llama.cpp cannot load" in reason for reason in rejected(run, "gguf-f16", tmp_path / "out"))


def test_llama_cpp_is_named_with_its_release():
    assert llama_cpp.missing() is None and llama_cpp.name().startswith("llama.cpp (xllamacpp 20")
