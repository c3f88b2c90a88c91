"""``/v1/chat/completions``: every field has an effect or is refused, and a stream is the whole answer."""

from __future__ import annotations

import json

import pytest
from serving.scripted import ARGUMENTS, CALL, WEATHER, answering, events_of

from tunesmith.data import formats
from tunesmith.data.formats import DataSpec
from tunesmith.data.sources import Raw

PATH = "/v1/chat/completions"
HI = [{"role": "user", "content": "hi"}]
ERROR = {"message", "type", "param", "code"}


@pytest.fixture
def post(speaker):
    with speaker.client() as client:
        yield lambda **body: client.post(PATH, json={"messages": HI, **body})


def streamed(response) -> dict:
    """The message of a stream, put together as OpenAI's clients do it."""
    assert response.status_code == 200
    *chunks, (_, done) = events_of(response.text)
    assert done == "[DONE]"
    message: dict = {"calls": {}, "logprobs": []}
    for _, chunk in chunks:
        for choice in chunk["choices"]:
            delta = choice["delta"]
            for key in ("content", "reasoning_content"):
                if delta.get(key):
                    message[key] = message.get(key, "") + delta[key]
            for call in delta.get("tool_calls", []):
                made = message["calls"].setdefault(call["index"], {"arguments": ""})
                made |= {key: call[key] for key in ("id", "type") if key in call}
                made |= {"name": call["function"]["name"]} if "name" in call["function"] else {}
                made["arguments"] += call["function"]["arguments"]
            message["logprobs"] += (choice["logprobs"] or {"content": []})["content"]
            message["finish"] = choice["finish_reason"] or message.get("finish")
    return message


def test_an_answer_has_openai_s_shape(speaker, post):
    with answering(speaker, "Good day."):
        made = post(model="speaker", logprobs=True, top_logprobs=1).json()
    (choice,) = made["choices"]
    assert made["object"] == "chat.completion" and made["model"] == "speaker"
    assert choice["message"] == {"role": "assistant", "content": "Good day.", "refusal": None}
    assert choice["finish_reason"] == "stop"
    assert "".join(entry["token"] for entry in choice["logprobs"]["content"]) == "Good day."
    first = choice["logprobs"]["content"][0]
    assert first["logprob"] == -0.5 and first["top_logprobs"][0]["token"] == first["token"]
    assert bytes(first["bytes"]).decode() == first["token"]
    usage = made["usage"]
    assert usage["completion_tokens"] == len(choice["logprobs"]["content"]) + 1
    assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]


@pytest.mark.parametrize(
    ("text", "extra"),
    [
        ("Good day. ☺", {}),
        ("<think>\nHm.\n</think>\n\nGood day.", {}),
        (f"Let me see.\n{CALL}\n{CALL}", {"tools": [WEATHER]}),
        (f"<think>\nHm.\n</think>\n\n{CALL}", {"tools": [WEATHER]}),
        ('<tool_call>{"name": "weather"</tool_call>', {"tools": [WEATHER]}),
        ("one STOP two", {"stop": ["STOP"]}),
        (CALL, {}),
    ],
)
def test_a_stream_is_the_whole_answer(speaker, post, text, extra):
    with answering(speaker, text):
        whole = post(**extra, logprobs=True).json()["choices"][0]
        stream = streamed(post(**extra, logprobs=True, stream=True))
    message = whole["message"]
    assert stream.get("content", "") == (message["content"] or "")
    assert stream.get("reasoning_content") == message.get("reasoning_content")
    calls = [call["function"] for call in message.get("tool_calls", [])]
    assert [
        {"name": call["name"], "arguments": call["arguments"]} for call in stream["calls"].values()
    ] == calls
    assert all(len(call["id"]) == 9 and call["type"] == "function" for call in stream["calls"].values())
    assert stream["finish"] == whole["finish_reason"]
    assert stream["logprobs"] == whole["logprobs"]["content"]


def test_calls_are_delivered_as_calls(speaker, post):
    with answering(speaker, f"Let me see.\n{CALL}\n{CALL}"):
        choice = post(tools=[WEATHER]).json()["choices"][0]
    assert choice["finish_reason"] == "tool_calls" and choice["message"]["content"] == "Let me see."
    functions = [call["function"] for call in choice["message"]["tool_calls"]]
    assert [(made["name"], json.loads(made["arguments"])) for made in functions] == [
        ("weather", ARGUMENTS)
    ] * 2


TAGGED = (
    "<tool_call>\n<function=weather>\n<parameter=town>\n5\n</parameter>\n<parameter=days>\n5\n</parameter>\n"
    "</function>\n</tool_call>"
)


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize(
    "text", [TAGGED, '<|python_tag|>{"name": "weather", "parameters": {"town": "5", "days": 5}}']
)
def test_calls_in_tags_and_after_llama_s_mark_are_delivered_with_the_types_of_the_tool(
    speaker, post, text, strict
):
    tools = [{**WEATHER, "function": {**WEATHER["function"], "strict": strict}}]
    with answering(speaker, text):
        (choice,) = post(tools=tools).json()["choices"]
        message = streamed(post(tools=tools, stream=True))
    (call,) = choice["message"]["tool_calls"]
    assert (
        choice["message"]["content"] is None and choice["finish_reason"] == message["finish"] == "tool_calls"
    )
    for made in (call["function"], message["calls"][0]):
        assert (made["name"], json.loads(made["arguments"])) == ("weather", {"town": "5", "days": 5})


def test_a_call_alone_has_no_content(speaker, post):
    with answering(speaker, CALL):
        assert post(tools=[WEATHER]).json()["choices"][0]["message"]["content"] is None


def test_without_parallel_calls_the_answer_ends_with_the_first(speaker, post):
    with answering(speaker, f"{CALL}\n{CALL}\nand more words that nobody reads") as script:
        message = post(tools=[WEATHER], parallel_tool_calls=False).json()["choices"][0]["message"]
    assert len(message["tool_calls"]) == 1
    assert script.answers[0].cancelled and script.answers[0].read < len(script.answers[0]._tokens) - 5


def test_tool_choice_none_leaves_the_tools_out(speaker, post):
    with answering(speaker, CALL) as script:
        message = post(tools=[WEATHER], tool_choice="none").json()["choices"][0]["message"]
        post()
    assert message["content"] == CALL and "tool_calls" not in message
    assert script.requests[0].ids == script.requests[1].ids


PICK = {
    "type": "function",
    "function": {
        "name": "pick",
        "parameters": {
            "type": "object",
            "properties": {"side": {"enum": ["left", "right"]}},
            "required": ["side"],
            "additionalProperties": False,
        },
    },
}


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "pick"}}])
def test_a_required_call_is_made_even_by_a_random_model(post, choice):
    tools = [PICK] if choice == "required" else [WEATHER, PICK]
    made = post(tools=tools, tool_choice=choice, max_tokens=300, parallel_tool_calls=False).json()
    (choice,) = made["choices"]
    (call,) = choice["message"]["tool_calls"]
    assert call["function"]["name"] == "pick" and choice["finish_reason"] == "tool_calls"
    assert json.loads(call["function"]["arguments"])["side"] in ("left", "right")


def test_museum_ollama_17933_a_schema_is_enforced(post):
    """The schema was accepted and ignored."""
    schema = {"type": "object", "properties": {"a": {"enum": ["x", "yy"]}}, "required": ["a"]}
    schema["additionalProperties"] = False
    wanted = {"type": "json_schema", "json_schema": {"name": "n", "schema": schema}}
    for seed in range(3):
        made = post(response_format=wanted, max_tokens=200, temperature=1, seed=seed).json()["choices"][0]
        assert made["finish_reason"] == "stop"
        assert json.loads(made["message"]["content"])["a"] in ("x", "yy")
    refused = post(
        response_format={"type": "json_schema", "json_schema": {"schema": {"type": "object", "$ref": "#/x"}}}
    )
    assert refused.status_code == 400 and refused.json()["error"]["param"] == "response_format"


def test_reasoning_stands_before_json_if_it_is_asked_for(post):
    """The grammar has the reasoning of the template: it is not turned off, and not JSON."""
    wanted = {"response_format": {"type": "json_object"}, "max_tokens": 12}
    thinking = post(**wanted, chat_template_kwargs={"enable_thinking": True}).json()["choices"][0]["message"]
    plain = post(**wanted).json()["choices"][0]["message"]
    assert thinking["reasoning_content"] and not thinking["content"]
    assert plain["content"].startswith("{") and "reasoning_content" not in plain


def test_strict_tools_deliver_calls_that_fit_only(speaker, post):
    wrong = CALL.replace('"town"', '"city"')
    strict = {"type": "function", "function": {**WEATHER["function"], "strict": True}}
    with answering(speaker, wrong) as script:
        loose = post(tools=[WEATHER]).json()["choices"][0]["message"]
        message = post(tools=[strict]).json()["choices"][0]["message"]
    assert len(loose["tool_calls"]) == 1
    assert message["content"] == wrong and "tool_calls" not in message
    assert script.requests[0].ids == script.requests[1].ids, "strict speaks to the server, not to the model"


def test_stop_texts_cut_and_free_the_row(speaker, post):
    with answering(speaker, "one two three four five six seven") as script:
        choice = post(stop="three").json()["choices"][0]
    assert choice["message"]["content"] == "one two " and choice["finish_reason"] == "stop"
    assert script.answers[0].cancelled and script.answers[0].read < len(script.answers[0]._tokens) - 5


def test_the_limit_is_told(speaker, post):
    with answering(speaker, "one two", finish="length") as script:
        assert post(max_completion_tokens=7).json()["choices"][0]["finish_reason"] == "length"
    assert script.requests[0].max_tokens == 7


def test_every_way_to_draw_reaches_the_engine(speaker, post):
    asked = {
        "temperature": 0.5,
        "top_p": 0.9,
        "top_k": 7,
        "min_p": 0.1,
        "repetition_penalty": 1.1,
        "presence_penalty": 0.2,
        "frequency_penalty": 0.3,
        "seed": 11,
        "max_tokens": 9,
    }
    with answering(speaker, "x") as script:
        assert post(**asked, logit_bias={"5": 1.5}, logprobs=True, top_logprobs=3, n=2).status_code == 200
        assert post().status_code == 200
    first, second, plain = script.requests
    for name, value in asked.items():
        assert getattr(first, name) == value and getattr(plain, name) != value
    assert (first.logit_bias, first.logprobs) == ({5: 1.5}, 3)
    assert (first.stream, second.stream) == (0, 1) and second.seed == 11
    assert plain.temperature == 0, "greedy, as answers are evaluated"


def test_seeds_give_the_same_answers_and_n_gives_different_ones(post):
    def texts(**body):
        made = post(temperature=1, max_tokens=12, n=3, **body).json()
        return [choice["message"]["content"] for choice in made["choices"]]

    first, again, other = texts(seed=1), texts(seed=1), texts(seed=2)
    assert first == again and first != other and len({*first}) == 3
    assert texts(seed=1)[:1] == [
        post(temperature=1, max_tokens=12, seed=1).json()["choices"][0]["message"]["content"]
    ]


def test_the_smallest_numbers_that_are_taken_draw_the_likeliest_tokens(post):
    """With much smaller ones the computation overflows, and each token is the first of the vocabulary."""
    greedy = post(max_tokens=12).json()["choices"][0]["message"]
    for drawn in ({"temperature": 1e-4}, {"temperature": 1, "top_p": 1e-4}):
        assert post(max_tokens=12, seed=1, **drawn).json()["choices"][0]["message"] == greedy


def test_reasoning_is_beside_the_words_and_can_be_turned_off(speaker, post):
    with answering(speaker, "<think>\nHm.\n</think>\n\nSo.") as script:
        message = post().json()["choices"][0]["message"]
        post(reasoning_effort="none")
        post(chat_template_kwargs={"enable_thinking": False})
        post(chat_template_kwargs={"enable_thinking": True})
    assert (message["content"], message["reasoning_content"]) == ("So.", "Hm.")
    renderer = speaker.service.models.base.renderer
    texts = [renderer.decode(request.ids) for request in script.requests]
    assert texts[1] == texts[2] != texts[3]
    assert texts[1].endswith("<think>\n\n</think>\n\n") and not texts[3].endswith("</think>\n\n")


HISTORY = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": [{"type": "text", "text": "Weather in "}, {"type": "text", "text": "Bern?"}]},
    {
        "role": "assistant",
        "content": None,
        "tool_calls": [
            {
                "id": "abc123def",
                "type": "function",
                "function": {"name": "weather", "arguments": '{"town": "Bern", "days": 2}'},
            }
        ],
    },
    {"role": "tool", "tool_call_id": "abc123def", "content": "sun"},
    {"role": "assistant", "content": "Sun.", "reasoning_content": "It says sun."},
    {"role": "user", "content": "And now?"},
]


@pytest.mark.parametrize("upto", [2, 4, 6])
def test_prompts_are_those_of_training(speaker, post, upto):
    """The ids of the prompt equal those before the answer in the row that training makes of the messages."""
    renderer = speaker.service.models.base.renderer
    row = {"messages": [*HISTORY[:upto], {"role": "assistant", "content": "Fine."}], "tools": [WEATHER]}
    spec = DataSpec(train=("x",))
    example = formats.row(Raw("x:1", json.dumps(row)), spec)
    rendered = renderer.rows(example, learn="last")[0].tokens
    with answering(speaker, "Fine.") as script:
        assert post(messages=HISTORY[:upto], tools=[WEATHER]).status_code == 200
    assert list(script.requests[0].ids) == rendered.ids[: rendered.start].tolist()


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "assistant", "content": "x"}]}, "messages"),
        ({"messages": [{"role": "robot", "content": "x"}]}, "messages[0].role"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": "x", "name": "Bob"}]}, "messages[0]"),
        ({"messages": [*HISTORY[:3], {"role": "tool", "tool_call_id": "zz", "content": "x"}]}, "messages"),
        ({"temperature": 3}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"temperature": 1e-45}, "temperature"),
        ({"temperature": 1e-300}, "temperature"),
        ({"top_p": 1e-320}, "top_p"),
        ({"repetition_penalty": 1e-300, "temperature": 1}, "repetition_penalty"),
        ({"n": 0}, "n"),
        ({"n": 99}, "n"),
        ({"max_tokens": 10**9}, "max_tokens"),
        ({"max_tokens": 5, "max_completion_tokens": 6}, None),
        ({"logit_bias": {"x": 1}}, "logit_bias"),
        ({"top_logprobs": 2}, None),
        ({"stop": [""]}, "stop"),
        ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools[0].function.name"),
        ({"tools": [{"type": "function", "function": {"name": "f", "extra": 1}}]}, "tools[0].function.extra"),
        ({"tools": [{"type": "web_search"}]}, "tools[0].type"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"messages": [{"role": "user", "foo": None}]}, "messages[0]"),
        ({"tools": [WEATHER], "response_format": {"type": "json_object"}}, "response_format"),
        ({"response_format": {"type": "json_schema"}}, "response_format"),
        ({"reasoning_effort": "high"}, "reasoning_effort"),
        ({"reasoning_effort": "none", "chat_template_kwargs": {"enable_thinking": True}}, None),
        ({"chat_template_kwargs": {"enable_thinking": True, "thinking": False}}, None),
        ({"stream_options": {"include_usage": True}}, None),
        ({"functions": [{}]}, "functions"),
        ({"store": True}, "store"),
        ({"audio": {"voice": "x"}}, "audio"),
        ({"anything": 1}, "anything"),
        ({"seed": "1"}, "seed"),
        ({"model": "nobody"}, "model"),
    ],
)
def test_what_cannot_be_done_is_refused_in_openai_s_shape(post, body, param):
    response = post(**body)
    assert response.status_code in (400, 404)
    error = response.json()["error"]
    assert error.keys() == ERROR and error["message"] and error["type"] == "invalid_request_error"
    assert error["param"] == param


def test_what_asks_nothing_is_taken(speaker, post):
    body = {
        "metadata": {"a": "b"},
        "store": False,
        "user": "u",
        "service_tier": "auto",
        "modalities": ["text"],
        "logit_bias": None,
        "stop": None,
        "tools": [],
        "functions": None,
        "n": 1,
        "prompt_cache_key": "k",
        "safety_identifier": "s",
        "response_format": {"type": "text"},
    }
    with answering(speaker, "x"):
        assert post(**body).status_code == 200


@pytest.mark.parametrize(
    "body",
    [
        {"messages": [{"role": "user", "content": "hi", "foo": None}]},
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "hi", "foo": None}]}]},
        {
            "tools": [WEATHER],
            "tool_choice": {"type": "function", "function": {"name": "weather"}, "foo": None},
        },
        {"tools": [{**WEATHER, "function": {**WEATHER["function"], "foo": None}}]},
    ],
)
def test_a_null_asks_nothing_whatever_field_it_is_in(speaker, post, body):
    with answering(speaker, CALL):
        response = post(**body)
    assert response.status_code == 200, response.text


def test_a_template_without_tools_says_so(server):
    """The tiny model's template leaves out tools: the model would answer without knowing of them."""
    with server.client() as client:
        response = client.post(PATH, json={"messages": HI, "tools": [WEATHER]})
    assert response.status_code == 400 and "weather" in response.json()["error"]["message"]


def test_usage_is_told_at_the_end_of_a_stream(speaker, post):
    with answering(speaker, "x"):
        response = post(stream=True, stream_options={"include_usage": True})
        whole = post().json()["usage"]
    *chunks, last, _ = [data for _, data in events_of(response.text)]
    assert last["choices"] == [] and last["usage"] == whole
    assert all(chunk["usage"] is None for chunk in chunks)


def test_an_error_within_a_stream_is_an_event(speaker, post):
    from tunesmith.serving.rejections import EngineDied

    class Dies:
        def __init__(self, tokens):
            self._tokens = tokens

        def __aiter__(self):
            return self

        async def __anext__(self):
            if self._tokens.read == 3:
                raise EngineDied("the engine has died while it answered")
            return await anext(self._tokens)

        def cancel(self):
            pass

    with answering(speaker, "one two three four"):
        scripted = type(speaker.service).ask
        type(speaker.service).ask = lambda self, served, request: Dies(scripted(self, served, request))
        response = post(stream=True)
    assert response.status_code == 200
    _, last = events_of(response.text)[-1]
    assert last["error"]["code"] == "engine_died" and last["error"].keys() == ERROR


def test_museum_sglang_jax_1521_the_chat_endpoint_asks_the_adapter(server):
    """The adapter was read from the body of /v1/completions only: chats were answered by the base."""
    body = {"messages": HI, "max_tokens": 8, "logprobs": True}
    with server.client() as client:
        answers = {
            name: client.post(PATH, json={**body, "model": name}).json()["choices"][0]["logprobs"]["content"]
            for name in ("base", "writer", "caller")
        }
    assert len({str(tokens) for tokens in answers.values()}) == 3
