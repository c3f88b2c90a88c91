"""The plan of updates: laws over random sizes."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from tunesmith.batches import Group, Plan, collate
from tunesmith.template import Tokens

sizes = st.lists(st.integers(1, 50), min_size=1, max_size=40)


@given(sizes, st.integers(1, 9), st.integers(1, 9), st.integers(0, 5))
def test_the_cut_into_micro_batches_never_changes_an_update(lengths, sequences, micro, seed):
    plan = Plan(tuple(lengths), sequences, min(micro, sequences), seed, epochs=2)
    whole = Plan(tuple(lengths), sequences, sequences, seed, epochs=2)
    for step in range(plan.steps):
        cut = plan.update(step)
        assert sorted(member for part in cut for member in part) == sorted(whole.update(step)[0])
        assert all(len(part) <= plan.micro for part in cut)
        flat = [lengths[member] for part in cut for member in part]
        assert flat == sorted(flat, reverse=True)


@given(sizes, st.integers(1, 9))
def test_epochs_differ_in_order_and_repeat_by_seed(lengths, sequences):
    plan = Plan(tuple(lengths), sequences, 1, 3)
    assert (plan.order(0) == Plan(tuple(lengths), sequences, 1, 3).order(0)).all()
    if len(lengths) > 12:
        assert (plan.order(0) != plan.order(1)).any()
        assert (plan.order(0) != Plan(tuple(lengths), sequences, 1, 4).order(0)).any()


def test_half_an_epoch_is_half_the_updates_and_steps_win():
    assert Plan((1,) * 10, 2, 1, 0, epochs=0.5).steps == 3
    assert Plan((1,) * 10, 2, 1, 0, epochs=0.5, max_steps=17).steps == 17


def test_padding_share_counts_the_device_not_the_rows():
    assert Plan((4, 4, 4, 4), 4, 2, 0).padding_share() == 0
    assert Plan((6, 2), 2, 2, 0).padding_share() == 1 - 8 / 12
    assert Plan((6, 2), 2, 1, 0).padding_share() == 0


def test_collate_pads_on_the_right_with_nothing_to_learn():
    def one(*ids):
        return Tokens(np.array(ids, np.int32), np.ones(len(ids), np.float32))

    batch = collate([Group((one(7, 8, 9), one(4)), "a"), Group((one(5, 6),), "b")])
    assert batch.tokens.tolist() == [[7, 8, 9], [4, 0, 0], [5, 6, 0]]
    assert batch.targets.tolist() == [[1, 1, 1], [1, 0, 0], [1, 1, 0]]
