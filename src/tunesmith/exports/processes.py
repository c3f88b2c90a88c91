"""Processes in which an artefact is read: their progress is told in this one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple

from tunesmith.events import Event, Sink, Working

SAID = "said.txt"
"""What such a process wrote to the standard error."""


class EndedProcess(NamedTuple):
    """``status``: minus the number of the signal that ended it, or its exit status. ``said``: what it wrote
    to the standard error."""

    status: int
    said: str

    @property
    def last_line(self) -> str:
        return (self.said.strip().splitlines() or [f"exit status {self.status}"])[-1]


def follow(module: str, folder: Path, notify: Sink) -> EndedProcess:
    """Run ``python -m module folder`` until it ends; its progress goes to ``notify``."""
    # -P: without it, Python imports files of the working folder, such as a random.py, first.
    words = [sys.executable, "-P", "-m", module, str(folder)]
    with (folder / SAID).open("w+", encoding="utf-8", errors="replace") as said:
        with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=said, text=True) as child:
            try:
                assert child.stdout is not None
                for line in child.stdout:
                    if line.endswith("\n"):  # else the process was ended while it wrote
                        notify(Working(**json.loads(line)))
            except BaseException:
                child.kill()
                raise
        said.seek(0)
        return EndedProcess(child.returncode, said.read())


def reporter() -> Sink:
    """In such a process: a sink of progress for `follow`, which reads the standard output. What libraries
    print there goes to the standard error from now on."""
    stream = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)

    def write(event: Event) -> None:
        if isinstance(event, Working):
            stream.write(json.dumps(asdict(event)) + "\n")
            stream.flush()

    return write
