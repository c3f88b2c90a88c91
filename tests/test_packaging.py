"""The package as users get it: what the wheel holds, what it needs, and where that can be installed without a
compiler."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
INDEX = "https://pypi.org/simple"
PYTHONS = ("3.11", "3.12", "3.13")
ON_A_MAC = ("audit", "benchmarks", "gguf", "optuna", "tables", "tensorboard")
"""Extras for users. The others are for Linux, or for working on tunesmith."""
ON_LINUX = (*ON_A_MAC, "cuda")
ON_LINUX_X86 = (*ON_LINUX, "mkl")
PLATFORMS = {
    "aarch64-apple-darwin": ON_A_MAC,
    "x86_64-manylinux_2_35": ON_LINUX_X86,
    "aarch64-manylinux_2_35": ON_LINUX,
}
SOURCES = ("rouge-score", "sqlitedict", "word2number")
"""Packages that lm-eval needs and that exist as source archives only. They are Python alone: no compiler is
needed."""


def uv(program: str, *words: str, folder: Path = ROOT, **variables: str) -> subprocess.CompletedProcess[str]:
    """program: ``uv`` or ``uvx``, of this environment if it has one."""
    own = Path(sys.executable).with_name(program)
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    return subprocess.run(
        [str(own) if own.exists() else program, *words],
        capture_output=True,
        text=True,
        cwd=folder,
        env=environment | {"UV_DEFAULT_INDEX": INDEX, "NO_COLOR": "1"} | variables,
    )


@pytest.fixture(scope="module")
def index() -> None:
    """Skips where no package index can be reached."""
    done = subprocess.run(
        [sys.executable, "-m", "pip", "index", "versions", "--index-url", INDEX, "iniconfig"],
        capture_output=True,
        text=True,
    )
    if done.returncode:
        pytest.skip(f"{INDEX} cannot be reached")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)]
    subprocess.run(command, check=True, capture_output=True, cwd=ROOT)
    (built,) = folder.glob("*.whl")
    return built


def test_the_wheel_holds_every_file_of_the_package_and_nothing_else(wheel):
    names = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    listed = subprocess.run(
        ["git", "ls-files", "src/tunesmith"], capture_output=True, text=True, check=True, cwd=ROOT
    )
    assert names == {name.removeprefix("src/") for name in listed.stdout.splitlines()}
    for pattern in ("py.typed", "settings/presets/*.yaml", "sweeps/*.yaml", "*/*.html", "demo/*.yaml"):
        assert any(Path(name).match(f"tunesmith/{pattern}") for name in names), pattern
    for pattern in ("evaluation/suites/*.jsonl", "model/kernels/cpp/*.cpp", "serving/playground/*.js"):
        assert any(Path(name).match(f"tunesmith/{pattern}") for name in names), pattern


def test_the_wheel_says_what_it_needs(wheel):
    archive = zipfile.ZipFile(wheel)
    (metadata,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
    text = archive.read(metadata).decode()
    assert f"Requires-Python: {PROJECT['requires-python']}" in text and "License-File: LICENSE" in text
    extras = set(re.findall(r"^Provides-Extra: (\S+)$", text, re.M))
    assert extras == PROJECT["optional-dependencies"].keys()
    needed = re.findall(r"^Requires-Dist: ([\w.-]+)[^;\n]*(?:;(?!.*extra ==).*)?$", text, re.M)
    assert len(needed) == len(PROJECT["dependencies"])


def names_of(requirements: list[str]) -> set[str]:
    """Normalised names; of tunesmith itself, those of the extras that it names."""
    found: set[str] = set()
    for requirement in requirements:
        match = re.match(r"([\w.-]+)(?:\[([\w,-]+)\])?(.*)", requirement)
        assert match, requirement
        if match[1] == "tunesmith":
            for extra in match[2].split(","):
                found |= names_of(PROJECT["optional-dependencies"][extra])
        else:
            found.add(re.sub(r"[-_.]+", "-", match[1]).lower())
    return found


def test_the_lock_has_what_the_project_needs():
    """Names only: `uv lock --check` compares versions too, and needs an index."""
    lock = tomllib.loads((ROOT / "uv.lock").read_text("utf-8"))
    (own,) = (package for package in lock["package"] if package["name"] == "tunesmith")
    assert own["source"] == {"editable": "."} and lock["requires-python"] == PROJECT["requires-python"]
    hint = "run: uv lock"
    assert {entry["name"] for entry in own["dependencies"]} == names_of(PROJECT["dependencies"]), hint
    extras = PROJECT["optional-dependencies"]
    assert own["optional-dependencies"].keys() == extras.keys(), hint
    for extra, requirements in extras.items():
        locked = {entry["name"] for entry in own["optional-dependencies"][extra]}
        assert locked == names_of(requirements), f"{extra}: {hint}"
    sources = {str(package["source"].get("registry")) for package in lock["package"] if package != own}
    assert sources == {INDEX}


def test_every_extra_is_for_users_or_for_work_on_the_project():
    assert set(ON_LINUX_X86) | {"dev", "docs", "parity"} == PROJECT["optional-dependencies"].keys()


@pytest.mark.real
def test_the_lock_is_what_uv_would_write(index):
    done = uv("uv", "lock", "--check")
    assert done.returncode == 0, f"{done.stderr}\nrun: uv lock"


@pytest.mark.real
@pytest.mark.parametrize("python", PYTHONS)
@pytest.mark.parametrize("platform", PLATFORMS)
def test_everything_installs_from_wheels(index, platform, python):
    """Core and extras together, so each of them alone too."""
    words = ["pip", "compile", "pyproject.toml", "--no-header"]
    words += ["--python-platform", platform, "--python-version", python, "--only-binary", ":all:"]
    words += [word for name in SOURCES for word in ("--no-binary", name)]
    words += [word for extra in PLATFORMS[platform] for word in ("--extra", extra)]
    done = uv("uv", *words, MACOSX_DEPLOYMENT_TARGET="14.0")  # MLX has wheels for macOS 14 and later
    assert done.returncode == 0, done.stderr
    assert re.search(r"^mlx==", done.stdout, re.M) and len(done.stdout.splitlines()) > 60


@pytest.mark.real
def test_the_wheel_runs_by_uvx_in_an_environment_of_its_own(index, wheel, tmp_path):
    for words, expected in ((["--version"], f"tunesmith {PROJECT['version']}"), (["init"], "optimizer:")):
        done = uv("uvx", "--isolated", "--from", str(wheel), "tunesmith", *words, folder=tmp_path)
        assert done.returncode == 0, done.stderr
        assert expected in done.stdout
