"""The compiled kernels of a Linux CPU: compiled once for this machine with g++, then loaded from the cache.

They are an extension of MLX: operations of its graph, evaluated when MLX evaluates it. A machine without a
compiler, without Python's headers or with another build of MLX goes without them, and `load` says why."""

from __future__ import annotations

import fcntl
import functools
import hashlib
import importlib.machinery
import importlib.metadata
import importlib.util
import os
import platform
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import mlx.core as mx

from tunesmith.machine import backend

NAME = "tunesmith_cpu"
SOURCES = Path(__file__).parent / "cpp"
FLAGS = (
    *(
        "-std=c++20",
        "-O3",
        "-march=native",
        "-fopenmp-simd",
        "-ffp-contract=fast",
        "-fno-math-errno",
        "-fno-trapping-math",
    ),
    *("-fPIC", "-shared", "-fvisibility=hidden", "-fno-strict-aliasing", "-DNDEBUG", "-DNB_DOMAIN=mlx"),
)


@dataclass(frozen=True, slots=True)
class Extension:
    """``module``: the kernels, or None, and then ``missing`` says why and ``hint`` what to do about it."""

    module: ModuleType | None
    missing: str = ""
    hint: str | None = None


class _Missing(Exception):
    """What is missing, and a hint."""

    def __init__(self, what: str, hint: str | None = None) -> None:
        super().__init__(what)
        self.hint = hint


@functools.cache
def load() -> Extension:
    """The kernels, compiled first if the cache does not hold them (about 10 seconds, told on stderr)."""
    try:
        module = _import(_compiled())
        module.set_threads(backend.cpu_threads())
        _try(module)
    except _Missing as missing:
        return Extension(None, str(missing), missing.hint)
    except (ImportError, OSError, subprocess.SubprocessError, TypeError) as error:
        return Extension(None, f"the compiled kernels cannot be used: {error}".splitlines()[0])
    return Extension(module)


def _compiled() -> Path:
    """The shared library in the cache. Raises _Missing."""
    compiler = shutil.which("g++")
    if compiler is None:
        raise _Missing("no C++ compiler (g++)", "apt-get install g++")
    headers = Path(sysconfig.get_path("include"))
    if not (headers / "Python.h").is_file():
        raise _Missing(f"Python's headers are not in {headers}", "apt-get install python3-dev")
    found = importlib.util.find_spec("nanobind")
    if found is None or found.origin is None:
        raise _Missing("nanobind is not installed", "pip install 'nanobind>=3.0.1,<4'")
    binding, library = Path(found.origin).parent, Path(mx.__file__).parent
    try:
        extra = shlex.split(os.environ.get("CXXFLAGS", ""))
    except ValueError as error:
        raise _Missing(f"CXXFLAGS cannot be read: {error}") from error
    include = (binding / "include", binding / "ext" / "robin_map" / "include", headers, library / "include")
    command = [compiler, *FLAGS, *_vectors(), *extra, *(f"-I{folder}" for folder in include)]
    command += [str(SOURCES / "extension.cpp"), str(binding / "src" / "nb_combined.cpp")]
    command += [f"-L{library / 'lib'}", "-lmlx"]  # MLX has been loaded from there already
    suffix = importlib.machinery.EXTENSION_SUFFIXES[0]
    target = backend.cache_folder() / "kernels" / _digest(command) / f"{NAME}{suffix}"
    if not target.is_file():
        _compile(command, target)
    return target


def _digest(command: list[str]) -> str:
    """Of everything that decides what is compiled: sources, packages, compiler, the CPU's instructions."""
    compiler = Path(command[0]).resolve()
    facts = [
        *command[1:],
        str(compiler),
        str(compiler.stat().st_mtime_ns),
        platform.machine(),
        _instructions(),
    ]
    facts += [importlib.metadata.version(package) for package in ("mlx", "nanobind")] + [sys.version]
    facts += [path.read_text(encoding="utf-8") for path in sorted(SOURCES.iterdir())]
    return hashlib.sha256("\0".join(facts).encode()).hexdigest()[:20]


def _instructions() -> str:
    """The CPU's sets of instructions, as Linux lists them."""
    with open("/proc/cpuinfo", encoding="utf-8") as lines:
        return next((line for line in lines if line.startswith(("flags", "Features"))), "")


def _vectors() -> list[str]:
    """Compilers prefer vectors of 256 bits where the CPU has 512."""
    return ["-mprefer-vector-width=512"] if "avx512f" in _instructions().split() else []


def _compile(command: list[str], target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    with _one_at_a_time(target.parent / "lock"):
        if target.is_file():  # another process has compiled it meanwhile
            return
        print("compiling the kernels for this CPU, once: about 10 seconds", file=sys.stderr, flush=True)
        with tempfile.TemporaryDirectory(dir=target.parent) as folder:
            draft = Path(folder) / target.name
            run = subprocess.run([*command, "-o", str(draft)], capture_output=True, text=True, check=False)
            if run.returncode != 0:
                lines = [
                    line for line in run.stderr.splitlines() if "error" in line
                ] or run.stderr.splitlines()
                raise _Missing(f"g++ cannot compile the kernels: {lines[0] if lines else run.returncode}")
            os.replace(draft, target)


@contextmanager
def _one_at_a_time(path: Path) -> Iterator[None]:
    with open(path, "w", encoding="utf-8") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _import(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(NAME, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _try(module: ModuleType) -> None:
    """Raises TypeError if the extension does not know MLX's arrays: it was built with another version of
    nanobind than MLX's was."""
    gate = mx.array([[0.0, 2.0]])
    result = module.swiglu(gate, mx.ones((1, 2)))
    if abs(result[0, 1].item() - 1.7615942) > 1e-5:
        raise _Missing(
            "the compiled kernels compute wrong values", "TUNESMITH_KERNELS=operations goes without"
        )
