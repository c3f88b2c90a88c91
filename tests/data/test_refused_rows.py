"""What is said of a refused row is about that row; what is said to help does help."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import tunesmith
from tunesmith.data import formats
from tunesmith.data.formats import DataSpec, Preference, Read
from tunesmith.errors import DataError
from tunesmith.tokens import renderers
from tunesmith.tokens.template import TemplateSpec, render

CASES = Path(__file__).resolve().parents[2].parent / "shared" / "cases"
CALL = '<tool_call>\n{"name": "f", "arguments": {"x": 1}}\n</tool_call>'
ASK, ANSWER = {"role": "user", "content": "u"}, {"role": "assistant", "content": "a"}


def read(folder: Path, *rows: dict, **settings) -> Read:
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return formats.read([folder / "rows.jsonl"], DataSpec(train="x", **settings))


def said(conversation) -> list[tuple[str, str]]:
    return [(message.role, message.content) for message in conversation.messages]


@pytest.mark.parametrize(
    ("turns", "hint"),
    [
        ([ASK, ASK, ANSWER], "join the turns of one speaker"),
        ([ASK, ANSWER, ANSWER], "join the turns of one speaker"),
        ([ANSWER, ASK, ANSWER], "put the greeting into the system text"),
        ([ASK, ANSWER, ASK], "drop the turns after the last answer"),
        ([ASK, {"role": "assistant", "content": ""}, ASK, ANSWER], "drop the turn, or the row"),
        ([ASK, {"role": "system", "content": "s"}, ANSWER], "put it first"),
        ([ASK, ANSWER | {"content": CALL}, {"role": "tool", "content": "4"}, ANSWER], "data.structure_calls"),
    ],
)
def test_each_refusal_of_an_order_says_what_to_do(tmp_path, turns, hint):
    (bad,) = read(tmp_path, {"messages": turns}).dropped
    assert hint in bad.message and "None" not in bad.message


@pytest.mark.parametrize("given", ["", " ", "\n"])
def test_empty_arguments_are_told_to_be_an_object(tmp_path, given):
    call = {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": given}}]}
    (bad,) = read(tmp_path, {"messages": [ASK, call]}).dropped
    assert "write {} if there are none" in bad.message and "array" not in bad.message


def test_broken_arguments_are_not_told_about_files(tmp_path):
    call = {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{'x'"}}]}
    (bad,) = read(tmp_path, {"messages": [ASK, call]}).dropped
    assert "JSON" in bad.message and "array" not in bad.message


def test_a_hint_is_said_once_with_the_number_of_its_rows(tmp_path):
    turns = [[ASK, ASK, ANSWER]] * 12 + [[ANSWER, ASK, ANSWER]] + [[ASK, ANSWER]]
    with pytest.raises(DataError) as caught:
        formats.require(read(tmp_path, *({"messages": row} for row in turns)), 0.05)
    lines = str(caught.value).splitlines()
    assert [line for line in lines if line.startswith("hint: ")] == [
        "hint: join the turns of one speaker into one (12 rows)",
        "hint: put the greeting into the system text, or begin with what the user says (1 row)",
        "hint: allow more than 5.0% with data.max_dropped",
    ]
    places = [line for line in lines if line.startswith("  ")]
    assert len(places) == 13 and not any("hint:" in line for line in places)


def test_a_row_that_holds_the_words_of_a_hint_moves_nothing_into_the_hint(tmp_path):
    (bad,) = read(tmp_path, {"messages": [ASK, ASK | {"role": "clerk; hint: my secret"}]}).dropped
    assert "clerk; hint: my secret" in bad.fault and bad.message == bad.fault
    assert bad.hint == ""


def test_where_all_rows_are_bad_nobody_is_told_to_allow_more():
    bad = [formats.Dropped(f"f:{n}", "type", "m", "") for n in range(3)]
    for allowed in (0.05, 1.0):
        with pytest.raises(DataError) as caught:
            formats.require(Read([], bad, 3, {"f": ""}), allowed)
        assert "allow more" not in str(caught.value)


@pytest.mark.parametrize("empty", ["", " \n", None])
def test_an_empty_system_text_is_no_system_text(tmp_path, empty):
    rows = [
        {"messages": [{"role": "system", "content": empty}, ASK, ANSWER]},
        {
            "conversations": [
                {"from": "system", "value": empty},
                *({"from": r, "value": v} for r, v in (("human", "u"), ("gpt", "a"))),
            ]
        },
        {"system": empty, "instruction": "u", "output": "a"},
        {"prompt": [{"role": "system", "content": empty}, ASK], "chosen": "a", "rejected": "b"},
    ]
    result = read(tmp_path, *rows)
    assert result.dropped == []
    for example in result.examples:
        conversation = example.chosen if isinstance(example, Preference) else example.conversation
        assert said(conversation) == [("user", "u"), ("assistant", "a")]
    counted = formats.remarks(result.examples)
    assert {remark.text for remark in counted} == {"empty system text left out"}


# Pairs

HH = "\n\nHuman: Can you sing?\n\nAssistant: A little.\n\nHuman: Do it.\n\nAssistant:"


def test_turns_of_hh_rlhf_are_turns(tmp_path):
    (pair,) = read(tmp_path, {"chosen": f"{HH} La: la.\n\nLa.", "rejected": f"{HH} No."}).examples
    before = [("user", "Can you sing?"), ("assistant", "A little."), ("user", "Do it.")]
    assert said(pair.chosen) == [*before, ("assistant", "La: la.\n\nLa.")]
    assert said(pair.rejected) == [*before, ("assistant", "No.")]
    assert [remark.text for remark in pair.remarks] == [
        "chosen and rejected with Human: and Assistant: before each turn: read as turns"
    ]


@pytest.mark.parametrize(
    ("chosen", "rejected"),
    [("Human: hi", "Human: ho"), ("A man said:\n\nHuman: hi\n\nAssistant: a", "b"), ("Assistant: a", "b")],
)
def test_other_pairs_without_a_prompt_are_refused(tmp_path, chosen, rejected):
    (bad,) = read(tmp_path, {"chosen": chosen, "rejected": rejected}).dropped
    assert bad.reason == "prompt" and "question" in bad.message


def test_pairs_of_orca_have_their_question(tmp_path):
    row = {"system": "Be kind.", "question": "Who?", "chosen": "Ann.", "rejected": "Bo."}
    (pair,) = read(tmp_path, row).examples
    assert said(pair.chosen) == [("system", "Be kind."), ("user", "Who?"), ("assistant", "Ann.")]
    assert said(pair.rejected)[2] == ("assistant", "Bo.") and pair.metadata == {} and pair.remarks == ()


# Calls in marks


def hermes(*turns: tuple[str, str]) -> dict:
    return {"conversations": [{"from": speaker, "value": text} for speaker, text in turns]}


TOOL_TURN = ("tool", "<tool_response>\n4\n</tool_response>")


def test_calls_in_marks_become_calls_and_results(tmp_path):
    row = hermes(("human", "u"), ("gpt", f"Let me see.\n{CALL}"), TOOL_TURN, ("gpt", "Four."))
    (example,) = read(tmp_path, row, structure_calls=True).examples
    _, asked, result, answer = example.conversation.messages
    (call,) = asked.calls
    assert (asked.content, call.name, call.arguments) == ("Let me see.", "f", {"x": 1})
    assert (result.role, result.content, result.call_id, result.name) == ("tool", "4", call.id, "f")
    assert answer.content == "Four."
    assert "calls in <tool_call> marks: read as calls" in [remark.text for remark in example.remarks]


def test_two_calls_and_both_results_in_one_turn(tmp_path):
    results = ("tool", f"{TOOL_TURN[1]}\n<tool_response>5</tool_response>")
    row = hermes(("human", "u"), ("gpt", f"{CALL}\n{CALL}"), results, ("gpt", "So."))
    (example,) = read(tmp_path, row, structure_calls=True).examples
    messages = example.conversation.messages
    assert [message.content for message in messages[2:4]] == ["4", "5"]
    assert [message.call_id for message in messages[2:4]] == [call.id for call in messages[1].calls]


@pytest.mark.parametrize(
    "text", ["<tool_call>{", f"{CALL} and more", "<tool_call>\nf(1)\n</tool_call>", f"{CALL} or {CALL}"]
)
def test_marks_that_cannot_be_read_are_refused(tmp_path, text):
    row = hermes(("human", "u"), ("gpt", text), TOOL_TURN, ("gpt", "Four."))
    (bad,) = read(tmp_path, row, structure_calls=True).dropped
    assert bad.reason == "call"


def test_a_corrected_copy_has_the_calls_as_turns(tmp_path):
    row = hermes(("human", "u"), ("gpt", CALL), TOOL_TURN, ("gpt", "Four."))
    read(tmp_path, row)
    result = tunesmith.audit(tmp_path / "rows.jsonl", fix=tmp_path / "out.jsonl", sets=["data.valid=0"])
    assert (result.fixed.written, sum(result.fixed.removed.values())) == (1, 0)
    (example,) = formats.read([tmp_path / "out.jsonl"], DataSpec(train="x")).examples
    assert example.conversation.messages[1].calls[0].arguments == {"x": 1}


def test_a_corrected_copy_is_never_empty(tmp_path):
    read(tmp_path, {"messages": [ASK]}, {"messages": [ANSWER]})
    with pytest.raises(DataError, match="no row is left"):
        tunesmith.audit(tmp_path / "rows.jsonl", fix=tmp_path / "out.jsonl", sets=["data.valid=0"])
    assert not list(tmp_path.glob("*out*"))


def test_a_corrected_copy_drops_words_beside_calls_if_asked(tmp_path):
    call = {"function": {"name": "f", "arguments": {}}}
    turns = [ASK, ANSWER | {"tool_calls": [call]}, {"role": "tool", "content": "4"}, ANSWER]
    read(tmp_path, {"messages": turns})
    for rule, words in (("refuse", "a"), ("drop_words", "")):
        out = tmp_path / f"{rule}.jsonl"
        sets = ["data.valid=0", f"template.words_beside_calls={rule}"]
        fixed = tunesmith.audit(tmp_path / "rows.jsonl", fix=out, sets=sets).fixed
        (example,) = formats.read([out], DataSpec(train="x")).examples
        assert example.conversation.messages[1].content == words
        assert fixed.changed["structure.words_beside_calls"] == (rule == "drop_words")


# Reported files


def test_the_reported_files_are_read_or_refused_with_their_reason():
    if not CASES.is_dir():
        pytest.skip("the reported files are absent: shared/cases")
    whole = [
        "08_dpo_json_text",
        "08_messages_text",
        "08_prompt_json_text",
        "10_system_beside_prompt",
        "14_empty_system",
        "12_tool_call",
        "12_parallel_calls",
    ]
    for name in whole:
        result = formats.read([CASES / f"{name}.jsonl"], DataSpec(train="x"))
        assert result.dropped == [] and result.rows, name
        assert not any(isinstance(example, formats.Completion) for example in result.examples)
    for name in ("18_empty_arguments", "19_role_order"):
        result = formats.read([CASES / f"{name}.jsonl"], DataSpec(train="x"))
        assert result.examples == [] and all("hint: " in bad.message for bad in result.dropped)
    mistral = renderers.load("mistral-v3")
    for name in ("03_plain", "04_completion"):
        examples = formats.read([CASES / f"{name}.jsonl"], DataSpec(train="x")).examples
        assert render(examples, mistral, TemplateSpec(), 2048).dropped == []
    texts = formats.read([CASES / "07_text_templated.jsonl"], DataSpec(train="x")).examples
    refused = render(texts, mistral, TemplateSpec(), 2048).dropped
    assert [bad.reason for bad in refused] == ["text_control"] * len(texts)
    rows = render(texts, mistral.follow(TemplateSpec(), "read"), TemplateSpec(), 2048).rows
    assert all(row.tokens.ids[:2].tolist() == [1, 3] and row.tokens.ids[-1] == 2 for row in rows)
    assert len(rows) == len(texts)
    calls = formats.read([CASES / "13_hermes.jsonl"], DataSpec(train="x", structure_calls=True))
    assert calls.dropped == [] and calls.rows == 1
    pytest.importorskip("pyarrow")
    assert formats.read([CASES / "17_rows.jsonl.zst"], DataSpec(train="x")).dropped == []
