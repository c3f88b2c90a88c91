"""Every verb that reads a run reads it, or names the file that is damaged; `wounds` says how."""

from __future__ import annotations

import subprocess
import sys

import pytest
import wounds


@pytest.mark.parametrize(
    "step",
    [pytest.param("192", marks=pytest.mark.real), pytest.param("1", marks=pytest.mark.sweep)],
    ids=["every 192nd", "every"],
)
def test_every_file_damaged_in_every_way_under_every_verb(tmp_path, step):
    done = subprocess.run(
        [sys.executable, wounds.__file__, str(tmp_path), step], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
