"""The text of a prefix that is read from one run is the one that the template writes for it."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokens import test_chat_templates, test_template
from tokens.test_template import CHATML, TOOLS, write
from transformers.utils.chat_template_utils import render_jinja_template

from tunesmith.data.formats import Call, Conversation, Demonstration, Message
from tunesmith.tokens import hugging_face, prefixes, template
from tunesmith.tokens.hugging_face import Vocabulary
from tunesmith.tokens.prefixes import run_of
from tunesmith.tokens.renderers import load
from tunesmith.tokens.template import Refused

ROLES = ("system", "user", "assistant", "tool", "user", "assistant", "user", "user", "assistant")
ENTRIES = [{"role": role, "content": f"{role}{number}"} for number, role in enumerate(ROLES)]
OPENS = "{% if add_generation_prompt %}<a>{% endif %}"
WRITES = "[{{ m.role }}:{{ m.content }}]"


def texts(source: str, generate: bool) -> dict[int, str | None]:
    """What transformers renders of each prefix; None if the template refuses it."""
    rendered: dict[int, str | None] = {}
    for size in range(1, len(ENTRIES) + 1):
        try:
            (text,), _ = render_jinja_template(
                [ENTRIES[:size]], chat_template=source, add_generation_prompt=generate, bos_token="<s>"
            )
        except Exception:  # a template may raise anything
            text = None
        rendered[size] = text
    return rendered


def proven(source: str) -> dict[bool, set[int]]:
    """The sizes of the prefixes that follow from a run, after each was compared."""
    sizes: dict[bool, set[int]] = {}
    for generate in (False, True):
        variables = {"tools": None, "add_generation_prompt": generate, "bos_token": "<s>"}
        run, expected = run_of(source, ENTRIES, variables), texts(source, generate)
        sizes[generate] = set() if run is None else run.proven
        for size in sizes[generate]:
            assert run is not None and run.prefix(size) == expected[size], (source, size)
    return sizes


ALL = set(range(1, len(ENTRIES) + 1))
FORWARD = {
    "plain": "{{ bos_token }}{% for m in messages %}" + WRITES + "{% endfor %}" + OPENS,
    "first": "{% for m in messages %}{% if loop.first %}^{% endif %}{{ loop.index }}"
    + WRITES
    + "{% endfor %}"
    + OPENS,
    "earlier": "{% for m in messages %}{% if loop.index0 and messages[loop.index0 - 1].role == m.role %}+"
    "{% endif %}{{ (loop.previtem or {}).role }}" + WRITES + "{% endfor %}" + OPENS,
    "state": "{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{{ ns.n }}"
    + WRITES
    + "{% endfor %}"
    + OPENS,
    "branch": "{% if bos_token %}{% for m in messages %}" + WRITES + "{% endfor %}{% endif %}" + OPENS,
    "inner loop": "{% for m in messages %}{% for c in m.content %}{{ c }}{% if loop.last %}.{% endif %}"
    "{% endfor %}{% endfor %}" + OPENS,
    "set before": "{% if not add_generation_prompt is defined %}{% set add_generation_prompt = false %}"
    "{% endif %}{% set messages = messages %}{% for m in messages %}" + WRITES + "{% endfor %}" + OPENS,
    "tail": "{% for m in messages %}" + WRITES + "{% endfor %}{% set x = bos_token %}{{ x | trim }}" + OPENS,
    "macro": "{% macro w(m) %}"
    + WRITES
    + "{% endmacro %}{% for m in messages %}{{ w(m) }}{% endfor %}"
    + OPENS,
}
SOME = {
    "system apart": (
        "{% if messages[0].role == 'system' %}{{ messages[0].content }}{% set messages = messages[1:] %}"
        "{% endif %}{% for m in messages %}" + WRITES + "{% endfor %}" + OPENS,
        ALL,
    ),
    "looks ahead at results only": (
        "{% for m in messages %}" + WRITES + "{% if m.role == 'tool' and not loop.last %},{% endif %}"
        "{% endfor %}" + OPENS,
        ALL - {4},
    ),
    "reads one ahead": (
        "{% for m in messages %}"
        + WRITES
        + "{% if m.role == 'tool' and messages[loop.index0 + 1].role == 'user' %},{% endif %}{% endfor %}"
        + OPENS,
        ALL - {4},
    ),
    "asks whether there are messages": (
        "{% set messages = messages[1:] %}{% if messages | length != 0 %}+{% endif %}" + FORWARD["plain"],
        ALL - {1},
    ),
    "reads the third first": ("{{ messages[2].role }}" + FORWARD["plain"], ALL - {1, 2}),
}
BEHIND = {
    "last": "{% for m in messages %}" + WRITES + "{% if loop.last %}.{% endif %}{% endfor %}" + OPENS,
    "next": "{% for m in messages %}" + WRITES + "{{ loop.nextitem.role }}{% endfor %}" + OPENS,
    "length of the loop": "{% for m in messages %}{{ loop.length }}" + WRITES + "{% endfor %}" + OPENS,
    "place from the end": "{% for m in messages %}{{ loop.revindex }}" + WRITES + "{% endfor %}" + OPENS,
    "loop by another name": "{% for m in messages %}{% set l = loop %}{% if l.last %}.{% endif %}"
    + WRITES
    + "{% endfor %}"
    + OPENS,
    "number of messages": "{{ messages | length }}" + FORWARD["plain"],
    "last message": "{{ messages[-1].role }}" + FORWARD["plain"],
    "scan": "{% set u = messages | selectattr('role', 'equalto', 'user') | list %}" + FORWARD["plain"],
    "loop before": "{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{% endfor %}"
    "{{ ns.n }}" + FORWARD["plain"],
    "loop backwards": "{% for m in messages[::-1] %}{{ m.role }}{% endfor %}" + FORWARD["plain"],
    "state behind": "{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}"
    + WRITES
    + "{% endfor %}{{ ns.n }}"
    + OPENS,
    "iterator behind": "{% set c = cycler('x', 'y') %}{% for m in messages %}{{ c.next() }}"
    + WRITES
    + "{% endfor %}{{ c.current }}"
    + OPENS,
    "messages behind": FORWARD["plain"] + "{{ messages[1].content }}{{ messages | length }}",
    "opened in the loop": "{% for m in messages %}"
    + WRITES
    + "{% if loop.last and add_generation_prompt %}<a>{% endif %}{% endfor %}",
    "left early": "{% for m in messages %}"
    + WRITES
    + "{% if m.content == 'user4' %}{% break %}{% endif %}{% endfor %}"
    + OPENS,
    "some messages": "{% for m in messages if m.role != 'tool' %}" + WRITES + "{% endfor %}" + OPENS,
    "held back": "{% set text %}{% for m in messages %}"
    + WRITES
    + "{% endfor %}{% endset %}{{ text }}"
    + OPENS,
    "whole": "{{ messages }}" + FORWARD["plain"],
    "whole in a list": "{{ [messages] }}" + FORWARD["plain"],
    "size of what Python writes": "{% if 100 < '%r' | format(messages) | length < 300 %}+{% endif %}"
    + FORWARD["plain"],
    "behind the last": "{% for m in messages[50:] %}" + WRITES + "{% endfor %}" + OPENS,
}


@pytest.mark.parametrize("source", FORWARD.values(), ids=FORWARD)
def test_every_prefix_of_a_template_that_goes_forward_follows_from_one_run(source):
    assert proven(source) == {False: ALL, True: ALL}


@pytest.mark.parametrize(("source", "sizes"), SOME.values(), ids=SOME)
def test_a_prefix_does_not_follow_where_the_run_looked_behind_its_end(source, sizes):
    assert proven(source) == {False: sizes, True: sizes}


@pytest.mark.parametrize("source", BEHIND.values(), ids=BEHIND)
def test_no_prefix_follows_if_later_messages_decide(source):
    assert proven(source) == {False: set(), True: set()}


PIECES = (
    WRITES,
    "{% if loop.first %}^{% endif %}",
    "{% if loop.last %}.{% endif %}",
    "{% if m.role == 'tool' and not loop.last %},{% endif %}",
    "{% if messages[loop.index0 + 1] is defined %}>{% endif %}",
    "{% if m.role == 'user' %}{{ messages[1:][loop.index0].content }}{% endif %}",
    "{{ (loop.previtem or {}).role }}",
    "{% if m.role == 'assistant' %}{{ (messages | last).content }}{% endif %}",
    "{% set ns.n = ns.n + 1 %}{{ ns.n }}",
    "{% if m.role == 'user' %}{% set ns.user = loop.index0 %}{% endif %}{{ ns.user }}",
    "{% if m.role == 'tool' %}{% continue %}{% endif %}",
    "{% if ns.n > 5 %}{% break %}{% endif %}",
    "{% for other in messages %}{% if loop.last %}{{ other.content }}{% endif %}{% endfor %}",
    "{% set x = m.content %}",
)
BEFORE = (
    "{{ bos_token }}",
    "{% if messages[0].role == 'system' %}{% set messages = messages[1:] %}{% endif %}",
    "{% set last = messages[-1].role %}",
    "{% if messages %}+{% endif %}",
    "{% for m in messages %}{% set ns.n = ns.n + 1 %}{% endfor %}",
    "{% set x = messages[2] %}",
)
AFTER = (
    OPENS,
    "{{ ns.n }}",
    "{{ last }}",
    "{{ x }}",
    "{% if not add_generation_prompt %}<end>{% endif %}",
    "{{ messages[0].role }}",
    "{{ messages | length }}",
    "{% for m in messages %}{{ m.role }}{% endfor %}",
)


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    st.lists(st.sampled_from(BEFORE), max_size=3),
    st.lists(st.sampled_from(PIECES), min_size=1, max_size=4),
    st.lists(st.sampled_from(AFTER), max_size=3),
)
def test_what_follows_from_a_run_is_always_what_transformers_renders(before, body, after):
    source = "{% set ns = namespace(n=0, user=-1) %}" + "".join(before)
    proven(source + "{% for m in messages %}" + "".join(body) + "{% endfor %}" + "".join(after))


def many(*, system: bool = False, thinks: bool = False, calls: bool = False) -> Demonstration:
    """A conversation of nine answers."""
    messages = [Message("system", "Be brief.")] if system else []
    for number in range(9):
        messages.append(Message("user", f"And {number}?"))
        if calls and number % 2:
            call = Call("find", {"at": f"Rome {number}"}, f"abcdefgh{number}")
            messages += [
                Message("assistant", "", (call,)),
                Message("tool", "4", call_id=call.id, name="find"),
            ]
        thought = f"<think>\nthree, {number}\n</think>\n\n" if thinks and number % 3 else ""
        messages.append(Message("assistant", f"{thought}It is {number}."))
    return Demonstration(Conversation(tuple(messages), (TOOL,) if calls else ()))


TOOL = {
    "type": "function",
    "function": {
        "name": "find",
        "description": "a place",
        "parameters": {"type": "object", "properties": {"at": {"type": "string", "description": "where"}}},
    },
}
KINDS = {
    "plain": many(),
    "system": many(system=True),
    "reasoning": many(thinks=True),
    "calls": many(calls=True),
    "all": many(system=True, thinks=True, calls=True),
}
OWN = {
    f"{module.__name__} {name}": source
    for module in (test_template, test_chat_templates)
    for name, source in vars(module).items()
    if isinstance(source, str) and "{% for m in messages" in source
}


def rows_of(renderer, example) -> object:
    """Ids, weights and notes; or the code and the words of a refusal."""
    notes: Counter[str] = Counter()
    try:
        rows = renderer.rows(example, notes=notes)
    except Refused as error:
        return error.code, error.what
    return [(row.tokens.ids.tolist(), row.tokens.targets.tolist()) for row in rows], notes


def both_ways(make_renderer, example, monkeypatch) -> list[object]:
    """Rows made from one run, and rows of prompts that are rendered one by one."""
    results = []
    for answers in (1, 1000):
        monkeypatch.setattr(template, "MANY_ANSWERS", answers)
        results.append(rows_of(make_renderer(), example))
    return results


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", OWN)
def test_rows_from_one_run_are_those_of_prompts_rendered_one_by_one(name, kind, tmp_path, monkeypatch):
    write(tmp_path, OWN[name], bos="<s>" if "BOS" in name else None, eos="</s>")
    first, second = both_ways(lambda: load(tmp_path), KINDS[kind], monkeypatch)
    assert first == second


def test_the_number_of_renderings_does_not_grow_with_the_answers(tmp_path, monkeypatch):
    renderer = load(write(tmp_path, CHATML))
    tokenizer = renderer.template._tokenizer
    rendered = Counter[int]()
    original = tokenizer.apply_chat_template

    def counted(messages, **options):
        rendered[answers] += 1
        return original(messages, **options)

    monkeypatch.setattr(tokenizer, "apply_chat_template", counted)
    turns = many().conversation.messages
    for answers in (10, 100):
        renderer.rows(Demonstration(Conversation(turns[:2] * answers)))
    assert rendered[10] == rendered[100] == 4


@pytest.mark.parametrize("arguments", [{"line": 1.0, "to": 2}, {"to": 2, "line": 1}], ids=["number", "order"])
def test_a_row_that_equals_the_beginning_of_the_row_before_has_its_own_text(arguments, tmp_path):
    def row(arguments, questions):
        call = Call("find", arguments, "abcdefgh0")
        turns = [Message("user", "Where?"), Message("assistant", "", (call,))]
        turns += [Message("tool", "4", call_id=call.id, name="find"), Message("assistant", "There.")]
        for number in range(questions):
            turns += [Message("user", f"And {number}?"), Message("assistant", f"It is {number}.")]
        return Demonstration(Conversation(tuple(turns), (TOOL,)))

    renderer = load(write(tmp_path, TOOLS))
    rows_of(renderer, row({"line": 1, "to": 2}, 8))
    example = row(arguments, 1)
    assert example.conversation == row({"line": 1, "to": 2}, 1).conversation
    assert rows_of(renderer, example) == rows_of(load(tmp_path), example)


def test_a_run_that_differs_from_transformers_is_not_used(tmp_path, monkeypatch):
    first = rows_of(load(write(tmp_path, CHATML)), KINDS["plain"])

    def wrong(source, entries, variables):
        return run_of(source.replace("<|im_end|>", "<|im_end|> "), entries, variables)

    monkeypatch.setattr(prefixes, "run_of", wrong)
    assert rows_of(load(tmp_path), KINDS["plain"]) == first


TEXTS = st.lists(
    st.sampled_from(["a", " b", "\n", "<|im_start|>", "<|im_end|>", "<s>", "<", "<|im"]), max_size=12
)


@given(parts=st.lists(TEXTS.map("".join), min_size=2, max_size=6))
@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_ids_do_not_depend_on_the_text_that_was_encoded_before(vocabulary, parts, monkeypatch):
    monkeypatch.setattr(hugging_face, "BLOCK", 1)
    for text in (*parts, "".join(parts), "".join(parts[:-1])):
        assert vocabulary.encode(text) == vocabulary.tokenizer.encode(text, add_special_tokens=False)


@pytest.fixture(scope="module")
def vocabulary(tmp_path_factory):
    renderer = load(write(tmp_path_factory.mktemp("tokenizer"), CHATML))
    return Vocabulary(renderer._tokenizer)
