"""Where there is a compiler there are compiled kernels: elsewhere their tests are skipped."""

from __future__ import annotations

import shutil
import sysconfig
from pathlib import Path

import pytest

from tunesmith.machine import backend
from tunesmith.model.kernels import extension


@pytest.mark.skipif(
    not (backend.setup().kind == "cpu" and backend.on_linux() and shutil.which("g++"))
    or not Path(sysconfig.get_path("include"), "Python.h").is_file(),
    reason="no Linux CPU with a compiler",
)
def test_a_machine_with_a_compiler_has_the_kernels():
    assert extension.load().missing == ""
