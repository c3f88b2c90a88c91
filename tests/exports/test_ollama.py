"""Chat templates in Ollama's language: what they render is what training rendered, and what has no
counterpart is refused."""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import tiny
import tunesmith
from tunesmith.data.examples import Conversation, Message
from tunesmith.errors import ExportError
from tunesmith.exports import go_templates, kind, ollama_templates
from tunesmith.exports.kinds import ollama
from tunesmith.exports.kinds.ollama import Ollama
from tunesmith.tokens import renderers

LLAMA3 = (
    "{{ '<|endoftext|>' }}{% for m in messages %}{{ '<|im_start|>' + m.role + '<|im_end|>\n\n' "
    "+ m.content | trim + '<|im_end|>' }}{% endfor %}{% if add_generation_prompt %}"
    "{{ '<|im_start|>assistant<|im_end|>\n\n' }}{% endif %}"
)
QWEN25 = (
    "{% if messages[0].role != 'system' %}<|im_start|>system\nYou are {\"a\"} helper.<|im_end|>\n{% endif %}"
    + tiny.CHATML
)
GEMMA = (
    "{% if messages[0].role == 'system' %}{% set first = messages[0].content + '\n\n' %}"
    "{% set loop_messages = messages[1:] %}{% else %}{% set first = '' %}"
    "{% set loop_messages = messages %}{% endif %}"
    "{% for m in loop_messages %}<|im_start|>{{ 'model' if m.role == 'assistant' else m.role }}\n"
    "{{ first if loop.first else '' }}{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>model\n{% endif %}"
)
LAST = (  # as Mistral's: the system message stands before the last question
    "{% set system = '' %}{% if messages[0].role == 'system' %}"
    "{% set system = messages[0].content + '\n\n' %}"
    "{% set messages = messages[1:] %}{% endif %}{% for m in messages %}{% if m.role == 'user' %}[INST] "
    "{% if loop.last or (loop.index == loop.length - 1 and messages[-1].role == 'assistant') %}"
    "{{ system }}{% endif %}"
    "{{ m.content }} [/INST]{% else %} {{ m.content }}<|im_end|>{% endif %}{% endfor %}"
)
PLAIN = (  # no system message
    "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
THINKING = (  # as Qwen3's with thinking off
    tiny.CHATML.removesuffix("{% endif %}") + "<think>\n\n</think>\n\n{% endif %}"
)
COUNTED = tiny.CHATML.replace("{{ message['role'] }}", "{{ message['role'] }} {{ loop.index }}")
TURNS = (
    Message("user", "the cat"),
    Message("assistant", 'sat on "a" mat'),
    Message("user", "read\n\nmy {note}"),
)
SAID = Message("system", "be {{ brief }}")


def renderer(folder: Path, template: str):
    tiny.write_tokenizer(folder, template)
    return renderers.load(folder)


@pytest.mark.parametrize(
    ("template", "has_system"),
    [
        (tiny.CHATML, True),
        (LLAMA3, True),
        (QWEN25, True),
        (GEMMA, True),
        (LAST, True),
        (PLAIN, False),
        (THINKING, True),
    ],
    ids=["chatml", "llama3", "qwen2.5", "gemma", "mistral", "no system", "thinking off"],
)
def test_a_template_in_ollamas_language_renders_what_the_run_does(template, has_system, tmp_path):
    used = renderer(tmp_path, template)
    marks = ollama_templates.find(used, (), "")
    assert (marks.opening is not None) == has_system
    conversations = [Conversation(TURNS[:1]), Conversation(TURNS)]
    conversations += [Conversation((SAID, *TURNS[:n])) for n in (1, 3) if has_system]
    expected = [used.prompt(conversation) for conversation in conversations]
    requests = [go_templates.request(conversation) for conversation in conversations]
    written = marks.template()
    assert [used.encoded_part(go_templates.read(written, each)) for each in requests] == expected
    if go_templates.has_go():
        assert [used.encoded_part(text) for text in go_templates.by_go(written, requests)] == expected


def test_a_template_without_a_counterpart_is_refused(tmp_path):
    with pytest.raises(ExportError, match=r"first or the last turn|one after the other"):
        ollama_templates.find(renderer(tmp_path, COUNTED), (), "")


def test_the_token_that_llama_cpp_writes_is_not_in_the_template(tmp_path):
    used = renderer(tmp_path, LLAMA3)
    assert "endoftext" in ollama_templates.find(used, (), "").template()
    assert "endoftext" not in ollama_templates.find(used, (), "<|endoftext|>").template()


def test_neighbours_of_one_role_are_joined_as_ollama_does():
    given = go_templates.request(Conversation((SAID, TURNS[0], TURNS[0], TURNS[1])))
    assert given.System == SAID.content
    assert [message.Content for message in given.Messages[1:]] == ["the cat\n\nthe cat", TURNS[1].content]


def test_what_our_reading_does_not_know_is_an_error():
    given = go_templates.request(Conversation(TURNS))
    for template in ("{{ json .Messages }}", "{{ if .System }}never ended"):
        with pytest.raises(ExportError):
            go_templates.read(template, given)


def train(folder: Path, model: Path, system: str) -> Path:
    rows = [
        {"messages": [{"role": "system", "content": system}, *row["conversations"]]}
        for row in tiny.conversations(24)
    ]
    path = tiny.write_rows(folder / "rows.jsonl", rows)
    sets = ["loop.steps=8", "optimizer.learning_rate=0.01", "adapter.targets=all-linear"]
    config = tunesmith.configure(model=str(model), data=[str(path)], sets=sets)
    tunesmith.train(config, out=folder / "run")
    return folder / "run"


@pytest.fixture(scope="module")
def run(tmp_path_factory, tiny_model) -> Path:
    return train(tmp_path_factory.mktemp("ollama"), tiny_model, "be brief")


@pytest.mark.parametrize("system", ['be "brief"', 'say """ once'])
def test_a_system_message_that_a_modelfile_cannot_hold_is_left_out_and_said(system, tmp_path, tiny_model):
    exported = tunesmith.export(train(tmp_path, tiny_model, system), to="ollama", rows=2)
    assert exported.accepted and any("quotes that a Modelfile" in remark for remark in exported.remarks)
    assert "SYSTEM" not in (exported.path / "Modelfile").read_text()


def test_a_go_that_does_not_build_rejects_nothing(run, tmp_path, monkeypatch):
    program = tmp_path / "bin" / "go"
    program.parent.mkdir()
    program.write_text("#!/bin/sh\necho 'no GOROOT' >&2\nexit 2\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(program.parent), prepend=os.pathsep)
    exported = tunesmith.export(run, to="ollama", out=tmp_path / "out", rows=2)
    assert exported.accepted
    assert "Go does not build: no GOROOT: the template was read by tunesmith alone" in exported.remarks
    program.write_text("#!/bin/sh\nsleep 60\n")
    monkeypatch.setattr(go_templates, "TIMEOUT_S", 0.2)
    with pytest.raises(go_templates.BrokenGo, match="timed out"):
        go_templates.by_go("{{ .System }}", [])


def test_a_folder_for_ollama_has_model_template_stops_and_system(run, tmp_path):
    exported = tunesmith.export(run, to="ollama", out=tmp_path / "out", rows=3)
    assert exported.accepted and exported.remarks[0] == "use: ollama create run -f Modelfile"
    modelfile = (tmp_path / "out" / "Modelfile").read_text()
    assert re.search(r"^FROM \./model-q8_0\.gguf$", modelfile, re.M)
    assert (tmp_path / "out" / "model-q8_0.gguf").exists()
    assert 'PARAMETER stop "<|im_end|>"' in modelfile and 'SYSTEM """be brief"""' in modelfile


def test_end_tokens_that_a_modelfile_cannot_hold_are_said(run, tmp_path, monkeypatch):
    texts = {1: "<|im_end|>", 2: 'say "end"', 3: "\n\n", 4: ""}
    renderer: Any = SimpleNamespace(decode=lambda ids: texts[ids[0]])
    assert ollama._stops(renderer, [1, 2, 3, 4]) == ["<|im_end|>"]
    assert ollama._unwritten_stops(renderer, [1]) == []
    (remark,) = ollama._unwritten_stops(renderer, [1, 2, 3, 4])
    assert """end tokens 'say "end"', '\\n\\n', '' as stop""" in remark
    monkeypatch.setattr(ollama, "_fits_a_line", lambda text: False)
    with pytest.raises(ExportError, match="does not stop at"):  # the fresh process can write it
        tunesmith.export(run, to="ollama", out=tmp_path / "out", rows=2)
    record = json.loads((tmp_path / "out.rejected" / "export.json").read_text())
    assert any("'<|im_end|>'" in remark for remark in record["remarks"])


def without_template(text: str) -> str:
    return re.sub(r'TEMPLATE """.*?"""', "", text, flags=re.S)


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (without_template, "the Modelfile has no TEMPLATE"),
        (lambda text: text.replace('{{ "<|im_end|>\\n', '{{ "\\n'), "other ids: Ollama's template gives"),
        (lambda text: text.replace("{{- range", "{{- rang"), "Ollama's template: "),
        (lambda text: text.replace("be brief", "be long"), "another system message than the rows"),
        (lambda text: text.partition("SYSTEM")[0], "another system message than the rows"),
        (lambda text: re.sub("PARAMETER stop .*\n", "", text), "does not stop at <|im_end|>"),
    ],
    ids=["no template", "no end token", "not a template", "other system", "no system", "no stop"],
)
def test_a_spoiled_modelfile_is_rejected_and_named(run, spoil, reason, tmp_path, monkeypatch):
    """ollama 6823: no TEMPLATE."""
    write = Ollama.write

    def spoiled(self, tuned, folder, notify):
        notes = write(self, tuned, folder, notify)
        text = (folder / "Modelfile").read_text()
        assert spoil(text) != text
        (folder / "Modelfile").write_text(spoil(text))
        return notes

    monkeypatch.setattr(Ollama, "write", spoiled)
    with pytest.raises(ExportError, match=re.escape(reason)):
        tunesmith.export(run, to="ollama", out=tmp_path / "out", rows=2)
    record = json.loads((tmp_path / "out.rejected" / "export.json").read_text())
    assert any(reason in line for line in record["reasons"])


def test_rows_that_ollama_cannot_ask_are_refused():
    tools = {"type": "function", "function": {"name": "search"}}
    with pytest.raises(ExportError, match="different tools"):
        ollama._tools([Conversation(TURNS, (tools,)), Conversation(TURNS)])
    assert ollama._tools([Conversation(TURNS, (tools,))] * 2) == (tools,)
    result = (TURNS[0], Message("tool", "42"), TURNS[1])
    assert not ollama._prompts([Conversation(result)])
    assert len(ollama._prompts([Conversation(TURNS)])) == 1


def test_go_is_asked_if_it_is_installed(monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda _: None)
    assert not go_templates.has_go()
    assert go_templates.render("{{ .System }}", [Conversation((SAID, *TURNS))]) == [SAID.content]


def test_of_a_gguf_base_only_the_changed_tensors_are_announced_in_the_bits_of_the_kind():
    tuned: Any = SimpleNamespace(source=SimpleNamespace(path=__file__))  # a file
    told = kind.named("ollama").announcement(tuned)
    assert told.endswith("what changed as Q8_0, all else as in the base") and "bits a weight" not in told
    tuned.source.path = str(Path(__file__).parent)
    assert kind.named("ollama").announcement(tuned) == kind.named("ollama").what
