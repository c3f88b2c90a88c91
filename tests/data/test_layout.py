"""A layout is one file: rows in it are read, it can be named, and the documentation shows it, from its class
alone."""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
from pydantic import ValidationError

from tunesmith.data import formats, layout
from tunesmith.data.examples import Completion
from tunesmith.data.formats import DataSpec
from tunesmith.data.layout import Layout, MakesExample, RowReader, register

DOCS = Path(__file__).parents[2] / "docs" / "data.md"


@pytest.fixture
def toy() -> Iterator[None]:
    @register
    class Riddle(Layout):
        name = "riddle"
        order = 45
        keys = ("riddle", "solution")
        looks_like = "`riddle`, `solution`"
        becomes = "plain text"

        def read(self, row: RowReader) -> MakesExample:
            return partial(Completion, row.text("riddle"), row.words("solution"), row.label)

    yield
    layout.unregister("riddle")


def test_a_layout_that_is_registered_is_read_named_and_documented(toy, tmp_path):
    path = tmp_path / "rows.jsonl"
    rows = [
        {"riddle": "What has keys?", "solution": "A piano.", "label": True, "source": "a book"},
        {"text": "t"},
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    riddle, text = formats.read([path], DataSpec(train=("x",))).examples
    assert (riddle.prompt, riddle.completion, riddle.label) == ("What has keys?", "A piano.", True)
    assert riddle.metadata == {"source": "a book"} and text.text == "t"
    named = formats.read([path], DataSpec(train=("x",), format="riddle"))
    assert (len(named.examples), named.dropped[0].reason) == (1, "layout")
    assert "riddle+solution" in named.dropped[0].message
    assert "| `riddle` | `riddle`, `solution` | plain text |" in layout.table()
    layout.unregister("riddle")
    with pytest.raises(ValidationError, match="expected one of auto, preference, messages"):
        DataSpec(train=("x",), format="riddle")


def test_a_layout_of_a_like_name_is_meant():
    with pytest.raises(ValidationError, match="did you mean sharegpt"):
        DataSpec(train=("x",), format="sharegtp")


def test_the_documentation_shows_every_layout():
    assert len(layout.layouts()) >= 6
    assert layout.table() in DOCS.read_text("utf-8"), (
        "put the output of data.layout.table() into docs/data.md"
    )
