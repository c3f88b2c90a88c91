"""KTO, APO, DPO, ORPO and SimPO: loss and gradients of every adapter tensor equal TRL's on torch, to 1e-5."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten
from safetensors.numpy import load_file

import tiny
from goldens import make_preferences as golden
from goldens import make_sft
from tunesmith import adapters
from tunesmith.engine import scoring
from tunesmith.learning.objectives.apo import APOZeroUnpaired
from tunesmith.learning.objectives.dpo import DPO
from tunesmith.learning.objectives.kto import KTO
from tunesmith.learning.objectives.orpo import ORPO
from tunesmith.learning.objectives.simpo import SimPO
from tunesmith.model import loading as model
from tunesmith.runs.config import RunConfig
from tunesmith.tokens.batches import Cut, Group
from tunesmith.tokens.template import Tokens
from tunesmith.training import gradients, reference

EXPECTED = load_file(golden.GOLDEN)
EVEN = {"desirable_weight": 1.0, "undesirable_weight": 1.0}
CASES = {
    "kto": KTO(beta=0.4, **EVEN),
    "kto_weighted": KTO(desirable_weight=golden.WEIGHTS[0], undesirable_weight=golden.WEIGHTS[1]),
    "kto_desirable": KTO(beta=0.4, **EVEN),
    "kto_undesirable": KTO(beta=0.4, **EVEN),
    "apo_zero_unpaired": APOZeroUnpaired(beta=0.3, **EVEN),
    "dpo_sigmoid": DPO(beta=0.3),
    "dpo_robust": DPO(beta=0.3, loss="robust", label_smoothing=0.1),
    "dpo_hinge": DPO(beta=0.3, loss="hinge"),
    "dpo_ipo": DPO(beta=0.3, loss="ipo"),
    "dpo_sigmoid_norm": DPO(beta=5.0, loss="sigmoid_norm"),
    "dpo_apo_zero": DPO(beta=0.3, loss="apo_zero"),
    "orpo": ORPO(beta=0.2),
    "simpo": SimPO(beta=2.0, gamma=0.8),
}


def tokens(prompt: list[int], answer: list[int]) -> Tokens:
    return Tokens(
        np.array([*prompt, *answer], np.int32), np.array([0] * len(prompt) + [1] * len(answer), np.float32)
    )


def groups_of(name: str) -> list[Group]:
    if "rows" in golden.CASES[name]:
        chosen = [golden.judged()[index] for index in golden.CASES[name]["rows"]]
        return [
            Group((tokens(asked, said),), f"x:{at}", label) for at, (asked, said, label) in enumerate(chosen)
        ]
    rows = golden.pairs(alike=name == "orpo")
    return [Group((tokens(asked, good), tokens(asked, bad)), "x") for asked, good, bad in rows]


def pairs_of(groups: list[Group]) -> list[Group]:
    """Each prompt with the completion of the next row, in the order of the case."""
    made = []
    for at, group in enumerate(groups):
        after = groups[(at + 1) % len(groups)].sequences[0]
        asked = group.sequences[0]
        prompt, answer = asked.ids[asked.targets == 0], after.ids[after.targets > 0]
        made.append(Group((tokens(prompt.tolist(), answer.tolist()),), group.source))
    return made


def measured(folder, name: str, pack: bool):
    """(loss, gradients, z0 before it is held) by the product's own way: reference by the base, baseline,
    micro-batches."""
    tiny.write_model(folder, make_sft.VOCABULARY)
    net, objective, groups = model.load(model.ModelSpec(path=str(folder))).net, CASES[name], groups_of(name)
    twins = pairs_of(groups) if name.startswith("kto") else []
    before = reference.Reference("x")
    for group in (*groups, *twins):
        for one, (logp, _) in zip(
            group.sequences, scoring.sequence_sums(net, [group], Cut(999))[0], strict=True
        ):
            before.values[one.digest] = logp
    adapters.LoRA(rank=make_sft.RANK, alpha=make_sft.ALPHA, targets=make_sft.TARGETS).attach(net, 0)
    drawn = [
        (key, mx.array(make_sft.adapter(key, value.shape))) for key, value in adapters.trainable(net).items()
    ]
    net.load_weights(drawn, strict=False)
    kl = 0.0
    if twins:
        ratios = [
            logp - before.values[twin.sequences[0].digest]
            for twin, ((logp, _),) in zip(twins, scoring.sequence_sums(net, twins, Cut(40)), strict=True)
        ]
        kl = float(np.mean(ratios))
    settings = RunConfig(model={"path": "x"}, data={"train": "x"}, objective=objective, batch={"pack": pack})
    step = gradients.Gradients(net, settings)
    filled = before.fill(groups) if objective.needs_reference else groups
    (loss, _), sums = step(filled, mx.random.key(0), max(0.0, kl))
    return (
        loss.item() / len(groups),
        {key: np.array(value) / len(groups) for key, value in tree_flatten(sums)},
        kl,
    )


@pytest.mark.parametrize("pack", [False, True])
@pytest.mark.parametrize("name", CASES)
def test_loss_and_gradients_are_those_of_trl(tmp_path, name, pack):
    loss, found, kl = measured(tmp_path, name, pack)
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
