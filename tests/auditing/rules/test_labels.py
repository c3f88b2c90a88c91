"""Suspicious labels: leave-one-out against refitting, the interval against simulation, flips found, clean
twins quiet."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tunesmith.auditing import AuditSpec
from tunesmith.auditing.findings import Finding
from tunesmith.auditing.rules import labels
from tunesmith.auditing.rules.labels import Labels, leave_one_out, skill_of
from tunesmith.auditing.views import Context, Survey, View
from tunesmith.data.examples import Conversation, Demonstration, Judged, Message
from tunesmith.data.formats import DataSpec, read

SHARED = (
    "the file was opened at noon by a person who read every line of it twice before lunch and then went home"
).split()
SIDES = {
    True: "done saved verified summary found listed".split(),
    False: "sorry wrong failed guess unclear broken".split(),
}


def said(random: np.random.Generator, side: bool) -> str:
    """Words that both sides use, and four of which one side uses at least three."""
    sides = [side] * 3 + [side if random.random() < 0.8 else not side]
    return " ".join(
        random.permutation([*random.choice(SHARED, 12), *(random.choice(SIDES[one]) for one in sides)])
    )


def rows(count: int, seed: int = 0) -> tuple[list[str], list[bool]]:
    random = np.random.Generator(np.random.PCG64(seed))
    sides = [at % 3 != 0 for at in range(count)]
    return [said(random, side) for side in sides], sides


def judged(texts: Sequence[str], given: Sequence[bool | None]) -> dict[str, Finding]:
    views: list[View] = []
    for at, (text, label) in enumerate(zip(texts, given, strict=True)):
        turns = Conversation((Message("user", f"row {at}"), Message("assistant", text)))
        made = Demonstration(turns) if label is None else Judged(turns, label)
        views.append(View(f"rows.jsonl:{at}", made))
    return judge(views)


def judge(views: Sequence[View]) -> dict[str, Finding]:
    spec = AuditSpec.model_validate({})
    survey = Survey(
        spec, [one.source for one in views], [one.label for one in views], [one.dropped for one in views]
    )
    kept = [Labels().look(one, Context(spec)) for one in views]
    return {one.rule: one for one in Labels().judge(kept, survey)}


def lines(finding: Finding) -> list[int]:
    return [int(row.source.rpartition(":")[2]) for row in finding.rows]


@pytest.mark.parametrize("width", [1, 12, 100])
def test_leaving_a_row_out_is_fitting_without_it(width):
    from sklearn.linear_model import Ridge

    random = np.random.Generator(np.random.PCG64(width))
    table, given = random.normal(0, 0.3, (60, width)), random.random(60) < 0.7
    weight = 60 / 2 / np.where(given, given.sum(), (~given).sum())
    found = leave_one_out(table, given)
    for at in range(60):
        rest = np.arange(60) != at
        model = Ridge(alpha=labels.PENALTY, solver="cholesky")
        model.fit(table[rest], np.where(given, 1.0, -1.0)[rest], sample_weight=weight[rest])
        assert found[at] == pytest.approx(model.predict(table[at : at + 1])[0], abs=1e-9)


@pytest.mark.parametrize("distance", [0.5, 1.5])
def test_the_interval_is_as_wide_as_repeated_draws_scatter(distance):
    random = np.random.Generator(np.random.PCG64(0))
    given = np.arange(120) % 4 != 0
    drawn = [skill_of(random.normal(0, 1, 120) + distance * given, given) for _ in range(400)]
    reach = np.mean([(one.high - one.low) / 2 for one in drawn if one.high < 1])
    assert reach == pytest.approx(1.96 * np.std([one.area for one in drawn]), rel=0.2)
    assert all(one.low <= one.area <= one.high for one in drawn)


def test_flipped_labels_are_found_and_their_clean_twin_has_none():
    """Over five sets of 300 rows with 10 labels flipped: nearly all of them, and hardly another."""
    right = named = 0
    for seed in range(5):
        texts, sides = rows(300, seed)
        clean = judged(texts, sides)
        assert [one.severity for one in clean.values()] == ["good"], clean
        random = np.random.Generator(np.random.PCG64(seed))
        flipped = random.choice(300, 10, replace=False).tolist()
        found = judged(texts, [side != (at in flipped) for at, side in enumerate(sides)])["labels.suspicious"]
        assert found.severity == "note" and found.count == len(found.rows) <= labels.AT_LEAST
        assert lines(found)[0] in flipped
        right += len(set(lines(found)) & set(flipped))
        named += found.count
    assert right >= 43 and named - right <= 3


@given(st.integers(0, 10_000), st.floats(0.1, 1.5))
@settings(max_examples=50, deadline=None)
def test_however_weak_the_model_only_rows_it_scores_as_the_other_label_are_named(seed, distance):
    random = np.random.Generator(np.random.PCG64(seed))
    given = random.random(100) < 0.5
    table = random.normal(0, 1, (100, 3)) + distance * given[:, None]
    scores = leave_one_out(table, given)
    named = labels.suspicious(table, scores, given)
    assert len(named) <= labels.AT_LEAST
    assert all((scores[at] > 0) != given[at] and given[other] != given[at] for at, other in named)
    assert [abs(scores[at]) for at, _ in named] == sorted((abs(scores[at]) for at, _ in named), reverse=True)


def test_a_row_that_repeats_another_under_the_opposite_label_is_named_with_it():
    texts, sides = rows(300)
    texts[7], sides[7] = texts[8], not sides[8]
    found = judged(texts, sides)["labels.suspicious"]
    (note,) = [row.note for row in found.rows if row.source == "rows.jsonl:7"]
    assert "rows.jsonl:" in note and ("undesirable, reads like desirable" in note) != sides[7]
    other = int(note.partition("rows.jsonl:")[2].partition(",")[0])
    assert sides[other] != sides[7]


def test_labels_that_words_do_not_tell_name_no_row():
    random = np.random.Generator(np.random.PCG64(0))
    for seed in range(5):
        texts, _ = rows(300, seed)
        found = judged(texts, (random.random(300) < 0.6).tolist())
        assert [one.rule for one in found.values()] == ["labels.predictable"]
        assert found["labels.predictable"].severity == "note" and found["labels.predictable"].value < 0.65


@pytest.mark.parametrize(
    ("count", "given"),
    [
        (29, lambda at: at % 2 == 0),
        (200, lambda at: True),
        (200, lambda at: at >= 4),
        (200, lambda at: None if at > 20 else at > 9),
    ],
    ids=["29 rows", "one label", "4 of a label", "most without"],
)
def test_too_few_labels_are_said_to_be_so(count, given):
    (found,) = judged(rows(count)[0], [given(at) for at in range(count)]).values()
    assert (found.rule, found.severity, found.rows) == (
        "labels.predictable",
        "note",
        (),
    ) and "too few" in found.what


def test_rows_without_labels_have_no_findings():
    assert judged(rows(60)[0], [None] * 60) == judged([], []) == {}


@pytest.mark.parametrize(
    "texts", [["same words"] * 60, ["…"] * 60, ["a"] * 60, [f"only{at}" for at in range(60)], ["\x00"] * 60]
)
def test_rows_without_words_of_their_own_name_no_row(texts):
    (found,) = judged(texts, [at % 2 == 0 for at in range(60)]).values()
    assert (found.rule, found.severity) == ("labels.predictable", "note")


def test_only_the_beginning_of_a_long_row_is_looked_at():
    turns = Conversation((Message("user", "go"), Message("assistant", "word " * 50_000)))
    kept = Labels().look(View("rows.jsonl:1", Judged(turns, True)), Context(AuditSpec.model_validate({})))
    assert kept is not None and len(kept) == labels.WORDS


def views(path) -> list[View]:
    return [View(one.source, one) for one in read([path], DataSpec(train=(str(path),))).examples]


def test_the_reference_data(syngen):
    """Words tell its labels well. Line 954 loads a workspace and says "Resource access granted." as a
    desirable answer."""
    found = judge(views(syngen))
    assert found["labels.predictable"].severity == "good" and 0.87 < found["labels.predictable"].value < 0.93
    assert lines(found["labels.suspicious"])[0] == 954 and found["labels.suspicious"].count <= 20


def test_labels_that_were_drawn_at_random_are_not_told(data_dir):
    found = judge(views(data_dir("formats/kto_en_demo.json")))
    assert set(found) == {"labels.predictable"} and found["labels.predictable"].severity == "note"
