"""llama.cpp loads the GGUF files that are exported: its logits are those of the live adapter, and its ids
those of training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from parity import families
from parity.families import LLAMA3, Family
from parity.llama_cpp import LlamaCpp
from transformers import AutoTokenizer

import tiny
import tunesmith
from processes import cache_folder
from tunesmith.data.formats import Conversation, Message
from tunesmith.exports import fidelity
from tunesmith.runs import opening

pytest.importorskip("xllamacpp")
pytestmark = [pytest.mark.parity, pytest.mark.filterwarnings("ignore")]

ROWS = 340
"""Of the embedding: more than the tokenizer has ids."""
ROPE = {"rope_type": "default", "rope_theta": 10_000.0}
SETTINGS: dict[str, dict[str, Any]] = {
    "llama": {},
    "llama, tied head": {"tie_word_embeddings": True},
    "llama, llama3 rope": {"rope_parameters": {**LLAMA3, "original_max_position_embeddings": 8192}},
    "llama, linear rope": {},
    "llama, yarn": {},
    "mistral": {},
    "qwen2": {},
    "qwen2, yarn": {},
    "qwen3": {},
    "gemma2": {"rope_parameters": ROPE, "head_dim": 256, "query_pre_attn_scalar": 256},
    "gemma3_text, 16-token window": {},
    "gemma3": {},
    "phi3": {},
    "phi3, partial rotary (phi 4 mini)": {},
    "phi3, longrope within the first range": {"original_max_position_embeddings": 256},
    "smollm3": {},
}
"""By name in the table of families: what a GGUF file cannot have otherwise."""


def family_of(name: str) -> Family:
    known = {family.name: family for family in families.FAMILIES}
    family = known.get(name) or known[name.split(",")[0]]
    return family._replace(settings={**family.settings, "vocab_size": ROWS, **SETTINGS[name]})


def trained(folder: Path, base: Path, *sets: str) -> Path:
    rows = tiny.write_rows(folder / "rows.jsonl", tiny.conversations(24))
    quick = ["loop.steps=6", "adapter.rank=4", "optimizer.learning_rate=0.01", "adapter.targets=all-linear"]
    config = tunesmith.configure(model=str(base), data=[str(rows)], sets=[*quick, *sets])
    tunesmith.train(config, out=folder / "run")
    return folder / "run"


def live(run: Path, ids: list[int]) -> np.ndarray:
    """(T, V) log-probabilities of the live adapter."""
    opened = opening.find(run).open()
    opened.attach()
    logits = np.array(opened.loaded.net(mx.array([ids])))[0].astype(np.float64)
    logits -= logits.max(axis=1, keepdims=True)
    return logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))


def exported(run: Path, to: str) -> Path:
    (path,) = tunesmith.export(run, to=to, rows=2).path.glob("*.gguf")
    return path


@pytest.fixture(autouse=True)
def _cache(tmp_path, monkeypatch):
    monkeypatch.setenv("TUNESMITH_CACHE", str(cache_folder(tmp_path / "cache")))


@pytest.mark.parametrize("name", SETTINGS)
def test_llama_cpp_computes_what_the_live_adapter_computes(name, tmp_path):
    """mlx-examples 1043, 849: llama.cpp does not load the file, or does not stop."""
    base = tmp_path / "base"
    families.build(family_of(name)).save_pretrained(base)
    tiny.write_tokenizer(base)
    run = trained(tmp_path, base)
    ids = np.random.Generator(np.random.PCG64(3)).integers(3, 300, 40).tolist()
    expected, other = live(run, ids), LlamaCpp(exported(run, "gguf-f32"))
    bar = 5e-3 if name.startswith("gemma") else 1e-4  # llama.cpp has GELU in a table in half precision
    for length in (3, 17, 40):
        logprobs = other.logprobs(ids[:length], ROWS)
        assert np.abs(logprobs - expected[length - 1]).max() <= bar
    text = "<|im_start|>user\nIt's 12345 of\n\n\tthem<|im_end|>\n<|im_start|>assistant\n"
    tokenizer = AutoTokenizer.from_pretrained(str(base))
    assert other.ids(text) == tokenizer.encode(text, add_special_tokens=False)


def test_llama_cpp_applies_an_exported_adapter(tmp_path):
    """Its file of the base is the export of a run that learned almost nothing."""
    base = tiny.write_llama(tmp_path / "base")
    (tmp_path / "same").mkdir()
    same = trained(tmp_path / "same", base, "optimizer.learning_rate=1e-12")
    run = trained(tmp_path, base, "adapter.rank_stabilised=true")
    ids = np.random.Generator(np.random.PCG64(3)).integers(3, 250, 40).tolist()
    expected = live(run, ids)
    size = expected.shape[1]
    adapter = exported(run, "gguf-lora")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fidelity, "reasons", lambda *args: [])
        file = exported(same, "gguf-f32")
    other = LlamaCpp(file, adapter)
    for length in (3, 17, 40):
        logprobs = other.logprobs(ids[:length], size)
        assert np.abs(logprobs - expected[length - 1]).max() <= 1e-4


def test_llama_cpp_reads_mistral_v3_s_turns_as_they_were_trained(tmp_path):
    base = tiny.write_mistral(tmp_path / "base")
    run = trained(tmp_path, base)
    other = LlamaCpp(exported(run, "gguf-f16"))
    renderer = opening.find(run).open().renderer
    turns = ("my note", "the cat  sat", "on a\nmat")
    roles = ("user", "assistant", "user")
    messages = tuple(Message(role, words) for role, words in zip(roles, turns, strict=True))
    expected = renderer.prompt(Conversation(messages))
    assert other.ids("[INST] my note[/INST] the cat  sat</s>[INST] on a\nmat[/INST]") == expected
