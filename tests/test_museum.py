"""Bugs of the field, one test each. docs/museum.md lists all, also those that stand elsewhere."""

from __future__ import annotations

import inspect
import math
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten, tree_map

import tiny
from tunesmith import adapters, errors, events
from tunesmith.engine import scoring
from tunesmith.learning import optimizer
from tunesmith.learning.objectives.sft import SFT
from tunesmith.model import kernels, logprobs
from tunesmith.model import loading as model
from tunesmith.runs import checkpoints
from tunesmith.runs.checkpoints import Cursor
from tunesmith.runs.config import RunConfig
from tunesmith.runs.directory import Run
from tunesmith.settings import config
from tunesmith.tokens.batches import Cut, Group, Plan, collate
from tunesmith.tokens.template import Tokens
from tunesmith.training import gradients, story, updates


@pytest.fixture
def net(tiny_model):
    loaded = model.load(model.ModelSpec(path=str(tiny_model))).net
    adapters.LoRA(rank=4).attach(loaded, 0)
    return loaded


def group(ids, targets, source="x.jsonl:1") -> Group:
    return Group((Tokens(np.array(ids, np.int32), np.array(targets, np.float32)),), source)


def loss(net, groups) -> tuple[float, float]:
    logps = logprobs.sequence_logps(net, collate(groups))
    return SFT().losses(logps, mx.zeros((len(groups), 1))).sum().item(), sum(
        SFT().units(group) for group in groups
    )


def test_museum_01_padding_is_never_learned(net):
    """mlx-lm 1697: tuner/trainer.py learns one padding token after every padded row."""
    short, long = group([5, 6, 7], [0, 1, 1]), group(range(5, 15), [0] * 5 + [1] * 5)
    alone = [loss(net, [short]), loss(net, [long])]
    together = loss(net, [short, long])
    assert together[1] == alone[0][1] + alone[1][1] == 7
    assert together[0] == pytest.approx(alone[0][0] + alone[1][0], rel=1e-5)


def test_museum_02_like_lengths_stand_together():
    """mlx-lm 596: CacheDataset.itemlen sorts by the number of keys of a dict, that is, not at all."""
    lengths = [52, 3, 22, 51, 4, 23]
    assert Cut(999, micro=2)(lengths, range(6)) == [[0, 3], [5, 2], [4, 1]]
    plan = Plan(tuple(lengths), sequences=6, cut=Cut(999, micro=2), seed=0)
    assert sorted(map(sorted, plan.update(0))) == [[0, 3], [1, 4], [2, 5]]


@pytest.mark.parametrize("count", [1, 2, 7, 8, 9, 31])
def test_museum_03_no_row_is_left_out_of_an_epoch(count):
    """mlx-examples 843: iterate_batches never trains the last n % batch rows."""
    plan = Plan(tuple(range(1, count + 1)), sequences=4, cut=Cut(count, micro=3), seed=1, epochs=3)
    for epoch in range(3):
        steps = range(epoch * plan.steps_per_epoch, (epoch + 1) * plan.steps_per_epoch)
        seen = [member for step in steps for micro in plan.update(step) for member in micro]
        assert sorted(seen) == list(range(count))
    assert sorted(index for micro in plan.cut(plan.lengths, range(count)) for index in micro) == list(
        range(count)
    )


def test_museum_04_a_batch_without_a_target_is_not_a_nan(net):
    """mlx-lm 1355: default_loss divides 0 by 0 and writes NaN into every weight."""
    empty = group([5, 6, 7], [0, 0, 0])
    assert loss(net, [empty]) == (0.0, 0.0)
    assert scoring.row_losses(net, [empty, group([5, 6], [0, 1])], Cut(99))[0] == (0.0, 0.0)


def test_museum_07_validation_is_all_rows_and_draws_nothing(net):
    """mlx-lm evaluate scores another random subset each time, from the generator that orders training."""
    groups = [group(range(3, 3 + n), [0] + [1] * (n - 1), f"x:{n}") for n in (4, 9, 6, 5, 8)]
    np.random.seed(0)
    before = np.random.get_state()[1].copy()
    first = scoring.row_losses(net, groups, Cut(20))
    second = scoring.row_losses(net, groups[::-1], Cut(40, pack=True))[::-1]
    assert len(first) == len(groups)
    np.testing.assert_allclose(first, second, rtol=1e-5)
    assert (np.random.get_state()[1] == before).all()


def test_museum_10_checkpointing_touches_only_this_model_and_ends(net, tiny_model):
    """mlx-lm 167: grad_checkpoint patches type(layer).__call__: for ever, for every model, and twice when
    called twice."""
    other = model.load(model.ModelSpec(path=str(tiny_model))).net
    kind, call = type(net.layers[0]), type(net.layers[0]).__call__
    with gradients.checkpointed(net), gradients.checkpointed(net):
        assert type(net.layers[0]) is not kind and type(other.layers[0]) is kind
        assert kind.__call__ is call
    assert type(net.layers[0]) is kind


def test_museum_12_clipping_reaches_gradients_inside_lists():
    """A hand-written walk over dicts skipped lists, and with them every layer of the model."""
    gradients = {
        "layers": [{"weight": mx.array([3.0])}, {"weight": mx.array([[4.0]])}],
        "head": mx.array([12.0]),
    }
    norm = optimizer.global_norm(gradients)
    assert norm.item() == 13.0
    clipped = dict(tree_flatten(optimizer.clip(gradients, norm, 1.3)))
    assert {name: leaf.item() for name, leaf in clipped.items()} == pytest.approx(
        {"layers.0.weight": 0.3, "layers.1.weight": 0.4, "head": 1.2}, rel=1e-5
    )


def every_error() -> list[type[errors.TunesmithError]]:
    found = [
        kind
        for _, kind in inspect.getmembers(errors, inspect.isclass)
        if issubclass(kind, errors.TunesmithError)
    ]
    assert len(found) == 16
    return found


@pytest.mark.parametrize("kind", every_error())
def test_museum_19_every_error_formats(kind):
    """mistral-finetune's UnrecognizedRoleError.__str__ reads attributes that are never set."""
    error = kind("no such role", where="a.jsonl:7", hint="use user")
    assert str(error) == "a.jsonl:7: no such role\nhint: use user"
    assert str(kind("no such role")) == "no such role"
    assert 1 <= kind.exit_code <= 10 and issubclass(kind, Exception)


def test_museum_20_a_save_that_dies_leaves_the_checkpoint_before_it(tmp_path):
    """mlx-lm writes the final name directly; a kill leaves half a file. transformers 35782: half a folder."""
    run = Run(tmp_path)
    (tmp_path / "checkpoints").mkdir()

    def whole(folder: Path) -> None:
        for name in ("adapters.safetensors", "adapter_config.json", "optimizer.safetensors"):
            (folder / name).write_bytes(b"whole")

    def dies(folder: Path) -> None:
        whole(folder)
        raise KeyboardInterrupt

    checkpoints.save(run, Cursor(step=1), whole, 10)
    with pytest.raises(KeyboardInterrupt):
        checkpoints.save(run, Cursor(step=2), dies, 10)
    assert run.checkpoints() == [1] and checkpoints.read(run, 1).step == 1


def test_museum_23_a_loss_that_is_not_finite_is_skipped_named_and_stops_the_run(
    tiny_model, tmp_path, monkeypatch
):
    """mlx-lm-lora's ORPO hides divergence behind nan_to_num."""
    data = tiny.write_rows(tmp_path / "rows.jsonl", tiny.conversations(20))
    settings = RunConfig(
        model={"path": str(tiny_model)},
        data={"train": str(data)},
        batch={"sequences": 2, "tokens": 4096, "pack": True},
        loop={"steps": 9, "samples": 0, "validate_every": 0},
    )
    real = updates.Gradients

    class Poisoned(real):
        calls = iter(range(-1, 100))  # the first is the probe's

        def __call__(self, groups, key, baseline=0.0):
            value, found = super().__call__(groups, key, baseline)
            bad = next(self.calls) in (1, 4, 5, 6)
            return value, tree_map(lambda leaf: leaf * math.nan, found) if bad else found

    monkeypatch.setattr(updates, "Gradients", Poisoned)
    log: list[events.Event] = []
    with pytest.raises(errors.Diverged, match="3 updates in a row"):
        story.train(settings, out=tmp_path / "run", notify=log.append)
    skipped = [event for event in log if isinstance(event, events.StepSkipped)]
    assert [(event.step, event.in_a_row) for event in skipped] == [(2, 1), (5, 1), (6, 2), (7, 3)]
    assert all(len(event.rows) == 2 and "rows.jsonl:" in event.rows[0] for event in skipped)
    assert [event.step for event in log if isinstance(event, events.StepDone)] == [1, 3, 4]
    assert Run(tmp_path / "run").manifest["status"] == "failed"


def test_museum_24_every_preset_is_loaded_by_a_test():
    """torchtune's test over a glob of configs validated 3 of 197 files after the folder was rearranged."""
    found = config.presets()
    ranks = {
        "mistral-7b-m4-24gb": 16,
        "mistral-7b-m4-24gb-fp16": 16,
        "mistral-7b-64gb": 32,
        "smollm2-demo": 16,
    }
    assert ranks.keys() <= set(found)
    for name in found:
        settings = config.load(
            RunConfig, preset=name, overrides={"model.path": ("m", "--model"), "data.train": ("x", "--data")}
        )
        assert settings.spec.adapter.rank == ranks.get(name, 16)
        assert settings.origins["adapter.rank"] == f"preset {name}"
        assert settings.spec.warnings() == []


def test_gradient_reaches_every_trainable_tensor_and_none_other(net):
    net.load_weights([(name, value + 0.1) for name, value in adapters.trainable(net).items()], strict=False)
    settings = RunConfig(model={"path": "x"}, data={"train": "x"})
    step = updates.Gradients(net, settings)
    _, sums = step([group(range(3, 20), [0] * 8 + [1] * 9)], gradients.dropout_key(0, 0, 0))
    flat = dict(tree_flatten(sums))
    assert flat.keys() == adapters.trainable(net).keys() and len(flat) == 8
    assert all(mx.abs(leaf).max().item() > 0 for leaf in flat.values())


@pytest.mark.parametrize("vocabulary", [49152, 152064])
def test_museum_sums_over_a_vocabulary_keep_their_digits(vocabulary, monkeypatch):
    """MLX's CPU adds a long row up one after the other: ``mx.logsumexp`` and ``mx.fast.cross_entropy`` err by
    5e-5 at 49,152 logits and by 2e-4 at 152,064."""
    logits = np.random.default_rng(0).normal(size=(4, vocabulary)).astype(np.float32)
    exact = np.log(np.exp(logits.astype(np.float64)).sum(axis=-1))
    for choice in ("on", "operations"):
        monkeypatch.setenv("TUNESMITH_KERNELS", choice)
        np.testing.assert_allclose(np.array(kernels.log_sums(mx.array(logits))), exact, rtol=2e-7)
        ours = np.array(kernels.token_logprobs(mx.array(logits), mx.zeros(4, mx.int32)))
        np.testing.assert_allclose(ours, logits[:, 0] - exact, rtol=3e-7)
