"""Folders that today's tools write are trained with nothing but --model and --data."""

from __future__ import annotations

import json

import pytest
from parity import families
from typer.testing import CliRunner

import tiny
from tunesmith.cli import app

pytestmark = [pytest.mark.parity, pytest.mark.filterwarnings("ignore")]


def write(folder, tool):
    """A tiny Qwen 2.5 as ``tool`` writes it."""
    vocabulary = tiny.write_tokenizer(folder)
    settings = {"vocab_size": vocabulary, "max_position_embeddings": 4096}
    model = families.build(families.Family("qwen2.5", "qwen2", settings))
    if tool == "PEFT's merge":
        from peft import LoraConfig, get_peft_model

        adapted = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj", "v_proj"]))
        model = adapted.merge_and_unload()
    model.save_pretrained(folder)
    if tool != "mlx_lm.convert -q":
        return folder
    from mlx_lm import convert

    convert(str(folder), str(folder / "mlx"), quantize=True, q_group_size=32, q_bits=8)
    return folder / "mlx"


@pytest.mark.parametrize("tool", ["transformers 5", "PEFT's merge", "mlx_lm.convert -q"])
def test_a_folder_is_trained_with_nothing_but_model_and_data(tool, tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    rows = tiny.write_rows(tmp_path / "rows.jsonl", tiny.conversations(24))
    words = [
        "train",
        "--model",
        str(write(folder, tool)),
        "--data",
        str(rows),
        "--out",
        str(tmp_path / "run"),
    ]
    result = CliRunner().invoke(app, words, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    events = [json.loads(line) for line in (tmp_path / "run" / "events.jsonl").read_text().splitlines()]
    losses = [event["loss"] for event in events if event["kind"] == "Validated"]
    assert losses[-1] < losses[0]
