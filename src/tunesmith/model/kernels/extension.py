"""The compiled kernels of a Linux CPU: compiled once for this machine with g++, then loaded from the cache.

They are an extension of MLX: operations of its graph, evaluated when MLX evaluates it. A machine without a
compiler, without Python's headers or with another build of MLX goes without them, and `load` says why."""

from __future__ import annotations

import fcntl
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
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import mlx.core as mx

from tunesmith.events import Notice, Sink, silent
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
        "--param=avoid-fma-max-bits=0",  # or a sum's rounding would depend on the shape of its loop
        "-fno-math-errno",
        "-fno-trapping-math",
    ),
    *("-fPIC", "-shared", "-fvisibility=hidden", "-fno-strict-aliasing", "-DNDEBUG", "-DNB_DOMAIN=mlx"),
)


UNSAFE = frozenset(
    {
        *("-Ofast", "-ffast-math", "-funsafe-math-optimizations", "-fassociative-math"),
        *("-freciprocal-math", "-ffinite-math-only", "-fno-signed-zeros", "-mdaz-ftz"),
    }
)
"""Compiler options that change what the kernels compute: NaN and infinity are lost, or sums no longer have a
fixed order. Some also flush the denormal numbers of the whole process."""
COMPILING = "compiling the kernels for this CPU, once: 10 to 30 seconds"
UNUSED_DAYS = 30
"""Kernels that nobody has loaded for so long are deleted when others are compiled."""


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


_loading = threading.Lock()
_loaded: Extension | None = None


def load(notify: Sink = silent) -> Extension:
    """The kernels; all calls return the same. The first compiles them if the cache does not hold them, which
    takes 10 to 30 seconds, after a notice to ``notify``."""
    global _loaded
    if _loaded is None:
        with _loading:
            _loaded = _loaded or _load(notify)
    return _loaded


def begin(notify: Sink = silent) -> None:
    """Start to compile the kernels if the cache does not hold them, after a notice to ``notify``: a later
    `load` waits for them."""
    with suppress(_Missing, OSError):  # `load` says why
        if _loaded is None and not (build := _build()).target.is_file():
            notify(Notice(COMPILING, where="kernels"))
            threading.Thread(target=_attempt, args=(build,), daemon=True).start()


def _attempt(build: _Build) -> None:
    with suppress(_Missing, OSError):
        _compile(build, silent)


def _load(notify: Sink) -> Extension:
    try:
        library = _compiled(notify)
        module = _import(library)
        module.set_threads(backend.cpu_threads())
        _try(module)
    except _Missing as missing:
        return Extension(None, str(missing), missing.hint)
    except (ImportError, OSError, subprocess.SubprocessError, TypeError) as error:
        return Extension(None, f"the compiled kernels cannot be used: {error}".splitlines()[0])
    with suppress(OSError):  # a cache that cannot be written
        os.utime(library)
    return Extension(module)


class _Build(NamedTuple):
    """``command``: the compiler and its options. ``target``: the shared library in the cache."""

    command: list[str]
    sources: list[str]
    target: Path


def _compiled(notify: Sink) -> Path:
    """The shared library in the cache. Raises _Missing."""
    build = _build()
    if not build.target.is_file():
        _compile(build, notify)
    return build.target


def _build() -> _Build:
    """Raises _Missing if nothing can be compiled."""
    compiler = shutil.which("g++")
    if compiler is None:
        raise _Missing("no C++ compiler (g++)", "apt-get install g++ (Fedora: dnf install gcc-c++)")
    headers = Path(sysconfig.get_path("include"))
    if not (headers / "Python.h").is_file():
        hint = "apt-get install python3-dev (Fedora: dnf install python3-devel)"
        raise _Missing(f"Python's headers are not in {headers}", hint)
    nanobind = importlib.util.find_spec("nanobind")
    if nanobind is None or nanobind.origin is None:
        raise _Missing("nanobind is not installed", "pip install 'nanobind>=3.0.1,<4'")
    binding, library = Path(nanobind.origin).parent, Path(mx.__file__).parent
    include = (binding / "include", binding / "ext" / "robin_map" / "include", headers, library / "include")
    options = [*FLAGS, *_vectors(), *_options(), *(f"-I{folder}" for folder in include)]
    options.append(f"-L{library / 'lib'}")
    suffix = importlib.machinery.EXTENSION_SUFFIXES[0]
    target = backend.cache_folder() / "kernels" / _digest(compiler, options) / f"{NAME}{suffix}"
    sources = [str(SOURCES / "extension.cpp"), str(binding / "src" / "nb_combined.cpp")]
    return _Build([compiler, *options], sources, target)


def _options() -> list[str]:
    """The user's further options for the compiler. Raises _Missing if the kernels may not be compiled with
    them."""
    try:
        options = shlex.split(os.environ.get("TUNESMITH_CXXFLAGS", ""))
    except ValueError as error:
        raise _Missing(f"TUNESMITH_CXXFLAGS cannot be read: {error}") from error
    if unsafe := [option for option in options if option in UNSAFE]:
        raise _Missing(f"TUNESMITH_CXXFLAGS has {unsafe[0]}, which makes the results inexact", "leave it out")
    return options


def _digest(compiler: str, options: list[str]) -> str:
    """Hash of everything that decides what is compiled: sources, wherever they lie, packages, compiler, the
    CPU's instructions."""
    program = Path(compiler).resolve()
    facts = [*options, str(program), str(program.stat().st_mtime_ns), platform.machine(), _instructions()]
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


def _compile(build: _Build, notify: Sink) -> None:
    """Raises _Missing if the compiler fails."""
    command, sources, target = build
    target.parent.mkdir(parents=True, exist_ok=True)
    with _one_at_a_time(target.parent / "lock"):
        if target.is_file():  # another process has compiled it meanwhile
            return
        notify(Notice(COMPILING, where="kernels"))
        with tempfile.TemporaryDirectory(dir=target.parent) as folder:
            objects = [str(Path(folder) / f"{Path(source).stem}.o") for source in sources]
            pairs = zip(sources, objects, strict=True)
            _run([[*command, "-c", source, "-o", object] for source, object in pairs])
            draft = Path(folder) / target.name
            _run([[*command, *objects, "-lmlx", "-o", str(draft)]])  # MLX is loaded already
            os.replace(draft, target)
        _delete_unused(target.parent)


def _run(commands: list[list[str]]) -> None:
    """All of them at the same time. Raises _Missing if one fails."""
    runs = [subprocess.Popen(command, stderr=subprocess.PIPE, text=True) for command in commands]
    for run, errors in [(run, run.communicate()[1]) for run in runs]:
        if run.returncode != 0:
            lines = [line for line in errors.splitlines() if "error" in line] or errors.splitlines()
            raise _Missing(f"g++ cannot compile the kernels: {lines[0] if lines else run.returncode}")


def _delete_unused(folder: Path) -> None:
    """Delete the other kernels beside ``folder`` that nobody has loaded for `UNUSED_DAYS`. A process that
    still runs with them keeps its copy."""
    oldest = time.time() - UNUSED_DAYS * 86_400
    for other in folder.parent.iterdir():
        with suppress(OSError):  # a file, or another process deletes it
            used = max(path.stat().st_mtime for path in (other, *other.iterdir()))
            if other != folder and used < oldest:
                shutil.rmtree(other, ignore_errors=True)


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
