"""A constrained answer is valid, valid text is allowed, and what cannot be enforced is refused by name."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

import tiny
from tunesmith.checks import parsers, schemas
from tunesmith.data.formats import Call, Conversation, Message
from tunesmith.engine.engine import Engine
from tunesmith.engine.grammars import Grammars
from tunesmith.engine.requests import Request
from tunesmith.engine.speculation import PromptLookup, Speculation
from tunesmith.errors import ModelError
from tunesmith.model import loading
from tunesmith.tokens import renderers

TOOLS = "{% for t in tools or [] %}{{ t | tojson }}{% endfor %}{% for m in messages %}<|im_start|>"
END = "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
CALL_TEMPLATES = {
    "hermes": TOOLS + "{{ m.role }}\n{{ m.content }}{% for c in m.tool_calls or [] %}"
    "{{ '\n' if not loop.first }}<tool_call>\n"
    '{"name": "{{ c.function.name }}", "arguments": {{ c.function.arguments | tojson }}}\n</tool_call>'
    "{% endfor %}" + END,
    "llama 3": TOOLS + "{{ m.role }}\n{% if m.tool_calls %}"
    "{% if m.tool_calls | length > 1 %}{{ raise_exception('one call') }}{% endif %}"
    '{% set c = m.tool_calls[0].function %}{"name": "{{ c.name }}", "parameters": '
    "{{ c.arguments | tojson }}}{% else %}{{ m.content }}{% endif %}" + END,
    "header": TOOLS + "{{ m.role }}\n{{ m.content }}{% for c in m.tool_calls or [] %}"
    "[TOOL_CALLS]{{ c.function.name }}[ARGS]{{ c.function.arguments | tojson }}{% endfor %}" + END,
    "numbered": TOOLS + "{{ m.role }}\n{{ m.content }}{% for c in m.tool_calls or [] %}"
    "<call>functions.{{ c.function.name }}:{{ loop.index0 }}<args>{{ c.function.arguments | tojson }}</call>"
    "{% endfor %}" + END,
    "no calls": tiny.CHATML,
}
ONE_CALL = ("llama 3",)
NO_FORM = ("no calls", "numbered")
"""Templates that write no calls, or such that `checks.parsers` does not read."""
FORECAST = {
    "name": "forecast",
    "description": "Weather of a town.",
    "parameters": {
        "type": "object",
        "properties": {"town": {"type": "string"}, "days": {"type": "integer", "minimum": 1, "maximum": 9}},
        "required": ["town"],
        "additionalProperties": False,
    },
}
CLOCK = {"name": "clock", "description": "The time.", "parameters": {"type": "object", "properties": {}}}
ASKED = [{"type": "function", "function": function} for function in (FORECAST, CLOCK)]


def grammars_of(folder: Path, template: str | None) -> Grammars:
    folder.mkdir(parents=True, exist_ok=True)
    tiny.write_tokenizer(folder, template)
    return Grammars(renderers.load(folder))


@pytest.fixture(scope="module")
def byte_level(tmp_path_factory) -> Grammars:
    return grammars_of(tmp_path_factory.mktemp("bytes"), CALL_TEMPLATES["hermes"])


@pytest.fixture(scope="module")
def mistral() -> Grammars:
    return Grammars(renderers.load("mistral-v3"))


@pytest.fixture(scope="module", params=CALL_TEMPLATES)
def called(request, tmp_path_factory) -> tuple[str, Grammars]:
    folder = tmp_path_factory.mktemp("calls")
    return request.param, grammars_of(folder, CALL_TEMPLATES[request.param])


def drawn(grammars: Grammars, constraint, seed: int, most: int = 300) -> list[int] | None:
    """An answer of a model whose logits are random; None if it has not ended after ``most`` tokens."""
    random = np.random.Generator(np.random.PCG64(seed))
    ends = list(grammars.renderer.eos_ids)
    forbidden, likely = preferences(grammars)
    ids: list[int] = []
    while len(ids) < most:
        mask = constraint.allowed()
        assert constraint.problem is None
        assert not (mask & forbidden).any()
        choices = mask.nonzero()[0]
        token = int(choices[(random.gumbel(size=len(choices)) + 4 * likely[choices]).argmax()])
        if token in ends:
            return ids
        ids.append(token)
        constraint.advance(token)
    return None


@cache
def preferences(grammars: Grammars) -> tuple[np.ndarray, np.ndarray]:
    """(V,) control tokens that no form has, and (V,) tokens that random answers prefer: the shorter ones."""
    ends = list(grammars.renderer.eos_ids)
    forbidden = np.zeros(grammars.renderer.size, bool)
    forbidden[sorted(grammars.renderer.control_ids)] = True
    forbidden[[*ends, *grammars.renderer.answered(*example([Call("clock", {}, "abcdefgh1")]))]] = False
    likely = np.array([0 < len(text) < 4 for text in grammars.renderer.token_bytes()])
    likely[ends] = True
    return forbidden, likely


def example(calls: list[Call], tools: list = ASKED) -> tuple[Conversation, Message]:
    return Conversation((Message("user", "Go."),), tuple(tools)), Message("assistant", "", tuple(calls))


def accepts(grammars: Grammars, constraint, ids: list[int]) -> bool:
    """Whether the answer ``ids`` is allowed, token for token, and may end."""
    ends = set(grammars.renderer.eos_ids)
    for token in ids:
        if token in ends:
            break
        if not constraint.allowed()[token]:
            return False
        constraint.advance(token)
    return bool(constraint.allowed()[list(ends)].any())


def encoded(grammars: Grammars, text: str) -> list[int]:
    """Ids of an answer of words."""
    return grammars.renderer.answered(Conversation((Message("user", "Go."),)), Message("assistant", text))


STRINGS = st.fixed_dictionaries(
    {"type": st.just("string")}, optional={"minLength": st.integers(0, 2), "maxLength": st.integers(2, 5)}
) | st.sampled_from(
    [
        {"type": "string", "pattern": "^[a-c]{1,3}$"},
        {"type": "string", "pattern": r"\d"},
        {"type": "string", "format": "date"},
        {"enum": ["red", "blue", 'a "quoted"\nline', 1, None]},
        {"const": {"deep": [1, 2]}},
        {"type": "null"},
        {"type": "boolean"},
    ]
)
NUMBERS = st.fixed_dictionaries(
    {"type": st.sampled_from(["integer", "number"])},
    optional={
        "minimum": st.integers(-20, 0) | st.sampled_from([-1.5, -0.1]),
        "maximum": st.integers(2, 20) | st.sampled_from([2.5, 9.1]),
        "multipleOf": st.integers(1, 2),
    },
)
NAMES = st.sampled_from(["a", "b", "ab", "é", 'q"', "x y", "\\", "tab\t"])


def containers(inner: st.SearchStrategy) -> st.SearchStrategy:
    objects = st.builds(
        lambda properties, required, more: {
            "type": "object",
            "properties": properties,
            "required": [name for name in properties if name in required],
            "additionalProperties": more,
        },
        st.dictionaries(NAMES, inner, max_size=3),
        st.sets(NAMES),
        st.just(False) | inner,
    )
    arrays = st.fixed_dictionaries(
        {"type": st.just("array"), "items": inner},
        optional={"minItems": st.integers(0, 1), "maxItems": st.integers(1, 3)},
    )
    choices = st.builds(lambda parts: {"anyOf": parts}, st.lists(inner, min_size=1, max_size=3))
    return objects | arrays | choices


SCHEMAS = st.recursive(STRINGS | NUMBERS, containers, max_leaves=5)
LAW = settings(max_examples=80, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)


@pytest.mark.parametrize("kind", ["byte_level", "mistral"])
def test_every_answer_that_ends_is_valid_whatever_the_model_prefers(kind, request):
    grammars = request.getfixturevalue(kind)
    ended = 0

    @LAW
    @given(schema=SCHEMAS, seed=st.integers(0, 3))
    def law(schema, seed):
        nonlocal ended
        ids = drawn(grammars, grammars.json_schema(schema), seed)
        if ids is not None:
            ended += 1
            value = json.loads(grammars.renderer.answer(ids))
            assert schemas.takes(schemas.checked(schema), value), (schema, value)

    law()
    assert ended > 40


def values(schema) -> st.SearchStrategy:
    """Values of ``schema``, with properties in its order."""
    if "anyOf" in schema:
        return st.one_of([values(part) for part in schema["anyOf"]])
    kind = schema.get("type")
    if "enum" in schema or "const" in schema or kind == "null":
        return st.sampled_from(schema.get("enum", [schema.get("const")]))
    if kind == "boolean":
        return st.booleans()
    if kind in ("integer", "number"):
        return st.sampled_from([number for number in (-1, 0, 1, 1.5) if kind == "number" or number != 1.5])
    if kind == "string":
        return st.text(st.characters(exclude_categories=("Cs", "Cc")), max_size=5) | st.sampled_from(
            ["a", "abc", "4", "2024-02-29", "\n\t", "日本", "😀"]
        )
    if kind == "array":
        return st.lists(values(schema["items"]), max_size=3)
    fixed = {name: values(part) for name, part in schema["properties"].items()}
    return st.fixed_dictionaries({}, optional=fixed)


@pytest.mark.parametrize("kind", ["byte_level", "mistral"])
def test_valid_text_is_allowed_in_the_tokens_of_the_tokenizer(kind, request):
    grammars = request.getfixturevalue(kind)
    tried = 0

    @LAW
    @given(data=st.data(), schema=SCHEMAS, indent=st.sampled_from([None, 1, 4]))
    def law(data, schema, indent):
        nonlocal tried
        value = data.draw(values(schema))
        if schemas.takes(schemas.checked(schema), value):
            tried += 1
            text = json.dumps(value, ensure_ascii=False, indent=indent)
            assert accepts(grammars, grammars.json_schema(schema), encoded(grammars, text)), (schema, text)

    law()
    assert tried > 30


def test_calls_are_of_the_form_that_the_template_writes(called):
    name, grammars = called
    assert (grammars.call_form is None) == (name in NO_FORM)
    if name in NO_FORM:
        assert accepts(
            grammars, grammars.calls(ASKED), encoded(grammars, '{"name": "clock", "arguments": {}}')
        )
        return
    counts = (1,) if name in ONE_CALL else (1, 2, 3)
    for count in counts:
        calls = [Call("forecast", {"town": "Rome", "days": 2}), Call("clock", {}), Call("clock", {"a": [1]})]
        ids = grammars.renderer.answered(*example(calls[:count]))
        assert accepts(grammars, grammars.calls(ASKED), ids)
        assert accepts(grammars, grammars.calls(ASKED, parallel=False), ids) == (count == 1)
        assert accepts(grammars, grammars.calls(ASKED, one_named="forecast"), ids) == (count == 1)
        assert not accepts(grammars, grammars.calls(ASKED, one_named="clock"), ids)
    wrong = grammars.renderer.answered(*example([Call("forecast", {"town": 3})]))
    assert not accepts(grammars, grammars.calls(ASKED), wrong)
    assert not accepts(grammars, grammars.calls(ASKED), encoded(grammars, "It is sunny."))


def test_mistrals_calls_are_the_tokens_of_mistral_common(mistral):
    calls = [Call("forecast", {"town": "Rome", "days": 2}, "abcdefgh1"), Call("clock", {}, "abcdefgh2")]
    for count in (1, 2):
        ids = mistral.renderer.answered(*example(calls[:count]))
        assert accepts(mistral, mistral.calls(ASKED), ids)
        without_mark = [token for token in ids if token not in mistral.renderer.control_ids]
        assert not accepts(mistral, mistral.calls(ASKED), without_mark)


RECORDED = Path(__file__).parents[2].parent / "shared" / "data" / "formats" / "glaive_toolcall_en_demo.json"
"""Conversations with calls and the schemas of their tools."""


@pytest.mark.skipif(not RECORDED.is_file(), reason=f"{RECORDED.name} is absent")
@pytest.mark.parametrize("kind", ["byte_level", "mistral"])
def test_recorded_calls_are_allowed(kind, request):
    grammars = request.getfixturevalue(kind)
    tried = 0
    for row in json.loads(RECORDED.read_text())[:120]:
        tools = [{"type": "function", "function": function} for function in json.loads(row["tools"] or "[]")]
        for turn in row["conversations"]:
            if turn["from"] != "function_call":
                continue
            call = json.loads(turn["value"])
            schema = next(tool["function"] for tool in tools if tool["function"]["name"] == call["name"])
            is_timed = '"format": "time"' in json.dumps(schema)  # RFC 3339 wants seconds and an offset
            if is_timed or not schemas.takes(schemas.checked(schema["parameters"]), call["arguments"]):
                continue
            tried += 1
            ids = grammars.renderer.answered(
                *example([Call(call["name"], call["arguments"], "abcdefgh1")], tools)
            )
            assert accepts(grammars, grammars.calls(tools), ids), call
    assert tried > 60


def test_every_answer_of_required_calls_is_calls_with_valid_arguments(called):
    _, grammars = called
    named = [grammars.calls(ASKED, one_named="forecast", parallel=seed > 2) for seed in range(6)]
    require_calls(grammars, [*named, grammars.calls(ASKED)])


def test_every_answer_of_mistrals_required_calls_is_calls(mistral):
    require_calls(mistral, [mistral.calls(ASKED, one_named="forecast") for _ in range(4)])


def require_calls(grammars: Grammars, constraints: list) -> None:
    """Random answers are calls that `checks.parsers` reads, with arguments of the schemas."""
    answers = [drawn(grammars, constraint, seed) for seed, constraint in enumerate(constraints)]
    ended = [ids for ids in answers if ids is not None]
    assert ended, "some of them are short"
    for ids in ended:
        calls = parsers.parse(grammars.renderer.answer(ids))
        assert calls
        for call in calls:
            assert call.problem is None
            parameters = {"forecast": FORECAST, "clock": CLOCK}[call.name]["parameters"]
            assert schemas.takes(schemas.checked(parameters), call.arguments)


UNSUPPORTED = {
    "uniqueItems": {"type": "array", "uniqueItems": True},
    "not": {"not": {"type": "string"}},
    "if": {"if": {"type": "string"}, "then": {"minLength": 2}},
    "contains": {"type": "array", "contains": {"type": "string"}},
    "dependentRequired": {"type": "object", "dependentRequired": {"a": ["b"]}},
    "propertyNames": {"type": "object", "propertyNames": {"pattern": "a"}},
    "unevaluatedProperties": {"type": "object", "unevaluatedProperties": False},
    "minProperties": {"type": "object", "minProperties": 2},
    "maximum": {"type": "number", "maximum": 1.9999999999999998},
    "multipleOf": {"type": "number", "multipleOf": 0.1},
    "oneOf": {"oneOf": [{"type": "integer"}, {"type": "number"}]},
    "x-guidance": {"x-guidance": {"lenient": True}, "not": {}},
    "format": {"type": "string", "format": "int32"},
    "exclusiveMinimum": {
        "$schema": "http://json-schema.org/draft-04/schema#",
        "type": "number",
        "minimum": 3,
        "exclusiveMinimum": True,
    },
    "pattern": {"type": "string", "pattern": r"^\W$"},
    "look-ahead": {"type": "string", "pattern": "^(?=a)b"},
    "reference": {"$ref": "http://example.org/schema"},
    "no value": False,
}


@pytest.mark.parametrize("keyword", UNSUPPORTED)
def test_a_schema_that_cannot_be_enforced_is_refused_by_keyword(byte_level, keyword):
    schema = UNSUPPORTED[keyword]
    deep = {
        "type": "object",
        "properties": {"deep": {"type": "array", "items": schema}},
        "required": ["deep"],
    }
    for case in (schema, *[deep] * (keyword not in ("x-guidance", "no value", "exclusiveMinimum"))):
        with pytest.raises(ModelError, match=keyword):
            byte_level.json_schema(case)


def test_a_named_property_cannot_be_written_by_escapes(byte_level):
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}}
    assert accepts(byte_level, byte_level.json_schema(schema), encoded(byte_level, '{"b": "x"}'))
    assert not accepts(byte_level, byte_level.json_schema(schema), encoded(byte_level, r'{"\u0061": "x"}'))


def test_tools_that_are_not_there_are_refused(byte_level):
    with pytest.raises(ModelError, match="there is no tool 'clocks'"):
        byte_level.calls(ASKED, one_named="clocks")
    for name in ('a"b', "a b", "", "\ue001", chr(0xF0000)):
        with pytest.raises(ModelError, match="cannot be the name of a tool"):
            byte_level.calls([{"type": "function", "function": {"name": name}}])
    with pytest.raises(ModelError, match="the parameters of the tool list"):
        byte_level.calls(
            [{"type": "function", "function": {"name": "list", "parameters": {"type": "array"}}}]
        )


def test_reasoning_comes_before_what_is_constrained(tmp_path):
    template = (
        TOOLS + "{{ m.role }}\n{% if m.reasoning_content %}<think>\n{{ m.reasoning_content }}\n</think>\n\n"
        "{% endif %}{{ m.content }}" + END
    )
    tiny.write_tokenizer(tmp_path, template)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path, local_files_only=True)
    grammars = Grammars(renderers.HFRenderer(tokenizer, thinking=True))
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
    said = '<think>\nFirst {"a": "no"}, <then>.\n</think>\n\n{"a": 1}'
    assert accepts(grammars, grammars.json_schema(schema), encoded(grammars, said))
    assert not accepts(grammars, grammars.json_schema(schema), encoded(grammars, said.replace("1}", '"x"}')))


@pytest.mark.parametrize("guesses", [False, True])
def test_constrained_and_free_rows_share_a_batch(byte_level, tmp_path, guesses):
    """omlx 1798: plain and structured rows in one batch crash. ollama 17933: the schema is ignored."""
    tiny.write_model(tmp_path, byte_level.renderer.size, layers=1)
    net = loading.load(loading.ModelSpec.model_validate({"path": str(tmp_path)})).net
    schema = {
        "type": "object",
        "properties": {"a": {"enum": ["x", "y"]}, "b": {"type": "boolean"}},
        "required": ["a", "b"],
        "additionalProperties": False,
    }
    prompts = [[5 + place, 6, 7] for place in range(6)]

    def asked(place: int, constraint) -> Request:
        ends = byte_level.renderer.eos_ids
        return Request(prompts[place], ends, 200, 1.0, seed=place, constraint=constraint)

    def answers(requests: list[Request]) -> list[list[int]]:
        speculation = Speculation(PromptLookup()) if guesses else None
        with Engine(net, 4, speculation=speculation) as engine:
            numbers = engine.submit(requests)
            said: dict[int, list[int]] = {number: [] for number in numbers}
            while new := engine.step():
                for token in new:
                    said[token.request].append(token.token)
        return [said[number] for number in numbers]

    free = answers([asked(place, None) for place in range(6)])
    mixed = answers(
        [asked(place, byte_level.json_schema(schema) if place % 2 else None) for place in range(6)]
    )
    assert mixed[::2] == free[::2]
    ended = [ids for ids in mixed[1::2] if ids[-1] in byte_level.renderer.eos_ids]
    assert ended
    for ids in ended:
        assert schemas.takes(schemas.checked(schema), json.loads(byte_level.renderer.answer(ids)))
