"""The plan of updates: laws over random sizes."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from tunesmith.tokens.batches import FORWARD_TOKENS, PER_CALL, BatchSpec, Cut, Group, Plan, bucketed, collate
from tunesmith.tokens.template import Tokens

ONE = Cut(1)
sizes = st.lists(st.integers(1, 50), min_size=1, max_size=40)


cuts = st.builds(Cut, st.integers(1, 200), st.none() | st.integers(1, 9), st.booleans(), st.booleans())


@given(sizes, st.integers(1, 9), cuts, st.integers(0, 5), st.integers(1, 3))
def test_the_cut_into_micro_batches_never_changes_an_update(lengths, sequences, cut, seed, ranks):
    plan = Plan(tuple(lengths), sequences, cut, seed, epochs=2)
    for step in range(plan.steps):
        parts = [plan.update(step, rank, ranks) for rank in range(ranks)]
        assert sorted(member for part in parts for micro in part for member in micro) == sorted(
            plan.members(step)
        )
        for micro in (micro for part in parts for micro in part):
            own = [lengths[member] for member in micro]
            assert own == sorted(own, reverse=True)
            assert len(micro) == 1 or (cut.size(own) <= cut.tokens and len(micro) <= (cut.micro or 99))


@given(sizes, cuts)
def test_no_other_cut_of_the_sorted_rows_is_cheaper(lengths, cut):
    if cut.pack or len(lengths) > 8:
        return
    ordered = sorted(lengths, reverse=True)

    def cheapest(rest: list[int]) -> float:
        options = [
            cut.size(rest[:end]) + PER_CALL + cheapest(rest[end:])
            for end in range(1, len(rest) + 1)
            if end == 1 or (cut.size(rest[:end]) <= cut.tokens and end <= (cut.micro or 99))
        ]
        return min(options, default=0)

    parts = cut(lengths, range(len(lengths)))
    assert sum(cut.size([lengths[member] for member in part]) + PER_CALL for part in parts) == cheapest(
        ordered
    )


@given(st.integers(1, 100_000))
def test_rounded_sizes_are_few_and_near(size):
    rounded = bucketed(size)
    assert size <= rounded <= max(size + 7, size * 17 / 16)
    assert bucketed(rounded) == rounded


def test_few_sizes_between_one_power_of_two_and_the_next():
    assert len({bucketed(size) for size in range(1025, 2049)}) == 16
    assert len({bucketed(size) for size in range(1, 4097)}) <= 16 * 5 + 17


@given(sizes, cuts, st.integers(1, 3))
def test_the_largest_micro_batch_is_the_peak_of_the_run(lengths, cut, ranks):
    plan = Plan(tuple(lengths), 5, cut, 0, epochs=2)
    size = cut.size([lengths[member] for member in plan.largest(ranks)])
    every = [
        micro
        for step in range(plan.steps)
        for rank in range(ranks)
        for micro in plan.update(step, rank, ranks)
    ]
    assert size == max(cut.size([lengths[member] for member in micro]) for micro in every)


def test_a_budget_is_halved_until_one_row_is_left():
    assert Cut(10**6).halved([30, 30, 20, 10]) == Cut(60) and Cut(100).halved([70, 20]) == Cut(70)
    assert Cut(100, pack=True).halved([30, 30, 20]) == Cut(40, pack=True)
    assert Cut(100).halved([100]) is None


@given(sizes, st.integers(1, 9))
def test_epochs_differ_in_order_and_repeat_by_seed(lengths, sequences):
    plan = Plan(tuple(lengths), sequences, ONE, 3)
    assert (plan.order(0) == Plan(tuple(lengths), sequences, ONE, 3).order(0)).all()
    if len(lengths) > 12:
        assert (plan.order(0) != plan.order(1)).any()
        assert (plan.order(0) != Plan(tuple(lengths), sequences, ONE, 4).order(0)).any()


def test_half_an_epoch_is_half_the_updates_and_steps_win():
    assert Plan((1,) * 10, 2, ONE, 0, epochs=0.5).steps == 3
    assert Plan((1,) * 10, 2, ONE, 0, epochs=0.5, max_steps=17).steps == 17


def test_padding_share_counts_the_device_not_the_rows():
    assert Plan((4, 4, 4, 4), 4, Cut(8), 0).padding_share() == 0
    assert Plan((6, 2), 2, Cut(12), 0).padding_share() == 1 - 8 / 12
    assert Plan((6, 2), 2, ONE, 0).padding_share() == 0
    assert Plan((6, 2), 2, Cut(12, pack=True), 0).padding_share() == 0


def one(*ids):
    return Tokens(np.array(ids, np.int32), np.array([0, *[1] * (len(ids) - 1)], np.float32))


GROUPS = [Group((one(7, 8, 9), one(4)), "a"), Group((one(5, 6),), "b")]


def test_collate_pads_on_the_right_with_nothing_to_learn():
    batch = collate(GROUPS)
    assert batch.tokens.tolist() == [[7, 8], [0, 0], [5, 0]] and batch.ends is None
    assert batch.positions.tolist() == [0, 1, 4] and batch.learned.tolist() == [8, 9, 6]
    assert batch.weights.tolist() == [1, 1, 1] and batch.rows.tolist() == [0, 0, 2]


def test_collate_packs_rows_end_to_end():
    batch = collate(GROUPS, pack=True)
    assert batch.tokens.tolist() == [[7, 8, 5]] and batch.ends == (2, 2, 3)
    assert (
        batch.positions.tolist() == [0, 1, 2]
        and batch.learned.tolist() == [8, 9, 6]
        and batch.rows.tolist() == [0, 0, 2]
    )


def test_collate_rounds_up_with_nothing_to_learn():
    batch = collate(GROUPS, bucket=True)
    assert batch.tokens.shape == (3, 8) and len(batch.learned) == 8
    assert batch.positions.tolist() == [0, 1, 16, 0, 0, 0, 0, 0] and batch.weights.tolist() == [
        1,
        1,
        1,
        0,
        0,
        0,
        0,
        0,
    ]


def test_without_gradient_many_short_sequences_are_one_pass():
    """Whatever limit of rows training has; a limit of tokens holds."""
    rows = [Group((Tokens(np.zeros(31, np.int32), np.ones(31, np.float32)),), "row") for _ in range(17)]
    members, lengths = range(len(rows)), [row.length for row in rows]
    few = BatchSpec(sequences=2, micro=2)
    assert [len(part) for part in Cut.forward(few, rows)(lengths, members)] == [17]
    assert Cut.forward(few, rows).tokens == FORWARD_TOKENS >= 17 * 30
    pairs = Cut.forward(BatchSpec(tokens=60), rows)(lengths, members)
    assert sorted(map(len, pairs)) == [1, *[2] * 8]
    many = BatchSpec(sequences=2, micro=2, tokens=4096)
    assert Cut.forward(many, rows).tokens == FORWARD_TOKENS, "no more than two rows were ever trained at once"
    long = [Group((Tokens(np.zeros(701, np.int32), np.ones(701, np.float32)),), "row")]
    assert Cut.forward(few, long).tokens == 700 and Cut.forward(many, long).tokens == 1400
