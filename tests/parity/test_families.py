"""Every family, from files of transformers 5 and 4 and of mlx-lm: the logits of transformers on torch to
1e-4, or refused, as docs/models.md says."""

from __future__ import annotations

import json

import pytest
from parity import families, family_table

from tunesmith.model import families as standing

pytestmark = [pytest.mark.parity, pytest.mark.filterwarnings("ignore")]


@pytest.mark.parametrize("family", families.FAMILIES, ids=lambda family: family.name)
def test_logits_are_those_of_transformers_or_the_model_is_refused(family, tmp_path):
    row = family_table.cells(family, family_table.measured(family, tmp_path))
    assert row == family_table.rows(family_table.PAGE.read_text())[family.name][:5]
    assert not any("wrong" in cell for cell in row)


PROVEN = [family for family in families.FAMILIES if family.model_type in standing.PROVEN]


@pytest.mark.parametrize("family", PROVEN, ids=lambda family: family.name)
def test_the_gradient_of_the_loss_by_the_embedding_is_that_of_transformers(family, tmp_path):
    model = families.build(family)
    families.save(model, tmp_path)
    if standing.refusal(json.loads((tmp_path / "config.json").read_text())) is None:
        assert family_table.gradient_error(tmp_path, model) < 1e-3
