"""GGUF files made of transformers' models: the logits are those of the models, of llama.cpp, and of what
transformers reads from the file; ids of texts are those of llama.cpp and SentencePiece."""

from __future__ import annotations

import inspect
import json
import random
import unicodedata
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from parity import families
from parity.families import YARN, Family

import gguf_files
from tunesmith.model import kernels, loading
from tunesmith.model.gguf.pretokenizers import PRETOKENIZERS
from tunesmith.model.gguf.tokenizer import BYTE, CONTROL, NORMAL, UNKNOWN, USER_DEFINED, build_tokenizer

pytestmark = [pytest.mark.parity, pytest.mark.filterwarnings("ignore")]

SIZE = 320
MINISTRAL = {**YARN, "mscale": 1.0, "mscale_all_dim": 1.0, "llama_4_scaling_beta": 0.1}
NAMES = (
    "llama",
    "llama, linear rope",
    "llama, yarn",
    "mistral",
    "qwen2",
    "qwen2, yarn",
    "qwen3",
    "qwen3_moe",
    "gemma2",
    "gemma3_text",
    "gemma3_text, 16-token window",
    "phi3",
    "phi3, partial rotary (phi 4 mini)",
    "phi3, longrope within the first range",
    "phi3, longrope beyond it",
    "granite",
    "gpt_oss",
    "gpt_oss, yarn of the released models",
    "gpt_oss, 16-token window",
    "ministral3",
)
READ_BY_TRANSFORMERS = ("llama", "qwen2", "qwen3", "qwen3_moe", "gemma2")
IDS = np.random.Generator(np.random.PCG64(3)).integers(3, SIZE, 40).tolist()


CHANGED: dict[str, dict[str, Any]] = {
    "ministral3": {"rope_parameters": MINISTRAL},
    "gemma2": {
        "rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0},
        "head_dim": 256,
        "query_pre_attn_scalar": 256,
    },
    # llama.cpp takes the long factors of a context that is longer, and its shortest one has 256 tokens
    "phi3, longrope within the first range": {"original_max_position_embeddings": 256},
    # transformers' reader takes these sizes, and those of gemma2, whatever the file says
    "qwen3": {"head_dim": 128},
    "qwen3_moe": {"moe_intermediate_size": 768},
}
"""Settings that a GGUF file, or one of its readers, cannot have otherwise."""


def family_of(name: str) -> Family:
    family = next(family for family in families.FAMILIES if family.name == name)
    return family._replace(settings={**family.settings, "vocab_size": SIZE, **CHANGED.get(name, {})})


def written(name: str, folder: Path, kind: str = "F32") -> tuple[Any, Path]:
    """The model on torch, and its GGUF file, with matrices of the type ``kind``."""
    model = families.build(family_of(name))
    model.save_pretrained(folder / "source")
    config = families.old_config(json.loads((folder / "source" / "config.json").read_text()))
    weights = {key: value.numpy() for key, value in model.state_dict().items()}
    if config["tie_word_embeddings"]:
        weights.pop("lm_head.weight", None)
    path = folder / "model.gguf"
    return model, gguf_files.write(path, config, weights, gguf_files.alphabet(n_tokens=SIZE), kind)


def torch_logits(model: Any) -> np.ndarray:
    import torch

    with torch.no_grad():
        return model(torch.tensor([IDS])).logits[0].float().numpy()


def our_logits(path: Path) -> np.ndarray:
    import mlx.core as mx

    net = loading.load(loading.ModelSpec(path=str(path), dtype="float32")).net
    return np.array(net(mx.array([IDS])))[0]


def rounded_yarn_logits(path: Path) -> np.ndarray:
    """As llama.cpp computes gpt-oss: the range of YaRN rounded to whole dimensions, which the models' own
    configuration rules out."""
    folder = loading.resolve(str(path), dtype="float32")
    config = json.loads((folder / "config.json").read_text())
    assert config["rope_scaling"].pop("truncate") is False
    (folder / "config.json").write_text(json.dumps(config))
    return our_logits(folder)


@pytest.fixture(autouse=True)
def _cache(tmp_path, monkeypatch):
    kernels.missing()  # compiled before, in the cache of all tests
    monkeypatch.setenv("TUNESMITH_CACHE", str(tmp_path / "cache"))


@pytest.mark.parametrize("name", NAMES)
def test_logits_are_those_of_the_model_and_of_llama_cpp(name, tmp_path):
    pytest.importorskip("xllamacpp")
    from parity.llama_cpp import LlamaCpp

    model, path = written(name, tmp_path)
    expected, logits = torch_logits(model), our_logits(path)
    assert np.abs(logits - expected).max() <= 1e-5 * np.abs(expected).max()
    if name.endswith("released models"):
        logits = rounded_yarn_logits(path)
    bar = 5e-3 if name.startswith("gemma") else 1e-4  # llama.cpp has GELU in a table in half precision
    other = LlamaCpp(path)
    for length in (3, 17, 40):
        row = logits[length - 1].astype(np.float64)
        logprobs = row - row.max() - np.log(np.exp(row - row.max()).sum())
        assert np.abs(other.logprobs(IDS[:length], SIZE) - logprobs).max() <= bar


@pytest.mark.parametrize("name", READ_BY_TRANSFORMERS)
def test_transformers_reads_the_same_model_from_the_file(name, tmp_path):
    import torch
    from transformers import AutoModelForCausalLM

    _, path = written(name, tmp_path)
    read = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file=path.name, dtype=torch.float32)
    expected = torch_logits(read.eval())
    assert np.abs(our_logits(path) - expected).max() <= 1e-5 * np.abs(expected).max()


@pytest.mark.parametrize("name", NAMES)
def test_transformers_reads_the_converted_folder(name, tmp_path):
    import torch
    from transformers import AutoModelForCausalLM

    model, path = written(name, tmp_path)
    folder = loading.resolve(str(path), dtype="float32")
    read = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    expected = torch_logits(model)
    assert np.abs(torch_logits(read.eval()) - expected).max() <= 1e-5 * np.abs(expected).max()


def test_transformers_reads_mxfp4_experts_from_the_converted_folder(tmp_path):
    import torch
    from transformers import AutoModelForCausalLM

    _, path = written("gpt_oss", tmp_path, "MXFP4")
    folder = loading.resolve(str(path), dtype="float32")
    assert "quantization_config" in json.loads((folder / "config.json").read_text())
    read = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    expected = torch_logits(read.float().eval())
    assert np.abs(our_logits(path) - expected).max() <= 1e-5 * np.abs(expected).max()


# Tokenizers

PIECES = (
    *(
        "the cat's  ",
        "I'LL ",
        "we'Ve",
        "\n",
        "\n\n",
        "\t",
        "  ",
        "   \n ",
        " ",
        "1",
        "12345",
        "3.14",
        "٣٤",
        "½",
    ),
    *("naïve", "Straße", "ÉCOLE", "McDonald", "camelCase", "HTTPServer", "日本語テキスト", "한국어", "ไทย"),
    *(
        "हिन्दी",
        "привет",
        "🙂",
        "👍🏽",
        "—“x”",
        "!!",
        "?!/",
        "//",
        "# c",
        "def f(x):\n    return {'a': [1]}\n",
    ),
    *("<|x|>", "a_b", "e\u0301", "\u00a0", "\u3000", "\r\n", "$5+<=>^~|`", "x=1;", "'s", "'", "’s", "..."),
    *("====", "\x07"),
)


def texts(count: int = 300) -> list[str]:
    source = random.Random(5)
    code = inspect.getsource(inspect)
    mixed = ["".join(source.choices(PIECES, k=source.randint(1, 12))) for _ in range(count)]
    return [*PIECES, *mixed, *(code[start : start + 400] for start in range(0, 8000, 400)), ""]


def byte_metadata(pre: str) -> dict[str, Any]:
    """A byte-level vocabulary with merges learned from the texts."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    trainer = trainers.BpeTrainer(
        vocab_size=900, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator([piece for text in texts() for piece in text.splitlines(True)], trainer)
    model = json.loads(tokenizer.to_str())["model"]
    tokens = sorted(model["vocab"], key=model["vocab"].__getitem__)
    return gguf_files.byte_tokenizer(tokens, [" ".join(pair) for pair in model["merges"]], pre)


def with_tokenizer(folder: Path, metadata: dict[str, Any], name: str = "llama") -> Path:
    """A model of one block around a tokenizer."""
    size = len(metadata["tokenizer.ggml.tokens"])
    model = families.build(
        family_of(name)._replace(
            settings={"vocab_size": size, "num_hidden_layers": 1, "tie_word_embeddings": True}
        )
    )
    model.save_pretrained(folder / "source")
    config = families.old_config(json.loads((folder / "source" / "config.json").read_text()))
    weights = {key: value.numpy() for key, value in model.state_dict().items() if key != "lm_head.weight"}
    return gguf_files.write(folder / "model.gguf", config, weights, metadata)


ASCII_CASES = ("tekken", "gpt-4o", "llama4", "kanana2")
"""llama.cpp knows upper and lower case only of ASCII letters there."""


@pytest.mark.parametrize("pre", PRETOKENIZERS)
def test_byte_level_ids_are_those_of_llama_cpp(pre, tmp_path):
    pytest.importorskip("xllamacpp")
    from parity.llama_cpp import LlamaCpp

    metadata = byte_metadata(pre)
    tokenizer, _ = build_tokenizer(metadata)
    other = LlamaCpp(with_tokenizer(tmp_path, metadata))
    given = {unicodedata.normalize("NFC", text) for text in texts()}  # llama.cpp does not normalise
    if pre in ASCII_CASES:
        given = {text for text in given if text.isascii()}
    assert len(given) > 50
    differing = [
        text
        for text in given
        if tokenizer.encode(text, add_special_tokens=False).ids != other.ids(text, special=False)
    ]
    assert differing == []


def test_gpt_4o_is_cut_by_the_pattern_of_tiktoken(monkeypatch):
    import regex
    from tiktoken_ext import openai_public

    monkeypatch.setattr(openai_public, "load_tiktoken_bpe", lambda *args, **options: {})
    pattern = openai_public.o200k_base()["pat_str"]
    tokenizer, _ = build_tokenizer(gguf_files.alphabet("gpt-4o"))
    for text in texts():
        ends = [end for _, (_, end) in tokenizer.pre_tokenizer.pre_tokenize_str(text)]
        assert ends == [match.end() for match in regex.finditer(pattern, text)], text


def sentencepiece_metadata(folder: Path, prefix: bool) -> tuple[dict[str, Any], Any]:
    """A vocabulary with bytes, and Gemma's user-defined runs of white space if there is no prefix; and
    SentencePiece's own reading of it."""
    from sentencepiece import SentencePieceProcessor, SentencePieceTrainer

    runs = [] if prefix else ["\n\n", "\n\n\n", "▁▁", "▁▁▁", "▁▁▁▁", "<table>", "<start_of_turn>"]
    source = iter([line for text in texts() for line in text.splitlines()])
    SentencePieceTrainer.train(
        sentence_iterator=source,
        model_prefix=str(folder / "spm"),
        vocab_size=900,
        model_type="bpe",
        byte_fallback=True,
        user_defined_symbols=runs,
        add_dummy_prefix=prefix,
        remove_extra_whitespaces=False,
        normalization_rule_name="identity",
        split_digits=True,
        allow_whitespace_only_pieces=True,
        minloglevel=2,
    )
    oracle = SentencePieceProcessor(model_file=str(folder / "spm.model"))
    pieces = [oracle.id_to_piece(index) for index in range(oracle.get_piece_size())]
    kinds = [
        USER_DEFINED
        if piece in runs
        else UNKNOWN
        if oracle.is_unknown(index)
        else CONTROL
        if oracle.is_control(index)
        else BYTE
        if oracle.is_byte(index)
        else NORMAL
        for index, piece in enumerate(pieces)
    ]
    scores = [
        -1000.0 if kind == USER_DEFINED else oracle.get_score(index) for index, kind in enumerate(kinds)
    ]
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.tokens": [
            piece.replace("▁", " ") if kind == USER_DEFINED else piece
            for piece, kind in zip(pieces, kinds, strict=True)
        ],
        "tokenizer.ggml.scores": scores,
        "tokenizer.ggml.token_type": kinds,
        "tokenizer.ggml.unknown_token_id": 0,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.add_space_prefix": prefix,
    }, oracle


@pytest.mark.parametrize("prefix", [True, False])
def test_sentencepiece_ids_are_those_of_sentencepiece_and_llama_cpp(prefix, tmp_path):
    pytest.importorskip("xllamacpp")
    from parity.llama_cpp import LlamaCpp

    metadata, oracle = sentencepiece_metadata(tmp_path, prefix)
    tokenizer, _ = build_tokenizer(metadata)
    other = LlamaCpp(with_tokenizer(tmp_path, metadata))
    for text in [*texts(), *(" " * count + "x" for count in range(20)), "<start_of_turn>user\n\nHi<table>"]:
        ids = tokenizer.encode(text, add_special_tokens=False).ids
        assert ids == oracle.encode(text), text
        assert ids == other.ids(text, special=False), text
        assert tokenizer.encode(text).ids == other.ids(text), text


@pytest.mark.parametrize("name", ["qwen2", "llama"])
def test_ids_are_those_of_the_tokenizer_that_transformers_reads(name, tmp_path):
    """Of normalised texts that do not begin with white space: its readers leave out Qwen's normalisation,
    and SentencePiece's first space before white space."""
    from transformers import AutoTokenizer

    if name == "qwen2":
        metadata = byte_metadata("qwen2")
        end = len(metadata["tokenizer.ggml.tokens"])
        metadata["tokenizer.ggml.tokens"] = [*metadata["tokenizer.ggml.tokens"], "<|end|>"]
        metadata["tokenizer.ggml.token_type"] = [NORMAL] * end + [CONTROL]
        metadata |= {"tokenizer.ggml.bos_token_id": end, "tokenizer.ggml.eos_token_id": end}
    else:
        metadata, _ = sentencepiece_metadata(tmp_path, prefix=True)
    path = with_tokenizer(tmp_path, metadata, name)
    read = AutoTokenizer.from_pretrained(tmp_path, gguf_file=path.name)
    tokenizer, _ = build_tokenizer(metadata)
    given = [unicodedata.normalize("NFC", text).lstrip() for text in texts()]
    differing = [
        text
        for text in given
        if read.encode(text, add_special_tokens=False) != tokenizer.encode(text, add_special_tokens=False).ids
    ]
    assert differing == []
