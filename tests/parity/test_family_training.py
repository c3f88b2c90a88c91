"""Every family that is not refused: gradients of LoRA and DoRA are PEFT's on torch; padded, recomputed and
packed batches are single rows. For some of each kind: quantised folders are the weights that their numbers
stand for, and the life of a run. All as docs/models.md says."""

from __future__ import annotations

import pytest
from parity import families, family_life, family_table, family_training

from tunesmith.model import families as standing

pytestmark = [pytest.mark.parity, pytest.mark.filterwarnings("ignore")]

PAGE = family_table.rows(family_table.PAGE.read_text())
TRAINED = [family for family in families.FAMILIES if family.model_type in standing.PROVEN]
LIVED = {
    "llama",
    "mistral, 16-token window",
    "mistral3 around ministral3",
    "qwen3_5",
    "phi3, longrope beyond it",
    "gemma2",
    "gemma4_text",
    "olmo",
    "deepseek_v3",
    "gpt_oss",
    "granitemoehybrid",
    "ernie4_5_moe",
    "gptj",
    "llama4",
    "jamba",
    "recurrent_gemma",
    "arcee",
}
"""Each kind of cache, of wrapper and of mixture; the script of the table tries all of them."""


@pytest.mark.parametrize("family", TRAINED, ids=lambda family: family.name)
def test_adapters_and_batches_are_exact(family, tmp_path):
    cells = family_training.trained_cells(family, tmp_path)
    assert cells == PAGE[family.name][5:7]
    assert all(cell.startswith("exact") for cell in cells)


@pytest.mark.parametrize("name", sorted(LIVED))
def test_quantised_weights_are_the_numbers_that_they_stand_for(name, tmp_path):
    assert family_training.quantised_cell(by_name(name), tmp_path) == PAGE[name][7] == "exact"


@pytest.mark.parametrize("name", sorted(LIVED))
def test_a_run_is_resumed_evaluated_and_answers_in_batches(name, tmp_path):
    assert family_life.cell(by_name(name), tmp_path) == PAGE[name][8] == "exact"


def by_name(name):
    (family,) = (family for family in TRAINED if family.name == name)
    return family


def test_no_cell_of_the_table_is_wrong():
    assert LIVED <= {family.name for family in TRAINED} and len(TRAINED) >= 90
    assert not any("wrong" in cell for row in PAGE.values() for cell in row)
    assert all(len(row) == len(family_table.COLUMNS) for row in PAGE.values())
