"""The official client of Anthropic."""

import json
import sys

import anthropic

url, asked = sys.argv[1], json.loads(sys.argv[2])
client = anthropic.Anthropic(base_url=url, api_key="none", max_retries=0)
options = {
    "model": asked["model"],
    "messages": [{"role": "user", "content": asked["text"]}],
    "max_tokens": asked["max_tokens"],
    "extra_body": {"temperature": 0},
}
function = asked["function"]
tool = {
    "name": function["name"],
    "description": function["description"],
    "input_schema": function["parameters"],
}
one_call = {"type": "any", "disable_parallel_tool_use": True}
told = {"version": anthropic.__version__}

(block,) = client.messages.create(**options).content
told["plain"] = block.text
with client.messages.stream(**options) as stream:
    told["stream"] = "".join(stream.text_stream)
    assert stream.get_final_message().usage.output_tokens > 0
made = client.messages.create(**options, tools=[tool], tool_choice=one_call)
(call,) = [block for block in made.content if block.type == "tool_use"]
told["call"] = [call.name, call.input]
with client.messages.stream(**options, tools=[tool], tool_choice=one_call) as stream:
    (call,) = [block for block in stream.get_final_message().content if block.type == "tool_use"]
told["streamed_call"] = [call.name, call.input]
options["messages"] += [
    {"role": "assistant", "content": [block.model_dump(exclude_none=True) for block in made.content]},
    {
        "role": "user",
        "content": [{"type": "tool_result", "tool_use_id": made.content[-1].id, "content": "sunny"}],
    },
]
(block,) = client.messages.create(**options, tools=[tool], tool_choice={"type": "none"}).content
told["after_call"] = block.text
del options["messages"][1:]
told["counted"] = client.messages.count_tokens(
    model=asked["model"], messages=options["messages"]
).input_tokens
try:
    client.messages.create(**{**options, "model": "nobody"})
except anthropic.NotFoundError as error:
    told["error"] = error.body["error"]["type"]
print(json.dumps(told))
