"""Grammars are compiled one at a time, and nobody waits for ever."""

from __future__ import annotations

import asyncio
import time

import pytest

from tunesmith.serving.lexicon import Lexicon
from tunesmith.serving.rejections import TimedOut


@pytest.fixture
def lexicon() -> Lexicon:
    made = Lexicon.__new__(Lexicon)
    made._alone = asyncio.Lock()
    made._grammars = None
    return made


def test_a_client_that_goes_leaves_the_grammars_to_its_thread(lexicon):
    running: list[str] = []

    def compile_with(_grammars) -> int:
        running.append("begins")
        time.sleep(0.2)
        running.append("ends")
        return 7

    async def ask() -> int:
        first = asyncio.create_task(lexicon.compiled(compile_with, 5))
        await asyncio.sleep(0.05)
        first.cancel()
        return await lexicon.compiled(compile_with, 5)

    assert asyncio.run(ask()) == 7
    assert running == ["begins", "ends"] * 2


def test_the_wait_for_a_grammar_is_limited(lexicon):
    async def ask() -> None:
        slow = asyncio.create_task(lexicon.compiled(lambda _: time.sleep(0.4), 5))
        await asyncio.sleep(0.05)
        with pytest.raises(TimedOut, match="compiled"):
            await lexicon.compiled(lambda _: None, 0.1)
        await slow
        assert await lexicon.compiled(lambda _: 1, 1) == 1

    asyncio.run(ask())
