"""From a question to the pieces of its answer: what is served is what was evaluated, and who answers."""

from __future__ import annotations

import threading
from dataclasses import replace
from itertools import product
from pathlib import Path

import pytest
from serving.scripted import CALL, WEATHER, Tokens, answering, events_of
from serving.test_app import logged
from serving.test_worker import wait_until

import tiny
import tunesmith
from tunesmith.data import formats
from tunesmith.data.formats import DataSpec
from tunesmith.errors import TemplateError
from tunesmith.evaluation.subject import Subject
from tunesmith.runs import records
from tunesmith.serving import answering as answering_module
from tunesmith.serving.ab import Routes, parse_route
from tunesmith.serving.guardrails import Guard
from tunesmith.serving.guardrails.kinds.block_list import BlockList
from tunesmith.serving.keys import Doorkeeper, Key, digest_of
from tunesmith.serving.lexicon import Lexicons
from tunesmith.serving.pieces import AnswerEnded, CallArguments, CallBegun, Logprobs, Reasoned, Words
from tunesmith.serving.rejections import TimedOut

PATH = "/v1/chat/completions"
HI = [{"role": "user", "content": "hi"}]


def turns_of(example) -> list[dict]:
    """The conversation up to its last answer, as a client sends it."""
    messages = example.conversation.messages[:-1]
    return [{"role": message.role, "content": message.content} for message in messages]


@pytest.fixture(scope="module")
def rows(tmp_path_factory) -> Path:
    """Held-out rows, some of which want a call."""
    made = tiny.conversations(6, seed=5)
    call = {"role": "assistant", "content": "tool_call: f\narguments: {}"}
    asked = [{"conversations": [{"role": "user", "content": f"call {index}"}, call]} for index in range(3)]
    return tiny.write_rows(tmp_path_factory.mktemp("rows") / "rows.jsonl", made + asked)


@pytest.mark.parametrize("name", ["writer", "caller"])
def test_a_served_answer_is_the_evaluated_one(server, served_runs, rows, name):
    """Token for token: the answers that an evaluation has kept, and those of the server."""
    run = served_runs[name]
    tunesmith.evaluate(run, data=[str(rows)], tasks=["tool_calls"])
    (record,) = [record for record in records.read(run)[0] if record.task == "tool_calls"]
    examples = list(record.examples())
    read = formats.read([rows], DataSpec(train=(str(rows),))).examples
    by_line = {row.source.rpartition(":")[2]: row for row in read}
    assert len(examples) == 9
    with server.client() as client:
        for example, stream in product(examples, (False, True)):
            turns = turns_of(by_line[example.source.rpartition(":")[2]])
            for model, kept in ((name, example.tuned_answer), ("base", example.base_answer)):
                body = {"model": model, "messages": turns, "max_tokens": 256, "stream": stream}
                assert served_words(client.post(PATH, json=body), stream) == kept


def served_words(response, stream: bool) -> str:
    if not stream:
        return response.json()["choices"][0]["message"]["content"]
    chunks = [data for _, data in events_of(response.text)][:-1]
    deltas = [choice["delta"] for chunk in chunks for choice in chunk["choices"]]
    return "".join(delta.get("content", "") for delta in deltas)


def test_prompt_ids_are_those_of_evaluation(server, served_runs):
    renderer = server.service.models.resolve("writer").renderer
    subject = Subject(server.service.models.loaded.net, renderer, "base")
    valid = served_runs["writer"] / "data" / "valid.jsonl"
    with server.client() as client, answering(server, "x") as script:
        for row in formats.rows([valid], DataSpec(train=(str(valid),))):
            prompt = replace(row.conversation, messages=row.conversation.messages[:-1])
            assert client.post(PATH, json={"model": "writer", "messages": turns_of(row)}).status_code == 200
            assert list(script.requests[-1].ids) == subject.ids(prompt)


def test_requests_name_the_adapter_and_its_digest(server):
    served = server.service.models.resolve("writer")
    with server.client() as client:
        answered = client.post(PATH, json={"model": "writer", "messages": HI, "max_tokens": 1})
    assert answered.json()["system_fingerprint"] == f"fp_{served.digest[:12]}"
    line = logged(server, answered)
    assert (line["model"], line["adapter"]) == ("writer", served.adapter)


@pytest.fixture(scope="module")
def cautious(start_server, settings):
    """A server whose base answers if the adapter that was asked cannot."""
    return start_server(replace(settings, fallback=("base",)))


class Late(Tokens):
    """Takes too long."""

    async def __anext__(self):
        raise TimedOut("the first token took longer than 1 s")


@pytest.fixture
def late_writer(cautious):
    """The adapter takes too long; the base answers."""
    with answering(cautious, "From the base.") as script:
        scripted = type(cautious.service).ask

        def ask(self, served, request):
            tokens = scripted(self, served, request)
            return Late([]) if served.name == "writer" else tokens

        type(cautious.service).ask = ask
        yield script


@pytest.mark.parametrize("stream", [False, True])
def test_a_fallback_answers_in_time_and_is_named(cautious, late_writer, stream):
    with cautious.client() as client:
        response = client.post(PATH, json={"model": "writer", "messages": HI, "stream": stream})
    assert response.status_code == 200
    assert response.headers["x-tunesmith-fallback"] == "tiny-llama; timeout"
    body = events_of(response.text)[0][1] if stream else response.json()
    assert body["fallback"] == [{"index": 0, "model": "tiny-llama", "reason": "timeout"}]
    assert "From the base." in response.text or stream
    line = logged(cautious, response)
    assert line["fallback"] == "tiny-llama: timeout"
    assert (line["model"], line["status"], "error" in line) == ("writer", 200, False)
    ids = late_writer.requests[-1].ids
    assert line["prompt_tokens"] == len(ids)


def test_a_prompt_is_logged_once_however_many_answers_it_gets(server):
    with answering(server, "one") as script, server.client() as client:
        answered = client.post(PATH, json={"model": "writer", "messages": HI, "n": 3})
    assert len(script.requests) == 3
    assert logged(server, answered)["prompt_tokens"] == answered.json()["usage"]["prompt_tokens"]


@pytest.fixture
def refusing_caller(cautious, monkeypatch):
    """No prompt can be expressed for the adapter caller. The list gets those that were tried."""
    read, refused = answering_module.prompt_ids, []

    def prompt_ids(renderer, prompt, served):
        if served.name == "caller":
            refused.append(prompt)
            raise TemplateError("the template of caller has no place for it")
        return read(renderer, prompt, served)

    monkeypatch.setattr(answering_module, "prompt_ids", prompt_ids)
    return refused


def test_a_fallback_that_cannot_take_the_prompt_is_passed_over(
    cautious, late_writer, refusing_caller, monkeypatch
):
    monkeypatch.setattr(cautious.service, "fallback", ("caller", "base"))
    with cautious.client() as client:
        response = client.post(PATH, json={"model": "writer", "messages": HI})
    assert response.status_code == 200, response.text
    assert response.headers["x-tunesmith-fallback"] == "tiny-llama; refused"
    assert len(refusing_caller) == 1


def test_if_the_last_fallback_cannot_take_the_prompt_the_error_is_that_of_the_model_asked(
    cautious, late_writer, refusing_caller, monkeypatch
):
    monkeypatch.setattr(cautious.service, "fallback", ("caller",))
    with cautious.client() as client:
        response = client.post(PATH, json={"model": "writer", "messages": HI})
    assert response.status_code == 504 and "first token" in response.json()["error"]["message"]
    assert logged(cautious, response)["error"] == "timeout"


@pytest.mark.parametrize("stream", [False, True])
def test_if_the_last_fallback_cannot_take_the_prompt_a_blocked_answer_is_that_of_the_model_asked(
    cautious, refusing_caller, monkeypatch, stream
):
    monkeypatch.setattr(cautious.service, "guard", Guard([BlockList(output="block", words=["secret"])]))
    body = {"model": "writer", "messages": HI, "stream": stream}
    told = "Here it comes, " + "word by word, " * 12 + "the secret plan."
    responses = []
    with answering(cautious, told), cautious.client() as client:
        for fallback in ((), ("caller",)):
            monkeypatch.setattr(cautious.service, "fallback", fallback)
            responses.append(client.post(PATH, json=body))
    assert len(refusing_caller) == (0 if stream else 1), "a stream that has begun has no fallback"
    without, refused = responses
    assert without.status_code == refused.status_code == 200, refused.text
    assert served_words(refused, stream) == served_words(without, stream) == told.partition("secret")[0]
    assert "content_filter" in refused.text and "x-tunesmith-fallback" not in refused.headers
    line = logged(cautious, refused)
    assert (line["model"], line["ended"], "fallback" in line) == ("writer", "content_filter", False)


def test_a_stream_that_is_blocked_at_once_is_that_of_the_model_asked(cautious, refusing_caller, monkeypatch):
    monkeypatch.setattr(cautious.service, "guard", Guard([BlockList(output="block", words=["secret"])]))
    monkeypatch.setattr(cautious.service, "fallback", ("caller",))
    with answering(cautious, "secret"), cautious.client() as client:
        response = client.post(PATH, json={"model": "writer", "messages": HI, "stream": True})
    assert len(refusing_caller) == 1
    assert "content_filter" in response.text and "error" not in response.text
    assert "x-tunesmith-fallback" not in response.headers and '"fallback"' not in response.text


@pytest.mark.parametrize(
    ("allowed", "answered_by"), [((), "tiny-llama"), (("writer", "caller"), "caller"), (("writer",), None)]
)
def test_a_fallback_that_the_key_may_not_ask_is_passed_over(
    cautious, late_writer, monkeypatch, allowed, answered_by
):
    keys = [Key("mine", digest_of("my own secret key"), models=allowed)]
    monkeypatch.setattr(cautious.service, "doorkeeper", Doorkeeper(keys))
    monkeypatch.setattr(cautious.service, "fallback", ("base", "caller"))
    with cautious.client(headers={"x-api-key": "my own secret key"}) as client:
        response = client.post(PATH, json={"model": "writer", "messages": HI})
    if answered_by is None:
        assert response.status_code == 504 and response.json()["error"]["code"] == "timeout"
    else:
        assert response.headers["x-tunesmith-fallback"] == f"{answered_by}; timeout"


def test_a_question_is_prepared_once_for_a_fallback(cautious, late_writer, monkeypatch):
    read, names = answering_module.prompt_ids, []

    def prompt_ids(renderer, prompt, served):
        names.append(served.name)
        return read(renderer, prompt, served)

    monkeypatch.setattr(answering_module, "prompt_ids", prompt_ids)
    long = [{"role": "user", "content": "x" * (answering_module.SHORT + 1)}]
    with cautious.client() as client:
        for turns in (HI, long):
            response = client.post(PATH, json={"model": "writer", "messages": turns, "n": 3})
            assert [choice["index"] for choice in response.json()["choices"]] == [0, 1, 2]
    assert names == ["writer", "tiny-llama"] * 2


def test_an_answer_of_a_fallback_is_none_of_the_ab_test(cautious, late_writer):
    service = cautious.service
    before, service.ab = service.ab, Routes([parse_route("test=writer:0.5,caller:0.5")])
    try:
        with cautious.client() as client:
            sides = [client.post(PATH, json={"model": f"test/{side}", "messages": HI}) for side in (1, 2)]
    finally:
        service.ab = before
    answers = {answer.model: answer for side in sides if (answer := service.answers.get(side.json()["id"]))}
    assert (answers["caller"].test, answers["tiny-llama"].test) == ("test", None)


def test_a_fallback_is_named_in_the_header_whatever_its_letters(cautious, late_writer, monkeypatch):
    models = cautious.service.models
    monkeypatch.setattr(models, "base", replace(models.base, name="模型; 1"))
    with cautious.client() as client:
        response = client.post(PATH, json={"model": "writer", "messages": HI})
    assert response.status_code == 200
    assert response.headers["x-tunesmith-fallback"] == "%E6%A8%A1%E5%9E%8B%3B 1; timeout"
    assert response.json()["fallback"][0]["model"] == "模型; 1"


def test_without_a_fallback_the_error_is_told(server):
    with answering(server, "x") as script, server.client() as client:
        type(server.service).ask = lambda self, served, request: Late([])
        response = client.post(PATH, json={"model": "writer", "messages": HI})
    assert response.status_code == 504 and not script.requests


def test_a_fallback_answers_if_the_form_was_not_reached(cautious):
    """An answer that must be JSON, cut by its limit, is not JSON."""
    wanted = {"response_format": {"type": "json_object"}, "max_tokens": 4}
    with answering(cautious, '{"a": 1', finish="length") as script, cautious.client() as client:
        response = client.post(PATH, json={"model": "writer", "messages": HI, **wanted})
    assert response.headers["x-tunesmith-fallback"] == "tiny-llama; invalid"
    assert len(script.requests) == 2 and response.json()["choices"][0]["finish_reason"] == "length"


def test_answers_can_be_voted_on(server):
    body = {"model": "writer", "messages": HI, "n": 2, "user": "u"}
    with answering(server, "one", "two"), server.client() as client:
        made = client.post(PATH, json=body).json()
    kept = [server.service.answers.get(f"{made['id']}/{index}") for index in range(2)]
    assert {answer.message.content for answer in kept} == {"one", "two"}
    assert all(answer.model == "writer" and answer.user == "u" for answer in kept)
    assert kept[0].conversation.messages[0].content == "hi"


def test_a_guard_without_guardrails_changes_nothing():
    pieces = [
        Reasoned("Hm."),
        Logprobs(()),
        Words("Let"),
        Words(" me."),
        CallBegun(0, "a", "f"),
        CallArguments(0, "{}"),
        CallBegun(1, "b", "f"),
        CallArguments(1, "{}"),
        Words("Done."),
        AnswerEnded("tool_calls"),
    ]
    screen = Guard().screen_answer()
    delivered = [shown for piece in pieces for shown in screen.feed(piece)]
    kinds = (Reasoned, Words, CallBegun, CallArguments, AnswerEnded)
    assert [shown for shown in delivered if isinstance(shown, kinds)] == [
        piece for piece in pieces if isinstance(piece, kinds)
    ]


def test_a_cancelled_client_frees_the_row(server):
    """A client that goes in the middle of a stream: the row is free again."""
    worker = server.service.worker
    with (
        server.client() as client,
        client.stream("POST", PATH, json={"messages": HI, "max_tokens": 4000, "stream": True}) as response,
    ):
        next(response.iter_lines())
    wait_until(lambda: worker.n_rows == 0)


def test_tools_of_a_text_run_are_refused(speaker):
    """A run that was trained on plain text has no place for turns and tools."""
    base = speaker.service.models.base
    speaker.service.models.base = replace(base, asked_as="text")
    try:
        with speaker.client() as client, answering(speaker, CALL) as script:
            plain = client.post(PATH, json={"messages": HI})
            refused = client.post(PATH, json={"messages": HI, "tools": [WEATHER]})
    finally:
        speaker.service.models.base = base
    assert plain.status_code == 200 and list(script.requests[0].ids) == base.renderer.text_prompt("hi")
    assert refused.status_code == 400 and "plain text" in refused.json()["error"]["message"]


def test_an_answer_of_an_ab_test_does_not_tell_who_gave_it(server):
    service = server.service
    before, service.ab = service.ab, Routes([parse_route("test=writer:0.5,caller:0.5")])
    try:
        with server.client() as client:
            body = {"messages": HI, "max_tokens": 2}
            answers = [client.post(PATH, json={**body, "model": f"test/{side}"}) for side in (1, 2)]
    finally:
        service.ab = before
    shown = [answer.json() for answer in answers]
    assert [made["model"] for made in shown] == ["test/1", "test/2"]
    assert all(made["system_fingerprint"] is None for made in shown)
    assert {service.answers.get(made["id"]).model for made in shown} == {"writer", "caller"}
    assert not any(word in answer.text for answer in answers for word in ("writer", "caller"))


def test_a_long_prompt_is_refused_unread(server, monkeypatch):
    """Encoding it took seconds, in which every stream stood still."""
    monkeypatch.setattr(answering_module, "prompt_ids", lambda *_: pytest.fail("it was read"))
    most = answering_module._most_tokens(server.service)
    long = [{"role": "user", "content": "x" * (most * answering_module.CHARACTERS_PER_TOKEN + 1)}]
    with server.client() as client:
        response = client.post(PATH, json={"model": "writer", "messages": long})
        embedded = client.post("/v1/embeddings", json={"model": "writer", "input": long[0]["content"]})
    for refused in (response, embedded):
        assert refused.status_code == 400
        assert refused.json()["error"]["code"] == "context_length_exceeded"


def test_the_server_goes_on_while_a_prompt_is_read(server, monkeypatch):
    read, threads = answering_module.prompt_ids, []

    def noted(*arguments):
        threads.append(threading.current_thread())
        return read(*arguments)

    monkeypatch.setattr(answering_module, "prompt_ids", noted)
    with server.client() as client, answering(server, "x"):
        for size in (10, answering_module.SHORT + 1):
            turns = [{"role": "user", "content": "x" * size}]
            client.post(PATH, json={"model": "writer", "messages": turns})
    assert [thread is server._thread for thread in threads] == [True, False]


@pytest.mark.parametrize("wanted", [{}, {"response_format": {"type": "json_object"}}])
def test_the_server_goes_on_while_the_bytes_of_tokens_are_computed(server, monkeypatch, wanted):
    """They are computed once, for the tokens that are shown and for grammars."""
    kind, threads = type(server.service.models.resolve("writer").renderer), []
    computed = kind.token_bytes

    def noted(renderer):
        threads.append(threading.current_thread())
        return computed(renderer)

    monkeypatch.setattr(kind, "token_bytes", noted)
    monkeypatch.setattr(server.service, "lexicons", Lexicons())
    body = {"model": "writer", "messages": HI, "logprobs": True, **wanted}
    with server.client() as client, answering(server, "{}"):
        assert client.post(PATH, json=body).status_code == 200
    assert [thread is server._thread for thread in threads] == [False]


@pytest.mark.parametrize("count", [300, 1001])
def test_a_schema_of_too_many_properties_is_refused(speaker, count):
    """The time to compile it grows with the square."""
    schema = {"type": "object", "properties": {f"p{number}": {"type": "null"} for number in range(count)}}
    form = {"type": "json_schema", "json_schema": {"name": "s", "schema": schema, "strict": True}}
    tool = {"type": "function", "function": {"name": "f", "parameters": schema}}
    with speaker.client() as client, answering(speaker, "{}"):
        asked = [
            client.post(PATH, json={"messages": HI, "response_format": form}),
            client.post(PATH, json={"messages": HI, "tools": [tool], "tool_choice": "required"}),
        ]
    for response in asked:
        refused = response.status_code == 400 and "1,000 are possible" in response.text
        assert refused == (count > 1000), response.text
