"""The demo's data set: the same everywhere, no two rows alike, and every label true."""

from __future__ import annotations

import hashlib
import json
import random
from types import SimpleNamespace

import pytest

from tunesmith.checks.calls import ReferenceAnswer, references, score
from tunesmith.checks.parsers import parse
from tunesmith.data import formats
from tunesmith.data.formats import Call, Conversation, Message
from tunesmith.demo import data as demo_data
from tunesmith.demo.data import FAULTS, INVENTED, TOOLS, generate
from tunesmith.errors import DataError

SEEDS = (0, 1, 2, 1234567)


def prompt(row: dict) -> str:
    return row["conversations"][0]["content"]


def given(row: dict) -> str:
    return row["conversations"][1]["content"]


def judged(row: dict) -> dict:
    """The row's answer against the right call."""
    (call,) = parse(row["expected"])
    assert call.problem is None
    asked = Conversation((Message("user", prompt(row)),))
    return score(given(row), ReferenceAnswer("", asked, (Call(call.name, call.arguments),)))


def test_the_rows_of_a_seed_never_change():
    """Golden: the sequence of random.Random(seed).random() is the same on every Python."""
    text = json.dumps(generate(400, 0), ensure_ascii=False)
    assert hashlib.sha256(text.encode()).hexdigest()[:16] == "338587d369f1f1d2"
    assert generate(50, 7) == generate(50, 7)
    assert generate(50, 7) != generate(50, 8)


def test_nothing_but_random_random_is_drawn(monkeypatch):
    """What Python does not promise to keep (choice, shuffle, sample, …) is not used, nor is the global
    generator."""

    class OnlyRandom:
        def __init__(self, seed: int) -> None:
            self.random = random.Random(seed).random

    expected = generate(60, 3)
    monkeypatch.setattr(demo_data, "random", SimpleNamespace(Random=OnlyRandom))
    assert generate(60, 3) == expected


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("rows", [1, 40, 400, 3000])
def test_no_two_requests_are_alike_and_the_shares_hold(rows, seed):
    made = generate(rows, seed)
    assert len(made) == rows
    assert len({" ".join(prompt(row).lower().split()) for row in made}) == rows
    assert sum(row["label"] is True for row in made) == round(0.75 * rows)
    if rows >= 400:
        counts = [sum(row["tool"] == tool.name for row in made) for tool in TOOLS]
        assert max(counts) - min(counts) <= 1
        faults = [sum(row["fault"] == fault for row in made) for fault in FAULTS]
        assert max(faults) - min(faults) <= 1


@pytest.mark.parametrize("seed", SEEDS)
def test_every_right_row_is_exactly_right(seed):
    rows = [row for row in generate(1000, seed) if row["label"]]
    assert len(rows) == 750
    for row in rows:
        detail = judged(row)
        assert (detail["value"], detail["exact_arguments"], row["fault"]) == (1.0, True, None)
        assert given(row) == row["expected"]
        head, arguments = given(row).split("\n")
        assert head == f"tool_call: {row['tool']}"
        assert arguments.startswith('arguments: {"')


FAILS = {
    "wrong_tool": {"well_formed": True, "right_tool": False},
    "missing_argument": {"well_formed": True, "right_tool": True, "keys_present": False},
    "malformed_json": {"well_formed": False, "right_tool": True},
    "invented_argument": {"well_formed": True, "right_tool": True, "keys_present": True},
    "prose": {"well_formed": False, "called": []},
}


@pytest.mark.parametrize("seed", SEEDS)
def test_every_wrong_row_has_exactly_the_fault_it_names(seed):
    rows = [row for row in generate(1000, seed) if not row["label"]]
    assert len(rows) == 250
    for row in rows:
        detail = judged(row)
        assert detail["exact_arguments"] is False
        expected = FAILS[row["fault"]]
        assert {check: detail[check] for check in expected} == expected, row


def test_every_value_of_every_tool_can_be_copied_from_each_of_its_requests():
    assert len(TOOLS) >= 24
    assert len({tool.name for tool in TOOLS}) == len(TOOLS)
    templates = [phrase for tool in TOOLS for phrase in tool.requests]
    assert len(set(templates)) == len(templates)
    for tool in TOOLS:
        assert len(tool.requests) >= 6
        assert 1 <= len(tool.slots) <= 3
        assert not set(INVENTED) & set(tool.slots)
        for phrase in tool.requests:
            assert all(phrase.count(f"{{{slot}}}") == 1 for slot in tool.slots), phrase
            assert phrase.count("{") == len(tool.slots), phrase
            assert phrase[-1] in ".?!" and (phrase[0].isupper() or phrase[0] == "{"), phrase
        for slot, values in tool.slots.items():
            assert len(set(values)) == len(values), (tool.name, slot)
    for row in generate(3000, 5):
        (call,) = parse(row["expected"])
        assert all(str(value) in prompt(row) for value in call.arguments.values())


def test_rows_are_short():
    """About 50 to 90 tokens at three to four characters each, and the template's own."""
    lengths = [len(prompt(row)) + len(given(row)) for row in generate(400, 0)]
    assert 70 < sum(lengths) / len(lengths) < 180
    assert max(lengths) < 260


def test_a_system_message_comes_first_and_changes_nothing_else():
    plain, told = generate(40, 1), generate(40, 1, demo_data.SYSTEM)
    for row in told:
        assert row["conversations"].pop(0) == {"role": "system", "content": demo_data.SYSTEM}
    assert told == plain


def test_rows_of_some_tools_name_no_other_even_where_they_are_wrong():
    names = {tool.name for tool in demo_data.TWELVE}
    assert len(names) == 12
    rows = generate(240, 0, tools=demo_data.TWELVE)
    assert {row["tool"] for row in rows} == names
    called = {call.name for row in rows if row["fault"] == "wrong_tool" for call in parse(given(row))}
    assert called and called <= names


def test_the_file_holds_the_rows(tmp_path):
    path = demo_data.write(tmp_path / "demo.jsonl", rows=30, seed=4)
    raw = path.read_bytes()
    assert b"\r" not in raw and raw.endswith(b"\n")
    rows = [json.loads(line) for line in raw.decode("utf-8").splitlines()]
    assert rows == generate(30, 4)
    read = formats.read([path], formats.DataSpec(train=(str(path),)))
    assert read.dropped == []
    for row, example in zip(rows, read.examples, strict=True):
        assert isinstance(example, formats.Judged)
        assert (example.desirable, example.metadata["fault"]) == (row["label"], row["fault"])
        asked = references(example)
        assert [call.name for call in asked.calls] == [row["tool"]] if row["label"] else asked is None


def test_all_requests_can_be_had_and_not_one_more():
    with pytest.raises(DataError, match="hint: give a number from 1 to") as error:
        generate(10**6)
    most = int(str(error.value).rsplit(" ", 1)[1])
    assert most >= 3000
    assert len({prompt(row) for row in generate(most, 2)}) == most
    for rows in (0, -1, most + 1):
        with pytest.raises(DataError):
            generate(rows)
