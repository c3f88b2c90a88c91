"""A test that may be looked at after every vote: its errors, its interval, and when it decides."""

from __future__ import annotations

import numpy as np
import pytest

from tunesmith.serving.sequential import LEVEL, SequentialTest, interval, log_evidence, sequential_test


def wins_over_time(share: float, votes: int, repeats: int) -> np.ndarray:
    """(repeats, votes): wins so far."""
    drawn = np.random.default_rng(7).random((repeats, votes)) < share
    return drawn.cumsum(axis=1)


def test_looked_at_after_every_vote_it_decides_wrongly_in_at_most_5_percent():
    votes, repeats = 1000, 600
    borders = {}  # the most extreme counts of wins that do not decide, by the number of votes
    for n in range(1, votes + 1):
        low = next(wins for wins in range(n + 1) if log_evidence(wins, n - wins) < np.log(1 / LEVEL))
        borders[n] = low, n - low
    wins = wins_over_time(0.5, votes, repeats)
    low, high = np.array([borders[n] for n in range(1, votes + 1)]).T
    decided = ((wins < low) | (wins > high)).any(axis=1)
    assert decided.mean() <= LEVEL
    assert decided.mean() > 0.005, "it is not so cautious that it never decides"


@pytest.mark.parametrize("share", [0.5, 0.7, 0.95])
def test_the_interval_covers_the_truth_at_all_times_together(share):
    wins = wins_over_time(share, 300, 200)
    moments = [*range(1, 40), *range(40, 301, 10)]
    missed = 0
    for row in wins:
        bounds = (interval(int(row[n - 1]), n - int(row[n - 1])) for n in moments)
        missed += not all(low <= share <= high for low, high in bounds)
    assert missed / len(wins) <= LEVEL


@pytest.mark.parametrize(("share", "most"), [(0.6, 400), (0.7, 100), (0.8, 45)])
def test_it_decides_for_the_better_one(share, most):
    drawn = np.random.default_rng(3).random((60, 2000)) < share
    tests = [sequential_test(map(bool, row)) for row in drawn]
    assert all(test.outcome == "first" for test in tests)
    assert np.median([test.decided_after or 2000 for test in tests]) < most


def test_what_is_decided_stays_decided_and_ties_do_not_count():
    test = sequential_test([True] * 12 + [None] * 5 + [False] * 12)
    assert (test.wins, test.losses, test.ties) == (12, 12, 5)
    assert test.decided_after is not None and test.decided_after <= 12 and test.outcome == "first"
    assert test.interval[0] < 0.5 < test.interval[1]


def test_the_interval_excludes_one_half_exactly_when_the_evidence_suffices():
    for wins in range(41):
        low, high = interval(wins, 40 - wins)
        assert (low > 0.5 or high < 0.5) == (log_evidence(wins, 40 - wins) > np.log(1 / LEVEL))
        assert 0 <= low <= wins / 40 <= high <= 1
    assert interval(0, 0) == (0.0, 1.0)


def test_it_says_how_many_more_votes_are_needed():
    test = sequential_test([True, True, True, False] * 4)
    assert test.votes_needed is not None
    more = sequential_test([True, True, True, False] * (4 + test.votes_needed // 4 + 1))
    assert more.decided_after is not None
    assert sequential_test([True, False] * 50).votes_needed is None


def test_many_even_votes_show_that_there_is_no_difference():
    assert sequential_test([True, False] * 100).outcome == "open"
    assert sequential_test([True, False] * 2000).outcome == "alike"


def test_what_is_found_alike_stays_so():
    test = sequential_test([True, False] * 2000)
    low, high = test.interval
    assert low >= 0.45 and high <= 0.55
    for _ in range(600):
        test.add(True)
    assert test.outcome == "alike" and test.decided_after is None and test.interval[1] > 0.55


def test_two_are_alike_exactly_when_the_whole_interval_is_near_one_half():
    for wins in range(1400, 1600, 7):
        alike = SequentialTest(wins=wins - 1, losses=3000 - wins)
        alike.add(True)
        low, high = interval(wins, 3000 - wins)
        assert (alike.outcome == "alike") == (low >= 0.45 and high <= 0.55)
