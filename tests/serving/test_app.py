"""The HTTP side: what every request meets, whatever it asks."""

from __future__ import annotations

import asyncio
import gc
import json
import shutil
import socket
from dataclasses import replace

import pytest
from serving.test_worker import answer, wait_until

from tunesmith.serving import starting
from tunesmith.serving.ab import Routes, parse_route
from tunesmith.serving.keys import Key, digest_of
from tunesmith.serving.limits import ServerLimits
from tunesmith.serving.rejections import UnknownModel

OPENAI = {"message", "type", "param", "code"}


def logged(server, response) -> dict:
    """The line of the access log about ``response``. It is written after the answer."""
    request_id = response.headers["x-request-id"]
    wait_until(lambda: request_id in server.log.getvalue())
    lines = [json.loads(line) for line in server.log.getvalue().splitlines()]
    return next(line for line in lines if line["id"] == request_id)


def test_an_unknown_path_is_refused_in_openai_s_shape(server):
    with server.client() as client:
        missing, wrong = client.get("/v1/nothing"), client.post("/v1/models", json={})
    assert (missing.status_code, wrong.status_code) == (404, 405)
    assert missing.json()["error"].keys() == wrong.json()["error"].keys() == OPENAI


def test_models_are_listed_by_every_name(server):
    with server.client() as client:
        listed = client.get("/v1/models").json()["data"]
        assert client.get("/v1/models/writer").json()["id"] == "writer"
        assert client.get("/v1/models/nobody").status_code == 404
    names = {entry["id"]: entry for entry in listed}
    assert names.keys() == {"writer", "caller", "tiny-llama", "base"}
    assert len({entry["digest"] for entry in listed}) == 3


def test_a_model_is_found_by_its_run_directory(server, served_runs):
    with server.client() as client:
        assert client.get(f"/v1/models/{served_runs['writer']}").json()["id"] == "writer"
        assert client.get("/v1/models/base").json()["id"] == "base"
        assert client.get("/v1/models/None").status_code == 404, "the base has no run directory"


def test_a_body_that_is_too_large_is_refused(start_server, settings):
    server = start_server(replace(settings, limits=ServerLimits(body_mb=0.001)))
    with server.client() as client:
        assert client.post("/v1/models", content=b"x" * 2000).status_code == 413

        def chunks():
            for _ in range(20):
                yield b"x" * 100

        assert client.post("/v1/models", content=chunks()).status_code == 413


def test_a_body_that_never_arrives_is_refused(start_server, settings):
    server = start_server(replace(settings, limits=ServerLimits(body_s=0.3)))
    host, port = server.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=10) as connection:
        connection.sendall(b"POST /v1/x HTTP/1.1\r\nHost: localhost\r\nContent-Length: 50\r\n\r\nhalf")
        assert connection.recv(100).startswith(b"HTTP/1.1 408")


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"Host": "evil.example"}, 403),
        ({"Host": "localhost:80"}, 200),
        ({"Origin": "https://evil.example"}, 403),
        ({"Origin": "null"}, 403),
    ],
)
def test_pages_of_other_sites_cannot_ask(server, headers, status):
    with server.client() as client:
        assert client.get("/v1/models", headers=headers).status_code == status


@pytest.fixture(scope="module")
def guarded(start_server, settings):
    """A server with keys."""
    keys = (
        Key("editor", digest_of("secret-of-the-editor"), models=("writer",)),
        Key("slow", digest_of("secret-of-the-slow"), per_minute=2),
        Key("boss", digest_of("secret-of-the-boss"), admin=True),
    )
    return start_server(replace(settings, keys=keys))


def shown(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer secret-of-the-{key}"}


def test_names_of_keys_that_nothing_has_are_told(server):
    keys = [Key("a", "", models=("writer", "wirter", "duel")), Key("b", "", models=("base",)), Key("c", "")]
    notices = []
    tests = Routes([parse_route("duel=writer,caller")])
    starting._tell_unknown(keys, server.service.models, tests, notices.append)
    [notice] = notices
    assert "the key a may ask wirter," in notice.what


def test_a_share_without_its_decimal_point_is_explained(server):
    with pytest.raises(UnknownModel, match="a share has a decimal point, for example --ab"):
        starting._ab_tests([parse_route("duel=writer:50,caller:50")], server.service.models)


def test_only_keys_are_let_in(guarded):
    with guarded.client() as client:
        assert client.get("/health").status_code == 200
        for headers in ({}, shown("nobody"), {"Authorization": "Basic secret-of-the-boss"}):
            refused = client.get("/v1/models", headers=headers)
            assert refused.status_code == 401 and refused.json()["error"]["code"] == "invalid_api_key"
        assert client.get("/metrics").status_code == 401
        listed = client.get("/v1/models", headers={"x-api-key": "secret-of-the-boss"})
    assert listed.status_code == 200 and logged(guarded, listed)["key"] == "boss"
    assert "secret" not in guarded.log.getvalue()


def test_a_key_sees_its_models_only(guarded):
    with guarded.client(headers=shown("editor")) as client:
        assert [entry["id"] for entry in client.get("/v1/models").json()["data"]] == ["writer"]
        refused = client.get("/v1/models/caller")
    assert refused.status_code == 403 and refused.json()["error"]["code"] == "model_not_allowed"


def test_a_key_has_its_pace(guarded):
    with guarded.client(headers=shown("slow")) as client:
        answers = [client.get("/v1/models") for _ in range(3)]
    assert [answer.status_code for answer in answers] == [200, 200, 429]
    assert 1 <= int(answers[-1].headers["retry-after"]) <= 60


def test_only_an_admin_changes_what_is_served(guarded, server):
    with server.client() as client:
        assert client.post("/admin/adapters", json={"drop": "writer"}).status_code == 403
    with guarded.client(headers=shown("editor")) as client:
        assert client.post("/admin/adapters", json={"drop": "writer"}).status_code == 403


def test_adapters_come_and_go_while_answers_are_under_way(guarded, served_runs, tmp_path):
    service = guarded.service
    before = guarded.call(answer(service, "caller", [5, 6, 7], max_tokens=200))
    copy = tmp_path / "second"
    shutil.copytree(served_runs["writer"], copy)
    with guarded.client(headers=shown("boss")) as client:

        async def swap():
            under_way = asyncio.create_task(answer(service, "caller", [5, 6, 7], max_tokens=200))
            await asyncio.sleep(0.02)
            changes = []
            for body in ({"load": str(copy)}, {"load": f"caller={copy}"}, {"drop": "second"}):
                changes.append(await asyncio.to_thread(client.post, "/admin/adapters", json=body))
            after = await answer(service, "caller", [5, 6, 7], max_tokens=20)
            return await under_way, changes, after

        during, changes, after = guarded.call(swap())
        assert [change.status_code for change in changes] == [200] * 3, [change.text for change in changes]
        assert during == before
        assert after == guarded.call(answer(service, "writer", [5, 6, 7], max_tokens=20))
        names = {entry["name"] for entry in client.get("/admin/adapters").json()["data"]}
        assert names == {"writer", "caller"}
        wait_until(lambda: len(service.models.contents) == 1)
        back = client.post("/admin/adapters", json={"load": str(served_runs["caller"])})
        assert back.status_code == 200
    assert guarded.call(answer(service, "caller", [5, 6, 7], max_tokens=200)) == before


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({}, "load"),
        ({"load": "a", "drop": "b"}, "load"),
        ({"load": "nowhere/at/all"}, "load"),
        ({"drop": "base"}, "drop"),
        ({"drop": "writer", "checkpoint": "best"}, "checkpoint"),
        ({"unload": "writer"}, "unload"),
    ],
)
def test_a_wrong_change_is_refused_and_changes_nothing(guarded, body, param):
    with guarded.client(headers=shown("boss")) as client:
        before = client.get("/admin/adapters").json()
        refused = client.post("/admin/adapters", json=body)
        assert refused.status_code == 400 and refused.json()["error"]["param"] == param
        assert client.get("/admin/adapters").json() == before


def test_an_adapter_cannot_have_the_name_of_an_ab_test(guarded, served_runs, monkeypatch):
    monkeypatch.setattr(guarded.service, "ab", Routes([parse_route("duel=writer,caller")]))
    with guarded.client(headers=shown("boss")) as client:
        refused = client.post("/admin/adapters", json={"load": f"duel={served_runs['writer']}"})
        listed = client.get("/v1/models").json()["data"]
    assert refused.status_code == 400 and "A/B test" in refused.json()["error"]["message"]
    assert [entry["id"] for entry in listed].count("duel") == 1


def test_an_adapter_for_which_no_memory_is_left_is_refused(guarded, served_runs, monkeypatch):
    worker = guarded.service.worker
    monkeypatch.setattr(worker, "memory", worker.weights + 1000)
    with guarded.client(headers=shown("boss")) as client:
        refused = client.post("/admin/adapters", json={"load": f"more={served_runs['writer']}"})
    assert refused.status_code == 400 and "MB" in refused.json()["error"]["message"]


def test_what_is_under_way_is_finished_before_the_server_ends(start_server, settings):
    server = start_server(settings)
    service = server.service
    expected = server.call(answer(service, "base", [5, 6], max_tokens=300))

    async def ask_and_drain():
        under_way = asyncio.create_task(answer(service, "base", [5, 6], max_tokens=300))
        await asyncio.sleep(0.05)
        server.http.drain()
        await asyncio.sleep(0)
        return await under_way

    made = server.call(ask_and_drain())
    assert made == expected
    server._thread.join(20)
    assert not server._thread.is_alive() and server.error is None


def test_measures_count_what_happened(server):
    server.call(answer(server.service, "writer", [5, 6, 7], max_tokens=5))
    with server.client() as client:
        client.get("/v1/nothing")
        text = client.get("/metrics").text
    assert 'tunesmith_prompt_tokens_total{model="writer"}' in text
    assert 'tunesmith_requests_total{endpoint="other",model="none",status="404"}' in text
    assert 'tunesmith_first_token_seconds_count{model="writer"}' in text


def chat(model: str, **fields) -> dict:
    return {"model": model, "messages": [{"role": "user", "content": "the cat"}], **fields}


def raw(server, body: dict) -> socket.socket:
    """A connection on which a request has been sent."""
    host, port = server.url.removeprefix("http://").split(":")
    content = json.dumps(body).encode()
    connection = socket.create_connection((host, int(port)), timeout=20)
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(content)}\r\n\r\n"
    connection.sendall(head.encode() + content)
    return connection


NEVER_ENDS = {"max_tokens": 3500, "logit_bias": {"2": -100}}


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_goes_frees_its_row(server, stream):
    """mlx-openai-server 321: the client is gone, and the worker runs on."""
    worker, before = server.service.worker, len(server.log.getvalue())
    with raw(server, chat("base", stream=stream, **NEVER_ENDS)) as connection:
        if stream:
            connection.recv(10)
        wait_until(lambda: worker.n_rows == 1)
    wait_until(lambda: worker.n_rows == 0)
    wait_until(lambda: '"ended": "cancelled"' in server.log.getvalue()[before:])


def test_a_client_that_goes_while_it_waits_leaves_the_queue(start_server, settings):
    server = start_server(replace(settings, batch_size=1))
    worker = server.service.worker
    with raw(server, chat("base", **NEVER_ENDS)):
        wait_until(lambda: worker.n_rows == 1)
        with raw(server, chat("base", **NEVER_ENDS)):
            wait_until(lambda: worker.n_waiting == 1)
        wait_until(lambda: worker.n_waiting == 0)
        assert worker.n_rows == 1
    wait_until(lambda: worker.n_rows == 0)


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions"])
def test_a_client_that_does_not_read_is_dropped(start_server, settings, path, monkeypatch):
    """Each generator of its answer is closed: the collector may do it in another thread while it runs."""
    left: list[str] = []
    monkeypatch.setattr(
        asyncio.BaseEventLoop,
        "_asyncgen_finalizer_hook",
        lambda loop, generator: left.append(generator.__qualname__),
    )
    server = start_server(replace(settings, limits=ServerLimits(stall_s=0.3)))
    asked = chat("base", stream=True, **NEVER_ENDS)
    if path == "/v1/completions":
        asked |= {"prompt": asked.pop("messages")[-1]["content"]}
    body = json.dumps(asked).encode()
    scope = {"type": "http", "method": "POST", "path": path, "query_string": b""}
    scope |= {"headers": [(b"host", b"localhost")], "client": ("127.0.0.1", 1), "asgi": {"version": "3.0"}}

    async def exchange() -> None:
        arriving = [{"type": "http.request", "body": body, "more_body": False}]

        async def receive():
            return arriving.pop() if arriving else await asyncio.sleep(60)

        async def send(message) -> None:
            if message["type"] == "http.response.body":
                await asyncio.sleep(60)

        await server.http.config.app(scope, receive, send)

    server.call(asyncio.wait_for(exchange(), 20))
    assert json.loads(server.log.getvalue())["error"] == "stalled"
    wait_until(lambda: server.service.worker.n_rows == 0)
    assert not server.notices
    gc.collect()
    assert not left


def test_an_adapter_that_is_asked_answers(server):
    """mlx-lm 1249: `--adapter-path` is ignored. sglang-jax 1521: the chat endpoint drops the adapter."""
    with server.client() as client:
        answers = {}
        for model in ("base", "writer", "caller"):
            body = chat(model, max_tokens=5, logprobs=True)
            answered = client.post("/v1/chat/completions", json=body)
            answers[model] = answered.json()["choices"][0]["logprobs"]
            assert logged(server, answered)["model"] in (model, "tiny-llama")
    assert len({json.dumps(logprobs) for logprobs in answers.values()}) == 3


def test_an_engine_that_dies_is_told_within_the_answer(start_server, settings, monkeypatch):
    """mlx-lm 1909, 1672: the generation thread is dead, and clients wait for ever."""
    server = start_server(settings)
    worker = server.service.worker
    advance, count = worker._engine.advance, [0]

    def dying():
        count[0] += 1
        if count[0] > 5:
            raise RuntimeError("a kernel failed")
        return advance()

    monkeypatch.setattr(worker._engine, "advance", dying)
    with server.client() as client:
        streamed = client.post("/v1/chat/completions", json=chat("writer", stream=True, **NEVER_ENDS)).text
        assert '"code": "engine_died"' in streamed.splitlines()[-2] and "[DONE]" not in streamed
        wait_until(lambda: worker.healthy)
        monkeypatch.setattr(worker._engine, "advance", dying)
        whole = client.post("/v1/chat/completions", json=chat("writer", **NEVER_ENDS))
        assert whole.status_code == 503 and whole.json()["error"]["code"] == "engine_died"
        wait_until(lambda: worker.healthy)
        assert client.post("/v1/chat/completions", json=chat("writer", max_tokens=5)).status_code == 200
        assert "tunesmith_restarts_died 2.0" in client.get("/metrics").text
        assert (
            'tunesmith_errors_total{model="writer",reason="engine_died"} 2.0' in client.get("/metrics").text
        )


def test_contents_are_logged_only_if_asked(start_server, settings, server):
    logging = start_server(replace(settings, log_contents=True))
    body = chat("writer", max_tokens=5, user="me")
    with server.client() as client:
        assert "contents" not in logged(server, client.post("/v1/chat/completions", json=body))
    assert "the cat" not in server.log.getvalue()
    with logging.client() as client:
        contents = logged(logging, client.post("/v1/chat/completions", json=body))["contents"]
    assert "the cat" in contents["request"] and "choices" in contents["response"]


def test_a_key_for_an_ab_test_asks_its_models_by_that_name_only(start_server, settings):
    keys = (
        Key("rater", digest_of("secret-of-the-rater"), models=("duel",)),
        Key("boss", digest_of("secret-of-the-boss"), admin=True),
    )
    server = start_server(replace(settings, keys=keys, ab=(parse_route("duel=writer,caller"),)))
    with server.client(headers=shown("rater")) as client:
        assert [entry["id"] for entry in client.get("/v1/models").json()["data"]] == ["duel"]
        asked = client.post("/v1/chat/completions", json=chat("duel", max_tokens=3))
        assert asked.status_code == 200 and logged(server, asked)["model"] in ("writer", "caller")
        assert client.post("/v1/chat/completions", json=chat("writer", max_tokens=3)).status_code == 403
    with server.client(headers=shown("boss")) as client:
        refused = client.post("/admin/adapters", json={"drop": "caller"})
    assert refused.status_code == 400 and "A/B test duel" in refused.json()["error"]["message"]
