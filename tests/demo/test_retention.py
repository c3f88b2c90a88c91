"""The rows that the demo mixes in: readable, labelled by who answered, and none near a row of a suite."""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path

import pytest
from rapidfuzz.distance import Levenshtein

from tunesmith.checks.refusals import refuses
from tunesmith.data import formats
from tunesmith.demo import __main__ as script
from tunesmith.demo import retention
from tunesmith.evaluation import suites

COMMON = set(
    "a an the of in on to do i my is what how for and can be with it that at from who does was".split()
)


def words(text: str) -> str:
    return " ".join(re.findall(r"[a-z0-9]+", text.lower()))


def prompt(row: dict) -> str:
    return row["text"] if "text" in row else row["messages"][0]["content"]


def asked_by_suites() -> list[str]:
    made = [
        entry.row for suite in ("safety", "chats", "knowledge", "text") for entry in suites.entries(suite, [])
    ]
    return [words(str(row.get("prompt") or row.get("question") or row["text"])) for row in made]


def test_every_row_is_read_and_says_who_answered():
    rows = retention.rows()
    assert len(rows) > 150
    kinds = Counter(row["kind"] for row in rows)
    assert set(kinds) == {"refusal", "contrast", "chat", "facts", "prose"}
    base = Counter(row["kind"] for row in rows if row["answered"] == "base")
    assert {row["answered"] for row in rows} == {"own", "base"}
    assert set(base) == {"refusal", "contrast", "chat"} and base.total() > 50


def test_the_file_that_the_demo_writes_is_read_whole(tmp_path):
    path = retention.write(tmp_path / retention.NAME)
    read = formats.read([path], formats.DataSpec(train=(str(path),)))
    assert read.dropped == [] and len(read.examples) == len(retention.rows())


def test_only_answers_to_harmful_prompts_refuse():
    for row in retention.rows():
        if "messages" in row:
            assert refuses(row["messages"][1]["content"]) == (row["kind"] == "refusal"), row


def test_no_prompt_is_in_the_file_twice():
    prompts = [words(prompt(row)) for row in retention.rows()]
    assert len(set(prompts)) == len(prompts)


@pytest.mark.parametrize("least", [0.7])
def test_no_row_is_near_a_row_of_a_suite(least):
    """By edit distance, and by the words that are not common."""
    known = asked_by_suites()
    assert len(known) > 700
    for text in (words(prompt(row)) for row in retention.rows()):
        rare = set(text.split()) - COMMON
        for other in known:
            others = set(other.split()) - COMMON
            assert Levenshtein.normalized_similarity(text, other) < least, (text, other)
            assert len(rare & others) < 0.6 * len(rare | others), (text, other)


def test_the_demo_distils_every_row_once_unless_told(tmp_path, monkeypatch):
    class Configured(Exception):
        pass

    def configure(**given):
        raise Configured(given["sets"])

    monkeypatch.setattr(script, "fetch_model", lambda folder: folder)
    monkeypatch.setattr(script.tunesmith, "configure", configure)
    with pytest.raises(Configured) as plain:
        script.demo(tmp_path / "a", 20, ["loop.epochs=1"], alone=True)
    with pytest.raises(Configured) as mixed:
        script.demo(tmp_path / "b", 20, ["loop.epochs=1"])
    first = [json.loads((tmp_path / name / "tools.jsonl").read_text().splitlines()[0]) for name in ("a", "b")]
    assert [row["conversations"][0]["role"] for row in first] == ["user", "system"]
    assert plain.value.args[0] == ["loop.epochs=1"]
    *kept, setting, last = mixed.value.args[0]
    assert tuple(kept) == script.KEEPING
    (entry,) = json.loads(setting.removeprefix("data.mix="))
    written = [json.loads(line) for line in Path(entry["path"]).read_text("utf-8").splitlines()]
    assert (written, entry["repeat"], last) == (retention.rows(), 1, "loop.epochs=1")
    assert (entry["distill"], entry["weight"]) == (True, script.WEIGHT)
