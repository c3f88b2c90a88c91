"""docs/museum.md names tests that exist, and every test that belongs to the museum."""

from __future__ import annotations

import ast
import re
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "museum.md").read_text("utf-8")
ROWS = [line for line in PAGE.splitlines() if "::" in line]
TEST = re.compile(r"`(tests/[\w/]+\.py)::(test_\w+)`")
THREAD = re.compile(r"https://github\.com/[\w.-]+/[\w.-]+/(?:issues|pull)/(\d+)")
TOLD = re.compile(r"Each of the (\d+) links .* (\d+) numbers .* (\d+) of the (\d+) rows link no thread", re.S)


@cache
def functions(path: Path) -> dict[str, str]:
    """The docstrings of the tests of a file by name."""
    tree = ast.parse(path.read_text("utf-8"))
    return {
        node.name: ast.get_docstring(node) or ""
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef) and node.name.startswith("test")
    }


def source(path: Path, name: str) -> str:
    """Of a file, without its other tests, which may have a number by chance."""
    text = path.read_text("utf-8")
    nodes = [
        node
        for node in ast.parse(text).body
        if getattr(node, "name", name) == name or not getattr(node, "name", "").startswith("test_")
    ]
    return "\n".join(ast.get_source_segment(text, node) or "" for node in nodes)


def test_every_row_names_tests_that_exist_and_know_its_issues():
    assert len(ROWS) >= 70
    for row in ROWS:
        tests = TEST.findall(row)
        assert tests, row
        missing = [name for file, name in tests if name not in functions(ROOT / file)]
        assert not missing, missing
        numbers = {number for file, name in tests for number in re.findall(r"\d+", source(ROOT / file, name))}
        unknown = set(THREAD.findall(row)) - numbers
        assert not unknown, f"{unknown}: {row}"


def test_every_test_of_the_museum_is_on_the_page():
    shown = set(TEST.findall(PAGE))
    own = {
        (path.relative_to(ROOT).as_posix(), name)
        for path in (ROOT / "tests").rglob("test_*.py")
        if path != Path(__file__)
        for name, about in functions(path).items()
        if path.name == "test_museum.py" or "museum" in name or re.search(r"\bmuseum\b", about, re.I)
    }
    assert len(own) >= 60 and own - shown == set()


def test_the_page_counts_the_links_that_were_checked_and_the_numbers_that_were_not_found():
    links = {match.group() for row in ROWS for match in THREAD.finditer(row)}
    without = [row for row in ROWS if not THREAD.search(row)]
    told = TOLD.search(PAGE)
    assert told, PAGE[:900]
    counts = [len(links), sum(row.count("(not found)") for row in ROWS), len(without), len(ROWS)]
    assert [int(number) for number in told.groups()] == counts
