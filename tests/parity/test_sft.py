"""SFT's loss and gradients equal transformers + PEFT on torch, and five AdamW updates equal torch's, to
1e-5."""

from __future__ import annotations

import functools

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten, tree_map
from safetensors.numpy import load_file

import tiny
from goldens import make_sft
from tunesmith import adapters
from tunesmith.learning import optimizer
from tunesmith.learning.objectives.sft import SFT
from tunesmith.learning.optimizer import OptimizerSpec
from tunesmith.model import loading as model
from tunesmith.preflight.goldens import cases
from tunesmith.runs.config import RunConfig
from tunesmith.tokens.batches import Group
from tunesmith.tokens.template import Tokens
from tunesmith.training.gradients import Gradients, dropout_key


@pytest.fixture
def setting(tmp_path):
    tiny.write_model(tmp_path, cases.VOCABULARY)
    net = model.load(model.ModelSpec(path=str(tmp_path))).net
    adapters.LoRA(rank=cases.RANK, alpha=cases.ALPHA, targets=cases.TARGETS).attach(net, 0)
    net.load_weights(
        [
            (name, mx.array(cases.adapter(name, value.shape)))
            for name, value in adapters.trainable(net).items()
        ],
        strict=False,
    )
    groups = [Group((Tokens(row, mask),), "x:1") for row, mask in zip(*cases.batch(), strict=True)]
    config = RunConfig(model={"path": str(tmp_path)}, data={"train": "x.jsonl"})
    return net, groups, config


def close(found, expected):
    np.testing.assert_allclose(np.array(found), expected, rtol=1e-5, atol=1e-6)


def check(net, groups, config, golden):
    spec = OptimizerSpec(
        learning_rate=cases.RATE, weight_decay=cases.DECAY, warmup_steps=cases.WARMUP, max_norm=cases.MAX_NORM
    )
    gradients_of = Gradients(net, config)
    units = sum(group.units for group in groups)
    state = optimizer.build(spec, net)
    for update in range(cases.UPDATES):
        (loss, _), gradients = gradients_of(groups, dropout_key(0, update, 0))
        gradients = tree_map(lambda leaf: leaf / units, gradients)
        close(loss.item() / units, golden["losses"][update])
        if update == 0:
            flat = dict(tree_flatten(gradients))
            expected = {
                name.removeprefix("gradient."): value
                for name, value in golden.items()
                if name.startswith("gradient.")
            }
            assert flat.keys() == expected.keys() and len(expected) == 8
            for name, value in expected.items():
                close(flat[name], value)
        gradients = optimizer.clip(gradients, optimizer.global_norm(gradients), cases.MAX_NORM)
        # torch's warm-up counts from zero: its rate for update n is what the schedule gave after update n -
        # 1.
        rate = 0.0 if update == 0 else golden[f"rate.{update - 1}"].item()
        optimizer.apply(state, net, gradients, rate)
    expected = {
        name.removeprefix("updated."): value for name, value in golden.items() if name.startswith("updated.")
    }
    assert len(expected) == 8
    for name, value in adapters.trainable(net).items():
        close(value, expected[name])


def test_loss_gradients_and_updates_match_the_golden(setting):
    check(*setting, load_file(cases.SFT))


@pytest.mark.parity
@pytest.mark.filterwarnings("ignore::FutureWarning")  # PEFT calls what transformers has renamed
def test_loss_gradients_and_updates_match_torch_live(setting):
    check(*setting, make_sft.reference()[0])


@pytest.mark.parity
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_the_divergence_of_distilled_rows_matches_torch_live(setting):
    net, groups, config = setting
    expected = make_sft.distilled()
    distilled = [group._replace(mixed=True, distilled=True) for group in groups]
    (loss, _), gradients = Gradients(net, config)(distilled, dropout_key(0, 0, 0))
    close(loss, expected.pop("loss"))
    flat = {f"gradient.{name}": value for name, value in tree_flatten(gradients)}
    assert flat.keys() == expected.keys() and len(expected) == 8
    for name, value in expected.items():
        close(flat[name], value)


def test_schedule_matches_transformers_but_for_the_wasted_first_update():
    """The golden's rates are transformers' cosine schedule; ours is the same after a warm-up that starts one
    earlier."""
    golden = load_file(cases.SFT)
    spec = OptimizerSpec(learning_rate=cases.RATE, warmup_steps=cases.WARMUP)
    rates = [spec.rate(step, cases.UPDATES) for step in range(cases.UPDATES)]
    theirs = [golden[f"rate.{update}"].item() for update in range(cases.UPDATES)]
    assert rates[:2] == pytest.approx(theirs[:2])
    assert rates[2:] == pytest.approx(theirs[1:4])


def test_gathering_learned_positions_changes_nothing(setting):
    from tunesmith.model import logprobs
    from tunesmith.tokens.batches import collate

    net, groups, _ = setting
    batch = collate(groups)
    ways = [functools.partial(logprobs.learned_logprobs, gather=gather) for gather in (True, False)]
    results = [
        SFT().losses(logprobs.sequence_logps(net, batch, way), batch.fields).sum().item() for way in ways
    ]
    assert results[0] == pytest.approx(results[1], rel=1e-6)
