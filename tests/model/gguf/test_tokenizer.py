"""Tokenizers from GGUF metadata."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import gguf_files
from tunesmith.errors import ModelError
from tunesmith.model.gguf.pretokenizers import PRETOKENIZERS
from tunesmith.model.gguf.tokenizer import BYTE, CONTROL, NORMAL, PROBE, UNKNOWN, build_tokenizer


@pytest.mark.parametrize(
    ("pre", "pieces", "whole"),
    [
        ("gpt-2", "It 's Ġ12345 Ġa Ċ Ċ XY", ["12"]),
        ("smollm", "It 's Ġ 1 2 3 4 5 Ġa Ċ Ċ XY", ["1", "2"]),
        ("llama-bpe", "It 's Ġ 123 45 Ġa ĊĊ XY", ["12"]),
        ("qwen2", "It 's Ġ 1 2 3 4 5 Ġa ĊĊ XY", ["1", "2"]),
        ("tekken", "It 's Ġ 1 2 3 4 5 Ġa ĊĊ XY", ["1", "2"]),
    ],
)
def test_text_is_cut_as_the_name_says(pre, pieces, whole):
    tokenizer, _ = build_tokenizer(gguf_files.alphabet(pre))
    cut = tokenizer.pre_tokenizer.pre_tokenize_str("It's 12345 a\n\nXY")
    assert [piece for piece, _ in cut] == pieces.split()
    assert tokenizer.encode("12").tokens == whole
    assert tokenizer.encode("XY").tokens == (["XY"] if pre in ("llama-bpe", "tekken") else ["X", "Y"])


def test_tekken_is_cut_by_the_pattern_that_mistral_ships():
    import mistral_common

    shipped = json.loads((Path(mistral_common.__file__).parent / "data" / "tekken_240911.json").read_text())
    assert PRETOKENIZERS["tekken"].patterns[0] == shipped["config"]["pattern"]


def sentencepiece_metadata() -> tuple[dict, Any]:
    """Mistral's v3 tokenizer as llama.cpp's converter writes it, and SentencePiece's own reading of it."""
    import mistral_common
    from sentencepiece import SentencePieceProcessor

    file = Path(mistral_common.__file__).parent / "data" / "mistral_instruct_tokenizer_240323.model.v3"
    oracle = SentencePieceProcessor(model_file=str(file))
    size = oracle.get_piece_size()
    kinds = [
        UNKNOWN
        if oracle.is_unknown(i)
        else CONTROL
        if oracle.is_control(i)
        else BYTE
        if oracle.is_byte(i)
        else NORMAL
        for i in range(size)
    ]
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": [oracle.id_to_piece(i) for i in range(size)],
        "tokenizer.ggml.scores": [oracle.get_score(i) for i in range(size)],
        "tokenizer.ggml.token_type": kinds,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
    }, oracle


def test_a_sentencepiece_vocabulary_gives_sentencepieces_ids():
    metadata, oracle = sentencepiece_metadata()
    tokenizer, settings = build_tokenizer(metadata)
    texts = [
        PROBE,
        "Hello",
        "  two  spaces",
        "\n\nx\t\ty  ",
        "naïve café — “quotes” 👍🏽 𝔘𝔫𝔦",
        "",
        " lead",
        "trail ",
        '{"a": [1, 2, 3.14], "b": null}',
        "日本語テキスト ไทย عربى",
        Path(json.__file__).read_text()[:4000],
        *(" " * count + "x" for count in range(70)),
        *("=" * count for count in range(70)),
    ]
    for text in texts:
        assert tokenizer.encode(text, add_special_tokens=False).ids == oracle.encode(text), text
        assert tokenizer.decode(tokenizer.encode(text).ids) == text
    assert tokenizer.encode("Hello").ids == [1, *oracle.encode("Hello")]
    assert settings["bos_token"] == "<s>" and settings["eos_token"] == "</s>"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"tokenizer.ggml.model": "bert"}, "tokenizer.ggml.model is 'bert'"),
        ({"tokenizer.ggml.model": None}, "tokenizer.ggml.model is None"),
        ({"tokenizer.ggml.pre": None}, "tokenizer.ggml.pre is None"),
        ({"tokenizer.ggml.merges": []}, "merges is missing"),
        ({"tokenizer.ggml.merges": ["q zz"]}, "merges cannot be used"),
        ({"tokenizer.ggml.tokens": ["a", "b", "a"]}, "tokens listed twice: 'a'"),
        ({"tokenizer.ggml.tokens": ["1", "2", "12", "Ġ", "a", "Ġa"]}, "does not reproduce a probe text"),
    ],
)
def test_a_tokenizer_that_cannot_be_rebuilt_is_refused(change, words):
    with pytest.raises(ModelError, match=words):
        build_tokenizer(gguf_files.alphabet("gpt-2") | change)


@pytest.mark.parametrize("pre", PRETOKENIZERS)
def test_every_pretokenizer_is_named_in_the_documents(pre):
    page = Path(__file__).parents[3] / "docs" / "models.md"
    assert f"`{pre}`" in page.read_text().split("## GGUF files")[1]


def test_special_tokens_of_phi_3_swallow_the_white_space_after_them():
    metadata, _ = sentencepiece_metadata()
    tokens, kinds = metadata["tokenizer.ggml.tokens"], metadata["tokenizer.ggml.token_type"]
    for token, place in (("<|user|>", -1), ("<|endoftext|>", -2)):
        tokens[place], kinds[place] = token, CONTROL

    def read(architecture: str) -> list[str]:
        tokenizer, _ = build_tokenizer(metadata | {"general.architecture": architecture})
        ids = tokenizer.encode("<|user|>\nHi<|endoftext|>\n", add_special_tokens=False).ids
        return [tokens[index] for index in ids]

    assert read("phi3") == ["<|user|>", "▁Hi", "<|endoftext|>", "▁", "<0x0A>"]
    assert read("llama") == ["<|user|>", "▁", "<0x0A>", "Hi", "<|endoftext|>", "▁", "<0x0A>"]


@pytest.mark.parametrize(
    ("marks", "ids"), [({}, []), ({"add_bos_token": True}, [1]), ({"add_eos_token": True}, [2])]
)
def test_the_ends_of_a_text_are_marked_as_the_file_says(marks, ids):
    roles = {"bos_token_id": 1, "eos_token_id": 2}
    metadata = gguf_files.alphabet("gpt-2") | {
        f"tokenizer.ggml.{key}": value for key, value in (roles | marks).items()
    }
    tokenizer, _ = build_tokenizer(metadata)
    inner = tokenizer.encode("a", add_special_tokens=False).ids
    before, after = [ids, []] if marks.get("add_bos_token") else [[], ids]
    assert tokenizer.encode("a").ids == [*before, *inner, *after]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"token_type": [1, 1]}, "token_type has 2 values, tokenizer.ggml.tokens 259"),
        ({"bos_token_id": 259}, "bos_token_id is 259, there are 259 tokens"),
        ({"tokens": []}, "tokenizer.ggml.tokens is missing"),
    ],
)
def test_values_that_do_not_fit_the_tokens_are_refused(change, words):
    metadata = gguf_files.alphabet("gpt-2")
    with pytest.raises(ModelError, match=words):
        build_tokenizer(metadata | {f"tokenizer.ggml.{key}": value for key, value in change.items()})


def test_unicode_is_normalised_for_qwen_alone():
    read = {
        pre: build_tokenizer(gguf_files.alphabet(pre))[0].encode("e\u0301").ids
        for pre in ("qwen2", "deepseek-r1-qwen", "llama-bpe")
    }
    composed = build_tokenizer(gguf_files.alphabet("llama-bpe"))[0].encode("\u00e9").ids
    assert read["qwen2"] == read["deepseek-r1-qwen"] == composed != read["llama-bpe"]
