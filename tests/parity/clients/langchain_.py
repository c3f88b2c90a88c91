"""LangChain's ChatOpenAI."""

import json
import sys

import openai
from langchain_openai import ChatOpenAI

url, asked = sys.argv[1], json.loads(sys.argv[2])
options = {
    "base_url": f"{url}/v1",
    "api_key": "none",
    "temperature": 0,
    "max_tokens": asked["max_tokens"],
    "max_retries": 0,
}
chat = ChatOpenAI(model=asked["model"], **options)
tool = {"type": "function", "function": asked["function"]}
told = {}

told["plain"] = chat.invoke(asked["text"]).content
told["stream"] = "".join(chunk.content for chunk in chat.stream(asked["text"]))
calling = chat.bind_tools([tool], tool_choice="required", parallel_tool_calls=False)
(call,) = calling.invoke(asked["text"]).tool_calls
told["call"] = [call["name"], call["args"]]
whole = None
for chunk in calling.stream(asked["text"]):
    whole = chunk if whole is None else whole + chunk
(call,) = whole.tool_calls
told["streamed_call"] = [call["name"], call["args"]]
named = {"title": "answer", "description": "an answer", **asked["schema"]}
told["schema"] = chat.with_structured_output(named, method="json_schema").invoke(asked["text"])
try:
    ChatOpenAI(model="nobody", **options).invoke(asked["text"])
except openai.NotFoundError as error:
    told["error"] = error.code
print(json.dumps(told))
