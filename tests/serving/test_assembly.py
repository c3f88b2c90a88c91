"""Tokens become pieces: however they come, the pieces are those of the whole answer."""

from __future__ import annotations

import itertools
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import tiny
from tunesmith.checks.parsers import parse
from tunesmith.checks.schemas import checked
from tunesmith.engine.requests import NewToken
from tunesmith.serving.assembly import AnswerReading, Assembler
from tunesmith.serving.pieces import (
    AnswerEnded,
    CallArguments,
    CallBegun,
    Logprobs,
    MadeCall,
    WholeAnswer,
    Words,
    joined,
)
from tunesmith.tokens import renderers
from tunesmith.tokens.growing import GrowingText
from tunesmith.tokens.template import thought_of

OWN_MARKS = tiny.CHATML.replace(
    "{{ message['content'] }}",
    "{% set parts = message['content'].split('</think>') %}{% if parts | length > 1 %}[THINK]"
    "{{ parts[0].replace('<think>', '').strip() }}[/THINK]{% endif %}{{ parts[-1].strip() }}",
)
CALL = '{"name": "f", "arguments": {"a": "b"}}'
PLAIN = AnswerReading()
MADE = ("f", '{"a": "b"}')


@pytest.fixture(scope="module")
def rendered(tmp_path_factory):
    """Renderers: byte-level BPE, one whose template has marks of its own for reasoning, and Mistral's."""
    made = {"mistral": renderers.load("mistral-v3")}
    for name, words in {"plain": tiny.CHATML, "marks": OWN_MARKS}.items():
        tiny.write_tokenizer(folder := tmp_path_factory.mktemp(name), words)
        made[name] = renderers.load(folder)
    return made


class Cut:
    """A renderer whose tokens are parts of one text, cut in any way."""

    def __init__(self, parts: list[str]) -> None:
        self.parts = parts

    def decode(self, ids):
        return b"".join(self.parts[id].encode() for id in ids).decode(errors="replace")

    def opens(self, text):
        return False

    def unframed(self, text):
        return text


class Halves(Cut):
    """As `Cut`, but tokens are bytes."""

    def decode(self, ids):
        return b"".join(self.parts[id] for id in ids).decode(errors="replace")


def assembled(renderer, ids, reading=PLAIN, finish="stop", logprobs=False) -> list[list]:
    """The pieces after each token."""
    ids_of_calls = (f"id{number}" for number in itertools.count())
    assembler = Assembler(renderer, reading, 7, lambda: next(ids_of_calls))
    fed = []
    for place, token in enumerate(ids):
        last = finish == "length" and place == len(ids) - 1
        logprob = -float(place) if logprobs else None
        fed.append(assembler.feed(NewToken(0, token, "length" if last else None, logprob, (), 0)))
    if finish == "stop":
        fed.append(assembler.feed(NewToken(0, -1, "stop", None, (), 0)))
    assert assembler.over and assembler.feed(NewToken(0, 0, None, None, (), 0)) == []
    return fed


def whole(text: str, reading=PLAIN, finish="stop") -> WholeAnswer:
    pieces = assembled(Cut([text]), [0], reading, finish)
    return joined(itertools.chain(*pieces))


def content(answer: WholeAnswer):
    return answer.reasoning, answer.words, answer.calls, answer.ended.reason, answer.ended.stop


PARTS = [
    "tool_call: f\n",
    "arguments: {}",
    'arguments: {"a": "\\u00e9 </tool_call> \\ud800"}',
    "[TOOL_CALLS]",
    "[TOOL_CALLS] [" + CALL + "]",
    "[TOOL_CALLS]f[ARGS]{}",
    "<tool_call>",
    f"<tool_call>{CALL}</tool_call>",
    "</tool_call>",
    "<function=f>\n<parameter=a>\n",
    "<tool_call>\n<function=f>\n<parameter=a>\n5\n</parameter>\n</function>\n</tool_call>",
    "\n</parameter>\n",
    "</function>\n</tool_call>",
    f"<|python_tag|>{CALL}",
    "<|python_tag|>",
    "\n",
    "Result: ",
    CALL,
    f"[{CALL}, {CALL}]",
    '{"name": "f", "arguments": {"a": 1e999}}',
    "{'name': 'f', \"arguments\": 1}",
    '{"name": "f", "arguments": ',
    "}",
    "[",
    "<think>",
    "</think>",
    "\n\n",
    "STOP",
    "STO",
    "P",
    " ",
    "é☺",
    "words",
]
READINGS = st.fixed_dictionaries(
    dict(
        stop=st.sampled_from([(), ("STOP",), ("STOP", "OP"), ("}",), ("\n\n", "words"), ("",)]),
        calls=st.booleans(),
        one_call=st.booleans(),
        thinks=st.booleans(),
    )
).map(lambda options: AnswerReading(**options))
TEXTS = st.lists(st.sampled_from(PARTS) | st.text(max_size=3), max_size=9).map("".join)


@settings(max_examples=600)
@given(text=TEXTS, reading=READINGS, data=st.data())
def test_a_stream_put_together_is_the_whole_however_it_is_cut(text, reading, data):
    text = text.encode(errors="replace").decode()
    places = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=12)))
    ends = [0, *places, len(text)]
    parts = [text[start:end] for start, end in itertools.pairwise(ends)]
    pieces = list(itertools.chain(*assembled(Cut(parts), range(len(parts)), reading)))
    assert content(joined(pieces)) == content(whole(text, reading))
    # By bytes: no half of a character is shown.
    data_bytes = text.encode()
    halves = Halves([data_bytes[at : at + 1] for at in range(len(data_bytes))])
    by_bytes = list(itertools.chain(*assembled(halves, range(len(data_bytes)), reading)))
    assert content(joined(by_bytes)) == content(whole(text, reading))
    assert isinstance(pieces[-1], AnswerEnded)
    assert not any(isinstance(piece, AnswerEnded) for piece in pieces[:-1])


@settings(max_examples=400)
@given(text=TEXTS)
def test_delivered_calls_are_those_that_evaluation_reads_and_nothing_else_is_lost(text):
    text = text.encode(errors="replace").decode().replace("<think>", "")
    answer = whole(text, AnswerReading(calls=True))
    read = [call for call in parse(text) if call.problem is None and call.arguments is not None]
    if not any(call.problem for call in parse(text)) and "1e999" not in text:
        assert [(call.name, json.loads(call.arguments)) for call in answer.calls] == [
            (call.name, call.arguments) for call in read
        ]
    if not answer.calls:
        assert answer.words == text
    for call in answer.calls:
        assert isinstance(json.loads(call.arguments), dict) and call.name
        call.arguments.encode()


@pytest.mark.parametrize("name", ["plain", "mistral"])
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_real_tokens_give_what_the_renderer_decodes(rendered, name, data):
    renderer = rendered[name]
    control = st.sampled_from(sorted(set(renderer.control_ids) - set(renderer.eos_ids)))
    ids = data.draw(st.lists(control | st.integers(0, renderer.size - 1), max_size=20))
    ids = [id for id in ids if id not in renderer.eos_ids]
    answer = joined(itertools.chain(*assembled(renderer, ids)))
    decoded = renderer.answer(ids)
    if "<think>" not in decoded:
        assert answer.words == decoded


@pytest.mark.parametrize("text", ["é☺👩‍👧\n]<", "  two spaces", "a\n\n b"])
@pytest.mark.parametrize("name", ["plain", "mistral"])
def test_text_that_grows_is_the_text_of_all_ids(rendered, name, text):
    renderer = rendered[name]
    growing = GrowingText(renderer)
    seen = []
    for token in renderer.text_prompt(text):
        growing.add(token)
        seen.append(growing.text)
    growing.finish()
    assert growing.text == renderer.decode(renderer.text_prompt(text))
    assert all(growing.text.startswith(part) and "\ufffd" not in part for part in seen)


def streamed(text: str, size: int, reading: AnswerReading) -> list:
    parts = [text[at : at + size] for at in range(0, len(text), size)]
    return list(itertools.chain(*assembled(Cut(parts), range(len(parts)), reading)))


@pytest.mark.parametrize(
    ("text", "reasoning", "words"),
    [
        ("<think>\nWhy?\n</think>\n\nSo.", "Why?", "So."),
        ("<think>\n\n</think>\n\nSo.", "", "So."),
        ("\n<think>a</think>b", "a", "b"),
        ("<think>cut", "cut", ""),
        ("<thin", "", "<thin"),
        ("no <think>a</think>", "", "no <think>a</think>"),
    ],
)
def test_reasoning_is_told_from_words(text, reasoning, words):
    pieces = streamed(text, 1, AnswerReading(calls=True))
    answer = joined(pieces)
    assert (answer.reasoning, answer.words) == (reasoning, words)
    if text.count("think>") == 2 and not text.startswith("no"):
        assert thought_of(text) == (reasoning, words)


def test_reasoning_that_the_prompt_opened_ends_with_its_mark():
    answer = joined(streamed("Why?\n\nI see.\n</think>\n\nSo.", 2, AnswerReading(thinks=True)))
    assert (answer.reasoning, answer.words) == ("Why?\n\nI see.", "So.")
    assert 0 < answer.ended.usage.reasoning < answer.ended.usage.answer


def test_marks_of_the_template_are_no_words(rendered):
    renderer = rendered["marks"]
    ids = renderer.encoded_part("[THINK]Why?[/THINK]So.")
    answer = joined(itertools.chain(*assembled(renderer, ids)))
    assert renderer.answer(ids) == "<think>\nWhy?\n</think>\n\nSo."
    assert (answer.reasoning, answer.words) == ("Why?", "So.")


def test_words_stand_beside_calls_without_the_space_between():
    answer = whole(f"Let me see.\n\n<tool_call>\n{CALL}\n</tool_call>\n\nDone.\n", AnswerReading(calls=True))
    assert answer.words == "Let me see.\n\n\n\nDone." and answer.ended.reason == "tool_calls"
    assert [(call.name, call.arguments) for call in answer.calls] == [MADE]
    alone = whole(f"\n\n{CALL}\n", AnswerReading(calls=True))
    assert alone.words == "" and len(alone.calls) == 1


def test_calls_are_words_unless_tools_are_declared():
    answer = whole(CALL)
    assert (answer.words, answer.calls, answer.ended.reason) == (CALL, (), "stop")


def test_one_call_ends_the_answer():
    pieces = assembled(Cut([f"{CALL}\n", CALL]), [0, 1], AnswerReading(calls=True, one_call=True))
    assert [type(piece) for piece in itertools.chain(*pieces)] == [CallBegun, CallArguments, AnswerEnded]
    assert pieces[1:] == [[], []]
    both = whole(f"[{CALL}, {CALL}]", AnswerReading(calls=True, one_call=True))
    assert len(both.calls) == 1 and both.ended.reason == "tool_calls"


def test_a_call_that_a_strict_tool_does_not_take_is_words():
    schema = checked({"type": "object", "properties": {"a": {"type": "integer"}}})
    reading = AnswerReading(calls=True, schemas={"f": schema})
    assert whole(CALL, reading).words == CALL
    assert whole(CALL.replace('"b"', "1"), reading).calls == (MadeCall("id0", "f", '{"a": 1}'),)


@pytest.mark.parametrize("size", [1, 2, 3, 50])
def test_stop_texts_cut_exactly_where_the_first_is_complete(size):
    text = "one two STOP three"
    answer = joined(streamed(text, size, AnswerReading(stop=("STOP", "three", "TOP"))))
    assert answer.words == "one two " and answer.ended.stop == "STOP"
    assert answer.ended.reason == "stop"
    assert answer.ended.usage.answer == -(-len("one two STOP") // size)


def test_a_stop_text_of_which_only_a_part_comes_is_words():
    answer = joined(streamed("one STO", 1, AnswerReading(stop=("STOP",))))
    assert (answer.words, answer.ended.stop) == ("one STO", None)


def test_the_limit_is_told_even_if_calls_were_made():
    answer = whole(f"{CALL}\nand", AnswerReading(calls=True), "length")
    assert answer.ended.reason == "length" and len(answer.calls) == 1 and answer.words == "and"


def test_log_probabilities_of_tokens_behind_a_stop_text_are_not_disclosed():
    parts = ["one", " ST", "OP", " x"]
    pieces = assembled(Cut(parts), range(4), AnswerReading(stop=("STOP",)), logprobs=True)
    answer = joined(itertools.chain(*pieces))
    assert answer.words == "one "
    assert [entry.token for entry in answer.logprobs] == [0, 1]
    everything = joined(itertools.chain(*assembled(Cut(parts), range(4), logprobs=True)))
    assert [(entry.token, entry.logprob) for entry in everything.logprobs] == [
        (0, 0),
        (1, -1),
        (2, -2),
        (3, -3),
    ]
    first = next(piece for piece in pieces[0] if isinstance(piece, Logprobs))
    assert [entry.token for entry in first.tokens] == [0]


# Museum: what other servers make of calls


def test_museum_mlx_lm_1374_a_list_of_calls_without_a_mark_is_read(rendered):
    """Mistral 7B v0.3 often leaves out [TOOL_CALLS]; the server knew one form only and gave the calls as
    words, or none at all."""
    for text in (f"[{CALL}]", f"[TOOL_CALLS] [{CALL}]", f"[TOOL_CALLS][{CALL}]"):
        answer = whole(text, AnswerReading(calls=True))
        assert [(call.name, call.arguments) for call in answer.calls] == [MADE]
        assert answer.words == "" and answer.ended.reason == "tool_calls"
    ids = [5, *rendered["mistral"].encoded_part(f"[{CALL}]")]
    answer = joined(itertools.chain(*assembled(rendered["mistral"], ids, AnswerReading(calls=True))))
    assert [(call.name, call.arguments) for call in answer.calls] == [MADE]


@pytest.mark.parametrize(
    "text",
    [
        '<tool_call>{"name": "f", "arguments": {"a": }}</tool_call>',
        "[TOOL_CALLS] [{'name': 'f', 'arguments': {}}]",
        '<tool_call>{"name": "f", "arguments": {}',
        "tool_call: f\nno arguments",
        '{"name": "f", "arguments": {"a": 1e999}}',
    ],
)
def test_museum_mlx_lm_1307_a_call_that_cannot_be_read_is_no_empty_message(text):
    """The server took the marks for a call, failed to read it, and delivered neither a call nor words."""
    for size in (1, 4, 99):
        answer = joined(streamed(text, size, AnswerReading(calls=True)))
        assert (answer.words, answer.calls, answer.ended.reason) == (text, (), "stop")


def test_museum_rapid_mlx_579_a_streamed_call_is_not_garbled():
    """The stream's own parser cut names and arguments at the borders of tokens."""
    text = f"Now.\n<tool_call>\n{CALL}\n</tool_call>\n<tool_call>\n{CALL}\n</tool_call>"
    for size in range(1, 12):
        pieces = streamed(text, size, AnswerReading(calls=True))
        begun = [piece for piece in pieces if isinstance(piece, CallBegun)]
        assert [(piece.index, piece.name) for piece in begun] == [(0, "f"), (1, "f")]
        assert [piece.text for piece in pieces if isinstance(piece, CallArguments)] == [MADE[1]] * 2
        assert "".join(piece.text for piece in pieces if isinstance(piece, Words)) == "Now."


def test_museum_vllm_45167_escapes_stay_in_their_channel():
    """Marks within strings ended the call, and what followed leaked into the words."""
    arguments = {"a": 'quote " tag </tool_call> [TOOL_CALLS] <think> \\ \n é \u2028', "b": "</think>"}
    for ascii_only in (True, False):
        body = json.dumps({"name": "f", "arguments": arguments}, ensure_ascii=ascii_only)
        text = f"<think>\nx\n</think>\n\n<tool_call>\n{body}\n</tool_call>"
        for size in (1, 3, 7):
            pieces = streamed(text, size, AnswerReading(calls=True))
            answer = joined(pieces)
            assert (answer.reasoning, answer.words) == ("x", "")
            assert [json.loads(call.arguments) for call in answer.calls] == [arguments]
            assert not any(isinstance(piece, Words) for piece in pieces)
