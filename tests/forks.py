"""Processes of tunesmith without the two seconds that their imports take: forks of one process that has
imported the package and what it uses, and has computed nothing.

A test of the start itself starts a process of its own: of imports, of the BLAS, of variables that libraries
read when they are imported, of several ranks."""

from __future__ import annotations

import atexit
import functools
import gc
import json
import os
import runpy
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal, TextIO

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
        self.server = subprocess.Popen(words, stdin=pipe, stdout=pipe, text=True, env=environ)
        atexit.register(self.close)

    def close(self) -> None:
        """End the process: it has no more requests to read."""
        atexit.unregister(self.close)
        self.server.communicate(timeout=60)

    def run(
        self, words: Sequence[str], environ: Mapping[str, str], folder: Path
    ) -> subprocess.CompletedProcess[str]:
        assert self.server.stdin is not None and self.server.stdout is not None
        with tempfile.TemporaryDirectory(prefix="fork-") as name:
            request = Path(name)
            content = {"words": list(words), "environ": dict(environ), "folder": str(folder)}
            (request / "request.json").write_text(json.dumps(content))
            self.server.stdin.write(f"{request}\n")
            self.server.stdin.flush()
            status = int(self.server.stdout.readline())
            out, err = ((request / name).read_text() for name in ("out", "err"))
        return subprocess.CompletedProcess(list(words), status, out, err)


@functools.cache
def _shared() -> Forks:
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
    words = [str(word) for word in command]
    assert words[0] == sys.executable
    start = words.index("-m")
    assert set(words[1:start]) <= {"-P"}
    return _shared().run(words[start + 1 :], os.environ if env is None else env, cwd or Path.cwd())


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


def _serve() -> Path | None:
    """Fork for each request. Returns in the forks, with the folder of the request, and None at the end."""
    while folder := sys.stdin.readline().strip():
        child = os.fork()
        if child == 0:
            return Path(folder)
        _, status = os.waitpid(child, 0)
        print(os.waitstatus_to_exitcode(status), flush=True)
    return None


def _become(request: Path) -> None:
    """Run the module of the request as Python runs it."""
    content = json.loads((request / "request.json").read_text())
    os.chdir(content["folder"])
    os.environ.clear()
    os.environ.update(content["environ"])
    for handle, name, flags in (
        (0, os.devnull, os.O_RDONLY),
        (1, request / "out", os.O_WRONLY | os.O_CREAT),
        (2, request / "err", os.O_WRONLY | os.O_CREAT),
    ):
        os.dup2(os.open(name, flags), handle)
    sys.stdin = open(0)
    module, *sys.argv[1:] = content["words"]
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
