"""Commands of pages, run as a reader would type them.

A block is a fence ``console``. Its lines that begin with ``$ `` are commands (``> `` continues one), the
lines after a command are its output, both streams together. All blocks of a page run in order in one folder,
which has a tiny model at ``MODEL`` and labelled chats in ``mine.jsonl``. `FILES` has what a page can ask for
beside them: ``<!-- needs: runs/a pairs.jsonl -->`` at its top.

In the output a line ``…`` stands for any lines, ``…`` within a line for any text. A number matches any other,
and so does a size, a duration or a pace. How many blanks stand between two words is not compared. A command
whose exit status is not 0 fails, unless its output ends with ``[exit status 3]``.

A comment in the line before the fence says where the block runs: ``<!-- demo -->`` beside the finished run of
``make demo`` (the tier ``real``), ``<!-- not run: REASON -->`` nowhere."""

from __future__ import annotations

import difflib
import os
import re
import select
import shlex
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import forks

import tiny
from processes import cache_folder
from tunesmith.demo import data

PROGRAMS = Path(sys.executable).parent
FENCE = re.compile(r"^(?:<!-- (demo|not run: [^\n]+) -->\n)?```console\n(.*?)^```$", re.M | re.S)
NEEDS = re.compile(r"^<!-- needs: (.+) -->$", re.M)
STATUS = re.compile(r"\[exit status (\d+)\]")
SHELL = set("|&;<>()$`*?[]{}~#\\\n")
"""A command with one of these is run by the shell, which takes longer."""
LONGEST_S = 300
NUMBER = r"(?<![\w.])[-+−]?\d[\d,]*(?:\.\d+)*(?:e[-+]?\d+)?"
QUANTITIES = (
    (re.compile(rf"{NUMBER} h \d+ m\b|{NUMBER} m \d+ s\b|{NUMBER} (?:ms|s|min|h)\b(?! each)"), "<time>"),
    (re.compile(rf"{NUMBER} (?:[kMGT]?B|bytes?)\b"), "<size>"),
    (re.compile(rf"(?:{NUMBER}|{NUMBER} m \d+) s each|{NUMBER}/s\b"), "<pace>"),
    (re.compile(NUMBER), "<number>"),
    (re.compile(r"\d+"), "<digits>"),
)


@dataclass(frozen=True)
class Command:
    """``line``: where it stands in its page. ``output``: the lines shown after it."""

    line: int
    text: str
    output: tuple[str, ...]


@dataclass(frozen=True)
class Block:
    """``mark``: empty, ``demo``, or ``not run: REASON``."""

    mark: str
    commands: tuple[Command, ...]


def blocks(page: str) -> list[Block]:
    """Raises ValueError for a block that does not begin with a command."""
    return [
        Block(match[1] or "", tuple(_commands(match[2], page.count("\n", 0, match.start(2)) + 1)))
        for match in FENCE.finditer(page)
    ]


def _commands(body: str, first: int) -> Iterator[Command]:
    text: list[str] = []
    output: list[str] = []
    start = first
    for number, line in enumerate(body.splitlines(), first):
        if line.startswith("$ "):
            if text:
                yield Command(start, "\n".join(text), tuple(output))
            start, text, output = number, [line[2:]], []
        elif not text:
            raise ValueError(f"line {number}: a block begins with a command: $ …")
        elif line.startswith("> ") and not output:
            text.append(line[2:])
        else:
            output.append(line)
    if text:
        yield Command(start, "\n".join(text), tuple(output))


def needs(page: str) -> list[str]:
    """The names of `FILES` that the page asks for."""
    return [name for match in NEEDS.finditer(page) for name in match[1].split()]


def difference(output: Sequence[str], actual: Sequence[str]) -> str:
    """Empty if ``actual`` is what ``output`` shows, else both, line by line."""
    wanted, given = _ended(output), _ended(actual)
    patterns = [None if line.strip() == "…" else re.compile(_pattern(line)) for line in wanted]
    plain = [_plain(line) for line in given]
    if _matches(patterns, plain):
        return ""
    same = {
        number: line
        for pattern, line in zip(patterns, wanted, strict=True)
        for number, text in enumerate(plain)
        if pattern is not None and pattern.fullmatch(text)
    }
    shown = [same.get(number, line) for number, line in enumerate(given)]
    return "\n".join(difflib.unified_diff(wanted, shown, "the page", "the command", n=3, lineterm=""))


def _ended(lines: Sequence[str]) -> list[str]:
    """Without blank lines at the end."""
    return "\n".join(line.rstrip() for line in lines).rstrip("\n").split("\n")


def _plain(line: str) -> str:
    """Numbers by their kinds, one blank between words, rulers of one length."""
    line = re.sub(r"([─━═-])\1{2,}", r"\1\1\1", " ".join(line.split()))
    for pattern, kind in QUANTITIES:
        line = pattern.sub(kind, line)
    return line


def _pattern(line: str) -> str:
    return ".*".join(map(re.escape, _plain(line).split("…")))


def _matches(patterns: Sequence[re.Pattern[str] | None], lines: Sequence[str]) -> bool:
    """Whether the lines are those of the patterns, of which None stands for any lines."""
    reached = {0}  # how many lines the patterns so far can have taken
    for pattern in patterns:
        if pattern is None:
            reached = set(range(min(reached), len(lines) + 1))
        else:
            reached = {n + 1 for n in reached if n < len(lines) and pattern.fullmatch(lines[n])}
        if not reached:
            return False
    return len(lines) in reached


class Reader:
    """Somebody who types the commands of a page in ``folder``. What a command exports, and where it changes
    to, holds for the next one; what it leaves running is killed at the end."""

    def __init__(self, folder: Path, **environ: str) -> None:
        self.scratch = folder.with_name(f"{folder.name}-reader")
        cache = cache_folder(self.scratch / "cache")
        self.output = self.scratch / "output"
        path = f"{PROGRAMS}{os.pathsep}{os.environ['PATH']}"
        kept = {name: value for name, value in os.environ.items() if name not in ("COLUMNS", "LINES")}
        self.environ = kept | {"PATH": path, "TUNESMITH_CACHE": str(cache), "PYTHONUNBUFFERED": "1"} | environ
        self.folder = folder
        self.shell: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Reader:
        return self

    def __exit__(self, *error: object) -> None:
        if self.shell is not None:
            os.killpg(self.shell.pid, signal.SIGKILL)
            self.shell.communicate()

    def type(self, text: str) -> tuple[int, list[str]]:
        """The exit status of the command, and the lines it wrote to both streams."""
        self.output.unlink(missing_ok=True)
        words = [] if SHELL & set(text) else shlex.split(text)
        if words[:1] == ["tunesmith"]:
            folder, environ = self._state()
            status = forks.shared().start(words, environ, folder, self.output, self.output).wait()
        else:
            status = self._ask_shell(text)
        return status, self.output.read_text("utf-8", errors="replace").splitlines()

    def _state(self) -> tuple[Path, dict[str, str]]:
        """The folder and the environment that the last command of the shell has left."""
        if self.shell is None:
            return self.folder, self.environ
        folder, *exported = (self.scratch / "state").read_text("utf-8").rstrip("\0").split("\0")
        return Path(folder), dict(entry.split("=", 1) for entry in exported)

    def _ask_shell(self, text: str) -> int:
        if self.shell is None:
            pipe = subprocess.PIPE
            self.shell = subprocess.Popen(
                ["bash", "--norc"],
                cwd=self.folder,
                env=self.environ,
                stdin=pipe,
                stdout=pipe,
                stderr=subprocess.STDOUT,
                bufsize=0,
                start_new_session=True,
            )
        assert self.shell.stdin is not None and self.shell.stdout is not None
        script = self.scratch / "script"
        script.write_text(text + "\n")
        read, output, state = (
            shlex.quote(str(self.scratch / name)) for name in ("script", "output", "state")
        )
        keep = f"printf '%s\\0' \"$PWD\" >{state}; env -0 >>{state}"
        self.shell.stdin.write(f". {read} >{output} 2>&1 </dev/null; echo $? $({keep})\n".encode())
        if not select.select([self.shell.stdout], [], [], LONGEST_S)[0]:
            raise TimeoutError(f"no end of {text} in {LONGEST_S} s")
        return int(self.shell.stdout.readline())


def failures(where: str, commands: Sequence[Command], reader: Reader) -> list[str]:
    """Run the commands up to the first that does not do what its page shows, and describe that one."""
    for command in commands:
        shown = list(command.output)
        ending = STATUS.fullmatch(shown[-1]) if shown else None
        status, lines = reader.type(command.text)
        differs = difference(shown[:-1] if ending else shown, lines)
        if status != (int(ending[1]) if ending else 0) or differs:
            whole = "\n".join(lines)
            return [
                f"{where}:{command.line}: $ {command.text}\nexit status {status}\n{differs}\n\nall:\n{whole}"
            ]
    return []


def chats(folder: Path) -> None:
    """MODEL and mine.jsonl."""
    tiny.write_llama(folder / "MODEL")
    data.write(folder / "mine.jsonl", 120, seed=0)


def _pairs(reader: Reader) -> None:
    """Right and wrong answers to the same requests."""
    rows = []
    for row in data.generate(120, seed=1):
        asked, answered = row["conversations"]  # type: ignore[misc]
        if row["fault"]:
            prompt = [asked]
            good = [{"role": "assistant", "content": row["expected"]}]
            rows.append({"prompt": prompt, "chosen": good, "rejected": [answered]})
    tiny.write_rows(reader.folder / "pairs.jsonl", rows)


def _general(reader: Reader) -> None:
    tiny.write_rows(reader.folder / "general.jsonl", tiny.conversations(40))


def _run(name: str, seed: int) -> Callable[[Reader], None]:
    words = f"--out {name} --set loop.steps=4 --set loop.seed={seed} --set loop.samples=0"

    def make(reader: Reader) -> None:
        status, lines = reader.type(f"tunesmith train --model MODEL --data mine.jsonl {words}")
        assert status == 0, "\n".join(lines)

    return make


def _evaluated(name: str) -> Callable[[Reader], None]:
    def make(reader: Reader) -> None:
        FILES[name](reader)
        status, lines = reader.type(
            f"tunesmith evaluate {name} --task perplexity --task tool_calls --max-tokens 8"
        )
        assert status == 0, "\n".join(lines)

    return make


FILES: dict[str, Callable[[Reader], None]] = {
    "pairs.jsonl": _pairs,
    "general.jsonl": _general,
    "runs/a": _run("runs/a", 1),
    "runs/b": _run("runs/b", 2),
    "runs/a:evaluated": _evaluated("runs/a"),
    "runs/b:evaluated": _evaluated("runs/b"),
}
"""What a page can ask for, and how it is made: rows of pairs, other chats, runs of four updates."""
