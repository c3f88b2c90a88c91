"""The demonstration itself: SmolLM2-135M from the package registry learns tool calls, and every promise is
measured."""

from __future__ import annotations

import contextlib
import importlib
import io
import json
import os
import re
import shutil
from pathlib import Path

import pytest

import tunesmith
from documents import blocks
from tunesmith.demo import __main__ as demo
from tunesmith.demo import data as demo_data
from tunesmith.runs import checkpoints
from tunesmith.runs.directory import Run

pytestmark = pytest.mark.real
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> tuple[dict, str]:
    """What the demo returns, and what it prints on stdout."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        result = demo.demo(tmp_path_factory.mktemp("made") / "demo")
    return result, printed.getvalue()


@pytest.fixture(scope="module")
def shown(made) -> dict:
    return made[0]


DEMO = [
    (page, command)
    for page in [ROOT / "README.md", *sorted((ROOT / "docs" / "guides").rglob("*.md"))]
    for block in blocks.blocks(page.read_text("utf-8"))
    for command in block.commands
    if block.mark == "demo"
]


LABEL = re.compile(r"(prompt|before|after|loss|verdict|exports|report|ask it)  ")
SAME = ("loss", "report", "ask it")
"""Lines that no machine prints otherwise, but for their numbers. Answers, verdict and what becomes of an
artefact depend on rounding, and on whether llama.cpp judges."""


def labelled(lines) -> list[tuple[str, str]]:
    """(label, line) of the demo's last screen."""
    return [(match[1], line) for line in lines if (match := LABEL.match(line))]


def compare_screens(page: list[str], printed: list[str]) -> None:
    shown, given = labelled(page), labelled(printed)
    answers, rest = ["prompt", "before", "after"], ["loss", "verdict", "exports", "report", "ask it"]
    assert [label for label, _ in shown] == answers + rest
    assert [label for label, _ in given] == answers * demo.SHOWN + rest
    for label, line in shown:
        if label in SAME:
            assert blocks.difference([line], [dict(given)[label]]) == ""
    for screen in (page, printed):
        artefacts = [kind for kind in demo.KINDS if any(f"{kind}, " in line for line in screen)]
        assert artefacts == [*demo.KINDS]
    heads = ("Do not ship: ", "Not shown to be fit to ship: ", "Fit to ship: ")
    assert dict(shown)["verdict"][9:].startswith(heads) and dict(given)["verdict"][9:].startswith(heads)


def test_blocks_of_pages_on_the_demo_do_what_they_show(made, tmp_path):
    """The demo itself is compared with what it printed; other commands run beside a copy of its folder."""
    result, printed = made
    folder = Path(result["report"]).parents[2]
    shutil.copytree(folder, tmp_path / "page" / "demo")
    printed = re.sub(r"\S*bin/tunesmith ", "tunesmith ", printed.replace(f"{folder.parent}/", ""))
    with blocks.Reader(tmp_path / "page") as reader:
        for page, command in DEMO:
            if command.text == "python -m tunesmith.demo":
                compare_screens(list(command.output), printed.splitlines())
            else:
                assert not blocks.failures(page.name, [command], reader)
    assert len(DEMO) >= 2


def test_the_demo_halves_the_loss_and_learns_the_calls(shown):
    assert shown["val_loss_after"] < shown["val_loss_before"] / 2
    assert shown["tool_calls_before"] < 0.1 and shown["tool_calls_after"] > 0.5
    report = Path(shown["report"])
    assert shown["verdict"] == json.loads((report.parent / "report.json").read_text())["verdict"]
    assert "tool_calls" in report.read_text() and (report.parent / "curves.png").stat().st_size > 10_000


def test_the_demo_keeps_what_its_base_knew(shown):
    """Answers depend on rounding, so that another machine may leave a target open; none is missed."""
    report = json.loads((Path(shown["report"]).parent / "report.json").read_text())
    assert not shown["verdict"].startswith("Do not ship"), report["verdict"]
    scores = {(score["task"], score["name"]): score for score in report["scores"] if not score["part"]}
    assert scores["drift.text", "likelihood"]["met"] and scores["drift.knowledge", "accuracy"]["met"]
    assert scores["drift.chat", "kl"]["value"] < 0.06


def test_mlx_lm_reads_the_checkpoint_as_it_is(shown):
    """The same greedy answer through mlx-lm's own loading."""
    run = Run.open(Path(shown["report"]).parent)
    (examples,) = run.path.glob("evals/tool_calls@*/examples.jsonl")
    prompt = json.loads(examples.read_text().splitlines()[0])
    assert prompt["tuned"] in (0.0, 1.0)
    question = "Call Grace at 4 pm."
    (ours,) = tunesmith.generate(run.path, [question], max_tokens=40)
    from tunesmith.model import loading as model

    mlx_lm = importlib.import_module("mlx_lm")
    folder = model.resolve(run.config.model.path, dtype="auto")
    net, tokenizer = mlx_lm.load(str(folder), adapter_path=str(checkpoints.choose(run, "best")))
    ids = tokenizer.apply_chat_template([{"role": "user", "content": question}], add_generation_prompt=True)
    assert mlx_lm.generate(net, tokenizer, ids, max_tokens=40).strip() == ours.strip()


def test_a_demo_model_already_there_is_not_fetched_again(shown, monkeypatch):
    folder = Path(shown["report"]).parents[2] / "model"
    before = {path: os.stat(path).st_mtime_ns for path in folder.iterdir()}
    monkeypatch.setattr(demo.subprocess, "run", None)
    assert demo.fetch_model(folder).suffix == ".gguf"
    assert before == {path: os.stat(path).st_mtime_ns for path in folder.iterdir()} and len(before) == 1


def tuned(gguf: Path, folder: Path, rows: list[dict], **sets) -> Path:
    """A short run on ``rows``, with the demo's settings."""
    data = folder / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = [f"{key.replace('__', '.')}={value}" for key, value in ({"loop__samples": 0} | sets).items()]
    settings = tunesmith.configure(preset="smollm2-demo", model=str(gguf), data=[str(data)], sets=words)
    run = tunesmith.train(settings, out=folder / "run")
    assert run is not None
    return run.path


def test_a_run_on_wrong_tool_names_is_called_by_its_fault(shown, tmp_path):
    names = [tool.name for tool in demo_data.TWELVE]
    wrong = dict(zip(names, names[1:] + names[:1], strict=True))
    rows = demo_data.generate(system=demo_data.SYSTEM, tools=demo_data.TWELVE)
    for row in rows:
        for turn in row["conversations"]:
            name = turn["content"].partition("tool_call: ")[2].partition("\n")[0]
            turn["content"] = turn["content"].replace(
                f"tool_call: {name}\n", f"tool_call: {wrong.get(name, name)}\n"
            )
    right = Path(shown["report"]).parent
    gguf = right.parents[1] / "model" / Path(demo.MEMBER).name
    other = tuned(gguf, tmp_path, rows, loop__steps=30)
    asked = tmp_path / "asked.jsonl"
    asked.write_text("\n".join((right / "data" / "valid.jsonl").read_text().splitlines()[:16]) + "\n")
    for run in (right, other):
        tunesmith.evaluate(run, data=[str(asked)], tasks=["tool_calls"], max_tokens=60)
    found = tunesmith.compare([right, other], out=tmp_path / "comparison")
    (tools,) = [pair for pair in found.sides[0].pairs if pair.first.task == "tool_calls"]
    told = {score.name: score for score in tools.scores if score.part is None}
    assert told["right_tool"].verdict == told["tool_calls"].verdict == "regressed"
    assert told["right_tool"].value < 0.2 and told["well_formed"].value > told["right_tool"].value, (
        "sound calls of other tools"
    )
    assert found.verdict.endswith("is worse than A (" + right.name + ") at the task")
    (reason,) = [reason for reason in found.reasons if reason.code == "task_regressed"]
    assert "Tool calls right" in reason.text
