"""Planted sets: what is there is named, and what is not there is not found more often than said."""

from __future__ import annotations

import numpy as np
import pytest

from tunesmith.sweeps import racing
from tunesmith.sweeps.contrasts import (
    MixedStudent,
    Panel,
    RowValues,
    SettingPair,
    SweptKey,
    adjusted,
    compare,
    contrast,
    misfits,
    panel,
    seed_variance,
)

RANKS = SweptKey("rank", (8, 16, 32), (0, 0, 1, 1, 2, 2))
RATES = SweptKey("rate", (1e-4, 2e-4), (0, 1, 0, 1, 0, 1))
ROWS = 60


def losses(
    random: np.random.Generator,
    effects: list[float],
    seeds: int = 1,
    *,
    between_seeds: float = 0.0,
    own_rows: bool = False,
) -> Panel:
    """Skewed losses of rows that are easy or hard for all settings alike, with a part of each setting's own,
    and a shift of each setting and seed. own_rows: each seed holds out other rows."""
    rows = ROWS * (seeds if own_rows else 1)
    hard = random.gamma(2.0, 0.5, rows)
    own = random.gamma(1.0, 0.15, (len(effects), rows)) - 0.15
    values, weights = np.full((len(effects), seeds, rows), np.nan), np.zeros((seeds, rows))
    for seed in range(seeds):
        part = slice(seed * ROWS, (seed + 1) * ROWS) if own_rows else slice(0, ROWS)
        weights[seed, part] = random.integers(5, 60, ROWS)
        noise = random.normal(0, 0.05, (len(effects), ROWS))
        shift = random.normal(0, between_seeds, (len(effects), 1)) + np.array(effects)[:, None]
        values[:, seed, part] = hard[part] + own[:, part] + shift + noise
    return Panel(values, weights)


CASES = [(1, 0.0, False), (3, 0.02, False), (3, 0.02, True)]


@pytest.mark.parametrize(("seeds", "between_seeds", "own_rows"), CASES)
def test_where_nothing_matters_it_says_so_in_95_percent_of_simulations(seeds, between_seeds, own_rows):
    random = np.random.default_rng(1)
    claims = 0
    for _ in range(200):
        made = losses(random, [0.0] * 6, seeds, between_seeds=between_seeds, own_rows=own_rows)
        compared = compare(made, [RANKS, RATES])
        claims += any(result.shown for result in (*compared.pairs.values(), *compared.levels.values()))
    assert claims <= 17  # of 200 at 5 %: 17 or fewer in 98 % of repetitions


@pytest.mark.parametrize(("seeds", "between_seeds", "own_rows"), CASES)
def test_the_only_key_that_matters_is_named(seeds, between_seeds, own_rows):
    random = np.random.default_rng(2)
    named = {"rank": 0, "rate": 0}
    for _ in range(100):
        made = losses(random, [0.0, 0.2] * 3, seeds, between_seeds=between_seeds, own_rows=own_rows)
        compared = compare(made, [RANKS, RATES])
        for key in named:
            named[key] += any(result.shown for pair, result in compared.levels.items() if pair.key == key)
    assert named["rate"] == 100 and named["rank"] <= 10


def test_seeds_widen_an_interval_that_rows_alone_would_make_too_narrow():
    random = np.random.default_rng(3)
    covered = {"rows": 0, "both": 0}
    for _ in range(200):
        made = losses(random, [0.0] * 4, 4, between_seeds=0.2)
        pooled = seed_variance(made.means())
        coefficients = np.array([1.0, -1.0, 0.0, 0.0])
        first = contrast(
            Panel(made.values[:, :1], made.weights[:1]), coefficients, seed_variance(made.means()[:, :1])
        )
        every = contrast(made, coefficients, pooled)
        for name, result in (("rows", first), ("both", every)):
            low, high = result.interval
            covered[name] += low <= 0.0 <= high
    assert covered["both"] >= 184 and covered["rows"] < 100


def test_two_seeds_that_happen_to_agree_do_not_make_a_difference():
    random = np.random.default_rng(8)
    claims = 0
    for _ in range(400):
        made = losses(random, [0.0, 0.0], 2, between_seeds=0.1)
        claims += compare(made, []).pairs[SettingPair(0, 1)].shown
    assert claims <= 29  # of 400 at 5 %: 29 or fewer in 98 % of repetitions


@pytest.mark.parametrize("share", [0.0, 0.02, 0.5, 1.0])
@pytest.mark.parametrize("probability", [1e-6, 0.01, 0.4])
def test_p_and_quantile_of_rows_and_seeds_belong_together(share, probability):
    spread = MixedStudent(39.0, 2.0, share)
    assert spread.two_sided(-spread.quantile(probability / 2)) == pytest.approx(probability)


def test_the_variance_between_seeds_is_told_by_those_that_were_begun():
    means = np.array([[1.0, 1.1, np.nan], [2.0, 2.3, np.nan], [3.0, 3.1, np.nan], [4.0, np.nan, np.nan]])
    assert seed_variance(means) == seed_variance(means[:3, :2]) and seed_variance(means).freedom == 2


def test_one_row_gives_no_interval_and_rows_that_all_moved_alike_give_a_sign_test():
    one = Panel(np.array([[[1.0]], [[2.0]]]), np.ones((1, 1)))
    result = contrast(one, np.array([-1.0, 1.0]), seed_variance(one.means()))
    assert (result.value, result.p, result.interval) == (1.0, None, None) and not result.shown
    alike = Panel(np.array([[np.arange(8.0)], [np.arange(8.0) + 1]]), np.ones((1, 8)))
    result = contrast(alike, np.array([-1.0, 1.0]), seed_variance(alike.means()))
    assert result.value == 1.0 and result.p == pytest.approx(2 * 0.5**8)


def test_the_interval_of_a_pair_has_the_same_ends_in_either_direction():
    compared = compare(losses(np.random.default_rng(4), [0.0, 0.3]), [])
    there, back = compared.between(0, 1), compared.between(1, 0)
    assert there.value == -back.value and there.interval == pytest.approx(
        [-end for end in back.interval[::-1]]
    )
    assert there.p == back.p and there.shown and back.shown


def test_a_setting_that_lacks_the_hard_seed_is_not_better_for_it():
    nan = np.nan
    assert adjusted(np.array([[1.0, 3.0], [1.1, nan]])) == pytest.approx([2.0, 2.1])
    assert adjusted(np.array([[1.0, 3.0], [1.2, 3.4]])) == pytest.approx([2.0, 2.3])
    assert adjusted(np.array([[1.0], [2.0]])) == pytest.approx([1.0, 2.0])
    assert np.isnan(adjusted(np.array([[1.0, 2.0], [nan, nan]]))[1])


def test_settings_with_other_rows_or_weights_are_named():
    usual = RowValues({"a": 1.0, "b": 2.0}, {"a": 1.0, "b": 3.0})
    other = RowValues({"a": 1.0}, {"a": 1.0})
    heavier = RowValues({"a": 1.0, "b": 2.0}, {"a": 1.0, "b": 4.0})
    assert misfits([[usual], [other], [usual], [heavier], [None]]) == {1, 3}
    assert panel([[usual], [None]]).done.tolist() == [[True], [False]]


def race(random: np.random.Generator, effects: list[float], seeds: int, looks: int, error: float) -> set[int]:
    """The settings that are stopped."""
    allowed = racing.level(error, len(effects), looks, seeds)
    whole = losses(random, effects, seeds, between_seeds=0.02 if seeds > 1 else 0.0)
    drift = random.gamma(1.0, 0.15, (len(effects), 1, whole.values.shape[2])) - 0.15
    stopped: set[int] = set()
    for seed in range(seeds):
        for look in range(looks):
            values = whole.values + drift * (1 - look / looks)
            values[:, seed + 1 :] = np.nan
            for setting in set(range(len(effects))) - stopped:
                if racing.judge(Panel(values, whole.weights), setting, seeds, allowed) is not None:
                    stopped.add(setting)
    return stopped


@pytest.mark.parametrize("seeds", [1, 3])
def test_racing_drops_the_best_no_more_often_than_its_error_says(seeds):
    random = np.random.default_rng(5)
    best_dropped = sum(0 in race(random, [0.0] + [1e-4] * 3, seeds, 3, 0.2) for _ in range(80))
    assert best_dropped <= 22  # of 80 at 20 %: 22 or fewer in 96 % of repetitions


def test_racing_stops_what_is_far_behind_and_never_the_best():
    random = np.random.default_rng(6)
    for _ in range(10):
        assert race(random, [0.0, 0.5, 0.5, 0.5], 1, 3, 0.05) == {1, 2, 3}


def test_racing_with_several_seeds_waits_for_the_second_and_needs_enough_rows():
    made = losses(np.random.default_rng(7), [0.0, 1.0], 2)
    first = made.values.copy()
    first[:, 1] = np.nan
    assert racing.judge(Panel(first, made.weights), 1, 2, 0.05) is None
    assert racing.judge(Panel(first, made.weights), 1, 1, 0.05) is not None
    rows = [
        RowValues({str(row): value for row, value in enumerate(own)}, dict.fromkeys(map(str, range(60)), 1.0))
        for own in first[:, 0]
    ]
    begun = panel([[row, None] for row in rows])  # rows of the second seed are not known yet
    assert not begun.done[:, 1].any() and racing.judge(begun, 1, 2, 0.05) is None
    few = Panel(first[:, :1, :19], made.weights[:1, :19])
    assert racing.judge(few, 1, 1, 0.05) is None


def test_looks_begin_after_the_first_part_and_share_the_error():
    assert racing.looks(100, 10, 0.25) == [30, 40, 50, 60, 70, 80, 90]
    assert racing.looks(10, 0, 0.25) == []
    assert racing.level(0.05, 6, 7, 1) == pytest.approx(0.05 / 35)
    assert racing.level(0.05, 6, 7, 3) == pytest.approx(0.05 / 70)
