"""``/v1/embeddings``: mean hidden states, by the adapter that is asked."""

from __future__ import annotations

import base64
from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest
from serving.test_worker import wait_until

from tunesmith.adapters import attached
from tunesmith.auditing import embeddings
from tunesmith.engine.requests import Request
from tunesmith.model import loading, vocabulary
from tunesmith.model.loading import ModelSpec
from tunesmith.runs import checkpoints
from tunesmith.runs.directory import Run
from tunesmith.serving.limits import ServerLimits

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


def test_an_input_that_would_never_fit_in_memory_is_refused(server, post, monkeypatch):
    worker, net = server.service.worker, server.service.models.loaded.net
    each = server.call(on_thread(worker, lambda: embeddings.position_bytes(net)))
    monkeypatch.setattr(worker, "memory", worker.weights + worker.reserved + 100 * each)
    refused = post(input=[[5] * 101, [5]])
    assert refused.status_code == 400 and refused.json()["error"]["code"] == "request_too_large"
    assert "for its hidden states" in refused.json()["error"]["message"]
    assert len(vectors(post(input=[[5] * 50, [5]]))) == 2


async def on_thread(worker, function):
    return await worker.run(function)


def test_a_full_queue_refuses_inputs_too(start_server, settings):
    server = start_server(replace(settings, batch_size=1, limits=ServerLimits(queue=2)))
    service = server.service

    async def fill():
        base, request = service.served("base"), Request([5, 6], max_tokens=3000)
        taken = [service.ask(base, request)]
        await anext(taken[0])
        return [*taken, *(service.ask(base, request) for _ in range(2))]

    taken = server.call(fill())
    with server.client() as client:
        refused = client.post(PATH, json={"input": "the cat"})
        for answering in taken:
            answering.cancel()
        wait_until(lambda: not service.worker.busy)
        assert client.post(PATH, json={"input": "the cat"}).status_code == 200
    assert refused.status_code == 429 and int(refused.headers["retry-after"]) >= 1


def test_the_memory_that_was_admitted_is_waited_for(server, post, monkeypatch):
    worker, admitted, waited = server.service.worker, [], []
    admit, run = worker.admit, worker.run
    monkeypatch.setattr(worker, "admit", lambda cost: (admitted.append(cost), admit(cost)))
    monkeypatch.setattr(worker, "run", lambda job, cost=0: (waited.append(cost), run(job, cost))[1])
    vectors(post(model="base", input=TEXTS))
    assert admitted == [max(waited)] and admitted[0] > 0


def test_what_an_input_needs_is_not_underestimated(server):
    net = server.service.models.loaded.net

    def measured(rows: list[list[int]]) -> tuple[int, int]:
        mx.clear_cache()
        mx.reset_peak_memory()
        before = mx.get_active_memory()
        embeddings.means(net, rows)
        return mx.get_peak_memory() - before, embeddings.position_bytes(net) * len(rows) * len(rows[0])

    for rows in ([[5] * 512], [[5] * 128] * 16):
        needed, promised = server.call(on_thread(server.service.worker, lambda rows=rows: measured(rows)))
        assert needed <= promised < 4 * needed, (needed, promised)


def test_the_dimensions_of_the_model_may_be_named(post):
    assert vectors(post(input="x", dimensions=64)).shape == (1, 64)
