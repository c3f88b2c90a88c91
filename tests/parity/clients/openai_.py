"""The official client of OpenAI: chat, responses, completions, embeddings, models."""

import json
import sys

import openai

url, asked = sys.argv[1], json.loads(sys.argv[2])
client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
messages = [{"role": "user", "content": asked["text"]}]
options = {"model": asked["model"], "messages": messages, "temperature": 0, "max_tokens": asked["max_tokens"]}
tool = {"type": "function", "function": asked["function"]}
form = {"type": "json_schema", "json_schema": {"name": "answer", "schema": asked["schema"], "strict": True}}
told = {"version": openai.__version__}

told["plain"] = client.chat.completions.create(**options).choices[0].message.content
chunks = client.chat.completions.create(**options, stream=True, stream_options={"include_usage": True})
told["stream"] = "".join(choice.delta.content or "" for chunk in chunks for choice in chunk.choices)
made = client.chat.completions.create(
    **options, tools=[tool], tool_choice="required", parallel_tool_calls=False
).choices[0]
(call,) = made.message.tool_calls
told["call"] = [call.function.name, json.loads(call.function.arguments)]
with client.chat.completions.stream(
    **options, tools=[tool], tool_choice="required", parallel_tool_calls=False
) as stream:
    (call,) = stream.get_final_completion().choices[0].message.tool_calls
told["streamed_call"] = [call.function.name, json.loads(call.function.arguments)]
messages += [
    made.message.model_dump(exclude_none=True),
    {"role": "tool", "tool_call_id": made.message.tool_calls[0].id, "content": "sunny"},
]
told["after_call"] = (
    client.chat.completions.create(**options, tools=[tool], tool_choice="none").choices[0].message.content
)
del messages[1:]
told["schema"] = json.loads(
    client.chat.completions.create(**options, response_format=form).choices[0].message.content
)
try:
    client.chat.completions.create(**{**options, "model": "nobody"})
except openai.NotFoundError as error:
    told["error"] = error.code
try:
    client.chat.completions.create(**options, extra_body={"nonsense": 1})
except openai.BadRequestError as error:
    told["refused"] = error.param

respond = {
    "model": asked["model"],
    "input": asked["text"],
    "temperature": 0,
    "max_output_tokens": asked["max_tokens"],
}
told["response"] = client.responses.create(**respond).output_text
told["response_stream"] = "".join(
    event.delta
    for event in client.responses.create(**respond, stream=True)
    if event.type == "response.output_text.delta"
)
flat = {"type": "function", **asked["function"]}
output = client.responses.create(
    **respond, tools=[flat], tool_choice="required", parallel_tool_calls=False
).output
(call,) = [item for item in output if item.type == "function_call"]
told["response_call"] = [call.name, json.loads(call.arguments)]
text = {"format": {"type": "json_schema", "name": "answer", "schema": asked["schema"], "strict": True}}
told["response_schema"] = json.loads(client.responses.create(**respond, text=text).output_text)

told["models"] = [model.id for model in client.models.list()]
told["completion"] = (
    client.completions.create(
        model=asked["model"], prompt=asked["text"], temperature=0, max_tokens=asked["max_tokens"]
    )
    .choices[0]
    .text
)
told["embedding"] = len(
    client.embeddings.create(model=asked["model"], input=[asked["text"]]).data[0].embedding
)
print(json.dumps(told))
