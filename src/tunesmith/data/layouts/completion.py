"""A prompt and its completion: plain texts without a chat template, or lists of messages."""

from __future__ import annotations

from functools import partial

from tunesmith.data.examples import Completion
from tunesmith.data.layout import Layout, MakesExample, RowReader, register


@register
class PromptCompletion(Layout):
    name = "completion"
    order = 50
    keys = ("prompt", "completion")
    looks_like = "`prompt`, `completion` (texts or lists of messages), also `system`"
    becomes = "plain text, no chat template, where both are texts without `system`"
    example = '{"prompt": "The capital of Norway is", "completion": " Oslo."}'

    def read(self, row: RowReader) -> MakesExample:
        row.unpack("prompt")
        if not isinstance(row.row["prompt"], str):
            row.unpack("completion")
        texts = isinstance(row.row["prompt"], str) and isinstance(row.row["completion"], str)
        if texts and (row.row.get("system") or "") != "":
            row.remark("prompt and completion with a system text: read as a conversation")
        elif texts:
            return partial(Completion, row.text("prompt"), row.words("completion"), row.label)
        return row.spoken(row.turns("prompt", "user") + row.turns("completion", "assistant"))
