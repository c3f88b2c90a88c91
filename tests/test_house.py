"""The house: nothing heavy is imported early."""

from __future__ import annotations

import subprocess
import sys


def loaded_after(statement: str) -> set[str]:
    code = f"import sys; {statement}; print(' '.join(sys.modules))"
    return set(
        subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True
        ).stdout.split()
    )


def test_the_first_folders_and_the_command_line_load_neither_mlx_nor_transformers():
    first = "tunesmith.errors, tunesmith.files, tunesmith.settings.config, tunesmith.machine.backend"
    data = "tunesmith.display.console, tunesmith.data.formats, tunesmith.data.calls"
    for statement in (
        f"import {first}",
        f"import {data}",
        "import tunesmith.cli",
        "import tunesmith.preflight.doctor",
    ):
        assert loaded_after(statement).isdisjoint(
            {"mlx.core", "mlx_lm", "transformers", "matplotlib", "scipy"}
        ), statement
