"""Keys that mean something elsewhere are read where they can mean only that, and told where not."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tunesmith.data import formats
from tunesmith.data.examples import REASONING_BESIDE
from tunesmith.data.formats import DataSpec, Document, Judged, Preference, Read, RowRemark
from tunesmith.errors import DataError

TURNS = [{"role": "user", "content": "u"}, {"role": "assistant", "content": "a"}]


def read(folder: Path, *rows: dict, **settings) -> Read:
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return formats.read([folder / "rows.jsonl"], DataSpec(train="x", **settings))


def alone(folder: Path, row: dict, **settings):
    result = read(folder, row, **settings)
    assert result.dropped == []
    return result.examples[0]


def said(conversation) -> list[tuple[str, str]]:
    return [(message.role, message.content) for message in conversation.messages]


def test_a_system_text_beside_prompt_and_completion_is_the_system_turn(tmp_path):
    example = alone(tmp_path, {"system": "French only.", "prompt": "Say one.", "completion": "un"})
    assert said(example.conversation) == [
        ("system", "French only."),
        ("user", "Say one."),
        ("assistant", "un"),
    ]
    assert [remark.text for remark in example.remarks] == [
        "prompt and completion with a system text: read as a conversation"
    ]
    plain = alone(tmp_path, {"system": "", "prompt": "Say one.", "completion": "un"})
    assert (plain.prompt, plain.completion, plain.remarks) == ("Say one.", "un", ())


@pytest.mark.parametrize(
    ("given", "verdict"),
    [(1, True), (0, False), ("good", True), ("Rejected ", False), ("true", True), ("0", False)],
)
def test_a_verdict_as_a_number_or_word_is_read_and_counted(tmp_path, given, verdict):
    for key in ("label", "kto_tag"):
        example = alone(tmp_path, {"messages": TURNS, key: given})
        assert isinstance(example, Judged) and example.desirable is verdict and example.metadata == {}
        text = f"{key} read as a verdict: {json.dumps(given)} is {json.dumps(verdict)}"
        assert example.remarks == (RowRemark(text),)


def test_a_kto_tag_is_the_label(tmp_path):
    assert alone(tmp_path, {"messages": TURNS, "kto_tag": False}).desirable is False
    assert alone(tmp_path, {"messages": TURNS, "kto_tag": True, "label": True}).desirable is True
    (bad,) = read(tmp_path, {"messages": TURNS, "kto_tag": True, "label": False}).dropped
    assert bad.reason == "label"


@pytest.mark.parametrize("given", [2, -1, 0.5, "maybe", "positive", [True]])
def test_what_is_no_verdict_is_refused(tmp_path, given):
    (bad,) = read(tmp_path, {"messages": TURNS, "label": given}).dropped
    assert bad.reason == "label" and "rename the key" in bad.message


def test_a_number_beside_plain_text_may_be_its_class(tmp_path):
    for given in (0, 1, "good"):
        (bad,) = read(tmp_path, {"text": "a film", "label": given}).dropped
        assert bad.reason == "label"
    assert alone(tmp_path, {"text": "a film", "label": True}).label is True


@pytest.mark.parametrize(
    ("row", "key", "beside"),
    [
        ({"text": "t", "system": "s"}, "system", "text"),
        ({"prompt": "p", "completion": "c", "history": [["q", "a"]]}, "history", "prompt and completion"),
        ({"prompt": "p", "completion": "c", "tools": [{"name": "f"}]}, "tools", "prompt and completion"),
        ({"messages": TURNS, "images": ["x.png"]}, "images", "messages"),
        ({"messages": TURNS, "weight": 0}, "weight", "messages"),
        ({"instruction": "i", "output": "o", "rejected": "r"}, "rejected", "instruction and output"),
        ({"chosen": "a", "rejected": "b", "prompt": "p", "kto_tag": True}, "kto_tag", "chosen and rejected"),
    ],
)
def test_a_key_that_is_not_read_is_told(tmp_path, row, key, beside):
    example = alone(tmp_path, row)
    assert example.remarks == (RowRemark(f"{key} is not read beside {beside}: metadata", doubt=True),)
    assert example.metadata[key] == row[key]


def test_keys_without_meaning_or_content_are_metadata_in_silence(tmp_path):
    for row in ({"text": "t", "source": "book"}, {"text": "t", "system": ""}, {"text": "t", "tools": []}):
        example = alone(tmp_path, row)
        assert isinstance(example, Document) and example.remarks == ()
        assert example.metadata == {key: value for key, value in row.items() if key != "text"}


def test_the_label_of_a_pair_is_metadata(tmp_path):
    example = alone(tmp_path, {"prompt": "p", "chosen": "a", "rejected": "b", "label": "x"})
    assert isinstance(example, Preference) and example.metadata == {"label": "x"}


CHAT_ROWS = [
    {"instruction": "u", "output": "a"},
    {"prompt": TURNS[:1], "completion": TURNS[1:]},
    {"prompt": TURNS[:1], "completion": "a"},
    {"system": "s", "prompt": "u", "completion": "a"},
    {"messages": TURNS},
    {"messages": [*TURNS, *TURNS]},
    {"conversations": [{"from": "human", "value": "u"}, {"from": "gpt", "value": "a"}]},
]
THOUGHT = "<think>\nhm, a\n</think>\n\na"


@pytest.mark.parametrize("key", ["reasoning_content", "reasoning", "thinking"])
@pytest.mark.parametrize("row", CHAT_ROWS)
def test_a_column_of_reasoning_is_that_of_the_last_answer(tmp_path, row, key):
    row = row | {key: "hm, a"}
    example = alone(tmp_path, row)
    answers = [content for role, content in said(example.conversation) if role == "assistant"]
    assert answers == ["a"] * (len(answers) - 1) + [THOUGHT] and example.metadata == {}
    assert RowRemark(REASONING_BESIDE) in example.remarks
    assert not any(remark.doubt for remark in example.remarks)
    assert said(alone(tmp_path, row, reasoning="think").conversation)[-1] == ("assistant", THOUGHT)
    assert said(alone(tmp_path, row, reasoning="omit").conversation)[-1] == ("assistant", "a")
    (bad,) = read(tmp_path, row, reasoning="refuse").dropped
    assert bad.reason == "reasoning" and bad.message.startswith(key)


CALL = {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{}"}}]}


@pytest.mark.parametrize(
    "row",
    [
        {"text": "t", "reasoning": "hm, a"},
        {"prompt": "p", "completion": "c", "reasoning_content": "hm, a"},
        {"prompt": "p", "chosen": "a", "rejected": "b", "thinking": "hm, a"},
        {"messages": TURNS, "label": True, "reasoning": "a is right"},
        {"messages": [TURNS[0], CALL, {"role": "tool", "content": "r"}, TURNS[1]], "reasoning": "hm, a"},
        {"messages": [TURNS[0], TURNS[1] | {"reasoning": "own"}], "reasoning": "hm, a"},
        {"messages": [TURNS[0], TURNS[1] | {"content": THOUGHT}], "reasoning": "hm, a"},
        {"messages": TURNS, "reasoning": "off"},
        {"messages": TURNS, "reasoning": "High"},
        {"messages": TURNS, "thinking": True},
        {"messages": TURNS, "reasoning": ["hm, a"]},
        {"messages": TURNS, "reasoning": "hm, a", "thinking": "hm, b"},
    ],
)
def test_a_column_of_reasoning_that_may_be_something_else_is_told(tmp_path, row):
    for setting in ("auto", "think"):
        example = alone(tmp_path, row, reasoning=setting)
        columns = {"reasoning_content", "reasoning", "thinking"} & row.keys()
        doubts = {remark.text.split()[0] for remark in example.remarks if remark.doubt}
        assert doubts == columns and {key: example.metadata[key] for key in columns} == {
            key: row[key] for key in columns
        }


def test_a_column_of_reasoning_beside_instruct_text_is_told(tmp_path):
    row = {"instruction": "u", "output": "a", "reasoning": "hm, a"}
    example = alone(tmp_path, row, instruction_layout="instruct")
    text = "reasoning is not read beside instruction and output: metadata"
    assert example.remarks == (RowRemark(text, doubt=True),)


def test_a_column_of_reasoning_is_no_answer(tmp_path):
    (bad,) = read(tmp_path, {"instruction": "u", "output": "", "reasoning": "hm, a"}).dropped
    assert bad.reason == "empty_assistant"


def test_rows_refused_for_their_reasoning_are_told_how_to_leave_it_out(tmp_path):
    row = {"messages": TURNS, "reasoning": "hm, a"}
    with pytest.raises(DataError) as caught:
        formats.require(read(tmp_path, row, reasoning="refuse"), 0.1)
    hint = "data.reasoning=auto learns it as the template writes it, omit leaves it out (1 row)"
    assert caught.value.hint == hint
    with pytest.raises(DataError) as caught:
        formats.require(read(tmp_path, row, {"text": 3}, reasoning="refuse"), 0.1)
    assert caught.value.hint == hint
