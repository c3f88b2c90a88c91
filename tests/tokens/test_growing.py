"""Ids that come one by one decode as all of them do."""

from __future__ import annotations

import json
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

import tiny
from tunesmith.tokens import renderers
from tunesmith.tokens.growing import GrowingText


def write_sentencepiece(folder) -> None:
    """A tokenizer in the shape of Llama 2's: a space is a letter, and unknown characters are bytes."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers

    special = ["<unk>", "<s>", "</s>"]
    pieces = ["▁", "▁a", "a", "b", "▁b", "]", "▁[", "the", "▁the", "▁▁", "▁▁▁"]
    texts = [*special, *(f"<0x{byte:02X}>" for byte in range(256)), *pieces]
    vocabulary = {text: place for place, text in enumerate(texts)}
    model = models.BPE(vocab=vocabulary, merges=[], byte_fallback=True, unk_token="<unk>", fuse_unk=True)
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    spaces, first = decoders.Replace("▁", " "), decoders.Strip(" ", 1, 0)
    tokenizer.decoder = decoders.Sequence([spaces, decoders.ByteFallback(), decoders.Fuse(), first])
    tokenizer.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in special])
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": "</s>",
        "bos_token": "<s>",
        "unk_token": "<unk>",
        "chat_template": tiny.CHATML.replace("<|im_end|>", "</s>"),
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


@pytest.fixture(scope="module")
def rendered(tmp_path_factory):
    tiny.write_tokenizer(plain := tmp_path_factory.mktemp("bytes"))
    write_sentencepiece(pieces := tmp_path_factory.mktemp("pieces"))
    return {
        "bytes": renderers.load(plain),
        "pieces": renderers.load(pieces),
        "mistral": renderers.load("mistral-v3"),
    }


@pytest.mark.parametrize("name", ["bytes", "pieces", "mistral"])
@given(data=st.data())
def test_the_text_grows_to_that_of_all_ids_and_is_never_taken_back(rendered, name, data):
    renderer = rendered[name]
    control = st.sampled_from(sorted(renderer.control_ids))
    single = st.one_of(st.integers(0, renderer.size - 1), control).map(lambda token: [token])
    written = st.text("aé☺ 👩\u200d👧\n]<b", max_size=6).map(renderer.encoded_part)
    ids = [token for part in data.draw(st.lists(single | written, max_size=8)) for token in part]
    growing = GrowingText(renderer)
    shown = [growing.text]
    for token in ids:
        growing.add(token)
        shown.append(growing.text)
    growing.finish()
    # Bytes that make no character are decoded anew when others follow: nothing is promised of them.
    if name != "pieces" or "\ufffd" not in renderer.decode(ids):
        assert growing.text == renderer.decode(ids)
    assert all(later.startswith(earlier) for earlier, later in pairwise(shown))


@pytest.mark.parametrize("name", ["bytes", "pieces", "mistral"])
def test_no_half_of_a_character_is_shown(rendered, name):
    growing = GrowingText(rendered[name])
    for token in rendered[name].encoded_part("a 👩\u200d👧 ☺"):
        growing.add(token)
        assert "\ufffd" not in growing.text
    assert growing.text.strip() == "a 👩\u200d👧 ☺"
