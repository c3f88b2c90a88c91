"""The commands of README, guides and docs/troubleshooting.md do what their pages show."""

from __future__ import annotations

import time
from pathlib import Path

import forks
import pytest

from documents import blocks
from documents.blocks import Command, Reader

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", DOCS / "troubleshooting.md", *sorted((DOCS / "guides").rglob("*.md"))]
RUN = {
    page: [
        command
        for block in blocks.blocks(page.read_text("utf-8"))
        if not block.mark
        for command in block.commands
    ]
    for page in PAGES
}


@pytest.mark.parametrize("page", [page for page in PAGES if RUN[page]], ids=lambda page: page.stem)
def test_the_commands_of_a_page_do_what_it_shows(page, tmp_path):
    folder = tmp_path / "page"
    folder.mkdir()
    blocks.chats(folder)
    with Reader(folder) as reader:
        for name in blocks.needs(page.read_text("utf-8")):
            blocks.FILES[name](reader)
        assert not blocks.failures(page.name, RUN[page], reader)


def test_most_commands_are_run():
    every = [block for page in PAGES for block in blocks.blocks(page.read_text("utf-8"))]
    not_run = [block for block in every if block.mark.startswith("not run")]
    assert sum(map(len, RUN.values())) >= 30
    assert len(not_run) <= 0.2 * len(every)


@pytest.fixture
def reader(tmp_path):
    folder = tmp_path / "page"
    folder.mkdir()
    blocks.chats(folder)
    with Reader(folder) as reader:
        yield reader


def said(reader: Reader, text: str, *output: str) -> str:
    return "".join(blocks.failures("page.md", [Command(7, text, output)], reader))


PAGE = """# A page
<!-- needs: runs/a pairs.jsonl -->

```console
$ tunesmith audit \\
> mine.jsonl
…
page: audit.html
$ echo done
done
```

<!-- not run: a Mac is needed -->
```console
$ open report.html
```
```
$ none of ours
```
"""


def test_a_page_has_commands_with_their_places_and_marks():
    first, second = blocks.blocks(PAGE)
    assert first.mark == "" and second.mark == "not run: a Mac is needed"
    assert first.commands == (
        Command(5, "tunesmith audit \\\nmine.jsonl", ("…", "page: audit.html")),
        Command(9, "echo done", ("done",)),
    )
    assert blocks.needs(PAGE) == ["runs/a", "pairs.jsonl"]
    with pytest.raises(ValueError, match="line 2"):
        blocks.blocks("```console\nno command\n```\n")


@pytest.mark.parametrize(
    ("shown", "actual"),
    [
        (["loss 3.6482 → 0.0286, n 60"], ["loss 1.5 → 12.25, n 9"]),
        (["-3.4 to +3.4 points"], ["+1.1e-05 to −1,200 points"]),
        (["144.8 MB in 3 m 05 s, 12.5/s"], ["1.23 GB in 4 s, 3.2 s each"]),
        (["runs/2026-11-29-055928"], ["runs/2027-01-01-120000"]),
        (["rows      120 read"], ["rows   7 read  "]),
        (["one", "…", "four"], ["one", "two", "three", "four"]),
        (["…", "four", "…"], ["four"]),
        (["says … loudly"], ["says this and that loudly"]),
        (["…"], []),
        ([], ["", ""]),
        (["────", "a"], ["────────", "a", ""]),
    ],
)
def test_output_that_matches(shown, actual):
    assert blocks.difference(shown, actual) == ""


@pytest.mark.parametrize(
    ("shown", "actual", "named"),
    [
        (["verdict good"], ["verdict bad"], "-verdict good\n+verdict bad"),
        (["loss 3.1"], ["loss nan"], "+loss nan"),
        (["one", "two"], ["one"], "-two"),
        (["one"], ["one", "two"], "+two"),
        ([], ["said something"], "+said something"),
        (["one", "…", "four"], ["one", "two", "four", "five"], "+five"),
        (["…", "two", "one"], ["one", "two"], "-one"),
        (["in 4 s"], ["in 4 MB"], "+in 4 MB"),
    ],
)
def test_output_that_does_not_match_is_shown(shown, actual, named):
    assert named in blocks.difference(shown, actual)


def test_lines_that_match_are_not_shown_as_different():
    told = blocks.difference(["rows 3", "verdict good"], ["rows 9", "verdict bad"])
    assert " rows 3" in told and "rows 9" not in told


@pytest.mark.parametrize("command", ["tunesmith --version", "tunesmith --version | cat"])
def test_a_command_that_says_something_else_fails_with_its_place(reader, command):
    assert said(reader, command, "tunesmith 0.0.0") == ""
    told = said(reader, command, "version 0.0.0")
    assert told.startswith(f"page.md:7: $ {command}\n") and "-version 0.0.0\n+tunesmith" in told


@pytest.mark.parametrize(
    ("command", "status"), [("tunesmith train --data mine.jsonl", 2), ("(exit 3)", 3), ("false | cat", 0)]
)
def test_a_command_that_fails_fails_unless_its_status_is_shown(reader, command, status):
    assert (said(reader, command, "…") == "") == (status == 0)
    assert said(reader, command, "…", f"[exit status {status}]") == ""
    assert f"exit status {status}" in said(reader, command, "…", "[exit status 9]")


def test_both_streams_are_read_in_the_order_in_which_they_were_written(reader):
    words = "import sys; print(1); print('two', file=sys.stderr); print('three')"
    assert said(reader, f'python -c "{words}"', "1", "two", "three") == ""


def test_a_fork_writes_both_streams_in_the_order_of_its_lines(reader):
    code = "import sys; print('one'); print('two', file=sys.stderr)"
    words = ["timeit", "-n1", "-r1", code]
    out = reader.output
    assert forks.shared().start(words, reader.environ, reader.folder, out, out).wait() == 0
    assert out.read_text().splitlines()[:2] == ["one", "two"]


def test_what_a_command_exports_holds_for_the_next(reader):
    assert said(reader, "mkdir -p sub && cd sub && export WHO=reader") == ""
    assert said(reader, 'echo "$WHO in ${PWD##*/}"', "reader in sub") == ""
    assert said(reader, "tunesmith audit mine.jsonl", "…", "[exit status 3]") == ""


def test_what_a_command_leaves_running_is_killed(tmp_path):
    (tmp_path / "page").mkdir()
    with Reader(tmp_path / "page") as reader:
        assert said(reader, "sleep 1000 & echo $! > pid") == ""
        pid = int((reader.folder / "pid").read_text())
    deadline = time.monotonic() + 20  # a busy machine ends it some time after the signal
    while running(pid) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not running(pid)


def running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().split()[2] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_the_first_command_that_fails_is_the_last(reader):
    commands = [Command(1, "false", ()), Command(2, "touch after", ())]
    (told,) = blocks.failures("page.md", commands, reader)
    assert told.startswith("page.md:1") and not (reader.folder / "after").exists()


def test_what_pages_can_ask_for_is_there(reader):
    for name in ("pairs.jsonl", "general.jsonl", "runs/a:evaluated"):
        blocks.FILES[name](reader)
    rows = (reader.folder / "pairs.jsonl").read_text().splitlines()
    assert len(rows) >= 20 and "rejected" in rows[0]
    assert (reader.folder / "general.jsonl").stat().st_size
    assert (reader.folder / "runs" / "a" / "report.html").stat().st_size
