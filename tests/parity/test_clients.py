"""The clients that people use, each as the package registry has it, in environments of their own: what they
read is what the server answers a plain request. Skipped by name without a registry."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import httpx
import pytest

import tiny
import tunesmith
from tunesmith.serving.served import NamedRun
from tunesmith.serving.starting import ServerSettings

pytest_plugins = ("serving.conftest",)

CLIENTS = Path(__file__).parent / "clients"
ENVIRONMENTS = {
    "openai 2": ("openai>=2,<3", "anthropic", "litellm", "langchain-openai", "llm"),
    "openai 3": ("openai>=3,<4",),
}
"""litellm, langchain-openai and llm need the second version of openai."""
TEMPLATE = (
    "{% for t in tools or [] %}{{ t | tojson }}{% endfor %}{% for m in messages %}<|im_start|>"
    "{{ m.role }}\n{{ m.content }}{% for c in m.tool_calls or [] %}{{ '\n' if not loop.first }}<tool_call>\n"
    '{"name": "{{ c.function.name }}", "arguments": {{ c.function.arguments | tojson }}}\n</tool_call>'
    "{% endfor %}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
"""Hermes' calls."""
FUNCTION = {
    "name": "weather",
    "description": "The weather of a town.",
    "parameters": {
        "type": "object",
        "properties": {
            "town": {"enum": ["Bern", "Rom"]},
            "days": {"type": "integer", "minimum": 1, "maximum": 9},
        },
        "required": ["town", "days"],
        "additionalProperties": False,
    },
}
SCHEMA = {
    "type": "object",
    "properties": {"fine": {"type": "boolean"}, "kind": {"enum": ["a", "b"]}},
    "required": ["fine", "kind"],
    "additionalProperties": False,
}
LEARNED = {
    "messages": [
        {"role": "user", "content": "How is the weather?"},
        {"role": "assistant", "content": "Sunny in Zürich ☀, and 21 degrees."},
    ]
}
MOST = 500
"""Tokens of an answer: a random model writes as much white space as a schema allows."""
ASKED = {
    "model": "speaker",
    "text": "How is the weather?",
    "max_tokens": MOST,
    "function": FUNCTION,
    "schema": SCHEMA,
}


def environment(name: str) -> Path:
    """The Python of an environment with these packages, which later runs use again."""
    packages = ENVIRONMENTS[name]
    mark = hashlib.sha256(repr((packages, sys.version)).encode()).hexdigest()[:12]
    folder = Path(tempfile.gettempdir()) / f"tunesmith-clients-{mark}"
    python = folder / "bin" / "python"
    if not (folder / "complete").exists():
        shutil.rmtree(folder, ignore_errors=True)
        subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
        install = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *packages]
        done = subprocess.run(install, capture_output=True, text=True, timeout=600)
        if done.returncode:
            pytest.skip(
                f"{name}: the package registry does not have {', '.join(packages)}: {done.stderr[-200:]}"
            )
        (folder / "complete").touch()
    return python


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """A short run on a tiny model whose template takes tools; it has learned one answer."""
    folder = tmp_path_factory.mktemp("clients") / "model"
    folder.mkdir()
    tiny.write_model(folder, tiny.write_tokenizer(folder, TEMPLATE))
    data = tiny.write_rows(folder / "rows.jsonl", [LEARNED] * 8)
    sets = ["loop.steps=60", "data.valid=0", "audit.before_training=false", "optimizer.learning_rate=0.02"]
    config = tunesmith.configure(model=str(folder), data=[str(data)], sets=[*sets, "loop.samples=0"])
    tunesmith.train(config, out=folder.parent / "run")
    return folder.parent / "run"


@pytest.fixture(scope="module")
def speaker(start_server, run):
    """A server of the run and its base."""
    return start_server(ServerSettings([NamedRun(str(run), "speaker")], batch_size=4))


@pytest.fixture(scope="module")
def expected(speaker) -> dict[str, Any]:
    """What the server answers to plain requests."""
    tool = {"type": "function", "function": FUNCTION}
    form = {"type": "json_schema", "json_schema": {"name": "answer", "schema": SCHEMA}}
    with speaker.client() as client:

        def message(*more: Mapping[str, Any], **options: Any) -> Any:
            messages = [{"role": "user", "content": ASKED["text"]}, *more]
            body = {"model": "speaker", "messages": messages, "temperature": 0, "max_tokens": MOST, **options}
            answered = client.post("/v1/chat/completions", json=body)
            assert answered.status_code == 200, answered.text
            return answered.json()["choices"][0]["message"]

        called = message(tools=[tool], tool_choice="required", parallel_tool_calls=False)
        (call,) = called["tool_calls"]
        result = {"role": "tool", "tool_call_id": call["id"], "content": "sunny"}
        history = {"role": "assistant", "content": called["content"], "tool_calls": called["tool_calls"]}
        plain = message()["content"]
        assert len({*plain}) > 5, "the answer must say something"
        made = {"name": call["function"]["name"], "arguments": json.loads(call["function"]["arguments"])}
        return {
            "plain": plain,
            "stream": plain,
            "call": [made["name"], made["arguments"]],
            "streamed_call": [made["name"], made["arguments"]],
            "after_call": message(history, result)["content"],
            "schema": json.loads(message(response_format=form)["content"]),
            "with_tool": message(tools=[tool])["content"],
            "error": "model_not_found",
        }


def answers_of(script: str, python: Path, url: str) -> dict[str, Any]:
    command = [str(python), str(CLIENTS / f"{script}.py"), url, json.dumps(ASKED)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(done.stdout)


def require_same(answers: Mapping[str, Any], expected: Mapping[str, Any], names: set[str]) -> None:
    assert names <= answers.keys()
    assert {name: answers[name] for name in names} == {name: expected[name] for name in names}


CHAT = {"plain", "stream", "call", "streamed_call", "schema", "error"}


@pytest.mark.clients
@pytest.mark.parametrize("version", ["2", "3"])
def test_openai(speaker, expected, version):
    answers = answers_of("openai_", environment(f"openai {version}"), speaker.url)
    assert answers["version"].startswith(f"{version}.")
    require_same(answers, expected, CHAT | {"after_call"})
    assert answers["refused"] == "nonsense"
    assert answers["response"] == answers["response_stream"] == expected["plain"]
    assert answers["response_call"] == expected["call"] and answers["response_schema"] == expected["schema"]
    assert answers["models"] == ["speaker", "model", "base"] and answers["embedding"] == 64
    assert isinstance(answers["completion"], str) and answers["completion"]


@pytest.mark.clients
def test_anthropic(speaker, expected):
    answers = answers_of("anthropic_", environment("openai 2"), speaker.url)
    require_same(answers, expected, CHAT - {"schema", "error"} | {"after_call"})
    assert answers["error"] == "not_found_error" and answers["counted"] > 5


@pytest.mark.clients
def test_litellm(speaker, expected):
    require_same(answers_of("litellm_", environment("openai 2"), speaker.url), expected, CHAT)


@pytest.mark.clients
def test_langchain(speaker, expected):
    require_same(answers_of("langchain_", environment("openai 2"), speaker.url), expected, CHAT)


@pytest.mark.clients
def test_llm(speaker, expected):
    answers = answers_of("llm_", environment("openai 2"), speaker.url)
    require_same(answers, expected, {"plain", "stream", "schema", "with_tool", "error"})


@pytest.mark.parity
def test_curl(speaker, expected):
    if shutil.which("curl") is None:
        pytest.skip("curl is not installed")

    def curl(body: Mapping[str, Any], *words: str) -> str:
        command = ["curl", "--silent", "--no-buffer", *words, f"{speaker.url}/v1/chat/completions"]
        command += ["-H", "Content-Type: application/json", "-d", json.dumps(body)]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout

    messages = [{"role": "user", "content": ASKED["text"]}]
    body = {"model": "speaker", "messages": messages, "temperature": 0, "max_tokens": MOST}
    assert json.loads(curl(body))["choices"][0]["message"]["content"] == expected["plain"]
    *events, done = [
        line.removeprefix("data: ") for line in curl(body | {"stream": True}).split("\n\n") if line
    ]
    deltas = [choice["delta"] for event in events for choice in json.loads(event)["choices"]]
    assert done == "[DONE]" and "".join(delta.get("content", "") for delta in deltas) == expected["plain"]
    refused = curl(body | {"model": "nobody"}, "--write-out", "%{http_code}")
    assert refused.endswith("404") and '"code":"model_not_found"' in refused


TEXTS = ("How is the weather?", "How is the cat?", "Read my note about tools", "Timers and music", "Zürich ☀")


def without_halves(text: str) -> str:
    """Bytes that are no whole character are shown in different numbers."""
    return re.sub("\N{REPLACEMENT CHARACTER}+", "\N{REPLACEMENT CHARACTER}", text).rstrip(
        "\N{REPLACEMENT CHARACTER}"
    )


@pytest.mark.parity
def test_llama_cpp_s_server_gives_the_same_answers(speaker, run, tmp_path):
    """The merged model as a GGUF file, asked with the same bodies."""
    xllamacpp = pytest.importorskip("xllamacpp")
    tunesmith.export(run, to="gguf-f32", out=tmp_path / "merged")
    (file,) = (tmp_path / "merged").glob("*.gguf")
    settings = xllamacpp.CommonParams()
    settings.model.path, settings.port, settings.verbosity = str(file), 0, -1
    settings.n_ctx, settings.n_parallel, settings.n_gpu_layers = 512, 1, 0
    # One thread: several wait for each other in loops, for minutes on a machine that is busy.
    settings.cpuparams.n_threads = settings.cpuparams_batch.n_threads = 1
    settings.warmup = False
    settings.cache_type_k = settings.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    settings.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    llama = xllamacpp.Server(settings)
    with speaker.client() as ours, httpx.Client(base_url=llama.listening_address, timeout=60) as theirs:
        for text in TEXTS:
            messages = [{"role": "user", "content": text}]
            chat = {"model": "speaker", "messages": messages, "temperature": 0, "max_tokens": 16}
            plain = {"model": "speaker", "prompt": text, "temperature": 0, "max_tokens": 16}
            for path, body in (("/v1/chat/completions", chat), ("/v1/completions", plain)):
                answers = [client.post(path, json=body).json()["choices"][0] for client in (ours, theirs)]
                mine, other = (choice.get("text") or choice["message"]["content"] for choice in answers)
                assert without_halves(mine) == without_halves(other), (path, text)
                assert answers[0]["finish_reason"] == answers[1]["finish_reason"]
