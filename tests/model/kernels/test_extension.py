"""Where there is a compiler there are compiled kernels: elsewhere their tests are skipped."""

from __future__ import annotations

import re
import shutil
import sysconfig
from pathlib import Path

import pytest

from tunesmith.events import silent
from tunesmith.machine import backend
from tunesmith.model.kernels import extension

pytestmark = pytest.mark.skipif(
    not (backend.setup().kind == "cpu" and backend.on_linux() and shutil.which("g++"))
    or not Path(sysconfig.get_path("include"), "Python.h").is_file(),
    reason="no Linux CPU with a compiler",
)


def test_a_machine_with_a_compiler_has_the_kernels():
    assert extension.load().missing == ""


@pytest.mark.real  # compiles for a quarter of a minute
def test_every_loop_that_is_marked_for_vectors_has_them(tmp_path, monkeypatch):
    """A store that may change a pointer of its own loop costs a kernel its vectors, and nothing else shows
    it."""
    report = tmp_path / "report"
    monkeypatch.setenv("TUNESMITH_CACHE", str(tmp_path))
    monkeypatch.setenv("TUNESMITH_CXXFLAGS", f"-fopt-info-vec={report}")
    assert extension._compiled(silent).is_file()
    vectors = {
        (name, int(line))
        for name, line in re.findall(r"(\w+\.h):(\d+):\d+: optimized: loop", report.read_text())
    }
    marked = 0
    for source in extension.SOURCES.glob("*.h"):
        for line, text in enumerate(source.read_text().splitlines(), 1):
            if "#pragma omp simd" in text:
                marked += 1
                assert {(source.name, line + below) for below in (0, 1, 2)} & vectors, f"{source.name}:{line}"
    assert marked > 20
