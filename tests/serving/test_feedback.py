"""From an A/B test over votes to rows, and guardrails, through a running server."""

from __future__ import annotations

import json
import string
from dataclasses import replace
from pathlib import Path

import pytest

import tunesmith
from tunesmith.data import formats
from tunesmith.data.formats import DataSpec, Preference
from tunesmith.errors import ConfigError, ServeError
from tunesmith.serving.ab import parse_route
from tunesmith.serving.guardrails import load_guardrails


@pytest.fixture(scope="module")
def votes_file(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("votes") / "votes.jsonl"


@pytest.fixture(scope="module")
def testing(start_server, settings, served_runs, votes_file):
    """A server with the A/B test ``both`` of its two runs, one named by its folder."""
    route = parse_route(f"both={served_runs['writer']}:0.5,caller:0.5")
    return start_server(replace(settings, ab=(route,), votes_file=votes_file))


def chat(client, model: str, text: str = "Hello", **options) -> dict:
    body = {"model": model, "messages": [{"role": "user", "content": text}], "max_tokens": 6, **options}
    response = client.post("/v1/chat/completions", json=body)
    assert response.status_code == 200, response.text
    return response.json()


def test_the_ab_test_is_listed_as_a_model(testing):
    with testing.client() as client:
        listed = {entry["id"]: entry for entry in client.get("/v1/models").json()["data"]}
        assert listed["both"]["ab"] == ["writer", "caller"]
        assert client.get("/v1/models/both").json() == listed["both"]


def test_a_user_always_gets_the_same_model_under_the_name_that_was_asked(testing):
    with testing.client() as client:
        answered = {}
        for user in ("ann", "bob", "cat", "dan", "eve", "fay"):
            answers = [chat(client, "both", f"Question {number}", user=user) for number in range(2)]
            assert {answer["model"] for answer in answers} == {"both"}
            models = {client.get(f"/v1/feedback/{answer['id']}").json()["model"] for answer in answers}
            (answered[user],) = models
        assert set(answered.values()) == {"writer", "caller"}


def test_the_sides_of_a_comparison_are_both_models_and_votes_become_rows(testing, votes_file, tmp_path):
    with testing.client() as client:
        for number in range(6):
            drawn = {"user": f"{number}", "temperature": 1.0, "seed": number}
            sides = [chat(client, f"both/{side}", f"Ask {number}", **drawn) for side in (1, 2)]
            models = [client.get(f"/v1/feedback/{side['id']}").json()["model"] for side in sides]
            assert {*models} == {"writer", "caller"}
            preferred = "first" if models[0] == "writer" else "second"
            vote = {"first": sides[0]["id"], "second": sides[1]["id"], "preferred": preferred, "user": "ann"}
            assert client.post("/v1/feedback", json=vote).json() == {"object": "feedback", "recorded": True}
    summary = tunesmith.votes(votes_file, to=tmp_path / "rows.jsonl")
    (pair,) = summary.pairs
    assert (pair.first, pair.second, pair.wins, pair.losses, pair.blind) == ("caller", "writer", 0, 6, 6)
    assert (pair.outcome, pair.decided_after) == ("open", None)
    rows = formats.read([tmp_path / "rows.jsonl"], DataSpec(train=("x",)))
    assert len(rows.examples) == 6 and all(isinstance(row, Preference) for row in rows.examples)


def test_a_streamed_answer_and_each_choice_can_be_voted_on(testing):
    with testing.client() as client:
        body = {"model": "writer", "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 4}
        text = client.post("/v1/chat/completions", json={**body, "stream": True}).text
        first = json.loads(text.partition("data: ")[2].partition("\n")[0])
        assert client.post("/v1/feedback", json={"id": first["id"], "thumb": "up"}).status_code == 200
        several = client.post("/v1/chat/completions", json={**body, "n": 2, "temperature": 1.0}).json()
        vote = {"id": f"{several['id']}/1", "thumb": "down"}
        assert client.post("/v1/feedback", json=vote).status_code == 200


@pytest.mark.parametrize(
    ("body", "status", "word"),
    [
        ({"id": "chatcmpl-0", "thumb": "up"}, 404, "no answer that can be voted on"),
        ({"id": "chatcmpl-0"}, 400, "give id and thumb"),
        ({"id": "chatcmpl-0", "thumb": "up", "preferred": "first"}, 400, "give id and thumb"),
        ({"id": "chatcmpl-0", "thumb": "sideways"}, 400, "'up' or 'down'"),
        ({"first": "a", "second": "b", "preferred": "first"}, 404, "no answer that can be voted on"),
        ({"id": "a", "thumb": "up", "stars": 5}, 400, "stars: this server does not know the field"),
        ([], 400, ""),
    ],
)
def test_what_is_not_a_vote_is_refused(testing, body, status, word):
    with testing.client() as client:
        response = client.post("/v1/feedback", json=body)
    assert response.status_code == status and word in response.json()["error"]["message"]


def test_answers_to_two_prompts_cannot_be_compared(testing):
    with testing.client() as client:
        first, second = (chat(client, "writer", text)["id"] for text in ("One", "Two"))
        vote = {"first": first, "second": second, "preferred": "tie"}
        response = client.post("/v1/feedback", json=vote)
    assert response.status_code == 400 and "same prompt" in response.json()["error"]["message"]


def test_who_knows_which_model_answered_does_not_vote_blind(testing, votes_file):
    with testing.client() as client:
        sides = [chat(client, f"both/{side}", "Blind?")["id"] for side in (1, 2)]
        vote = {"first": sides[0], "second": sides[1], "preferred": "tie"}
        for user, said in (("ann", {}), ("bob", {"blind": False})):
            assert client.post("/v1/feedback", json={**vote, "user": user, **said}).status_code == 200
    lines = votes_file.read_text().splitlines()[-2:]
    assert [json.loads(line)["blind"] for line in lines] == [True, False]


def test_a_file_to_which_votes_cannot_be_written_is_refused_at_the_start(start_server, settings, tmp_path):
    with pytest.raises(ServeError, match="votes cannot be written"):
        start_server(replace(settings, votes_file=tmp_path))


def test_a_vote_that_cannot_be_written_does_not_show_the_path(testing, monkeypatch, tmp_path):
    monkeypatch.setattr(testing.service, "votes_file", tmp_path)
    with testing.client() as client:
        answer = chat(client, "writer")["id"]
        response = client.post("/v1/feedback", json={"id": answer, "thumb": "up"})
    assert response.status_code == 500
    assert "cannot be written" in response.text and str(tmp_path) not in response.text


def test_a_test_with_a_taken_name_or_an_unknown_model_is_refused(start_server, settings):
    for text, word in [
        ("writer=writer,caller", "already the name of a model"),
        ("x=writer,nobody", "nobody"),
    ]:
        with pytest.raises(Exception, match=word):
            start_server(replace(settings, ab=(parse_route(text),)))
    with pytest.raises(ConfigError, match="names a model twice"):
        parse_route("x=writer,caller").renamed(lambda model: "one")


def test_guardrails_screen_prompts_and_answers_and_are_counted(start_server, settings):
    sets = ["secrets.input=block", "block_list.output=block", "block_list.patterns=['[a-z]']"]
    server = start_server(replace(settings, guardrails=load_guardrails(sets=sets)))
    token = "ghp_x9Jq2kVfT8WcYb3nZr5uLh7dPgS0eXoQmB1a"
    with server.client() as client:
        body = {"model": "writer", "messages": [{"role": "user", "content": f"Use {token}"}]}
        refused = client.post("/v1/chat/completions", json=body)
        assert refused.status_code == 400 and refused.json()["error"]["code"] == "content_filter"
        answer = chat(client, "writer", max_tokens=24)["choices"][0]
        assert answer["finish_reason"] == "content_filter"
        assert not any(letter in string.ascii_lowercase for letter in answer["message"]["content"])
        body = {"model": "writer", "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 24}
        streamed = client.post("/v1/chat/completions", json={**body, "stream": True}).text
        assert '"content_filter"' in streamed
        refused = client.post("/v1/chat/completions", json={**body, "logprobs": True})
        assert refused.status_code == 400 and "log-probabilities" in refused.json()["error"]["message"]
        metrics = client.get("/metrics").text
    counted = 'tunesmith_guardrails_total{action="block",direction="input",guardrail="secrets"} 1.0'
    assert counted in metrics
    assert token not in server.log.getvalue()


def test_the_playground_talks_with_the_server(testing, browser, votes_file):
    before = len(votes_file.read_text().splitlines()) if votes_file.exists() else 0
    page = browser.new_page()
    page.goto(testing.url)
    page.wait_for_selector("#model option", state="attached")
    page.fill("#say", "Hello")
    page.press("#say", "Enter")
    page.wait_for_selector(".turn .votes")
    assert page.locator(".answer.busy").count() == 0 and page.locator(".answer .error").count() == 0
    assert page.locator(".answer h3").all_inner_texts() == ["A", "B"]
    page.keyboard.press("1")
    page.wait_for_selector(".votes [aria-pressed=true]")
    page.click("#reveal")
    page.wait_for_selector("text=begin a new conversation")
    assert {*page.locator(".answer h3").all_inner_texts()} in (
        {"A · writer", "B · caller"},
        {"A · caller", "B · writer"},
    )
    page.close()
    assert len(votes_file.read_text().splitlines()) == before + 1
