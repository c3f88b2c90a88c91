"""LiteLLM, as a client of an OpenAI-compatible server."""

import json
import os
import sys

os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"  # else it asks GitHub for prices

import litellm

litellm.suppress_debug_info = True

url, asked = sys.argv[1], json.loads(sys.argv[2])
options = {
    "model": f"openai/{asked['model']}",
    "api_base": f"{url}/v1",
    "api_key": "none",
    "messages": [{"role": "user", "content": asked["text"]}],
    "temperature": 0,
    "max_tokens": asked["max_tokens"],
    "num_retries": 0,
}
tool = {"type": "function", "function": asked["function"]}
form = {"type": "json_schema", "json_schema": {"name": "answer", "schema": asked["schema"], "strict": True}}
told = {}

told["plain"] = litellm.completion(**options).choices[0].message.content
told["stream"] = "".join(
    choice.delta.content or ""
    for chunk in litellm.completion(**options, stream=True)
    for choice in chunk.choices
)
(call,) = (
    litellm.completion(**options, tools=[tool], tool_choice="required", parallel_tool_calls=False)
    .choices[0]
    .message.tool_calls
)
told["call"] = [call.function.name, json.loads(call.function.arguments)]
chunks = list(
    litellm.completion(
        **options, tools=[tool], tool_choice="required", parallel_tool_calls=False, stream=True
    )
)
(call,) = litellm.stream_chunk_builder(chunks).choices[0].message.tool_calls
told["streamed_call"] = [call.function.name, json.loads(call.function.arguments)]
told["schema"] = json.loads(litellm.completion(**options, response_format=form).choices[0].message.content)
try:
    litellm.completion(**{**options, "model": "openai/nobody"})
except litellm.NotFoundError:
    told["error"] = "model_not_found"
print(json.dumps(told))
