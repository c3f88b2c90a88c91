"""Plain text."""

from __future__ import annotations

from functools import partial

from tunesmith.data.examples import Document
from tunesmith.data.layout import Layout, MakesExample, RowReader, register


@register
class PlainText(Layout):
    name = "text"
    order = 60
    keys = ("text",)
    looks_like = "`text`"
    becomes = "plain text, all of it learned"
    label_words = False
    example = '{"text": "Cheese is made from milk."}'

    def read(self, row: RowReader) -> MakesExample:
        return partial(Document, row.words("text"), row.label)
