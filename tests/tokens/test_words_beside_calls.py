"""A turn of words and calls, in formats that have one or the other, is refused, or learned as the settings
say."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
from tokens.test_template import TOOLS, write

from tunesmith.data.formats import Call, Conversation, Demonstration, Message, Preference
from tunesmith.errors import TemplateError
from tunesmith.tokens.renderers import load
from tunesmith.tokens.template import Renderer, TemplateSpec

ONE_OR_OTHER = TOOLS.replace("{{ m.content }}{%", "{% if not m.tool_calls %}{{ m.content }}{% endif %}{%")
CALL = Call("find", {"at": "Rome"}, "a" * 9)


def talk(words: str, answer: str = "Four.") -> Conversation:
    return Conversation(
        (
            Message("user", "How warm?"),
            Message("assistant", words, (CALL,)),
            Message("tool", "4", call_id=CALL.id, name="find"),
            Message("assistant", answer),
        )
    )


def rendered(renderer: Renderer, example, rule: str) -> tuple[list[list[int]], Counter[str]]:
    notes: Counter[str] = Counter()
    rows = renderer.follow(TemplateSpec(words_beside_calls=rule), "refuse").rows(example, notes=notes)
    return [row.tokens.ids.tolist() for row in rows], notes


@pytest.fixture(params=["mistral", "template"])
def renderer(request, tmp_path: Path) -> Renderer:
    return load("mistral-v3" if request.param == "mistral" else write(tmp_path, ONE_OR_OTHER))


def test_the_default_refuses_and_names_the_settings(renderer):
    with pytest.raises(TemplateError) as caught:
        rendered(renderer, Demonstration(talk("Let me look.")), "refuse")
    assert caught.value.code == "words_beside_calls"
    assert "drop_words" in caught.value.hint and "split" in caught.value.hint


def test_dropped_words_give_the_ids_of_a_row_without_them(renderer):
    ids, notes = rendered(renderer, Demonstration(talk("Let me look.")), "drop_words")
    expected, silent = rendered(renderer, Demonstration(talk("")), "refuse")
    assert ids == expected
    assert notes - silent == {"words beside calls left out": 1}


def test_split_adds_a_row_that_learns_the_words(renderer):
    ids, notes = rendered(renderer, Demonstration(talk("Let me look.")), "split")
    calls, _ = rendered(renderer, Demonstration(talk("")), "refuse")
    words, _ = rendered(
        renderer,
        Demonstration(Conversation((Message("user", "How warm?"), Message("assistant", "Let me look.")))),
        "refuse",
    )
    assert ids == words + calls
    assert notes["words beside calls learned in a row of their own"] == 1


def test_words_that_are_not_learned_get_no_row(renderer):
    turns = talk("Let me look.").messages
    quiet = Conversation((turns[0], Message("assistant", "Let me look.", (CALL,), learn=False), *turns[2:]))
    ids, notes = rendered(renderer, Demonstration(quiet), "split")
    assert ids == rendered(renderer, Demonstration(quiet), "drop_words")[0]
    assert (
        notes["words beside calls left out"] == 1
        and not notes["words beside calls learned in a row of their own"]
    )


def test_a_prompt_whose_history_has_both_follows_the_setting(renderer):
    both, quiet = (Conversation(talk(words).messages[:3]) for words in ("Let me look.", ""))
    expected = renderer.follow(TemplateSpec(), "refuse").prompt(quiet)
    for rule in ("drop_words", "split"):
        assert renderer.follow(TemplateSpec(words_beside_calls=rule), "refuse").prompt(both) == expected


def test_a_pair_can_only_drop_its_words(renderer):
    pair = Preference(talk("Let me look.", "Four."), talk("Let me look.", "Five."))
    assert len(rendered(renderer, pair, "drop_words")[0]) == 2
    for rule in ("refuse", "split"):
        with pytest.raises(TemplateError) as caught:
            rendered(renderer, pair, rule)
        assert caught.value.code == "words_beside_calls" and "drop_words" in caught.value.hint


def test_a_template_that_has_both_writes_both(tmp_path):
    both = load(write(tmp_path, TOOLS))
    for rule in ("refuse", "drop_words", "split"):
        (ids,), notes = rendered(both, Demonstration(talk("Let me look.")), rule)
        assert "Let me look.<tool_call>" in both.decode(ids) and not notes


def test_another_refusal_keeps_its_reason(renderer):
    broken = Conversation(
        (Message("user", "u"), Message("assistant", "w", (CALL,)), Message("assistant", "x\ud800"))
    )
    for rule in ("refuse", "drop_words", "split"):
        with pytest.raises(TemplateError) as caught:
            rendered(renderer, Demonstration(broken), rule)
        assert caught.value.code == "not_text"
