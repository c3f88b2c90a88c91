"""Answers whose tokens the test writes: everything but the engine is real."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from contextlib import contextmanager
from pathlib import Path

import tiny
from tunesmith.engine.requests import NewToken, Request

TOOLS_AND_THOUGHTS = (
    "{% if tools %}<|im_start|>system\n{% for t in tools %}{{ t | tojson }}\n{% endfor %}<|im_end|>\n"
    "{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' and loop.last %}<think>\n{{ m.reasoning_content or '' }}\n</think>\n\n"
    "{% endif %}{{ m.content or '' }}"
    "{% for c in m.tool_calls or [] %}<tool_call>\n{{ {'name': c.function.name, 'arguments': "
    "c.function.arguments} | tojson }}\n</tool_call>{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is false %}<think>\n\n</think>\n\n{% endif %}"
    "{% endif %}"
)
"""As Qwen3's: Hermes' calls, and reasoning that can be turned off."""
WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "now",
        "parameters": {
            "type": "object",
            "properties": {"town": {"type": "string"}, "days": {"type": "integer"}},
            "required": ["town"],
            "additionalProperties": False,
        },
    },
}
CALL = '<tool_call>\n{"name": "weather", "arguments": {"town": "Zürich"}}\n</tool_call>'
ARGUMENTS = {"town": "Zürich"}


def write_model(folder: Path) -> Path:
    """A tiny model whose template takes tools and reasoning."""
    folder.mkdir(parents=True, exist_ok=True)
    tiny.write_model(folder, tiny.write_tokenizer(folder, TOOLS_AND_THOUGHTS))
    return folder


class Tokens:
    """In the place of `worker.Answering`. ``read``: how many tokens were taken. ``cancelled``: by the
    server."""

    def __init__(self, tokens: list[NewToken]) -> None:
        self._tokens, self.read, self.cancelled = tokens, 0, False

    def __aiter__(self) -> AsyncIterator[NewToken]:
        return self

    async def __anext__(self) -> NewToken:
        if self.read == len(self._tokens):
            raise StopAsyncIteration
        self.read += 1
        return self._tokens[self.read - 1]

    def cancel(self) -> None:
        self.cancelled = True


class Script:
    """``requests``: what the engine was asked. ``answers``: the tokens of each answer."""

    def __init__(self) -> None:
        self.requests: list[Request] = []
        self.answers: list[Tokens] = []


@contextmanager
def answering(server, *texts: str, finish: str = "stop"):
    """Inside, the server's engine answers with ``texts``, one after the other; the last again and again."""
    service, script, ask = server.service, Script(), type(server.service).ask

    def scripted(self, served, request: Request):
        renderer = served.renderer
        text = texts[min(len(script.requests), len(texts) - 1)]
        ids = renderer.encoded_part(text)
        made = [NewToken(0, token, None, -0.5, ((token, -0.5),), 0) for token in ids]
        end = NewToken(0, renderer.eos_ids[0], "stop", -0.1, (), 0)
        if finish == "length":
            made[-1] = made[-1]._replace(finish="length")
        tokens = Tokens([*made, *([end] if finish == "stop" else [])])
        script.requests.append(request)
        script.answers.append(tokens)
        return tokens

    type(service).ask = scripted
    try:
        yield script
    finally:
        type(service).ask = ask


def events_of(text: str) -> list[tuple[str | None, object]]:
    """(name, data) of server-sent events; the word [DONE] as it is."""
    made = []
    for block in text.strip().split("\n\n"):
        fields = dict(line.split(": ", 1) for line in block.split("\n"))
        data = fields["data"]
        made.append((fields.get("event"), data if data == "[DONE]" else json.loads(data)))
    return made
