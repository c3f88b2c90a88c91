"""Alpaca: an instruction with its input, and an output."""

from __future__ import annotations

from functools import partial

from tunesmith.data.examples import Completion, Message
from tunesmith.data.layout import Layout, MakesExample, RowReader, register

MARKS = {"system": "", "user": "### Instruction:\n", "assistant": "### Response:\n"}


@register
class Alpaca(Layout):
    name = "alpaca"
    order = 40
    keys = ("instruction", "output")
    looks_like = "`instruction`, `input`, `output`, also `system`, `history`"
    becomes = (
        "a conversation; with `data.instruction_layout: instruct` plain `### Instruction:` text for "
        "base models"
    )
    example = '{"instruction": "Translate to French", "input": "cheese", "output": "fromage"}'

    def read(self, row: RowReader) -> MakesExample:
        messages = [*row.instruction(row.instruct), Message("assistant", row.text("output"))]
        if not row.instruct:
            return row.spoken(messages)
        *before, answer = row.conversation(messages).messages
        prompt = "".join(f"{MARKS[message.role]}{message.content}\n\n" for message in before)
        return partial(Completion, prompt + MARKS["assistant"], answer.content, row.label)
