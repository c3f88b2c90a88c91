"""``/v1/responses``: the same question, and the same answer as items."""

from __future__ import annotations

import json

import pytest
from serving.scripted import ARGUMENTS, CALL, WEATHER, Tokens, answering, events_of

from tunesmith.serving.protocol.responses import InputItem, _messages
from tunesmith.serving.rejections import EngineDied

PATH = "/v1/responses"
HM = {"type": "reasoning_text", "text": "Hm."}
TOOL = {"type": "function", **WEATHER["function"]}


@pytest.fixture
def post(speaker):
    with speaker.client() as client:
        yield lambda path=PATH, **body: client.post(path, json=body)


@pytest.mark.parametrize(
    ("text", "kinds"),
    [
        ("Good day.", ["message"]),
        ("<think>\nHm.\n</think>\n\nSo.", ["reasoning", "message"]),
        (f"Let me see.\n{CALL}\n{CALL}", ["message", "function_call", "function_call"]),
    ],
)
def test_a_stream_is_the_whole_response(speaker, post, text, kinds):
    body = {"input": "hi", "tools": [TOOL], "include": ["message.output_text.logprobs"], "top_logprobs": 1}
    with answering(speaker, text):
        whole = post(**body).json()
        events = [data for _, data in events_of(post(**body, stream=True).text)]
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    assert events[0]["type"] == "response.created" and events[-1]["type"] == "response.completed"
    final = events[-1]["response"]
    assert [item["type"] for item in whole["output"]] == kinds and whole["status"] == "completed"
    for made in (whole, final):
        made |= {"id": "", "created_at": 0}
        for item in made["output"]:
            item |= {"id": ""} | ({"call_id": ""} if "call_id" in item else {})
    assert final == whole
    deltas: dict[int, str] = {}
    for event in events:
        if event["type"].endswith(".delta"):
            deltas[event["output_index"]] = deltas.get(event["output_index"], "") + event["delta"]
    for place, item in enumerate(whole["output"]):
        if item["type"] == "function_call":
            assert deltas[place] == item["arguments"] and json.loads(item["arguments"]) == ARGUMENTS
        else:
            assert deltas[place] == item["content"][0]["text"]
    opened = [event["output_index"] for event in events if event["type"] == "response.output_item.added"]
    closed = [event["output_index"] for event in events if event["type"] == "response.output_item.done"]
    assert opened == closed == list(range(len(kinds)))


def test_the_question_is_that_of_chat_completions(speaker, post):
    items = [
        {"role": "developer", "content": "Be brief."},
        {"role": "user", "content": [{"type": "input_text", "text": "hi"}]},
        {"type": "reasoning", "id": "rs_1", "summary": [], "content": [HM]},
        {
            "type": "message",
            "id": "msg_1",
            "role": "assistant",
            "status": "completed",
            "content": [{"type": "output_text", "text": "Let me see.", "annotations": [], "logprobs": []}],
        },
        {"type": "function_call", "call_id": "abc123def", "name": "weather", "arguments": '{"town": "Bern"}'},
        {"type": "function_call_output", "call_id": "abc123def", "output": "sun"},
        {"role": "user", "content": "And now?"},
    ]
    function = {"name": "weather", "arguments": '{"town": "Bern"}'}
    called = [{"id": "abc123def", "type": "function", "function": function}]
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": "Let me see.", "reasoning_content": "Hm.", "tool_calls": called},
        {"role": "tool", "tool_call_id": "abc123def", "content": "sun"},
        {"role": "user", "content": "And now?"},
    ]
    asked = {"temperature": 0.5, "top_p": 0.9}
    with answering(speaker, "x") as script:
        theirs = post(input=items, tools=[TOOL], max_output_tokens=9, **asked)
        ours = post("/v1/chat/completions", messages=messages, tools=[WEATHER], max_tokens=9, **asked)
    assert theirs.status_code == ours.status_code == 200, theirs.text
    first, second = script.requests
    assert (first.ids, first.max_tokens, first.temperature, first.top_p) == (
        second.ids,
        second.max_tokens,
        second.temperature,
        second.top_p,
    )


def test_reasoning_between_words_and_their_call_is_kept():
    thought, words, call = (
        {"type": "reasoning", "summary": [], "content": [HM]},
        {"role": "assistant", "content": "Let me see."},
        {"type": "function_call", "call_id": "abc123def", "name": "weather", "arguments": "{}"},
    )
    more = {**thought, "content": [{**HM, "text": "Now."}]}
    items = [
        InputItem.model_validate_json(json.dumps(item))
        for item in ({"role": "user", "content": "hi"}, thought, words, more, call)
    ]
    content = [message.content for message in _messages(items)]
    assert content == ["hi", "<think>\nHm.Now.\n</think>\n\nLet me see."]


def test_what_a_client_sends_back_is_taken(speaker, post):
    """Clients send the items of an answer with every field that their own types know, most of them null."""
    with answering(speaker, f"<think>\nHm.\n</think>\n\nLet me see.\n{CALL}"):
        output = post(input="hi", tools=[TOOL]).json()["output"]
        items = [
            {"role": "user", "content": "hi"},
            *({**item, "async_": None, "phase": None} for item in output),
        ]
        result = {"type": "function_call_output", "call_id": output[-1]["call_id"], "output": "sun"}
        assert post(input=[*items, result], tools=[TOOL], anything=None).status_code == 200
        refused = post(input=[*items, {**result, "async_": True}], tools=[TOOL])
    assert refused.status_code == 400 and refused.json()["error"]["param"] == "input[4].async_"


def test_a_schema_is_enforced(post):
    schema = {
        "type": "object",
        "properties": {"a": {"enum": ["x", "yy"]}},
        "required": ["a"],
        "additionalProperties": False,
    }
    form = {"type": "json_schema", "name": "n", "schema": schema, "strict": True}
    made = post(input="hi", text={"format": form}, max_output_tokens=200).json()
    assert json.loads(made["output"][0]["content"][0]["text"])["a"] in ("x", "yy")
    assert made["text"]["format"] == form


def test_the_limit_makes_it_incomplete(speaker, post):
    with answering(speaker, "one two", finish="length"):
        made = post(input="hi", max_output_tokens=5).json()
    assert (made["status"], made["incomplete_details"]) == ("incomplete", {"reason": "max_output_tokens"})
    assert [item["status"] for item in made["output"]] == ["incomplete"]


def test_a_call_that_is_complete_is_not_cut(speaker, post):
    with answering(speaker, f"<think>\nHm.\n</think>\n\n{CALL}", finish="length"):
        made = post(input="hi", tools=[TOOL], max_output_tokens=50).json()
    assert made["status"] == "incomplete"
    assert [(item["type"], item["status"]) for item in made["output"]] == [
        ("reasoning", "completed"),
        ("function_call", "completed"),
    ]


def test_an_error_has_its_place_among_the_events(speaker, post, monkeypatch):
    async def breaks_off(self):
        if self.read == 3:
            raise EngineDied("the engine has died while it answered")
        self.read += 1
        return self._tokens[self.read - 1]

    monkeypatch.setattr(Tokens, "__anext__", breaks_off)
    with answering(speaker, "one two three four"):
        events = events_of(post(input="hi", stream=True).text)
    assert events[-1][0] == "error" and len(events) > 2
    assert [data["sequence_number"] for _, data in events] == list(range(len(events)))


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"input": []}, "input"),
        ({"input": [{"role": "user", "content": [{"type": "input_image"}]}]}, "input[0].content"),
        ({"input": [{"type": "function_call", "name": "f"}]}, "input[0]"),
        ({"input": "x", "previous_response_id": "resp_1"}, "previous_response_id"),
        ({"input": "x", "store": True}, "store"),
        ({"input": "x", "background": True}, "background"),
        ({"input": "x", "reasoning": {"effort": "high"}}, "reasoning.effort"),
        ({"input": "x", "include": ["reasoning.encrypted_content"]}, "include[0]"),
        ({"input": "x", "tools": [{"type": "web_search"}]}, "tools[0].type"),
        ({"input": "x", "tool_choice": "required"}, "tool_choice"),
        ({"input": "x", "truncation": "auto"}, "truncation"),
        ({"input": "x", "anything": 1}, "anything"),
    ],
)
def test_what_cannot_be_done_is_refused(post, body, param):
    response = post(**body)
    assert response.status_code == 400 and response.json()["error"]["param"] == param
