"""GGUF files: the writer is the inverse of the reader, what the base's file held stays, and the faults that
exporters of the field had are refused or rejected by name."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf import GGUFReader, GGUFValueType, GGUFWriter

import tiny
import tunesmith
from tunesmith import events
from tunesmith.adapters import adapted
from tunesmith.errors import ExportError, ModelError
from tunesmith.exports import fidelity
from tunesmith.exports.kind import Tuned
from tunesmith.exports.kinds import gguf, gguf_lora
from tunesmith.model.gguf import tensor_types, tokenizer_header, weights, writing
from tunesmith.model.gguf.architectures import ARCHITECTURES, complete, describe, settings
from tunesmith.model.gguf.metadata import Metadata
from tunesmith.model.gguf.tokenizer import CONTROL, UNUSED, USER_DEFINED

SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_hidden_layers": 8,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 4096,
    "rope_theta": 50_000.0,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"head_dim": 16},
    "smollm3": {},
    "qwen2": {"rope_scaling": {"rope_type": "linear", "factor": 4.0}},
    "qwen3": {"head_dim": 16},
    "gemma2": {
        "query_pre_attn_scalar": 8,
        "attn_logit_softcapping": 50.0,
        "final_logit_softcapping": 30.0,
        "sliding_window": 512,
    },
    "gemma3_text": {
        "query_pre_attn_scalar": 8,
        "sliding_window": 512,
        "sliding_window_pattern": 6,
        "rope_local_base_freq": 20_000.0,
    },
    "phi3": {"partial_rotary_factor": 0.5},
}
QUICK = ["loop.steps=12", "optimizer.learning_rate=0.01"]


def config_of(family: str) -> dict[str, Any]:
    return complete({**SIZES, "model_type": family, **FAMILIES[family]})


@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_read_from_a_header_is_what_was_written_into_it(family):
    config = config_of(family)
    name = writing.architecture_of(config)
    description = describe(ARCHITECTURES[name], config, 100)
    tensors = {"token_embd.weight": writing._stand_in("token_embd.weight", (100, 32))}
    read = settings(ARCHITECTURES[name], Metadata(name, dict(description.values), tensors))
    assert read["model_type"] == family and read["vocab_size"] == 100
    assert {key: read[key] for key in SIZES} == SIZES
    for key, value in FAMILIES[family].items():
        given = read[key]
        assert given == value if key != "rope_scaling" else given["factor"] == value["factor"]


def test_the_rotary_scaling_of_llama_3_becomes_its_tensor_and_others_are_refused():
    scaling = {"rope_type": "llama3", "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    scaling["original_max_position_embeddings"] = 8192
    config = config_of("llama") | {"rope_scaling": scaling}
    description = describe(ARCHITECTURES["llama"], config, 100)
    tensors = {"token_embd.weight": writing._stand_in("token_embd.weight", (100, 32))}
    tensors |= {name: writing._stand_in(name, v.shape, v) for name, v in description.factors.items()}
    read = settings(ARCHITECTURES["llama"], Metadata("llama", dict(description.values), tensors))
    assert read["rope_scaling"] == pytest.approx(scaling)
    for wrong in (scaling | {"high_freq_factor": 8.0}, {"rope_type": "dynamic", "factor": 2.0}):
        with pytest.raises(ModelError, match="rope_scaling"):
            describe(ARCHITECTURES["llama"], config | {"rope_scaling": wrong}, 100)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("part", "rows"), [("attn_q", 4), ("attn_k", 2), ("attn_norm", 4), ("ffn_up", 4)])
def test_rows_are_put_back_as_they_were(family, part, rows):
    config = config_of(family)
    architecture = ARCHITECTURES[writing.architecture_of(config)]
    value = np.arange(rows * config["head_dim"] * 3, dtype=np.float32).reshape(-1, 3)
    stored = weights.in_file(architecture, part, value, config)
    assert np.array_equal(weights.from_file(architecture, part, stored, config), value)
    paired = architecture.interleaved and part in ("attn_q", "attn_k")
    assert np.array_equal(stored, value) == (not paired and not (architecture.shifted and "norm" in part))


def train(folder: Path, model: Path, *sets: str) -> Path:
    rows = tiny.write_rows(folder / "rows.jsonl", tiny.conversations(24))
    config = tunesmith.configure(model=str(model), data=[str(rows)], sets=[*QUICK, *sets])
    tunesmith.train(config, out=folder / "run")
    return folder / "run"


@pytest.fixture(scope="module")
def untied(tmp_path_factory) -> Path:
    """A run on a model whose head is adapted as well."""
    folder = tmp_path_factory.mktemp("untied")
    base = folder / "base"
    base.mkdir()
    tiny.write_model(base, tiny.write_tokenizer(base) + 5, tied=False)
    return train(folder, base, "adapter.targets=[q_proj, k_proj, lm_head]")


def header(folder: Path) -> dict[str, Any]:
    (path,) = folder.glob("*.gguf")
    return {name: field.contents() for name, field in GGUFReader(path).fields.items()}


def test_the_header_has_the_tokenizer_the_template_and_the_trained_end(untied, tmp_path):
    exported = tunesmith.export(untied, to="gguf-f16", out=tmp_path / "out", rows=2)
    values = header(exported.path)
    tokens, kinds = values["tokenizer.ggml.tokens"], values["tokenizer.ggml.token_type"]
    assert values["general.architecture"] == "llama" and values["tokenizer.ggml.pre"] == "gpt-2"
    assert tokens[2] == "<|im_end|>" and kinds[2] == CONTROL
    assert values["tokenizer.ggml.eos_token_id"] == 2 and not values["tokenizer.ggml.add_bos_token"]
    assert values["tokenizer.chat_template"] == tiny.CHATML
    assert tokens[-1] == f"[PAD{len(tokens) - 1}]" and kinds[-1] == UNUSED
    (path,) = exported.path.glob("*.gguf")
    assert {"output.weight", "blk.1.attn_q.weight"} <= {tensor.name for tensor in GGUFReader(path).tensors}


def test_an_adapter_for_llama_cpp_says_the_same_on_the_head_too(untied, tmp_path):
    exported = tunesmith.export(untied, to="gguf-lora", out=tmp_path / "out", rows=2)
    assert exported.distances.mean < 1e-6
    reader = GGUFReader(exported.path / gguf_lora.FILE)
    names = {tensor.name for tensor in reader.tensors}
    assert {"output.weight.lora_a", "output.weight.lora_b", "blk.0.attn_k.weight.lora_b"} <= names
    assert header(exported.path)["adapter.lora.alpha"] == 0


def test_a_base_that_is_a_gguf_file_keeps_its_header_and_the_bytes_of_other_tensors(untied, tmp_path):
    base = tunesmith.export(untied, to="gguf-f16", out=tmp_path / "base", rows=2).path
    (file,) = base.glob("*.gguf")
    run = train(tmp_path, file, "adapter.targets=[q_proj]")
    out = tunesmith.export(run, to="gguf-f32", out=tmp_path / "out", rows=2).path
    before, after = GGUFReader(file), GGUFReader(next(out.glob("*.gguf")))
    assert [tensor.name for tensor in before.tensors] == [tensor.name for tensor in after.tensors]
    for old, new in zip(before.tensors, after.tensors, strict=True):
        if "attn_q" in old.name:
            assert (old.tensor_type.name, new.tensor_type.name) == ("F16", "F32")
        else:
            assert old.tensor_type == new.tensor_type and np.array_equal(old.data, new.data)
    own = {"general.file_type", "GGUF.kv_count"}
    kept = {name: value for name, value in header(base).items() if name not in own}
    assert kept.items() <= header(out).items()
    assert tunesmith.export(run, to="gguf-lora", rows=2).distances.mean < 1e-6


def test_of_a_gguf_base_the_bits_of_the_whole_file_are_said(untied, tmp_path):
    """One matrix of each block is written in 4.5 bits; the rest of the file stays in 32."""
    base = tunesmith.export(untied, to="gguf-f32", out=tmp_path / "base", rows=2).path
    (file,) = base.glob("*.gguf")
    run = train(tmp_path, file, "adapter.targets=[q_proj]", "loop.steps=2", "optimizer.learning_rate=1e-5")
    notices: list[events.Event] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fidelity, "reasons", lambda *args: [])  # so small a change is lost
        exported = tunesmith.export(run, to="gguf-q4_0", rows=2, notify=notices.append)
    texts = [notice.what for notice in notices if isinstance(notice, events.Notice)]
    assert "writing gguf-q4_0: merged model as GGUF, what changed as Q4_0, all else as in the base" in texts
    (path,) = exported.path.glob("*.gguf")
    tensors = GGUFReader(path).tensors
    new = [tensor for tensor in tensors if "attn_q" in tensor.name]
    bits = 8 * sum(tensor.n_bytes for tensor in tensors) / sum(int(tensor.n_elements) for tensor in tensors)
    said = f"of {len(tensors)} tensors {len(new)} changed ({len(new)} Q4_0), the others are those of the base"
    assert f"{said}: the file has {bits:.1f} bits a weight" in exported.remarks and bits > 25
    assert header(exported.path)["general.file_type"] == header(base)["general.file_type"]


def test_of_a_new_file_the_bits_are_those_of_the_file(untied, tmp_path):
    exported = tunesmith.export(untied, to="gguf-q8_0", out=tmp_path / "out", rows=2)
    (path,) = exported.path.glob("*.gguf")
    tensors = GGUFReader(path).tensors
    bits = 8 * sum(tensor.n_bytes for tensor in tensors) / sum(int(tensor.n_elements) for tensor in tensors)
    assert f"the file has {bits:.1f} bits a weight" in exported.remarks and 8.5 < bits < 9.5


def test_a_base_of_another_alignment_is_copied_whole(tmp_path):
    source = GGUFWriter(tmp_path / "base.gguf", "llama")
    source.add_custom_alignment(128)
    tensors = {name: np.arange(size, dtype=np.float32) for name, size in (("a", 8), ("b", 5), ("c", 64))}
    for name, value in tensors.items():
        source.add_tensor(name, value)
    source.write_header_to_file()
    source.write_kv_data_to_file()
    source.write_tensors_to_file()
    source.close()
    base = GGUFReader(tmp_path / "base.gguf")
    whole = [
        writing.NewTensor(each.name, each.data.shape, each.tensor_type, lambda data=each.data: [data])
        for each in base.tensors
    ]
    writing.write(tmp_path / "copy.gguf", "llama", {}, whole, list(base.fields.values()))
    copied = GGUFReader(tmp_path / "copy.gguf")
    assert copied.fields["general.alignment"].contents() == 128
    assert {each.name: each.data.tolist() for each in copied.tensors} == {
        name: value.tolist() for name, value in tensors.items()
    }


@pytest.mark.parametrize("setting", ["adapter.kind=dora", "adapter.kind=full", "model.quantize=8"])
def test_other_ways_of_training_are_merged_and_refused_as_an_adapter(setting, tmp_path, tiny_model):
    run = train(tmp_path, tiny_model, setting, "adapter.targets=[q_proj]")
    assert tunesmith.export(run, to="gguf-f32", rows=2).distances.mean < 1e-6
    with pytest.raises(ExportError, match="gguf-lora: "):
        tunesmith.export(run, to="gguf-lora", rows=2)


def test_a_family_that_cannot_be_written_is_refused_with_llama_cpp_s_command():
    with pytest.raises(ModelError, match="models of type mamba cannot be written"):
        writing.architecture_of({"model_type": "mamba"})
    assert "convert_hf_to_gguf.py" in gguf.CONVERTER


def without_head(monkeypatch) -> None:
    """llama.cpp 9065: the change of the head is dropped."""
    tensors = Tuned.tensors

    def spoiled(tuned):
        head: Any = adapted(tuned.loaded.net)["lm_head"]
        return tensors(tuned) | {"lm_head.weight": lambda: head.linear.weight}

    monkeypatch.setattr(Tuned, "tensors", spoiled)


def without_pairs(monkeypatch) -> None:
    monkeypatch.setattr(weights, "in_file", lambda architecture, part, array, config: array)


def without_template(monkeypatch) -> None:
    """LlamaFactory 8399: chat_template lost."""
    monkeypatch.setattr(tokenizer_header, "_templates", lambda template: {})


def with_other_end(monkeypatch) -> None:
    """Ollama 8363: the chat's end token is not the stop token."""
    values = tokenizer_header.tokenizer_values
    monkeypatch.setattr(
        tokenizer_header, "tokenizer_values", lambda folder, n_tokens, ends: values(folder, n_tokens, (0,))
    )


def with_bos(monkeypatch) -> None:
    """Soup 781: the template writes BOS, and the tokenizer once more."""
    templates = tokenizer_header._templates
    twice = {"tokenizer.chat_template": "<|endoftext|>" + tiny.CHATML}
    monkeypatch.setattr(tokenizer_header, "_templates", lambda template: templates(template) | twice)


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (without_head, "changed tensors do not hold the change: lm_head.weight"),
        (without_pairs, "tensors with another change|do not hold the change|inert"),
        (without_template, "its tokenizer or template renders no row"),
        (with_other_end, "it never stops: the trained end token 2"),
        (with_bos, "other ids: "),
    ],
)
def test_museum_faults_of_gguf_files_are_rejected_and_named(untied, spoil, reason, monkeypatch, tmp_path):
    spoil(monkeypatch)
    with pytest.raises(ExportError) as caught:
        tunesmith.export(untied, to="gguf-f32", out=tmp_path / "out", rows=2)
    assert caught.value.exit_code == 8 and re.search(reason, str(caught.value)), str(caught.value)
    assert not (tmp_path / "out").exists()


def test_museum_added_tokens_and_bos_are_in_the_header(tmp_path):
    """llama.cpp 15842: added tokens gone; 3966: add_bos ignored."""
    size = tiny.write_tokenizer(tmp_path)
    file, other = tmp_path / "tokenizer.json", tmp_path / "tokenizer_config.json"
    content = json.loads(file.read_text())
    added = {"id": size, "content": "<tool>", "special": False, "normalized": False}
    content["added_tokens"].append(added | {"single_word": False, "lstrip": False, "rstrip": False})
    content["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [
            {"SpecialToken": {"id": "<|endoftext|>", "type_id": 0}},
            {"Sequence": {"id": "A", "type_id": 0}},
        ],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 0}}],
        "special_tokens": {"<|endoftext|>": {"id": "<|endoftext|>", "ids": [0], "tokens": ["<|endoftext|>"]}},
    }
    file.write_text(json.dumps(content))
    other.write_text(json.dumps(json.loads(other.read_text()) | {"bos_token": "<|endoftext|>"}))
    values: Any = tokenizer_header.tokenizer_values(tmp_path, size + 1, (2,))
    assert values["tokenizer.ggml.tokens"][size] == "<tool>"
    assert values["tokenizer.ggml.token_type"][size] == USER_DEFINED
    assert values["tokenizer.ggml.add_bos_token"] and values["tokenizer.ggml.bos_token_id"] == 0


def test_museum_a_pre_tokenizer_is_never_taken_for_another(tmp_path):
    """llama.cpp 7881: a pre-tokenizer taken for another one."""
    size = tiny.write_tokenizer(tmp_path)
    file = tmp_path / "tokenizer.json"
    content = json.loads(file.read_text())
    digits = {"type": "Digits", "individual_digits": True}
    plain = content["pre_tokenizer"]
    content["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [digits, plain]}
    file.write_text(json.dumps(content))
    values = tokenizer_header.tokenizer_values(tmp_path, size, (2,))
    assert values["tokenizer.ggml.pre"] == "smollm"
    cut = {"type": "Split", "pattern": {"String": "e"}, "behavior": "Isolated", "invert": False}
    content["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [cut, plain]}
    file.write_text(json.dumps(content))
    with pytest.raises(ModelError, match="cuts text as no pre-tokenizer"):
        tokenizer_header.tokenizer_values(tmp_path, size, (2,))


def test_museum_mistral_s_sentencepiece_file_becomes_scores_and_types(tiny_mistral):
    values: Any = tokenizer_header.tokenizer_values(tiny_mistral, 32768, (2,))
    assert values["tokenizer.ggml.model"] == "llama" and len(values["tokenizer.ggml.scores"]) == 32768
    assert values["tokenizer.ggml.tokens"][3] == "[INST]"
    tokenizer_header.require_readable(values, "llama")
    with pytest.raises(ModelError, match="32768 tokens, the embedding 100 rows"):
        tokenizer_header.tokenizer_values(tiny_mistral, 100, (2,))


def test_values_that_float16_cannot_hold_are_refused():
    kind = tensor_types.choose("blk.0.ffn_up.weight", (4, 32), "F16", 8, head=False).type
    with pytest.raises(ModelError, match="values that F16 cannot hold"):
        writing.encoded(np.full((4, 32), 1e6, np.float32), kind, "blk.0.ffn_up.weight")
    assert tensor_types.choose("x", (4, 33), "Q4_0", 8, head=False).type.name == "F16"
    assert tensor_types.choose("x", (4, 32), "Q4_0", 8, head=True).type.name == "Q8_0"
    assert GGUFValueType.BOOL == writing._value_type(True) != writing._value_type(1)


def test_the_folder_of_the_artefact_has_the_name_of_the_kind(untied):
    path = tunesmith.export(untied, to="gguf:f16", rows=2).path
    assert path.name == "gguf-f16"
    shutil.rmtree(path)
