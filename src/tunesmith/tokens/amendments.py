"""What could be changed in a conversation that a chat template refuses, one change at a time.

The first change with which the template renders the conversation tells what is wrong with it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import groupby
from typing import cast

from tunesmith.data.formats import JSON, Conversation, Message
from tunesmith.tokens.template import json_text


def amendments(conversation: Conversation) -> Iterator[tuple[str, Conversation]]:
    """A hint and the conversation that follows it, for each change that would change something."""
    changes = (
        ("describe each parameter of the tools: this template needs the descriptions", _described),
        ("write one call a turn: this template cannot write several", _one_call_a_turn),
        ("this template cannot write a call without arguments: give the tool a parameter", _with_arguments),
        ("if it has no system role, put the system text into the first user message", _without_system),
        ("join messages of one role that follow each other, and begin with the user", _in_turn),
        ("this template cannot write the tools: describe them in the system message", _without_tools),
        ("if it has no calls or results in this form, write them as text", _calls_as_text),
    )
    for hint, change in changes:
        changed = change(conversation)
        if changed != conversation:
            yield hint, changed


def _described(conversation: Conversation) -> Conversation:
    return replace(conversation, tools=tuple(_with_descriptions(tool) for tool in conversation.tools))


def _with_descriptions(schema: JSON) -> JSON:
    """A tool whose function and properties all have a description."""
    if not isinstance(schema, dict):
        return schema
    completed = {key: _with_descriptions(value) for key, value in schema.items()}
    properties = completed.get("properties")
    if isinstance(properties, dict):
        completed["properties"] = {
            name: {"description": name, **value} if isinstance(value, dict) else value
            for name, value in properties.items()
        }
    return {"description": "a function", **completed} if "parameters" in completed else completed


def _one_call_a_turn(conversation: Conversation) -> Conversation:
    """The first call of each turn, and its result."""
    dropped = {call.id for message in conversation.messages for call in message.calls[1:]}
    return replace(
        conversation,
        messages=tuple(
            replace(message, calls=message.calls[:1])
            for message in conversation.messages
            if message.role != "tool" or message.call_id not in dropped
        ),
    )


def _with_arguments(conversation: Conversation) -> Conversation:
    return replace(
        conversation,
        messages=tuple(
            replace(
                message,
                calls=tuple(
                    call if call.arguments else replace(call, arguments=cast(JSON, {"value": "value"}))
                    for call in message.calls
                ),
            )
            for message in conversation.messages
        ),
    )


def _without_system(conversation: Conversation) -> Conversation:
    return _with(conversation, [message for message in conversation.messages if message.role != "system"])


def _in_turn(conversation: Conversation) -> Conversation:
    """User and assistant in turn, the user first."""
    messages = list(conversation.messages)
    while messages and messages[0].role == "assistant":
        messages.pop(0)
    joined: list[Message] = []
    for role, same in groupby(messages, key=lambda message: message.role):
        run = list(same)
        if role in ("user", "assistant") and not any(message.calls for message in run):
            run = [replace(run[0], content="\n\n".join(message.content for message in run))]
        joined += run
    return _with(conversation, joined)


def _without_tools(conversation: Conversation) -> Conversation:
    return replace(conversation, tools=())


def _calls_as_text(conversation: Conversation) -> Conversation:
    messages: list[Message] = []
    for message in conversation.messages:
        if message.calls:
            text = "\n".join(json_text([call.name, call.arguments]) for call in message.calls)
            messages.append(Message("assistant", f"{message.content}\n{text}".strip()))
        elif message.role == "tool" and messages[-1:] and messages[-1].role == "user":
            messages[-1] = replace(messages[-1], content=f"{messages[-1].content}\n{message.content}")
        else:
            messages.append(Message("user", message.content) if message.role == "tool" else message)
    return replace(conversation, messages=tuple(messages), tools=())


def _with(conversation: Conversation, messages: list[Message]) -> Conversation:
    return replace(conversation, messages=tuple(messages)) if messages else conversation
