"""Shares of rows: how many an epoch has, and which."""

from __future__ import annotations

from collections import Counter

import pytest

from tunesmith.data import mixing
from tunesmith.data.mixing import MixSpec
from tunesmith.errors import ConfigError
from tunesmith.runs.config import RunConfig
from tunesmith.settings.config import load

BASE = ["model.path=m", "data.train=[rows.jsonl]"]


def entry(**values: object) -> MixSpec:
    return MixSpec.model_validate({"path": "other.jsonl", **values})


@pytest.mark.parametrize(
    ("mix", "task", "rows", "wanted"),
    [
        ([entry(share=0.2)], 80, [500], [20]),
        ([entry(share=0.2)], 80, [3], [20]),
        ([entry(share=0.25), entry(share=0.25)], 100, [10, 10], [50, 50]),
        ([entry(repeat=3)], 80, [7], [21]),
        ([entry(repeat=2), entry(share=0.5)], 10, [5, 9], [10, 20]),
        ([entry(share=0.001)], 10, [5], [1]),
    ],
)
def test_a_share_is_of_all_rows_of_an_epoch(mix, task, rows, wanted):
    assert mixing.rows_an_epoch(mix, task, rows) == wanted


@pytest.mark.parametrize(("rows", "wanted"), [(7, 3), (7, 7), (7, 20), (1, 4)])
def test_each_row_is_drawn_as_often_as_the_others_or_once_more(rows, wanted):
    drawn = mixing.draw(rows, wanted, seed=3, entry=0)
    counts = Counter(drawn)
    assert len(drawn) == wanted and set(drawn) <= set(range(rows))
    assert max(counts.values()) - min(counts[row] for row in range(rows)) <= 1
    assert drawn == mixing.draw(rows, wanted, seed=3, entry=0)


def test_a_larger_share_keeps_the_rows_of_a_smaller_one():
    small, large = (set(mixing.draw(100, wanted, seed=1, entry=0)) for wanted in (10, 30))
    assert small < large


def test_seed_and_entry_decide_which_rows_are_drawn():
    draws = {tuple(mixing.draw(100, 10, seed, entry)) for seed in (0, 1) for entry in (0, 1)}
    assert len(draws) == 4


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("[{path: a}]", r"data\.mix\[0\]: .*give share or repeat"),
        ("[{path: a, share: 0.2, repeat: 2}]", r"data\.mix\[0\]: .*give share or repeat"),
        ("[{path: a, shar: 0.2}]", r"data\.mix\[0\]\.shar: unknown key"),
        ("[{share: 0.2}]", r"data\.mix\[0\]\.path: missing"),
        ("[{path: a, share: 0.5}, {path: b, share: 0.5}]", r"add up to 1, and must be less than 1"),
        ("[{path: a, share: 1.5}]", r"data\.mix\[0\]\.share: .*less than 1"),
        ("a.jsonl", r"data\.mix: must be a list of mappings of keys"),
    ],
)
def test_a_wrong_entry_is_named_with_its_place(value, message):
    with pytest.raises(ConfigError, match=message):
        load(RunConfig, sets=[*BASE, f"data.mix={value}"])


def test_an_entry_is_read_and_written_as_given(tmp_path):
    from tunesmith.settings.config import dump

    spec = load(RunConfig, sets=[*BASE, "data.mix=[{path: a, share: 0.2}]"]).spec
    assert spec.data.mix == (MixSpec(path=("a",), share=0.2),) and spec.data.trained_on == ("rows.jsonl", "a")
    (tmp_path / "config.yaml").write_text(dump(spec))
    assert load(RunConfig, files=[tmp_path / "config.yaml"]).spec == spec
