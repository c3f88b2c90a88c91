"""``tunesmith serve`` as a process: what it prints, what it answers, and how it ends."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

import tiny
import tunesmith
from tunesmith.cli import app
from tunesmith.errors import ConfigError
from tunesmith.serving import verb
from tunesmith.serving.load import CallTimes


@pytest.fixture(scope="module")
def run(tmp_path_factory, tiny_model) -> Path:
    folder = tmp_path_factory.mktemp("serve")
    data = tiny.write_rows(folder / "rows.jsonl", tiny.conversations(8))
    sets = ["loop.steps=1", "audit.before_training=false", "adapter.rank=2", "loop.samples=0"]
    tunesmith.train(
        tunesmith.configure(model=str(tiny_model), data=[str(data)], sets=sets), out=folder / "run"
    )
    return folder / "run"


class ServerProcess:
    """A server in a process of its own. ``said``: what it printed when it was ready."""

    def __init__(self, folder: Path, words: Sequence[str]) -> None:
        command = [sys.executable, "-m", "tunesmith", "serve", *words, "--port", "0"]
        environ = os.environ | {"PYTHONPATH": str(Path(tunesmith.__file__).parents[1])}
        self.errors = folder / "errors.txt"
        with self.errors.open("w") as errors:
            self.process = subprocess.Popen(
                command, stdout=subprocess.PIPE, stderr=errors, text=True, env=environ, cwd=folder
            )
        self.said = ""
        assert self.process.stdout is not None
        while "Ctrl-C" not in self.said:
            line = self.process.stdout.readline()
            assert line, f"it ended: {self.said} {self.errors.read_text()}"
            self.said += line
        self.url = re.findall(r"http://[\d.:]+", self.said)[0]

    def ask(self, body: Mapping[str, object] | str, url: str | None = None) -> Any:
        text = body if isinstance(body, str) else json.dumps(body)
        url = url or f"{self.url}/v1/chat/completions"
        headers = {"Content-Type": "application/json"}
        return urllib.request.urlopen(urllib.request.Request(url, text.encode(), headers), timeout=60)


@pytest.fixture
def serving(tmp_path) -> Iterator[Callable[..., ServerProcess]]:
    """``serving(*words)``: a server that is killed at the end of the test."""
    begun: list[ServerProcess] = []

    def begin(*words: str) -> ServerProcess:
        begun.append(ServerProcess(tmp_path, words))
        return begun[-1]

    yield begin
    for server in begun:
        server.process.kill()
        server.process.wait()
        server.process.stdout.close()


@pytest.mark.parametrize("sent", [signal.SIGTERM, signal.SIGINT])
def test_what_it_says_works_and_a_signal_ends_it(run, serving, sent):
    server = serving(str(run))
    command = next(line for line in server.said.splitlines() if line.startswith("curl"))
    _, url, *_, body = shlex.split(command)
    assert url.startswith(server.url)
    with server.ask(body, url) as answer:
        content = json.load(answer)
    assert content["model"] == "run" and content["choices"]
    server.process.send_signal(sent)
    assert server.process.wait(30) == 0
    [line] = server.errors.read_text().splitlines()
    assert json.loads(line)["model"] == "run" and "Hello" not in line


def test_a_signal_lets_what_is_under_way_finish_and_refuses_what_is_new(run, serving):
    server = serving(str(run))
    body = {"model": "base", "messages": [{"role": "user", "content": "the cat"}], "max_tokens": 2000}
    with server.ask(body | {"stream": True, "logit_bias": {"2": -100}}) as answer:
        answer.readline()
        server.process.send_signal(signal.SIGTERM)
        time.sleep(0.3)
        with pytest.raises(urllib.error.HTTPError) as refused:
            server.ask(body)
        assert refused.value.code == 503 and refused.value.headers["Retry-After"]
        refused.value.close()
        rest = answer.read().decode()
    assert "[DONE]" in rest
    assert server.process.wait(30) == 0


@pytest.fixture
def taken_port() -> Iterator[int]:
    """A port at which somebody listens already."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield listener.getsockname()[1]


@pytest.mark.parametrize(
    ("words", "status", "what"),
    [
        ((), 2, "nothing to serve"),
        (("RUN", "--host", "0.0.0.0"), 2, "a key is needed"),
        (("RUN", "--limit", "quue=3"), 2, "did you mean"),
        (("RUN", "--keys", "nowhere.json"), 2, "nowhere.json"),
        (("RUN", "--fallback", "nobody"), 9, "there is no model 'nobody'"),
        (("RUN", "--ab", "run=base,RUN"), 2, "the name of a model"),
        (("RUN", "--port", "1"), 9, "cannot listen"),
        (("RUN", "--log", "nowhere/log"), 9, "nowhere/log"),
        (("RUN", "--kv-bits", "5"), 5, "5"),
        (("RUN", "--memory", "0.0001"), 9, "no memory is left"),
        (("RUN", "--prefix-folder", "kept", "--prefix-memory", "0"), 2, "none is for them"),
    ],
)
def test_what_cannot_be_served_is_said_without_a_traceback(run, words, status, what, request):
    if what == "cannot listen":
        listener = request.getfixturevalue("taken_port")
        words = (*words[:-1], str(listener))
    words = [word.replace("RUN", str(run)) for word in words]
    done = CliRunner().invoke(app, ["serve", *words])
    assert isinstance(done.exception, tunesmith.errors.TunesmithError), done.output
    assert done.exception.exit_code == status and what in str(done.exception)


def test_it_measures_itself_and_ends(run):
    words = ["serve", str(run), "--port", "0", "--bench", "20", "--bench-seconds", "0.5"]
    measured = CliRunner().invoke(app, [*words, "--json"])
    assert measured.exit_code == 0, measured.output
    report = json.loads(measured.stdout)
    assert report["requests"] == report["answered"] == 10 and report["errors"] == {}
    for times in (report["first_s"], report["token_s"], report["total_s"]):
        assert 0 < times["p50"] <= times["p95"] <= times["p99"]
    shown = CliRunner().invoke(app, words).stdout
    assert "10 of 10 requests" in shown and "p95" in shown


def test_no_request_of_the_measurement_was_sent_before(run, monkeypatch):
    """The request that warms the server up would leave its prompt in the cache."""
    sent = []

    async def timed(address, call, due=None):
        sent.append(json.dumps(call.body))
        return CallTimes(0.1)

    monkeypatch.setattr(verb.load, "timed", timed)
    words = ["serve", str(run), "--port", "0", "--bench", "40", "--bench-seconds", "0.1"]
    assert CliRunner().invoke(app, words).exit_code == 0
    assert len({*sent}) == len(sent) == 5


def test_a_server_with_keys_cannot_ask_itself(run, tmp_path):
    keys = tmp_path / "keys.json"
    keys.write_text('[{"name": "me", "key": "a-secret-of-some-length"}]')
    refused = CliRunner().invoke(app, ["serve", str(run), "--bench", "1", "--keys", str(keys)])
    assert isinstance(refused.exception, ConfigError) and "--keys" in str(refused.exception)


@pytest.mark.parametrize("words", [["--json"], ["--bench-seconds", "3"]])
def test_options_of_the_measurement_are_not_ignored_without_it(run, words):
    refused = CliRunner().invoke(app, ["serve", str(run), *words])
    assert isinstance(refused.exception, ConfigError) and "--bench RATE" in str(refused.exception)


def test_a_limit_without_its_value_is_refused_in_its_own_words(run):
    refused = CliRunner().invoke(app, ["serve", str(run), "--limit", "queue"])
    assert isinstance(refused.exception, ConfigError)
    assert str(refused.exception).startswith("--limit: must be key=value")
    assert "--limit queue=64" in str(refused.exception) and "--set" not in str(refused.exception)


def test_the_models_of_an_ab_test_are_served_by_folder_and_by_tag(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("a", "b"):
        shutil.copytree(run, tmp_path / "runs" / name)
    tunesmith.tag("runs/b", "tool:2")
    for text, served in (
        ("duel=runs/a,runs/b", ["runs/b"]),
        ("duel=runs/a,tool:2", ["tool:2"]),
        ("duel=a,base", []),
    ):
        assert verb._compared([text], ["runs/a"]) == served
        assert verb._compared([text], ["mine=runs/a", "tool:2"]) == []
