"""Messages that a row holds as text are read as messages, counted; what only looks like messages stays
words."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tunesmith.data import formats
from tunesmith.data.formats import Completion, DataSpec, Demonstration, Preference, Read

TURNS = [
    {"role": "system", "content": "Answer it's brief."},
    {"role": "user", "content": 'She said "hi".\nAnd?'},
    {"role": "assistant", "content": "None: true"},
]
SAID = [(turn["role"], turn["content"]) for turn in TURNS]
WRITERS = [json.dumps, repr, lambda turns: json.dumps(turns, indent=2, ensure_ascii=False)]


def read(folder: Path, *rows: dict, **settings) -> Read:
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return formats.read([folder / "rows.jsonl"], DataSpec(train="x", **settings))


def alone(folder: Path, row: dict):
    result = read(folder, row)
    assert result.dropped == []
    return result.examples[0]


def said(conversation) -> list[tuple[str, str]]:
    return [(message.role, message.content) for message in conversation.messages]


def remarks(example) -> list[str]:
    return [remark.text for remark in example.remarks]


@pytest.mark.parametrize("write", WRITERS, ids=["JSON", "Python", "indented"])
def test_a_conversation_as_text_is_the_conversation(tmp_path, write):
    for key in ("messages", "conversations"):
        example = alone(tmp_path, {key: write(TURNS)})
        assert said(example.conversation) == SAID
        assert remarks(example) == [f"{key} held messages as text: read as messages"]


@pytest.mark.parametrize("write", WRITERS, ids=["JSON", "Python", "indented"])
def test_a_prompt_as_text_makes_the_completion_an_answer(tmp_path, write):
    for completion in ("Good.", write([{"role": "assistant", "content": "Good."}])):
        example = alone(tmp_path, {"prompt": write(TURNS[:2]), "completion": completion})
        assert isinstance(example, Demonstration)
        assert said(example.conversation) == [*SAID[:2], ("assistant", "Good.")]


@pytest.mark.parametrize("write", WRITERS, ids=["JSON", "Python", "indented"])
def test_both_sides_of_a_pair_as_text(tmp_path, write):
    other = [*TURNS[:2], {"role": "assistant", "content": "No."}]
    pairs = [
        {"chosen": write(TURNS), "rejected": write(other)},
        {"prompt": 'She said "hi".\nAnd?', "chosen": write(TURNS), "rejected": write(other)},
        {"prompt": write(TURNS[:2]), "chosen": "None: true", "rejected": write([other[-1]])},
    ]
    for row in pairs:
        example = alone(tmp_path, row)
        assert isinstance(example, Preference)
        assert said(example.chosen)[-2:] == SAID[1:]
        assert said(example.rejected)[-2:] == [SAID[1], ("assistant", "No.")]


@pytest.mark.parametrize(
    "prompt",
    [
        '[{"name": "user"}]',
        '[1, {"role": "user", "content": "hi"}]',
        '{"role": "user", "of": "the system"}',
        'Mend this: [{"role": "user", "content": "hi"}]',
        '[{"role": "user", "content": "hi"}] is what?',
        "[x for x in y]",
        '{"answer": 4}',
        '{"role": "user", "content": "}"} and ["',
        '[{"name": "x"}, {"role": "user", "content": "hi',
    ],
)
def test_text_about_something_else_stays_text(tmp_path, prompt):
    example = alone(tmp_path, {"prompt": prompt, "completion": prompt})
    assert isinstance(example, Completion) and example.prompt == example.completion == prompt
    assert example.remarks == ()


def test_messages_as_the_answer_to_plain_text_stay_text(tmp_path):
    answer = json.dumps(TURNS)
    example = alone(tmp_path, {"prompt": "Write a chat in JSON.", "completion": answer})
    assert isinstance(example, Completion) and example.completion == answer


@pytest.mark.parametrize(
    "text",
    [
        "[{'role': 'user', 'content': 'it's'}]",
        "[{'role': 'user', 'content': 'a'}\n {'role': 'assistant', 'content': 'b'}]",
        '[{"role": "user", "role": "user", "content": "a"}]',
        "[{'role': 'user', 'content': b'a'}]",
        "[{'role': 'user', 'content': " + "[" * 5000 + "]" * 5000 + "}]",
        '[{"role": "user", "content": "hi"',
        "[{'role': 'user', 'content': 'hi'}, {'role': 'assistant', 'cont",
        '{"role": "user", "content": "]}',
        '[{"role": "user", "content": "' + 'a\\"b ' * 100_000,
    ],
    ids=[
        "quotation mark",
        "no comma",
        "key twice",
        "bytes",
        "deep",
        "cut",
        "cut in a key",
        "cut in words",
        "cut after many quotes",
    ],
)
def test_damaged_messages_as_text_are_never_learned_as_words(tmp_path, text):
    for row in (
        {"prompt": text, "completion": "c"},
        {"messages": text},
        {"prompt": "p", "chosen": text, "rejected": "r"},
    ):
        (bad,) = read(tmp_path, row).dropped
        assert bad.reason == "nested" and "write the messages as a list" in bad.message


def test_a_conversation_that_is_words_is_refused_as_such(tmp_path):
    (bad,) = read(tmp_path, {"messages": "hello"}).dropped
    assert bad.message == 'messages: expected a list of messages, found "hello"'


def test_what_was_read_is_counted_once_a_row(tmp_path):
    rows = [{"prompt": "p", "chosen": json.dumps([TURNS[2]]), "rejected": f"r{n}"} for n in range(3)]
    counts = formats.remarks(read(tmp_path, *rows).examples)
    assert {remark.text: count for remark, count in counts.items()} == {
        "chosen held messages as text: read as messages": 3
    }
    assert not any(remark.doubt for remark in counts)
