"""``/v1/completions``: plain text to be continued."""

from __future__ import annotations

import pytest
from serving.scripted import answering, events_of

PATH = "/v1/completions"


@pytest.fixture
def post(speaker):
    with speaker.client() as client:
        yield lambda **body: client.post(PATH, json=body)


def test_each_prompt_has_n_continuations(speaker, post):
    with answering(speaker, "one", "two", "three", "four") as script:
        made = post(prompt=["the cat", "my note"], n=2, max_tokens=9, seed=4).json()
    assert [(choice["index"], choice["finish_reason"]) for choice in made["choices"]] == [
        (place, "stop") for place in range(4)
    ]
    assert {choice["text"] for choice in made["choices"]} == {"one", "two", "three", "four"}
    assert [request.stream for request in script.requests] == [0, 1, 0, 1]
    renderer = speaker.service.models.base.renderer
    ids = [renderer.text_prompt(text) for text in ("the cat", "the cat", "my note", "my note")]
    assert [request.ids for request in script.requests] == ids
    assert made["usage"]["prompt_tokens"] == len(ids[0]) + len(ids[2])


def test_ids_are_asked_as_they_are(speaker, post):
    with answering(speaker, "x") as script:
        assert post(prompt=[5, 6, 7]).status_code == 200
        assert len(post(prompt=[[5, 6], [7]]).json()["choices"]) == 2
    assert [list(request.ids) for request in script.requests] == [[5, 6, 7], [5, 6], [7]]


@pytest.mark.parametrize("text", ["a mat. ☺", "<think>\nx\n</think>\n\ny", "one STOP two"])
def test_a_stream_is_the_whole_text(speaker, post, text):
    body = {"prompt": "the cat", "logprobs": 1, "stop": "STOP"}
    with answering(speaker, text):
        whole = post(**body).json()["choices"][0]
        events = [data for _, data in events_of(post(**body, stream=True).text)]
    assert events.pop() == "[DONE]"
    choices = [choice for event in events for choice in event["choices"]]
    assert "".join(choice["text"] for choice in choices) == whole["text"] == text.split("STOP")[0]
    assert choices[-1]["finish_reason"] == whole["finish_reason"] == "stop"
    tokens = [token for choice in choices for token in choice["logprobs"]["tokens"]]
    assert tokens == whole["logprobs"]["tokens"]
    offsets = [offset for choice in choices for offset in choice["logprobs"]["text_offset"]]
    assert offsets == whole["logprobs"]["text_offset"]


def test_log_probabilities_are_lists(speaker, post):
    with answering(speaker, "the cat"):
        logprobs = post(prompt="x", logprobs=1).json()["choices"][0]["logprobs"]
    assert "".join(logprobs["tokens"]) == "the cat"
    assert set(logprobs["token_logprobs"]) == {-0.5}
    assert logprobs["top_logprobs"][0] == {logprobs["tokens"][0]: -0.5}
    assert logprobs["text_offset"][:2] == [0, len(logprobs["tokens"][0])]


@pytest.mark.parametrize("body", [{"prompt": [10**6]}, {"prompt": "x", "logit_bias": {"1000000": 1}}])
def test_an_unknown_id_is_told_without_advice_for_whoever_serves(post, body):
    message = post(**body).json()["error"]["message"]
    assert "1000000" in message and "model.resize_embeddings" not in message


@pytest.mark.parametrize("stream", [False, True])
def test_echo_puts_the_prompt_first(speaker, post, stream):
    with answering(speaker, " sat"):
        response = post(prompt="the cat", echo=True, stream=stream)
    chunks = [data for _, data in events_of(response.text)][:-1] if stream else [response.json()]
    assert "".join(choice["text"] for chunk in chunks for choice in chunk["choices"]) == "the cat sat"


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"prompt": ""}, None),
        ({"prompt": []}, None),
        ({"prompt": "x", "suffix": "y"}, "suffix"),
        ({"prompt": "x", "best_of": 3}, None),
        ({"prompt": "x", "echo": True, "logprobs": 1}, None),
        ({"prompt": ["x"] * 99}, "n"),
        ({"prompt": "x", "messages": []}, "messages"),
        ({"prompt": [10**6]}, None),
        ({"prompt": "x <|im_end|>"}, "messages"),
    ],
)
def test_what_cannot_be_done_is_refused(post, body, param):
    response = post(**body)
    assert response.status_code == 400 and response.json()["error"]["param"] == param
