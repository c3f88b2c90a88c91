"""Lives of runs that end at a call that changes the disk: killed there, or with the disk full from there on.

``python tests/faults.py FOLDER kill|full N [KIND …]`` tries N calls, drawn over kinds of run and over what is
done with them, and prints what differs from a life that nothing disturbed. A life is a fork of this process,
which has imported the package and computed nothing."""

from __future__ import annotations

import errno
import json
import os
import random
import shutil
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import tiny
from tunesmith.machine import imports

Fault = Literal["kill", "full"]
CHANGES = ("os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate", "os.link", "os.symlink")
GROWS = ("os.rename", "os.mkdir", "os.link", "os.symlink", "open", "fsync")
"""What needs room on the disk."""
SETS = ["loop.steps=4", "loop.save_every=1", "loop.keep_last=2", "loop.validate_every=2", "loop.samples=1"]
SETS += [
    "loop.sample_tokens=4",
    "batch.sequences=4",
    "batch.micro=2",
    "adapter.rank=2",
    "adapter.dropout=0.1",
]
SETS += ["optimizer.learning_rate=0.01", "audit.before_training=false"]
KINDS: dict[str, tuple[str, list[str]]] = {
    "sft": ("chat", ["audit.before_training=true"]),
    "kto": ("labelled", ["objective=kto"]),
    "dpo": ("pairs", ["objective=dpo"]),
    "full weights": ("chat", ["adapter.kind=full", "adapter.rank=", "adapter.dropout="]),
    "packed": ("chat", ["batch.pack=true"]),
    "quantised": ("chat", ["model.quantize=4", "adapter.full_modules=[input_layernorm]"]),
}
"""Kind of run → its rows, and settings that differ; without a value they are left out."""


class Calls:
    """Counts the calls of this process that change something in ``folder``; the call number ``at`` meets the
    fault."""

    def __init__(self, folder: Path, fault: Fault | None, at: int) -> None:
        self.folder, self.fault, self.at, self.count = str(folder), fault, at, 0

    def install(self) -> None:
        sys.addaudithook(self._audited)
        fsync = os.fsync

        def counted(handle: int) -> None:
            self._meet("fsync", os.readlink(f"/proc/self/fd/{handle}"))
            fsync(handle)

        os.fsync = counted

    def _audited(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open":
            path, _, flags = arguments
            if isinstance(path, str | bytes) and flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
                self._meet(event, os.fsdecode(path))
        elif event in CHANGES and isinstance(arguments[0], str | bytes | os.PathLike):
            self._meet(event, os.fsdecode(arguments[0]))

    def _meet(self, event: str, path: str) -> None:
        if not os.path.abspath(path).startswith(self.folder):
            return
        if self.fault == "kill" and self.count == self.at:
            os.kill(os.getpid(), signal.SIGKILL)
        full = self.fault == "full" and self.count >= self.at and event in GROWS
        self.count += 1
        if full:
            raise OSError(errno.ENOSPC, "No space left on device", path)


@dataclass
class Life:
    """How a life ended: ``code`` is negative for a signal. ``calls``: how many there were."""

    code: int
    said: str
    calls: int = 0


def live(folder: Path, words: list[str], fault: Fault | None = None, at: int = 0) -> Life:
    """``tunesmith`` with ``words``, in a process of its own."""
    told, counted = folder.with_name(f"{folder.name}.told"), folder.with_name(f"{folder.name}.count")
    child = os.fork()
    if child == 0:
        try:
            _be(folder, words, Calls(folder, fault, at), told, counted)
        finally:
            os._exit(70)
    _, status = os.waitpid(child, 0)
    calls = int(counted.read_text()) if counted.exists() else 0
    counted.unlink(missing_ok=True)
    return Life(os.waitstatus_to_exitcode(status), told.read_text(errors="replace"), calls)


def _be(folder: Path, words: list[str], calls: Calls, told: Path, counted: Path) -> None:
    from tunesmith import cli

    os.chdir(folder)  # where the audit writes its page
    stream = os.open(told, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(stream, 1)
    os.dup2(stream, 2)
    os.environ |= {"TUNESMITH_CACHE": str(folder / "cache"), "TUNESMITH_KERNELS": "off"}
    sys.argv[1:] = words
    code: int | str | None = 0
    calls.install()
    try:
        cli.main()
    except SystemExit as error:
        code = error.code
    except BaseException:
        import traceback

        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    calls.fault = None
    counted.write_text(str(calls.count))
    os._exit(code if isinstance(code, int) else 1)


@dataclass
class Stage:
    """One verb in the life of a run. ``again``: the words with which a user goes on, in ``folder``."""

    name: str
    words: Callable[[Path], list[str]]
    again: Callable[[Path], list[str]] | None = None
    after: str | None = None  # the stage whose folder it begins with
    checked: dict[str, bytes] = field(default_factory=dict)
    calls: int = 0


def rows(folder: Path, kind: str) -> Path:
    """A file of rows outside of the folder of the run."""
    path = folder / f"{kind}.jsonl"
    conversations = tiny.conversations(12)
    if kind == "labelled":
        conversations = [{**row, "label": number % 2 == 0} for number, row in enumerate(conversations)]
    if kind == "pairs":
        bad = [{"role": "assistant", "content": "the timers"}]
        conversations = [
            {"prompt": row["conversations"][:-1], "chosen": row["conversations"][-1:], "rejected": bad}
            for row in conversations
        ]
    if kind == "faulty":
        double = {
            "messages": [{"role": "user", "content": "hello  "}, {"role": "assistant", "content": "the mat"}]
        }
        conversations = [*conversations, double, double, conversations[0]]
    return tiny.write_rows(path, conversations)


def stages(folder: Path, kind: str) -> list[Stage]:
    """The life of a run of ``kind``, whose model and rows are in ``folder``."""
    data, changes = KINDS[kind]
    settings = dict(text.split("=", 1) for text in (*SETS, *changes))
    sets = [word for key, value in settings.items() if value for word in ("--set", f"{key}={value}")]
    files, faulty = rows(folder, data), rows(folder, "faulty")

    def train(place: Path) -> list[str]:
        return [
            "train",
            "--model",
            str(folder / "model"),
            "--data",
            str(files),
            "--out",
            str(place / "run"),
            *sets,
        ]

    def resume(place: Path) -> list[str]:
        return ["train", "--resume", str(place / "run")] if (place / "run").exists() else train(place)

    tasks = ["--task", "perplexity", "--task", "adherence" if data == "chat" else "preference"]
    evaluate = [*tasks, "--limit", "2", "--max-tokens", "4"]
    to = "hf" if kind in ("full weights", "quantised") else "mlx"
    return [
        Stage("train", train, resume),
        Stage("evaluate", lambda place: ["evaluate", str(place / "run"), *evaluate], after="train"),
        Stage(
            "export", lambda place: ["export", str(place / "run"), "--to", to, "--rows", "1"], after="train"
        ),
        Stage("fix", lambda place: ["audit", str(faulty), "--fix", str(place / "fixed.jsonl")]),
    ]


VOLATILE = (
    "events.jsonl",
    "training.log",
    "manifest.json",
    "origin.json",
    "config.yaml",
    "plan.json",
    "cursor.json",
)
TIMED = ("at", "seconds", "created", "path", "size_bytes", "measured", "machine", "kept")


def content(place: Path) -> dict[str, bytes]:
    """What must be equal: every name, and the bytes that hold no time and no path."""
    found: dict[str, bytes] = {}
    for path in sorted(place.rglob("*")):
        name = str(path.relative_to(place))
        if path.is_dir() or name.startswith("cache") or path.name == ".lock":
            continue
        found[name] = b""
        if path.suffix in (".safetensors", ".jsonl") and path.name not in VOLATILE:
            found[name] = path.read_bytes()
        if path.name == "score.json":
            found[name] = json.dumps(_timeless(json.loads(path.read_text()))).encode()
    return found


def _timeless(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _timeless(item) for key, item in value.items() if key not in TIMED}
    return [_timeless(item) for item in value] if isinstance(value, list) else value


def prepared(folder: Path, kind: str) -> list[Stage]:
    """The stages with what they make if nothing disturbs them; their folders lie in ``folder``."""
    made = stages(folder, kind)
    for stage in made:
        place = folder / f"{kind} {stage.name} straight"
        _begin(folder, kind, stage, place)
        life = live(place, stage.words(place))
        assert life.code == 0, f"{kind}, {stage.name}: {life.said}"
        stage.checked, stage.calls = content(place), life.calls
    return made


def _begin(folder: Path, kind: str, stage: Stage, place: Path) -> None:
    shutil.rmtree(place, ignore_errors=True)
    if stage.after is None:
        place.mkdir()
    else:
        shutil.copytree(folder / f"{kind} {stage.after} straight", place)


def disturbed(folder: Path, kind: str, stage: Stage, fault: Fault, at: int) -> list[str]:
    """What is wrong with the life whose call number ``at`` meets the fault, and which then goes on."""
    place = folder / f"{kind} {stage.name} straight"  # paths are in some of the files
    aside = place.with_name(f"{place.name} aside")
    place.rename(aside)
    try:
        _begin(folder, kind, stage, place)
        life = live(place, stage.words(place), fault, at)
        problems = []
        if fault == "kill" and life.code not in (0, -signal.SIGKILL):
            problems.append(f"ended with {life.code}: {life.said[-800:]}")
        if fault == "full" and (life.code < 0 or "Traceback" in life.said):
            problems.append(f"full disk: ended with {life.code}: {life.said[-2500:]}")
        if fault == "full" and life.code > 0 and "full" not in life.said and "space" not in life.said:
            problems.append(f"full disk: not said: {life.said[-800:]}")
        if life.code != 0:
            words = (stage.again or stage.words)(place)
            after = live(place, words)
            if after.code != 0 and "exists already" not in after.said:
                return [*problems, f"goes on with {after.code}: {after.said[-1500:]}"]
        now = content(place)
        problems += [f"left over: {name}" for name in now.keys() - stage.checked.keys()]
        problems += [f"missing: {name}" for name in stage.checked.keys() - now.keys()]
        problems += [
            f"differs: {name}"
            for name in now.keys() & stage.checked.keys()
            if now[name] != stage.checked[name]
        ]
        return problems
    finally:
        shutil.rmtree(place, ignore_errors=True)
        aside.rename(place)


def model(folder: Path) -> None:
    if not (folder / "model").exists():
        tiny.write_llama(folder / "model")


def sweep(folder: Path, fault: Fault, count: int, kinds: list[str]) -> list[str]:
    """The problems of ``count`` lives, spread evenly over kinds and stages. Prints them as they are found."""
    imports.hide("torch")  # as the command line does
    import transformers  # noqa: F401  # once, before the forks

    folder.mkdir(parents=True, exist_ok=True)
    model(folder)
    chosen, told = random.Random(count), []
    for number, kind in enumerate(kinds):
        made = prepared(folder, kind)
        share = count // len(kinds) + (number < count % len(kinds))
        print(f"{kind}: calls { ({stage.name: stage.calls for stage in made}) }, {share} tried", flush=True)
        for turn in range(share):
            stage = made[(0, 0, 1, 2, 3)[turn % 5]]
            at = chosen.randrange(stage.calls)
            began = time.monotonic()
            for problem in disturbed(folder, kind, stage, fault, at):
                told.append(f"{kind}, {stage.name}, {fault} at {at} of {stage.calls}: {problem}")
                print(told[-1], flush=True)
            if time.monotonic() - began > 60:
                print(f"{kind}, {stage.name}: took {time.monotonic() - began:.0f} s", flush=True)
    return told


def main() -> None:
    folder, fault, count = Path(sys.argv[1]).resolve(), sys.argv[2], int(sys.argv[3])
    if fault not in ("kill", "full"):
        sys.exit("kill or full")
    told = sweep(folder, fault, count, sys.argv[4:] or [*KINDS])
    print(f"{count} lives, {len(told)} problems")
    sys.exit(bool(told))


if __name__ == "__main__":
    main()
