"""The folder for a cluster holds the tokens, the adapter and the settings of the run, or is refused."""

from __future__ import annotations

import ast
import json
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import yaml
from typer.testing import CliRunner

import tiny
import tunesmith
from tunesmith.cli import app
from tunesmith.errors import ExportError
from tunesmith.exports.kinds import cluster
from tunesmith.learning.optimizer import OptimizerSpec
from tunesmith.runs.directory import Run
from tunesmith.tokens.batches import Group
from tunesmith.tokens.template import Tokens
from tunesmith.training import preparation

QUICK = ["loop.steps=6", "optimizer.learning_rate=0.01", "adapter.rank=4", "batch.sequences=6"]


def trained(folder: Path, model: Path, *sets: str) -> Path:
    rows = tiny.write_rows(folder / "rows.jsonl", tiny.conversations(24))
    config = tunesmith.configure(model=str(model), data=[str(rows)], sets=[*QUICK, *sets])
    tunesmith.train(config, out=folder / "run")
    return folder / "run"


@pytest.fixture(scope="module")
def run(tmp_path_factory, tiny_model) -> Path:
    return trained(tmp_path_factory.mktemp("cluster"), tiny_model)


@pytest.fixture(scope="module")
def folder(run, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("artefact") / "out"
    words = ["export", str(run), "--to", "cluster", "--out", str(out), "--rows", "3", "--json"]
    result = CliRunner().invoke(app, words, catch_exceptions=False)
    assert result.exit_code == 0 and json.loads(result.stdout)["accepted"]
    return out


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_the_rows_are_the_tokens_of_the_run_in_the_order_of_its_first_epoch(run, folder):
    prepared = preparation.prepare(Run(run).config)
    rows = lines(folder / "rows" / "train.jsonl")
    order = [index for step in range(prepared.plan.steps_per_epoch) for index in prepared.plan.members(step)]
    assert len(rows) == len(order) == len(prepared.train) > 6
    for row, index in zip(rows, order, strict=True):
        ids, targets = prepared.train[index].sequences[0]
        assert row["input_ids"] == ids.tolist() and row["attention_mask"] == [1] * len(ids)
        learned = [token for token, target in zip(ids.tolist()[1:], targets[1:], strict=True) if target]
        assert [label for label in row["labels"] if label != -100] == learned
        assert all(label in (-100, token) for label, token in zip(row["labels"], ids.tolist(), strict=True))
    assert len(lines(folder / "rows" / "valid.jsonl")) == len(prepared.valid) > 0


def test_the_rows_are_also_a_table(folder):
    parquet = pytest.importorskip("pyarrow.parquet")
    assert "| `rows/train.parquet`, `rows/valid.parquet` |" in (folder / "README.md").read_text()
    for side in ("train", "valid"):
        table = parquet.read_table(folder / "rows" / f"{side}.parquet")
        assert table.to_pylist() == lines(folder / "rows" / f"{side}.jsonl")
        assert str(table.schema.field("labels").type) == "list<element: int32>"


def test_without_pyarrow_the_rows_are_json_lines_and_it_is_said(run, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    exported = tunesmith.export(run, to="cluster", out=tmp_path / "out", rows=2)
    assert any("pip install 'tunesmith[tables]'" in remark for remark in exported.remarks)
    assert sorted(path.name for path in (exported.path / "rows").iterdir()) == ["train.jsonl", "valid.jsonl"]
    readme = (exported.path / "README.md").read_text()
    assert "| `rows/train.jsonl`, `rows/valid.jsonl` |" in readme and "parquet" not in readme


def test_the_script_reads_the_table_if_it_is_there_and_says_what_it_reads(folder, capsys):
    """Only the function that opens the rows: the rest needs torch."""
    tree = ast.parse((folder / "train.py").read_text())
    functions = {node.name: node for node in tree.body if isinstance(node, ast.FunctionDef)}
    opened: list[tuple[str, dict[str, str]]] = []
    known = {"HERE": folder, "load_dataset": lambda kind, data_files: opened.append((kind, data_files))}
    exec(compile(ast.Module([functions["open_rows"]], []), "train.py", "exec"), known)
    rows = json.loads((folder / "settings.json").read_text())["rows"]
    known["open_rows"](rows)
    known["HERE"] = folder / "elsewhere"
    known["open_rows"](rows)
    assert [kind for kind, _ in opened] == ["parquet", "json"]
    assert opened[0][1] == {side: str(folder / "rows" / f"{side}.parquet") for side in ("train", "valid")}
    shown = capsys.readouterr().out.splitlines()
    assert shown == [f"rows: {', '.join(files.values())}" for _, files in opened]
    assert opened[1][1]["train"] == str(folder / "elsewhere" / "rows" / "train.jsonl")


def group(*weights: float) -> Group:
    return Group((Tokens(np.arange(3, dtype=np.int32), np.array(weights, np.float32)),), "rows.jsonl:1")


def test_the_first_token_which_nothing_predicts_is_not_counted_as_learned():
    assert cluster.token_row(group(1, 0, 1))["labels"] == [-100, -100, 2]


def test_a_weight_that_a_label_cannot_hold_is_refused_with_its_row():
    with pytest.raises(ExportError, match="weights of tokens") as caught:
        cluster.token_row(group(0, 0.5, 1))
    assert caught.value.where == "rows.jsonl:1"


def test_trl_axolotl_and_the_run_have_the_same_settings(run, folder):
    config = Run(run).config
    settings = json.loads((folder / "settings.json").read_text())
    axolotl = yaml.safe_load((folder / "axolotl.yaml").read_text())
    training, lora = settings["training"], settings["lora"]
    assert (lora["r"], lora["lora_alpha"], settings["sequences"]) == (4, config.adapter.alpha, 6)
    assert (training["learning_rate"], training["max_steps"], training["seed"]) == (0.01, 6, config.loop.seed)
    assert training["lr_scheduler_type"] == axolotl["lr_scheduler"] == "cosine"
    for key in ("learning_rate", "max_steps", "seed", "warmup_steps", "max_grad_norm", "weight_decay"):
        assert axolotl[key] == training[key], key
    assert (axolotl["lora_r"], axolotl["lora_alpha"]) == (lora["r"], lora["lora_alpha"])
    assert axolotl["lora_target_modules"] == lora["target_modules"] and len(lora["target_modules"]) == 4
    assert axolotl["micro_batch_size"] * axolotl["gradient_accumulation_steps"] == 6


def test_the_servers_offer_the_adapter_by_one_name_and_the_files_that_are_named_are_there(run, folder):
    for server in ("vllm", "sglang"):
        command = (folder / f"serve-{server}.sh").read_text()
        assert f"{run.name}=./adapter" in command and Run(run).config.model.path in command
    task = yaml.safe_load((folder / "sky.yaml").read_text())
    assert task["file_mounts"] == {"/base": Run(run).config.model.path} and task["envs"] == {"MODEL": "/base"}
    readme = (folder / "README.md").read_text()
    assert {"train.py", "requirements.txt", "adapter", "tokenizer"} <= {
        path.name for path in folder.iterdir()
    }
    assert all(path.name in readme for path in folder.iterdir() if path.suffix in (".py", ".sh", ".yaml"))
    compile((folder / "train.py").read_text(), "train.py", "exec")


def test_a_row_with_another_label_is_rejected(run, tmp_path, monkeypatch):
    right = cluster.token_row

    def learns_the_prompt(group):
        row = right(group)
        return {**row, "labels": [-100, *row["input_ids"][1:]]}

    monkeypatch.setattr(cluster, "token_row", learns_the_prompt)
    with pytest.raises(
        ExportError, match=r"train.jsonl:1: other ids or labels than in training, in \d+ rows"
    ):
        tunesmith.export(run, to="cluster", out=tmp_path / "out", rows=2)


def test_what_is_wrong_with_a_rows_file_is_said(folder, tmp_path):
    rows = lines(folder / "rows" / "valid.jsonl")
    path = tmp_path / "valid.jsonl"
    assert cluster.differing(folder / "rows" / "valid.jsonl", rows) == []
    assert cluster.differing(path, rows) == [f"valid.jsonl: {len(rows)} rows are missing"]
    assert cluster.differing(path, []) == []
    path.write_text("{")
    assert cluster.differing(path, rows) == ["valid.jsonl: it is not JSON lines"]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows[1:]))
    assert f"{len(rows) - 1} rows, and the run has {len(rows)}" in cluster.differing(path, rows)[0]
    path.write_text("".join(json.dumps(row) + "\n" for row in [*rows[1:], rows[0]]))
    assert "other ids or labels" in cluster.differing(path, rows)[0]
    shutil.copyfile(folder / "rows" / "valid.jsonl", path)
    assert cluster.differing(path, rows) == []
    shutil.copyfile(folder / "rows" / "train.parquet", tmp_path / "valid.parquet")
    (problem,) = cluster.differing(path, rows)
    assert problem.startswith("valid.parquet: ") and f"the run has {len(rows)}" in problem
    (tmp_path / "valid.parquet").write_bytes(b"PAR1")
    assert cluster.differing(path, rows) == ["valid.parquet: it is not a Parquet file"]


@pytest.mark.parametrize(
    ("sets", "reason"),
    [
        (["objective=kto"], "for sft only, not for kto"),
        (["template.prompt_weight=0.5"], "weights of tokens"),
        (["optimizer.kind=muon"], "optimizer muon"),
        (["adapter.kind=full"], "trained in full"),
    ],
)
def test_what_cannot_be_expressed_is_refused_by_name(sets, reason, run):
    data = {"model": "m", "data": ["d"]}
    config = tunesmith.configure(**data, sets=sets).spec
    base = SimpleNamespace(path=Path("m"))
    tuned = SimpleNamespace(config=config, source=config.model, loaded=base, base_config={})
    with pytest.raises(ExportError, match=reason) as caught:
        cluster.Cluster().accepts(tuned)
    assert caught.value.hint


def test_a_file_that_changed_since_the_run_is_refused(tiny_model, tmp_path):
    run = trained(tmp_path, tiny_model)
    rows = tmp_path / "rows.jsonl"
    rows.write_text(rows.read_text() + "\n")
    with pytest.raises(ExportError, match="changed since the run was trained") as caught:
        tunesmith.export(run, to="cluster", rows=2)
    assert caught.value.where == str(rows)
    rows.unlink()
    with pytest.raises(ExportError, match="cannot be made again: no such file"):
        tunesmith.export(run, to="cluster", rows=2)


@pytest.mark.parametrize(
    "settings",
    [
        {"schedule": "cosine", "final_share": 0.1},
        {"schedule": "cosine"},
        {"schedule": "linear", "final_share": 0.2},
        {"schedule": "linear"},
        {"schedule": "constant"},
    ],
)
def test_every_schedule_has_a_name_in_transformers(settings):
    spec = OptimizerSpec(learning_rate=0.01, **settings)
    written = cluster._schedule(spec)
    known = {"cosine", "cosine_with_min_lr", "linear", "polynomial", "constant_with_warmup"}
    assert written["lr_scheduler_type"] in known


@pytest.mark.parametrize(
    ("sequences", "micro", "expected"), [(8, None, 8), (12, None, 6), (7, 4, 1), (64, 3, 2)]
)
def test_the_rows_on_a_device_divide_an_update(sequences, micro, expected):
    assert cluster._micro(sequences, micro) == expected
