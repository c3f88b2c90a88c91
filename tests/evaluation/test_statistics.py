"""Laws of the statistics: intervals hold what they promise, p values are what they say, and no order or cut
changes a number."""

from __future__ import annotations

import itertools
import math
import random
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import stdtrit
from scipy.stats import binomtest, multinomial, ttest_rel

from tunesmith.errors import EvaluationError
from tunesmith.evaluation import statistics
from tunesmith.evaluation.statistics import (
    ALIKE,
    ONE,
    PAIRED,
    Statistic,
    Target,
    change,
    holm,
    judge,
    mcnemar,
    paired,
    summarise,
)
from tunesmith.evaluation.tasks import Task
from tunesmith.evaluation.tasks.perplexity import Perplexity, RowLoss
from tunesmith.runs.records import ExampleScore, Score


class Plain(Task[ExampleScore]):
    """One statistic, the mean of ``value``; what is measured is the score."""

    name, version, parts, cached, needs_base, identity = "plain", "1", ("kind",), False, False, "0"

    def __init__(self, **options) -> None:
        options = {"better": "higher", "headline": True} | options
        self.statistics = (Statistic("mean", lambda one: one.value, **options),)

    def measure(self, subject):
        raise NotImplementedError

    def score(self, items):
        return list(items)


SHARE = Plain(share=True)


def scored(values, sources=None, units=None) -> list[ExampleScore]:
    sources = range(len(values)) if sources is None else sources
    units = np.ones(len(values)) if units is None else units
    return [
        ExampleScore(f"x:{source}", float(value), float(unit))
        for source, value, unit in zip(sources, values, units, strict=True)
    ]


def first(base, tuned, seed: int = 0, task: Task = Plain()) -> Score:  # noqa: B008
    return summarise(task, base, tuned, seed)[0]


# --- what intervals and p values promise
# ------------------------------------------------------------------------------


def normal(chance, n, gain):
    base = chance.normal(0, 3, n)
    return base, base + chance.normal(gain, 1, n), None, None


def skewed(chance, n, gain):
    """Losses have a long tail, and large ones move more: gains have a skewness of 1."""
    base = chance.exponential(2, n)
    return base, base + chance.gamma(4, 0.5, n) - 2 + gain, None, None


def clustered(chance, n, gain):
    """Turns of one conversation move together."""
    turns = chance.integers(1, 4, n)
    sources = np.repeat(np.arange(n), turns)
    base = chance.normal(0, 2, len(sources))
    return (
        base,
        base + gain + np.repeat(chance.normal(0, 1, n), turns) + chance.normal(0, 0.5, len(sources)),
        sources,
        None,
    )


def weighted(chance, n, gain):
    """Rows have unlike numbers of tokens."""
    base = chance.gamma(4, 0.5, n)
    return base, base + chance.normal(gain, 0.5, n), None, chance.integers(20, 200, n)


def binary(chance, n, gain):
    """Right or wrong, half of the answers the same on both sides."""
    base = chance.random(n) < 0.5
    flip, up = chance.random(n) < 0.5, chance.random(n) < 0.5 + gain
    return np.where(flip, ~up, base), np.where(flip, up, base), None, None


def simulated(kind, gain: float, times: int):
    """Scores of ``times`` data sets of 20 to 200 sources each."""
    task = SHARE if kind is binary else Plain()
    for number in range(times):
        chance = np.random.default_rng([number, len(kind.__name__)])
        n = int(chance.choice([20, 30, 50, 80, 200], p=[0.3, 0.25, 0.25, 0.15, 0.05]))
        base, tuned, sources, units = kind(chance, n, gain)
        yield first(scored(base, sources, units), scored(tuned, sources, units), number, task)


@pytest.mark.parametrize("kind", [normal, skewed, clustered, weighted, binary])
def test_the_paired_interval_covers_a_planted_difference_in_95_of_100_data_sets(kind, monkeypatch):
    monkeypatch.setattr(statistics, "RESAMPLES", 400)
    gain = 0.3  # of binary: 0.5 · (0.8 − 0.2)
    found = [score.delta_low <= gain <= score.delta_high for score in simulated(kind, gain, 1000)]
    assert 0.93 <= np.mean(found) <= 0.97


@pytest.mark.parametrize("kind", [normal, skewed, clustered, binary])
def test_two_noisy_measurements_of_the_same_show_no_difference_in_95_of_100_data_sets(kind, monkeypatch):
    monkeypatch.setattr(statistics, "RESAMPLES", 400)
    scores = list(simulated(kind, 0.0, 400))
    low, high = binomtest(20, 400).proportion_ci(0.99)
    low = 0.0 if kind is binary else low  # McNemar's is exact, so at most
    assert low <= np.mean([score.p < 0.05 for score in scores]) <= high
    verdicts = Counter(verdict.verdict for score in scores for verdict in judge([score]))
    assert verdicts["no difference shown"] / 400 >= 1 - high
    assert min(verdicts["improved"], verdicts["regressed"]) > 0


def test_a_model_against_itself_shows_no_difference():
    values = scored(np.random.default_rng(0).normal(size=30))
    found = judge([first(values, values)])[0]
    assert (found.delta, found.delta_low, found.delta_high, found.p, found.sources) == (
        0,
        0,
        0,
        1,
        (0, 30, 0),
    )
    assert found.verdict == "no difference shown"


def test_p_is_the_level_at_which_the_interval_first_leaves_zero_out(monkeypatch):
    for wanted in (0.02, 0.05, 0.2, 0.6):
        chance = np.random.default_rng(int(100 * wanted))
        base, noise = chance.normal(size=(2, 25))
        gain = -stdtrit(24, wanted / 2) * noise.std(ddof=1) / 5
        sides = scored(base), scored(base + gain + noise - noise.mean())
        p = first(*sides).p
        assert p == pytest.approx(wanted, rel=0.4)  # of Student's t
        for level, outside in ((p * 1.05 + 0.001, True), (p * 0.95 - 0.001, False)):
            monkeypatch.setattr(statistics, "TAIL", level / 2)
            found = first(*sides)
            assert (found.delta_low > 0 or found.delta_high < 0) is outside


@pytest.mark.parametrize("n", [20, 50, 200])
def test_what_is_plain_is_shown_among_many(n):
    """Were p no smaller than the share of one resample, nothing could be shown among a hundred."""
    chance = np.random.default_rng(n)
    base = chance.normal(size=n)
    tuned = base + chance.normal(2, 1, n)
    found = first(scored(base), scored(tuned))
    exact = float(ttest_rel(tuned, base).pvalue)
    assert max(exact, 1e-14) ** 1.35 < found.p < max(exact, 1e-14) ** 0.65
    assert judge([found, *[judged_alone(0.9)] * 200])[0].verdict == "improved"


def test_the_interval_is_the_one_that_theory_gives():
    """Against the normal approximation of a mean: ±1.96·s/√n."""
    values = list(np.random.default_rng(3).normal(5.0, 2.0, 400))
    found = first(None, scored(values))
    half = 1.96 * np.std(values) / math.sqrt(400)
    assert found.value == pytest.approx(np.mean(values))
    assert found.low == pytest.approx(found.value - half, abs=0.1 * half)
    assert found.high == pytest.approx(found.value + half, abs=0.1 * half)
    assert found.note is None


def test_the_difference_is_paired():
    """A constant gain on very unlike rows: an unpaired interval would be wide and cross zero."""
    base = list(np.random.default_rng(1).normal(0.0, 10.0, 60))
    tuned = [
        value + gain for value, gain in zip(base, np.random.default_rng(2).normal(1.0, 0.1, 60), strict=True)
    ]
    found = first(scored(base), scored(tuned))
    assert found.delta == pytest.approx(np.mean(tuned) - np.mean(base))
    assert 0.9 < found.delta_low < found.delta < found.delta_high < 1.1
    assert found.high - found.low > 2


def test_turns_of_one_source_are_drawn_together():
    """Ten copies of each row are no more evidence than one."""
    values = [0.0, 1.0] * 15
    once, copies = first(None, scored(values)), first(None, scored(values) * 10)
    assert (once.value, once.low, once.high, once.n) == (copies.value, copies.low, copies.high, copies.n)


def test_all_turns_of_a_source_count_by_their_weight():
    chance = np.random.default_rng(0)
    base, tuned, units = chance.normal(size=30), chance.normal(size=30), chance.integers(1, 9, 30)
    found = first(*(scored(values, np.arange(30) % 7, units) for values in (base, tuned)))
    assert found.n == 7
    assert found.value == pytest.approx(np.average(tuned, weights=units))
    assert found.delta == pytest.approx(np.average(tuned - base, weights=units))


# --- yes or no
# --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("gained", "lost"), [(gained, lost) for gained in range(8) for lost in range(7)])
def test_mcnemar_counts_all_ways_in_which_as_many_answers_could_have_changed(gained, lost):
    ways = list(itertools.product((0, 1), repeat=gained + lost))
    as_far = sum(abs(2 * sum(way) - len(way)) >= abs(gained - lost) for way in ways)
    assert mcnemar(gained, lost) == pytest.approx(as_far / len(ways))


@settings(max_examples=30, deadline=None)
@given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=2, max_size=60))
def test_p_of_yes_or_no_is_mcnemars_whatever_the_unchanged(pairs):
    base, tuned = zip(*pairs, strict=True)
    gained, lost = pairs.count((False, True)), pairs.count((True, False))
    found = first(scored(base), scored(tuned), task=SHARE)
    assert found.test == statistics.MCNEMAR
    assert found.p == pytest.approx(binomtest(gained, gained + lost).pvalue if gained + lost else 1.0)
    assert found.sources == (gained, len(pairs) - gained - lost, lost)
    assert found.delta_low <= found.delta + 1e-12 and found.delta - 1e-12 <= found.delta_high


@pytest.mark.parametrize(("up", "down"), [(0.3, 0.3), (0.3, 0.1), (0.5, 0.05), (0.15, 0.15), (0.4, 0.4)])
@pytest.mark.parametrize("n", [20, 60])
def test_the_interval_of_a_paired_share_covers_by_full_enumeration(n, up, down):
    """Every table of n answers with its chance."""
    tables = np.array(
        [(gained, lost, n - gained - lost) for gained in range(n + 1) for lost in range(n + 1 - gained)]
    )
    chances = multinomial(n, [up, down, 1 - up - down]).pmf(tables)
    ends = [paired(int(gained), int(lost), n) for gained, lost, _ in tables]
    covered = sum(
        chance for chance, (low, high) in zip(chances, ends, strict=True) if low <= up - down <= high
    )
    assert 0.94 <= covered <= 0.98


def test_answers_that_are_not_alone_or_weigh_unlike_are_bootstrapped():
    values = [0, 1, 1, 0, 1, 1, 0, 1, 0, 1]
    for more in ({"sources": [0, 0, *range(8)]}, {"sources": [*range(5)] * 2}, {"units": range(1, 11)}):
        found = first(scored([0] * 10, **more), scored(values, **more), task=SHARE)
        assert found.test == statistics.BOOTSTRAP
        assert 0 <= found.delta_low < found.delta < found.delta_high <= 1


# --- many at once
# -----------------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.sampled_from([0.0, 0.001, 0.01, 0.0125, 0.02, 0.05, 0.3, 1.0]) | st.floats(0, 1), max_size=6)
)
def test_holm_is_the_closed_test_by_bonferroni(ps):
    """Brute force: the largest Bonferroni p of all sets of hypotheses that hold this one (Marcus, Peritz and
    Gabriel 1976)."""
    sets = [some for size in range(1, len(ps) + 1) for some in itertools.combinations(range(len(ps)), size)]
    expected = [
        max(min(1.0, len(some) * min(ps[at] for at in some)) for some in sets if one in some)
        for one in range(len(ps))
    ]
    assert holm(ps) == pytest.approx(expected)


def judged_alone(p: float | None, delta: float = 1.0, **more) -> Score:
    return Score(
        "t", "1", "s", 1.0, None, None, 9, delta=delta, p=p, **({"better": "higher", "headline": True} | more)
    )


def test_headlines_are_one_family_and_the_rest_another():
    scores = [
        judged_alone(0.02),
        judged_alone(0.04),
        judged_alone(0.001, headline=False),
        judged_alone(0.03, better=None),
        judged_alone(None),
        judged_alone(0.02, headline=False),
        judged_alone(0.02, headline=False),
    ]
    found = judge(scores)
    assert [one.p_corrected for one in found] == [0.04, 0.04, 0.003, None, None, 0.04, 0.04]
    assert [replace(one, p_corrected=None, verdict=None) for one in found] == scores
    more = judge([*scores, *[judged_alone(0.9)] * 3])
    assert [one.verdict for one in more[:3]] == ["no difference shown", "no difference shown", "improved"]


@pytest.mark.parametrize(
    ("better", "delta", "p", "verdict"),
    [
        ("higher", 1.0, 0.01, "improved"),
        ("higher", -1.0, 0.01, "regressed"),
        ("lower", 1.0, 0.01, "regressed"),
        ("lower", -1.0, 0.01, "improved"),
        ("lower", -1.0, 0.05, "no difference shown"),
        ("higher", 0.0, 0.01, "no difference shown"),
        (None, 1.0, 0.01, None),
    ],
)
def test_which_way_is_good_decides_the_verdict(better, delta, p, verdict):
    assert judge([judged_alone(p, delta, better=better)])[0].verdict == verdict


@pytest.mark.parametrize(("better", "sources"), [("higher", (2, 2, 1)), ("lower", (1, 2, 2)), (None, None)])
def test_each_source_is_improved_unchanged_or_regressed(better, sources):
    task = Plain(better=better, change=0.1)
    base, tuned = [0.0] * 5, [1.0, 0.2, 0.1, -0.05, -0.5]
    assert first(scored(base), scored(tuned), task=task).sources == sources
    said = [change(task.statistics[0], *pair) for pair in zip(base, tuned, strict=True)]
    assert Counter(said) == (
        {None: 5}
        if sources is None
        else dict(zip(("improved", "unchanged", "regressed"), sources, strict=True))
    )
    assert change(task.statistics[0], None, 1.0) is None


# --- targets
# ----------------------------------------------------------------------------------------------------------

NOISE = np.random.default_rng(5).normal(0, 1, 50)


@pytest.mark.parametrize(
    ("target", "gain", "met"),
    [
        (Target(share=0.95), 0.0, True),
        (Target(share=0.95), -3.0, False),
        (Target(share=0.95), -0.5, None),
        (Target(change=1.0), 0.0, True),
        (Target(change=1.0), 3.0, False),
        (Target(change=1.0), -3.0, False),
        (Target(change=1.0), 1.0, None),
        (Target(change=1.0), -1.0, None),
        (None, 0.0, None),
    ],
)
def test_a_target_is_met_missed_or_not_shown(target, gain, met):
    """Of a base of 10: at least 9.5, or within 1."""
    base = 10 + np.roll(NOISE, 1)
    found = first(scored(base), scored(base + gain + NOISE - NOISE.mean()), task=Plain(target=target))
    assert (found.met, found.target) == (met, None if target is None else str(target))
    assert first(None, scored(base), task=Plain(target=target)).met is None


@pytest.mark.parametrize(("n", "met"), [(20, None), (400, True)])
def test_that_no_answer_changed_shows_less_of_few(n, met):
    same = scored([0, 1] * (n // 2))
    assert first(same, same, task=Plain(share=True, target=Target(change=0.05))).met is met
    assert first(same, same, task=Plain(share=True, target=Target(share=0.95))).met is met


# --- no order and no cut changes anything
# -----------------------------------------------------------------------------


@settings(max_examples=30, deadline=None)
@given(st.integers(2, 30), st.integers(0, 2**32), st.booleans())
def test_the_order_of_examples_changes_nothing(n, seed, with_base):
    chance = np.random.default_rng(seed)
    base, tuned = scored(chance.normal(size=n)), scored(chance.normal(size=n))
    order = random.Random(seed).sample(range(n), n)
    shuffled = [[side[at] for at in order] for side in (base, tuned)]
    assert summarise(Plain(), base if with_base else None, tuned, 0) == summarise(
        Plain(), shuffled[0] if with_base else None, shuffled[1], 0
    )


def test_neither_memory_nor_a_base_changes_an_interval(monkeypatch):
    base, tuned = (scored(np.random.default_rng(at).normal(size=37)) for at in (0, 1))
    found = first(base, tuned)
    alone = first(None, tuned)
    assert (found.low, found.high) == (alone.low, alone.high)
    monkeypatch.setattr(statistics, "DRAWN", 1000)
    assert first(base, tuned) == found


def test_the_same_seed_gives_the_same_interval_and_another_seed_another():
    scores = scored(list(np.random.default_rng(0).normal(size=40)))
    np.random.seed(1)
    again = first(None, scores, 5)
    np.random.seed(2)
    assert first(None, scores, 5) == again
    assert first(None, scores, 5).low != first(None, scores, 6).low


def test_parts_are_scored_as_if_they_were_alone():
    def side(seed: int, kinds: str) -> list[ExampleScore]:
        values = np.random.default_rng(seed).normal(size=30)
        return [
            replace(one, detail={"kind": kind} if kind != "-" else {})
            for one, kind in zip(scored(values), kinds * 10, strict=True)
        ]

    base, tuned = side(0, "ab-"), side(1, "ab-")
    found = {score.part: score for score in summarise(Plain(), base, tuned, 0)}
    assert list(found) == [None, "kind=a", "kind=b"]
    alone = first(*([one for one in side if one.detail.get("kind") == "b"] for side in (base, tuned)))
    assert found["kind=b"] == replace(alone, part="kind=b", headline=False)
    assert [score.part for score in summarise(Plain(), side(0, "aaa"), side(1, "aaa"), 0)] == [None]


# --- degenerate
# -------------------------------------------------------------------------------------------------------


def test_degenerate_cases_say_so():
    alike = first(None, scored([1.0] * 20), task=SHARE)
    assert (alike.value, alike.high) == (1.0, 1.0)
    assert alike.low == pytest.approx(0.025 ** (1 / 20))  # 0 failures of 20
    assert alike.low == pytest.approx(binomtest(20, 20).proportion_ci(method="exact").low)
    assert "binomial" in str(alike.note)
    none = first(None, scored([0.0] * 20), task=SHARE)
    assert (none.low, none.high) == (0.0, pytest.approx(1 - 0.025 ** (1 / 20)))
    moved = first(scored([0.0] * 20), scored([1.0] * 20), task=SHARE)
    assert (moved.delta, moved.delta_low, moved.delta_high) == (1.0, *paired(20, 0, 20))
    assert 0.7 < moved.delta_low < 0.9 and moved.delta_high == 1.0
    assert PAIRED in str(moved.note)
    apart = first(scored([0.0] * 20), scored([2.0] * 20))
    assert (apart.delta, apart.delta_low, apart.delta_high, apart.note) == (
        2.0,
        2.0,
        2.0,
        f"{ALIKE}; difference: {ALIKE}",
    )
    assert apart.p < 0.01
    shifted = first(scored(NOISE), scored(NOISE + 2))
    assert (shifted.delta_low, shifted.delta_high) == (pytest.approx(2.0), pytest.approx(2.0))
    single = summarise(
        Perplexity(),
        Perplexity().score([RowLoss("x:1", 4.0, 2.0)]),
        Perplexity().score([RowLoss("x:1", 2.0, 2.0)]),
        seed=0,
    )[1]
    assert (single.value, single.low, single.high) == (1.0, None, None)
    assert (single.delta, single.delta_low, single.delta_high, single.n) == (-1.0, None, None, 1)
    assert ONE in str(single.note)
    assert (single.p, single.test, judge([single])[0].verdict) == (None, None, None)
    same = summarise(
        Perplexity(), None, Perplexity().score([RowLoss("x:1", 4.0, 4.0), RowLoss("x:2", 2.0, 2.0)]), seed=0
    )[1]
    assert (same.low, same.high, same.note) == (1.0, 1.0, ALIKE)


@pytest.mark.parametrize("n", [2, 3, 5])
def test_few_sources_look_no_surer_than_they_are(n):
    """Two rows can hardly show anything: no verdict, however much both gain."""
    found = judge([first(scored(np.zeros(n)), scored(1 + 0.1 * np.arange(n)))])[0]
    assert found.p == pytest.approx({2: 0.25, 3: 0.1, 5: 0.035}[n], abs=0.02)
    assert found.delta_low <= 1.02 and found.delta_high >= found.delta


def test_scores_that_do_not_pair_are_refused():
    two = scored([0.0, 1.0])
    for base in (two[:1], two[::-1], [two[0], replace(two[1], units=2.0)]):
        with pytest.raises(EvaluationError, match="not scored on the same examples"):
            summarise(Plain(), base, two, seed=0)
    with pytest.raises(EvaluationError, match="no example was scored"):
        summarise(Plain(), None, [], seed=0)


def test_a_number_on_one_side_only_is_refused():
    task = Plain()
    task.statistics = (Statistic("some", lambda one: one.value if one.value > 0 else None),)
    with pytest.raises(EvaluationError, match="some has a number on one side only\n  x:0"):
        summarise(task, scored([-1.0, 1.0]), scored([1.0, 1.0]), seed=0)
    assert summarise(task, scored([-1.0, -1.0]), scored([-1.0, -1.0]), seed=0) == []
