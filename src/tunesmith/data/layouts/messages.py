"""Lists of messages: OpenAI's under ``messages``, ShareGPT's under ``conversations``."""

from __future__ import annotations

from tunesmith.data.layout import Layout, MakesExample, RowReader, register


@register
class Messages(Layout):
    name = "messages"
    order = 20
    keys = ("messages",)
    looks_like = "`messages` in OpenAI form: `tools`, `tool_calls`, `content: null`, `role: tool`"
    becomes = "a conversation"
    alike = ("sharegpt",)
    example = (
        '{"messages": [{"role": "system", "content": "Be brief."}, '
        '{"role": "user", "content": "Weather in Oslo?"}, {"role": "assistant", "content": "Rain."}]}\n'
        '{"tools": [{"type": "function", "function": {"name": "note_add", "parameters": '
        '{"type": "object", "properties": {"text": {"type": "string"}}}}}], '
        '"messages": [{"role": "user", "content": "Note: buy milk"}, '
        '{"role": "assistant", "content": null, "tool_calls": [{"id": "call00001", "type": "function", '
        '"function": {"name": "note_add", "arguments": "{\\"text\\": \\"buy milk\\"}"}}]}]}'
    )

    def read(self, row: RowReader) -> MakesExample:
        return row.spoken(row.whole("messages"))


@register
class ShareGPT(Layout):
    name = "sharegpt"
    order = 30
    keys = ("conversations",)
    looks_like = (
        "`conversations` with `role`/`content` or `from`/`value` (`human`, `gpt`, `function_call`, "
        "`observation`, …)"
    )
    becomes = "a conversation"
    alike = ("messages",)
    example = (
        '{"conversations": [{"from": "human", "value": "Note: buy milk"}, '
        '{"from": "gpt", "value": "Done."}], "label": true}'
    )

    def read(self, row: RowReader) -> MakesExample:
        return row.spoken(row.whole("conversations"))
