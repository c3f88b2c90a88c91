"""What guesses tokens is what was asked for, and has the vocabulary of the model."""

from __future__ import annotations

from dataclasses import replace

import pytest

import tiny
from tunesmith.engine.engine import Engine
from tunesmith.engine.speculation import Speculation
from tunesmith.errors import ModelError
from tunesmith.serving import drafting, starting
from tunesmith.serving.drafting import speculation_maker
from tunesmith.serving.served import open_models

CHAT = {"messages": [{"role": "user", "content": "again and again and again"}], "max_tokens": 40}


@pytest.fixture(scope="module")
def models(tiny_model):
    return open_models([], model=str(tiny_model))


def test_off_guesses_nothing_and_each_engine_has_a_speculation_of_its_own(models):
    assert speculation_maker("off", models)() is None
    make = speculation_maker("prompt", models)
    assert isinstance(make(), Speculation) and make() is not make()


def test_a_notice_says_so_if_a_model_can_have_no_guesses(models, tiny_model, monkeypatch):
    monkeypatch.setattr(drafting, "takes_guesses", lambda net: False)
    for draft in ("prompt", str(tiny_model)):
        notices: list = []
        assert speculation_maker(draft, models, notices.append)() is None
        assert [notice.where for notice in notices] == ["--draft"] and "speculation is off" in notices[0].what
    assert speculation_maker("off", models, pytest.fail)() is None


def test_a_draft_model_needs_the_same_tokens(models, tiny_model, tmp_path):
    assert isinstance(speculation_maker(str(tiny_model), models)(), Speculation)
    with pytest.raises(ModelError, match="another vocabulary"):
        speculation_maker(str(tiny.write_mistral(tmp_path / "other")), models)


def test_served_answers_are_the_same_whatever_guesses(start_server, settings, tiny_model, monkeypatch):
    made: list[Speculation | None] = []

    class Recorded(Engine):
        def __init__(self, *positional, speculation, **named) -> None:
            made.append(speculation)
            super().__init__(*positional, speculation=speculation, **named)

    monkeypatch.setattr(starting, "Engine", Recorded)
    texts: list[str] = []
    for draft in ("off", "prompt", str(tiny_model)):
        server = start_server(replace(settings, draft=draft))
        with server.client() as client:
            answers = [client.post("/v1/chat/completions", json=CHAT).json() for _ in range(2)]
        texts += [answer["choices"][0]["message"]["content"] for answer in answers]
    off, *guessing = made
    assert off is None and len(guessing) == 2
    assert all(speculation is not None and speculation.paces for speculation in guessing)
    assert len({*texts}) == 1
