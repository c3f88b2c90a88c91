"""ggml, the library of llama.cpp that quantises, as the package ``xllamacpp`` ships it.

The ``gguf`` package reads k-quants but cannot write them, and it cannot weigh errors by importance."""

from __future__ import annotations

import ctypes
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import psutil

from tunesmith.errors import SetupError
from tunesmith.machine import backend

if TYPE_CHECKING:
    from gguf import GGMLQuantizationType

PACKAGE, EXTRA = "xllamacpp", "pip install 'tunesmith[gguf]'"


@cache
def library() -> ctypes.CDLL:
    """llama.cpp and ggml in one library. Raises SetupError if the package is not installed, or has another
    form than expected."""
    spec = find_spec(PACKAGE)
    folders = [] if spec is None else spec.submodule_search_locations or []
    files = [file for folder in folders for file in sorted(Path(folder).glob(f"{PACKAGE}*.so"))]
    if not files:
        raise SetupError(f"llama.cpp is not installed (the package {PACKAGE})", hint=EXTRA)
    try:
        opened = ctypes.CDLL(str(files[0]))
        quantise = opened.ggml_quantize_chunk
    except (OSError, AttributeError) as error:
        raise SetupError(f"the library of {PACKAGE} cannot be used: {error}", hint=EXTRA) from error
    quantise.restype = ctypes.c_size_t
    pointer, integer = ctypes.c_void_p, ctypes.c_int64
    quantise.argtypes = [ctypes.c_int, pointer, pointer, integer, integer, integer, pointer]
    return opened


def threads() -> int:
    """As many as the kernels of this process have, or one for each core."""
    return backend.cpu_threads() if backend.on_linux() else psutil.cpu_count(logical=False) or 1


def quantised(
    value: np.ndarray, kind: GGMLQuantizationType, importance: np.ndarray | None = None
) -> np.ndarray:
    """The bytes of ``value``, float32, in the type ``kind``. importance: the weight of the error in each
    column; None: all columns weigh the same."""
    from gguf import GGML_QUANT_SIZES

    block, size = GGML_QUANT_SIZES[kind]
    width = value.shape[-1]
    source = np.ascontiguousarray(value, np.float32).reshape(-1, width)
    target = np.empty((len(source), width // block * size), np.uint8)
    weights = None if importance is None else np.ascontiguousarray(importance, np.float32)
    at_weights = None if weights is None else weights.ctypes.data
    quantise = library().ggml_quantize_chunk
    count = threads()
    step = max(1, -(-len(source) // count))

    def rows_from(start: int) -> None:
        n_rows = min(step, len(source) - start)
        quantise(int(kind), source.ctypes.data, target.ctypes.data, start * width, n_rows, width, at_weights)

    with ThreadPoolExecutor(count) as pool:  # ctypes releases the lock of the interpreter
        list(pool.map(rows_from, range(0, len(source), step)))
    return target.reshape(*value.shape[:-1], -1)
