"""Nothing heavy is imported early, and `make lint` refuses what breaks the order of the folders."""

from __future__ import annotations

import ast
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import tunesmith

ROOT = Path(__file__).parents[1]


HEAVY = {"mlx.core", "mlx_lm", "transformers", "matplotlib", "scipy", "sklearn", "pydantic", "jinja2"}


def loaded_after(statement: str) -> set[str]:
    code = f"import sys; {statement}; print(' '.join(sys.modules))"
    words = [sys.executable, "-c", code]
    return set(subprocess.run(words, capture_output=True, text=True, check=True).stdout.split())


def test_the_first_folders_load_neither_mlx_nor_transformers():
    first = "tunesmith.errors, tunesmith.files, tunesmith.settings.config, tunesmith.machine.backend"
    data = "tunesmith.display.console, tunesmith.data.formats, tunesmith.data.calls"
    for statement in (f"import {first}", f"import {data}", "import tunesmith.preflight.doctor"):
        assert loaded_after(statement).isdisjoint(HEAVY - {"pydantic"}), statement


def test_the_package_and_its_help_load_no_verb():
    assert loaded_after("import tunesmith").isdisjoint(HEAVY)
    asked = "from tunesmith.cli import app; app(['--help'], standalone_mode=False)"
    loaded = loaded_after(asked)
    assert loaded.isdisjoint(HEAVY) and "tunesmith.cli.training" in loaded
    assert loaded.isdisjoint(tunesmith.VERBS.values())


def test_every_verb_is_in_the_table_and_is_defined_where_it_says():
    assert sorted(tunesmith.VERBS) == tunesmith.__all__ and len(tunesmith.VERBS) >= 13
    for verb, module in tunesmith.VERBS.items():
        function = getattr(tunesmith, verb)
        assert (function.__module__, function.__name__) == (module, verb)
    with pytest.raises(AttributeError, match="no attribute 'tarin'"):
        tunesmith.tarin  # noqa: B018


def test_without_mlx_the_package_has_its_verbs_and_each_raises_when_it_is_called():
    code = (
        "import sys; sys.modules['mlx'] = sys.modules['mlx.core'] = None; import tunesmith\n"
        "print(hasattr(tunesmith, 'train'), hasattr(tunesmith, 'tarin'), dir(tunesmith))\n"
        "tunesmith.train()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.startswith("True False ")
    assert set(tunesmith.__all__) <= set(ast.literal_eval(done.stdout.removeprefix("True False ")))
    assert "SetupError: MLX cannot be loaded" in done.stderr


@pytest.fixture
def copy(tmp_path) -> Path:
    """A copy of the package with what `make lint` reads beside it."""
    shutil.copytree(ROOT / "src", tmp_path / "src", ignore=shutil.ignore_patterns("__pycache__", "*.gguf"))
    shutil.copytree(ROOT / ".ci", tmp_path / ".ci")
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    return tmp_path


def lint(copy: Path, *command: str) -> str:
    """What the command of `make lint` says of the copy, which it must refuse."""
    assert " ".join(command) in (ROOT / "Makefile").read_text("utf-8"), "make lint runs it"
    program, *arguments = command
    environ = os.environ | {"PYTHONPATH": str(copy / "src"), "COLUMNS": "500"}
    words = [str(Path(sys.executable).with_name(program)), *arguments]
    done = subprocess.run(words, cwd=copy, env=environ, capture_output=True, text=True)
    assert done.returncode == 1, done.stdout + done.stderr
    return done.stdout


@pytest.mark.parametrize(
    "statement",
    [
        "from tunesmith.cli import main",
        "def later():\n    from tunesmith.cli import main\n",
        "from typing import TYPE_CHECKING\n\nif TYPE_CHECKING:\n    from tunesmith.cli import main\n",
    ],
    ids=["plain", "lazy", "types only"],
)
def test_lint_refuses_an_import_of_a_folder_above(copy, statement):
    (copy / "src/tunesmith/data/planted.py").write_text(statement)
    assert "tunesmith.data.planted -> tunesmith.cli " in lint(copy, "lint-imports", "--no-cache")


def test_lint_refuses_a_folder_that_has_no_place_in_the_order(copy):
    (copy / "src/tunesmith/helpers").mkdir()
    (copy / "src/tunesmith/helpers/__init__.py").write_text("")
    assert "tunesmith.helpers" in lint(copy, "lint-imports", "--no-cache")
    named = "tunesmith/helpers/__init__.py: a name that says nothing\n"
    assert named in lint(copy, "python", ".ci/house.py")


def test_lint_refuses_a_circle_between_files(copy):
    (copy / "src/tunesmith/data/planted.py").write_text("from tunesmith.data import planted_too\n")
    (copy / "src/tunesmith/data/planted_too.py").write_text(
        "def later():\n    from tunesmith.data import planted\n"
    )
    assert "planted" in lint(copy, "lint-imports", "--no-cache")
    circle = "circle of imports: tunesmith.data.planted, tunesmith.data.planted_too\n"
    assert circle in lint(copy, "python", ".ci/house.py")


def test_lint_refuses_a_circle_through_the_init_of_a_folder(copy):
    folder = copy / "src/tunesmith/data/planted"
    folder.mkdir()
    (folder / "__init__.py").write_text("from tunesmith.data.planted.part import PART\n\nWHOLE = PART\n")
    (folder / "part.py").write_text("from tunesmith.data.planted import WHOLE\n\nPART = WHOLE\n")
    circle = "circle of imports: tunesmith.data.planted, tunesmith.data.planted.part\n"
    assert circle in lint(copy, "python", ".ci/house.py")


def test_lint_refuses_a_function_of_61_lines_and_lets_60_be(copy):
    longer, long = ("".join(f"    x = {n}\n" for n in range(lines - 1)) for lines in (61, 60))
    (copy / "src/tunesmith/data/planted.py").write_text(f"def longer():\n{longer}\n\ndef long():\n{long}")
    refused = lint(copy, "python", ".ci/house.py")
    assert "tunesmith/data/planted.py:1: longer has 61 lines, more than 60\n" in refused
    assert "long has 60" not in refused


def test_lint_refuses_a_class_name_that_exists_twice_and_skipped_formatting(copy):
    (copy / "src/tunesmith/data/planted.py").write_text("class DataError:  # fmt: skip\n    pass\n")
    refused = lint(copy, "python", ".ci/house.py")
    assert "class DataError is defined in tunesmith/data/planted.py:1, tunesmith/errors.py:" in refused
    assert "tunesmith/data/planted.py: skips formatting\n" in refused
