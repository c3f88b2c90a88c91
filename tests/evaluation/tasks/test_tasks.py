"""Scores of tasks: what counts as a right call, and perplexity as a ratio of sums."""

from __future__ import annotations

import json
import math
import random
from dataclasses import replace

import jsonschema
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import tiny
from tunesmith.checks.calls import CHECKS as ALL_CHECKS
from tunesmith.checks.calls import ReferenceAnswer, asked, references, score
from tunesmith.checks.parsers import ParsedCall, parse, same_json
from tunesmith.data import formats
from tunesmith.data.formats import Call, Completion, Conversation, Document, Judged, Message, Preference
from tunesmith.errors import EvaluationError
from tunesmith.evaluation.statistics import summarise
from tunesmith.evaluation.subject import Said, Subject
from tunesmith.evaluation.tasks import EvaluationSpec, Material, adherence, tool_calls
from tunesmith.evaluation.tasks import perplexity as perplexities
from tunesmith.evaluation.tasks.perplexity import Perplexity, RowLoss
from tunesmith.evaluation.tasks.tool_calls import ToolCalls
from tunesmith.learning.objectives.sft import SFT
from tunesmith.model import loading as model
from tunesmith.tokens import renderers, template
from tunesmith.tokens.batches import BatchSpec

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
        f"<tool_call>\n{json.dumps({'name': name, 'arguments': arguments}, indent=1)}\n</tool_call>"
        for name, arguments in made
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


def as_llama(made: list[tuple[str, dict]]) -> str:
    return "\n".join(json.dumps({"name": name, "parameters": arguments}) for name, arguments in made)


def as_later_mistral(made: list[tuple[str, dict]]) -> str:
    return "".join(
        f"[TOOL_CALLS]{name}[CALL_ID]abcdefghi[ARGS]{json.dumps(arguments)}" for name, arguments in made
    )


def as_python(made: list[tuple[str, dict]]) -> str:
    return "Well: " + "\n".join(
        f"<|python_tag|>{json.dumps({'name': name, 'parameters': arguments})}" for name, arguments in made
    )


FORMS = [as_text, as_mistral, as_hermes, as_objects, as_openai, as_llama, as_later_mistral, as_python]


def as_tags(made: list[tuple[str, dict]]) -> str:
    """As the template of Qwen3-Coder writes calls."""
    texts = []
    for name, arguments in made:
        parameters = "".join(
            f"<parameter={key}>\n{value if isinstance(value, str) else json.dumps(value)}\n</parameter>\n"
            for key, value in arguments.items()
        )
        texts.append(f"<tool_call>\n<function={name}>\n{parameters}</function>\n</tool_call>")
    return "\n".join(texts)


def typed_tools(made: list[tuple[str, dict]]) -> list:
    """Tools that take just the types of the arguments."""
    kinds = {str: "string", bool: "boolean", int: "integer", float: "number", list: "array", dict: "object"}
    return [
        {
            "type": "function",
            "function": {
                "name": name,
                "parameters": {
                    "type": "object",
                    "properties": {
                        key: {"type": kinds.get(type(value), "null")} for key, value in arguments.items()
                    },
                },
            },
        }
        for name, arguments in made
    ]


tagged_calls = st.lists(
    st.tuples(names, st.dictionaries(names, json_values, max_size=4)),
    min_size=1,
    max_size=3,
    unique_by=lambda call: call[0],
)


@settings(max_examples=80, deadline=None)
@given(made=tagged_calls)
def test_calls_in_tags_are_read_by_the_schemas_of_their_tools(made):
    assert [(call.name, call.arguments) for call in parse(as_tags(made), typed_tools(made))] == made
    assert [call.problem for call in parse(as_tags(made))] == [None] * len(made)


@settings(max_examples=80, deadline=None)
@given(made=tagged_calls)
def test_mlx_lms_parser_reads_the_same_calls_in_tags(made):
    """It takes the text null for no value, whatever the schema says, and rounds whole numbers."""
    from mlx_lm.tool_parsers import qwen3_coder

    made = [
        (name, {key: value for key, value in arguments.items() if not isinstance(value, float)})
        for name, arguments in made
    ]
    tools = typed_tools(made)
    for name, arguments in made:
        text = as_tags([(name, arguments)])
        if "null" in text.lower() or any(abs(value) > 2**53 for value in numbers_in(arguments)):
            continue
        body = text.removeprefix("<tool_call>\n").removesuffix("\n</tool_call>")
        (call,) = parse(text, tools)
        assert qwen3_coder.parse_tool_call(body, tools) == {"name": name, "arguments": call.arguments}


def numbers_in(arguments: dict) -> list[int]:
    return [value for value in arguments.values() if isinstance(value, int)]


@pytest.mark.parametrize(
    ("text", "schema", "value"),
    [
        ("5", {"type": "string"}, "5"),
        ("5", {"type": "integer"}, 5),
        ("5", {"type": ["string", "null"]}, "5"),
        ("null", {"type": ["string", "null"]}, None),
        ("5", {"anyOf": [{"type": "string"}, {"type": "number"}]}, 5),
        ("True", {"type": "boolean"}, True),
        ("True", None, "True"),
        ("[1, 2]", None, [1, 2]),
        ('"quoted"', None, '"quoted"'),
        ("left", {"enum": ["left", 3]}, "left"),
        ("3", {"enum": ["left", 3]}, 3),
        ("soon", {"type": "integer"}, "soon"),
        ("", None, ""),
        ("two\nlines\n", {"type": "string"}, "two\nlines\n"),
        ("NaN", {"type": "number"}, "NaN"),
    ],
)
def test_the_text_of_a_parameter_means_a_value_of_its_type(text, schema, value):
    properties = {} if schema is None else {"a": schema}
    tool = {"type": "function", "function": {"name": "f", "parameters": {"properties": properties}}}
    (call,) = parse(
        f"<tool_call><function=f><parameter=a>\n{text}\n</parameter></function></tool_call>", [tool]
    )
    assert call.arguments == {"a": value} and type(call.arguments["a"]) is type(value)


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("<tool_call><function=f><parameter=a>1</function></tool_call>", "no </parameter>"),
        ("<tool_call><function=f>words</function></tool_call>", "</function> is missing"),
        ("<tool_call><function=>", "<function=NAME> is missing"),
        ("<tool_call>\n<function=f>\n</function>", "no </tool_call>"),
    ],
)
def test_a_call_in_tags_that_is_not_whole_has_a_problem(text, problem):
    (call,) = parse(text)
    assert call.arguments is None and problem in str(call.problem)


def test_a_program_after_the_mark_of_llama_is_no_call():
    assert parse('<|python_tag|>brave_search.call(query="rain")') == []
    assert parse("<|python_tag|>[1, 2]") == []
    (call,) = parse('<|python_tag|> {"name": "f", "parameters": {"a": }}')
    assert call.problem


def test_calls_in_tags_are_scored_by_their_values():
    tools = typed_tools([("f", {"a": "5", "b": 5})])
    prompt = Conversation(ASK.messages, tuple(tools))
    reference = ReferenceAnswer("x:1", prompt, (Call("f", {"a": "5", "b": 5}),))
    detail = score(as_tags([("f", {"a": "5", "b": 5})]), reference)
    assert detail["value"] == 1.0 and detail["exact_arguments"] and detail["schema_valid"]


@pytest.mark.parametrize("form", FORMS)
@settings(max_examples=40, deadline=None)
@given(made=calls)
def test_calls_written_in_any_form_are_read_back_exactly(form, made):
    read = parse(form(made))
    assert [call.problem for call in read] == [None] * len(made)
    assert [(call.name, call.arguments) for call in read] == made


@settings(max_examples=40, deadline=None)
@given(made=calls)
def test_mlx_lms_own_parsers_read_the_same(made):
    """What mlx-lm hands to its parsers: the text behind the opening token."""
    from mlx_lm.tool_parsers import json_tools, mistral

    for text in (as_mistral(made), as_later_mistral(made).replace("[CALL_ID]abcdefghi", "")):
        theirs = mistral.parse_tool_call(text.removeprefix("[TOOL_CALLS]"))
        theirs = [theirs] if isinstance(theirs, dict) else theirs
        assert [(call.name, call.arguments) for call in parse(text)] == [
            (one["name"], one["arguments"]) for one in theirs
        ]
    bodies = [part.partition("</tool_call>")[0] for part in as_hermes(made).split("<tool_call>")[1:]]
    theirs = [json_tools.parse_tool_call(body) for body in bodies]
    assert [(call.name, call.arguments) for call in parse(as_hermes(made))] == [
        (one["name"], one["arguments"]) for one in theirs
    ]


LLAMA = tiny.CHATML.replace(
    "{{ message['content'] }}",
    "{{ message['content'] }}{% for c in message.tool_calls or [] %}{{ '' if loop.first else '\n' }}"
    "{{ {'name': c.function.name, 'parameters': c.function.arguments} | tojson }}{% endfor %}",
)
UNREAD = LLAMA.replace("{'name'", "{'does'")
HERMES = (
    "{% for t in tools or [] %}{{ t | tojson }}\n{% endfor %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content or '' }}"
    "{% for c in m.tool_calls or [] %}<tool_call>\n{{ c.function | tojson }}\n</tool_call>{% endfor %}"
    "<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.fixture(scope="module")
def rendering(tmp_path_factory):
    made = {"mistral": renderers.load("mistral-v3")}
    for name, words in {"hermes": HERMES, "llama": LLAMA, "unread": UNREAD, "plain": tiny.CHATML}.items():
        tiny.write_tokenizer(folder := tmp_path_factory.mktemp(name), words)
        made[name] = renderers.load(folder)
    return made


@pytest.mark.parametrize("name", ["mistral", "hermes", "llama"])
@settings(max_examples=20, deadline=None)
@given(
    made=st.lists(
        st.tuples(names, st.dictionaries(names, st.integers() | names, max_size=3)), min_size=1, max_size=3
    )
)
def test_what_a_renderer_teaches_is_read_back(rendering, name, made):
    """The learned tokens of a row, decoded as an answer is."""
    answer = Message("assistant", "", tuple(Call(name, arguments) for name, arguments in made))
    (row,) = rendering[name].rows(formats.Demonstration(Conversation((*ASK.messages, answer))))
    said = rendering[name].answer(row.tokens.ids[row.tokens.targets > 0])
    assert [(call.name, call.arguments) for call in parse(said)] == made


pieces = st.sampled_from(
    [
        "tool_call:",
        "tool_call: f\n",
        "arguments:",
        "arguments: {",
        "[TOOL_CALLS]",
        "<tool_call>",
        "</tool_call>",
        "\n",
        "Result:",
        '{"name": "f", "arguments": ',
        '{"a": 1}',
        "}",
        "]",
        "[",
        "{",
        '"',
        "NaN",
        "\\",
        "9" * 5000,
        "[" * 20000,
        '{"function": ',
        '{"tool_calls": [',
        "\r\n",
        " ",
        "\x00",
        "é",
    ]
)


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
        ('{"name": "f", "parameters": {"a": }}', "no JSON"),
        ('{"name": "f", "arguments": 1, "parameters": {}}', "not a JSON object"),
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
    for one, other in [
        (True, 1),
        (0, False),
        (None, False),
        ([1], [1, 2]),
        ({"a": 1}, {"a": 1, "b": 2}),
        ("1", 1),
    ]:
        assert not same_json(one, other)
        assert not same_json(other, one)


def said(text: str) -> Said:
    return Said(text, len(text), False)


def ref(*made: tuple[str, dict]) -> ReferenceAnswer:
    return ReferenceAnswer("x.jsonl:1", ASK, tuple(Call(name, arguments) for name, arguments in made))


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
    scores = ToolCalls().score([(ref(), said("Which file?")), (ref(("f", {})), said(as_text([("f", {})])))])
    found = {one.name: one for one in summarise(ToolCalls(), None, scores, seed=0)}
    assert (found["tool_calls"].value, found["well_formed"].n) == (1.0, 1)


TOOLS = (
    {
        "type": "function",
        "function": {
            "name": "f",
            "parameters": {
                "type": "object",
                "properties": {"a": {"type": "integer"}, "b": {"type": "string"}},
                "required": ["a"],
                "additionalProperties": False,
            },
        },
    },
    {"type": "function", "function": {"name": "g"}},
)
WITH_TOOLS = Conversation(ASK.messages, TOOLS)


@pytest.mark.parametrize(
    ("answer", "keys", "required", "exact", "valid", "known"),
    [
        (as_text([("f", {"a": 1, "b": "x"})]), True, True, True, True, True),
        (as_text([("f", {"a": 2})]), False, True, False, True, True),  # b is not required
        (as_text([("f", {"b": "x"})]), False, False, False, False, True),
        (as_text([("f", {"a": "1", "b": "x"})]), True, True, False, False, True),
        (as_text([("f", {"a": 1, "b": "x", "c": 1})]), True, True, False, False, True),
        (
            as_text([("g", {"any": 1})]),
            False,
            False,
            False,
            True,
            True,
        ),  # another tool, called as it is declared
        (as_text([("h", {"a": 1, "b": "x"})]), False, False, False, False, False),
        (as_text([("f", {"a": 1, "b": "x"}), ("h", {})]), False, False, False, False, False),
        ("words", False, False, False, False, False),
        ('tool_call: f\narguments: {"a": 1', False, False, False, False, True),
    ],
)
def test_what_a_tool_declares_decides_which_arguments_are_right(answer, keys, required, exact, valid, known):
    detail = score(answer, ref(("f", {"a": 1, "b": "x"}))._replace(prompt=WITH_TOOLS))
    checks = ("keys_present", "required_arguments", "exact_arguments", "schema_valid", "known_tool")
    assert tuple(detail[check] for check in checks) == (keys, required, exact, valid, known)


def test_a_tool_without_a_schema_requires_what_the_reference_gives():
    asked = ref(("f", {"a": 1}))._replace(
        prompt=Conversation(ASK.messages, ({"type": "function", "function": {"name": "f"}},))
    )
    for arguments, whole in (({}, False), ({"a": 2}, True)):
        detail = score(as_text([("f", arguments)]), asked)
        assert (detail["required_arguments"], detail["keys_present"], detail["schema_valid"]) == (
            whole,
            whole,
            True,
        )


schemas = st.fixed_dictionaries(
    {"type": st.just("object")},
    optional={
        "properties": st.dictionaries(
            st.sampled_from("abc"),
            st.sampled_from(
                [
                    {"type": "integer"},
                    {"type": ["string", "null"]},
                    {"enum": [1, "x"]},
                    {"$ref": "#/$defs/s"},
                    {},
                ]
            ),
        ),
        "required": st.lists(st.sampled_from("abc"), unique=True),
        "additionalProperties": st.booleans(),
        "$defs": st.just({"s": {"type": "string", "minLength": 1}}),
    },
)


@settings(max_examples=150, deadline=None)
@given(
    schemas,
    st.dictionaries(st.sampled_from("abcd"), st.integers() | st.text(max_size=2) | st.none(), max_size=4),
)
def test_schema_valid_is_what_jsonschema_says(schema, arguments):
    tool = {"type": "function", "function": {"name": "f", "parameters": schema}}
    reference = ReferenceAnswer("x:1", Conversation(ASK.messages, (tool,)), (Call("f", {"z": 1}),))
    detail = score(as_text([("f", arguments)]), reference)
    if '"$ref"' in json.dumps(schema) and "$defs" not in schema:
        assert detail["schema_valid"] is None  # points at nothing
        assert detail["required_arguments"] is ("z" in arguments)
    else:
        assert detail["schema_valid"] is jsonschema.Draft202012Validator(schema).is_valid(arguments)
        assert detail["required_arguments"] is all(key in arguments for key in schema.get("required", []))


@pytest.mark.parametrize(
    ("schema", "value"),
    [
        ({"multipleOf": 0.1}, 10**400),
        ({"$ref": "#/$defs/n", "$defs": {"n": {"items": {"$ref": "#/$defs/n"}}}}, "[" * 900 + "]" * 900),
    ],
)
def test_arguments_beyond_what_a_schema_can_follow_are_not_valid(schema, value):
    tool = {
        "type": "function",
        "function": {
            "name": "f",
            "parameters": {"properties": {"a": schema}, "$defs": schema.get("$defs", {})},
        },
    }
    detail = score(
        f'tool_call: f\narguments: {{"a": {value}}}',
        ref(("f", {"a": 1}))._replace(prompt=Conversation(ASK.messages, (tool,))),
    )
    assert (detail["schema_valid"], detail["keys_present"]) == (False, True)


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "dict"},
        {"properties": {"a": {"pattern": "["}}},
        {"$ref": "#/$defs/gone"},
        {"$ref": "https://x.invalid/s.json"},
        {"$ref": "#"},
        [],
        {"required": "a"},
        3,
    ],
)
def test_a_schema_that_is_none_is_told_and_not_asked(schema, notices, rendering):
    tool = {"type": "function", "function": {"name": "f", "parameters": schema}}
    rows = [
        formats.Demonstration(
            Conversation((*ASK.messages, Message("assistant", as_text([("f", {"a": 1})]))), (tool,))
        )
    ]
    (task,) = tool_calls.build(material(rows, rendering["hermes"], notices))  # Mistral's refuses such rows
    detail = task.score([(task.asked[0], said(as_text([("f", {"b": 1})])))])[0].detail
    assert (detail["schema_valid"], detail["required_arguments"], detail["keys_present"]) == (
        None,
        False,
        False,
    )
    assert [one.count for one in notices if "invalid schema" in one.what] == [1]


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.sampled_from(
            ["words", "[TOOL_CALLS]", as_text([("f", {"a": 1})]), as_text([("h", {})]), "tool_call: f"]
        ),
        min_size=2,
        max_size=2,
    )
)
def test_whether_a_check_has_a_number_depends_on_the_question_alone(answers):
    questions = [
        ref(),
        ref(("f", {})),
        ref(("f", {"a": 1}))._replace(prompt=WITH_TOOLS),
        ref()._replace(prompt=WITH_TOOLS),
    ]
    for question in questions:
        one, other = (score(answer, question) for answer in answers)
        assert [one[check] is None for check in ALL_CHECKS] == [other[check] is None for check in ALL_CHECKS]


def test_a_call_where_none_is_wanted_is_counted_and_lower_is_better():
    items = [
        (ref()._replace(source=f"x:{at}"), said(text))
        for at, text in enumerate(["words", "tool_call: f\narguments: {}", "no", "no"])
    ]
    items.append((ref(("f", {}))._replace(source="x:9"), Said("words", 5, True)))
    scores = ToolCalls().score(items)
    found = {(one.name, one.part): one for one in summarise(ToolCalls(), None, scores, seed=0)}
    assert (found["unwanted_call", None].value, found["unwanted_call", None].n) == (0.25, 4)
    assert (found["unwanted_call", None].better, found["tool_calls", None].better) == ("lower", "higher")
    assert (found["tool_calls", "tool=no call"].value, found["tool_calls", "tool=f"].value) == (0.75, 0.0)
    assert [one.detail["cut"] for one in scores] == [False] * 4 + [True]
    assert (scores[4].prompt, scores[4].reference, scores[4].answer) == ("hello", "f {}", "words")


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


def test_each_answer_that_calls_is_asked_for_and_the_last():
    user, result = Message("user", "a"), Message("tool", "{}")
    calling, words = Message("assistant", "", (Call("f", {"a": 1}),)), Message("assistant", "done")
    broken = Message("assistant", "tool_call: f\narguments: {")
    found, unusable = asked(judged(user, calling, result, words, user, broken, user, words))
    assert [one.calls for one in found] == [calling.calls, ()]
    assert [len(one.prompt.messages) for one in found] == [1, 7]
    assert {one.source for one in found} == {"x.jsonl:7"}
    assert unusable == 1
    assert [
        len(one.prompt.messages)
        for one in asked(judged(user, replace(calling, learn=False), result, words))[0]
    ] == [3]
    assert asked(judged(user, calling, desirable=False)) == ([], 1)


def test_preferences_and_completions_have_references_too():
    called = Conversation((Message("user", "a"), Message("assistant", as_text([("f", {"a": 1})]))))
    words = Conversation((Message("user", "a"), Message("assistant", "no")))
    found = references(Preference(called, words, source="p:1"))
    assert found == ReferenceAnswer(
        "p:1", Conversation(called.messages[:1]), (Call("f", {"a": 1}),), called.messages[1]
    )
    text = as_mistral([("f", {"a": 1})])
    answer = Message("assistant", text)
    assert references(Completion("ask", text, source="c:1")) == ReferenceAnswer(
        "c:1", "ask", (Call("f", {"a": 1}),), answer
    )
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
    """635 of the 662 answers with a call are well formed. The other 27 are the data's fault: arguments that
    end in `)` instead of `}`, or lack the last `}`. With that mended they are well formed too."""
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
        short = [
            line
            for line in lines
            if line.startswith("arguments: ") and line.count("{") == line.count("}") + 1
        ]
        assert short
        mended = "\n".join(line.removesuffix(")") + "}" if line in short else line for line in lines)
        assert [call.problem for call in parse(mended)] == [None] * len(parse(text))


@pytest.fixture
def notices():
    return []


def material(rows, renderer, notices, **options) -> Material:
    imitated = SFT().select(rows).examples
    spec = template.TemplateSpec(too_long="drop")
    rendered = template.render(imitated, renderer, spec, 2048)
    batch = options.pop("batch", BatchSpec())
    return Material(
        rows, imitated, rendered.rows, renderer, spec, batch, EvaluationSpec(**options), notify=notices.append
    )


def test_what_cannot_be_asked_is_said(notices, rendering):
    user, words = Message("user", "a"), Message("assistant", "b")
    rows = [
        judged(user, words),
        judged(user, Message("assistant", "tool_call: f\narguments: {")),
        judged(user, Message("tool", "{}"), words),  # answers no call
        formats.Document("text"),
    ]
    rows = [
        replace(row, conversation=replace(row.conversation, tools=())) if isinstance(row, Judged) else row
        for row in rows
    ]
    assert tool_calls.build(material(rows, rendering["mistral"], notices)) == []
    told = [(one.what.partition(":")[2].strip(), one.count) for one in notices]
    assert told[0] == ("answers that cannot be used as a reference are not asked for", 1)
    assert told[1][0].startswith(
        "not asked, since training would refuse it: call_id; x.jsonl:7: a tool result"
    )
    assert told[2] == ("no row asks for a call, so it is not measured", 1)


TAUGHT = ({"type": "function", "function": {"name": "clock", "parameters": {"type": "object"}}},)


@pytest.mark.parametrize("task", [tool_calls, adherence])
def test_a_row_of_which_the_template_leaves_something_out_is_not_asked_as_training_would_refuse_it(
    task, notices, rendering
):
    user, result, words = Message("user", "a"), Message("tool", "seven"), Message("assistant", "so")
    written = Message("assistant", as_text([("clock", {})]))
    talks = [
        Conversation((user, written), TAUGHT),
        Conversation((user, Message("assistant", "", (Call("clock", {"zone": "utc"}),)), result, words)),
        Conversation((user, written)),
    ]
    rows = [formats.Demonstration(talk, source=f"x:{at}") for at, talk in enumerate(talks)]
    for name, kept in (("plain", ["x:2"]), ("hermes", ["x:0", "x:1", "x:1", "x:2"])):
        notices.clear()
        made = material(rows, rendering[name], notices, embed=False)
        (found,) = task.build(made)
        assert [one.source for one in found.asked] == (
            kept if task is tool_calls else list(dict.fromkeys(kept))
        )
        assert {one.source for one in found.asked} == {
            row.source for row in made.rows
        }  # what training teaches
        if name == "plain":
            (note,) = notices
            assert note.what.endswith("left_out; x:0: the template leaves out the declared tools (clock)")
            assert (note.where, note.count) == ("x:0, x:1", 3 if task is tool_calls else 2)
            long = replace(made, rows=[])  # dropped by training as too long
            assert [one.source for one in task.build(long)[0].asked] == kept


def test_calls_that_cannot_be_read_back_are_told(notices, rendering):
    answer = Message("assistant", "", (Call("note", {"text": "0"}),))
    rows = [formats.Demonstration(Conversation((*ASK.messages, answer)), source="x:1")]
    for name in ("llama", "hermes", "mistral", "unread"):
        assert notices == []
        tool_calls.build(material(rows, rendering[name], notices))
    assert [(one.count, "cannot be read back" in one.what) for one in notices] == [(1, True)]


def test_plain_text_has_no_answer_and_is_not_counted_as_one_that_cannot_be_used(notices, rendering):
    rows = [Document("the cat", source="x:1"), Completion("ask", as_text([("f", {})]), source="x:2")]
    for task in (tool_calls, adherence):
        assert len(task.build(material(rows, rendering["plain"], notices, embed=False))[0].asked) == 1
    assert notices == []


def test_only_rows_to_be_imitated_are_asked_and_another_question_is_another_task(notices, rendering):
    def row(name: str, source: str, desirable: bool = True, tools: tuple = ()) -> Judged:
        answer = Message("assistant", as_text([(name, {})]))
        return Judged(Conversation((*ASK.messages, answer), tools), desirable, source=source)

    declared = (
        {
            "type": "function",
            "function": {"name": "declared", "parameters": {"type": "object", "required": ["a"]}},
        },
    )
    rows = [
        row("good", "x:1"),
        row("bad", "x:2", False),
        row("worse", "x:3", False, declared),
        row("declared", "x:4", tools=declared),
    ]
    (task,) = tool_calls.build(material(rows, rendering["mistral"], notices, max_tokens=7))
    assert (task.max_tokens, [one.source for one in task.asked]) == (7, ["x:1", "x:4"])
    assert [one.what for one in notices] == [
        "tool_calls: reference calls that do not fit their own tool's schema"
    ]
    same = tool_calls.build(material(rows, rendering["mistral"], [], max_tokens=7))[0]
    other = tool_calls.build(material(rows[1:], rendering["mistral"], [], max_tokens=7))[0]
    assert task.identity == same.identity != other.identity
    assert (
        task.identity != tool_calls.build(material(rows, rendering["mistral"], [], max_tokens=8))[0].identity
    )
    described = ({"type": "function", "function": {**declared[0]["function"], "description": "said of it"}},)
    told = [*rows[:-1], row("declared", "x:4", tools=described)]
    assert (
        task.identity != tool_calls.build(material(told, rendering["mistral"], [], max_tokens=7))[0].identity
    )


def test_answers_in_forms_that_were_not_read_before_are_scored_again(rendering, monkeypatch):
    """What was kept of them says that no call was made."""
    identities: dict[str, list[str]] = {}
    tagged = "<tool_call>\n<function=look>\n</function>\n</tool_call>"
    for form, text in {"tagged": tagged, "text": as_text([("look", {})])}.items():
        rows = [Judged(Conversation((*ASK.messages, Message("assistant", text))), True, source="x:1")]
        for tags in (tool_calls.TAGGED, ()):
            monkeypatch.setattr(tool_calls, "TAGGED", tags)
            (task,) = tool_calls.build(material(rows, rendering["mistral"], []))
            identities.setdefault(form, []).append(task.identity)
        monkeypatch.undo()
    assert len({*identities["tagged"]}) == 2 and len({*identities["text"]}) == 1


def test_the_real_tool_data_is_asked_for(data_dir, notices, rendering):
    """Calls in the middle of conversations count: no row of this data ends with one."""
    path = data_dir("formats/glaive_toolcall_en_demo.json")
    read = formats.read([path], formats.DataSpec(train=(str(path),)))
    rows = read.examples[:100]
    (task,) = tool_calls.build(material(rows, rendering["hermes"], notices))
    called = sum(len(message.calls) > 0 for row in rows for message in row.conversation.messages)
    assert (sum(bool(one.calls) for one in task.asked), sum(not one.calls for one in task.asked)) == (
        called,
        100,
    )
    right = task.score(
        [
            (one, said(as_hermes([(call.name, call.arguments) for call in one.calls]) if one.calls else "no"))
            for one in task.asked
        ]
    )
    found = {one.name: one.value for one in summarise(task, None, right, 0) if one.part is None}
    broken = sum(one.count for one in notices if "do not fit" in one.what)
    assert found.pop("unwanted_call") == 0
    assert found.pop("schema_valid") == pytest.approx(1 - broken / called)
    assert set(found.values()) == {1.0}


def subject(folder, renderer, **options) -> Subject:
    net = model.load(model.ModelSpec(path=str(folder))).net
    net.eval()
    return Subject(net, renderer, "tuned", **options)


ROWS = [
    Judged(
        Conversation((Message("user", "the cat sat"), Message("assistant", words))),
        good,
        source=f"x:{at}",
        metadata={"task": kind},
    )
    for at, (words, good, kind) in enumerate(
        [
            ("on a mat", True, "sit"),
            (as_text([("f", {"a": 1})]), True, "call"),
            ("no no no", False, "sit"),
            ("and read", True, "read"),
        ]
    )
]


def test_neither_batches_nor_the_order_of_rows_change_what_is_measured(tiny_model):
    renderer = renderers.load(tiny_model)

    def measured(rows, **batch):
        made = material(rows, renderer, [], batch=BatchSpec(sequences=8, **batch), max_tokens=8)
        one = subject(tiny_model, renderer, batch=made.batch, batch_size=batch.get("micro", 32))
        scores = [
            score
            for task in (*perplexities.build(made), *tool_calls.build(made))
            for score in task.score(task.measure(one))
        ]
        return sorted((score.source, score.units, score.answer or "", score.value) for score in scores)

    straight = measured(ROWS)
    assert len(straight) == 4 + 3
    for other in (measured(ROWS, micro=1), measured(ROWS, pack=True), measured(ROWS[::-1])):
        assert [one[:3] for one in other] == [one[:3] for one in straight]
        assert [one[3] for one in other] == pytest.approx([one[3] for one in straight], abs=1e-4)


# --- perplexity
# -------------------------------------------------------------------------------------------------------

row_losses = st.lists(st.tuples(st.floats(0.01, 200.0), st.integers(1, 60)), min_size=1, max_size=12)


@settings(max_examples=50, deadline=None)
@given(row_losses, st.integers(0, 2**32))
def test_museum_18_perplexity_is_e_to_nats_a_token_and_no_cut_or_order_changes_it(losses, seed):
    """mistral-finetune takes 2 to the nats; transformers 39241: the loss depends on the batch size."""
    rows = [RowLoss(f"x.jsonl:{line}", loss, float(tokens)) for line, (loss, tokens) in enumerate(losses)]
    expected = sum(loss for loss, _ in losses) / sum(tokens for _, tokens in losses)
    shuffled = random.Random(seed).sample(rows, len(rows))
    joined = [RowLoss("all", sum(loss for loss, _ in losses), float(sum(tokens for _, tokens in losses)))]
    for cut in (rows, shuffled, joined):
        perplexity, loss = summarise(
            Perplexity(), None, Perplexity().score(cut[:1]) + Perplexity().score(cut[1:]), seed=0
        )
        assert (perplexity.name, loss.name) == ("perplexity", "loss")
        assert loss.value == pytest.approx(expected, rel=1e-9)
        assert perplexity.value == pytest.approx(math.exp(expected), rel=1e-9)


@pytest.mark.parametrize("bad", [(math.nan, 3.0), (math.inf, 3.0), (1.0, 0.0), (1.0, math.nan)])
def test_a_row_without_a_usable_loss_is_named_and_refused(bad):
    with pytest.raises(EvaluationError, match=r"1 of 2 rows(.|\n)*x\.jsonl:2"):
        Perplexity().score([RowLoss("x.jsonl:1", 1.0, 2.0), RowLoss("x.jsonl:2", *bad)])


def test_nothing_to_score_is_refused():
    with pytest.raises(EvaluationError, match="no row has an answer"):
        ToolCalls().score([])


def test_parsed_calls_are_values():
    assert parse("tool_call: f\narguments: {}") == [ParsedCall("f", {})]


def test_perplexity_by_label_type_and_category_and_what_is_unwanted_apart(tiny_model, notices):
    renderer = renderers.load(tiny_model)
    pair = Preference(
        Conversation((*ASK.messages, Message("assistant", "my note"))),
        Conversation((*ASK.messages, Message("assistant", "timers"))),
        source="x:7",
    )
    made = material([*ROWS, pair, formats.Document("the cat", source="x:8")], renderer, notices)
    (task,) = perplexities.build(made)
    items = task.measure(subject(tiny_model, renderer))
    found = {(one.name, one.part): one for one in summarise(task, None, task.score(items), seed=0)}
    parts = {part for name, part in found if name == "perplexity"}
    assert parts == {
        None,
        "label=desirable",
        "label=chosen",
        "label=none",
        "type=call",
        "type=words",
        "type=text",
        "category=sit",
        "category=call",
        "category=read",
    }
    by_hand = {
        None: [item for item in items if item.source != "x:2" and item.about.get("unwanted") is None],
        "label=desirable": [item for item in items if item.source in ("x:0", "x:1", "x:3")],
        "type=call": [item for item in items if item.source == "x:1"],
    }
    for part, some in by_hand.items():
        expected = math.exp(sum(item.nats for item in some) / sum(item.units for item in some))
        assert found["perplexity", part].value == pytest.approx(expected)
    assert found["loss", None].n == 5
    alone = {"loss_undesirable": "x:2", "loss_rejected": "x:7"}
    for name, source in alone.items():
        (item,) = [item for item in items if item.source == source and item.about.get("unwanted")]
        assert (found[name, None].value, found[name, None].better) == (
            pytest.approx(item.nats / item.units),
            None,
        )
    assert notices == []
    assert (
        task.identity
        == perplexities.build(made)[0].identity
        != perplexities.build(material(ROWS, renderer, []))[0].identity
    )


def test_rows_that_are_all_undesirable_have_a_loss_of_their_own(tiny_model, notices):
    renderer = renderers.load(tiny_model)
    rows = [replace(row, desirable=False) for row in ROWS]
    (task,) = perplexities.build(material(rows, renderer, notices))
    scores = task.score(task.measure(subject(tiny_model, renderer)))
    assert [(one.name, one.part, one.n) for one in summarise(task, scores, scores, seed=0)] == [
        ("loss_undesirable", None, 4)
    ]
    assert notices == []
    assert perplexities.build(material([], renderer, notices)) == [] and "not measured" in notices[0].what


@pytest.mark.parametrize("learned", ["leave_out", "learn"])
def test_undesirable_rows_that_the_run_imitates_are_not_measured_twice(learned, tiny_model):
    made = material(ROWS, renderers.load(tiny_model), [])
    imitated = SFT(undesirable=learned).select(ROWS).examples
    rendered = template.render(imitated, made.renderer, made.template, 2048)
    (task,) = perplexities.build(replace(made, imitated=imitated, rows=rendered.rows))
    about = [one.about for one in task.items if one.group.source == "x:2"]
    assert about == [
        {"unwanted": "undesirable"}
        if learned == "leave_out"
        else {"label": "undesirable", "type": "words", "category": "sit"}
    ]


def test_a_row_with_calls_and_words_says_so(rendering):
    calling = Message("assistant", "", (Call("f", {"a": 1}, "abcdefghi"),))
    rows = [
        formats.Demonstration(
            Conversation(
                (
                    *ASK.messages,
                    calling,
                    Message("tool", "{}", call_id="abcdefghi"),
                    Message("assistant", "so"),
                )
            )
        )
    ]
    types = {
        name: [one.about["type"] for one in perplexities.build(material(rows, rendering[name], []))[0].items]
        for name in ("hermes", "mistral")
    }
    assert types["hermes"] == ["call and words"]  # all in one rendering
    assert sorted(types["mistral"]) in (["call", "words"], ["call and words"])


def test_a_category_with_too_many_values_is_told(tiny_model, notices):
    rows = [replace(row, metadata={"task": f"t{at}"}) for at in range(25) for row in ROWS[:1]]
    rows = [replace(row, source=f"x:{at}") for at, row in enumerate(rows)]
    (task,) = perplexities.build(material(rows, renderers.load(tiny_model), notices))
    assert all("category" not in one.about for one in task.items)
    assert [(one.what, one.count) for one in notices] == [
        ("perplexity: task has more than 20 values: not shown apart", 25)
    ]
