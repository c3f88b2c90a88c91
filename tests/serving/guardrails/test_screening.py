"""Laws of the guardrails: a stream shows a prefix of what the whole shows, and nothing withheld leaves."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import ClassVar

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tunesmith.data.formats import Conversation, Message
from tunesmith.errors import ConfigError
from tunesmith.serving.guardrails import (
    AnswerScreen,
    Detection,
    Guard,
    Guardrail,
    Span,
    TextScreen,
    guardrail_settings,
    load_guardrails,
    register,
    table,
)
from tunesmith.serving.guardrails import guardrail as guardrail_module
from tunesmith.serving.guardrails.answers import PromptBlocked
from tunesmith.serving.pieces import AnswerEnded, CallArguments, CallBegun, Piece, Reasoned, Words
from tunesmith.serving.question import Question
from tunesmith.settings.config import annotated

KEY = "-----BEGIN RSA PRIVATE KEY-----\n" + "MIIEpAIBAAKCAQEAx9Jq2kVfT8WcYb3nZr5uLh7dPgS0eXoQ\n" * 30
TOKEN = "ghp_x9Jq2kVfT8WcYb3nZr5uLh7dPgS0eXoQmB1a"
WITHHELD = [TOKEN, "jane.miller@gmail.com", "212-867-5309", "acme rocket", "<|im_end|>", "[INST]"]
FILLER = [
    "The weather is fine today. ",
    "Write to ",
    " or ",
    "\n",
    "grass ",
    "x" * 300,
    "naïve 🙂 ",
    '{"a": 1}',
]


def rails(*sets: str) -> tuple[Guardrail, ...]:
    return load_guardrails(sets=sets)


EVERY = {
    action: rails(
        f"secrets.output={action}",
        f"personal_data.output={action}",
        f"control_tokens.output={action}",
        f"block_list.output={action}",
        "block_list.words=[acme rocket]",
    )
    for action in ("redact", "block", "flag")
}


def stream(parts: Sequence[str], guardrails: Sequence[Guardrail]) -> tuple[list[str], list[Detection]]:
    """What was shown after each part and at the end."""
    detections: list[Detection] = []
    screen = TextScreen(guardrails, "output", detections.append)
    shown, steps = "", []
    for part in parts:
        shown += screen.feed(part)
        steps.append(shown)
    steps.append(shown + screen.end())
    return steps, detections


LONG = [
    f"{KEY}-----END RSA PRIVATE KEY-----",
    KEY,
    "eyJhbGciOiJIUzI1NiJ9.eyJ" + "zdWIiOiJq2kVfT8WcYb3nZr" * 20,
]
texts = st.lists(st.sampled_from([*WITHHELD, *FILLER, *LONG]), max_size=12).map("".join)


spaced = st.lists(st.sampled_from([f" {text} " for text in WITHHELD] + FILLER), max_size=12).map(" ".join)


@st.composite
def cut_texts(draw, texts=texts) -> tuple[str, list[str]]:
    text = draw(texts)
    cuts = sorted(draw(st.sets(st.integers(0, len(text)), max_size=30)))
    borders = [0, *cuts, len(text)]
    return text, [text[a:b] for a, b in pairwise(borders)]


@pytest.mark.parametrize("action", EVERY)
@given(cut_texts())
def test_a_stream_shows_a_prefix_of_the_whole_at_every_moment_however_it_is_cut(action, cut):
    text, parts = cut
    (*_, whole), expected = stream([text], EVERY[action])
    steps, detections = stream(parts, EVERY[action])
    assert steps[-1] == whole
    assert all(whole.startswith(shown) for shown in steps)
    assert sorted(detections) == sorted(expected)


@pytest.mark.parametrize("action", ["redact", "block"])
@given(cut_texts(spaced))
def test_nothing_that_is_withheld_ever_leaves(action, cut):
    _, parts = cut
    steps, _ = stream(parts, EVERY[action])
    assert not any(text in steps[-1] for text in [TOKEN, "acme rocket", "<|im_end|>", "[INST]"])


@given(cut_texts())
def test_flagged_texts_pass_at_once(cut):
    _, parts = cut
    steps, _ = stream(parts, EVERY["flag"])
    assert steps[:-1] == ["".join(parts[: count + 1]) for count in range(len(parts))]


def test_each_kind_of_text_is_redacted_by_its_name():
    text = f"Mail jane.miller@gmail.com or call 212-867-5309. The key: {TOKEN}. Stop <|im_end|> acme  ROCKET."
    (*_, shown), detections = stream([text], EVERY["redact"])
    kinds = ["control_token", "email", "github_token", "listed", "phone"]
    assert sorted(detection.kind for detection in detections) == kinds, "each is counted once"
    assert shown == "Mail [EMAIL] or call [PHONE]. The key: [GITHUB_TOKEN]. Stop [CONTROL_TOKEN] [LISTED]."


def test_a_block_shows_what_stands_before_it_and_nothing_after():
    text = "Nothing to see here. " * 20 + TOKEN + " and more"
    steps, detections = stream([*text], EVERY["block"])
    assert steps[-1] == "Nothing to see here. " * 20
    assert detections == [Detection("secrets", "github_token", "output", "block")]


@pytest.mark.parametrize("end", ["-----END RSA PRIVATE KEY-----", "", "\nand other words"])
def test_a_private_key_is_held_back_from_its_first_line_whether_it_ends_or_not(end):
    steps, _ = stream([*("Here it is: " + KEY + end)], rails("secrets.output=redact"))
    assert not any("MIIE" in shown or "Jq2k" in shown for shown in steps)
    assert steps[-1].startswith("Here it is: [PRIVATE_KEY]")


def test_after_a_long_detection_a_stream_is_no_more_behind_than_before():
    text = f"{KEY}-----END RSA PRIVATE KEY-----" + " and then some words" * 40
    steps, _ = stream([*text], rails("secrets.output=redact"))
    behind = len(text) - len(KEY) - len(steps[-2]) - 16
    assert 100 < behind < 170


@pytest.mark.parametrize("end", [".", ".dBjftJeZ4CVPmB92K27uhbUJU1p1rwW1gFWFOEjXk. Bye", ""])
def test_a_token_longer_than_the_window_is_held_back(end):
    token = "eyJhbGciOiJIUzI1NiJ9.eyJ" + "zdWIiOiJq2kVfT8WcYb3nZr5uLh7dPgS0" * 30
    steps, _ = stream([*f"Take {token}{end}"], rails("secrets.output=redact"))
    assert not any("zdWIi" in shown for shown in steps)
    assert steps[-1].startswith("Take [JWT]")


def test_words_that_are_cut_by_a_window_are_not_taken_for_others():
    guardrails = rails("block_list.output=block", "block_list.words=[ass, embly]")
    for length in range(200, 400):
        text = "y " * (length // 2) + " " * (length % 2) + "assembly " + "z " * 300
        assert stream([*text], guardrails)[0][-1] == text


@pytest.mark.parametrize(
    ("patterns", "text", "shown"),
    [
        (["(foo)x", r"(b)\1"], "a bb c", "a [LISTED] c"),
        (["(?x)abc # comment", "def"], "abc and def", "[LISTED] and [LISTED]"),
        (["(?P<name>ab)", "(?P<name>cd)(?P=name)"], "ab and CDCD", "[LISTED] and [LISTED]"),
        (["bcd", "cde"], "abcdef", "a[LISTED][LISTED]f"),
    ],
)
def test_patterns_do_not_change_each_other(patterns, text, shown):
    guardrails = rails("block_list.output=redact", f"block_list.patterns={json.dumps(patterns)}")
    steps, _ = stream([text], guardrails)
    assert steps[-1] == shown


def test_a_refusal_is_blocked_before_its_first_word():
    guardrails = rails("refusals.output=block")
    refusal = "I'm sorry, but I can't help with that request. It would be against the law."
    assert stream([*refusal], guardrails)[0][-1] == ""
    answer = "Of course. " + "Here are the steps that you need. " * 40
    steps, _ = stream([*answer], guardrails)
    assert steps[-1] == answer and steps[500] != "", "behind the opening nothing is held back for it"


def test_an_answer_must_satisfy_the_schema_unless_it_calls_a_tool(tmp_path):
    schema = {"type": "object", "required": ["city"], "properties": {"city": {"type": "string"}}}
    path = tmp_path / "city.json"
    path.write_text(json.dumps(schema))
    guardrails = rails("json_schema.output=block", f"json_schema.file={path}")
    assert pieces([Words('{"city": '), Words('"Rome"}')], guardrails) == [Words('{"city": "Rome"}')]
    assert pieces([Words('{"town": "Rome"}')], guardrails) == []
    assert pieces([], guardrails) == [], "an empty answer is blocked too"
    screen = AnswerScreen(guardrails, lambda detection: None)
    shown = [piece for part in (Reasoned("Hm."), AnswerEnded("length")) for piece in screen.feed(part)]
    assert shown == [Reasoned("Hm.")] and screen.blocked is not None, "as is one of reasoning only"
    called: list[Piece] = [Words("I look it up."), CallBegun(0, "c", "find"), CallArguments(0, "{}")]
    assert pieces(called, guardrails) == called


def pieces(answer: Sequence[Piece], guardrails: Sequence[Guardrail]) -> list[Piece]:
    """What is delivered of an answer, neighbouring texts joined, without the last piece."""
    screen = AnswerScreen(guardrails, lambda detection: None)
    delivered = [piece for part in [*answer, AnswerEnded("stop")] for piece in screen.feed(part)]
    assert (screen.blocked is None) == (delivered[-1:] == [AnswerEnded("stop")])
    joined: list[Piece] = []
    for piece in delivered:
        before = joined[-1] if joined else None
        if isinstance(piece, Words) and isinstance(before, Words):
            joined[-1] = Words(before.text + piece.text)
        elif not isinstance(piece, AnswerEnded):
            joined.append(piece)
    return joined


def test_arguments_of_calls_are_screened_as_the_values_that_the_tool_gets():
    hidden = json.dumps({"to": "jane.miller@gmail.com"}).replace("@", "\\u0040")
    answer: list[Piece] = [
        CallBegun(0, "c", "send"),
        CallArguments(0, hidden[:9]),
        CallArguments(0, hidden[9:]),
    ]
    redacted = [CallBegun(0, "c", "send"), CallArguments(0, '{"to": "[EMAIL]"}')]
    assert pieces(answer, rails("personal_data.output=redact")) == redacted
    assert pieces(answer, rails("personal_data.output=block")) == []
    clean: list[Piece] = [CallBegun(0, "c", "send"), CallArguments(0, '{"to":   "Jane"}')]
    assert pieces(clean, rails("personal_data.output=redact")) == clean, (
        "clean arguments are left as they are"
    )


def test_reasoning_is_screened_and_the_order_of_pieces_stays():
    answer: list[Piece] = [Reasoned(f"The key is {TOKEN}"), Words("Hello."), CallBegun(0, "c", "f")]
    expected = [Reasoned("The key is [GITHUB_TOKEN]"), Words("Hello."), CallBegun(0, "c", "f")]
    assert pieces(answer, rails("secrets.output=redact")) == expected


def test_prompts_are_redacted_or_blocked_in_what_users_and_tools_say():
    conversation = Conversation(
        (
            Message("system", "Never say acme rocket."),
            Message("user", f"My key is {TOKEN}."),
            Message("assistant", "Thanks."),
            Message("user", "And now?"),
        )
    )
    question = Question("m", conversation)
    counted: list[Detection] = []
    guard = Guard(
        rails("secrets.input=redact", "block_list.input=flag", "block_list.words=[now]"), counted.append
    )
    screened = guard.screen_question(question)
    assert isinstance(screened.prompt, Conversation)
    contents = [message.content for message in screened.prompt.messages]
    assert contents == ["Never say acme rocket.", "My key is [GITHUB_TOKEN].", "Thanks.", "And now?"]
    assert counted == [
        Detection("secrets", "github_token", "input", "redact"),
        Detection("block_list", "listed", "input", "flag"),
    ]
    with pytest.raises(PromptBlocked, match="secrets does not let this prompt through"):
        Guard(rails("secrets.input=block")).screen_question(question)
    with pytest.raises(PromptBlocked, match="token ids"):
        Guard(rails("secrets.input=flag")).screen_question(Question("m", (1, 2)))
    with pytest.raises(PromptBlocked, match="log-probabilities"):
        Guard(rails("secrets.output=redact")).screen_question(Question("m", conversation, logprobs=2))


@pytest.mark.parametrize(
    ("sets", "message"),
    [
        (["secrtes.output=block"], "did you mean secrets"),
        (["secrets.output=stop"], "one of off, flag, redact, block"),
        (["refusals.output=redact"], "refusals: output can be off or flag or block, not redact"),
        (["json_schema.output=block"], "json_schema: file names the schema"),
        (["block_list.patterns=['(']"], "is not a regular expression"),
        (["block_list.files=[nowhere.txt]"], "cannot be read"),
    ],
)
def test_settings_are_strict(sets, message):
    with pytest.raises(ConfigError, match=message.replace("(", r"\(")):
        load_guardrails(sets=sets)


def test_only_a_line_that_begins_with_a_hash_is_a_comment(tmp_path):
    path = tmp_path / "words.txt"
    path.write_text("# languages\nc# code\n\n  # more\nf#\n")
    guardrails = rails("block_list.output=redact", f"block_list.files=['{path}']")
    assert stream(["c and c# code"], guardrails)[0][-1] == "c and [LISTED]"


def test_settings_come_from_yaml_and_off_means_off(tmp_path):
    path = tmp_path / "guardrails.yaml"
    path.write_text("secrets:\n  output: redact\nprofanity:\n  output: off\n")
    (secrets,) = load_guardrails([path])
    assert (secrets.name, secrets.input, secrets.output) == ("secrets", "off", "redact")


def test_one_class_makes_a_guardrail_with_settings_documentation_and_behaviour():
    @register
    class Shouting(Guardrail):
        name = "shouting"
        detects: ClassVar = "words in capitals"
        misses: ClassVar = "short ones"
        least: int = 4

        def find(self, text: str) -> Iterator[Span]:
            yield from (
                Span(text.index(word), text.index(word) + len(word), "capitals")
                for word in text.split()
                if word.isupper() and len(word) >= self.least
            )

        def reach(self) -> float:
            return 20

    try:
        (shouting,) = load_guardrails(sets=["shouting.output=redact", "shouting.least=3"])
        assert stream([*"Do not SHOUT at me"], [shouting])[0][-1] == "Do not [CAPITALS] at me"
        assert "| `shouting` | words in capitals | short ones |" in table()
        assert "shouting:" in annotated(guardrail_settings())
    finally:
        guardrail_module.unregister("shouting")


def test_the_settings_in_the_documentation_are_read(tmp_path):
    text = (Path(__file__).parents[3] / "docs" / "serving.md").read_text("utf-8")
    path = tmp_path / "guardrails.yaml"
    path.write_text(text.partition("```yaml\n")[2].partition("```")[0])
    names = {guardrail.name for guardrail in load_guardrails([path])}
    assert names == {"secrets", "personal_data", "refusals", "block_list"}


def test_the_table_in_the_documentation_is_the_one_of_the_registered_guardrails():
    text = (Path(__file__).parents[3] / "docs" / "serving.md").read_text("utf-8")
    assert table() in text, "put the output of serving.guardrails.table() into docs/serving.md"
    assert table().count("\n") >= 8


@st.composite
def cut_answers(draw) -> tuple[list[Piece], list[Piece]]:
    """An answer in few pieces, and the same in many."""
    whole: list[Piece] = []
    parts: list[Piece] = []
    for kind in draw(st.lists(st.sampled_from(["words", "reasoning", "call"]), max_size=4)):
        text, cuts = draw(cut_texts())
        if kind == "call":
            index = sum(isinstance(piece, CallBegun) for piece in whole)
            begun, text = CallBegun(index, f"c{index}", "send"), json.dumps({"text": text})
            cut = draw(st.integers(0, len(text)))
            whole += [begun, CallArguments(index, text)]
            parts += [begun, CallArguments(index, text[:cut]), CallArguments(index, text[cut:])]
        else:
            make = Words if kind == "words" else Reasoned
            whole.append(make(text))
            parts += [make(cut) for cut in cuts]
    return whole, parts


@pytest.mark.parametrize("action", ["redact", "block"])
@given(cut_answers())
def test_an_answer_is_delivered_alike_however_its_pieces_are_cut(action, answers):
    whole, parts = (written(pieces(answer, EVERY[action])) for answer in answers)
    assert whole == parts
    assert not any(text in whole for text in ("<|im_end|>", "[INST]"))


def written(answer: Sequence[Piece]) -> str:
    """The delivered pieces as text, for comparison; neighbours of one kind are not told apart."""
    text, before = "", None
    for piece in answer:
        place = (type(piece), piece.index if isinstance(piece, CallBegun | CallArguments) else 0)
        own = piece.name if isinstance(piece, CallBegun) else getattr(piece, "text")  # noqa: B009
        text, before = text + (own if place == before else f"\n{place}: {own}"), place
    return text


CLEAN = st.text("abc .\n🙂", min_size=1, max_size=200)


@st.composite
def clean_answers(draw) -> list[Piece]:
    """Reasoning, words and several calls in which nothing is detected, in pieces."""
    answer: list[Piece] = [Reasoned(text) for text in draw(st.lists(CLEAN, max_size=2))]
    answer += [Words(text) for text in draw(st.lists(CLEAN, max_size=4))]
    for index, text in enumerate(draw(st.lists(CLEAN, max_size=3))):
        arguments = json.dumps({"text": text})
        answer += [CallBegun(index, f"c{index}", "send"), CallArguments(index, arguments[:5])]
        answer.append(CallArguments(index, arguments[5:]))
    return answer


@pytest.mark.parametrize("action", EVERY)
@given(clean_answers())
def test_a_clean_answer_is_delivered_as_it_is(action, answer):
    assert written(pieces(answer, EVERY[action])) == written(answer)


def test_a_flagged_call_is_delivered_at_once_and_reported_when_it_is_complete():
    reported: list[Detection] = []
    screen = AnswerScreen(EVERY["flag"], reported.append)
    call: list[Piece] = [CallBegun(0, "c", "send"), CallArguments(0, '{"to": "jane.miller@gmail.com"}')]
    assert [screen.feed(piece) for piece in call] == [[piece] for piece in call] and not reported
    assert screen.feed(AnswerEnded("tool_calls")) == [AnswerEnded("tool_calls")]
    assert reported == [Detection("personal_data", "email", "output", "flag")]
