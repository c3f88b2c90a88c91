"""Input that is hostile or absurd gets an answer within seconds, in little memory, without a traceback."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import time
from pathlib import Path

import hostility
import pytest
from typer.testing import CliRunner

import tiny
import tunesmith
from tunesmith.cli import app
from tunesmith.data.formats import DataSpec, rows
from tunesmith.errors import ConfigError
from tunesmith.runs import configure
from tunesmith.runs.config import MOST_STEPS
from tunesmith.tokens import batches
from tunesmith.tokens.batches import BatchSpec, Cut, Plan

SECONDS, MEMORY = 20, 2 << 30
ESCAPES = "\x1b]0;title\x07\x1b]52;c;eA==\x07\x1b[2J\x9b1A\rend"


def limited() -> None:
    resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS))


MEASURED = """
import resource, subprocess, sys
code = subprocess.call(sys.argv[2:])
peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
with open(sys.argv[1], "w") as file:
    file.write(str(peak))
sys.exit(code if code >= 0 else 128 - code)
"""
"""Runs a command and writes its peak memory in bytes. A small process between the command and the tests: a
fork's peak begins with the memory of its parent, and that of the children counts all that there were."""


def answered(*words: object, cwd: Path) -> subprocess.CompletedProcess[str]:
    """What the command printed, within the limits of time and memory."""
    path = os.pathsep.join([str(Path(tunesmith.__file__).parents[1])])
    peak = cwd / "peak-memory"
    peak.unlink(missing_ok=True)
    done = subprocess.run(
        [sys.executable, "-c", MEASURED, str(peak), sys.executable, "-m", "tunesmith", *map(str, words)],
        cwd=cwd,
        env=os.environ | {"PYTHONPATH": path},
        input="",
        capture_output=True,
        text=True,
        errors="surrogateescape",
        preexec_fn=limited,
    )
    assert 0 <= done.returncode < 128, f"killed by signal {done.returncode - 128} after {SECONDS} s of work"
    assert "Traceback" not in done.stderr, done.stderr
    assert int(peak.read_text()) < MEMORY
    return done


BOMB = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{name}: &{name} [{', '.join(['*' + before] * 9)}]\n"
    for before, name in zip("abcdefgh", "bcdefghi", strict=True)
)


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (BOMB, "has more than 20,000 values\nhint: aliases"),
        ("a: &a [*a]", "not readable as YAML"),
        ("a: " + "[" * 5000, "not readable as YAML"),
        ("# " + "x" * 300_000, "has more than 256 kB\nhint: settings are a few kilobytes"),
        ('model: {path: "\\ud800"}', "holds half of a surrogate pair"),
        (f"model: {{path: {'x' * 5000}}}", "a text has 5,000 characters, more than 4,096: xxx"),
        (f"model: {{path: 0x{'f' * 4000}}}", "cannot be read as tag:yaml.org,2002:int"),
    ],
)
def test_settings_that_no_file_should_hold(tmp_path, content, told):
    (tmp_path / "run.yaml").write_text(content)
    began = time.monotonic()
    with pytest.raises(ConfigError) as caught:
        configure.configure(config=[tmp_path / "run.yaml"])
    assert told in str(caught.value) and len(str(caught.value)) < 1000
    assert time.monotonic() - began < SECONDS


def test_a_device_that_never_ends_is_not_read_to_its_end(tmp_path):
    began = time.monotonic()
    with pytest.raises(ConfigError, match="has more than 256 kB"):
        configure.configure(config=[Path("/dev/zero")])
    assert time.monotonic() - began < SECONDS


@pytest.mark.parametrize(
    "setting",
    [
        "loop.steps=100000000",
        "loop.epochs=1e7",
        "loop.sample_tokens=100000000000000000000",
        "loop.seed=100000000000000000000",
        "optimizer.learning_rate=1e308",
        "optimizer.learning_rate=1e-320",
        "batch.length=100000000000000000000",
        "batch.sequences=100000000000000000000",
    ],
)
def test_numbers_beyond_any_use_are_refused_with_the_range(setting):
    with pytest.raises(ConfigError, match=rf"{setting.partition('=')[0]}: must be .* not "):
        configure.configure(model="m", data=["x"], sets=[setting])


@pytest.mark.parametrize("path", ["a" * 3000, "a\udcffb"])
def test_names_that_no_file_can_have(path):
    result = CliRunner().invoke(app, ["train", "--dry-run", "--model", path, "--data", "rows.jsonl"])
    assert isinstance(result.exception, ConfigError | OSError)  # `main` prints either in one line


def test_a_plan_looks_at_no_more_updates_than_it_needs():
    lengths = tuple(range(1, 65))
    plan = Plan(lengths, 8, Cut.of(BatchSpec(), lengths), 0, max_steps=MOST_STEPS)
    began = time.monotonic()
    assert max(lengths[member] for member in plan.largest()) == 64
    assert time.monotonic() - began < SECONDS


def test_epochs_that_make_too_many_updates_are_refused(tiny_model, tmp_path):
    data = tiny.write_rows(tmp_path / "rows.jsonl", tiny.conversations(24))
    sets = ["loop.epochs=999999", "audit.before_training=false"]
    settings = configure.configure(model=str(tiny_model), data=[str(data)], sets=sets)
    with pytest.raises(ConfigError, match=r"loop\.epochs: makes 2,\d+,\d+ updates of these rows"):
        tunesmith.plan(settings)


WORDS = " ".join(f"word{number}" for number in range(1_200_000))
LONG = {
    "words": {"text": WORDS},
    "one word": {"text": "x" * 10_000_000},
    "a question": {"messages": [{"role": "user", "content": WORDS}, {"role": "assistant", "content": "yes"}]},
    "turns": {
        "messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}] * 500_000
    },
}


@pytest.mark.parametrize("name", LONG)
def test_rows_of_ten_megabytes_are_left_out_before_they_are_worked_on(tmp_path, name):
    (tmp_path / "rows.jsonl").write_text(json.dumps(LONG[name]))
    done = answered("show", "rows.jsonl", "--set", "data.max_dropped=1", cwd=tmp_path)
    assert "too_long" in done.stderr and len(done.stderr) < 2000


@pytest.mark.parametrize(
    "name", ["words", *(pytest.param(name, marks=pytest.mark.real) for name in LONG if name != "words")]
)
def test_of_rows_of_ten_megabytes_the_audit_looks_at_the_beginning(tmp_path, name):
    (tmp_path / "rows.jsonl").write_text(json.dumps(LONG[name]))
    done = answered("audit", "rows.jsonl", cwd=tmp_path)
    assert "looks at the beginning" in done.stderr or name == "turns"  # too many messages are no row


def test_of_a_conversation_with_too_many_messages_no_message_is_read(tmp_path):
    (tmp_path / "rows.jsonl").write_text(json.dumps(LONG["turns"]))
    (dropped,) = rows([tmp_path / "rows.jsonl"], DataSpec(train=("x",)))
    assert (dropped.reason, "at most 20,000 messages" in dropped.message) == ("too_long", True)


def test_control_sequences_of_the_data_are_written_out_unless_asked(tmp_path):
    row = {
        "messages": [
            {"role": "user", "content": ESCAPES},
            {"role": "assistant", "content": "a\tb\n" + ESCAPES},
        ]
    }
    (tmp_path / "rows.jsonl").write_text(json.dumps(row))
    shown = CliRunner().invoke(app, ["show", str(tmp_path / "rows.jsonl")])
    assert not set(shown.output) & set("\x1b\x07\x9b\r")
    assert "\\x1b]0;title\\x07\\x1b]52;c;eA==\\x07\\x1b[2J\\x9b1A\\x0dend" in shown.output
    assert "a\tb\n" in shown.output
    raw = CliRunner().invoke(app, ["show", str(tmp_path / "rows.jsonl"), "--control"])
    assert "\x1b]0;title\x07" in raw.output  # not those of colours, which are left out where no terminal is


def test_control_sequences_in_errors_answers_and_json_are_written_out(tmp_path, monkeypatch, capsys):
    from tunesmith import cli
    from tunesmith.cli import options
    from tunesmith.errors import DataError
    from tunesmith.runs import talk

    def fail() -> None:
        raise DataError(ESCAPES, where=ESCAPES)

    monkeypatch.setattr(cli, "app", fail)
    monkeypatch.setattr(sys, "argv", ["tunesmith"])
    with pytest.raises(SystemExit):
        cli.main()
    options.print_json({"answer": ESCAPES + "\udc9b"})
    printed = capsys.readouterr()
    assert not set(printed.err + printed.out) & set("\x1b\x07\x9b\r\udc9b")
    assert json.loads(printed.out) == {"answer": ESCAPES + "\udc9b"}
    monkeypatch.setattr(talk, "generate", lambda *_words, **_options: [ESCAPES])
    monkeypatch.setitem(vars(tunesmith), "generate", lambda *_words, **_options: [ESCAPES])
    asked = ["generate", "model", "--prompt", "hello"]
    assert "\x1b" not in CliRunner().invoke(app, asked).output
    assert "\x1b" in CliRunner().invoke(app, [*asked, "--control"]).output


def test_an_error_of_the_system_is_one_line(tmp_path, monkeypatch, capsys):
    from tunesmith import cli

    def fail() -> None:
        (tmp_path / ("x" * 300)).write_text("")

    monkeypatch.setattr(cli, "app", fail)
    monkeypatch.setattr(sys, "argv", ["tunesmith"])
    with pytest.raises(SystemExit, match="1"):
        cli.main()
    assert capsys.readouterr().err.endswith("x: File name too long\n")


def test_what_is_looked_at_before_a_run_holds_every_row(monkeypatch):
    monkeypatch.setattr(batches, "LOOKED_AT", 3)
    lengths = tuple(range(10, 50))
    plan = Plan(lengths, 1, Cut.of(BatchSpec(), lengths), 0, max_steps=400)
    assert plan.largest() == [lengths.index(49)]
    assert {member for step in plan.looked_at for member in plan.members(step)} == set(range(40))
    assert len(plan.looked_at) == 40


@pytest.mark.parametrize(
    ("first", "last"), [(0, 200), pytest.param(200, 10_000, marks=pytest.mark.sweep)], ids=["few", "all"]
)
def test_generated_rows_and_settings_are_answered(tmp_path, first, last):
    command = [sys.executable, hostility.__file__, str(tmp_path), str(first), str(last)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
