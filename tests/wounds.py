"""Runs of which one file is damaged, and what every verb that reads a run makes of them.

``python tests/wounds.py FOLDER STEP`` trains a tiny run, and damages copies of it, each file in each way, of
which every STEPth case is tried. A case is a fork of this process, which has computed nothing."""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import signal
import sys
import traceback
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import faults

import tiny
from tunesmith.machine import imports

SECONDS = 60
"""A verb that takes longer hangs; other programs may keep the cores busy."""
CHANGES: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda content: b"",
    "cut": lambda content: content[: len(content) // 2],
    "random": lambda content: bytes((7 * place * place + 13) % 256 for place in range(len(content))),
    "a list": lambda content: b"[]",
    "no keys": lambda content: b"{}",
    "a key is missing": lambda content: re.sub(
        rb'^(\s*)"?\w+"?: ', rb"\1other: ", content, count=1, flags=re.M
    ),
    "texts for values": lambda content: re.sub(
        rb": (-?\d|true|false|null|\{|\[)", rb': "x", "y": \1', content
    ),
    "null for values": lambda content: re.sub(rb": (-?[\d.]+|true|false|\"[^\"]*\")", b": null", content),
    "huge": lambda content: content * (1 + (8 << 20) // max(len(content), 1)),
}
PLACES = ("a folder", "unreadable", "deleted")


def wound(path: Path, damage: str) -> None:
    content = path.read_bytes()
    path.unlink()
    if damage == "a folder":
        path.mkdir()
    elif damage == "unreadable":  # for root, too
        path.symlink_to(path.name)
    elif damage != "deleted":
        path.write_bytes(CHANGES[damage](content))


def verbs(run: Path, model: Path) -> list[list[str]]:
    """Reading ones first."""
    asked = ["--max-tokens", "2"]
    return [
        ["report", str(run)],
        ["watch", str(run), "--once"],
        ["compare", str(run), str(run.parent / "other"), "--out", str(run.parent / "compared")],
        ["runs", "--folder", str(run.parent)],
        ["runs", "show", str(run)],
        ["runs", "prune", "--folder", str(run.parent)],
        ["plan", "--record", "--folder", str(run.parent)],
        ["tag", str(run), "mine:1"],
        ["generate", str(run), "--prompt", "the cat", *asked],
        ["chat", str(run), *asked],
        ["show", str(run / "data" / "valid.jsonl"), "--model", str(model)],
        ["train", "--config", str(run / "config.yaml"), "--dry-run"],
        ["evaluate", str(run), "--task", "perplexity", "--limit", "1", *asked],
        ["export", str(run), "--to", "mlx", "--rows", "1", "--out", str(run.parent / "artefact")],
        ["train", "--resume", str(run)],
    ]


class Hang(BaseException):
    """Raised by the alarm."""


def said(words: list[str]) -> tuple[int, str]:
    """The exit status of a verb in this process and what it printed; 99 after a traceback."""
    from tunesmith import cli

    def stop(number: int, frame: object) -> None:
        raise Hang

    sys.argv[1:], sys.stdin = words, io.StringIO("hello\n")
    printed = io.StringIO()
    signal.signal(signal.SIGALRM, stop)
    signal.alarm(SECONDS)
    try:
        with redirect_stdout(printed), redirect_stderr(printed):
            cli.main()
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else 0 if error.code is None else 1
        return (99 if "Traceback" in printed.getvalue() else code), printed.getvalue()
    except BaseException:
        return 99, traceback.format_exc()
    finally:
        signal.alarm(0)
    return 0, printed.getvalue()


def problems(run: Path, model: Path, name: str) -> list[str]:
    """What is wrong with the answers of all verbs, ``name`` being the file that is damaged."""
    told: list[str] = []
    for words in verbs(run, model):
        code, text = said(words)
        if code == 99:
            told.append(f"{' '.join(words[:2])}: {text[-1500:]}")
        elif code and Path(name).name not in text and Path(name).parent.name not in text:
            told.append(f"{' '.join(words[:2])}: names no file ({code}): {text[-300:]}")
        elif code == 1:
            told.append(f"{' '.join(words[:2])}: no cure: {text[-300:]}")
    return told


def forked(work: Callable[[], list[str]], folder: Path) -> list[str]:
    """What ``work`` returns, in a process of its own."""
    answer = folder / "answer.json"
    answer.unlink(missing_ok=True)
    child = os.fork()
    if child == 0:
        os.environ |= {"TUNESMITH_CACHE": str(folder / "cache"), "TUNESMITH_KERNELS": "off"}
        os.chdir(folder)
        try:
            answer.write_text(json.dumps(work()))
        finally:
            os._exit(0)
    _, status = os.waitpid(child, 0)
    return json.loads(answer.read_text()) if answer.exists() else [f"ended with status {status}"]


def prepared(folder: Path) -> tuple[Path, Path]:
    """A run that was trained, evaluated and exported, and its model."""
    folder.mkdir(parents=True, exist_ok=True)
    faults.model(folder)
    data = tiny.write_rows(folder / "rows.jsonl", tiny.conversations(12))
    run, model = folder / "whole" / "run", folder / "model"
    sets = [word for text in faults.SETS for word in ("--set", text)]
    lives = [
        ["train", "--model", str(model), "--data", str(data), "--out", str(run), *sets],
        ["evaluate", str(run), "--task", "perplexity", "--limit", "2", "--max-tokens", "2"],
        ["export", str(run), "--to", "mlx", "--rows", "1"],
        ["tag", str(run), "first:1"],
    ]
    for words in lives:
        told = forked(lambda words=words: [f"{code}{text}" for code, text in [said(words)]], folder)
        assert told[0].startswith("0"), told
    return run, model


def sweep(folder: Path) -> int:
    imports.hide("torch")  # as the command line does
    import transformers  # noqa: F401  # once, before the forks

    run, model = prepared(folder)
    names = sorted(str(path.relative_to(run)) for path in run.rglob("*") if path.is_file())
    assert len(names) > 15, names
    cases = [(name, damage) for name in names for damage in (*CHANGES, *PLACES)]
    count = 0
    for name, damage in cases:
        case = folder / "case"
        shutil.rmtree(case, ignore_errors=True)
        for copy in ("run", "other"):
            shutil.copytree(run, case / copy)
        wound(case / "run" / name, damage)
        for problem in forked(lambda case=case, name=name: problems(case / "run", model, name), folder):
            count += 1
            print(f"{name}, {damage}: {problem}", flush=True)
    print(f"{len(cases)} damaged runs, {count} problems", flush=True)
    return count


if __name__ == "__main__":
    sys.exit(bool(sweep(Path(sys.argv[1]).resolve())))
