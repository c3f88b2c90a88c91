"""Calls in a text that grows: however it is cut, the calls are those of the whole."""

from __future__ import annotations

import json

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tunesmith.checks import parsers
from tunesmith.checks.growing import OpenText, OpenValue
from tunesmith.checks.parsers import CallSpan, Scan, parse

PARTS = [
    "tool_call:",
    "tool_call: f\n",
    "tool_call: f\narguments: {}",
    "arguments:",
    'arguments: {"a": "\\u00e9 </tool_call>"}',
    "[TOOL_CALLS]",
    "[TOOL_CALLS] ",
    "[TOOL_CALLS]f[ARGS]",
    "[TOOL_CALLS]f[CALL_ID] a1[ARGS]{}",
    "<tool_call>",
    "</tool_call>",
    "\n",
    "Result:",
    'Result: {"name": "f", "arguments": {}}',
    '{"name": "f", "arguments": ',
    '{"name": "f", "arguments": {"a": [1.5e3, true, null]}}',
    "[{'name': 'f', 'arguments': {}}]",
    '[{"name": "f", "parameters": {}}]',
    '{"name": \'f\', "arguments": {}}',
    '{"a": 1}',
    "}",
    "]",
    "[",
    "{",
    '"',
    "-",
    "12",
    "NaN",
    "tru",
    "\\",
    "\\u12",
    '{"function": ',
    "<|python_tag|>",
    '<|python_tag|>{"name": "f", "parameters": {}}',
    "<tool_call>\n<function=f>\n",
    "<function=",
    "<parameter=a>\n",
    "<parameter=a>\n5\n</parameter>\n",
    "</parameter>",
    "</function>",
    "</function>\n</tool_call>",
    '{"tool_calls": [',
    "\r\n",
    " ",
    "é",
]
TEXTS = st.lists(st.sampled_from(PARTS) | st.text(max_size=4), max_size=10).map("".join)


def spans_of(text: str, cuts: list[int]) -> tuple[list[CallSpan], list[int]]:
    """What a scan finds that reads up to each of ``cuts``, then all; and how far it was settled each time."""
    scan = Scan()
    spans: list[CallSpan] = []
    settled: list[int] = []
    for end in cuts:
        new = scan.read(text[:end], complete=False)
        assert all(span.start >= (settled[-1] if settled else 0) for span in new)
        spans += new
        settled.append(scan.settled)
    return spans + scan.read(text, complete=True), settled


@settings(max_examples=400)
@given(text=TEXTS, data=st.data())
@example(text='\n{"name": x "arguments"\n[TOOL_CALLS] [{"name": "f", "arguments": {}}]', data=None)
@example(text='[TOOL_CALLS] [{"name": "f", "arguments": {}}] more', data=None)
def test_a_text_that_grows_makes_the_calls_of_the_whole(text, data):
    cuts = list(range(len(text))) if data is None else sorted(data.draw(st.lists(st.integers(0, len(text)))))
    (whole, _), (cut, settled) = spans_of(text, []), spans_of(text, cuts)
    assert [(span.start, span.end, [call.name for call in span.calls]) for span in cut] == [
        (span.start, span.end, [call.name for call in span.calls]) for span in whole
    ]
    assert [[call.arguments for call in span.calls] for span in cut] == [
        [call.arguments for call in span.calls] for span in whole
    ]
    assert settled == sorted(settled)


JSONS = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@settings(max_examples=200)
@given(arguments=st.dictionaries(st.text(), JSONS, max_size=3), ascii=st.booleans())
def test_no_part_of_a_call_is_taken_for_words(arguments, ascii):
    """Each beginning of valid JSON may go on: nothing of a call is settled before it is read."""
    text = "Words.\n" + json.dumps([{"name": "f", "arguments": arguments}], ensure_ascii=ascii)
    scan = Scan()
    for end in range(8, len(text) + 1):
        assert scan.read(text[:end], complete=False) == []
        assert scan.settled == len("Words.\n")
    (span,) = scan.read(text, complete=True)
    assert span.start == 7 and span.end == len(text)


@pytest.mark.parametrize(
    "text",
    ["[a link](http://x) and\n", "{x} is a set\n", "- [ ] to do\n[x] done", "Result: fine\n", "tool calls"],
)
def test_words_that_look_like_a_mark_are_settled_soon(text):
    scan = Scan()
    assert scan.read(text, complete=False) == []
    assert scan.settled == len(text)
    assert parse(text) == []


@pytest.mark.parametrize("ascii", [True, False])
def test_a_long_string_is_not_read_again_at_each_of_its_letters(ascii, monkeypatch):
    readings = counted_readings(monkeypatch)
    arguments = {"content": 'if (é) {\n\t["☺\\ud83d"]; }\n' * 20}
    call = json.dumps({"name": "write", "arguments": arguments}, ensure_ascii=ascii)
    text = f"<tool_call>{call}</tool_call>"
    spans, _ = spans_of(text, list(range(len(text))))
    assert [span.calls for span in spans] == [(parsers.ParsedCall("write", arguments),)]
    assert len(readings) < 100 < len(text) / 6


def counted_readings(monkeypatch) -> list[int]:
    """The list gets the place of every value that is decoded from now on."""
    readings = []

    class Counting(json.JSONDecoder):
        def raw_decode(self, s, idx=0):
            readings.append(idx)
            return super().raw_decode(s, idx)

    monkeypatch.setattr(parsers, "STRICT", Counting())
    return readings


LONG = {
    "numbers": [number * 1.5 for number in range(400)],
    "strings": ['a "b"\n'] * 200,
    "objects": [{"a": None, "b": [True, False]}] * 60,
}


@pytest.mark.parametrize("kind", LONG)
@pytest.mark.parametrize("form", ["<tool_call>{}</tool_call>", "[TOOL_CALLS] [{}]", "{}", "<|python_tag|>{}"])
def test_a_long_call_is_decoded_when_it_is_complete(kind, form, monkeypatch):
    readings = counted_readings(monkeypatch)
    arguments = {"content": LONG[kind]}
    text = form.replace("{}", json.dumps({"name": "write", "arguments": arguments})) + "\n"
    spans, _ = spans_of(text, list(range(len(text))))
    assert [span.calls for span in spans] == [(parsers.ParsedCall("write", arguments),)]
    assert len(readings) < 30 < len(text) / 40


def test_a_long_parameter_is_searched_once(monkeypatch):
    searched = []

    class Watched(OpenText):
        def goes_on(self, text):
            searched.append(len(text) - self._position)
            return super().goes_on(text)

    monkeypatch.setattr(parsers, "OpenText", Watched)
    value = "if a < b:\n    pass </para\n" * 40
    text = f"<tool_call>\n<function=f>\n<parameter=a>\n{value}\n</parameter>\n</function>\n</tool_call>"
    spans, _ = spans_of(text, list(range(len(text))))
    assert [span.calls for span in spans] == [(parsers.ParsedCall("f", {"a": value}),)]
    assert len(searched) > len(value) and max(searched) < 20


@settings(max_examples=300)
@given(value=JSONS, ascii=st.booleans(), indent=st.sampled_from([None, 1]), data=st.data())
def test_a_value_goes_on_until_it_is_complete_and_never_once_the_reader_says_why_not(
    value, ascii, indent, data
):
    text = json.dumps([value], ensure_ascii=ascii, indent=indent)
    is_valid = data.draw(st.booleans())
    if not is_valid:
        place = data.draw(st.integers(1, len(text) - 1))
        text = text[:place] + data.draw(st.sampled_from('"\\,:]}[{x1.-e \n\x01tn')) + text[place:]
    growing = OpenValue(0)
    for end in range(1, len(text) + 1):
        begun, goes_on = text[:end], growing.goes_on(text[:end])
        try:
            parsers.STRICT.raw_decode(begun)
        except json.JSONDecodeError as error:
            assert not goes_on or parsers._may_go_on(begun, error), begun
        else:
            assert not goes_on, begun
        assert goes_on or not is_valid or end == len(text), begun
        if not goes_on:
            break


@pytest.mark.parametrize("wrong", ["\nb", "\\x", "\\u12g", '" b'])
def test_what_breaks_a_string_is_seen_at_once(wrong):
    text = 'tool_call: f\narguments: {"a": "bc' + wrong
    spans, settled = spans_of(text, list(range(len(text) + 1)))
    assert spans == Scan().read(text, complete=True) and spans[0].calls[0].problem
    assert settled[-2] == 0 and settled[-1] == len(text)
