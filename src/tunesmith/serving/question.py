"""What one client asks, whichever protocol it speaks: a prompt, how to draw, and what the answer must be."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, TypeAlias

from tunesmith.data.formats import JSON, Conversation

ToolChoice: TypeAlias = Literal["auto", "none", "required"]
Prompted: TypeAlias = Conversation | str | tuple[int, ...]
"""A conversation that waits for an answer, plain text to be continued, or ids to be continued."""


def prompt_size(prompt: Prompted) -> int:
    """Characters that are read for ``prompt``, or the number of its ids."""
    if not isinstance(prompt, Conversation):
        return len(prompt)
    size = sum(len(json.dumps(tool, ensure_ascii=False)) for tool in prompt.tools)
    for message in prompt.messages:
        size += len(message.content)
        size += sum(len(json.dumps(call.arguments, ensure_ascii=False)) for call in message.calls)
    return size


@dataclass(frozen=True, slots=True)
class AnswerFormat:
    """The answer must be JSON: an object, or a value that ``schema`` takes if that is not None. ``param``:
    the field of the body that asks for it."""

    schema: JSON = None
    param: str = "response_format"


@dataclass(frozen=True, slots=True)
class Question:
    """``model``: the name that the client gave. ``prompt``: see `Prompted`. ``max_tokens``: None: as many as
    the server allows by default. ``temperature`` 0 is greedy, as answers are evaluated. ``seed``: None: a
    new one for each question; answer i of ``n`` draws from the stream (seed, i). ``stop``: texts before which
    the answer ends. ``logprobs``: as in `engine.requests.Request`. ``tool_choice``: whether tools may, must
    or must not be called; ``named_tool``: the only one that must be called. ``one_call``: at most one call.
    ``strict_tools``: names of tools whose calls are delivered only if their arguments fit the schema.
    ``format``: None: any text. ``thinking``: None: as the run was evaluated. ``user``: the end user whom the
    client names."""

    model: str
    prompt: Prompted
    max_tokens: int | None = None
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    seed: int | None = None
    n: int = 1
    stop: tuple[str, ...] = ()
    stream: bool = False
    logprobs: int | None = None
    tool_choice: ToolChoice = "auto"
    named_tool: str | None = None
    one_call: bool = False
    strict_tools: frozenset[str] = frozenset()
    format: AnswerFormat | None = None
    thinking: bool | None = None
    user: str | None = None

    @property
    def tools(self) -> tuple[JSON, ...]:
        """Those that the prompt declares."""
        return self.prompt.tools if isinstance(self.prompt, Conversation) else ()

    @property
    def calls_tools(self) -> bool:
        """Whether calls in the answer are delivered as calls."""
        return bool(self.tools) and self.tool_choice != "none"
