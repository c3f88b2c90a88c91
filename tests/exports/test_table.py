"""Kinds of one run beside each other: what they cost, what they lose, and which is the smallest that loses
nothing."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from typer.testing import CliRunner

import tiny
import tunesmith
from tunesmith.cli import app
from tunesmith.errors import ConfigError, DataError
from tunesmith.exports import kind, llama_cpp
from tunesmith.exports.table import ExportTable, TableEntry, export_table
from tunesmith.runs.artefacts import CarriedSummary, Distances, Exported, Stops
from tunesmith.runs.records import Score, Verdict


@pytest.fixture(scope="module")
def run(tmp_path_factory, tiny_model) -> Path:
    folder = tmp_path_factory.mktemp("table")
    rows = tiny.write_rows(folder / "rows.jsonl", tiny.conversations(24))
    sets = ["loop.steps=12", "optimizer.learning_rate=0.01", "model.quantize=8"]
    config = tunesmith.configure(model=str(tiny_model), data=[str(rows)], sets=sets)
    tunesmith.train(config, out=folder / "run")
    return folder / "run"


def test_the_table_of_the_command_line_names_the_smallest(run, drawn):
    words = ["export", str(run), "--table", "mlx:16, mlx:8,peft", "--rows", "3"]
    shown = CliRunner().invoke(app, words, catch_exceptions=False)
    assert shown.exit_code == 0, shown.output
    lines = [line.split() for line in shown.stdout.splitlines()]
    assert [line[0] for line in lines[:4]] == ["kind", "mlx-merged", "mlx-8bit", "peft"]
    assert "quantised when it was loaded" in shown.stdout  # peft cannot express it
    content = json.loads((run / "exports" / "table.json").read_text())
    assert content["smallest"] == "mlx-8bit"
    assert [entry["refused"] is None for entry in content["kinds"]] == [True, True, False]
    assert (run / "exports" / "table.png").read_bytes().startswith(b"\x89PNG")
    assert (run / "exports" / "mlx-8bit" / "config.json").exists()
    again = CliRunner().invoke(app, [*words, "--json"], catch_exceptions=False)
    assert json.loads(again.stdout) == content  # what was measured is taken as it is


def test_only_an_artefact_of_the_same_weights_and_rows_is_taken_as_it_is(run, tmp_path, tiny_model):
    rows = tiny.write_rows(tmp_path / "rows.jsonl", tiny.conversations(24))
    sets = ["loop.steps=12", "optimizer.learning_rate=0.02"]
    config = tunesmith.configure(model=str(tiny_model), data=[str(rows)], sets=sets)
    tunesmith.train(config, out=tmp_path / "other")
    out = tmp_path / "out"
    made = export_table(run, ["mlx:16"], out=out, rows=2).entries
    record = json.loads((out / "mlx-merged" / "export.json").read_text())
    assert record["rows"] == record["rows_limit"] == 2
    for source, n_rows in ((tmp_path / "other", 2), (run, 64)):
        with pytest.raises(DataError, match="exists already"):
            export_table(source, ["mlx:16"], out=out, rows=n_rows)
    assert export_table(run, ["mlx:16"], out=out, rows=2).entries == made
    without = {key: value for key, value in record.items() if not key.endswith("_sha256")}
    (out / "mlx-merged" / "export.json").write_text(json.dumps(without))
    with pytest.raises(DataError, match="exists already"):  # of an earlier release
        export_table(run, ["mlx:16"], out=out, rows=2)


def test_an_artefact_that_another_program_would_judge_now_is_not_taken(run, tmp_path, monkeypatch):
    monkeypatch.setattr(llama_cpp, "missing", lambda: "llama.cpp is not installed")
    made = export_table(run, ["gguf:q8_0"], out=tmp_path, rows=2).entries
    assert export_table(run, ["gguf:q8_0"], out=tmp_path, rows=2).entries == made
    monkeypatch.setattr(llama_cpp, "missing", lambda: None)
    monkeypatch.setattr(llama_cpp, "name", lambda: "llama.cpp (xllamacpp 1)")
    with pytest.raises(DataError, match="exists already"):
        export_table(run, ["gguf:q8_0"], out=tmp_path, rows=2)


def test_artefacts_can_be_discarded_once_they_are_measured(run, tmp_path):
    table = export_table(run, ["gguf:q8_0"], out=tmp_path / "out", keep=False, rows=2)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["table.json", "table.png"]
    exported = table.entries[0].exported
    assert exported is not None and exported.size_bytes > 0 and exported.accepted
    # It is used by llama.cpp, whose speed is not that of MLX: measured where llama.cpp reads it.
    assert (exported.cost is None) == (exported.own_reading is None)
    content = json.loads((tmp_path / "out" / "table.json").read_text())
    assert content["kinds"][0]["export"]["path"] is None


def test_a_kind_and_a_table_exclude_each_other(run):
    for words in ([], ["--to", "hf", "--table", "hf"]):
        with pytest.raises(ConfigError, match="one kind, or a table"):
            CliRunner().invoke(app, ["export", str(run), *words], catch_exceptions=False)
    with pytest.raises(ConfigError, match="not a kind"):
        export_table(run, ["mlx:16", "onnx"])


def entry(name: str, size: int, verdict: Verdict = "no difference shown", *reasons: str) -> TableEntry:
    loss = Score("export.loss", "1", "loss", 1.0, 0.9, 1.1, 9, 0.1, 0.0, 0.2, better="lower", verdict=verdict)
    exported = Exported(
        path=Path(name),
        kind=name,
        checkpoint="000001",
        rows=9,
        size_bytes=size,
        distances=Distances(9, 0, 0, 0, 0, 0, 1, 0, 1, 1, 1),
        stops=Stops(9, 9, 9, 9, ()),
        weights=CarriedSummary(1),
        reasons=reasons,
        loss=loss,
    )
    return TableEntry(name, exported)


def test_the_smallest_is_accepted_stands_alone_and_is_not_shown_to_be_worse():
    whole, packed = entry("mlx-merged", 16), entry("mlx-8bit", 8)
    others = (
        entry("mlx-4bit", 4, "regressed"),
        entry("gguf-q4_0", 3, "no difference shown", "it never stops"),
        entry("peft", 1),
        TableEntry("mlx", refused="no"),
    )
    assert ExportTable(Path(), "", (whole, packed, *others)).smallest is packed.exported
    assert ExportTable(Path(), "", others).smallest is None
    assert packed.exported is not None
    task = Score("tool_calls", "1", "tool_calls", 0.5, 0.4, 0.6, 9, -0.2, -0.3, -0.1, verdict="regressed")
    worse = TableEntry("mlx-8bit", replace(packed.exported, scores=(task,)))
    assert worse.state == "worse: tool_calls"
    assert ExportTable(Path(), "", (whole, worse)).smallest is whole.exported


def test_a_table_without_an_accepted_artefact_is_printed_and_exits_with_8(run, tmp_path, monkeypatch):
    strict = kind.Tolerance(kl=-1, p99=-1, top=2, lost=-1)
    monkeypatch.setattr(kind.named("mlx-4bit").__class__, "tolerance", strict)
    words = [
        "export",
        str(run),
        "--table",
        "mlx:4",
        "--out",
        str(tmp_path / "out"),
        "--discard",
        "--rows",
        "2",
    ]
    shown = CliRunner().invoke(app, words, catch_exceptions=False)
    assert shown.exit_code == 8 and "rejected: mean KL divergence" in shown.stdout
    content = json.loads((tmp_path / "out" / "table.json").read_text())
    assert content["smallest"] is None and content["kinds"][0]["export"]["accepted"] is False
