"""What stands in the words: each fault planted and found with its row, nothing in its clean twin, and nothing
shown in full."""

from __future__ import annotations

import pickle
import random
import string
from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tunesmith.auditing import AuditSpec
from tunesmith.auditing.findings import Finding, Severity
from tunesmith.auditing.rules.content import Content
from tunesmith.auditing.views import Context, Survey, View
from tunesmith.checks.content import SCANNED, masked
from tunesmith.data import formats
from tunesmith.data.examples import (
    Call,
    Conversation,
    Demonstration,
    Document,
    Example,
    Judged,
    Message,
    Preference,
)

RULE, CONTEXT = Content(), Context(AuditSpec())
ASKED, SAID = "How long does bread keep?", "Three days in a box of wood, one day in the open."
MIXED = string.ascii_letters + string.digits


def made(count: int, letters: str = MIXED, seed: int = 1) -> str:
    """As a generator of keys would: no secret stands in this file."""
    return "".join(random.Random(seed).choices(letters, k=count))


def row(said: str = SAID, asked: str = ASKED, label: bool | None = None) -> Example:
    conversation = Conversation((Message("user", asked), Message("assistant", said)))
    return (
        Demonstration(conversation=conversation)
        if label is None
        else Judged(conversation=conversation, desirable=label)
    )


def judged(examples: Sequence[Example]) -> list[Finding]:
    views = [View(f"rows.jsonl:{line}", example) for line, example in enumerate(examples, 1)]
    kept = [RULE.look(view, CONTEXT) for view in views]
    survey = Survey(
        CONTEXT.spec, [view.source for view in views], [view.label for view in views], [None] * len(views)
    )
    return list(RULE.judge(pickle.loads(pickle.dumps(kept)), survey))


def told(*examples: Example) -> dict[str, Severity]:
    """Rule → severity of what was found, bars that are met aside."""
    return {found.rule: found.severity for found in judged(examples) if found.severity != "good"}


def card(digits: str) -> str:
    """With the last digit that makes it valid."""
    doubled = [int(digit) * (2 - at % 2) for at, digit in enumerate(digits)]
    return digits + str(-sum(one // 10 + one % 10 for one in doubled) % 10)


KEY = "-----BEGIN {0}PRIVATE KEY-----\n{1}\n-----END {0}PRIVATE KEY-----"
PLANTED: list[tuple[str, Severity, str, str]] = [
    ("secrets", "error", f"Use ghp_{made(36)} to log in.", f"Use ghp_{'x' * 36} to log in."),
    ("secrets", "error", f"AKIA{made(16, string.ascii_uppercase + string.digits)}", "AKIAIOSFODNN7EXAMPLE"),
    ("secrets", "error", f"The key is sk_live_{made(24)}.", "The key is sk_live_abc123def456ghi789jkl."),
    ("secrets", "error", KEY.format("RSA ", made(64)), KEY.format("RSA ", "...")),
    (
        "secrets",
        "error",
        f"aws_secret_access_key = {made(40)}",
        f"the aws-sdk of key {made(40, string.hexdigits[:16])}",
    ),
    ("secrets", "warning", f"password: {made(14)}", "password: correct-horse-battery"),
    ("secrets", "warning", f"api_key = '{made(40, seed=3)}'", "token_refresh = '/api/v2/auth/refresh'"),
    (
        "secrets",
        "warning",
        f"postgres://app:{made(12)}@db.internal/app",
        "postgres://postgres:postgres@localhost/app",
    ),
    (
        "secrets",
        "warning",
        f"Authorization: Bearer {made(40)}",
        "Authorization: Bearer <your-token-goes-here>",
    ),
    ("personal_data", "warning", "Write to maria.keller@gmail.com.", "Write to maria.keller@example.com."),
    ("personal_data", "warning", "Write to maria.keller@web.de.", "Write to support@web.de."),
    ("personal_data", "warning", "Call me at 631-481-4867.", "Call me at 631-555-4867."),
    ("personal_data", "warning", "Her number is +4915204839271.", "The sum is 12 +4915204839271."),
    ("personal_data", "warning", "Call (718) 349-2207 today.", "Call 1-800-273-8255 today."),
    (
        "personal_data",
        "warning",
        f"Pay with card {card('453918624700318')}.",
        "Pay with card 4242 4242 4242 4242.",
    ),
    (
        "personal_data",
        "warning",
        f"My visa is {card('453918624700318')}.",
        f"The product is {card('453918624700318')}.",
    ),
    ("personal_data", "warning", "IBAN DE02120300000000202051", "IBAN DE89 3704 0044 0532 0130 00"),
    ("personal_data", "warning", "My SSN is 536-22-8726.", "My SSN is 123-45-6789."),
    ("profanity", "warning", "That is bullshit.", "That is nonsense."),
    ("profanity", "warning", "What the f*ck.", "4*55 feet of spic and span rope, f*g."),
    ("markup", "warning", "Bread keeps<br>three days.", "| bread | one<br>two |"),
    (
        "markup",
        "warning",
        "<p>Bread keeps.</p>",
        "`<p>` is a tag, H<sub>2</sub>O is water, and List<T> a type.",
    ),
    ("markup", "warning", "Bread &amp; butter", "Bread & butter; R&D; AT&T;"),
    ("markup", "warning", "Run:\n```sh\nbake --now", "Run:\n```sh\nbake --now\n```\nThen <wait>."),
    (
        "markup",
        "warning",
        "```\nBread keeps. It dries.\n```",
        "```python\nbake()  # Bread keeps. It dries.\n```",
    ),
    ("mojibake", "warning", "A cafÃ© near the sea.", "A café near the sea; ğışİ."),
    ("mojibake", "warning", "A caf\ufffd near the sea.", "Ein Café, 日本語, العربية, ½ × 3 – “so”."),
    ("mojibake", "warning", "Bread\x00 keeps.", "Bread\tkeeps.\r\n"),
    ("template_tokens", "warning", "Fine.<|im_end|>", "In F# `x <| f` pipes, and a <| b |> c too."),
    ("template_tokens", "warning", "Fine. [/INST] More.", "See [1], [INSTALL] and [inst]."),
    ("template_tokens", "warning", "Too subjective.</s>", "It costs <s>20</s> 15."),
    ("template_tokens", "warning", "<s>Fine.</s>", "An <s>old</s> new word."),
    ("template_tokens", "warning", "<s> Fine.", "<s>Old</s> and <s>older</s> words"),
    ("template_tokens", "warning", "Fine.<end_of_turn>", "Fine <end of turn>."),
    (
        "refusals",
        "warning",
        "I'm sorry, but I can't assist with that.",
        "I'm sorry to hear that! Here is what helps.",
    ),
    (
        "refusals",
        "warning",
        "As an AI language model, I do not have opinions.",
        "As an AI of 1997, Deep Blue had none.",
    ),
    ("refusals", "warning", "I cannot and will not delete your files.", "I cannot wait to see your garden."),
    (
        "refusals",
        "warning",
        "Unfortunately, I am unable to open links.",
        "Unfortunately, the link is broken.",
    ),
]


@pytest.mark.parametrize(
    ("rule", "severity", "planted", "twin"),
    PLANTED,
    ids=[f"{rule}-{at}" for at, (rule, *_) in enumerate(PLANTED)],
)
def test_what_is_planted_is_found_with_its_row_and_nothing_in_its_twin(rule, severity, planted, twin):
    (found,) = [one for one in judged([row(), row(planted), row()]) if one.severity != "good"]
    assert (found.rule, found.severity, found.count) == (f"content.{rule}", severity, 1)
    assert [one.source for one in found.rows] == ["rows.jsonl:2"]
    assert found.rows[0].note.startswith("turn 2")
    assert told(row(twin)) == {}


@pytest.mark.parametrize(
    "planted", [planted for rule, _, planted, _ in PLANTED if rule in ("secrets", "personal_data")]
)
def test_no_secret_and_no_datum_is_shown(planted):
    words = max(planted.split(), key=len).strip(".'")
    (found,) = [one for one in judged([row(planted)]) if one.severity != "good"]
    for at in range(len(words) - 7):
        assert words[at : at + 8] not in f"{found.what} {found.hint} {found.rows[0].note}"
    assert planted not in masked(f"expected a role, found {planted}")
    assert masked("Version 1.2.3.4 of a.b") == "Version 1.2.3.4 of a.b"


def test_a_secret_of_the_question_is_not_learned_and_a_fault_of_a_bad_answer_is_what_it_shows():
    key = f"ghp_{made(36)}"
    assert told(row(asked=f"What is {key}?")) == {"content.secrets": "warning"}
    assert told(row(key, label=False)) == {"content.secrets": "error"}  # seen in training all the same
    call = Call("login", {"key": key})
    turns = (
        Message("user", "Log in."),
        Message("assistant", "", (call,)),
        Message("tool", "ok"),
        Message("assistant", "Done."),
    )
    (found,) = [
        one for one in judged([Demonstration(conversation=Conversation(turns))]) if one.severity == "error"
    ]
    assert found.rows[0].note.startswith("turn 2, arguments of login: github token ghp_…")
    for bad in ("That is bullshit.", "<p>Bread.</p>"):
        (rule,) = told(row(bad, label=True))
        assert told(row(bad, label=True))[rule] != told(row(bad, label=False))[rule]
    sides = [
        Conversation((Message("user", ASKED), Message("assistant", text)))
        for text in (SAID, "I can't help with that.<|im_end|>")
    ]
    assert told(Preference(chosen=sides[0], rejected=sides[1])) == {"content.template_tokens": "warning"}
    assert told(Preference(chosen=sides[1], rejected=sides[0])) == {
        "content.template_tokens": "warning",
        "content.refusals": "warning",
    }


def test_control_tokens_that_are_quoted_as_code_are_only_a_warning():
    for quoted in ("ChatML opens with `<|im_start|>`.", "As follows:\n```\n<|im_start|>user\n```\nSo it is."):
        assert told(row(quoted)) == {"content.template_tokens": "warning"}
    assert told(row(asked="What does <|im_start|> mean?")) == {"content.template_tokens": "warning"}


def test_markup_that_is_asked_for_is_no_residue():
    page = "<div><p>Bread &amp; butter</p></div>"
    assert told(row(page)) == {"content.markup": "warning"}
    assert told(row(page, asked="Write it in HTML.")) == {}
    assert told(row(page, asked="What is wrong here? <div><p>Bread</div>")) == {}
    assert told(row("Fine.", asked=page)) == {}
    assert told(row("```\nBread keeps. It dries.\n```", asked="Answer in a code block.")) == {}
    assert told(Document(text="Bread &amp; butter")) == {"content.markup": "warning"}
    assert told(Document(text="In HTML an ampersand is written &amp; everywhere")) == {}


def test_a_fence_is_closed_by_its_kind_alone():
    whole = [
        "```\na\n```",
        "~~~\n```\na\n~~~",
        "````\n```\na\n````",
        "```md\n```py\na\n```\n```",
        "1. so:\n    ```\n    a\n    ```\n2.",
    ]
    for text in whole:
        assert told(row(f"See:\n{text}\nThat is all.")) == {}, text
    for text in ("```\na", "```\na\n~~~", "````\na\n```", "```\na\n```\n```\nb"):
        assert told(row(f"See:\n{text}")) == {"content.markup": "warning"}, text


@pytest.mark.parametrize(
    "harmless",
    [
        "max_tokens: 4096, next_page_token: CAUQAhgB7Kd93kLs",
        "password_hash = hashlib.sha256(password.encode())",
        "token = os.environ['T1']",
        '"token": "mistral-v3-tekken", "GPT2Tokenizer": "GPT2Converter"',
        "password=Passw0rd1A",
        "secret = {{ vault.Key1 }}",
        "api_key: YOUR_API_KEY_1a",
        "git@github.com:acme/site.git",
        "icon@2x.png",
        "react@18.2.0",
        "user@host1",
        "id 4212883012996",
        "session_1731015400000_a1b2c3d4e",
        "0.9235687435",
        "75000-25000=50000",
        "l[::3]",
        "order 7105356608",
        "192.168.0.1 and 8.8.8.0/24",
        "2024-11-06 12:30:45",
        "+1250000 points",
        "978-3-16-148410-0",
        "550e8400-e29b-41d4-a716-446655440000",
    ],
)
def test_numbers_paths_code_and_placeholders_are_neither_secret_nor_personal(harmless):
    assert told(row(f"Here: {harmless}")) == {}


def test_refusals_are_judged_by_their_share_of_what_is_to_be_imitated():
    refusal = row("I'm sorry, but I can't help with that.", label=True)
    fine = [row(label=True)] * 19
    assert told(refusal, *fine) == {"content.refusals": "note"}
    assert told(refusal, *fine[:9]) == {"content.refusals": "note"}  # 10 %
    assert told(refusal, *fine[:8]) == {"content.refusals": "warning"}
    bad = [row("I'm sorry, but I can't help with that.", label=False)] * 30
    (found,) = [one for one in judged([*fine, *bad]) if one.rule == "content.refusals"]
    assert (found.severity, found.count, found.of, found.rows) == ("note", 0, 19, ())
    assert "30 labelled undesirable" in found.what


ENGLISH = (
    "The bread that we baked on Sunday keeps for three days when it is wrapped in a cloth and put "
    "into a wooden box, number "
)
GERMAN = (
    "Das Brot, das wir am Sonntag gebacken haben, hält drei Tage, wenn man es in ein Tuch wickelt und "
    "in eine Kiste legt."
)
FRENCH = (
    "Le pain que nous avons cuit dimanche se garde trois jours si on l'enveloppe dans un linge et le "
    "met dans une boîte en bois."
)


def test_rows_in_a_rare_language_are_named_the_rarest_first():
    english = [row(f"{ENGLISH}{number}.") for number in range(200)]
    assert told(*english) == {}
    share, strays = (
        one
        for one in judged([*english, row(GERMAN), row(GERMAN), row(FRENCH)])
        if one.rule == "content.languages"
    )
    assert (share.severity, share.count, share.of) == ("note", 3, 203)
    assert "en 98.5%, de 1.0%, fr 0.5%" in share.what
    assert [(one.source, one.note) for one in strays.rows] == [
        ("rows.jsonl:203", "in fr"),
        ("rows.jsonl:201", "in de"),
        ("rows.jsonl:202", "in de"),
    ]
    assert told(*english, *[row(GERMAN)] * 20) == {"content.languages": "note"}
    assert told(*english, row(GERMAN[:70])) == {}, "too short to tell"


def test_swear_words_are_those_of_english():
    assert told(row("The end is near, you slut.")) == {"content.profanity": "warning"}
    swedish = (
        "Vi bakade brödet i söndags och det håller i tre dagar om man lägger det i en låda av trä, "
        "men sedan är det slut på allt."
    )
    assert "content.profanity" not in told(row(swedish))


def test_what_was_not_scanned_is_said():
    key = f"ghp_{made(36)}"
    assert told(row(f"{'so on ' * 1000}{key}")) == {"content.secrets": "error"}
    assert told(row(f"{'so on ' * (SCANNED // 6 + 1)}{key}")) == {"content.unscanned": "note"}


@pytest.mark.parametrize(
    "letter",
    ["a", "7", "<", "@", "\x00", "\ud800", "`", "&", "<s></s>", "a@a.", "a://a:b@", "password ", "I am "],
)
def test_ten_million_letters_are_looked_at_in_part(letter):
    text = letter * (10_000_000 // len(letter))
    message = Message("assistant", text)
    example = Demonstration(id="0" * 16, conversation=Conversation((Message("user", text), message)))
    view = View("x", example)
    kept = RULE.look(view, CONTEXT)
    assert "unscanned" in {hit.rule for hit in kept.hits}
    assert len(pickle.dumps(kept)) < 5_000


def test_many_turns_that_all_are_at_fault_are_told_in_a_line():
    turns = [
        turn
        for _ in range(2_000)
        for turn in (Message("user", "More?"), Message("assistant", "So <br> it &amp; is.<|im_end|>"))
    ]
    for found in judged([Demonstration(conversation=Conversation(tuple(turns)))]):
        assert all(len(one.note) < 200 for one in found.rows)


@settings(max_examples=150, deadline=None)
@given(
    st.text(st.characters(exclude_categories=()), max_size=300)
    | st.text("<s/>|[]`~\n&;@.:-a1 I'm", max_size=300)
)
def test_no_text_breaks_it(text):
    for found in judged([row(text, text), Document(id="0" * 16, text=text)]):
        assert 0 <= found.count <= found.of


def test_rows_of_use_hold_no_secret_and_no_false_alarm(syngen):
    read = formats.read([syngen], formats.DataSpec(train="x"))
    found = {one.rule: one for one in judged(read.examples)}
    assert set(found) == {"content.refusals", "content.languages"}
    assert (found["content.refusals"].count, found["content.languages"].severity) == (0, "good")


def test_what_real_rows_hide_is_found(data_dir):
    def rows(name: str) -> dict[tuple[str, str], set[int]]:
        path = data_dir(name)
        read = formats.read([path], formats.DataSpec(train="x"))
        places = {
            f"rows.jsonl:{at}": int(Path(one.source).name.partition(":")[2])
            for at, one in enumerate(read.examples, 1)
        }
        return {
            (one.rule, one.severity): {places[where.source] for where in one.rows}
            for one in judged(read.examples)
        }

    kto, dpo = rows("formats/kto_en_demo.json"), rows("formats/dpo_en_demo.json")
    assert kto["content.template_tokens", "warning"] == {
        2497,
        4759,
    }  # undesirable: </s> and <|user|> in the answer
    assert kto["content.mojibake", "warning"] == {4531, 4809}
    assert 2230 in kto["content.markup", "note"]  # a page of a forum, tags and all
    assert dpo["content.mojibake", "warning"] == {286, 6934}
    assert {138, 3022, 4190} <= dpo["content.markup", "warning"]  # code that breaks off
    glaive = rows("formats/glaive_toolcall_en_demo.json")
    assert len(glaive["content.refusals", "warning"]) == 44
    assert "content.personal_data" not in {rule for rule, _ in [*kto, *dpo, *glaive]}
