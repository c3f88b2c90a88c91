"""What is computed once for each tokenizer: the bytes of its tokens, and its grammars."""

from __future__ import annotations

import asyncio
from functools import cached_property

from tunesmith.engine.grammars import Grammars
from tunesmith.errors import ModelError
from tunesmith.tokens.template import Renderer


class Lexicon:
    """Of ``renderer``. ``alone``: held by the only task that uses ``grammars``, in a thread of its own."""

    def __init__(self, renderer: Renderer) -> None:
        self._renderer = renderer
        self.alone = asyncio.Lock()

    @cached_property
    def grammars(self) -> Grammars:
        """Raises ModelError if answers cannot be constrained."""
        return Grammars(self._renderer)

    @cached_property
    def _bytes(self) -> list[bytes]:
        try:
            return self._renderer.token_bytes()
        except ModelError:
            return []

    def token(self, token: int) -> tuple[str, list[int] | None]:
        """The text of a token, and its bytes, or None if they are not known. A part of a character is shown
        as U+FFFD."""
        if token < len(self._bytes):
            known = self._bytes[token]
            return known.decode(errors="replace"), list(known)
        return self._renderer.decode([token]), None


class Lexicons:
    """Those of all renderers that were asked for."""

    def __init__(self) -> None:
        self._made: dict[tuple[str, bool], Lexicon] = {}

    def of(self, renderer: Renderer) -> Lexicon:
        """Renderers that give the same ids and ask for reasoning alike share one."""
        key = renderer.fingerprint, renderer.thinking
        if key not in self._made:
            self._made[key] = Lexicon(renderer)
        return self._made[key]
