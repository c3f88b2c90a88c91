"""Lengths and tokens: planted in sequences of known ids, found with their row, and nothing in the clean
twin."""

from __future__ import annotations

import numpy as np
import pytest

from tunesmith.auditing import AuditSpec, survey
from tunesmith.auditing.findings import Audit, Finding
from tunesmith.auditing.views import Context
from tunesmith.data.examples import Conversation, Demonstration, Example, Message
from tunesmith.tokens import renderers
from tunesmith.tokens.template import Refused, Row, Tokens

BOS, EOS, UNKNOWN, CALL, WORD = 1, 2, 0, 5, 1000  # of Mistral's v3


def example(line: int) -> Demonstration:
    turns = (Message("user", f"Say word {line}"), Message("assistant", f"Word {line} [/INST]."))
    return Demonstration(Conversation(turns), source=f"rows.jsonl:{line}")


def sequence(prompt: list[int], answer: list[int], learned: float = 1.0) -> Row:
    ids = np.array([*prompt, *answer], dtype=np.int32)
    targets = np.array([0.0] * len(prompt) + [learned] * len(answer), dtype=np.float32)
    return Row(Tokens(ids, targets), "", "", 1, None)


def judged(rows: list[Row | Refused], limit: int = 2048, **asked: object) -> Audit:
    examples = [example(line) for line in range(1, len(rows) + 1)]
    known = {one.source: row for one, row in zip(examples, rows, strict=True)}

    def rendered(one: Example) -> list[Row]:
        found = known[one.source]
        if isinstance(found, Refused):
            raise found
        return [found]

    spec = AuditSpec.model_validate(asked)
    context = Context(
        spec, limit, renderer=renderers.load("mistral-v3"), tokenizer="mistral-v3", rendered=rendered
    )
    return survey.examine(examples, {"rows.jsonl": ""}, context)


def of(found: Audit, rule: str) -> Finding:
    (one,) = [one for one in found.findings if one.rule == rule]
    return one


CLEAN = [sequence([BOS, 3, *[WORD] * 20, 4], [*[WORD + 1] * 99, EOS]) for _ in range(30)]
FAULTS = {
    "unknown": sequence([BOS, 3, UNKNOWN, 4], [WORD, UNKNOWN, EOS]),
    "bos": sequence([BOS, BOS, WORD], [WORD, EOS]),
    "no_target": sequence([BOS, WORD], [WORD, EOS], learned=0.0),
    "control": sequence([BOS, WORD], [WORD, 4, WORD, EOS]),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_wrong_sequence_is_an_error_with_its_row(name):
    assert {one.severity for one in judged(CLEAN).findings if one.dimension == "tokenisation"} == {"good"}
    found = judged([*CLEAN, FAULTS[name]])
    one = of(found, f"tokenisation.{name}")
    mild = name == "unknown"  # in few rows
    assert (one.severity, one.count) == ("warning" if mild else "error", 1) and one.rows[
        0
    ].source == "rows.jsonl:31"
    others = [each for each in found.findings if each.dimension == "tokenisation" and each is not one]
    assert {each.severity for each in others} == {"good"}
    if mild:
        assert of(judged([*CLEAN, *[FAULTS[name]] * 2]), "tokenisation.unknown").severity == "error"
        return
    with pytest.raises(survey.DataError, match=rf"tokenisation\.{name}: 1 row .*\(rows\.jsonl:31\)"):
        survey.require(found)


def test_a_bos_that_is_missing_is_one_too():
    assert of(judged([*CLEAN, sequence([WORD], [WORD, EOS])]), "tokenisation.bos").severity == "error"


def test_the_token_that_opens_a_call_and_the_one_that_ends_it_are_in_their_place():
    assert (
        of(judged([*CLEAN, sequence([BOS, WORD], [CALL, WORD, EOS])]), "tokenisation.control").severity
        == "good"
    )


def test_the_end_token_is_no_unknown_one_where_a_tokenizer_has_one_for_both(monkeypatch):
    from tunesmith.tokens.renderers import MistralRenderer

    made = MistralRenderer.__init__

    def both(self, *path):
        made(self, *path)
        self.unknown_id = EOS

    monkeypatch.setattr(MistralRenderer, "__init__", both)
    assert of(judged(CLEAN), "tokenisation.unknown").severity == "good"


def test_a_control_token_of_the_template_is_none_of_the_words():
    assert (
        of(judged([*CLEAN, sequence([BOS, WORD], [WORD, 6, WORD, EOS])]), "tokenisation.control").severity
        == "good"
    )


def test_rows_that_the_template_refuses_are_a_warning_and_from_many_on_an_error():
    """They are left out of training, counted, up to the share that may be."""
    refused = Refused("words", "the learned tokens read otherwise")
    few, many = (judged([*CLEAN, *CLEAN, *[refused] * count]) for count in (3, 4))
    assert of(few, "tokenisation.words").severity == "warning" and of(few, "tokenisation.words").count == 3
    assert of(many, "tokenisation.words").severity == "error"
    assert of(judged([*CLEAN, Refused("left_out", "a role")]), "tokenisation.left_out").severity == "warning"


def test_lengths_are_held_against_their_bars():
    found = judged(CLEAN)
    assert of(found, "length.answers").value == 100 and of(found, "length.tail").value == 123
    assert {one.severity for one in found.findings if one.dimension == "length"} == {"good"}
    for low, high in ((101, 200), (10, 99)):
        assert of(judged(CLEAN, mean_answer=[low, high]), "length.answers").severity == "warning"
    assert of(judged(CLEAN, tail=123), "length.tail").severity == "warning"
    assert of(judged(CLEAN, tail=124), "length.tail").severity == "good"


def test_rows_beyond_the_limit_and_outliers_are_named_the_longest_first():
    long = [sequence([BOS, WORD], [WORD] * size) for size in (1200, 1500)]
    found = judged([*CLEAN, *long, sequence([BOS], [EOS])], limit=1000)
    one = of(found, "length.limit")
    assert (one.severity, [row.source for row in one.rows]) == ("warning", ["rows.jsonl:32", "rows.jsonl:31"])
    assert of(judged([*CLEAN, *long], limit=1502), "length.limit").severity == "good"
    out = of(found, "length.outliers")
    assert {row.source for row in out.rows} == {
        f"rows.jsonl:{line}" for line in (31, 32, 33)
    } and out.severity == "note"


def test_without_a_tokenizer_words_are_counted_and_no_bar_in_tokens_is_applied():
    found = survey.examine([example(1), example(2)], {"rows.jsonl": ""}, Context(AuditSpec()))
    assert of(found, "length.answers").value == 3 and "words" in of(found, "length.answers").what
    assert not [
        one
        for one in found.findings
        if one.rule in ("length.tail", "length.limit") or one.dimension == "tokenisation"
    ]
    assert found.charts["lengths"]["unit"] == "words"
