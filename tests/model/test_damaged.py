"""Damaged models: an error of tunesmith that names file and key, never a traceback, a hang or a dead
process. `tests/damage.py` makes them."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import damage
import tunesmith
from tunesmith.errors import ModelError, TunesmithError
from tunesmith.model import layouts, loading
from tunesmith.tokens import renderers


def outcomes(folder: Path, first: int, last: int) -> list[dict]:
    """One a case. A case that killed its process has the outcome "crash"; the next ones run in a new
    process."""
    done: list[dict] = []
    while first < last:
        command = [sys.executable, damage.__file__, str(folder), str(first), str(last)]
        environ = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "HF_HUB_OFFLINE": "1"}
        ended = subprocess.run(command, capture_output=True, text=True, env=environ)
        lines = [json.loads(line) for line in ended.stdout.splitlines() if line.startswith('{"case"')]
        done += [line for line in lines if "outcome" in line]
        if ended.returncode == 0:
            break
        assert lines, ended.stderr
        text = f"status {ended.returncode}: {ended.stderr[-2000:]}"
        done.append({**lines[-1], "outcome": "crash", "text": text})
        first = lines[-1]["case"] + 1
    return done


def require_errors(cases: list[dict]) -> None:
    wrong = [case for case in cases if case["outcome"] not in ("error", "fine")]
    assert not wrong, "\n\n".join(f"{case['case']} {case['damage']}\n{case['text']}" for case in wrong)
    counts = Counter(case["outcome"] for case in cases)
    assert counts["error"] > counts["fine"], counts


def test_damaged_models_end_in_an_error(tmp_path):
    cases = outcomes(tmp_path, 0, 48)
    assert len(cases) == 48
    require_errors(cases)


@pytest.mark.parametrize(
    ("first", "last"),
    [pytest.param(start, start + 500, marks=pytest.mark.sweep) for start in range(48, 2048, 500)],
)
def test_two_thousand_damaged_models_end_in_an_error(tmp_path, first, last):
    cases = outcomes(tmp_path, first, last)
    assert len(cases) == last - first
    require_errors(cases)


# The message names file and key


def changed(source: Path, target: Path, **values) -> Path:
    """``source`` with other settings in config.json; a value of ... removes the key."""
    shutil.copytree(source, target)
    config = json.loads((target / "config.json").read_text()) | values
    config = {key: value for key, value in config.items() if value is not ...}
    (target / "config.json").write_text(json.dumps(config))
    return target


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"model_type": ...}, ["config.json: model_type is missing"]),
        ({"model_type": 7}, ["config.json: model_type is 7, a name expected"]),
        ({"hidden_size": ...}, ["config.json", "hidden_size is missing"]),
        ({"hidden_size": "64"}, ["config.json", "hidden_size is '64', a positive integer below"]),
        ({"num_hidden_layers": 10**9}, ["config.json: num_hidden_layers is 1,000,000,000", "tensors"]),
        ({"num_attention_heads": 0}, ["config.json", "num_attention_heads is 0"]),
        ({"rms_norm_eps": "small"}, ["config.json", "rms_norm_eps is 'small', a number expected"]),
        ({"rope_theta": []}, ["config.json", "rope_theta is [], a number expected"]),
        ({"vocab_size": 2**40}, ["vocab_size"]),
        ({"text_config": {"num_hidden_layers": 10**9}}, ["text_config.num_hidden_layers"]),
    ],
)
def test_a_setting_that_gives_no_model_is_named(tiny_model, tmp_path, values, words):
    with pytest.raises(ModelError) as caught:
        loading.load(loading.ModelSpec(path=str(changed(tiny_model, tmp_path / "m", **values))))
    assert caught.value.where == str(tmp_path / "m")
    assert all(word in str(caught.value) for word in words), str(caught.value)


@pytest.mark.parametrize("text", ["", "[]", "{", "null", "\x00"])
@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "tokenizer_config.json"])
def test_a_file_that_is_no_json_object_is_named(tiny_model, tmp_path, name, text):
    folder = changed(tiny_model, tmp_path / "m")
    (folder / name).write_text(text)
    with pytest.raises(ModelError, match=name):
        renderers.load(folder)
        loading.load(loading.ModelSpec(path=str(folder)))


@pytest.mark.parametrize("value", [{}, {"weight_map": 7}, {"weight_map": {"a": 7}}, []])
def test_an_index_that_names_no_files_is_named(tiny_model, tmp_path, value):
    folder = changed(tiny_model, tmp_path / "m")
    (folder / "model.safetensors.index.json").write_text(json.dumps(value))
    with pytest.raises(ModelError, match=r"model\.safetensors\.index\.json"):
        loading.load(loading.ModelSpec(path=str(folder)))


def test_an_embedding_of_a_few_rows_is_refused(tiny_model, tmp_path):
    folder = changed(tiny_model, tmp_path / "m", vocab_size=3)
    tensors = load_file(folder / "model.safetensors")
    tensors["model.embed_tokens.weight"] = tensors["model.embed_tokens.weight"][:3]
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(ModelError, match="the token embedding has 3 rows, at least 16 expected"):
        loading.load(loading.ModelSpec(path=str(folder)))


def test_an_architecture_whose_package_is_missing_is_refused(tiny_model, tmp_path, monkeypatch):
    monkeypatch.setattr(layouts, "_CLASSES", {})  # so that mlx-lm's class for the layout of ai2-olmo is read
    folder = changed(tiny_model, tmp_path / "m", model_type="olmo")
    with pytest.raises(ModelError, match="olmo"):
        loading.load(loading.ModelSpec(path=str(folder)))


@pytest.mark.parametrize("number", [10**7, 2**31, 2**32 - 1])
def test_an_id_that_no_tokenizer_has_is_named(tiny_model, tmp_path, number):
    folder = changed(tiny_model, tmp_path / "m")
    words = json.loads((folder / "tokenizer.json").read_text())
    words["model"]["vocab"]["new"] = number
    (folder / "tokenizer.json").write_text(json.dumps(words))
    with pytest.raises(ModelError, match=f"tokenizer.json: the id of 'new' is {number}"):
        renderers.load(folder)


# Weights that are not finite


def spoilt(source: Path, target: Path, **values: float) -> Path:
    folder = changed(source, target)
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][3, :2] = np.nan
    tensors["model.norm.weight"][5] = -np.inf
    save_file(tensors, folder / "model.safetensors")
    return folder


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_tensors_with_nan_or_infinity_are_named_and_counted(tiny_model, tmp_path, dtype):
    with pytest.raises(ModelError) as caught:
        loading.load(loading.ModelSpec(path=str(spoilt(tiny_model, tmp_path / "m")), dtype=dtype))
    lines = str(caught.value).splitlines()
    assert "2 tensors of the base hold NaN or infinity" in lines[0] and str(tmp_path / "m") in lines[0]
    assert lines[1:3] == [
        "  model.layers.1.mlp.up_proj.weight: 2 of 8,192 values",
        "  model.norm.weight: 1 of 64 values",
    ]


def test_large_values_whose_sum_overflows_are_finite(tiny_model, tmp_path):
    folder = changed(tiny_model, tmp_path / "m")
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][:] = 3e38
    save_file(tensors, folder / "model.safetensors")
    loading.load(loading.ModelSpec(path=str(folder)))


def test_a_quantised_base_with_nan_in_a_scale_is_refused(tmp_path):
    packed = damage.sources(tmp_path)[2]
    tensors = load_file(packed / "model.safetensors")
    tensors["model.layers.0.self_attn.q_proj.scales"][0, 0] = np.nan
    save_file(tensors, packed / "model.safetensors")
    with pytest.raises(ModelError, match=r"model\.layers\.0\.self_attn\.q_proj"):
        loading.load(loading.ModelSpec(path=str(packed)))


def test_a_base_whose_loss_is_not_finite_stops_at_the_first_validation(tiny_model, tmp_path):
    """Every weight is finite, their products are not."""
    folder = changed(tiny_model, tmp_path / "m")
    tensors = load_file(folder / "model.safetensors")
    for name in ("gate", "up", "down"):
        tensors[f"model.layers.1.mlp.{name}_proj.weight"][:] = 3e30
    save_file(tensors, folder / "model.safetensors")
    damage.sources(tmp_path)
    sets = ("audit.before_training=false", "loop.steps=2", "data.valid=0.5")
    settings = tunesmith.configure(model=str(folder), data=[str(tmp_path / "rows.jsonl")], sets=sets)
    with pytest.raises(TunesmithError, match="the loss of the held-out rows is nan before the first update"):
        tunesmith.train(settings, out=tmp_path / "run")
