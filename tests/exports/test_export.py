"""Every kind is written, reloaded in a fresh process and compared; what says something else is rejected."""

from __future__ import annotations

import json
import re
import shutil
import sys
from datetime import date, datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from transformers import AutoTokenizer
from typer.testing import CliRunner

import tiny
import tunesmith
from tunesmith.cli import app
from tunesmith.errors import ConfigError, DataError, ExportError
from tunesmith.exports import fidelity, kind
from tunesmith.exports.fidelity import Carried
from tunesmith.exports.kinds import peft
from tunesmith.exports.kinds.hf import Merged
from tunesmith.runs import artefacts
from tunesmith.runs.directory import Run
from tunesmith.tokens import renderers
from tunesmith.tokens.first_rules import FirstRules

QUICK = ["loop.steps=12", "optimizer.learning_rate=0.01", "adapter.targets=all-linear"]

SWITCHED = (  # the last answer has a block of reasoning, which the prompt closes if thinking is off
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' and loop.last %}<think>\n"
    "{{ m.reasoning_content or '' }}\n</think>\n\n{% endif %}{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is false %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)


def train(folder: Path, model: Path, *sets: str) -> Path:
    rows = tiny.write_rows(folder / "rows.jsonl", tiny.conversations(24))
    config = tunesmith.configure(model=str(model), data=[str(rows)], sets=[*QUICK, *sets])
    tunesmith.train(config, out=folder / "run")
    return folder / "run"


@pytest.fixture(scope="module")
def run(tmp_path_factory, tiny_model) -> Path:
    return train(tmp_path_factory.mktemp("export"), tiny_model, "adapter.rank=4")


KINDS = {  # mean KL divergence at most
    **dict.fromkeys(("hf", "peft", "mlx", "mlx-merged", "gguf-f32", "gguf-f16"), 1e-6),
    **{"mlx-8bit": 1e-3, "mlx-4bit": 0.05, "gguf-bf16": 1e-5, "gguf-q8_0": 1e-3, "gguf-q5_1": 0.01},
    **{"gguf-q5_0": 0.01, "gguf-q4_1": 0.02, "gguf-q4_0": 0.03},
}


@pytest.mark.parametrize("name", KINDS)
def test_every_kind_says_what_the_live_adapter_says(run, name, tmp_path, request):
    if name in ("hf", "mlx-4bit", "gguf-q8_0"):  # one for each program that could read it
        request.getfixturevalue("fresh_processes")
    words = ["export", str(run), "--to", name, "--out", str(tmp_path / "out"), "--rows", "3", "--json"]
    result = CliRunner().invoke(app, words, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    record = json.loads(result.stdout)
    assert record == json.loads((tmp_path / "out" / "export.json").read_text())
    assert record["accepted"] and record["rows"] == 3
    assert record["kl"]["mean"] <= KINDS[name]
    assert record["kl"]["base"] > 0.01 and record["kl"]["survived"] == pytest.approx(1, abs=0.1)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_in_a_merged_folder_only_the_changed_tensors_differ(tmp_path, tiny_model):
    run = train(tmp_path, tiny_model, "adapter.targets=[q_proj]")
    out = tunesmith.export(run, to="hf", rows=2).path
    assert out == run / "exports" / "hf"
    before, after = (load_file(folder / "model.safetensors") for folder in (tiny_model, out))
    differing = {name for name in before if not np.array_equal(before[name], after[name])}
    assert before.keys() == after.keys()
    assert differing == {f"model.layers.{layer}.self_attn.q_proj.weight" for layer in (0, 1)}
    header = int.from_bytes((out / "model.safetensors").read_bytes()[:8], "little") + 8
    assert (out / "model.safetensors").read_bytes()[:header] == (
        tiny_model / "model.safetensors"
    ).read_bytes()[:header]
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        assert (out / name).read_bytes() == (tiny_model / name).read_bytes()
    ends = json.loads((out / "generation_config.json").read_text())["eos_token_id"]
    assert ends == [2]  # <|im_end|>


def test_full_weights_and_a_base_that_is_quantised_when_it_is_loaded_are_merged(tmp_path, tiny_model):
    (tmp_path / "full").mkdir()
    full = train(tmp_path / "full", tiny_model, "adapter.kind=full", 'adapter.targets="*"')
    assert tunesmith.export(full, to="hf", rows=2).distances.mean < 1e-6
    with pytest.raises(ExportError, match="trained in full"):
        tunesmith.export(full, to="peft", rows=2)
    (tmp_path / "packed").mkdir()
    packed = train(tmp_path / "packed", tiny_model, "model.quantize=8")
    assert tunesmith.export(packed, to="hf", rows=2).distances.mean < 1e-6
    with pytest.raises(ExportError, match="quantised when it was loaded"):
        tunesmith.export(packed, to="mlx", rows=2)


def test_dora_is_an_adapter_of_peft_and_of_mlx_lm(tmp_path, tiny_model):
    run = train(tmp_path, tiny_model, "adapter.kind=dora")
    assert tunesmith.export(run, to="peft", rows=2).distances.mean < 1e-6
    assert tunesmith.export(run, to="mlx", rows=2).distances.mean < 1e-6


@pytest.fixture(scope="module")
def dated(tmp_path_factory, tiny_model) -> Path:
    """A run whose template writes the date. It was prepared on a day long ago, and created after midnight."""

    class Earlier(datetime):
        @classmethod
        def now(cls, tz=None):
            return datetime(2025, 1, 2, 23, 59, 59, tzinfo=tz)

    folder = tmp_path_factory.mktemp("dated")
    model = shutil.copytree(tiny_model, folder / "model")
    settings = json.loads((model / "tokenizer_config.json").read_text())
    settings["chat_template"] = "{{ strftime_now('%d %b %Y') }}" + settings["chat_template"]
    (model / "tokenizer_config.json").write_text(json.dumps(settings))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(renderers, "datetime", Earlier)
        return train(folder, model)


@pytest.mark.parametrize("name", ["hf", "peft", "mlx", "mlx-merged"])
def test_the_date_in_the_prompts_is_that_of_the_run(dated, name, tmp_path):
    manifest = json.loads((dated / "manifest.json").read_text())
    assert manifest["day"] == "2025-01-02" < manifest["created"]
    assert tunesmith.export(dated, to=name, out=tmp_path / "out", rows=2).rows == 2


def test_a_run_of_0_1_0_is_exported_by_its_rules(run, tmp_path, tiny_model):
    """Its prompts turn thinking off also before an answer with reasoning."""
    old, model = (shutil.copytree(source, tmp_path / source.name) for source in (run, tiny_model))
    settings = json.loads((model / "tokenizer_config.json").read_text())
    settings["chat_template"] = SWITCHED
    (model / "tokenizer_config.json").write_text(json.dumps(settings))
    tokenizer = AutoTokenizer.from_pretrained(str(model))
    manifest = json.loads((old / "manifest.json").read_text())
    manifest["hashes"]["template"] = FirstRules(tokenizer, date(2026, 1, 1)).fingerprint
    (old / "manifest.json").write_text(json.dumps(manifest))
    answer = {"role": "assistant", "content": "<think>\na mat\n</think>\n\nthe cat"}
    row = {"messages": [{"role": "user", "content": "my note"}, answer]}
    (old / "data" / "valid.jsonl").write_text(json.dumps(row) + "\n")
    exported = tunesmith.export(old, to="hf", model=str(model), out=tmp_path / "out")
    assert exported.rows == 1 and exported.distances.mean < 1e-6


@pytest.mark.parametrize("name", ["hf", "peft", "mlx", "mlx-8bit", "gguf-f32", "ollama"])
def test_what_a_program_must_pass_to_the_chat_template_is_said(name, run, tmp_path, tiny_model):
    """The template asks for reasoning unless it is told not to; the run was trained without."""
    model = shutil.copytree(tiny_model, tmp_path / "model")
    settings = json.loads((model / "tokenizer_config.json").read_text())
    settings["chat_template"] = SWITCHED
    (model / "tokenizer_config.json").write_text(json.dumps(settings))
    switched = train(tmp_path, model, "loop.steps=2")
    exported = tunesmith.export(switched, to=name, rows=2)
    says = [remark for remark in exported.remarks if "chat_template_kwargs" in remark]
    if name == "ollama":  # its template has the closed block of reasoning
        assert not says
    else:
        assert len(says) == 1 and 'chat_template_kwargs {"enable_thinking": false}' in says[0]
    plain = tunesmith.export(run, to=name, rows=2, out=tmp_path / "plain").remarks
    assert not any("chat_template_kwargs" in remark for remark in plain)


def test_layers_that_are_too_narrow_for_a_group_are_counted(run, tmp_path):
    tiny.write_model(tmp_path, tiny.write_tokenizer(tmp_path), hidden=96)
    exported = tunesmith.export(train(tmp_path, tmp_path, "loop.steps=2"), to="mlx-8bit", rows=2)
    tensors = load_file(exported.path / "model.safetensors")
    matrices = [name for name, value in tensors.items() if name.endswith(".weight") and value.ndim > 1]
    n_dense = sum(name.replace(".weight", ".scales") not in tensors for name in matrices)
    assert n_dense > 1
    assert f"{n_dense} layers are not quantised: their width is not a multiple of 64" in exported.remarks
    plain = tunesmith.export(run, to="mlx-8bit", rows=2, out=tmp_path / "plain").remarks
    assert not any("not quantised" in remark for remark in plain)


def test_files_of_the_working_folder_are_not_imported(run, tmp_path, monkeypatch):
    for name in ("random", "numpy"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit('imported')\n")
    monkeypatch.chdir(tmp_path)
    assert tunesmith.export(run, to="hf", rows=2, out=tmp_path / "out").accepted


def test_a_process_that_was_ended_by_a_signal_is_said(run, tmp_path, monkeypatch, fresh_processes):
    program = tmp_path / "python"
    program.write_text("#!/bin/sh\nkill -9 $$\n")
    program.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(program))
    with pytest.raises(ExportError, match=r"ended by SIGKILL[\s\S]*out of memory"):
        tunesmith.export(run, to="hf", rows=2, out=tmp_path / "out")


def test_options_that_would_be_ignored_are_refused(run, tmp_path):
    for words, where in (
        (["--to", "hf", "--limit", "3"], "--limit"),
        (["--table", "hf", "--limit", "3"], "--limit"),
        (["--to", "hf", "--discard"], "--discard"),
    ):
        with pytest.raises(ConfigError) as caught:
            CliRunner().invoke(app, ["export", str(run), *words], catch_exceptions=False)
        assert caught.value.where == where and caught.value.hint


def planted(monkeypatch, true: type[kind.ExportKind], spoil) -> None:
    """Let the writer of a kind spoil what it wrote; the fresh process reads it by the true kind."""
    write = true.write

    def spoiled(self, tuned, folder, notify):
        notes = write(self, tuned, folder, notify)
        spoil(folder)
        return notes

    monkeypatch.setattr(true, "write", spoiled)


def edit(change):
    def spoil(folder: Path) -> None:
        path = folder / peft.WEIGHTS
        save_file(change(load_file(path)), path)

    return spoil


def rename(tensors):
    return {name.replace("self_attn", "attention").replace("mlp", "ffn"): v for name, v in tensors.items()}


def turned(tensors):
    return {name: np.ascontiguousarray(v.reshape(v.shape[::-1]).T) for name, v in tensors.items()}


def without_alpha(folder: Path) -> None:
    settings = json.loads((folder / peft.CONFIG).read_text())
    (folder / peft.CONFIG).write_text(json.dumps(settings | {"lora_alpha": settings["r"]}))


def without_end(folder: Path) -> None:
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings["chat_template"] = settings["chat_template"].replace("<|im_end|>", "")
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


def other_stop(folder: Path) -> None:
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": 0}))


@pytest.mark.parametrize(
    ("true", "spoil", "reason"),
    [
        (peft.PEFTAdapter, edit(rename), "matches no layer of the base"),
        (peft.PEFTAdapter, edit(turned), "holds the change|another change|do not hold"),
        (peft.PEFTAdapter, without_alpha, r"all changes are multiplied by 0\.125: look at alpha / rank"),
        (Merged, without_end, "its tokenizer or template renders no row"),
        (Merged, other_stop, "it never stops: the trained end token 2"),
    ],
    ids=["names match nothing", "untransposed", "alpha forgotten", "template without end", "end token"],
)
def test_a_planted_fault_is_rejected_and_named(run, true, spoil, reason, monkeypatch, tmp_path):
    """vllm 34186, 48019, 55193: names match nothing. vmlx-swift 320: untransposed factors. mlx-vlm 986:
    alpha. ollama 8363: the end token."""
    planted(monkeypatch, true, spoil)
    words = ["export", str(run), "--to", true.name, "--out", str(tmp_path / "out"), "--rows", "2"]
    with pytest.raises(ExportError) as caught:
        CliRunner().invoke(app, words, catch_exceptions=False)
    assert caught.value.exit_code == 8 and re.search(reason, str(caught.value))
    assert not (tmp_path / "out").exists()
    record = json.loads((tmp_path / "out.rejected" / "export.json").read_text())
    assert not record["accepted"] and any(re.search(reason, line) for line in record["reasons"])


def test_a_tensor_that_was_left_out_is_named():
    base = {"a.weight": np.zeros(4), "lm_head.weight": np.zeros(4)}
    live = {name: np.ones(4) for name in base}
    carried = fidelity.carried(base, live, {**live, "lm_head.weight": np.zeros(4)})
    assert carried.gains == {"a.weight": 1, "lm_head.weight": 0} and carried.error == 0.5
    assert "lm_head.weight" in fidelity.diagnosis(carried, None)[0]
    lost = fidelity.diagnosis(Carried({"a.weight": 0.9}), 0.4)
    assert lost == ["rounding to the dtype of the base left 40% of the change of the weights"]


def test_a_tensor_without_its_change_is_a_reason_also_where_the_rows_do_not_show_it():
    same = np.log(np.full((4, 8), 1 / 8, dtype=np.float32))
    measured = fidelity.distances(same, same + np.linspace(-1, 1, 8, dtype=np.float32), same)
    no_answers = fidelity.Stops(0, 0, 0, 0, ())

    def reasons(carried: Carried, name: str, rounded: float | None = None) -> list[str]:
        tolerance = kind.named(name).tolerance
        return fidelity.reasons(
            fidelity.distant(measured, tolerance), no_answers, carried, tolerance, rounded
        )

    base = {name: np.full(4, 1.0) for name in "abc"}
    live = {"a": np.full(4, 1.5), "b": np.full(4, 1.001), "c": base["c"]}
    for name in ("hf", "mlx-4bit", "peft"):
        missing = fidelity.carried(base, live, {"b": live["b"]})
        assert reasons(missing, name) == ["tensors without a counterpart: a"]
        assert reasons(fidelity.carried(base, live, live), name) == []
    lost = fidelity.carried(base, live, {**live, "a": base["a"]})
    assert reasons(lost, "hf") == ["1 of 2 changed tensors lost their change: a"]
    assert reasons(lost, "mlx-4bit") == []
    faint = fidelity.carried(base, live, {**live, "b": base["b"]})
    assert reasons(faint, "hf", 0.8) == []  # rounding to bfloat16 may erase so little
    for name, rounded in (("hf", 1.0), ("gguf-lora", None)):  # nothing was rounded
        assert reasons(faint, name, rounded) == ["1 of 2 changed tensors lost their change: b"]


def test_an_artefact_that_is_there_is_not_overwritten_and_a_wrong_kind_lists_all(run, tmp_path):
    (tmp_path / "out").mkdir()
    with pytest.raises(tunesmith.errors.DataError, match="exists already"):
        tunesmith.export(run, to="hf", out=tmp_path / "out")
    with pytest.raises(
        tunesmith.errors.ConfigError,
        match=r"gguf-q8_0, hf, mlx, mlx-4bit, mlx-8bit, mlx-merged, ollama, .*peft",
    ):
        tunesmith.export(run, to="onnx")


def test_a_kind_costs_one_class():
    @kind.register
    class Toy(Merged):
        name = "toy"

    try:
        assert kind.named("toy").what == Merged.what and "toy" in kind.kinds()
    finally:
        del kind._REGISTERED["toy"]


def test_a_quantised_base_keeps_its_adapter_or_is_expanded_and_hf_refuses_it(tmp_path, tiny_model):
    from mlx_lm import convert

    packed = tmp_path / "packed"
    convert(str(tiny_model), str(packed), quantize=True, q_group_size=32, q_bits=4)
    run = train(tmp_path, packed)
    assert tunesmith.export(run, to="mlx", rows=2).distances.mean < 1e-6
    assert tunesmith.export(run, to="mlx-merged", rows=2).distances.mean < 1e-6
    with pytest.raises(ExportError, match="files are quantised"):
        tunesmith.export(run, to="hf", rows=2)


def test_rows_that_were_added_to_the_embedding_are_in_the_merged_folder(tmp_path, tiny_model):
    small = shutil.copytree(tiny_model, tmp_path / "small")
    tensors, config = load_file(small / "model.safetensors"), json.loads((small / "config.json").read_text())
    known = config["vocab_size"] - 4
    tensors["model.embed_tokens.weight"] = tensors["model.embed_tokens.weight"][:known].copy()
    save_file(tensors, small / "model.safetensors")
    (small / "config.json").write_text(json.dumps(config | {"vocab_size": known}))
    run = train(tmp_path, small, "model.resize_embeddings=true")
    for name, divergence in (("hf", 1e-6), ("mlx-merged", 1e-6), ("mlx-8bit", 1e-3)):
        exported = tunesmith.export(run, to=name, rows=2)
        assert exported.distances.mean < divergence
        assert json.loads((exported.path / "config.json").read_text())["vocab_size"] == known + 4
    with pytest.raises(ExportError, match="rows that were added"):
        tunesmith.export(run, to="peft", rows=2)


def test_what_was_merged_into_the_base_is_in_the_merged_folder(run, tmp_path, tiny_model):
    above = train(tmp_path, tiny_model, f"model.adapter={run}", "adapter.full_modules=[input_layernorm]")
    assert tunesmith.export(above, to="hf", rows=2).distances.mean < 1e-6
    with pytest.raises(ExportError, match="another adapter merged into it"):
        tunesmith.export(above, to="mlx", rows=2)


def test_numbers_that_are_not_finite_never_pass():
    """A NaN is neither above nor below a tolerance."""
    live = np.log(np.full((4, 8), 1 / 8, dtype=np.float32))
    base = live + np.linspace(-1, 1, 8, dtype=np.float32)
    artefact = live.copy()
    artefact[1, 2] = np.nan
    measured = fidelity.distances(live, base, artefact)
    loose = kind.Tolerance(kl=1e9, p99=1e9, top=0.0, lost=1e9)
    assert fidelity.distant(measured, loose)[0] == "its log-probabilities are not finite"
    certain = np.log(np.eye(8, dtype=np.float32)[:4] + 1e-45)
    certain[certain < -80] = -np.inf
    assert fidelity.distances(certain, base, certain).mean == 0


def test_the_end_tokens_that_count_are_those_that_end_rows():
    probes = [fidelity.Probe([5, 6, 2], 1, [0]), fidelity.Probe([5, 7, 2], 1, [0])]
    assert fidelity.trained_ends(probes, (9, 2, 4)) == [2]
    stopping = fidelity.stops([], [], [2], [9])
    assert stopping.undeclared == (2,) and fidelity.stops([], [], [2], [2]).undeclared == ()


@pytest.mark.parametrize(
    ("model_type", "refused"), [("arcee", True), ("ernie4_5_moe", True), ("llama", False)]
)
def test_a_base_that_mlx_lm_cannot_load_is_refused(model_type, refused):
    tuned: Any = SimpleNamespace(base_config={"model_type": model_type})
    if refused:
        with pytest.raises(ExportError, match="mlx-lm itself cannot load models of type"):
            kind.require_class_of_mlx_lm(tuned, "mlx")
    else:
        kind.require_class_of_mlx_lm(tuned, "mlx")


def test_the_place_of_a_rejected_artefact_is_not_taken_from_others(run, tmp_path):
    place = tmp_path / "out.rejected"
    place.mkdir()
    (place / "mine.txt").write_text("kept")
    with pytest.raises(DataError, match="exists already"):
        tunesmith.export(run, to="peft", out=tmp_path / "out")
    assert (place / "mine.txt").read_text() == "kept"


def test_what_an_artefact_costs_and_loses_is_measured(run, tmp_path):
    """Loss and task are those of the live adapter. (On a CPU quantised weights are expanded, so 8 bits need
    less space on disk, and not less memory.)"""
    exact, packed = (
        tunesmith.export(run, to=name, out=tmp_path / name, rows=3, evaluate=True, limit=3)
        for name in ("mlx-merged", "mlx-8bit")
    )
    assert exact.cost and packed.cost and exact.cost.speed.value > 0 and exact.cost.speed.n == 5
    weights = sum(file.stat().st_size for file in exact.path.glob("*.safetensors"))
    assert exact.cost.memory_bytes > weights > 0 < packed.cost.memory_bytes
    assert packed.size_bytes < exact.size_bytes
    assert exact.loss and exact.loss.n == 3 and exact.loss.delta == pytest.approx(0, abs=1e-6)
    assert {score.task for score in exact.scores} >= {"perplexity"}
    for score in exact.scores:
        assert score.headline and score.delta == pytest.approx(0, abs=1e-6 * score.value)
    assert exact.distances.low is not None and exact.distances.high is not None
    assert exact.distances.low <= exact.distances.mean <= exact.distances.high
    assert artefacts.load(tmp_path / "mlx-8bit") == packed


def test_the_loss_is_that_of_the_next_tokens():
    probes = [fidelity.Probe([0, 1, 2], 1, [0, 1]), fidelity.Probe([0, 3], 1, [0])]
    live = np.log(np.full((3, 4), 0.25, dtype=np.float32))
    artefact = live.copy()
    for place, token in enumerate((1, 2, 3)):
        artefact[place, token] = np.log(0.5)
    score = fidelity.loss(live, artefact, probes)
    assert score is not None and score.n == 2
    assert score.value == pytest.approx(np.log(2)) and score.delta == pytest.approx(-np.log(2))


def test_an_artefact_is_not_rejected_for_a_few_answers_that_do_not_end():
    loose, same = kind.Tolerance(1, 1, 0, 1), fidelity.Distances(1, 0, 0, 0, 0, 0, 1, 0, 1, 1, 1)

    def rejected(n: int) -> list[str]:
        stops = fidelity.Stops(n, n, 0, 0, (), lost=n)
        return fidelity.reasons(fidelity.distant(same, loose), stops, Carried(), loose, None)

    assert not rejected(1) and not rejected(5)
    assert rejected(6) == ["it does not stop: 0 of 6 answers end, live 6"]
    assert "too few to say" in fidelity.undecided(fidelity.Stops(1, 1, 0, 0, (), lost=1))[0]
    assert not fidelity.undecided(fidelity.Stops(6, 6, 0, 0, (), lost=6))


def test_without_settings_a_model_stops_at_the_eos_token_of_its_tokenizer(tmp_path):
    """A template may end calls with another token, which stands behind it in the list."""
    renderer: Any = SimpleNamespace(eos_ids=(5, 7), text_end_id=5)
    assert kind.declared_ends(tmp_path, renderer) == (5,)
    renderer.text_end_id = None
    assert kind.declared_ends(tmp_path, renderer) == (7,)
    (tmp_path / "config.json").write_text(json.dumps({"eos_token_id": 3}))
    assert kind.declared_ends(tmp_path, renderer) == (3,)


def test_an_adapter_for_mlx_lm_names_no_path_of_this_machine(run, tiny_model, tmp_path):
    went_on = train(tmp_path, tiny_model, "adapter.rank=4", f"adapter.start={run}")
    saved = json.loads((Run.open(went_on).checkpoint(12) / "adapter_config.json").read_text())
    assert str(run) in json.dumps(saved)
    made = tunesmith.export(went_on, to="mlx", rows=2)
    written = (made.path / "adapter_config.json").read_text()
    assert str(run) not in written and json.loads(written)["tunesmith"]["adapter"]["rank"] == 4


def test_an_export_of_a_run_that_did_not_end_says_so(run, tmp_path):
    cut = tmp_path / "cut"
    shutil.copytree(run, cut, ignore=shutil.ignore_patterns("exports"))
    manifest = json.loads((cut / "manifest.json").read_text())
    (cut / "manifest.json").write_text(json.dumps(manifest | {"status": "interrupted"}))
    assert "status: interrupted" in tunesmith.export(cut, to="mlx", rows=2).remarks[0]
    whole = tunesmith.export(run, to="mlx", out=tmp_path / "whole", rows=2)
    assert not [remark for remark in whole.remarks if "status" in remark]
