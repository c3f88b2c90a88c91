"""Which prompts ``loop.prompts`` means."""

from __future__ import annotations

import pytest

from tunesmith.errors import ConfigError
from tunesmith.runs import prompts


def test_texts_files_and_shipped_lists_become_texts(tmp_path):
    lines, rows = tmp_path / "lines.txt", tmp_path / "rows.jsonl"
    lines.write_text("One?\n\nTwo?\n")
    rows.write_text('{"prompt": "Three?", "id": 3}\n"Four?"\n')
    entries = ["Read notes.txt", str(lines), str(rows), "One?"]
    assert prompts.resolve(entries) == ("Read notes.txt", "One?", "Two?", "Three?", "Four?")


def test_five_prompts_ship_with_the_package():
    assert list(prompts.shipped()) == ["assistant"] and len(prompts.resolve(["assistant"])) == 5


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("missing.txt", None, "cannot be read"),
        ("empty.txt", "\n\n", "holds no prompt"),
        ("bad.jsonl", '{"prompt": "a"}\n{', r"bad\.jsonl:2: is not JSON"),
        ("bad.jsonl", '{"text": "a"}\n', r"bad\.jsonl:1: has no prompt"),
    ],
)
def test_a_file_without_prompts_is_refused(tmp_path, name, content, message):
    if content is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises(ConfigError, match=message):
        prompts.resolve([str(tmp_path / name)])
