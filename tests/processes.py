"""What the tests run beside themselves: processes that share one model, and a terminal that keeps what it
shows."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

import pytest

from tunesmith.machine import backend

TUNESMITH = [str(Path(sys.executable).with_name("tunesmith"))]
# Tests run several at a time, and a ring listens on fixed ports: each process of tests has its own, below
# those given to anybody.
_PORT = 20000 + os.getpid() % 6000 * 2
LAUNCH = [
    str(Path(sys.executable).with_name("mlx.launch")),
    "-n",
    "2",
    "--backend",
    "ring",
    "--starting-port",
    str(_PORT),
    "--",
]
TWO_RANKS = [sys.executable, str(Path(__file__).with_name("two_ranks.py")), str(_PORT)]
KERNELS = backend.cache_folder() / "kernels"


def cache_folder(folder: Path) -> Path:
    """An empty folder for TUNESMITH_CACHE, but for the kernels: a process that starts would compile them, for
    ten seconds."""
    folder.mkdir(parents=True)
    KERNELS.mkdir(parents=True, exist_ok=True)
    (folder / "kernels").symlink_to(KERNELS)
    return folder


@contextmanager
def terminal(
    monkeypatch: pytest.MonkeyPatch, during: Callable[[list[bytes]], None] | None = None, **environ: str
) -> Iterator[tuple[TextIO, list[bytes]]]:
    """A pseudo-terminal of 100 × 40, and what it receives, whole at the end. ``during`` reads along in a
    thread of its own."""
    import pty

    for name in ("NO_COLOR", "FORCE_COLOR", "TERM"):
        monkeypatch.delenv(name, raising=False)
    for name, value in ({"TERM": "xterm-256color", "COLUMNS": "100", "LINES": "40"} | environ).items():
        monkeypatch.setenv(name, value)
    master, slave = pty.openpty()
    received: list[bytes] = []

    def drain() -> None:
        try:
            while block := os.read(master, 65536):
                received.append(block)
        except OSError:  # Linux reports the closed other end so
            pass

    threads = [threading.Thread(target=drain)]
    threads += [threading.Thread(target=during, args=(received,))] if during else []
    for thread in threads:
        thread.start()
    try:
        with os.fdopen(slave, "w") as stream:
            yield stream, received
    finally:
        for thread in threads:
            thread.join(timeout=120)
        os.close(master)
