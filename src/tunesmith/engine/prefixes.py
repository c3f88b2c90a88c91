"""Keys and values of prompts that were read before, for later prompts that begin alike."""

from __future__ import annotations

from pathlib import Path


class Prefixes:
    """``limit``: most bytes that it holds in memory; the least recently used prefixes leave first.
    ``folder``: where they are also written, so that they outlive the process."""

    def __init__(self, limit: int, folder: Path | None = None) -> None:
        self.limit, self.folder = limit, folder
