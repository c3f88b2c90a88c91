"""Whatever call a verb is killed at, or finds the disk full at, the same verb goes on to the same bytes, the
reports are there and nothing is left over; `faults` says how."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import faults
import pytest

SCRIPT = Path(faults.__file__)


def swept(folder: Path, *words: str) -> None:
    """In a process of its own, which has computed nothing before it forks."""
    command = [sys.executable, str(SCRIPT), str(folder), *words]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_killed_at_a_few_calls(tmp_path):
    swept(tmp_path, "kill", "2", "sft")


def test_a_full_disk_at_a_few_calls(tmp_path):
    swept(tmp_path, "full", "2", "kto")


@pytest.mark.sweep
@pytest.mark.parametrize("fault", ["kill", "full"])
def test_lives_of_six_kinds(tmp_path, fault):
    swept(tmp_path, fault, "200")
