"""``/v1/embeddings``: mean hidden states, by the adapter that is asked."""

from __future__ import annotations

import base64

import numpy as np
import pytest

from tunesmith.adapters import attached
from tunesmith.auditing import embeddings
from tunesmith.model import loading, vocabulary
from tunesmith.model.loading import ModelSpec
from tunesmith.runs import checkpoints
from tunesmith.runs.directory import Run

PATH = "/v1/embeddings"
TEXTS = ["the cat", "my note about tools, files and music", "a"]


@pytest.fixture
def post(server):
    with server.client() as client:
        yield lambda **body: client.post(PATH, json=body)


def vectors(response) -> np.ndarray:
    assert response.status_code == 200, response.text
    data = response.json()["data"]
    assert [entry["index"] for entry in data] == list(range(len(data)))
    return np.array([entry["embedding"] for entry in data])


def test_they_are_mean_hidden_states_of_base_and_adapter(server, post, tiny_model, served_runs):
    net = loading.load(ModelSpec(path=str(tiny_model))).net
    renderer = server.service.models.base.renderer
    rows = [renderer.text_prompt(text) for text in TEXTS]

    def expected() -> np.ndarray:
        means = np.concatenate([embeddings.means(net, [row]) for row in rows])
        return means / np.linalg.norm(means, axis=1, keepdims=True)

    np.testing.assert_allclose(vectors(post(model="base", input=TEXTS)), expected(), atol=1e-5)
    with attached(net, checkpoints.choose(Run.open(served_runs["writer"]))):
        own = expected()
    made = vectors(post(model="writer", input=TEXTS))
    np.testing.assert_allclose(made, own, atol=1e-5)
    np.testing.assert_allclose(np.linalg.norm(made, axis=1), 1, atol=1e-5)
    assert np.abs(made - vectors(post(model="base", input=TEXTS))).max() > 1e-3


def test_base64_holds_the_same_numbers(post):
    plain = vectors(post(input="the cat"))[0]
    packed = post(input="the cat", encoding_format="base64").json()["data"][0]["embedding"]
    np.testing.assert_allclose(np.frombuffer(base64.b64decode(packed), "<f4"), plain, rtol=1e-6)


def test_ids_are_taken_as_they_are(server, post):
    ids = server.service.models.base.renderer.text_prompt("the cat")
    np.testing.assert_array_equal(vectors(post(input=ids)), vectors(post(input=["the cat"])))
    assert len(vectors(post(input=[ids, [5]]))) == 2
    assert post(input=[ids, [5]]).json()["usage"] == {
        "prompt_tokens": len(ids) + 1,
        "total_tokens": len(ids) + 1,
    }


@pytest.mark.parametrize(
    "body",
    [{"input": []}, {"input": [10**6]}, {"input": "x", "dimensions": 3}, {"input": "x", "extra": 1}, {}],
)
def test_what_cannot_be_done_is_refused(post, body):
    assert post(**body).status_code == 400


def test_an_input_that_cannot_be_taken_is_named_by_its_place(server, post, monkeypatch):
    error = post(input=[[5] * 9, [10**6], [5, 6]]).json()["error"]
    assert error["message"].startswith("input[1]: "), "whatever the lengths of the others"
    assert post(input=[[5], []]).json()["error"]["param"] == "input[1]"
    limits = vocabulary.limits(server.service.models.loaded.net)
    monkeypatch.setattr(vocabulary, "limits", lambda net: limits._replace(positions=8))
    error = post(input=[[5] * 8, [5] * 9]).json()["error"]
    assert (error["param"], error["code"]) == ("input[1]", "context_length_exceeded"), "learned positions"


def test_the_dimensions_of_the_model_may_be_named(post):
    assert vectors(post(input="x", dimensions=64)).shape == (1, 64)
