"""Which device does MLX use? Also sets up what must be in place before MLX is loaded.

On Linux the CPU wheel of MLX links a reference BLAS (2–8 GFLOP/s a core). The dynamic linker looks in the
global scope first, so a fast BLAS that was opened with RTLD_GLOBAL *before* ``import mlx.core`` computes the
matrix products, with no rebuild. ``TUNESMITH_BLAS`` chooses it: ``auto`` (default), ``off``, or the path of a
library. ``TUNESMITH_KERNELS`` chooses what computes the rest (see `model.kernels`). With
``TUNESMITH_ALLOCATOR=off`` the settings of glibc's allocator are not changed. OpenBLAS's own variables
(OPENBLAS_CORETYPE, OPENBLAS_NUM_THREADS, …) take precedence over the settings made here."""

from __future__ import annotations

import contextlib
import ctypes
import ctypes.util
import functools
import importlib
import json
import os
import shutil
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tunesmith.errors import SetupError

BLAS_CANDIDATES = ("libopenblas.so.0", "libopenblas.so", "libmkl_rt.so.3", "libmkl_rt.so.2", "libmkl_rt.so")
BLAS_HINT = (
    "for matrix products about 50 times faster: apt-get install libopenblas0-pthread (or pip install mkl)"
)

# glibc's mallopt parameters (malloc.h).
_M_TRIM_THRESHOLD = -1
_M_MMAP_THRESHOLD = -3


@dataclass(frozen=True, slots=True)
class Device:
    """``blas``: the library in use, ``reference`` if no other was found, ``not used`` on a GPU."""

    name: str
    kind: str  # cpu | gpu
    blas: str
    blas_hint: str | None
    notes: tuple[str, ...]


@functools.cache
def prepare() -> tuple[str, str | None, tuple[str, ...]]:
    """Open a fast BLAS and set up the allocator, before ``import mlx.core``; returns (BLAS, hint, notes)."""
    if sys.platform != "linux":
        return "not used", None, ()
    _keep_freed_memory()
    if "mlx.core" in sys.modules:
        return (
            "unknown",
            None,
            ("mlx was imported before tunesmith: the BLAS could not be chosen, matrix products may be slow",),
        )
    return *_open_blas(), ()


@functools.cache
def setup() -> Device:
    """Load MLX after `prepare`; returns its device. Idempotent. Raises SetupError if MLX cannot be loaded."""
    blas, hint, early = prepare()
    notes = [*early, *_odd_switches()]
    try:
        mx = importlib.import_module("mlx.core")
    except ImportError as error:
        raise SetupError(
            f"MLX cannot be loaded: {error}",
            hint="pip install 'mlx[cpu]' on Linux, 'mlx' on a Mac with Apple silicon",
        ) from error
    kind = "gpu" if mx.default_device() == mx.Device(mx.gpu) else "cpu"
    if kind == "gpu":
        blas, hint = "not used", None
    elif sys.platform == "linux" and shutil.which("g++") is None:
        # mx.compile on CPU calls g++ at run time; even nn.silu is compiled.
        mx.disable_compile()
        notes.append("no C++ compiler (g++): MLX runs uncompiled; apt-get install g++ makes it faster")
    return Device(_chip(mx, kind), kind, blas, hint, tuple(notes))


SWITCHES = {"TUNESMITH_KERNELS": ("on", "operations", "off"), "TUNESMITH_ALLOCATOR": ("on", "off")}
"""Environment variables and their values, the default first."""


def _odd_switches() -> list[str]:
    """Notes about environment variables that have no effect."""
    odd = [
        f"{name} is {os.environ[name]!r}, not {' or '.join(values)}: it has no effect"
        for name, values in SWITCHES.items()
        if os.environ.get(name, "") not in ("", *values)
    ]
    if "MLX_HOSTFILE" in os.environ and not os.environ.keys() & {"MLX_RANK", "OMPI_COMM_WORLD_RANK"}:
        odd.append("MLX_HOSTFILE is set and MLX_RANK is not: this is one process alone")
    return odd


def _open_blas() -> tuple[str, str | None]:
    """(library in use, hint)"""
    choice = os.environ.get("TUNESMITH_BLAS", "auto")
    if choice == "off":
        return (
            "reference",
            "unset TUNESMITH_BLAS, which is off: matrix products are about 50 times faster with a fast BLAS",
        )
    _tune_openblas()
    # MKL's wheel puts its libraries where the linker does not look.
    wheels = [str(path) for path in sorted((Path(sys.prefix) / "lib").glob("libmkl_rt.so*"), reverse=True)]
    candidates = (*BLAS_CANDIDATES, *wheels) if choice == "auto" else (choice,)
    for name in candidates:
        try:
            library = ctypes.CDLL(name, mode=ctypes.RTLD_GLOBAL)
        except OSError as error:
            if choice != "auto":
                return "reference", f"TUNESMITH_BLAS: {name} cannot be opened: {error}"
        else:
            _opened.append(library)
            return name, None
    return "reference", BLAS_HINT


_opened: list[ctypes.CDLL] = []


def cpu_settings() -> str:
    """What computes matrix products and the rest on a Linux CPU, in words; empty elsewhere."""
    device = setup()
    if device.kind != "cpu" or sys.platform != "linux":
        return ""
    words = [f"BLAS {device.blas}"]
    if _opened and device.blas != "reference":
        with contextlib.suppress(AttributeError):  # another BLAS than OpenBLAS
            core = _opened[0].openblas_get_corename
            core.restype = ctypes.c_char_p
            words += [f"kernels for {core().decode()}", f"{_opened[0].openblas_get_num_threads()} threads"]
            words.append(f"spin 2^{os.environ.get('OPENBLAS_THREAD_TIMEOUT', '26')} cycles")
    words.append("freed memory " + ("kept" if _allocator_tuned() else "given back (TUNESMITH_ALLOCATOR=off)"))
    return ", ".join(words)


def on_linux() -> bool:
    return sys.platform == "linux"


def wanted_kernels() -> str:
    """The value of TUNESMITH_KERNELS: ``on``, ``operations`` or ``off``."""
    first, *others = SWITCHES["TUNESMITH_KERNELS"]
    wanted: str | None = os.environ.get("TUNESMITH_KERNELS")
    return wanted if wanted in others and wanted is not None else first


def own_kernels() -> bool:
    """Whether other kernels than MLX's are used: on a Linux CPU, unless TUNESMITH_KERNELS=off."""
    return setup().kind == "cpu" and on_linux() and wanted_kernels() != "off"


def cpu_threads() -> int:
    """Threads of the compiled kernels: as many as the BLAS has, or one for each core of this process, shared
    with the other ranks on this machine."""
    for name in ("OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "OMP_NUM_THREADS"):
        if (count := os.environ.get(name, "")).isdigit():
            return max(1, int(count))
    return _cores_of_rank() if on_linux() else 1


def _cores_of_rank() -> int:
    """The cores of this process, shared equally among the ranks on this machine; at least one."""
    return max(1, len(os.sched_getaffinity(0)) // _ranks_here())


def _tune_openblas() -> None:
    """Set variables that OpenBLAS reads when it is opened, except those that the user has set.

    By default its waiting threads spin for 2^26 cycles, on cores that the next operation of MLX needs, and
    each of several ranks on one machine starts a thread on every core."""
    os.environ.setdefault("OPENBLAS_THREAD_TIMEOUT", "16")
    if _ranks_here() > 1:
        for name in ("OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
            os.environ.setdefault(name, str(_cores_of_rank()))


def _ranks_here() -> int:
    """Number of processes that `mlx.launch` started on this machine, this one included."""
    try:
        hosts = json.loads(Path(os.environ["MLX_HOSTFILE"]).read_text(encoding="utf-8"))
        names = [str(addresses[0]).rsplit(":", 1)[0] for addresses in hosts]
        return names.count(names[int(os.environ["MLX_RANK"])])
    except (KeyError, OSError, ValueError, IndexError, TypeError):
        count = os.environ.get("OMPI_COMM_WORLD_LOCAL_SIZE", "")
        return max(1, int(count)) if count.isdigit() else 1


def _allocator_tuned() -> bool:
    return os.environ.get("TUNESMITH_ALLOCATOR") != "off"


def _keep_freed_memory() -> None:
    """Ask glibc to keep large freed blocks: returning them costs a page fault each 4 KiB at the next
    update."""
    if not _allocator_tuned():
        return
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return  # musl has no mallopt
    mallopt(_M_TRIM_THRESHOLD, -1)
    mallopt(_M_MMAP_THRESHOLD, 1 << 30)


def _chip(mx: Any, kind: str) -> str:
    info = mx.device_info() if kind == "gpu" else {}
    if "device_name" in info:
        return str(info["device_name"])
    if sys.platform == "linux":
        with open("/proc/cpuinfo", encoding="utf-8") as lines:
            for line in lines:
                if line.startswith("model name"):
                    return line.split(":", 1)[1].strip()
    import platform

    return platform.processor() or platform.machine()


def is_out_of_memory(error: BaseException) -> bool:
    """Whether MLX ran out of memory. Only the text of the error says so; Metal, CUDA and malloc word it
    differently."""
    words = str(error).lower()
    return isinstance(error, MemoryError) or any(
        word in words for word in ("alloc", "out of memory", "insufficient memory")
    )


def memory() -> dict[str, int]:
    """Bytes: ``resident`` of this process, ``active`` and ``peak`` of MLX's allocator."""
    import mlx.core as mx
    import psutil

    return {
        "resident": psutil.Process().memory_info().rss,
        "active": mx.get_active_memory(),
        "peak": mx.get_peak_memory(),
    }


def cache_folder() -> Path:
    """Folder for converted models and reference log-probabilities: ``$TUNESMITH_CACHE``, else
    ``~/.cache/tunesmith``."""
    return Path(os.environ.get("TUNESMITH_CACHE") or Path.home() / ".cache" / "tunesmith")


def memory_limit() -> int:
    """Bytes that a process can use without swapping: the GPU's recommended working set, or the machine's
    memory."""
    import mlx.core as mx
    import psutil

    info: dict = mx.device_info() if setup().kind == "gpu" else {}
    keys = ("max_recommended_working_set_size", "total_memory", "memory_size")  # Metal's, CUDA's
    return int(next((info[key] for key in keys if info.get(key)), 0) or psutil.virtual_memory().total)


def shares_memory() -> bool:
    """Whether the GPU uses the machine's own memory, as on a Mac with Apple silicon."""
    return sys.platform == "darwin"


def gflops(size: int = 1024, repeats: int = 3) -> float:
    """Measured speed of a float32 product of two matrices of ``size`` × ``size``, in GFLOP/s."""
    import mlx.core as mx

    a = mx.random.normal((size, size), key=mx.random.key(0))
    mx.eval(a @ a)
    start = time.perf_counter()
    for _ in range(repeats):
        mx.eval(a @ a)
    return 2 * size**3 * repeats / (time.perf_counter() - start) / 1e9
