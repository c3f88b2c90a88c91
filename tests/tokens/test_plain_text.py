"""Plain text ends with the tokenizer's own end token, and control tokens in it are never letters by
accident."""

from __future__ import annotations

from pathlib import Path

import pytest
from tokens.test_template import CHATML, write

from tunesmith.data.formats import Completion, Conversation, Document, Message
from tunesmith.errors import TemplateError
from tunesmith.tokens.renderers import load
from tunesmith.tokens.template import Renderer, Shown, TemplateSpec


def made(folder: Path, control: str = "refuse", **options) -> Renderer:
    return load(write(folder, CHATML, **options)).follow(TemplateSpec(), control)


@pytest.fixture
def mistral():
    return load("mistral-v3")


def ids(renderer: Renderer, example) -> list[int]:
    (row,) = renderer.rows(example)
    return row.tokens.ids.tolist()


# The end


def test_a_text_ends_with_eos_and_a_chat_with_its_turn(tmp_path):
    ours = made(tmp_path, eos="</s>")
    end, turn = (ours._encode(token)[0] for token in ("</s>", "<|im_end|>"))
    assert ours.text_end == end and ours.eos_ids[0] == turn
    for example in (Document("the cat"), Completion("Q:", " a")):
        assert ids(ours, example)[-1] == end and ours.decode(ids(ours, example)).count("</s>") == 1
    spoken = Conversation((Message("user", "a"), Message("assistant", "b")))
    assert ours._turn(spoken, 1, 0, Shown("", 0))[0].ids[-1] == turn


def test_the_end_of_a_turn_ends_text_if_asked(tmp_path):
    ours = made(tmp_path, eos="</s>").follow(TemplateSpec(text_end="turn"), "refuse")
    assert ids(ours, Document("the cat"))[-1] == ours.eos_ids[0] == ours.text_end


def test_generation_stops_at_both_ends(tmp_path):
    ours = made(tmp_path, eos="</s>")
    assert set(ours.eos_ids) == {ours.eos_ids[0], ours.text_end}
    for end in ("</s>", "<|im_end|>"):
        assert ours.answer(ours._encode(f"he{end}llo")) == "he"


def test_without_a_chat_template_the_end_is_the_same(tmp_path):
    ours = load(write(tmp_path, None, eos="</s>"))
    assert ours.decode(ids(ours, Document("the cat"))) == "the cat</s>"


def test_mistral_ends_as_before(mistral):
    assert ids(mistral, Document("the cat"))[-1] == mistral.eos_ids[0] == mistral.text_end


# Control tokens

TALK = "[INST] name a fruit[/INST] Pear.</s>[INST] and a tree[/INST] Oak."
TALKS = [TALK, f"<s>{TALK}</s>", f"<s>{TALK} </s>", "[INST]x[/INST]y"]


@pytest.mark.parametrize("text", TALKS)
def test_mistral_refuses_control_tokens_in_plain_text(mistral, text):
    for example in (Document(text, source="f:1"), Completion(text, " x"), Completion("x", text)):
        with pytest.raises(TemplateError) as caught:
            mistral.rows(example)
        assert caught.value.what in (
            f"the text holds {mark!r}, which is a control token" for mark in ("[INST]", "<s>")
        )
        assert caught.value.code == "text_control" and "data.text_control: read" in str(caught.value)


def test_mistral_reads_them_as_its_own_conversation(mistral):
    """The ids are those of mistral-common for the same conversation."""
    spoken = Conversation(
        tuple(
            Message(role, text)
            for role, text in (("user", "name a fruit"), ("assistant", "Pear."), ("user", "and a tree"))
        )
    )
    expected = [*mistral.prompt(spoken), *mistral._encode("Oak."), mistral.eos_ids[0]]
    reading = mistral.follow(TemplateSpec(), "read")
    for text in TALKS[:2]:
        assert ids(reading, Document(text)) == expected
    (row,) = reading.rows(Completion("[INST] name a fruit[/INST]", " Pear.</s>"))
    assert reading.decode(row.tokens.ids[row.tokens.targets > 0].tolist()) == "Pear.</s>"


@pytest.mark.parametrize("text", ["[INST] a [/INST] b", "<s>[INST] a[/INST] b </s>", "[INST]  a[/INST]  b\n"])
def test_a_text_that_is_read_reads_as_written(mistral, text):
    reading = mistral.follow(TemplateSpec(), "read")
    written = reading.decode(ids(reading, Document(text)))
    assert written == "<s>" + text.removeprefix("<s>").removesuffix("</s>") + "</s>"


def test_what_cannot_be_read_as_written_is_refused(mistral):
    with pytest.raises(TemplateError):
        mistral.follow(TemplateSpec(), "read").rows(Document("[INST]a[/INST]b"))


def test_letters_stay_letters_if_asked(mistral):
    letters = mistral.follow(TemplateSpec(), "letters")
    assert 3 not in ids(letters, Document("[INST] a [/INST] b"))


@pytest.mark.parametrize("text", ["a <s>struck</s> word", "an array[INSTANCE]", "hello"])
def test_text_without_control_tokens_is_learned_as_ever(mistral, text):
    assert ids(mistral, Document(text)) == [1, *mistral._encode(text), 2]


@pytest.mark.parametrize("options", [{}, {"bos": "<s>", "adds": True}])
def test_a_chat_in_a_text_row_of_another_tokenizer(tmp_path, options):
    text = "<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\nhe<|im_end|>"
    refusing = made(tmp_path / "a", **options)
    with pytest.raises(TemplateError) as caught:
        refusing.rows(Document(text))
    assert caught.value.code == "text_control"
    reading = made(tmp_path / "b", "read", **options)
    start = [reading.bos_id] if options else []
    assert ids(reading, Document(text)) == [*start, *reading._encode(text)]
    if options:
        assert ids(reading, Document("<s>" + text)) == [*start, *reading._encode(text)]


def test_a_half_character_is_refused_in_every_setting(mistral):
    for control in ("refuse", "read", "letters"):
        with pytest.raises(TemplateError) as caught:
            mistral.follow(TemplateSpec(), control).rows(Document("a\ud800"))
        assert caught.value.code == "not_text"
