"""What is computed once for each tokenizer: the bytes of its tokens, and its grammars."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from functools import cached_property
from typing import TypeVar

from tunesmith.engine.grammars import Grammars
from tunesmith.errors import ModelError
from tunesmith.serving.rejections import TimedOut
from tunesmith.tokens.template import Renderer

T = TypeVar("T")


class Lexicon:
    """Of ``renderer``."""

    def __init__(self, renderer: Renderer) -> None:
        self._renderer = renderer
        self._alone = asyncio.Lock()
        """Held while a thread uses the grammars, even if nobody waits for it any more."""

    @cached_property
    def _grammars(self) -> Grammars:
        return Grammars(self._renderer, self._bytes or None)

    async def compiled(self, compile_with: Callable[[Grammars], T], seconds: float) -> T:
        """The result of ``compile_with``, called in a thread of its own, one at a time: a large vocabulary
        takes seconds, in which streams go on. Raises TimedOut if that takes more than ``seconds``, ModelError
        if answers cannot be constrained, and what ``compile_with`` raises."""
        try:
            async with asyncio.timeout(seconds):
                await self._alone.acquire()
                thread = asyncio.create_task(asyncio.to_thread(lambda: compile_with(self._grammars)))
                thread.add_done_callback(self._release)
                return await asyncio.shield(thread)
        except TimeoutError:
            message = f"the form of the answer was not compiled within {seconds:g} s"
            raise TimedOut(message, hint="ask for a smaller schema") from None

    def _release(self, thread: asyncio.Task[T]) -> None:
        self._alone.release()
        if not thread.cancelled():
            thread.exception()  # nobody may wait for it any more

    @cached_property
    def _bytes(self) -> list[bytes]:
        """Of all tokens; empty if they are not known."""
        try:
            return self._renderer.token_bytes()
        except ModelError:
            return []

    def token(self, token: int) -> tuple[str, list[int] | None]:
        """The text of a token, and its bytes, or None if they are not known. A part of a character is shown
        as U+FFFD. The first call computes the bytes of all tokens, which takes 0.4 s at 150,000."""
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
