"""One number for how an answer follows its reference."""

from __future__ import annotations

import pytest

from tunesmith.checks.adherence import adherence
from tunesmith.checks.calls import references
from tunesmith.data.examples import Conversation, Demonstration, Message


def reference(answer: str):
    turns = (Message("user", "Wake me at six."), Message("assistant", answer))
    made = references(Demonstration(Conversation(turns), source="rows:1"))
    assert made is not None
    return made


CALL = 'tool_call: alarm\narguments: {"hour": 6}'


@pytest.mark.parametrize(
    ("wanted", "answer", "points"),
    [
        (CALL, CALL, 100),
        (CALL, 'tool_call: alarm\narguments: {"hour": 7}', 50),
        (CALL, 'tool_call: timer\narguments: {"hour": 6}', 0),
        (CALL, "I will wake you at six.", 0),
        ("I cannot do that.", "I cannot do that.", 100),
        ("I cannot do that.", "I cannot fly.", 100 * 4 / 7),
        ("I cannot do that.", CALL, 0),
        ("I cannot do that.", "", 0),
    ],
)
def test_calls_count_by_tools_and_arguments_and_words_by_rouge(wanted, answer, points):
    assert adherence(answer, reference(wanted)) == pytest.approx(points)
