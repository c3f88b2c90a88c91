"""Scores of tasks: what counts as a right call, perplexity as a ratio of sums, and intervals that mean something."""

from __future__ import annotations

import json
import math
import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tunesmith.errors import EvaluationError
from tunesmith.formats import Call, Completion, Conversation, Document, Judged, Message, Preference
from tunesmith.tasks import ALIKE, ONE, ExampleScore, Score, summarise
from tunesmith.tasks.perplexity import Perplexity
from tunesmith.tasks.tool_calls import ParsedCall, Reference, ToolCalls, parse, references, same_json, score

ASK = Conversation((Message("user", "hello"),))

names = st.text("abcdefghijklmnopqrstuvwxyz_ABC0123456789", min_size=1, max_size=20)
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=8,
)
objects = st.dictionaries(st.text(max_size=8), json_values, max_size=4)
calls = st.lists(st.tuples(names, objects), min_size=1, max_size=3)


def as_text(made: list[tuple[str, dict]]) -> str:
    blocks = [f"tool_call: {name}\narguments: {json.dumps(arguments)}" for name, arguments in made]
    return '\n\nResult: {"ok": true, "call": {"name": "x", "arguments": {}}}\n\n'.join(blocks)


def as_mistral(made: list[tuple[str, dict]]) -> str:
    items = [{"name": name, "arguments": arguments, "id": "abcdefghi"} for name, arguments in made]
    return f"[TOOL_CALLS] {json.dumps(items, ensure_ascii=False)}"


def as_hermes(made: list[tuple[str, dict]]) -> str:
    return "\n".join(
        f"<tool_call>\n{json.dumps({'name': name, 'arguments': arguments}, indent=1)}\n</tool_call>" for name, arguments in made
    )


def as_objects(made: list[tuple[str, dict]]) -> str:
    return "I will do that.\n" + "\n".join(
        json.dumps({"name": name, "arguments": arguments}, indent=1) for name, arguments in made
    )


def as_openai(made: list[tuple[str, dict]]) -> str:
    items = [
        {"id": "c", "type": "function", "function": {"name": name, "arguments": json.dumps(arguments)}}
        for name, arguments in made
    ]
    return json.dumps({"tool_calls": items})


FORMS = [as_text, as_mistral, as_hermes, as_objects, as_openai]


@pytest.mark.parametrize("form", FORMS)
@settings(max_examples=40, deadline=None)
@given(made=calls)
def test_calls_written_in_any_form_are_read_back_exactly(form, made):
    read = parse(form(made))
    assert [call.problem for call in read] == [None] * len(made)
    assert [(call.name, call.arguments) for call in read] == made


pieces = st.sampled_from(
    ["tool_call:", "tool_call: f\n", "arguments:", "arguments: {", "[TOOL_CALLS]", "<tool_call>", "</tool_call>", "\n",
     "Result:", '{"name": "f", "arguments": ', '{"a": 1}', "}", "]", "[", "{", '"', "NaN", "\\", "9" * 5000, "[" * 20000,
     '{"function": ', '{"tool_calls": [', "\r\n", " ", "\x00", "é"]
)  # fmt: skip


@settings(max_examples=200, deadline=None)
@given(st.text() | st.lists(pieces | st.text(max_size=5), max_size=12).map("".join))
def test_no_text_makes_the_parser_raise_and_a_problem_always_means_no_arguments(text):
    for call in parse(text):
        assert (call.problem is None) == (call.arguments is not None)
        assert call.problem or call.name


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("tool_call: f", "no `arguments:`"),
        ("tool_call: f\narguments: ", "no JSON"),
        ("tool_call:\narguments: {}", "no tool name"),
        ("tool_call: f\narguments: {'a': 1}", "no JSON"),
        ('tool_call: f\narguments: {"a": 1,}', "no JSON"),
        ('tool_call: f\narguments: {"a": 1', "no JSON"),
        ('tool_call: f\narguments: {"a": NaN}', "NaN is not JSON"),
        ('tool_call: f\narguments: {"a": 1}}', "text after"),
        ("tool_call: f\narguments: [1]", "not a JSON object"),
        ('tool_call: f\narguments: "{}"', "not a JSON object"),
        ("[TOOL_CALLS] []", "no JSON array"),
        ('[TOOL_CALLS] {"name": "f", "arguments": {}}', "no JSON array"),
        ('[TOOL_CALLS] [{"name": "f"}]', "not a JSON object"),
        ('[TOOL_CALLS] [{"arguments": {}}]', "no tool name"),
        ("[TOOL_CALLS] [3]", "not a JSON object"),
        ('<tool_call>{"name": "f", "arguments": {}}', "no </tool_call>"),
        ('{"name": "f", "arguments": {"a": }}', "no JSON"),
        ('{"name": "f", "arguments": "{} and"}', "text after"),
        ('{"name": "f", "arguments": "words"}', "not JSON"),
        ("tool_call: f\narguments: " + "[" * 100_000, "nested too deeply"),
    ],
)
def test_a_broken_call_is_one_call_with_a_problem(text, problem):
    (call,) = parse(text)
    assert call.arguments is None
    assert problem in str(call.problem)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "I could use a tool_call: but I will not.",
        "See [the manual](http://x) or\n[1] a footnote\n{sic}",
        '{"name": "Alice", "age": 3}',
        '[{"name": "Alice"}, {"name": "Bob", "arguments": "none"}]',
        "[]",
        '{"tool_calls": []}',
        'Result: {"name": "f", "arguments": {}}',
        'Result:\n{"name": "f", "arguments": {}}',
        'Result: {"calls": [\n{"name": "f", "arguments": {}}\n]}',
        'Result: fine\n"arguments"',
    ],
)
def test_what_is_not_a_call_is_not_read_as_one(text):
    assert parse(text) == []


def test_a_line_inside_a_broken_call_is_no_second_call():
    text = 'tool_call: f\narguments: {"a": [\n{"name": "g", "arguments": {}}\n\ntool_call: h\narguments: {}'
    assert [call.name for call in parse(text)] == ["f", "h"]


def test_json_equality_keeps_true_and_1_apart():
    assert same_json({"a": 1, "b": [1.0, "x"]}, {"b": [1, "x"], "a": 1.0})
    for one, other in [(True, 1), (0, False), (None, False), ([1], [1, 2]), ({"a": 1}, {"a": 1, "b": 2}), ("1", 1)]:
        assert not same_json(one, other)
        assert not same_json(other, one)


def ref(*made: tuple[str, dict]) -> Reference:
    return Reference("x.jsonl:1", ASK, tuple(Call(name, arguments) for name, arguments in made))


CHECKS = ("value", "well_formed", "right_tool", "keys_present", "exact_arguments")


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        (as_text([("f", {"a": 1, "b": "x"})]), (1.0, True, True, True, True)),
        (as_mistral([("f", {"b": "x", "a": 1.0})]), (1.0, True, True, True, True)),
        (as_text([("f", {"a": 2, "b": "x", "c": 0})]), (1.0, True, True, True, False)),
        (as_text([("f", {"a": 1})]), (1.0, True, True, False, False)),
        (as_text([("g", {"a": 1, "b": "x"})]), (0.0, True, False, False, False)),
        ('tool_call: f\narguments: {"a": 1, "b": "x"', (0.0, False, True, False, False)),
        (as_text([("f", {"a": 1, "b": "x"})] * 2), (0.0, True, False, False, False)),
        ("I have done that.", (0.0, False, False, False, False)),
    ],
)
def test_each_check_fails_for_its_own_fault(answer, expected):
    detail = score(answer, ref(("f", {"a": 1, "b": "x"})))
    assert tuple(detail[check] for check in CHECKS) == expected


def test_several_calls_must_come_in_order():
    wanted = ref(("f", {}), ("g", {}))
    assert score(as_hermes([("f", {}), ("g", {})]), wanted)["value"] == 1.0
    assert score(as_hermes([("g", {}), ("f", {})]), wanted)["value"] == 0.0
    assert score(as_hermes([("f", {})]), wanted)["value"] == 0.0


def test_where_no_call_is_due_any_attempt_is_wrong():
    assert score("Which file do you mean?", ref())["value"] == 1.0
    assert score("tool_call: f\narguments: {", ref())["value"] == 0.0
    scores = ToolCalls().score([(ref(), "Which file?"), (ref(("f", {})), as_text([("f", {})]))])
    found = {one.name: one for one in summarise(ToolCalls(), None, scores, seed=0)}
    assert (found["tool_calls"].value, found["well_formed"].n) == (1.0, 1)


def judged(*messages: Message, desirable: bool = True) -> Judged:
    conversation = Conversation(messages, ({"type": "function"},))
    return Judged(conversation, desirable, source="x.jsonl:7")


def test_the_reference_is_the_last_assistant_turn_in_its_context():
    user, later = Message("user", "a"), Message("user", "b")
    structured = Message("assistant", "", (Call("f", {"a": 1}),))
    written = Message("assistant", as_text([("g", {"b": 2})]))
    found = references(judged(user, structured, later, written))
    assert found is not None
    assert found.prompt == Conversation((user, structured, later), ({"type": "function"},))
    assert (found.source, found.calls) == ("x.jsonl:7", (Call("g", {"b": 2}),))
    found = references(judged(user, structured, Message("tool", "{}")))
    assert found is not None
    assert (found.prompt, found.calls) == (Conversation((user,), ({"type": "function"},)), structured.calls)


def test_preferences_and_completions_have_references_too():
    called = Conversation((Message("user", "a"), Message("assistant", as_text([("f", {"a": 1})]))))
    words = Conversation((Message("user", "a"), Message("assistant", "no")))
    found = references(Preference(called, words, source="p:1"))
    assert found == Reference("p:1", Conversation(called.messages[:1]), (Call("f", {"a": 1}),))
    text = as_mistral([("f", {"a": 1})])
    assert references(Completion("ask", text, source="c:1")) == Reference("c:1", "ask", (Call("f", {"a": 1}),))
    assert references(Completion("ask", text, label=False)) is None
    assert references(Document(text)) is None


def test_what_cannot_be_a_reference_is_none():
    user, answer = Message("user", "a"), Message("assistant", "b")
    assert references(judged(user, answer)) is not None
    assert references(judged(user, answer, desirable=False)) is None
    assert references(judged(user)) is None
    assert references(judged(answer)) is None
    assert references(judged(user, answer, answer)) is None
    assert references(judged(user, Message("assistant", "tool_call: f\narguments: {"))) is None


def test_desirable_rows_of_the_reference_data_are_read(syngen):
    """635 of the 662 answers with a call are well formed. The other 27 are the data's fault: arguments that end in `)`
    instead of `}`, or lack the last `}`. With that mended they are well formed too."""
    rows = [json.loads(line) for line in syngen.read_text(encoding="utf-8").splitlines()]
    right = [row["conversations"][-1]["content"] for row in rows if row["label"]]
    tries = [text for text in right if "tool_call:" in text]
    assert (len(rows), len(right), len(tries)) == (1000, 746, 662)
    # Counted without the parser: a line that starts with the marker.
    assert [len(parse(text)) for text in tries] == [
        sum(line.startswith("tool_call: ") for line in text.splitlines()) for text in tries
    ]
    assert all(parse(text) == [] for text in right if "tool_call:" not in text)
    broken = [text for text in tries if any(call.problem for call in parse(text))]
    assert len(broken) == 27
    for text in broken:
        lines = text.splitlines()
        short = [line for line in lines if line.startswith("arguments: ") and line.count("{") == line.count("}") + 1]
        assert short
        mended = "\n".join(line.removesuffix(")") + "}" if line in short else line for line in lines)
        assert [call.problem for call in parse(mended)] == [None] * len(parse(text))


# --- perplexity -------------------------------------------------------------------------------------------------------

row_losses = st.lists(st.tuples(st.floats(0.01, 200.0), st.integers(1, 60)), min_size=1, max_size=12)


@settings(max_examples=50, deadline=None)
@given(row_losses, st.integers(0, 2**32))
def test_museum_18_perplexity_is_e_to_nats_a_token_and_no_cut_or_order_changes_it(losses, seed):
    rows = [(f"x.jsonl:{line}", loss, float(tokens)) for line, (loss, tokens) in enumerate(losses)]
    expected = sum(loss for loss, _ in losses) / sum(tokens for _, tokens in losses)
    shuffled = random.Random(seed).sample(rows, len(rows))
    joined = [("all", sum(loss for loss, _ in losses), float(sum(tokens for _, tokens in losses)))]
    for cut in (rows, shuffled, joined):
        perplexity, loss = summarise(Perplexity(), None, Perplexity().score(cut[:1]) + Perplexity().score(cut[1:]), seed=0)
        assert (perplexity.name, loss.name) == ("perplexity", "loss")
        assert loss.value == pytest.approx(expected, rel=1e-9)
        assert perplexity.value == pytest.approx(math.exp(expected), rel=1e-9)


@pytest.mark.parametrize("bad", [(math.nan, 3.0), (math.inf, 3.0), (1.0, 0.0), (1.0, math.nan)])
def test_a_row_without_a_usable_loss_is_named_and_refused(bad):
    with pytest.raises(EvaluationError, match=r"1 of 2 rows(.|\n)*x\.jsonl:2"):
        Perplexity().score([("x.jsonl:1", 1.0, 2.0), ("x.jsonl:2", *bad)])


# --- intervals --------------------------------------------------------------------------------------------------------


def shares(values: list[float]) -> list[ExampleScore]:
    return [ExampleScore(f"x:{line}", value, detail=dict.fromkeys(CHECKS)) for line, value in enumerate(values)]


def first(base: list[ExampleScore] | None, tuned: list[ExampleScore], seed: int = 0) -> Score:
    return summarise(ToolCalls(), base, tuned, seed)[0]


def test_the_interval_is_the_one_that_theory_gives():
    """Against the normal approximation of a mean: ±1.96·s/√n."""
    values = list(np.random.default_rng(3).normal(5.0, 2.0, 400))
    found = first(None, shares(values))
    half = 1.96 * np.std(values) / math.sqrt(400)
    assert found.value == pytest.approx(np.mean(values))
    assert found.low == pytest.approx(found.value - half, abs=0.1 * half)
    assert found.high == pytest.approx(found.value + half, abs=0.1 * half)
    assert found.note is None


def test_the_difference_is_paired():
    """A constant gain on very unlike rows: an unpaired interval would be wide and cross zero."""
    base = list(np.random.default_rng(1).normal(0.0, 10.0, 60))
    tuned = [value + gain for value, gain in zip(base, np.random.default_rng(2).normal(1.0, 0.1, 60), strict=True)]
    found = first(shares(base), shares(tuned))
    assert found.delta == pytest.approx(np.mean(tuned) - np.mean(base))
    assert 0.9 < found.delta_low < found.delta < found.delta_high < 1.1
    assert found.high - found.low > 2


def test_turns_of_one_source_are_drawn_together():
    """Ten copies of each row are no more evidence than one."""
    values = [0.0, 1.0] * 15
    once, copies = first(None, shares(values)), first(None, shares(values) * 10)
    assert (once.value, once.low, once.high, once.n) == (copies.value, copies.low, copies.high, copies.n)


def test_the_same_seed_gives_the_same_interval_and_another_seed_another():
    scores = shares(list(np.random.default_rng(0).normal(size=40)))
    assert first(None, scores, 5) == first(None, scores, 5)
    assert first(None, scores, 5).low != first(None, scores, 6).low


def test_degenerate_cases_say_so():
    alike = first(None, shares([1.0] * 20))
    assert (alike.value, alike.high) == (1.0, 1.0)
    assert alike.low == pytest.approx(0.025 ** (1 / 20))  # 0 failures of 20
    assert "binomial" in str(alike.note)
    none = first(None, shares([0.0] * 20))
    assert (none.low, none.high) == (0.0, pytest.approx(1 - 0.025 ** (1 / 20)))
    moved = first(shares([0.0] * 20), shares([1.0] * 20))
    assert (moved.delta, moved.delta_low, moved.delta_high) == (1.0, 1.0, 1.0)
    assert ALIKE in str(moved.note)
    single = summarise(Perplexity(), Perplexity().score([("x:1", 4.0, 2.0)]), Perplexity().score([("x:1", 2.0, 2.0)]), seed=0)[1]
    assert (single.value, single.low, single.high) == (1.0, None, None)
    assert (single.delta, single.delta_low, single.delta_high, single.n) == (-1.0, None, None, 1)
    assert ONE in str(single.note)
    same = summarise(Perplexity(), None, Perplexity().score([("x:1", 4.0, 4.0), ("x:2", 2.0, 2.0)]), seed=0)[1]
    assert (same.low, same.high, same.note) == (1.0, 1.0, ALIKE)


def test_scores_that_do_not_pair_are_refused():
    two = shares([0.0, 1.0])
    for base in (two[:1], two[::-1], [two[0], ExampleScore("x:1", 1.0, 2.0, two[1].detail)]):
        with pytest.raises(EvaluationError, match="not scored on the same examples"):
            summarise(ToolCalls(), base, two, seed=0)
    with pytest.raises(EvaluationError, match="no example was scored"):
        summarise(ToolCalls(), None, [], seed=0)
    with pytest.raises(EvaluationError, match="no row has an answer"):
        ToolCalls().score([])


def test_parsed_calls_are_values():
    assert parse("tool_call: f\narguments: {}") == [ParsedCall("f", {})]
