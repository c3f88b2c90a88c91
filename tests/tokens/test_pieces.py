"""The bytes of tokens, put together, are the text."""

from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import tiny
from tunesmith.errors import ModelError
from tunesmith.tokens import renderers

TEXTS = st.text(st.characters(exclude_categories=("Cs",)), max_size=20)


@pytest.fixture(scope="module")
def byte_level(tmp_path_factory) -> renderers.Renderer:
    folder = tmp_path_factory.mktemp("bytes")
    tiny.write_tokenizer(folder)
    return renderers.load(folder)


@pytest.fixture(scope="module")
def mistral() -> renderers.Renderer:
    return renderers.load("mistral-v3")


@pytest.fixture(scope="module")
def metaspace(tmp_path_factory) -> renderers.Renderer:
    """A tokenizer in sentencepiece's notation, as Llama 2's tokenizer.json."""
    from tokenizers import Tokenizer, decoders, models, normalizers

    folder = tmp_path_factory.mktemp("metaspace")
    words = ["<unk>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "a", "b", "▁a", "ab"]
    vocab = {word: number for number, word in enumerate(words)}
    merges = [("▁", "a"), ("a", "b")]
    tokenizer = Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    kind = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "</s>", "unk_token": "<unk>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(kind))
    return renderers.load(folder)


@pytest.mark.parametrize("kind", ["byte_level", "mistral", "metaspace"])
def test_the_bytes_of_tokens_are_the_bytes_of_the_text(kind, request):
    renderer = request.getfixturevalue(kind)
    known = renderer.token_bytes()
    assert len(known) == renderer.size

    @settings(max_examples=200, deadline=None)
    @given(text=TEXTS)
    def law(text):
        written = b"".join(known[token] for token in renderer.encoded_part(text))
        # sentencepiece writes a space before a text.
        assert written in (text.encode(), b" " + text.encode())

    law()


def test_a_tokenizer_of_another_notation_is_refused(tmp_path):
    from tokenizers import Tokenizer, decoders, models

    tokenizer = Tokenizer(models.WordPiece({"[UNK]": 0, "a": 1, "##b": 2}, unk_token="[UNK]"))
    tokenizer.decoder = decoders.WordPiece()
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    kind = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "a"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(kind))
    with pytest.raises(ModelError, match=r"tokens are not known \(decoder: WordPiece\)"):
        renderers.load(tmp_path).token_bytes()
