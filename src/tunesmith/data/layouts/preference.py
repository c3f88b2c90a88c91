"""Two answers to one prompt, one of them preferred."""

from __future__ import annotations

import re
from functools import partial

from tunesmith.data.examples import BadRow, Conversation, Preference, opening
from tunesmith.data.layout import Layout, MakesExample, RowReader, has, register
from tunesmith.data.sources import show
from tunesmith.settings.config import JSON

CONTEXT = ("prompt", "conversations", "messages", "question")
_SPEAKER = re.compile(r"(?:\A\s*|\n\n)(Human|Assistant):[ ]?")


@register
class ChosenRejected(Layout):
    name = "preference"
    order = 10
    keys = ("chosen", "rejected")
    looks_like = (
        "`chosen`, `rejected`, with `prompt`, `question`, `messages`, `conversations` or `instruction` "
        "beside them, or whole conversations, also as `Human:` and `Assistant:` turns"
    )
    becomes = "a pair; SFT learns the chosen side, DPO, ORPO and SimPO compare"
    labelled = False
    example = '{"prompt": "Weather in Oslo?", "chosen": "Rain.", "rejected": "I cannot know."}'

    def read(self, row: RowReader) -> MakesExample:
        chosen, rejected = sides(row)
        return partial(Preference, chosen, rejected)


def _split_turns(row: RowReader) -> None:
    """Replace texts such as hh-rlhf's, where ``Human:`` and ``Assistant:`` open the turns, by messages."""
    turns: dict[str, list[JSON]] = {}
    for key in ("chosen", "rejected"):
        text = row.row[key]
        if not isinstance(text, str):
            return
        before, *parts = _SPEAKER.split(text)
        if before.strip() or parts[:1] != ["Human"] or "Assistant" not in parts[::2]:
            return
        turns[key] = [
            {"role": "user" if speaker == "Human" else "assistant", "content": words}
            for speaker, words in zip(parts[::2], parts[1::2], strict=True)
        ]
    row.row |= turns
    row.remark("chosen and rejected with Human: and Assistant: before each turn: read as turns")


def sides(row: RowReader) -> tuple[Conversation, Conversation]:
    """The chosen and the rejected conversation."""
    row.unpack("prompt", "conversations", "messages", "chosen", "rejected")
    key = next((key for key in CONTEXT if has(row.row, key)), None)
    if key is None and not has(row.row, "instruction"):
        _split_turns(row)
    context = row.turns(key, "user") if key else row.instruction(False) if has(row.row, "instruction") else []
    prompt = [message for message in context if message.role != "system"]
    whole, read = dict(row.row), []
    for key in ("chosen", "rejected"):
        messages = row.turns(key, "assistant")
        if messages[0].role == "assistant":
            if not context:
                raise BadRow("prompt", key, f"{', '.join(CONTEXT)} or instruction beside it", "none of them")
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
