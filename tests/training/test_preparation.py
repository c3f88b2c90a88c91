"""Preparation: what is decided from the rows before anything is learned."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from tunesmith import events
from tunesmith.data.examples import Conversation, Demonstration, Message, Preference
from tunesmith.tokens import template
from tunesmith.training import preparation

THOUGHT = "<think>\nIt is two and two.\n</think>\n\nFour."


def conversation(*answers: str) -> Conversation:
    turns = [
        Message(role, text) for answer in answers for role, text in (("user", "?"), ("assistant", answer))
    ]
    return Conversation(tuple(turns))


@pytest.mark.parametrize(
    ("answers", "thinking"),
    [
        ([[THOUGHT]], True),
        ([["Four."]], False),
        ([[THOUGHT] * 4, ["Four."] * 4, ["Four."] * 4], False),  # rows: four with reasoning, two without
        ([[THOUGHT, "Four."]], True),
        ([], False),
    ],
)
def test_prompts_ask_for_reasoning_if_half_of_the_answers_have_it(answers, thinking):
    config: Any = SimpleNamespace(template=SimpleNamespace(thinking="auto", learn="all"))
    renderer: Any = SimpleNamespace(thinking=None, thinking_switch=None)
    examples = [Demonstration(conversation=conversation(*texts), source="rows:1") for texts in answers]
    preparation._settle_thinking(config, renderer, examples, events.silent)
    assert renderer.thinking is thinking
    if answers == [[THOUGHT, "Four."]]:
        config.template.learn = "last"
        preparation._settle_thinking(config, renderer, examples, events.silent)
        assert renderer.thinking is False, "the answers that are learned count"
    config.template.thinking, renderer.thinking = "off", None
    preparation._settle_thinking(config, renderer, examples, events.silent)
    assert renderer.thinking is None, "only if nobody has chosen"


def test_the_chosen_side_of_a_pair_decides():
    config: Any = SimpleNamespace(template=SimpleNamespace(thinking="auto", learn="all"))
    renderer: Any = SimpleNamespace(thinking=None, thinking_switch=None)
    pair = Preference(chosen=conversation(THOUGHT), rejected=conversation("Five."), source="rows:1")
    preparation._settle_thinking(config, renderer, [pair], events.silent)
    assert renderer.thinking is True


def test_only_texts_that_every_row_has_can_make_an_example_too_long():
    renderer: Any = SimpleNamespace(encoded_part=lambda text: text.split())
    long = "word " * 10_000

    def found(*answers: str) -> int | None:
        example = Demonstration(conversation=conversation(*answers), source="rows:1")
        return template.tokens_at_least(example, renderer, 64, cut=False)

    assert found(long) is not None and found("Four.") is None
    assert found(f"<think>{long}</think>\n\nFour.", "Five.") is None, "reasoning is left out of the history"
    assert found("Four.", long) is None, "the first answer has a row of its own"
    turns = (Message("user", "?"), Message("assistant", "Four."), Message("user", long))
    example = Demonstration(conversation=Conversation(turns), source="rows:1")
    assert template.tokens_at_least(example, renderer, 64, cut=False) is None, "nothing follows the answer"
