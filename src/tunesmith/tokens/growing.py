"""The text of ids that come one by one. It equals the decoding of all of them, at the price of decoding the
last few; but some tokenizers decode a byte that was a letter anew if bytes that make no character follow."""

from __future__ import annotations

from tunesmith.tokens.template import Renderer

HALF = "\ufffd"
"""How a character decodes whose last bytes are still to come."""


class GrowingText:
    """``text``: of all ids so far, up to the last whole character."""

    def __init__(self, renderer: Renderer) -> None:
        self.text = ""
        self._renderer = renderer
        self._ids: list[int] = []  # those of the last addition to `text`, and those after it
        self._before = ""  # the former, decoded
        self._n_before = 0

    def add(self, token: int) -> None:
        """One more id."""
        self._ids.append(token)
        decoded = self._renderer.decode(self._ids)
        # A token may lose its first space if it is decoded alone, so the one before it is decoded too.
        if not decoded.endswith(HALF):
            self.text += decoded[len(self._before) :]
            self._ids = self._ids[self._n_before :]
            self._n_before = len(self._ids)
            self._before = self._renderer.decode(self._ids)

    def finish(self) -> None:
        """No more ids: half a character at the end is shown as `HALF`."""
        self.text += self._renderer.decode(self._ids)[len(self._before) :]
        self._ids, self._before, self._n_before = [], "", 0
