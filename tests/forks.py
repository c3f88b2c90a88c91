"""Processes of tunesmith without the two seconds that their imports take: forks of one process that has
imported the package and what it uses, and has computed nothing.

A test of the start itself starts a process of its own: of imports, of the BLAS, of variables that libraries
read when they are imported, of several ranks."""

from __future__ import annotations

import atexit
import functools
import gc
import io
import json
import os
import runpy
import select
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Literal, TextIO

MODULES = (
    "mlx_lm.utils",
    "transformers.models.auto.tokenization_auto",
    "matplotlib.backends.backend_agg",
    "scipy.stats",
    "tunesmith.cli",
    "tunesmith.exports.verb",
    "tunesmith.reports.verbs",
)
"""Imported before the forks."""


class Forks:
    """A process that has imported ``modules``, found on ``path``, and of which others are forks. They run one
    after the other."""

    def __init__(self, modules: Sequence[str] = MODULES, path: Sequence[str] = ()) -> None:
        words = [sys.executable, "-P", __file__, *modules]
        environ = os.environ | {"PYTHONPATH": os.pathsep.join(path or sys.path)}
        pipe = subprocess.PIPE
        self.server = subprocess.Popen(words, stdin=pipe, stdout=pipe, bufsize=0, env=environ)
        self.last: Fork | None = None
        atexit.register(self.close)

    def close(self) -> None:
        """End the process: it has no more requests to read."""
        atexit.unregister(self.close)
        self.server.communicate(timeout=60)

    def start(
        self, words: Sequence[str], environ: Mapping[str, str], folder: Path, out: Path, err: Path
    ) -> Fork:
        """``words``: a module and its arguments. They work in ``folder`` and write to ``out`` and ``err``.

        A fork that a failed test has left running is killed first."""
        assert self.server.stdin is not None and self.server.stdout is not None
        if self.last is not None and self.last.poll() is None:
            self.last.send_signal(signal.SIGKILL)
            self.last.wait()
        names = {"folder": str(folder), "out": str(out), "err": str(err)}
        request = {"words": list(words), "environ": dict(environ), **names}
        self.server.stdin.write(json.dumps(request).encode() + b"\n")
        self.last = Fork(int(self.server.stdout.readline()), self.server.stdout)
        return self.last

    def run(
        self, words: Sequence[str], environ: Mapping[str, str], folder: Path
    ) -> subprocess.CompletedProcess[str]:
        with tempfile.TemporaryDirectory(prefix="fork-") as name:
            out, err = Path(name, "out"), Path(name, "err")
            status = self.start(words, environ, folder, out, err).wait()
            return subprocess.CompletedProcess(list(words), status, out.read_text(), err.read_text())


@dataclass
class Fork:
    """A process that runs, or has ended with ``returncode``. ``statuses``: where the server writes it."""

    pid: int
    statuses: IO[bytes]
    returncode: int | None = None

    def poll(self) -> int | None:
        if self.returncode is None and select.select([self.statuses], [], [], 0)[0]:
            self.returncode = int(self.statuses.readline())
        return self.returncode

    def wait(self) -> int:
        if self.returncode is None:
            self.returncode = int(self.statuses.readline())
        return self.returncode

    def send_signal(self, number: int) -> None:
        os.kill(self.pid, number)


@functools.cache
def shared() -> Forks:
    """The one of all tests of this process."""
    return Forks()


def run(
    command: Sequence[object],
    *,
    cwd: Path | None = None,
    env: Mapping[str, str] | None = None,
    capture_output: Literal[True] = True,
    text: Literal[True] = True,
    check: Literal[False] = False,
) -> subprocess.CompletedProcess[str]:
    """What `subprocess.run` returns for ``command``, which is ``python -m MODULE WORDS…``. Its input is
    empty."""
    return shared().run(_module_of(command), os.environ if env is None else env, cwd or Path.cwd())


def _module_of(command: Sequence[object]) -> list[str]:
    """The module that ``command`` runs, and its arguments."""
    words = [str(word) for word in command]
    assert words[0] == sys.executable
    start = words.index("-m")
    assert set(words[1:start]) <= {"-P"}
    return words[start + 1 :]


class Ended:
    """What `subprocess.Popen` gives for ``command``, of a process that has ended: its output is read from a
    list, not as it is written."""

    def __init__(
        self, command: Sequence[object], *, stdout: int, stderr: TextIO, text: Literal[True]
    ) -> None:
        assert stdout == subprocess.PIPE
        done = run(command)
        stderr.write(done.stderr)
        self.stdout = done.stdout.splitlines(keepends=True)
        self.returncode = done.returncode

    def __enter__(self) -> Ended:
        return self

    def __exit__(self, *error: object) -> None:
        pass

    def kill(self) -> None:
        pass


def _serve() -> dict[str, Any] | None:
    """Fork for each request. Returns the request in the forks, and None at the end."""
    while line := sys.stdin.readline():
        child = os.fork()
        if child == 0:
            return json.loads(line)
        print(child, flush=True)
        _, status = os.waitpid(child, 0)
        print(os.waitstatus_to_exitcode(status), flush=True)
    return None


def _become(request: dict[str, Any]) -> None:
    """Run the module of the request as Python runs it."""
    os.chdir(request["folder"])
    os.environ.clear()
    os.environ.update(request["environ"])
    writing = os.O_WRONLY | os.O_CREAT | os.O_APPEND
    for handle, name, flags in (
        (0, os.devnull, os.O_RDONLY),
        (1, request["out"], writing),
        (2, request["err"], writing),
    ):
        os.dup2(os.open(name, flags), handle)
    sys.stdin = open(0)
    if os.environ.get("PYTHONUNBUFFERED") and isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(line_buffering=True)
    module, *sys.argv[1:] = request["words"]
    sys.modules.pop(module, None)
    runpy.run_module(module, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    from importlib import import_module

    from tunesmith.machine import backend, imports

    imports.hide("torch")  # as the command line does
    backend.setup()
    for imported in sys.argv[1:]:
        import_module(imported)
    gc.freeze()  # the collector touches no page that forks share
    if asked := _serve():
        _become(asked)
