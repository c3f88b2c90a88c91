"""Of a very long row its beginning is audited; any other row is audited as it is."""

from __future__ import annotations

import json

import pytest

import tiny
from tunesmith.auditing import survey, views
from tunesmith.auditing.survey import Setup
from tunesmith.auditing.views import beginning
from tunesmith.data import formats
from tunesmith.data.examples import Example
from tunesmith.data.formats import DataSpec
from tunesmith.data.sources import Raw
from tunesmith.events import Notice


def example(row: dict) -> Example:
    made = formats.row(Raw("rows.jsonl:1", json.dumps(row)), DataSpec(train=("rows.jsonl",), valid=0.0))
    assert not isinstance(made, formats.Dropped), made
    return made


def turns(*texts: str) -> list[dict]:
    return [{"role": ("user", "assistant")[place % 2], "content": text} for place, text in enumerate(texts)]


ROWS = {
    "text": {"text": "abcdefghijkl"},
    "completion": {"prompt": "abcdefghijkl", "completion": "m"},
    "conversation": {"messages": turns("abcdefghijkl", "m", "n", "o")},
    "pair": {"prompt": turns("abcdefghijkl"), "chosen": turns("", "m")[1:], "rejected": turns("", "n")[1:]},
}


@pytest.mark.parametrize("kind", ROWS)
def test_a_row_that_is_not_too_long_is_the_same_object(kind, monkeypatch):
    row = example(ROWS[kind])
    assert beginning(row) is row
    monkeypatch.setattr(views, "LOOKED_AT", 10)
    short = beginning(row)
    assert short is not row and (short.id, short.source) == (row.id, row.source)
    assert views.View("", short).whole.startswith("abcde") and "l" not in views.View("", short).whole


def test_of_many_turns_those_up_to_an_answer_are_left(monkeypatch):
    row = example({"messages": turns(*("abcd" for _ in range(12)))})
    monkeypatch.setattr(views, "LOOKED_AT", 20)
    messages = views.View("", beginning(row)).messages
    assert len(messages) == 4 and messages[-1].role == "assistant"


def test_how_many_rows_are_shortened_is_said(tmp_path, monkeypatch):
    monkeypatch.setattr(views, "LOOKED_AT", 60)
    monkeypatch.setattr(survey, "LOOKED_AT", 60)
    rows = [*tiny.conversations(3), {"messages": turns("x" * 90, "y")}]
    data = tiny.write_rows(tmp_path / "rows.jsonl", rows)
    told: list[Notice] = []
    survey.audit(
        [data],
        Setup(DataSpec(train=(str(data),), valid=0.0), survey.AuditSpec.model_validate({})),
        notify=lambda event: told.append(event) if isinstance(event, Notice) else None,
    )
    (notice,) = [event for event in told if "looks at the beginning" in event.what]
    assert notice.count is not None and notice.count >= 1 and "more than 60 characters" in notice.what
