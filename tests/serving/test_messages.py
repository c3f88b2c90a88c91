"""``/v1/messages``, Anthropic's protocol: the same question, and the same answer in blocks."""

from __future__ import annotations

import json

import pytest
from serving.scripted import ARGUMENTS, CALL, WEATHER, answering, events_of

from tunesmith.serving.keys import Key, digest_of

PATH = "/v1/messages"
HI = [{"role": "user", "content": "hi"}]
SUN = {"type": "text", "text": "sun"}
TOOL = {
    "name": "weather",
    "description": "now",
    "input_schema": WEATHER["function"]["parameters"],
    "cache_control": {"type": "ephemeral"},
}


@pytest.fixture
def post(speaker):
    with speaker.client() as client:
        yield lambda path=PATH, **body: client.post(path, json={"messages": HI, "max_tokens": 50, **body})


def put_together(text: str) -> dict:
    """The message of a stream, as Anthropic's clients put it together."""
    message: dict = {}
    partial: dict[int, str] = {}
    open_block = None
    for name, data in events_of(text):
        assert name == data["type"]
        match name:
            case "message_start":
                message = data["message"]
            case "content_block_start":
                assert open_block is None and data["index"] == len(message["content"])
                open_block = data["index"]
                message["content"].append(data["content_block"])
            case "content_block_delta":
                assert data["index"] == open_block
                block, delta = message["content"][open_block], data["delta"]
                for kind, key in (("text_delta", "text"), ("thinking_delta", "thinking")):
                    if delta["type"] == kind:
                        block[key] += delta[key]
                if delta["type"] == "input_json_delta":
                    partial[open_block] = partial.get(open_block, "") + delta["partial_json"]
            case "content_block_stop":
                if open_block in partial:
                    message["content"][open_block]["input"] = json.loads(partial[open_block])
                open_block = None
            case "message_delta":
                message |= data["delta"] | {"usage": data["usage"]}
    assert open_block is None and name == "message_stop"
    return message


@pytest.mark.parametrize(
    ("text", "kinds", "reason"),
    [
        ("Good day.", ["text"], "end_turn"),
        ("<think>\nHm.\n</think>\n\nSo.", ["thinking", "text"], "end_turn"),
        (f"Let me see.\n{CALL}\n{CALL}", ["text", "tool_use", "tool_use"], "tool_use"),
        ("one STOP two", ["text"], "stop_sequence"),
    ],
)
def test_a_stream_is_the_whole_message(speaker, post, text, kinds, reason):
    body = {"tools": [TOOL], "stop_sequences": ["STOP"]}
    with answering(speaker, text):
        whole = post(**body).json()
        stream = put_together(post(**body, stream=True).text)
    assert [block["type"] for block in whole["content"]] == kinds
    assert whole["stop_reason"] == reason
    assert whole["stop_sequence"] == ("STOP" if reason == "stop_sequence" else None)
    for block in whole["content"] + stream["content"]:
        block.pop("id", None)
    assert {**stream, "id": ""} == {**whole, "id": ""}
    assert all(block["input"] == ARGUMENTS for block in whole["content"] if block["type"] == "tool_use")


def test_the_question_is_that_of_openai_s_protocol(speaker, post):
    turns = [
        *HI,
        {
            "role": "assistant",
            "content": [
                {"type": "text", "text": "Let me see."},
                {"type": "tool_use", "id": "abc123def", "name": "weather", "input": {"town": "Bern"}},
            ],
        },
        {
            "role": "user",
            "content": [
                {
                    "type": "tool_result",
                    "tool_use_id": "abc123def",
                    "content": [{"type": "text", "text": "sun"}],
                },
                {"type": "text", "text": "And now?"},
            ],
        },
    ]
    function = {"name": "weather", "arguments": '{"town": "Bern"}'}
    called = [{"id": "abc123def", "type": "function", "function": function}]
    messages = [
        {"role": "system", "content": "Be brief."},
        *HI,
        {"role": "assistant", "content": "Let me see.", "tool_calls": called},
        {"role": "tool", "tool_call_id": "abc123def", "content": "sun"},
        {"role": "user", "content": "And now?"},
    ]
    with answering(speaker, "x") as script:
        theirs = post(system="Be brief.", messages=turns, tools=[TOOL], top_k=4, top_p=0.5, temperature=1)
        ours = post("/v1/chat/completions", messages=messages, tools=[WEATHER])
        counted = post(f"{PATH}/count_tokens", messages=turns, tools=[TOOL])
    assert theirs.status_code == ours.status_code == 200
    first, second = script.requests
    assert first.ids == second.ids and first.max_tokens == 50
    assert (first.top_k, first.top_p, first.temperature) == (4, 0.5, 1)
    assert counted.status_code == 400, "max_tokens is not a field there"
    usage = theirs.json()["usage"]
    assert usage["input_tokens"] == len(first.ids) and usage["output_tokens"] == 2


def test_tokens_are_counted(speaker):
    with speaker.client() as client:
        made = client.post(f"{PATH}/count_tokens", json={"messages": HI, "tools": [TOOL]}).json()
    with answering(speaker, "x") as script, speaker.client() as client:
        client.post(PATH, json={"messages": HI, "tools": [TOOL], "max_tokens": 1})
    assert made == {"input_tokens": len(script.requests[0].ids)}


def test_thinking_is_switched(speaker, post):
    with answering(speaker, "x") as script:
        for kind in ("enabled", "disabled"):
            assert post(thinking={"type": kind}).status_code == 200
    assert script.requests[0].ids != script.requests[1].ids


def test_a_tool_that_failed_says_so(speaker, post):
    use = {"type": "tool_use", "id": "abc123def", "name": "weather", "input": {}}
    result = {"type": "tool_result", "tool_use_id": "abc123def", "content": "no town", "is_error": True}
    turns = [*HI, {"role": "assistant", "content": [use]}, {"role": "user", "content": [result]}]
    with answering(speaker, "x") as script:
        assert post(messages=turns, tools=[TOOL]).status_code == 200
    renderer = speaker.service.models.base.renderer
    assert "Error: no town" in renderer.decode(script.requests[0].ids)


@pytest.mark.parametrize("extra", [{"foo": None}, {"foo": None, "bar": None}])
def test_a_null_asks_nothing_whatever_field_it_is_in(speaker, post, extra):
    block = {"type": "text", "text": "hi", **extra}
    bodies = [
        {"messages": [{**HI[0], **extra}]},
        {"messages": [{"role": "user", "content": [block]}]},
        {"messages": [*HI, {"role": "user", "content": [block, {**block, "type": "text"}]}]},
        {"tools": [{**TOOL, **extra}], "tool_choice": {"type": "auto", **extra}},
    ]
    with answering(speaker, "x"):
        for body in bodies:
            response = post(**body)
            assert response.status_code == 200, response.text


@pytest.mark.parametrize(
    "body",
    [
        {"max_tokens": None},
        {"messages": [{"role": "user", "content": [{"type": "image", "source": {}}]}]},
        {"messages": [{"role": "system", "content": "x"}]},
        {"thinking": {"type": "enabled", "budget_tokens": 1024}},
        {"tool_choice": {"type": "any"}},
        {"tools": [TOOL], "tool_choice": {"type": "tool"}},
        {"tools": [TOOL], "tool_choice": {"type": "auto", "name": "weather"}},
        {"tools": [{"type": "bash_20250124", "name": "bash"}]},
        {"temperature": 2},
        {"temperature": 1e-45},
        {"top_p": 1e-320},
        {"anything": 1},
    ],
)
def test_what_cannot_be_done_is_refused_in_their_shape(post, body):
    response = post(**body)
    assert response.status_code == 400
    made = response.json()
    assert made["type"] == "error" and made["error"]["type"] == "invalid_request_error"


def test_an_unknown_model_is_not_found(post):
    response = post(model="nobody")
    assert response.status_code == 404 and response.json()["error"]["type"] == "not_found_error"


@pytest.mark.parametrize("path", [PATH, f"{PATH}/count_tokens"])
def test_a_wrong_key_is_refused_in_their_shape(speaker, post, monkeypatch, path):
    monkeypatch.setattr(speaker.service.doorkeeper, "keys", [Key("a", digest_of("secret-of-the-editor"))])
    refused = post(path)
    assert refused.status_code == 401
    assert refused.json()["type"] == "error"
    assert refused.json()["error"]["type"] == "authentication_error"


def test_a_wrong_method_is_refused_in_their_shape(speaker):
    with speaker.client() as client:
        refused = client.get(PATH)
    assert refused.status_code == 405 and refused.json()["type"] == "error"
