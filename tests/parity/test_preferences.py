"""KTO, APO, DPO, ORPO and SimPO: loss and gradients of every adapter tensor equal TRL's on torch, to 1e-5."""

from __future__ import annotations

import numpy as np
import pytest
from safetensors.numpy import load_file

from goldens import make_preferences as golden
from tunesmith.preflight.goldens import compared
from tunesmith.preflight.goldens.cases import PREFERENCES

EXPECTED = load_file(PREFERENCES)


@pytest.mark.parametrize("pack", [False, True])
@pytest.mark.parametrize("name", compared.OBJECTIVES)
def test_loss_and_gradients_are_those_of_trl(name, pack):
    loss, found, kl = compared.preference(name, pack)
    assert loss == pytest.approx(EXPECTED[f"{name}|loss"].item(), rel=1e-5)
    if name.startswith("kto"):
        assert max(0.0, kl) == pytest.approx(EXPECTED[f"{name}|kl"].item(), rel=1e-4, abs=1e-5)
    expected = {key.split("|")[1]: value for key, value in EXPECTED.items() if key.startswith(f"{name}|")}
    expected = {key: value for key, value in expected.items() if key not in ("loss", "kl")}
    assert found.keys() == expected.keys() and len(expected) == 8
    largest = max(np.abs(value).max() for value in expected.values())
    for key, value in expected.items():
        np.testing.assert_allclose(found[key], value, rtol=1e-5, atol=1e-5 * largest, err_msg=key)


@pytest.mark.parametrize("name", sorted(golden.CASES))
@pytest.mark.parity
@pytest.mark.filterwarnings("ignore::FutureWarning")  # of transformers, about what TRL calls
def test_the_golden_is_what_trl_says_today(tmp_path, name):
    pytest.importorskip("trl")
    made = golden.with_experimental if name in ("orpo", "simpo") else golden.with_trl
    for key, value in made(golden.Oracle(tmp_path), name, golden.CASES[name]).items():
        noise = 1e-5 if key.endswith("kl") else 1e-6  # a difference of sums of float32
        np.testing.assert_allclose(value, EXPECTED[key], rtol=1e-4, atol=noise, err_msg=key)
