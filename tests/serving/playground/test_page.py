"""The playground in a browser, against a server whose answers are written here."""

from __future__ import annotations

import asyncio
import json
import re
import threading
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from tunesmith.serving.playground import home

PHONE = {"width": 375, "height": 760}
MODELS = [
    {"id": "writer", "object": "model", "ab": ["plain", "formal"]},
    {"id": "plain", "object": "model"},
    {"id": "formal", "object": "model"},
]


@dataclass
class Stand:
    """A server that answers as the page expects, and notes what it is asked. ``hold``: answers wait.
    ``calls``: of a tool, in an answer. ``failing``: the model that does not answer."""

    url: str = ""
    asked: list[dict[str, Any]] = field(default_factory=list)
    votes: list[dict[str, Any]] = field(default_factory=list)
    key: str | None = None
    hold: bool = False
    calls: int = 1
    failing: str | None = None

    def app(self) -> Starlette:
        return Starlette(
            routes=[
                *home.routes(),
                Route("/v1/models", self.models),
                Route("/v1/chat/completions", self.chat, methods=["POST"]),
                Route("/v1/feedback", self.vote, methods=["POST"]),
                Route("/v1/feedback/{id}", self.reveal),
            ]
        )

    async def models(self, request: Request) -> Response:
        if self.key is not None and request.headers.get("authorization") != f"Bearer {self.key}":
            return JSONResponse({"error": {"message": "this server needs a key"}}, 401)
        return JSONResponse({"object": "list", "data": MODELS})

    async def chat(self, request: Request) -> Response:
        body = await request.json()
        self.asked.append(body)
        if body["messages"][-1]["content"] == "fail" or body["model"] == self.failing:
            return JSONResponse({"error": {"message": "the prompt is too long"}}, 400)
        return StreamingResponse(
            self.events(body, f"chatcmpl-{len(self.asked)}"), media_type="text/event-stream"
        )

    async def events(self, body: dict[str, Any], id: str) -> AsyncIterator[str]:
        def event(delta: dict[str, Any], reason: str | None = None) -> str:
            choice = {"index": 0, "delta": delta, "finish_reason": reason}
            return f"data: {json.dumps({'id': id, 'choices': [choice]})}\n\n"

        words = f"Answer of {body['model']} to: {body['messages'][-1]['content']}"
        if body.get("tools") and body["messages"][-1]["role"] == "user":
            for index in range(self.calls):
                call = {"index": index, "id": f"c{index + 1}", "function": {"name": "find", "arguments": ""}}
                yield event({"tool_calls": [call]})
                yield event({"tool_calls": [{"index": index, "function": {"arguments": '{"x": 1}'}}]})
            yield event({}, "tool_calls")
        else:
            yield event({"reasoning_content": "Hm, hm."})
            for word in re.split(r"(?<= )", words):
                await asyncio.sleep(0.003)
                yield event({"content": word})
            while self.hold:
                await asyncio.sleep(0.01)
            yield event({}, "stop")
        usage = {"prompt_tokens": 20, "completion_tokens": 9, "prompt_tokens_details": {"cached_tokens": 4}}
        yield f"data: {json.dumps({'id': id, 'choices': [], 'usage': usage})}\n\n"
        yield "data: [DONE]\n\n"

    async def vote(self, request: Request) -> Response:
        self.votes.append(await request.json())
        return JSONResponse({"recorded": True})

    async def reveal(self, request: Request) -> Response:
        number = request.path_params["id"].rpartition("-")[2]
        return JSONResponse(
            {"model": "formal" if self.asked[int(number) - 1]["model"] == "writer/1" else "plain"}
        )


@pytest.fixture
def stand() -> Iterator[Stand]:
    stand = Stand()
    server = uvicorn.Server(uvicorn.Config(stand.app(), port=0, log_config=None, timeout_graceful_shutdown=1))
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        thread.join(0.01)
    stand.url = f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    yield stand
    stand.hold = False
    server.should_exit = True
    thread.join(20)


@pytest.fixture
def page(browser, stand) -> Iterator[Any]:
    """The page in a browser; whatever it reports or asks elsewhere fails the test."""
    page = browser.new_page()
    page.set_default_timeout(15_000)
    problems: list[str] = []
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.on(
        "console",
        lambda message: (
            problems.append(message.text)
            if message.type == "error" and "status of 4" not in message.text
            else None
        ),
    )
    page.on("request", lambda request: request.url.startswith(stand.url) or problems.append(request.url))
    page.goto(stand.url)
    page.wait_for_selector("#model option", state="attached")
    yield page
    page.close()
    assert problems == []


def say(page, text: str) -> None:
    page.fill("#say", text)
    page.press("#say", "Enter")


def done(page, answers: int) -> None:
    """Wait until the last turn has so many answers, and can be voted on."""
    page.wait_for_selector(f".turn:last-child .answer:nth-child({answers}):not(.busy)")
    page.wait_for_selector(".turn:last-child .votes")


def test_two_models_answer_side_by_side_blind_and_the_vote_is_sent(page, stand):
    say(page, "Why?")
    done(page, 2)
    assert [body["model"] for body in stand.asked] == ["writer/1", "writer/2"]
    assert stand.asked[0]["user"] == stand.asked[1]["user"] and stand.asked[0]["stream"] is True
    assert page.locator(".answer h3").all_inner_texts() == ["A", "B"], "names are not shown"
    assert "Answer of writer/1 to: Why?" in page.inner_text(".answer")
    assert "Hm, hm." in page.inner_text(".reasoning")
    page.keyboard.press("2")
    page.wait_for_selector(".votes [aria-pressed=true]")
    (vote,) = stand.votes
    assert (vote["first"], vote["second"], vote["preferred"]) == ("chatcmpl-1", "chatcmpl-2", "second")
    assert vote["user"] and vote["user"] != stand.asked[0]["user"]

    say(page, "And then?")
    done(page, 2)
    carried = [message["content"] for message in stand.asked[2]["messages"]]
    assert carried == ["Why?", "Answer of writer/2 to: Why?", "And then?"], (
        "it goes on with the preferred one"
    )
    assert stand.asked[2]["messages"] == stand.asked[3]["messages"]

    page.click("#reveal")
    page.wait_for_selector("text=A · formal")
    assert page.locator(".turn:last-child .votes button:enabled").count() == 0
    assert "blind" not in vote
    say(page, "Now I know")
    done(page, 2)
    page.keyboard.press("1")
    page.wait_for_selector(".turn:last-child .votes [aria-pressed=true]")
    assert stand.votes[1]["blind"] is False
    page.click("#fresh")
    assert page.locator(".turn").count() == 0
    del stand.asked[4:]
    say(page, "Again")
    done(page, 2)
    assert stand.asked[4]["user"] != stand.asked[0]["user"] and len(stand.asked[4]["messages"]) == 1


def test_speed_and_latency_are_shown_and_a_single_answer_gets_a_thumb(page, stand):
    page.select_option("#model", "plain")
    page.select_option("#rival", "")
    say(page, "Hello")
    done(page, 1)
    measured = page.inner_text(".measured")
    pattern = r"first token \d+\.\d\d s · \d+\.\d tokens/s · 9 tokens · 4 of 20 prompt tokens cached"
    assert re.fullmatch(pattern, measured), measured
    assert page.inner_text(".answer h3") == "plain"
    page.click("text=Bad answer")
    page.wait_for_selector(".votes [aria-pressed=true]")
    assert stand.votes[0]["id"] == "chatcmpl-1" and stand.votes[0]["thumb"] == "down"


def test_a_tool_is_called_and_its_result_goes_back(page, stand):
    page.select_option("#model", "plain")
    page.click("#settings summary")
    page.fill("#tools", "[nonsense")
    say(page, "Find it")
    assert "These are not tools" in page.inner_text("#tools-problem") and not stand.asked
    page.fill("#tools", '{"name": "find", "parameters": {"type": "object"}}')
    say(page, "Find it")
    done(page, 1)
    declared = {"name": "find", "parameters": {"type": "object"}}
    assert stand.asked[0]["tools"] == [{"type": "function", "function": declared}]
    assert page.inner_text(".answer pre") == 'find({"x": 1})'
    assert page.inner_text("#say-label") == "Result of find"
    say(page, "42")
    page.wait_for_selector(".turn:nth-child(2) .votes")
    assert [message["role"] for message in stand.asked[1]["messages"]] == ["user", "assistant", "tool"]
    assert stand.asked[1]["messages"][2]["tool_call_id"] == "c1"
    assert stand.asked[1]["messages"][1]["tool_calls"][0]["function"]["arguments"] == '{"x": 1}'


def test_the_request_is_shown_as_curl_and_python_that_sends_the_same(page, stand):
    page.select_option("#model", "plain")
    page.click("#settings summary")
    page.fill("#system", "Don't shout.\nBe kind.")
    page.click("#request summary")
    page.fill("#say", "It's me")
    shown = page.inner_text("#code")
    assert shown.startswith(f"curl {stand.url}/v1/chat/completions")
    sent = json.loads(shown.partition("-d '")[2].removesuffix("'").replace("'\\''", "'"))
    page.click("[data-form=python]")
    code = page.inner_text("#code")
    spoken: dict[str, Any] = {}

    class OpenAI:
        def __init__(self, **options: Any) -> None:
            self.chat = self.completions = self

        def create(self, **body: Any) -> Any:
            spoken.update(body)
            raise InterruptedError

    with pytest.raises(InterruptedError):
        exec(code.replace("from openai import OpenAI", ""), {"OpenAI": OpenAI})
    page.press("#say", "Enter")
    done(page, 1)
    real = {key: value for key, value in stand.asked[0].items() if not key.startswith("stream")}
    assert sent == spoken == real


def test_an_answer_is_stopped_by_escape_and_an_error_is_told(page, stand):
    page.select_option("#model", "plain")
    stand.hold = True
    say(page, "Wait")
    page.wait_for_selector("text=Answer of plain to: Wait")
    page.keyboard.press("Escape")
    page.wait_for_selector(".answer:not(.busy)")
    assert "stopped" in page.inner_text(".measured")
    assert page.locator(".votes").count() == 0, "it cannot be voted on"
    stand.hold = False
    say(page, "fail")
    page.wait_for_selector("text=the prompt is too long")
    say(page, "Once more")
    done(page, 1)
    contents = [message["content"] for message in stand.asked[-1]["messages"]]
    assert contents == ["Wait", "Answer of plain to: Wait", "Once more"], "what failed is left out"


@pytest.mark.parametrize("how", ["fresh", "model"])
def test_a_new_conversation_begins_while_an_answer_is_under_way(page, stand, how):
    stand.hold = True
    say(page, "Wait")
    page.wait_for_selector("text=Answer of writer/1 to: Wait")
    if how == "fresh":
        page.click("#fresh")
    else:
        page.select_option("#model", "plain")
    stand.hold = False
    say(page, "Again")
    done(page, 2 if how == "fresh" else 1)
    assert page.locator(".turn").count() == 1
    assert [message["content"] for message in stand.asked[-1]["messages"]] == ["Again"]


def test_results_that_failed_are_all_left_out(page, stand):
    page.select_option("#model", "plain")
    page.click("#settings summary")
    page.fill("#tools", '{"name": "find", "parameters": {"type": "object"}}')
    stand.calls = 2
    say(page, "Find it")
    done(page, 1)
    say(page, "fine")
    say(page, "fail")
    page.wait_for_selector("text=the prompt is too long")
    say(page, "Once more")
    page.wait_for_selector(".turn:nth-child(3) .answer:not(.busy)")
    assert [message["role"] for message in stand.asked[-1]["messages"]] == ["user", "assistant", "user"]


def test_the_call_of_the_answer_that_did_not_fail_waits_for_its_result(page, stand):
    page.click("#settings summary")
    page.fill("#tools", '{"name": "find", "parameters": {"type": "object"}}')
    stand.failing = "writer/1"
    say(page, "Find it")
    page.wait_for_selector("#say-label:has-text('Result of find')")
    say(page, "42")
    page.wait_for_selector(".turn:nth-child(2) .answer:nth-child(2):not(.busy)")
    assert [message["role"] for message in stand.asked[-1]["messages"]] == ["user", "assistant", "tool"]


def test_a_server_with_keys_is_asked_with_the_key(page, stand):
    stand.key = "secret key"
    page.reload()
    page.wait_for_selector("#key")
    assert page.inner_text("#status") == "this server needs a key"
    page.fill("#key", "secret key")
    page.press("#key", "Tab")
    page.wait_for_selector("#model option", state="attached")


def test_texts_of_models_are_only_text(page, stand):
    page.select_option("#model", "plain")
    say(page, "<img src=x onerror=document.title='bad'><script>document.title='bad'</script>")
    done(page, 1)
    assert page.title() == "Playground" and page.locator(".answer img, .said img").count() == 0


def test_every_control_is_reached_by_keyboard_and_has_a_name(page, stand):
    say(page, "Why?")
    done(page, 2)
    names = page.evaluate(
        """() => [...document.querySelectorAll('button, input, select, textarea, summary')]
            .filter(control => control.checkVisibility())
            .map(control => (control.labels?.[0]?.textContent ?? control.textContent).trim())"""
    )
    assert len(names) > 10 and all(names)
    page.focus("#model")
    reached = set()
    for _ in range(40):
        page.keyboard.press("Tab")
        reached.add(page.evaluate("() => document.activeElement.id || document.activeElement.textContent"))
    assert {"rival", "say", "send", "fresh", "reveal", "A is better1", "No difference0"} <= reached


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("size", [PHONE, {"width": 1280, "height": 900}], ids=["phone", "desk"])
def test_it_fits_phones_and_desks_in_light_and_dark(page, stand, scheme, size, request, tmp_path):
    page.emulate_media(color_scheme=scheme)
    page.set_viewport_size(size)
    say(page, "Why is the sky blue, and what does " + "averyverylongword" * 8 + " mean?")
    done(page, 2)
    wide = page.evaluate("() => document.documentElement.scrollWidth - innerWidth")
    assert wide <= 0, "it scrolls sideways"
    tops = [box["y"] for box in (card.bounding_box() for card in page.locator(".answer").all())]
    assert (tops[0] == tops[1]) == (size != PHONE), "side by side only where there is room"
    if folder := request.config.getoption("--basetemp"):
        page.screenshot(path=str(Path(folder) / f"{scheme}-{size['width']}.png"), full_page=True)
