"""Calls written as text are found where they are calls, and become turns with every word, label and row kept,
or stay."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tunesmith.data import calls, formats
from tunesmith.data.calls import found, structure, structured
from tunesmith.data.examples import (
    BadRow,
    Call,
    Conversation,
    Demonstration,
    Judged,
    Message,
    Preference,
    check,
    write_examples,
)
from tunesmith.data.formats import DataSpec

USER = Message("user", "u")
ARGUMENTS = '{"b": [1, {"c": "tool_call: x\\nResult: {"}], "a": "}"}'


def spec(**settings) -> DataSpec:
    return DataSpec(train=("x",), valid=0.0, **settings)


def said(text: str) -> Conversation:
    return Conversation((USER, Message("assistant", text)))


def turns(text: str) -> list[tuple[str, str, list[str]]]:
    made = structured(said(text).messages)
    return [
        (message.role, message.content, [f"{call.name} {call.text}" for call in message.calls])
        for message in made[1:]
    ]


def written(messages: tuple[Message, ...]) -> str:
    """The turns as text again, in the order in which they come."""
    text = ""
    for message in messages:
        text += f"\nResult: {message.content}" if message.role == "tool" else message.content
        text += "".join(f"\ntool_call: {call.name}\narguments: {call.text}" for call in message.calls)
    return text


def squeezed(text: str) -> str:
    return "".join(text.split())


def call(name: str = "f", arguments: str = ARGUMENTS, result: str | None = '{"ok": true}') -> str:
    return f"tool_call: {name}\narguments: {arguments}" + (
        f"\n\nResult: {result}" if result is not None else ""
    )


# What is a call


@pytest.mark.parametrize(
    "arguments", [ARGUMENTS, "{}", json.dumps(json.loads(ARGUMENTS), indent=2), '{"a": "```\\n"}']
)
@pytest.mark.parametrize(
    "result", ['{"ok": true}', "42", '"no"', "[1,\n 2]", "saved", "two lines\nof text", "{broken", None]
)
@pytest.mark.parametrize("before", ["", "I look.\n\n", "```\ncode\n```\n"])
@pytest.mark.parametrize("line", ["\n", "\r\n"])
def test_a_call_is_found_with_arguments_and_result_to_the_letter(arguments, result, before, line):
    text = f"{before}{call('f.g', arguments, result)}\n\nDone: {{}}".replace("\n", line)
    arguments, result = arguments.replace("\n", line), result and result.replace("\n", line)
    (one,) = found(text)
    assert (one.name, one.arguments, one.text, one.result) == (
        "f.g",
        json.loads(arguments),
        arguments,
        result,
    )
    assert text[: one.start] == before.replace("\n", line) and text[one.end :] == f"{line}{line}Done: {{}}"


@pytest.mark.parametrize(
    "text",
    [
        "I write tool_call: f and arguments: {} for that.",
        f"> {call()}",
        f"`{call()}`",
        f"```\n{call()}\n```",
        f"~~~~ text\n```\n{call()}\n~~~\n~~~~\nThat is how.",
        f"```\n{call()}",
        "    tool_call: f\n    arguments: {}",
        "tool_call: f",
        "tool_call: it names the tool\narguments: {} follow",
        "tool_call:\n\nIt is a marker.",
        "arguments: {}\n\nResult: 1",
        "Result: we won",
    ],
)
def test_what_is_quoted_or_said_is_no_call(text):
    assert found(text) == [] and structured(said(text).messages) == said(text).messages


def test_a_call_without_arguments_is_one_where_a_result_follows():
    for text in ("tool_call: f Result: 1", "tool_call: f\n\nResult: 1"):
        (one,) = found(text)
        assert (one.name, one.arguments, one.text, one.result) == ("f", None, "", "1")


def test_a_call_behind_a_fence_is_one():
    text = f"```\n{call('quoted')}\n```\n{call('real')}"
    assert [one.name for one in found(text)] == ["real"]


@pytest.mark.parametrize(
    "arguments",
    ['{"a": 1', '{"a": 1)', "[1]", "none", "{} and more", '{"a": NaN}', '{"a": 1, "a": 2}', "[" * 99999],
)
def test_arguments_that_are_no_object_are_none_and_the_row_stays(arguments):
    (one,) = found(call(arguments=arguments))
    assert (one.arguments, one.text, one.result) == (None, arguments, '{"ok": true}')
    example = Demonstration(said(call(arguments=arguments) + "\n\nDone."))
    assert structure(example) == (example, "left: arguments")


# What becomes of them


def test_calls_in_turn_become_turns():
    text = f"{call('f')}\n\n{call('g', result='no')}\n{call('h', '{ }')}\n\n    code\n\nDone. \n"
    assert turns(text) == [
        ("assistant", "", [f"f {ARGUMENTS}"]),
        ("tool", '{"ok": true}', []),
        ("assistant", "", [f"g {ARGUMENTS}"]),
        ("tool", "no", []),
        ("assistant", "", ["h { }"]),
        ("tool", '{"ok": true}', []),
        ("assistant", "    code\n\nDone. \n", []),
    ]


def test_calls_in_a_row_with_as_many_results_are_calls_of_one_turn():
    text = f"{call('f', result=None)}\n\n{call('g', result=None)}\n\nResult: 1\n\nResult: 2\n\nDone."
    assert [one.result for one in found(text)] == ["1", "2"]
    made = structured(said(text).messages)
    assert [call.name for call in made[1].calls] == ["f", "g"] and [message.role for message in made[2:]] == [
        "tool",
        "tool",
        "assistant",
    ]
    assert [(message.name, message.content, message.call_id) for message in made[2:4]] == [
        ("f", "1", made[1].calls[0].id),
        ("g", "2", made[1].calls[1].id),
    ]


def test_calls_that_end_the_conversation_need_no_result():
    assert turns(f"{call('f', '{}', None)}\n{call('g', '{}', None)}\n") == [
        ("assistant", "", ["f {}", "g {}"])
    ]


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (call(result=None) + "\n\nDone.", "unanswered_call"),
        (call(result=None) + "\n\nWait.\n\n" + call() + "\n\nDone.", "unanswered_call"),
        (call(result=None) + "\n\n" + call() + "\n\nDone.", "results"),
        (call() + "\n\nResult: 2\n\nDone.", "results"),
        (call() + "\n\nAnd then:\n\nResult: 2\n\nDone.", "result"),
        (call(result="") + "\n\nDone.", "result"),
        (call(result='{"a":\n1,') + "\n\n}\n\nDone.", "result"),
        (call(result="```\na\n\nb\n```") + "\n\nDone.", "result"),
        (call(), "no_answer"),
        ("I look.\n\n" + call() + "\n\nDone.", "words"),
        (call() + "\n\nAnd now:\n\n" + call() + "\n\nDone.", "words"),
    ],
)
def test_what_cannot_be_said_in_turns_stays_and_says_why(text, reason):
    example = Judged(said(text), False, source="f:1")
    assert structure(example) == (example, f"left: {reason}")


def test_a_row_with_calls_in_both_forms_or_with_undeclared_tools_stays():
    turned = (
        Message("assistant", "", (Call("f", {}, "1", "{}"),)),
        Message("tool", "r", call_id="1"),
        Message("assistant", "a"),
    )
    mixed = Demonstration(Conversation((USER, *turned, USER, Message("assistant", call("g") + "\n\nDone."))))
    assert structure(mixed) == (mixed, "left: mixed_calls")
    for name, note in (("f", calls.STRUCTURED), ("other", "left: undeclared_tool")):
        declared = ({"type": "function", "function": {"name": name}},)
        assert (
            structure(Demonstration(Conversation(said(call("f") + "\n\nDone.").messages, declared)))[1]
            == note
        )


def test_only_the_assistant_calls_and_flags_of_the_turn_are_kept():
    asked = Message("user", call())
    made = structured((asked, Message("assistant", call() + "\n\nDone.", learn=False)))
    assert made[0] == asked and [message.learn for message in made[1:]] == [False, None, False]


def test_of_a_pair_both_sides_are_turned_or_none():
    good, other, plain = (said(text) for text in (call() + "\n\nDone.", call("g") + "\n\nDone.", "No."))
    bad, alike = said(call(result=None) + "\n\nDone."), said(call(result="2") + "\n\nDone.")
    for rejected in (other, plain):
        pair, note = structure(Preference(good, rejected))
        assert note == calls.STRUCTURED and isinstance(pair, Preference)
        assert pair.chosen.messages == structured(good.messages) and pair.rejected.messages == structured(
            rejected.messages
        )
        assert pair.id != Preference(good, rejected).id
    for rejected, reason in ((bad, "unanswered_call"), (alike, "pair"), (said(call() + "\nDone."), "pair")):
        assert structure(Preference(good, rejected)) == (Preference(good, rejected), f"left: {reason}")


# Laws

FRAGMENTS = [
    "tool_call: f\n",
    "tool_call:",
    "\narguments: ",
    "arguments: {}",
    '{"a": 1}',
    '{"a": "',
    "{",
    "}",
    "\nResult: ",
    "Result:",
    "\n",
    "\n\n",
    "```",
    "~~~",
    " ",
    "    ",
    "words",
    "42",
    "[1,\n2]",
    '"s"',
    "\r\n",
    "\u2028",
    "\u00a0",
    "é",
    "\x00",
    "\ud800",
    call() + "\n",
    call(result=None) + "\n",
    "\n\nDone.",
]


@settings(max_examples=600, deadline=None)
@given(st.lists(st.lists(st.sampled_from(FRAGMENTS), max_size=14).map("".join), min_size=1, max_size=3))
def test_any_text_is_kept_to_the_word_or_refused(texts):
    messages = tuple(message for text in texts for message in (USER, Message("assistant", text)))
    for text in texts:
        for one in found(text):
            assert 0 <= one.start < one.end <= len(text) and one.name in text[one.start : one.end]
    try:
        made = structured(messages)
    except BadRow:
        return
    assert squeezed(written(made)) == squeezed(written(messages))
    ids = [call.id for message in made for call in message.calls]
    assert len(set(ids)) == len(ids) and all(
        id and len(id) == 9 and id.isascii() and id.isalnum() for id in ids
    )
    if made == messages:
        assert not any(message.calls for message in made)
        return
    again, note = structure(Demonstration(Conversation(messages)))
    if note == calls.STRUCTURED:
        check(made, ())
        assert isinstance(again, Demonstration) and again.conversation.messages == made
        assert structure(again)[1] in ("", "left: mixed_calls")


WORDS = st.lists(
    st.sampled_from(["so", "I: {look}", "no tool_call: here", "\n\n", "\n", "- a", "1."]),
    min_size=1,
    max_size=6,
).map(lambda parts: " ".join(["yes", *parts, "end"]))
VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-9, 9)
    | st.text(st.sampled_from('ab"{}\n:`é'))
    | st.sampled_from([call(), "Result: 1\n\n"]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["a", "Result:", "tool_call:"]), inner, max_size=3)
    ),
    max_leaves=6,
)
DUMPED = {"indent": st.sampled_from([None, 2]), "ensure_ascii": st.booleans()}
OBJECTS = st.builds(json.dumps, st.dictionaries(st.sampled_from("xyz"), VALUES, max_size=3), **DUMPED)
RESULTS = st.builds(json.dumps, VALUES, **DUMPED) | st.sampled_from(
    ["saved", "Error: none\nat line 2", "{half"]
)
BLOCKS = st.lists(st.tuples(st.sampled_from(["f", "g_2"]), OBJECTS, RESULTS), min_size=1, max_size=3)


@settings(max_examples=200, deadline=None)
@given(st.lists(BLOCKS, min_size=1, max_size=4), WORDS)
def test_what_is_written_as_text_is_what_the_turns_say(blocks, answer):
    text, expected = "", []
    for made in blocks:
        text += "".join(call(name, arguments, None) + "\n\n" for name, arguments, _ in made)
        text += "".join(f"Result: {result}\n\n" for _, _, result in made)
        expected.append(("assistant", "", [f"{name} {arguments}" for name, arguments, _ in made]))
        expected += [("tool", result, []) for _, _, result in made]
    assert turns(text + answer) == [*expected, ("assistant", answer, [])]


def test_huge_and_hostile_texts_are_read():
    size = 300_000
    units = [
        call() + "\n\n",
        "tool_call: f\narguments: {",
        "tool_call: f\n" + " " * 99,
        "Result: x\n\n",
        "```\n",
        "`",
        "tool_call: ",
        call(result="{") + "\n\n",
        'tool_call: f\narguments: {}\nResult: {"a": "\n',
        "[",
        "\n",
        " \n",
        "~" * 40 + "\n",
        "Result: 1 ",
    ]
    for unit in units:
        for head in ("", "tool_call: f\narguments: ", call() + "\n"):
            text = head + unit * (size // len(unit))
            structure(Demonstration(said(text)))


def test_a_hundred_thousand_turns():
    answer = Message("assistant", call() + "\n\nDone.")
    made = structured((USER, answer) * 50_000)
    assert len(made) == 4 * 50_000 and len({call.id for message in made for call in message.calls}) == 50_000


# On the way in


def test_files_give_the_same_rows_words_and_labels_and_count_what_was_turned(syngen):
    before, after = (formats.read([syngen], spec(structure_calls=on)) for on in (False, True))
    assert before.rows == after.rows == 1000 and not after.dropped
    notes = Counter(str(example.metadata.get("text_calls", "")) for example in after.examples)
    assert notes == {
        calls.STRUCTURED: 719,
        "": 142,
        "left: words": 79,
        "left: arguments": 32,
        "left: unanswered_call": 24,
        "left: no_answer": 2,
        "left: results": 2,
    }
    for old, new in zip(before.examples, after.examples, strict=True):
        assert isinstance(old, Judged) and isinstance(new, Judged)
        text = old.conversation.messages[1].content
        calling = found(text)
        assert len(calling) == text.count("tool_call: ") and sum(
            one.result is not None for one in calling
        ) == text.count("Result: ")
        assert (old.desirable, old.source) == (new.desirable, new.source)
        assert old.metadata == {key: value for key, value in new.metadata.items() if key != "text_calls"}
        messages = new.conversation.messages
        assert squeezed(written(messages)) == squeezed(written(old.conversation.messages))
        if new.metadata.get("text_calls") == calls.STRUCTURED:
            assert not any("Result:" in message.content for message in messages)
        else:
            assert new.conversation == old.conversation and new.id == old.id


def test_rows_turned_on_the_way_in_are_written_and_read_again(tmp_path):
    rows = [
        {
            "conversations": [
                {"from": "human", "value": "u"},
                {"from": "gpt", "value": call() + "\n\nDone."},
            ],
            "label": False,
            "k": 1,
        },
        {"prompt": "u", "chosen": call() + "\n\nDone.", "rejected": "No."},
        {"prompt": "u", "completion": call() + "\n\nDone."},
        {"messages": [{"role": "user", "content": "u"}, {"role": "assistant", "content": call()}]},
    ]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert not any("text_calls" in example.metadata for example in formats.read([path], spec()).examples)
    read = formats.read([path], spec(structure_calls=True))
    notes = [example.metadata.get("text_calls") for example in read.examples]
    assert (
        notes == [calls.STRUCTURED, calls.STRUCTURED, None, "left: no_answer"]
        and read.examples[0].metadata["k"] == 1
    )
    write_examples(read.examples, tmp_path / "again.jsonl")
    again = formats.read([tmp_path / "again.jsonl"], spec(structure_calls=True))
    assert [(one.id, one.metadata) for one in again.examples] == [
        (one.id, one.metadata) for one in read.examples
    ]


def test_the_template_learns_calls_and_answers_and_never_results(syngen: Path):
    from tunesmith.tokens.renderers import load

    mistral = load("mistral-v3")
    examples = [
        one
        for one in formats.read([syngen], spec(structure_calls=True)).examples
        if one.metadata.get("text_calls") == "structured"
    ]
    assert len(examples) == 719
    for example in examples[::14]:
        assert isinstance(example, Judged)
        (row,) = mistral.rows(example)
        learned = mistral.decode(row.tokens.ids[row.tokens.targets > 0])
        read = mistral.decode(row.tokens.ids[row.tokens.targets == 0])
        for message in example.conversation.messages:
            if message.role == "tool":
                assert "[TOOL_RESULTS]" in read and "TOOL_RESULTS" not in learned
                try:
                    result = json.dumps(json.loads(message.content), ensure_ascii=False)
                except ValueError:
                    result = message.content
                assert result in read and result not in learned
            elif message.role == "assistant":
                assert message.content in learned
                assert all(
                    call.name in learned and json.dumps(call.arguments, ensure_ascii=False) in learned
                    for call in message.calls
                )
