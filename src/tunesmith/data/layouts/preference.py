"""Two answers to one prompt, one of them preferred."""

from __future__ import annotations

from functools import partial

from tunesmith.data.examples import BadRow, Conversation, Preference, opening
from tunesmith.data.layout import Layout, MakesExample, RowReader, has, register
from tunesmith.data.sources import show


@register
class ChosenRejected(Layout):
    name = "preference"
    order = 10
    keys = ("chosen", "rejected")
    looks_like = (
        "`chosen`, `rejected`, with `prompt`, `messages`, `conversations` or `instruction` beside them"
    )
    becomes = "a pair; SFT learns the chosen side, DPO, ORPO and SimPO compare"
    labelled = False

    def read(self, row: RowReader) -> MakesExample:
        chosen, rejected = sides(row)
        return partial(Preference, chosen, rejected)


def sides(row: RowReader) -> tuple[Conversation, Conversation]:
    """The chosen and the rejected conversation."""
    row.unpack("prompt", "conversations", "messages", "chosen", "rejected")
    key = next((key for key in ("prompt", "conversations", "messages") if has(row.row, key)), None)
    context = row.turns(key, "user") if key else row.instruction(False) if has(row.row, "instruction") else []
    prompt = [message for message in context if message.role != "system"]
    whole, read = dict(row.row), []
    for key in ("chosen", "rejected"):
        messages = row.turns(key, "assistant")
        if messages[0].role == "assistant":
            if not context:
                raise BadRow(
                    "prompt", key, "prompt, messages, conversations or instruction beside it", "none of them"
                )
            messages = context + messages
        elif [message for message in messages if message.role != "system"][: len(prompt)] != prompt:
            raise BadRow(
                "prompt", key, "a conversation that begins with the prompt", show(messages[0].content)
            )
        row.row |= {
            key: whole[key] for key in ("system", "tools", "functions") if key in whole
        }  # for both sides
        read.append(row.conversation(messages))
    if opening(read[0]) != opening(read[1]) or read[0] == read[1]:
        raise BadRow(
            "prompt", "", "two different answers to one prompt", "two prompts, or the same answer twice"
        )
    return read[0], read[1]
