"""The last screen of the demo: what changed, and commands that work as they are typed."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

import tiny
from tunesmith.demo import __main__ as script

QUICK = ["adapter.layers=2", "loop.epochs=0.1", "loop.validate_every=0", "loop.samples=0", "data.valid=0.1"]


@pytest.fixture(scope="module")
def screen(tmp_path_factory) -> tuple[str, dict, Path]:
    """What the demo prints on stdout for a tiny model, its last line, and the folder, whose name has a
    space."""
    folder = tmp_path_factory.mktemp("demo of") / "a newcomer"
    folder.mkdir()
    model = tiny.write_llama(folder / "tiny")
    code = f"""
import sys
from pathlib import Path
from tunesmith.demo import __main__ as script
script.fetch_model = lambda folder: Path({str(model)!r})
script.TASKS = ("perplexity", "tool_calls")
script.MAX_TOKENS = 8
sys.argv = ["demo", "--out", "demo", "--rows", "60", *(word for one in {QUICK!r} for word in ("--set", one))]
script.main()
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout, json.loads(done.stdout.splitlines()[-1]), folder


def test_it_shows_the_loss_before_and_after(screen):
    text, result, _ = screen
    before, after, rows = re.search(
        r"^loss     (\S+) → (\S+) nats a token, on (\d+) held", text, re.M
    ).groups()
    assert (float(before), float(after)) == (result["val_loss_before"], result["val_loss_after"])
    assert float(after) < float(before) and int(rows) > 0


def test_it_marks_answers_that_were_cut(screen):
    text, _, _ = screen
    prompts = re.findall(r"^prompt   \S", text, re.M)
    assert len(prompts) == script.SHOWN
    # A model of random weights does not end its answers.
    assert len(re.findall(r" … \[cut at 8 tokens\]$", text, re.M)) == 2 * script.SHOWN


def test_it_ends_with_two_artefacts_and_their_fidelity(screen):
    text, result, folder = screen
    shown = dict(re.findall(r"^(?:exports  |         )(gguf-q8_0|mlx-4bit), \S+ MB, (KL \S+)", text, re.M))
    assert shown.keys() == result["exports"].keys() == {"gguf-q8_0", "mlx-4bit"}
    report = (folder / result["report"]).with_name("report.md").read_text()
    assert all(kind in report for kind in shown)


def test_its_commands_work_as_they_are_typed(screen):
    text, result, folder = screen
    report = re.search(r"^report   (.+)$", text, re.M)[1]
    assert subprocess.run(f"test -s {report}", shell=True, cwd=folder).returncode == 0
    assert (folder / result["report"]).is_file()
    ask = re.search(r"^ask it   (.+)$", text, re.M)[1]
    done = subprocess.run(ask, shell=True, cwd=folder, input="\n", capture_output=True, text=True)
    assert done.returncode == 0 and done.stderr.endswith("> "), done.stderr


def test_a_command_is_quoted_and_names_the_environments_own_program(monkeypatch, tmp_path):
    program = tmp_path / "my env" / "bin"
    program.mkdir(parents=True)
    monkeypatch.setattr(sys, "executable", str(program / "python"))
    monkeypatch.chdir(tmp_path)
    assert script.command("chat", "a b") == f"'{program / 'python'}' -m tunesmith chat 'a b'"
    (program / "tunesmith").touch(0o755)
    assert script.command("chat", "a b") == "'my env/bin/tunesmith' chat 'a b'"
    monkeypatch.setenv("PATH", str(program))
    assert script.command("chat", "a b") == "tunesmith chat 'a b'"
