"""The counts of a plan are told in words, whatever their names; none is left out of the table."""

from __future__ import annotations

import re

import pytest

from tunesmith.display import counts

PLAN = {
    "rows_read": 1240,
    "rows_dropped": {"json": 2, "undesirable": 10},
    "rows_train": 1000,
    "rows_valid": 228,
    "sequences_train": 1001,
    "sequences_valid": 228,
    "tokens": 52_000,
    "supervised_tokens": 9000,
    "padding_share": 0.031,
    "steps": 125,
    "loss": "nats a learned token",
    "asked_as": "chat",
    "thinking": False,
    "reasoning": {"answers": 1228, "with_reasoning": 3, "switch": "enable_thinking", "decided_by": "rows"},
    "notes": {"empty system text left out": 4},
    "labels": {"desirable_train": 500, "undesirable_valid": 1},
    "trainable": 5,
    "total": 100,
    "adapter": "4 layers adapted (q_proj, v_proj)",
    "micro_batches": 250,
    "largest_micro_batch": {"rows": 4, "tokens": 900},
    "reference_sequences": 7,
    "frozen_layers_below": 3,
    "cache_frozen_saves": 0.25,
    "cache_frozen_gb": 1.5,
    "of_a_later_release": {"new_kind": 1},
    "absent": None,
}


def test_the_table_says_every_count_in_words():
    lines = dict(re.split(r"  +", line, maxsplit=1) for line in counts.table(PLAN).splitlines())
    assert lines == {
        "rows": "1,240 read, 12 left out (json 2, undesirable 10), 1,000 to train on, 228 held out",
        "sequences": "1,001 to train on, 228 held out",
        "tokens": "52,000 to train on, 9,000 of them learned, 3.1% of a batch is padding",
        "labels": "500 desirable to train on, 1 undesirable held out",
        "how rows were read": "empty system text left out: 4 rows",
        "reasoning": "3 of 1,228 answers have it; thinking is off in prompts",
        "the model is asked": "in a chat",
        "unit of the loss": "nats a learned token",
        "updates": "125",
        "micro-batches": "250 in the first epoch, the largest 4 rows of 900 tokens in all",
        "weights": "5 of 100 are trained (5.0%)",
        "adapter": "4 layers adapted (q_proj, v_proj)",
        "reference": "7 sequences to measure",
        "frozen layers": "3 below the adapter; loop.cache_frozen saves 25.0% of the layers' work "
        "and takes 1.5 GB of disk space",
        "of a later release": "new_kind 1",
        "absent": "none",
    }


def test_the_line_that_opens_a_run_is_short_and_without_names_of_the_code():
    line = counts.opening(PLAN)
    assert line.startswith(" · rows: 1,240 read, 12 left out (json 2, undesirable 10), 1,000 to train on")
    assert not re.search(r"None|\{|rows_|_tokens|asked_as|decided_by", line)
    assert "empty system text" not in line, "a notice says it"


@pytest.mark.parametrize("key", PLAN)
def test_counts_of_other_releases_may_lack_any_entry(key):
    rest = {name: value for name, value in PLAN.items() if name != key}
    partner = {"trainable": "total", "total": "trainable"}.get(key)
    rest.pop(partner, None)
    if key.startswith(("cache_", "frozen_")):
        rest.pop("frozen_layers_below", None)
    assert counts.table(rest) and counts.opening(rest)
    assert counts.table({}) == counts.opening({}) == ""
