"""Every verb that reads a run reads it, or names the file that is damaged; `wounds` says how."""

from __future__ import annotations

import subprocess
import sys

import pytest
import wounds


@pytest.mark.sweep
def test_every_file_damaged_in_every_way_under_every_verb(tmp_path):
    done = subprocess.run([sys.executable, wounds.__file__, str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
