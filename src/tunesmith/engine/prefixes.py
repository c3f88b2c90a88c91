"""Keys and values of prompts that were read before, for later prompts that begin alike.

mlx-lm's LRUPromptCache is not used: it evicts in the order of insertion, whatever was used since, and its
search through a trie takes quadratic time in the length of a stored prompt."""

from __future__ import annotations

import copy
import hashlib
import json
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from tunesmith import files
from tunesmith.engine import caches

FOLDER_LIMIT = 16 << 30
"""Most bytes of the folder, if nothing else is said."""
SUFFIX = ".prefix.safetensors"
FEWEST_SHARED = 16
"""Fewest tokens of a match, unless it is a whole prefix or a whole prompt: the token that begins every prompt
is not use of a prefix."""
MOST_HEADER = 64 << 20
"""A longer header of a file was not written here."""


@dataclass(eq=False)
class Prefix:
    """``layers``: the cache of a row that has read ``ids``, or None while it is only in the file ``path``.
    ``trimmable``: whether its last tokens can be taken away again."""

    key: str
    ids: np.ndarray
    n_bytes: int
    trimmable: bool
    layers: list[Any] | None
    path: Path | None = None


class Prefixes:
    """Prefixes by key and tokens; each key stands for other weights, so that nothing is shared between them.

    ``limit``: most bytes in memory; the least recently used leave first. ``folder``: they are written there
    when they leave and at `close`, up to ``folder_limit`` bytes, and are found by a later process. ``grows``:
    whether an engine adds what it reads."""

    def __init__(
        self, limit: int, folder: Path | None = None, folder_limit: int = FOLDER_LIMIT, *, grows: bool = True
    ) -> None:
        self.limit, self.folder, self.folder_limit, self.grows = limit, folder, folder_limit, grows
        self._entries: list[Prefix] = []  # the least recently used first
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
            files.remove_drafts(folder)
            paths = sorted(folder.glob(f"[!.]*{SUFFIX}"), key=lambda path: path.stat().st_mtime)
            self._entries = [entry for path in paths if (entry := _described(path)) is not None]

    @property
    def n_bytes(self) -> int:
        """Bytes in memory."""
        return sum(entry.n_bytes for entry in self._entries if entry.layers is not None)

    def length(self, key: str, ids: Sequence[int] | np.ndarray) -> int:
        """How many tokens `find` would find."""
        wanted = np.asarray(ids, np.int32)
        return max((self._usable(entry, key, wanted) for entry in self._entries), default=0)

    def find(self, key: str, ids: Sequence[int] | np.ndarray) -> tuple[list[Any], int] | None:
        """A cache of one row that has read the longest known beginning of ``ids``, and its length; or None.
        The cache belongs to the caller."""
        wanted = np.asarray(ids, np.int32)
        while True:
            lengths = [self._usable(entry, key, wanted) for entry in self._entries]
            if not any(lengths):
                return None
            length, place = max((length, place) for place, length in enumerate(lengths))  # the newest at ties
            entry = self._entries[place]
            if self._loaded(entry):
                break
        self._entries.remove(entry)
        self._entries.append(entry)
        layers = copy.deepcopy(entry.layers)
        assert layers is not None
        caches.trim(layers, len(entry.ids) - length)
        self._evict()
        return layers, length

    def add(self, key: str, ids: Sequence[int], layers: list[Any]) -> None:
        """Keep the cache of a row that has read ``ids``. It is not changed afterwards by the caller."""
        known = np.asarray(ids, np.int32)
        n_bytes = sum(layer.nbytes for layer in layers)
        trimmable = caches.trimmable(layers)
        if len(known) == 0 or n_bytes > self.limit:
            return
        for entry in list(self._entries):
            if entry.key != key:
                continue
            common = common_length(entry.ids, known)
            if common == len(known) and (common == len(entry.ids) or entry.trimmable):
                self._entries.remove(entry)  # it serves for this one too
                self._entries.append(entry)
                return
            if common == len(entry.ids) and trimmable:
                self._remove(entry)
        mx.eval([layer.state for layer in layers])  # else they hold on to the whole batch
        self._entries.append(Prefix(key, known, n_bytes, trimmable, layers))
        self._evict()

    def forget(self, key: str) -> None:
        """Drop the prefixes of one key, also from the folder."""
        for entry in [entry for entry in self._entries if entry.key == key]:
            self._remove(entry)

    def close(self) -> None:
        """Write what is only in memory into the folder, if there is one, and free the memory."""
        limit, self.limit = self.limit, 0
        self._evict()
        self.limit = limit

    def _usable(self, entry: Prefix, key: str, ids: np.ndarray) -> int:
        """How many of ``ids`` the cache of ``entry`` serves for."""
        if entry.key != key:
            return 0
        common = common_length(entry.ids, ids)
        if common == len(entry.ids):
            return common
        return common if entry.trimmable and (common >= FEWEST_SHARED or common == len(ids)) else 0

    def _loaded(self, entry: Prefix) -> bool:
        """Whether ``entry`` is in memory now; one whose file cannot be read is dropped."""
        if entry.layers is not None:
            return True
        from mlx_lm.models.cache import load_prompt_cache

        try:
            layers: Any = load_prompt_cache(str(entry.path))
            mx.eval([layer.state for layer in layers])
        except Exception:  # a damaged file raises whatever its bytes lead to
            self._remove(entry)
            return False
        entry.layers = layers
        return True

    def _evict(self) -> None:
        for entry in list(self._entries):
            if self.n_bytes <= self.limit:
                break
            if entry.layers is not None:
                self._leave(entry)
        stored = [entry for entry in self._entries if entry.path is not None]
        total = sum(entry.n_bytes for entry in stored)
        for entry in stored:
            if total <= self.folder_limit:
                break
            total -= entry.n_bytes
            if entry.layers is None:
                self._remove(entry)
            else:
                _unlink(entry)

    def _leave(self, entry: Prefix) -> None:
        """Free the memory of ``entry``. It is dropped if it cannot be written into a folder."""
        if self.folder is not None and entry.path is None:
            try:
                entry.path = _written(entry, self.folder)
            except (OSError, RuntimeError):  # MLX raises RuntimeError
                entry.path = None
        if entry.path is None:
            self._entries.remove(entry)
        entry.layers = None

    def _remove(self, entry: Prefix) -> None:
        self._entries.remove(entry)
        _unlink(entry)


def common_length(first: np.ndarray, second: np.ndarray) -> int:
    """How many tokens both begin with."""
    length = min(len(first), len(second))
    differing = np.flatnonzero(first[:length] != second[:length])
    return int(differing[0]) if len(differing) else length


def _unlink(entry: Prefix) -> None:
    if entry.path is not None:
        entry.path.unlink(missing_ok=True)
        entry.path = None


def _written(entry: Prefix, folder: Path) -> Path:
    from mlx_lm.models.cache import save_prompt_cache

    assert entry.layers is not None
    ids = entry.ids.astype("<i4").tobytes()
    name = hashlib.sha256(entry.key.encode() + b"\0" + ids).hexdigest()[:32]
    described = {
        "key": entry.key,
        "ids": json.dumps(entry.ids.tolist()),
        "n_bytes": str(entry.n_bytes),
        "trimmable": json.dumps(entry.trimmable),
    }
    path = folder / (name + SUFFIX)
    with files.draft(path) as temporary:
        save_prompt_cache(str(temporary), entry.layers, described)
    return path


def _described(path: Path) -> Prefix | None:
    """What the header of a file says, or None if it is not one of ours."""
    try:
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            metadata = json.loads(file.read(min(length, MOST_HEADER)))["__metadata__"]
        ids = np.array(json.loads(metadata["0.ids"]), np.int32)
        trimmable = json.loads(metadata["0.trimmable"]) is True
        return Prefix(str(metadata["0.key"]), ids, int(metadata["0.n_bytes"]), trimmable, None, path)
    except (OSError, ValueError, KeyError, TypeError, struct.error, OverflowError):
        return None
