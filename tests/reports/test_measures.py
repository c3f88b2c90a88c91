"""What is said of a score in a few words."""

from __future__ import annotations

import pytest

from tunesmith.reports.measures import answer
from tunesmith.runs.records import Score


def score(n: int, low: float) -> Score:
    verdict = "no difference shown"
    interval = {"delta": 1.0, "delta_low": low, "delta_high": 1.5}
    return Score("t", "1", "loss", 2.0, 1.5, 2.5, n, **interval, better="lower", verdict=verdict)


@pytest.mark.parametrize(
    ("n", "low", "said"),
    [(2, 0.5, "too few to judge"), (2, -0.5, "no difference shown"), (40, 0.5, "no difference shown")],
)
def test_two_rows_that_all_got_worse_are_too_few_to_judge(n, low, said):
    assert answer(score(n, low)) == said
