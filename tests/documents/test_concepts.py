"""The examples in docs/concepts are run, and give what the pages show."""

from __future__ import annotations

import doctest
import re
from pathlib import Path

import pytest

PAGES = sorted((Path(__file__).parents[2] / "docs" / "concepts").glob("*.md"))
BLOCK = re.compile(r"^```pycon\n(.*?)^```$", re.M | re.S)


def session(page: Path) -> doctest.DocTest:
    """The blocks of a page as one session; its lines keep their numbers."""
    text = page.read_text("utf-8")
    lines = [""] * text.count("\n")
    for block in BLOCK.finditer(text):
        first = text.count("\n", 0, block.start(1))
        for number, line in enumerate(block[1].splitlines(), first):
            lines[number] = line
    return doctest.DocTestParser().get_doctest("\n".join(lines) + "\n", {}, page.name, str(page), 0)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_the_examples_of_a_page_give_what_it_shows(page):
    said: list[str] = []
    results = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS).run(session(page), out=said.append)
    assert results.failed == 0, "".join(said)


def test_all_pages_are_found():
    assert len(PAGES) >= 7 and sum(len(session(page).examples) for page in PAGES) >= 60
