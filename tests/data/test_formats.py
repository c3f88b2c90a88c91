"""Files of every layout become examples with no word changed; bad rows are named; no prompt is on both
sides."""

from __future__ import annotations

import gzip
import json
import os
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from tunesmith.data import formats
from tunesmith.data.examples import REASONING_BESIDE
from tunesmith.data.formats import (
    Call,
    Completion,
    Conversation,
    DataSpec,
    Demonstration,
    Document,
    Judged,
    Message,
    Preference,
    Read,
)
from tunesmith.errors import DataError

few = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}
USER, ANSWER = {"role": "user", "content": "u"}, {"role": "assistant", "content": "a"}


def spec(**settings) -> DataSpec:
    return DataSpec(train="x", **settings)


def read_text(folder: Path, text: str | bytes, name: str = "rows.jsonl", **settings) -> Read:
    path = folder / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return formats.read([path], spec(**settings))


def read_rows(folder: Path, *rows, **settings) -> Read:
    return read_text(folder, "".join(json.dumps(row) + "\n" for row in rows), **settings)


def one(folder: Path, row, **settings):
    read = read_rows(folder, row, **settings)
    assert read.dropped == []
    (example,) = read.examples
    return example


def said(example) -> list[tuple[str, str]]:
    return [(message.role, message.content) for message in example.conversation.messages]


def called(call_id=None, arguments: object = "{}", name="f") -> dict:
    return {
        "role": "assistant",
        "content": None,
        "tool_calls": [
            {"type": "function", "function": {"name": name, "arguments": arguments}}
            | ({"id": call_id} if call_id else {})
        ],
    }


# Layouts

PLAIN = [("system", "s"), ("user", "u"), ("assistant", "a")]


@pytest.mark.parametrize(
    "row",
    [
        {"messages": [{"role": "system", "content": "s"}, USER, ANSWER]},
        {"messages": [{"role": "developer", "content": "s"}, USER, ANSWER]},
        {"system": "s", "messages": [USER, ANSWER]},
        {"conversations": [{"role": "system", "content": "s"}, USER, ANSWER]},
        {"system": "s", "conversations": [{"from": "human", "value": "u"}, {"from": "gpt", "value": "a"}]},
        {"system": "s", "instruction": "u", "input": "", "output": "a"},
        {"system": "s", "instruction": "", "input": "u", "output": "a", "history": []},
        {"prompt": [{"role": "system", "content": "s"}, USER], "completion": [ANSWER]},
        {"system": "s", "prompt": "u", "completion": [ANSWER]},
        {
            "messages": [{"role": "system", "content": [{"type": "text", "text": "s"}]}, USER, ANSWER],
            "text": "rendered",
        },
    ],
)
def test_one_conversation_in_every_layout(tmp_path, row):
    example = one(tmp_path, row)
    assert isinstance(example, Demonstration) and said(example) == PLAIN
    for label in (True, False):
        judged = one(tmp_path, row | {"label": label})
        assert isinstance(judged, Judged) and judged.desirable is label and said(judged) == PLAIN
    assert isinstance(one(tmp_path, row | {"label": None}), Demonstration)


def test_an_instruction_with_input_and_history(tmp_path):
    row = {
        "instruction": "Add.",
        "input": "1 2",
        "output": "3",
        "history": [["q", "r"]],
        "system": "Be brief.",
    }
    assert said(one(tmp_path, row)) == [
        ("system", "Be brief."),
        ("user", "q"),
        ("assistant", "r"),
        ("user", "Add.\n\n1 2"),
        ("assistant", "3"),
    ]
    pair = one(tmp_path, row | {"chosen": "3", "rejected": "4"}, instruction_layout="instruct")
    assert pair.chosen.messages[-2].content == "Add.\n\n1 2"
    example = one(tmp_path, row | {"label": True}, instruction_layout="instruct")
    assert isinstance(example, Completion) and example.label is True
    assert example.completion == "3"
    assert example.prompt == (
        "Be brief.\n\n### Instruction:\nq\n\n### Response:\nr\n\n### Instruction:\nAdd.\n\n### Input:\n1 "
        "2\n\n### Response:\n"
    )


def test_plain_text(tmp_path):
    assert one(tmp_path, {"text": " t\n", "label": False}) == Document(
        " t\n", False, source=f"{tmp_path}/rows.jsonl:1"
    )
    row = {"prompt": " p ", "completion": " c\n", "label": True, "extra": [1]}
    example = one(tmp_path, row)
    assert (example.prompt, example.completion, example.label, example.metadata) == (
        " p ",
        " c\n",
        True,
        {"extra": [1]},
    )


CHOSEN, REJECTED = {"role": "assistant", "content": "good"}, {"role": "assistant", "content": "bad"}


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "u", "chosen": "good", "rejected": "bad"},
        {"prompt": [USER], "chosen": [CHOSEN], "rejected": [REJECTED]},
        {"chosen": [USER, CHOSEN], "rejected": [USER, REJECTED]},
        {"prompt": "u", "chosen": [USER, CHOSEN], "rejected": [USER, REJECTED], "messages": [USER, CHOSEN]},
        {
            "conversations": [{"from": "human", "value": "u"}],
            "chosen": {"from": "gpt", "value": "good"},
            "rejected": {"from": "gpt", "value": "bad"},
        },
        {"instruction": "", "input": "u", "chosen": "good", "rejected": "bad"},
        {"messages": [USER], "chosen": CHOSEN, "rejected": REJECTED},
    ],
)
def test_one_preference_in_every_layout(tmp_path, row):
    example = one(tmp_path, row | {"system": "s", "tools": json.dumps([TOOL["function"]]), "label": False})
    assert isinstance(example, Preference)
    asked = (Message("system", "s"), Message("user", "u"))
    assert example.chosen == Conversation((*asked, Message("assistant", "good")), (TOOL,))
    assert example.rejected == Conversation((*asked, Message("assistant", "bad")), (TOOL,))


def test_a_named_layout_is_used_and_another_is_refused(tmp_path):
    row = {
        "messages": [USER, ANSWER],
        "conversations": [USER, REJECTED],
        "text": "t",
        "prompt": "p",
        "completion": "c",
    }
    assert (
        said(one(tmp_path, row))
        == said(one(tmp_path, row, format="messages"))
        == [("user", "u"), ("assistant", "a")]
    )
    assert said(one(tmp_path, row, format="sharegpt")) == [("user", "u"), ("assistant", "bad")]
    assert one(tmp_path, row, format="text").text == "t"
    assert one(tmp_path, row, format="completion").completion == "c"
    assert said(one(tmp_path, {"conversations": [USER, ANSWER]}, format="messages")) == [
        ("user", "u"),
        ("assistant", "a"),
    ]
    (bad,) = read_rows(tmp_path, row, format="alpaca").dropped
    assert (
        bad.reason == "layout" and "instruction+output" in bad.message and "data.format=auto" in bad.message
    )


def test_extra_keys_are_kept_as_metadata(tmp_path):
    example = one(tmp_path, {"messages": [USER | {"at": 3, "none": None}, ANSWER], "topic": {"x": [1, None]}})
    assert example.metadata == {"topic": {"x": [1, None]}, "message_keys": {"messages[0]": {"at": 3}}}
    assert one(tmp_path, {"text": "t", "metadata": {"a": 1}}).metadata == {"a": 1}
    assert one(tmp_path, {"text": "t", "metadata": {"a": 1}, "a": 2}).metadata == {
        "metadata": {"a": 1},
        "a": 2,
    }


@pytest.mark.parametrize(
    ("key", "on", "off"), [("learn", True, False), ("weight", 1, 0), ("train", True, False)]
)
def test_flags_of_a_message(tmp_path, key, on, off):
    example = one(
        tmp_path,
        {"messages": [USER | {key: off}, ANSWER | {key: on}, USER, ANSWER | {key: off}, USER, ANSWER]},
    )
    assert [message.learn for message in example.conversation.messages] == [
        False,
        True,
        None,
        False,
        None,
        None,
    ]
    rows = [{"messages": [USER, ANSWER | {key: "yes"}]}, {"messages": [USER | {key: on}, ANSWER]}]
    assert [bad.reason for bad in read_rows(tmp_path, *rows).dropped] == ["learn", "learn"]


def test_a_share_of_learning_and_two_minds_are_refused(tmp_path):
    rows = [
        {"messages": [USER, ANSWER | flags]} for flags in ({"weight": 0.5}, {"learn": True, "train": False})
    ]
    assert [bad.reason for bad in read_rows(tmp_path, *rows).dropped] == ["learn", "learn"]


# Tools

EXACT = '{"b": 1.0, "a": [1, 12345678901234567890123, -0.5, null, ""], "z": {"y": true, "x": "\\u00e9 \\n"}}'


def test_museum_13_null_content_with_tool_calls(tmp_path):
    """Crashes or loses the row in mlx-forge, mlxsmith and slm-forge."""
    row = {
        "tools": [TOOL],
        "messages": [
            USER,
            called("id1"),
            {"role": "tool", "tool_call_id": "id1", "content": None},
            ANSWER,
            USER,
            called("id2"),
        ],
    }
    first = one(tmp_path, row).conversation
    assert first.messages[1] == Message("assistant", "", (Call("f", {}, "id1", "{}"),))
    assert first.messages[2] == Message("tool", "", call_id="id1") and first.tools == (TOOL,)
    del row["messages"][1]["content"]
    assert one(tmp_path, row).conversation == first


def test_museum_axolotl_2909_no_null_is_invented_into_arguments(tmp_path):
    """github.com/axolotl-ai-cloud/axolotl/pull/2909: Arrow gives each row the keys of all others, with
    null."""
    given = [{"city": "Paris"}, {"days": 2, "deep": [{"a": 1}, {"b": 2}]}, {}, {"days": None}]
    read = read_rows(tmp_path, *[{"messages": [USER, called(arguments=arguments)]} for arguments in given])
    assert [example.conversation.messages[1].calls[0].arguments for example in read.examples] == given


@pytest.mark.parametrize("as_string", [True, False])
def test_nested_arguments_stay_exactly_as_written(tmp_path, as_string):
    row = json.dumps({"messages": [USER, called(arguments="@")]}).replace(
        '"@"', json.dumps(EXACT) if as_string else EXACT
    )
    (example,) = read_text(tmp_path, row).examples
    (call,) = example.conversation.messages[1].calls
    assert json.dumps(call.arguments) == EXACT and call.text == (EXACT if as_string else None)


def test_the_ways_to_write_a_call(tmp_path):
    bare = {"name": "f", "arguments": {"x": 1}}
    ways = [
        {"messages": [USER, {"role": "assistant", "function_call": {"name": "f", "arguments": '{"x": 1}'}}]},
        {"messages": [USER, {"role": "assistant", "content": "", "tool_calls": [bare]}]},
        {
            "conversations": [
                {"from": "human", "value": "u"},
                {"from": "function_call", "value": json.dumps(bare)},
            ]
        },
        {
            "conversations": [
                {"from": "human", "value": "u"},
                {"from": "function_call", "value": json.dumps([bare])},
            ]
        },
        {
            "messages": [
                USER,
                {"role": "assistant", "content": [{"type": "tool_call", "value": json.dumps(bare)}]},
            ]
        },
    ]
    for row in ways:
        (call,) = one(tmp_path, row | {"tools": json.dumps([{"name": "f"}])}).conversation.messages[1].calls
        assert (call.name, call.arguments, call.id) == ("f", {"x": 1}, None)
    legacy = [*ways[0]["messages"], {"role": "function", "name": "f", "content": "r"}, ANSWER]
    assert said(one(tmp_path, {"messages": legacy, "functions": [{"name": "f"}]}))[2] == ("tool", "r")
    words = {"role": "assistant", "content": "Let me look.", "tool_calls": [bare, bare]}
    assert len(one(tmp_path, {"messages": [USER, words]}).conversation.messages[1].calls) == 2


def test_results_are_matched_by_id_in_any_order(tmp_path):
    two = {"role": "assistant", "tool_calls": [called(name)["tool_calls"][0] for name in ("one", "two")]}
    result = [{"role": "tool", "tool_call_id": name, "content": name} for name in ("two", "one")]
    messages = one(tmp_path, {"messages": [USER, two, *result, ANSWER]}).conversation.messages
    assert [message.call_id for message in messages[2:4]] == ["two", "one"]


def test_reasoning_apart_from_the_answer_is_refused_marked_or_left_out(tmp_path):
    parts = [{"type": "reasoning", "value": "hm"}, {"type": "text", "value": "a"}]
    for answer in ({"role": "assistant", "content": parts}, ANSWER | {"reasoning_content": "hm"}):
        row = {"messages": [USER, answer]}
        assert [bad.reason for bad in read_rows(tmp_path, row, reasoning="refuse").dropped] == ["reasoning"]
        by_default = one(tmp_path, row)
        assert said(by_default)[1] == ("assistant", "<think>\nhm\n</think>\n\na")
        assert [remark.text for remark in by_default.remarks] == [REASONING_BESIDE]
        assert said(one(tmp_path, row, reasoning="think"))[1] == ("assistant", "<think>\nhm\n</think>\n\na")
        assert said(one(tmp_path, row, reasoning="omit"))[1] == ("assistant", "a")


# Bad rows

RESULT = {"role": "tool", "tool_call_id": "i", "content": "r"}


@pytest.mark.parametrize(
    ("reason", "row"),
    [
        ("type", [1]),
        ("type", "text"),
        ("type", None),
        ("layout", {}),
        ("layout", {"question": "q"}),
        ("layout", {"messages": None}),
        ("type", {"messages": []}),
        ("type", {"messages": 3}),
        ("type", {"messages": [3]}),
        ("role", {"messages": [{"role": "narrator", "content": "x"}, ANSWER]}),
        ("role", {"messages": [{"role": []}]}),
        ("content", {"messages": [{"role": "user", "content": {"a": 1}}, ANSWER]}),
        ("content", {"messages": [{"role": "user", "content": 0}, ANSWER]}),
        (
            "content",
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}, ANSWER]},
        ),
        ("label", {"messages": [USER, ANSWER], "label": "perhaps"}),
        ("label", {"text": "t", "label": 1}),
        ("leading_assistant", {"messages": [ANSWER, USER, ANSWER]}),
        ("leading_assistant", {"messages": [{"role": "system", "content": "s"}, ANSWER]}),
        ("role_order", {"messages": [USER, USER, ANSWER]}),
        ("role_order", {"messages": [USER, ANSWER, ANSWER]}),
        ("role_order", {"messages": [USER, {"role": "system", "content": "s"}, ANSWER]}),
        ("role_order", {"system": "s", "messages": [{"role": "system", "content": "t"}, USER, ANSWER]}),
        ("role_order", {"messages": [USER, RESULT, ANSWER]}),
        ("role_order", {"messages": [RESULT, ANSWER]}),
        ("no_answer", {"messages": [USER]}),
        ("no_answer", {"messages": [USER, ANSWER, USER]}),
        ("no_answer", {"messages": [USER, called("i"), RESULT]}),
        ("empty_assistant", {"messages": [USER, {"role": "assistant", "content": None}]}),
        ("empty_assistant", {"messages": [USER, {"role": "assistant", "content": None, "tool_calls": None}]}),
        ("empty_assistant", {"messages": [USER, {"role": "assistant", "content": " \n", "tool_calls": []}]}),
        ("empty_assistant", {"instruction": "u", "output": ""}),
        ("empty_user", {"instruction": "", "output": "a"}),
        ("empty_user", {"messages": [{"role": "user"}, ANSWER]}),
        ("empty", {"text": " "}),
        ("empty", {"prompt": "p", "completion": ""}),
        ("type", {"text": 3}),
        ("type", {"instruction": "i", "output": "o", "history": [["q"]]}),
        ("undeclared_tool", {"tools": [TOOL], "messages": [USER, called("i", name="g")]}),
        ("arguments", {"messages": [USER, called("i", "{'a': 1}")]}),
        ("arguments", {"messages": [USER, called("i", "[1]")]}),
        ("arguments", {"messages": [USER, called("i", None)]}),
        ("arguments", {"messages": [USER, called("i", "")]}),
        ("arguments", {"messages": [USER, called("i", '{"a": 1, "a": 2}')]}),
        ("arguments", {"messages": [USER, called("i", '{"a": NaN}')]}),
        ("arguments", {"messages": [USER, called("i", '{"a": "\\ud800"}')]}),
        ("call", {"messages": [USER, called("i", "{}", "")]}),
        ("call", {"messages": [USER, ANSWER | {"tool_calls": {"a": 1}}]}),
        ("call", {"messages": [USER | {"tool_calls": called("i")["tool_calls"]}, ANSWER]}),
        (
            "call",
            {"conversations": [{"from": "human", "value": "u"}, {"from": "function_call", "value": "f(x)"}]},
        ),
        ("call_id", {"messages": [USER, called("i"), RESULT | {"tool_call_id": "j"}, ANSWER]}),
        ("call_id", {"messages": [USER, called("i"), {"role": "tool", "content": "r"}, ANSWER]}),
        ("call_id", {"messages": [USER, called("i"), RESULT, RESULT, ANSWER]}),
        ("call_id", {"messages": [USER, called("i"), RESULT | {"name": "g"}, ANSWER]}),
        ("call_id", {"messages": [USER, {"role": "assistant", "tool_calls": called("i")["tool_calls"] * 2}]}),
        ("call_id", {"messages": [USER, ANSWER, RESULT, ANSWER]}),
        ("unanswered_call", {"messages": [USER, called("i"), USER, ANSWER]}),
        (
            "unanswered_call",
            {
                "messages": [
                    USER,
                    {"role": "assistant", "tool_calls": called()["tool_calls"] * 2},
                    {"role": "tool", "content": "r"},
                    ANSWER,
                ]
            },
        ),
        ("tools", {"tools": "[", "messages": [USER, ANSWER]}),
        ("tools", {"tools": [{}], "messages": [USER, ANSWER]}),
        ("role_order", {"chosen": "good", "rejected": "bad", "messages": [USER, ANSWER]}),
        ("prompt", {"prompt": "u", "chosen": "same", "rejected": "same"}),
        ("prompt", {"prompt": "v", "chosen": [USER, CHOSEN], "rejected": [USER, REJECTED]}),
        ("prompt", {"chosen": [USER, CHOSEN], "rejected": [{"role": "user", "content": "v"}, REJECTED]}),
        ("prompt", {"chosen": "good", "rejected": "bad"}),
    ],
)
def test_a_bad_row_is_named_with_its_reason(tmp_path, reason, row):
    read = read_rows(tmp_path, {"text": "good"}, row, {"text": "good, too"})
    assert [example.text for example in read.examples] == ["good", "good, too"] and read.rows == 3
    (bad,) = read.dropped
    assert (bad.source, bad.reason, bad.raw) == (f"{tmp_path}/rows.jsonl:2", reason, json.dumps(row))
    assert "expected " in bad.message and "found " in bad.message


@pytest.mark.parametrize(
    ("reason", "raw"),
    [
        ("json", b'{"text": "a"'),
        ("json", b'{"text": "a"} {"text": "b"}'),
        ("json", b"{'text': 'a'}"),
        ("json", b"text"),
        ("json", b'{"text": "a", "text": "b"}'),
        ("json", b'{"text": "a", "x": NaN}'),
        ("json", b'{"text": "a", "x": 1e999}'),
        ("json", b'{"text": "a", "x": ' + b"1" * 5000 + b"}"),
        ("json", b'{"x": ' + b"[" * 100_000),
        ("json", b'{"text": "a", "x": ' + b"[" * 5000 + b"]" * 5000 + b"}"),
        ("encoding", b'{"text": "caf\xe9"}'),
        ("encoding", b'{"text": "a \\ud83d b"}'),
        ("encoding", b'{"\\udc00": "a"}'),
    ],
)
def test_a_line_that_is_no_text_or_no_json_is_dropped_alone(tmp_path, reason, raw):
    read = read_text(tmp_path, b'{"text": "1"}\n\n' + raw + b'\r\n{"text": "\\ud83d\\ude00 \xc3\xa9"}')
    assert [example.text for example in read.examples] == ["1", "😀 é"]
    (bad,) = read.dropped
    assert (bad.source, bad.reason) == (f"{tmp_path}/rows.jsonl:3", reason)
    assert bad.raw == raw.decode("utf-8", "surrogateescape")
    formats.write_dropped(read.dropped, tmp_path / "data" / "dropped.jsonl")
    lines = (tmp_path / "data" / "dropped.jsonl").read_text(encoding="ascii").splitlines()
    assert [json.loads(line) for line in lines] == [
        {"source": bad.source, "reason": reason, "message": bad.message, "raw": bad.raw}
    ]


def test_rows_nested_to_any_depth_never_raise(tmp_path):
    """A call inside a string is written deeper than it was read."""
    rows = []
    for depth in range(600, 1000):
        call = '{"name": "f", "arguments": {"x": ' + "[" * depth + "]" * depth + "}}"
        rows.append(
            {"conversations": [{"from": "human", "value": "u"}, {"from": "function_call", "value": call}]}
        )
    read = read_rows(tmp_path, *rows)
    assert read.rows == 400 and {bad.reason for bad in read.dropped} <= {"json", "call"}


json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-2, 2)
    | st.sampled_from(["", "u", "assistant", "user", "tool", "{}", "[]"]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(
                [
                    "messages",
                    "conversations",
                    "role",
                    "from",
                    "content",
                    "value",
                    "tool_calls",
                    "function",
                    "name",
                    "arguments",
                    "id",
                    "tools",
                    "prompt",
                    "completion",
                    "chosen",
                    "rejected",
                    "instruction",
                    "input",
                    "output",
                    "history",
                    "system",
                    "text",
                    "label",
                    "type",
                    "learn",
                    "weight",
                    "tool_call_id",
                    "function_call",
                    "metadata",
                    "functions",
                    "reasoning",
                ]
            ),
            inner,
            max_size=4,
        )
    ),
    max_leaves=12,
)
messages = st.lists(
    st.fixed_dictionaries(
        {
            "role": st.sampled_from(["user", "assistant", "tool", "system"]),
            "content": st.sampled_from(["a", "", None]),
        },
        optional={
            "tool_calls": json_values,
            "learn": json_values,
            "name": json_values,
            "tool_call_id": json_values,
        },
    ),
    max_size=4,
)
rows = json_values | st.fixed_dictionaries(
    {"messages": messages}, optional={"tools": json_values, "label": st.booleans()}
)


@few
@given(st.lists(rows, max_size=8))
def test_no_row_raises_and_none_is_lost(tmp_path, rows):
    rows = [{"text": "no array"}, *rows]
    read = read_rows(tmp_path, *rows)
    assert read.rows == len(rows) == len(read.examples) + len(read.dropped)
    sources = [item.source for item in (*read.examples, *read.dropped)]
    assert sorted(sources) == sorted(f"{tmp_path}/rows.jsonl:{line}" for line in range(1, len(rows) + 1))


# Files

texts = st.text(min_size=1).filter(str.strip)
turns = st.lists(st.tuples(texts, texts), min_size=1, max_size=3)


@st.composite
def sound_rows(draw) -> dict:
    said = [
        m
        for asked, answer in draw(turns)
        for m in ({"role": "user", "content": asked}, {"role": "assistant", "content": answer})
    ]
    extra = draw(st.dictionaries(st.sampled_from(["x", "metadata", "label"]), st.booleans(), max_size=2))
    kind = draw(st.sampled_from(["messages", "text", "completion", "preference", "calls"]))
    if kind == "text":
        return {"text": draw(texts), **extra}
    if kind == "completion":
        return {"prompt": draw(st.text()), "completion": draw(texts), **extra}
    if kind == "preference":
        return {"chosen": [*said[:-1], CHOSEN], "rejected": [*said[:-1], REJECTED], **extra}
    if kind == "calls":
        arguments = draw(
            st.dictionaries(
                st.text(), st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.none()
            )
        )
        said[-1] = called(
            draw(st.none() | st.just("id")), draw(st.sampled_from([arguments, json.dumps(arguments)]))
        )
        return {"messages": said, "tools": [TOOL], **extra}
    said[-1] |= {"learn": draw(st.none() | st.booleans()), "name": draw(st.none() | st.just("n"))}
    return {"messages": said, **extra}


def content(read: Read) -> list:
    return [(type(e), e.id, e.metadata, [getattr(e, key) for key in e.__slots__]) for e in read.examples]


@few
@given(
    st.lists(sound_rows(), max_size=6),
    st.booleans(),
    st.sampled_from(["", "\ufeff"]),
    st.sampled_from([None, 1]),
)
def test_lines_arrays_and_gzip_of_the_same_rows_are_the_same(tmp_path, rows, ascii_only, mark, indent):
    lines = mark + "".join(json.dumps(row, ensure_ascii=ascii_only) + "\n" for row in rows)
    array = mark + json.dumps(rows, ensure_ascii=ascii_only, indent=indent) + "\n"
    reads = [
        read_text(tmp_path, lines),
        read_text(tmp_path, array, "rows.json"),
        read_text(tmp_path, lines.rstrip("\n")),
        read_text(tmp_path, gzip.compress(lines.encode()), "rows.jsonl.gz"),
        read_text(tmp_path, lines.replace("\n", "\r\n")),
        read_text(tmp_path, gzip.compress(array.encode()), "rows.json.gz"),
    ]
    assert [read.rows for read in reads] == [len(rows)] * len(reads)
    assert [read.dropped for read in reads] == [[]] * len(reads)
    assert all(content(read) == content(reads[0]) for read in reads)
    for row, example in zip(rows, reads[1].examples, strict=True):
        if "messages" in row:
            assert said(example) == [(m["role"], m["content"] or "") for m in row["messages"]]


@few
@given(st.lists(sound_rows(), max_size=6))
def test_what_is_written_is_read_again_equal(tmp_path, rows):
    read = read_rows(tmp_path, *rows)
    formats.write_examples(read.examples, tmp_path / "again.jsonl")
    again = formats.read([tmp_path / "again.jsonl"], spec())
    assert again.dropped == [] and content(again) == content(read)


def test_a_table_and_what_is_no_file_are_refused_at_once(tmp_path):
    (tmp_path / "rows.xlsx").write_text("prompt,answer\na,b\n")
    with pytest.raises(DataError, match=r"rows\.xlsx: is a XLSX file\nhint: write it as JSONL"):
        formats.read([tmp_path / "rows.xlsx"], spec())
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(DataError, match="is not a regular file"):
        formats.read([tmp_path / "pipe"], spec())


def test_rows_of_an_array_have_the_line_they_start_on(tmp_path):
    read = read_text(
        tmp_path, '\n[\n{"text":\n"a"},\n\n {"text": 3}\n,{"text": "b"}, {"text": "c"}\n]\n', "a.json"
    )
    at = [item.source.partition("a.json:")[2] for item in (*read.examples, *read.dropped)]
    assert at == ["3", "7", "7:17", "6"] and read.dropped[0].raw == '{"text": 3}'


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("[\n{}\n{}]", 3),
        ("[{},\n]", 2),
        ("[{}]\n]", 2),
        ("[\n\n{]", 3),
        ("[", 1),
        ("[,{}]", 1),
        ("[{}", 1),
        ("[{},", 1),
        ("[\n" + "[" * 100_000, 2),
    ],
)
def test_a_broken_array_is_refused_at_its_line(tmp_path, text, line):
    with pytest.raises(DataError) as caught:
        read_text(tmp_path, text, "a.json")
    assert caught.value.where == f"{tmp_path}/a.json:{line}" and "JSONL" in str(caught.value)


def test_a_line_separator_inside_text_ends_no_line(tmp_path):
    text = "a\u2028b\u0085c\x0bd"
    assert read_text(tmp_path, json.dumps({"text": text}, ensure_ascii=False)).examples[0].text == text


def test_a_folder_is_read_whole_by_name_without_hidden_files(tmp_path):
    for name, text in {
        "b.jsonl": "b",
        "a/c.json": "c",
        ".hidden.jsonl": "h",
        ".git/x.json": "g",
        "notes.md": "n",
    }.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(json.dumps([{"text": text}]))
    read = formats.read([tmp_path], spec())
    assert [example.text for example in read.examples] == ["c", "b"]
    assert list(read.files) == [f"{tmp_path}/a/c.json", f"{tmp_path}/b.jsonl"]
    assert all(len(digest) == 64 for digest in read.files.values())
    with pytest.raises(DataError, match="given twice"):
        formats.read([tmp_path, tmp_path / "b.jsonl"], spec())


def test_files_that_cannot_be_read_are_named(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "torn.gz").write_bytes(gzip.compress(b'{"text": "a"}' * 100)[:-9])
    (tmp_path / "wide").write_text('{"text": "a"}', encoding="utf-16")
    for name, problem in {
        "absent": "no such",
        "empty": "no data",
        "torn.gz": "damaged",
        "wide": "UTF-16",
    }.items():
        with pytest.raises(DataError, match=problem) as caught:
            formats.read([tmp_path / name], spec())
        assert caught.value.where == f"{tmp_path / name}" and caught.value.hint


def test_too_many_bad_rows_stop_with_the_first_twenty(tmp_path):
    read = read_rows(tmp_path, *[{"text": "a"}] * 70, *[{"text": 3}] * 30)
    formats.require(read, 0.3)
    with pytest.raises(DataError) as caught:
        formats.require(read, 0.29)
    text = str(caught.value)
    assert (
        "30 of 100 rows" in text
        and text.count("expected text") == 20
        and "and 10 more" in text
        and "type 30" in text
    )
    for empty in (read_text(tmp_path, ""), read_rows(tmp_path, {"x": 1})):
        with pytest.raises(DataError):
            formats.require(empty, 1.0)


def test_the_settings_take_one_path_and_refuse_bad_shares():
    assert (spec(valid="v").train, spec(valid="v").valid) == (("x",), ("v",))
    for bad in ({"valid": 1.0}, {"valid": -0.1}, {"max_dropped": 2}, {"format": "csv"}):
        with pytest.raises(ValidationError):
            spec(**bad)


def test_an_id_is_of_the_content_alone(tmp_path):
    row = {"messages": [USER, called(arguments={"a": 1, "b": 2})]}
    other = {"messages": [USER, called(arguments={"b": 2, "a": 1})]}
    first, same, ordered, judged = read_rows(
        tmp_path, row, row | {"x": 1}, other, row | {"label": True}
    ).examples
    assert first.id == same.id and len({first.id, ordered.id, judged.id}) == 3
    assert len(first.id) == 16 and int(first.id, 16) >= 0


# Split


def asked(text: str, label: bool | None = None, answer: str = "a"):
    conversation = Conversation((Message("user", text), Message("assistant", answer)))
    return Demonstration(conversation) if label is None else Judged(conversation, label)


labelled = st.lists(
    st.tuples(st.integers(0, 12), st.sampled_from([True, False, None])), min_size=2, max_size=40
)


@settings(max_examples=200, deadline=None)
@given(labelled, st.floats(0.01, 0.99), st.integers(0, 9), st.randoms())
def test_a_split_keeps_all_rows_and_no_prompt_on_both_sides(drawn, share, seed, random):
    examples = [
        asked(f"Prompt  {number}" if at % 2 else f" pROMPT {number}", label, str(at))
        for at, (number, label) in enumerate(drawn)
    ]
    keys = Counter(map(formats.prompt_key, examples))
    if len(keys) == 1:
        with pytest.raises(DataError, match="one prompt"):
            formats.split(examples, share, seed)
        return
    train, valid = formats.split(examples, share, seed)
    assert train and valid
    order = {example.id: at for at, example in enumerate(examples)}
    places = [[order[example.id] for example in side] for side in (train, valid)]
    assert places == [sorted(place) for place in places] and sorted([*places[0], *places[1]]) == list(
        range(len(examples))
    )
    assert not {*map(formats.prompt_key, train)} & {*map(formats.prompt_key, valid)}
    shuffled = random.sample(examples, len(examples))
    assert {example.id for example in formats.split(shuffled, share, seed)[1]} == {
        example.id for example in valid
    }


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(1, 6), min_size=2, max_size=20), st.floats(0.01, 0.99))
def test_the_share_is_missed_by_no_more_than_half_the_largest_prompt(sizes, share):
    examples = [asked(str(number)) for number, size in enumerate(sizes) for _ in range(size)]
    _, valid = formats.split(examples, share, 0)
    wanted = share * len(examples)
    forced = len({formats.prompt_key(example) for example in valid}) in (
        1,
        len(sizes) - 1,
    )  # one on each side
    assert abs(len(valid) - wanted) <= max(sizes) / (1 if forced else 2) + 1e-6


def test_each_label_has_its_share_and_the_seed_decides_which():
    examples = [asked(str(at), (True, True, False, None)[at % 4]) for at in range(400)]
    sides = [formats.split(examples, 0.2, seed)[1] for seed in (1, 1, 2)]
    for valid in sides:
        assert Counter(getattr(example, "desirable", None) for example in valid) == {
            True: 40,
            False: 20,
            None: 20,
        }
    assert sides[0] == sides[1] and 5 < len({e.id for e in sides[0]} & {e.id for e in sides[2]}) < 40
    assert formats.split(examples, 0, 1) == (examples, [])


def test_museum_17_twins_are_never_on_both_sides():
    """A row and its near twin in training and validation: seen everywhere."""
    twins = [
        asked("What is 2 + 2?"),
        asked("what is  2 + 2?\n", True),
        asked("WHAT IS 2 + 2?", False, "b"),
        Demonstration(
            Conversation(
                (
                    Message("system", "s"),
                    Message("user", "What is 2 + 2?"),
                    Message("assistant", "4"),
                    Message("user", "And 3?"),
                    Message("assistant", "5"),
                )
            )
        ),
        Preference(asked("What is 2 + 2?").conversation, asked("What is 2 + 2?", answer="c").conversation),
        Completion("What is 2 + 2? ", "4"),
    ]
    twins += twins[:2]
    assert len(set(map(formats.prompt_key, twins))) == 1
    others = [asked(f"question {at}", (None, True, False)[at % 3]) for at in range(60)]
    held = []
    for seed in range(40):
        train, valid = formats.split([*twins, *others], 0.3, seed)
        assert len(train) + len(valid) == len(twins) + len(others) and 19 <= len(valid) <= 22
        held.append(sum(any(example is twin for twin in twins) for example in valid))
    assert set(held) == {0, len(twins)} and 4 <= held.count(len(twins)) <= 20


def test_prompts_are_exchanged_to_meet_the_share():
    examples = [asked(str(number)) for number, size in enumerate((5, 4, 4, 3)) for _ in range(size)]
    assert {len(formats.split(examples, 0.5, seed)[1]) for seed in range(20)} == {8}


# Real data


@pytest.mark.parametrize(
    ("name", "settings", "kinds", "dropped"),
    [
        ("alpaca_en_demo.json", {}, {"Demonstration": 999}, {}),
        ("alpaca_en_demo.json", {"instruction_layout": "instruct"}, {"Completion": 999}, {}),
        ("dpo_en_demo.json", {}, {"Preference": 300}, {}),
        ("glaive_toolcall_en_demo.json", {}, {"Demonstration": 300}, {}),
        ("kto_en_demo.json", {}, {"Judged": 300}, {}),
        ("reason_tool_use_demo_50.jsonl", {"reasoning": "refuse"}, {}, {"reasoning": 50}),
        ("reason_tool_use_demo_50.jsonl", {}, {"Demonstration": 47}, {"unanswered_call": 3}),
        (
            "reason_tool_use_demo_50.jsonl",
            {"reasoning": "think"},
            {"Demonstration": 47},
            {"unanswered_call": 3},
        ),
    ],
)
def test_public_demo_files(data_dir, tmp_path, name, settings, kinds, dropped):
    read = formats.read([data_dir(f"formats/{name}")], spec(**settings))
    assert Counter(type(example).__name__ for example in read.examples) == kinds
    assert Counter(bad.reason for bad in read.dropped) == dropped
    formats.write_examples(read.examples, tmp_path / "again.jsonl")
    assert content(formats.read([tmp_path / "again.jsonl"], spec())) == content(read)


def test_the_reference_data_set(syngen):
    read = formats.read([syngen], spec())
    assert (read.rows, len(read.dropped)) == (1000, 0)
    assert Counter(example.desirable for example in read.examples) == {True: 746, False: 254}
    assert sum("context" in example.metadata for example in read.examples) == 48
    raw = [json.loads(line) for line in syngen.read_text(encoding="utf-8").split("\n") if line]
    assert [said(example) for example in read.examples] == [
        [tuple(m.values()) for m in row["conversations"]] for row in raw
    ]
    train, valid = formats.split(read.examples, 0.2, 0)
    assert (len(train), Counter(example.desirable for example in valid)) == (800, {True: 149, False: 51})
    assert not {*map(formats.prompt_key, train)} & {*map(formats.prompt_key, valid)}
