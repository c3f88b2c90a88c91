"""llama.cpp, by the library in the package ``xllamacpp``: log-probabilities, ids of texts, end tokens, speed.

Everything is computed as ``llama-server`` does by default. Of the structures that the library takes, only
the first fields of one are set: the others change between releases, so they are passed as they came."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from tunesmith.errors import ExportError, SetupError
from tunesmith.model.gguf import ggml

AT_ONCE = 256
"""Tokens that are given to the model at once: the logits of all of them are held."""
ERROR = 4
"""Level of a line of the log that is an error."""
DEFAULTS = (512, 2048, 512)
"""The first fields of llama_context_params as the library sets them: n_ctx, n_batch, n_ubatch."""
NO_MEMORY = -2
"""Status of ``llama_decode`` if memory cannot be allocated."""
MEMORY = ("failed to allocate", "unable to allocate", "insufficient memory", "bad_alloc")
"""What the library says then."""
_Log = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)


class _ModelSettings(ctypes.Structure):
    """llama_model_params, and room for what later releases add."""

    _fields_ = [("all", ctypes.c_uint64 * 64)]


class _ContextSettings(ctypes.Structure):
    """llama_context_params, and room for what later releases add."""

    _fields_ = [("n_ctx", ctypes.c_uint32), ("n_batch", ctypes.c_uint32), ("n_ubatch", ctypes.c_uint32)]
    _fields_ += [("others", ctypes.c_uint32), ("all", ctypes.c_uint64 * 64)]


class _Batch(ctypes.Structure):
    """llama_batch."""

    _fields_ = [
        ("n_tokens", ctypes.c_int32),
        ("token", ctypes.POINTER(ctypes.c_int32)),
        ("embd", ctypes.c_void_p),
        ("pos", ctypes.POINTER(ctypes.c_int32)),
        ("n_seq_id", ctypes.POINTER(ctypes.c_int32)),
        ("seq_id", ctypes.POINTER(ctypes.POINTER(ctypes.c_int32))),
        ("logits", ctypes.POINTER(ctypes.c_int8)),
    ]


_POINTER, _INT, _FLAG = ctypes.c_void_p, ctypes.c_int32, ctypes.c_bool
_FUNCTIONS: dict[str, tuple[Any, list[Any]]] = {
    "llama_backend_init": (None, []),
    "llama_log_set": (None, [_Log, _POINTER]),
    "llama_model_default_params": (_ModelSettings, []),
    "llama_context_default_params": (_ContextSettings, []),
    "llama_model_load_from_file": (_POINTER, [ctypes.c_char_p, _ModelSettings]),
    "llama_init_from_model": (_POINTER, [_POINTER, _ContextSettings]),
    "llama_adapter_lora_init": (_POINTER, [_POINTER, ctypes.c_char_p]),
    "llama_set_adapters_lora": (_INT, [_POINTER, _POINTER, ctypes.c_size_t, _POINTER]),
    "llama_set_n_threads": (None, [_POINTER, _INT, _INT]),
    "llama_model_get_vocab": (_POINTER, [_POINTER]),
    "llama_vocab_n_tokens": (_INT, [_POINTER]),
    "llama_vocab_is_eog": (_FLAG, [_POINTER, _INT]),
    "llama_tokenize": (_INT, [_POINTER, ctypes.c_char_p, _INT, _POINTER, _INT, _FLAG, _FLAG]),
    "llama_get_memory": (_POINTER, [_POINTER]),
    "llama_memory_clear": (None, [_POINTER, _FLAG]),
    "llama_batch_init": (_Batch, [_INT, _INT, _INT]),
    "llama_batch_free": (None, [_Batch]),
    "llama_decode": (_INT, [_POINTER, _Batch]),
    "llama_get_logits_ith": (ctypes.POINTER(ctypes.c_float), [_POINTER, _INT]),
    "llama_free": (None, [_POINTER]),
    "llama_model_free": (None, [_POINTER]),
}


def name() -> str:
    """The program and its release, for people."""
    return f"llama.cpp ({ggml.PACKAGE} {version(ggml.PACKAGE)})"


def missing() -> str | None:
    """Why llama.cpp cannot be used, or None if it can be."""
    try:
        _functions()
    except SetupError as error:
        return error.what
    return None


def lacks_memory(text: str) -> bool:
    """Whether the library says in ``text`` that memory was not enough."""
    return any(words in text for words in MEMORY)


def _functions() -> dict[str, Callable[..., Any]]:
    """Raises SetupError if the library is missing, or has another form than expected."""
    library = ggml.library()
    functions: dict[str, Any] = {}
    for symbol, (result, arguments) in _FUNCTIONS.items():
        try:
            functions[symbol] = function = library[symbol]
        except AttributeError as error:
            raise SetupError(f"{name()} does not have {symbol}", hint=ggml.EXTRA) from error
        function.restype, function.argtypes = result, arguments
    settings = functions["llama_context_default_params"]()
    if (settings.n_ctx, settings.n_batch, settings.n_ubatch) != DEFAULTS:
        raise SetupError(f"{name()} has settings of another form than expected", hint=ggml.EXTRA)
    return functions


class LlamaCpp:
    """A model for one text at a time, with an adapter beside it if there is one.

    Raises ExportError, with what llama.cpp said, if it refuses them, and SetupError if memory is not
    enough."""

    def __init__(self, model: Path, adapter: Path | None, n_context: int, threads: int) -> None:
        """n_context: the most tokens of a text."""
        self._call = _functions()
        self._errors: list[str] = []
        self._log = _Log(self._note)  # held, since the library calls it
        self._call["llama_log_set"](self._log, None)
        self._call["llama_backend_init"]()
        self._model = self._required(
            self._call["llama_model_load_from_file"](
                bytes(model.resolve()), self._call["llama_model_default_params"]()
            ),
            model,
        )
        settings = self._call["llama_context_default_params"]()
        settings.n_ctx = max(n_context, AT_ONCE)
        self._context = self._required(self._call["llama_init_from_model"](self._model, settings), model)
        self._call["llama_set_n_threads"](self._context, threads, threads)
        if adapter is not None:
            self._apply(adapter)
        self._vocabulary = self._call["llama_model_get_vocab"](self._model)
        self.size: int = self._call["llama_vocab_n_tokens"](self._vocabulary)
        self._batch = self._call["llama_batch_init"](AT_ONCE, 0, 1)

    def _note(self, level: int, text: bytes, data: object) -> None:
        if level == ERROR:
            self._errors.append(text.decode("utf-8", "replace").strip())

    def _required(self, pointer: int | None, file: Path) -> int:
        if pointer:
            return pointer
        what = f"llama.cpp cannot load {file.name}: {'; '.join(self._errors) or 'no reason given'}"
        raise SetupError(what) if lacks_memory(what) else ExportError(what)

    def _apply(self, adapter: Path) -> None:
        path = bytes(adapter.resolve())
        loaded = self._required(self._call["llama_adapter_lora_init"](self._model, path), adapter)
        pointers, scales = (ctypes.c_void_p * 1)(loaded), (ctypes.c_float * 1)(1.0)
        if self._call["llama_set_adapters_lora"](self._context, pointers, 1, scales):
            raise ExportError(f"llama.cpp cannot apply {adapter.name}")

    def logits(self, ids: Sequence[int], places: Sequence[int]) -> np.ndarray:
        """(P, V) float32, the logits of the token after each of the ``places`` in ``ids``."""
        self._call["llama_memory_clear"](self._call["llama_get_memory"](self._context), True)
        wanted, rows = set(places), []
        for start in range(0, len(ids), AT_ONCE):
            part = ids[start : start + AT_ONCE]
            self.decode(part, start, [start + place in wanted for place in range(len(part))])
            rows += [self._row(place) for place in range(len(part)) if start + place in wanted]
        return np.stack(rows)

    def decode(self, ids: Sequence[int], start: int, wanted: Sequence[bool]) -> None:
        """Continue a text, whose next position is ``start``, by at most `AT_ONCE` ids. wanted: whether logits
        are computed at each of them."""
        batch = self._batch
        batch.n_tokens = len(ids)
        for place, token in enumerate(ids):
            batch.token[place], batch.pos[place] = token, start + place
            batch.n_seq_id[place], batch.seq_id[place][0] = 1, 0
            batch.logits[place] = wanted[place]
        if status := self._call["llama_decode"](self._context, batch):
            what = f"llama.cpp cannot compute {len(ids)} tokens at {start}: status {status}"
            raise SetupError(f"{what}, out of memory") if status == NO_MEMORY else ExportError(what)

    def _row(self, place: int) -> np.ndarray:
        row = self._call["llama_get_logits_ith"](self._context, place)
        return np.ctypeslib.as_array(row, (self.size,)).copy()

    def generate(self, prompt: Sequence[int], count: int) -> list[int]:
        """``count`` greedy tokens after ``prompt``, which has at most `AT_ONCE`."""
        self._call["llama_memory_clear"](self._call["llama_get_memory"](self._context), True)
        made: list[int] = []
        self.decode(prompt, 0, [place == len(prompt) - 1 for place in range(len(prompt))])
        for number in range(count):
            made.append(int(self._row(len(prompt) - 1 if number == 0 else 0).argmax()))
            if number < count - 1:
                self.decode(made[-1:], len(prompt) + number, [True])
        return made

    def ids(self, text: str) -> list[int]:
        """Control tokens that are written out are read as such; nothing is added."""
        content = text.encode("utf-8")
        room = len(content) + 16
        buffer = (ctypes.c_int32 * room)()
        count = self._call["llama_tokenize"](
            self._vocabulary, content, len(content), buffer, room, False, True
        )
        return list(buffer[: max(count, 0)])

    def ends(self, token: int) -> bool:
        """Whether generation ends at the token."""
        return bool(self._call["llama_vocab_is_eog"](self._vocabulary, token))

    def close(self) -> None:
        self._call["llama_batch_free"](self._batch)
        self._call["llama_free"](self._context)
        self._call["llama_model_free"](self._model)
