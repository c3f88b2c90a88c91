"""Whether rows are sound: each reason and each broken call is found with its row and its key, and nothing in
the clean twin."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tunesmith.auditing import AuditSpec
from tunesmith.auditing.findings import Finding
from tunesmith.auditing.rules.structure import REFERENCES, Structure
from tunesmith.auditing.views import Context, Survey, View
from tunesmith.data import formats
from tunesmith.tokens import renderers

RULE = Structure()
UNIT = {"type": "string", "enum": ["celsius", "fahrenheit"]}
WEATHER = {
    "type": "object",
    "properties": {
        "place": {"type": "string"},
        "days": {"type": "integer", "minimum": 1},
        "unit": UNIT,
        "also": {"type": "array"},
    },
    "required": ["place"],
    "additionalProperties": False,
}


def judged(path: Path, rows: list[Any], context: Context | None = None) -> list[Finding]:
    """The findings in ``rows``, read from a file as they are in use; text is written as it is."""
    context = context or Context(AuditSpec())
    path.write_text("".join((one if isinstance(one, str) else json.dumps(one)) + "\n" for one in rows))
    views = []
    for one in formats.rows([path], formats.DataSpec(train="x")):
        views.append(
            View(one.source, None, one) if isinstance(one, formats.Dropped) else View(one.source, one)
        )
    kept = [RULE.look(view, context) for view in views]
    survey = Survey(
        context.spec, [f"rows:{line}" for line in range(1, len(views) + 1)], [view.label for view in views]
    )
    survey.dropped = [view.dropped for view in views]
    return list(RULE.judge(kept, survey))


@pytest.fixture
def told(tmp_path):
    """rows → rule, sources and notes of what is wrong with them; `structure.valid` aside."""

    def tell(*rows: Any, context: Context | None = None) -> dict[str, dict[str, str]]:
        found = judged(tmp_path / "rows.jsonl", list(rows), context)
        return {
            one.rule: {row.source: row.note for row in one.rows}
            for one in found
            if one.rule != "structure.valid"
        }

    return tell


def turns(*said: str) -> list[dict]:
    return [{"role": ("user", "assistant")[at % 2], "content": text} for at, text in enumerate(said)]


def row(*said: str, **more: Any) -> dict:
    return {"messages": turns(*(said or ("Hi.", "Hello."))), **more}


def calling(arguments: Any, parameters: Any = WEATHER, call_id: str = "abcdefgh1", **more: Any) -> dict:
    call = {"id": call_id, "function": {"name": "weather", "arguments": arguments}}
    asked, answer = turns("Is it warm?", "Yes.")
    between = [
        {"role": "assistant", "tool_calls": [call]},
        {"role": "tool", "content": "21", "tool_call_id": call_id},
    ]
    tools = [{"type": "function", "function": {"name": "weather", "parameters": parameters}}]
    return {"messages": [asked, *between, answer], "tools": tools, **more}


def as_text(arguments: str) -> str:
    return f"tool_call: weather\narguments: {arguments}\n\nResult: 21\n\nIt is warm."


CLEAN = [
    row(),
    calling({"place": "Oslo", "days": 2, "unit": "celsius"}),
    row("Warm?", as_text('{"place": "Oslo"}')),
]


def test_sound_rows_meet_the_bar_and_have_no_other_finding(tmp_path):
    (found,) = judged(tmp_path / "rows.jsonl", CLEAN)
    assert (found.rule, found.severity, found.count, found.of, found.value) == (
        "structure.valid",
        "good",
        0,
        3,
        1.0,
    )
    assert judged(tmp_path / "none.jsonl", []) == []


@pytest.mark.parametrize(
    ("reason", "planted"),
    [
        ("json", '{"messages": ['),
        ("layout", {"question": "Hi."}),
        ("role_order", {"messages": [*turns("Hi.", "Hello."), *turns("So?", "Yes.")[1:]]}),
        ("no_answer", row("Hi.")),
        ("empty_user", row(" ", "Hello.")),
        ("leading_assistant", {"messages": turns("", "Hello.")[1:]}),
        ("unanswered_call", {"messages": [*calling({})["messages"][:2], *turns("So?", "Yes.")]}),
        ("undeclared_tool", calling({}) | {"tools": [{"type": "function", "function": {"name": "other"}}]}),
        ("arguments", calling("[1]")),
        ("label", row(label="perhaps")),
        ("encoding", '{"text": "\\ud800"}'),
    ],
)
def test_each_reason_why_a_row_cannot_be_used_is_a_finding_of_its_name(told, reason, planted):
    found = told(*CLEAN, planted)
    assert list(found) == [f"structure.{reason}"]
    ((source, note),) = found[f"structure.{reason}"].items()
    assert source == "rows:4"
    assert note.find("expected") >= 0


def test_the_bar_counts_every_row_that_is_not_sound_once(tmp_path):
    broken = calling({"days": 0, "town": "Oslo"})
    broken["messages"][-1]["content"] = as_text("{place}")  # at fault twice, counted once
    rows = [row()] * 57 + [row("Hi."), broken, row("Warm?", as_text("{place}"))]
    valid, *_ = judged(tmp_path / "rows.jsonl", rows)
    assert (valid.severity, valid.count, valid.of, valid.value, valid.threshold) == (
        "good",
        3,
        60,
        0.95,
        "≥ 95%",
    )
    valid, *_ = judged(tmp_path / "rows.jsonl", rows[1:])
    assert (valid.severity, valid.count, valid.of) == ("error", 3, 59)
    lax = Context(AuditSpec(min_valid=0.9))
    assert judged(tmp_path / "rows.jsonl", rows[1:], lax)[0].severity == "good"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"place": "Oslo", "unit": "kelvin"}, "unit: none of celsius, fahrenheit"),
        ({"days": 2}, "the arguments: 'place' is a required property"),
        ({"place": "Oslo", "days": "2"}, "days: text, not integer"),
        ({"place": "Oslo", "days": True}, "days: true or false, not integer"),
        ({"place": None}, "place: null, not string"),
        ({"place": "Oslo", "days": 0}, "days: breaks minimum (1)"),
        ({"place": "Oslo", "town": "Oslo"}, "'town' was unexpected"),
    ],
)
def test_arguments_that_break_the_schema_of_their_tool_are_named_by_key(told, arguments, said):
    found = told(*CLEAN, calling(arguments))
    assert list(found) == ["structure.schema"]
    assert list(found["structure.schema"]) == ["rows:4"]
    assert found["structure.schema"]["rows:4"].startswith("turn 2, weather: ")
    assert said in found["structure.schema"]["rows:4"]
    assert told(calling(arguments, label=False)) == {}, "what a bad answer shows"
    assert list(told(calling(arguments, label=True))) == ["structure.schema"]


def test_a_wrong_value_is_not_shown(told):
    private = {
        "place": "4111-secret-place",
        "days": "4111-secret-days",
        "unit": "4111-secret-unit",
        "also": {"4111": "secret"},
    }
    ((note,),) = (found.values() for found in told(calling(private)).values())
    assert "4111" not in note and "secret" not in note
    assert note.count("turn 2, weather") == 3


def test_a_schema_that_is_none_is_said_instead_of_what_would_break_it(told, monkeypatch):
    fetched: list[object] = []
    monkeypatch.setattr("urllib.request.urlopen", lambda *asked, **more: fetched.append(asked))
    for parameters, said in [
        ({"type": "dict"}, "'dict' is not a JSON type"),
        ({"properties": {"days": {"type": "int"}}}, "properties.days.type: 'int' is not a JSON type"),
        ({"required": True}, "required: True is not of type 'array'"),
        (["place"], "a list is not a schema"),
        ({"properties": {"place": {"$ref": "#/$defs/nowhere"}}}, "cannot be followed"),
        ({"properties": {"place": {"$ref": "https://example.com/schema"}}}, "cannot be followed"),
        ({"$ref": "#"}, "cannot be followed"),
    ]:
        found = told(*CLEAN, calling({"place": "Oslo"}, parameters))
        assert list(found) == ["structure.tool_schema"], parameters
        assert said in found["structure.tool_schema"]["rows:4"]
    assert not fetched, "nothing that a row names is fetched"
    draft7 = {
        "$schema": "http://json-schema.org/draft-07/schema#",
        "properties": {"at": {"items": [{"type": "number"}]}},
    }
    for sound in (
        None,
        {},
        True,
        WEATHER,
        draft7,
        {"$defs": {"p": UNIT}, "properties": {"unit": {"$ref": "#/$defs/p"}}},
    ):
        assert told(calling({"place": "Oslo", "unit": "celsius"}, sound)) == {}, sound
    assert list(told(calling({"at": ["x"]}, draft7))) == ["structure.schema"]


def test_no_schema_can_hold_up_the_audit(told):
    doubling: dict[str, Any] = {
        f"d{at}": {"allOf": [{"$ref": f"#/$defs/d{at + 1}"}] * 2} for at in range(40)
    } | {"d40": {}}
    half = REFERENCES // 2 - 1
    few = {f"d{at}": doubling[f"d{at}"] for at in range(half)} | {f"d{half}": {}}
    nested: dict[str, Any] = {}
    for _ in range(150):
        nested = {"properties": {"a": nested}}
    assert (
        told(
            calling({"place": "a" * 40}, {"properties": {"place": {"pattern": "^(a|a)*$b"}}}),
            calling({"a" * 40: 1}, {"patternProperties": {"^(a|a)*$b": {}}, "additionalProperties": False}),
            calling(
                {"place": [[at, str(at)][at % 2] for at in range(20_000)]},
                {"properties": {"place": {"uniqueItems": True}}},
            ),
            calling({}, {"$defs": doubling, "$ref": "#/$defs/d0"}),
            calling({}, {"$defs": few, "$ref": "#/$defs/d0"}),
        )
        == {}
    )
    for parameters in (nested, {"not": nested}, {"$ref": "#"}):
        assert list(told(calling({"a": {"a": 1}}, parameters))) == ["structure.tool_schema"]
    twice = calling(
        {"place": [1, {"a": 1, "b": 2}, {"b": 2, "a": 1}]}, {"properties": {"place": {"uniqueItems": True}}}
    )
    assert list(told(twice)) == ["structure.schema"]


@pytest.mark.parametrize(
    "arguments", ['{"place": "Oslo"', "{place: 'Oslo'}", '["Oslo"]', '"Oslo"', '{"place": NaN}']
)
def test_a_call_written_as_text_needs_a_json_object(told, arguments):
    found = told(*CLEAN, row("Warm?", as_text(arguments)))
    assert found == {"structure.text_calls": {"rows:4": "turn 2: weather"}}
    assert told(row("Warm?", as_text(arguments), label=False)) == {}
    assert told(row(as_text(arguments), "Hello.")) == {}, "the user's words call nothing"
    bad, good = as_text(arguments), as_text('{"place": "Oslo"}')
    pair = {"prompt": turns("Warm?"), "chosen": good, "rejected": bad}
    assert told(pair) == {}
    assert list(told(pair | {"chosen": bad, "rejected": good})) == ["structure.text_calls"]
    assert list(told({"text": bad})) == ["structure.text_calls"]


def test_ids_of_calls_are_a_note_where_the_model_writes_others(tmp_path, told, tiny_mistral, monkeypatch):
    nine = Context(AuditSpec(), renderer=renderers.load(tiny_mistral))
    assert told(*CLEAN, context=nine) == {}
    long = calling({"place": "Oslo"}, call_id="call_abcdef")
    assert told(*CLEAN, long, context=nine) == {"structure.call_ids": {"rows:4": "turn 2: call_abcdef"}}
    found = judged(tmp_path / "rows.jsonl", [long], nine)
    assert {one.rule: one.severity for one in found} == {
        "structure.valid": "good",
        "structure.call_ids": "note",
    }
    assert told(long) == {}
    monkeypatch.setattr(nine.renderer, "nine_letters", False)
    assert told(long, context=nine) == {}


def test_no_secret_of_a_row_that_cannot_be_used_is_shown(told, tmp_path):
    key = "ghp_" + "a1B2x9Qz7LmN0pR4sT6vW8yK3jH5gF1dC0eU"
    bad = {"messages": [{"role": key, "content": "Hi."}]}
    ((note,),) = (found.values() for found in told(bad).values())
    sentence = judged(tmp_path / "rows.jsonl", [bad])[1].what
    assert all(key not in text and key[4:14] not in text for text in (note, sentence))


def test_the_sentence_says_what_is_wrong_with_the_first_row_that_cannot_be_used(tmp_path):
    def sentence(*bad: str) -> str:
        return judged(tmp_path / "rows.jsonl", [*CLEAN, *bad])[1].what

    fault = "expected one whole JSON object a line, found broken JSON, expecting value at column 15"
    assert f"that cannot be used (json): {fault}" in sentence('{"messages": [')
    several = sentence('{"messages": [', "not JSON")
    assert f"that cannot be used (json), the first: {fault}" in several


LEAVES = (
    st.none()
    | st.booleans()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.integers()
    | st.text(max_size=5)
)
KEYS = st.sampled_from([*WEATHER, "items", "$ref", "$id", "anyOf", "not", "multipleOf", "enum", "a"])


@settings(max_examples=60, deadline=None)
@given(
    st.recursive(
        LEAVES,
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=4),
        max_leaves=12,
    ),
    st.dictionaries(KEYS, LEAVES | st.lists(LEAVES, max_size=3), max_size=3),
)
def test_no_schema_breaks_it(tmp_path_factory, parameters, arguments):
    found = judged(tmp_path_factory.mktemp("rows") / "rows.jsonl", [calling(arguments, parameters)])
    assert {one.rule for one in found} <= {"structure.valid", "structure.schema", "structure.tool_schema"}


def test_real_rows_have_the_faults_that_were_counted_by_hand(data_dir, tmp_path):
    def rows(name: str) -> dict[str, int]:
        path = data_dir(name)
        read = (
            [json.dumps(one) for one in json.loads(path.read_text())]
            if path.suffix == ".json"
            else path.read_text().splitlines()
        )
        return {one.rule: one.count for one in judged(tmp_path / "rows.jsonl", read)}

    syngen = "syngen_toolset_v1.0.0_claude.jsonl"
    assert rows(syngen) == {
        "structure.valid": 27,
        "structure.text_calls": 27,
    }  # of the 746 desirable; mostly a brace is missing
    assert rows("formats/glaive_toolcall_en_demo.json") == {"structure.valid": 1, "structure.schema": 1}
    for name in ("formats/alpaca_en_demo.json", "formats/kto_en_demo.json", "formats/dpo_en_demo.json"):
        assert rows(name) == {"structure.valid": 0}
