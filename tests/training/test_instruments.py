"""What is measured while training: it moves nothing, it is what numpy says it is, and rows are called by what
they do."""

from __future__ import annotations

import dataclasses
import gc
import math
import shutil
from contextlib import nullcontext
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten, tree_map, tree_unflatten
from training.test_laws import call, final, train

import tiny
from tunesmith import adapters, events
from tunesmith.adapters import DoRA, Full, LoRA
from tunesmith.engine import scoring
from tunesmith.learning import optimizer
from tunesmith.learning.optimizer import OptimizerSpec
from tunesmith.model import loading as model
from tunesmith.model.loading import ModelSpec
from tunesmith.runs import checkpoints
from tunesmith.runs.directory import Run
from tunesmith.tokens.batches import Cut, Group
from tunesmith.tokens.template import Tokens
from tunesmith.training import gradients, instruments, preparation


@pytest.fixture(scope="module")
def rows(tmp_path_factory) -> Path:
    return tiny.write_rows(tmp_path_factory.mktemp("rows") / "rows.jsonl", tiny.conversations(20))


@pytest.fixture(scope="module")
def run(tiny_model, rows, tmp_path_factory) -> Run:
    """Eight updates over three epochs, with everything measured, dropout included."""
    words = {
        "loop__instrument_every": 3,
        "loop__activations": "true",
        "adapter__dropout": 0.1,
        "loop__keep_last": 9,
    }
    return train(tiny_model, rows, tmp_path_factory.mktemp("runs") / "measured", **words)


def log(run: Run, kind: type[events.Event]) -> list:
    return [event for event in events.read(run.path / "events.jsonl") if isinstance(event, kind)]


def timeless(run: Run, *kinds: type[events.Event]) -> list[dict]:
    return [dataclasses.asdict(event) | {"at": 0} for kind in kinds for event in log(run, kind)]


def test_a_run_with_instruments_ends_in_the_same_bytes(run, tiny_model, rows, tmp_path):
    bare = train(tiny_model, rows, tmp_path / "bare", loop__instrument_every=0, adapter__dropout=0.1)
    assert final(bare) == final(run)
    assert [step.loss for step in log(bare, events.StepDone)] == [
        step.loss for step in log(run, events.StepDone)
    ]
    assert log(bare, events.Instruments) == [] == log(bare, events.Activations)


def test_a_resumed_run_has_each_measurement_once(run, tmp_path):
    kinds = (events.Instruments, events.RowLosses, events.HeldOutLosses, events.Growth, events.Activations)
    assert [event.step for event in log(run, events.Instruments)] == [1, 3, 6, 8]
    assert [event.step for event in log(run, events.RowLosses)] == list(range(1, 9))
    again = Run(Path(shutil.copytree(run.path, tmp_path / "again")))
    for step in (6, 8):
        shutil.rmtree(again.checkpoint(step))
    again.mark("running")
    call("train", "--resume", str(again.path))
    assert final(again) == final(run)
    assert timeless(again, *kinds) == timeless(run, *kinds)


def test_gradient_norms_of_weights_make_the_global_norm(run):
    steps = {step.step: step for step in log(run, events.StepDone)}
    for event in log(run, events.Instruments):
        assert set(event.gradient) == set(event.weight) == set(event.update) == set(adapter_names(run))
        assert math.hypot(*event.gradient.values()) == pytest.approx(
            steps[event.step].gradient_norm, rel=1e-6
        )


def adapter_names(run: Run) -> list[str]:
    from safetensors.numpy import load_file

    return list(load_file(checkpoints.choose(run, "last") / "adapters.safetensors"))


def test_lora_b_has_no_ratio_before_its_first_update(run):
    first, second = log(run, events.Instruments)[:2]
    assert {name for name in first.weight if name not in first.ratios} == {
        name for name in first.weight if "lora_b" in name
    }
    assert set(second.ratios) == set(second.weight)
    name = next(iter(second.ratios))
    assert second.ratios[name] == second.update[name] / second.weight[name]


def test_sgd_moves_a_weight_by_its_rate_times_its_clipped_gradient(tiny_model, rows, tmp_path):
    words = {
        "optimizer__kind": "sgd",
        "optimizer__learning_rate": 1.0,
        "optimizer__max_norm": 0.05,
        "loop__instrument_every": 1,
    }
    moved = train(tiny_model, rows, tmp_path / "sgd", loop__steps=3, **words)
    steps = log(moved, events.StepDone)
    for step, event in zip(steps, log(moved, events.Instruments), strict=True):
        assert step.clipped
        for name, norm in event.gradient.items():
            expected = step.learning_rate * norm * 0.05 / (step.gradient_norm + 1e-6)
            rounding = 2.0**-24 * event.weight[name]  # of the weight itself, in float32
            assert event.update[name] == pytest.approx(expected, rel=1e-6, abs=rounding)


def test_stages_make_the_seconds_of_an_update(run):
    for step in log(run, events.StepDone):
        assert list(step.stages) == list(instruments.STAGES) and min(step.stages.values()) >= 0
        assert sum(step.stages.values()) == pytest.approx(step.seconds, rel=1e-9)
        assert step.stages["gradients"] > 0


def test_padding_of_the_updates_is_that_of_the_plan(run, tiny_model, rows, tmp_path):
    counts = log(run, events.RunStarted)[0].counts
    config = run.config
    plan = preparation.prepare(config, events.silent, audited=True).plan
    epoch = log(run, events.StepDone)[: plan.steps_per_epoch]
    positions = [
        sum(plan.cut.size([plan.lengths[member] for member in micro]) for micro in plan.update(step))
        for step in range(len(epoch))
    ]
    padded = sum(step.padding * count for step, count in zip(epoch, positions, strict=True))
    assert padded / sum(positions) == pytest.approx(counts["padding_share"], abs=1e-3) and padded > 0
    packed = train(tiny_model, rows, tmp_path / "packed", batch__pack="true", loop__steps=2)
    assert {step.padding for step in log(packed, events.StepDone)} == {0.0}


# ΔW


@pytest.fixture(params=["lora", "dora"])
def grown(request, tiny_model):
    net = model.load(ModelSpec(path=str(tiny_model)), events.silent).net
    kind = LoRA if request.param == "lora" else DoRA
    kind.model_validate({"rank": 6, "targets": ["all-linear"]}).attach(net, 0)
    return net


def move(net) -> None:
    noise = [
        (name, mx.random.normal(value.shape, key=mx.random.key(at)) * 0.05)
        for at, (name, value) in enumerate(flat(net))
    ]
    net.update(
        tree_unflatten(
            [(name, value + part) for (name, value), (_, part) in zip(flat(net), noise, strict=True)]
        )
    )


def flat(net) -> list:
    return [
        (name, value) for name, value in tree_flatten(net.trainable_parameters()) if not name.endswith(".m")
    ]


def test_growth_is_what_the_dense_change_says(grown, monkeypatch):
    monkeypatch.setattr(instruments, "CHUNK", 1000)  # several blocks a weight
    meter = instruments.Grown(grown)
    still = meter.event(0)
    assert (
        set(still.norms.values())
        == {0.0}
        == set(still.effective_rank.values())
        == set(still.relative.values())
    )
    move(grown)
    found = meter.event(5)
    layers = {name: layer for name, layer in grown.named_modules() if isinstance(layer, adapters.LoRALinear)}
    changes = {
        name: np.array(layer.merged_weight(), np.float64) - layer.linear.weight
        for name, layer in layers.items()
    }
    assert list(found.norms) == sorted(changes) and len(changes) == 14
    for name, change in changes.items():
        assert found.norms[name] == pytest.approx(np.linalg.norm(change), rel=1e-4)
        assert found.relative[name] == pytest.approx(
            np.linalg.norm(change) / np.linalg.norm(layers[name].linear.weight), rel=1e-4
        )
        layer = layers[name]
        dense = layer.scale * np.array(layer.lora_a, np.float64) @ np.array(layer.lora_b, np.float64)
        shares = np.linalg.svd(dense, compute_uv=False)
        np.testing.assert_allclose(instruments.low_rank_values(layer), shares[:6], rtol=1e-7)
        shares = shares[:6] / shares[:6].sum()
        assert found.effective_rank[name] == pytest.approx(np.exp(-(shares * np.log(shares)).sum()), rel=1e-9)
    entries = np.concatenate([change.reshape(-1) for change in changes.values()])
    edges, counts = found.histogram["edges"], found.histogram["counts"]
    assert sum(counts) == len(entries) and len(edges) == instruments.BINS + 1
    # An entry on an edge may differ in its last digit from numpy's.
    assert np.abs(np.histogram(entries, edges)[0] - counts).max() <= 2
    assert edges[-1] / 2 <= np.abs(entries).max() < edges[-1]


@pytest.mark.parametrize(
    ("values", "rank"),
    [([2.0, 2.0, 2.0], 3.0), ([5.0, 0.0, 0.0], 1.0), ([0.0, 0.0], 0.0), ([3.0, 1.0], None)],
)
def test_effective_rank_of_planted_values(values, rank):
    shares = np.array([0.75, 0.25])
    expected = float(np.prod(shares**-shares)) if rank is None else rank  # the product form of exp(entropy)
    assert instruments.effective_rank(np.array(values)) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("rank", [1, 3, 6])
def test_factors_of_lower_rank_are_found_out(grown, rank):
    move(grown)
    layer = next(layer for _, layer in grown.named_modules() if isinstance(layer, adapters.LoRALinear))
    columns = np.array(layer.lora_a)
    columns[:, rank:] = columns[:, :1]
    layer.lora_a = mx.array(columns)
    dense = layer.scale * columns.astype(np.float64) @ np.array(layer.lora_b, np.float64)
    expected = np.linalg.svd(dense, compute_uv=False)[:6]
    found = instruments.low_rank_values(layer)
    assert np.count_nonzero(found) == rank
    np.testing.assert_allclose(found, np.where(np.arange(6) < rank, expected, 0.0), rtol=1e-7)


def test_a_histogram_is_the_same_in_any_order_and_by_numpys_word():
    random = np.random.Generator(np.random.PCG64(3))
    parts = [random.normal(0, scale, 500).astype(np.float32) for scale in (1e-6, 1e-3, 3.0)]
    parts.append(np.array([0.0, -0.0, 0.5, -0.5, 4.0, -4.0], np.float32))  # on edges
    found = []
    for order in (parts, parts[::-1]):
        histogram = instruments.Histogram()
        for part in order:
            histogram.add(part)
        found.append(histogram.content)
    assert found[0] == found[1]
    entries = np.concatenate(parts)
    assert np.histogram(entries, found[0]["edges"])[0].tolist() == found[0]["counts"] and sum(
        found[0]["counts"]
    ) == len(entries)
    assert instruments.Histogram().content == {}


def test_full_weights_have_no_growth(tiny_model):
    net = model.load(ModelSpec(path=str(tiny_model)), events.silent).net
    Full.model_validate({"targets": ["q_proj"]}).attach(net, 0)
    assert instruments.Grown(net).event(3) == events.Growth(3, {}, at=pytest.approx(0, abs=1e12))


# Activations


def test_activations_are_those_of_the_layers_and_the_classes_come_back(tiny_model):
    net = model.load(ModelSpec(path=str(tiny_model)), events.silent).net
    random = np.random.Generator(np.random.PCG64(1))
    lengths = (5, 9, 1)
    groups = [
        Group((Tokens(random.integers(3, 300, length).astype(np.int32), np.ones(length, np.float32)),), "")
        for length in lengths
    ]
    kinds = [type(layer) for layer in net.layers]
    for recomputed in (False, True):
        with gradients.checkpointed(net) if recomputed else nullcontext():
            inside = [type(layer) for layer in net.layers]
            found = instruments.activations(net, groups, 4)
            assert [type(layer) for layer in net.layers] == inside
        assert [type(layer) for layer in net.layers] == kinds
        outputs = {name: [] for name in ("model.layers.0", "model.layers.1")}
        for group in groups:
            ids = group.sequences[0].ids
            hidden = net.model.embed_tokens(mx.array(ids[: max(1, len(ids) - 1)])[None])
            for index, layer in enumerate(net.layers):
                hidden = layer(hidden, "causal", None)
                outputs[f"model.layers.{index}"].append(np.array(hidden).reshape(-1))
        assert list(found.rms) == list(outputs) == list(found.largest)
        for name, parts in outputs.items():
            whole = np.concatenate(parts)
            assert found.rms[name] == pytest.approx(
                float(np.sqrt(np.mean(whole.astype(np.float64) ** 2))), rel=1e-5
            )
            assert found.largest[name] == pytest.approx(float(np.abs(whole).max()), rel=1e-5)
    gc.collect()
    assert not [kind for kind in kinds[0].__subclasses__() if kind.__name__.startswith("Listening")]


def test_activations_are_logged_at_validations(run):
    assert [event.step for event in log(run, events.Activations)] == [
        event.step for event in log(run, events.Validated)
    ]


# Rows


@pytest.mark.parametrize("objective", ["sft", "kto", "dpo"])
def test_the_first_losses_of_rows_are_those_of_the_base(tiny_model, tmp_path, objective, monkeypatch):
    monkeypatch.setenv("TUNESMITH_CACHE", str(tmp_path / "cache"))
    words = tiny.conversations(12)
    if objective == "kto":
        words = [row | {"label": index % 3 != 0} for index, row in enumerate(words)]
    if objective == "dpo":
        words = [
            {
                "prompt": f"question {index}",
                "chosen": row["conversations"][1]["content"] + " a",
                "rejected": "while away",
            }
            for index, row in enumerate(words)
        ]
    data = tiny.write_rows(tmp_path / "rows.jsonl", words)
    done = train(
        tiny_model,
        data,
        tmp_path / "run",
        objective=objective,
        loop__steps=1,
        batch__sequences=12,
        batch__micro=None,
    )
    prepared = preparation.prepare(done.config, events.silent, audited=True)
    net = model.load(done.config.model, events.silent).net
    (found,) = log(done, events.RowLosses)
    sums = scoring.sequence_sums(net, prepared.train, Cut(400))
    expected = {
        group.source: -pairs[0][0] / pairs[0][1] for group, pairs in zip(prepared.train, sums, strict=True)
    }
    units = {group.source: pairs[0][1] for group, pairs in zip(prepared.train, sums, strict=True)}
    assert found.losses == pytest.approx(expected, rel=1e-5) and found.units == units and found.epoch == 1
    assert found.avoided == sorted(group.source for group in prepared.train if group.label is False)
    assert bool(found.avoided) == (objective == "kto")


def test_every_row_is_told_once_an_epoch(run):
    by_epoch: dict[int, list[str]] = {}
    for event in log(run, events.RowLosses):
        by_epoch.setdefault(event.epoch, []).extend(event.losses)
    per_epoch = log(run, events.RunStarted)[0].counts["rows_train"]
    assert (
        list(by_epoch) == [1, 2, 3]
        and [len(set(sources)) == len(sources) for sources in by_epoch.values()] == [True] * 3
    )
    assert len(by_epoch[1]) == len(by_epoch[2]) == per_epoch and set(by_epoch[1]) == set(by_epoch[2])


def test_losses_of_held_out_rows_make_the_validation_loss(run):
    validations = {event.step: event for event in log(run, events.Validated)}
    assert len(validations) > 2
    for event in log(run, events.HeldOutLosses):
        total = sum(loss * event.units[source] for source, loss in event.losses.items())
        validated = validations.pop(event.step)
        assert sum(event.units.values()) == validated.units and len(event.losses) == validated.rows
        assert total / validated.units == pytest.approx(validated.loss, rel=1e-12)
    assert not validations


def test_held_out_groups_of_one_source_are_one_row_and_one_without_units_has_no_loss():
    groups = [Group((), source) for source in ("a:1", "a:1", "b:2")]
    event = instruments.held_out_losses(4, groups, np.array([3.0, 1.0, 0.0]), [1.0, 3.0, 0.0])
    assert (event.step, event.losses, event.units) == (4, {"a:1": 1.0}, {"a:1": 4.0})


def test_a_row_with_nothing_learned_has_no_loss_and_one_source_is_one_row():
    def group(source: str, *targets: float) -> Group:
        return Group(
            (Tokens(np.arange(len(targets), dtype=np.int32), np.array(targets, np.float32)),), source
        )

    groups = [group("a:1", 0, 1, 1), group("a:1", 0, 0, 0.5), group("b:2", 1, 0, 0)]
    found = instruments.row_losses(3, 2, groups, np.array([-4.0, -1.0, 0.0]))
    assert (
        found.losses == {"a:1": pytest.approx(2.0)}
        and found.units == {"a:1": 2.5}
        and (found.step, found.epoch) == (3, 2)
    )


def test_what_is_not_finite_is_counted_and_large_norms_are_told(grown):
    histogram = instruments.Histogram()
    histogram.add(np.array([1.0, np.inf, -np.inf, np.nan, 3e38], np.float32))
    assert histogram.content["not_finite"] == 3 and sum(histogram.content["counts"]) == 2
    assert instruments.norms({"w": mx.full((4,), 1e20), "z": mx.zeros((3,))}) == pytest.approx(
        {"w": 2e20, "z": 0.0}, rel=1e-6
    )
    move(grown)
    layers = [
        (name, layer)
        for name, layer in sorted(grown.named_modules())
        if isinstance(layer, adapters.LoRALinear)
    ]
    (spoilt, first), (huge, second) = layers[:2]
    first.lora_b = first.lora_b * math.inf
    second.lora_b = second.lora_b * 1e21
    found = instruments.Grown(grown).event(1)
    assert spoilt not in found.norms.keys() | found.relative.keys() | found.effective_rank.keys()
    assert found.histogram["not_finite"] > 0 and math.isfinite(found.norms[huge])
    assert found.norms[huge] > 1e19 or isinstance(
        second, adapters.DoRALinear
    )  # which turns weights and keeps their length
    assert len(found.norms) == len(layers) - 1


@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_a_measured_update_is_the_same_and_needs_room_for_one_more_weight(tiny_model, decay):
    peaks, ends = [], []
    for measured in (False, True):
        net = model.load(ModelSpec(path=str(tiny_model)), events.silent).net
        Full.model_validate({}).attach(net, 0)
        state = optimizer.build(OptimizerSpec(weight_decay=decay), net)
        gradients_of = tree_map(lambda leaf: leaf * 0.1 + 0.01, net.trainable_parameters())
        mx.eval(gradients_of, state.state, net.parameters())
        apply = instruments.Measured(net, gradients_of).apply if measured else optimizer.apply
        for _ in range(2):
            mx.reset_peak_memory()
            before = mx.get_active_memory()
            apply(state, net, gradients_of, 1e-3)
            peak = mx.get_peak_memory() - before
        peaks.append(peak)
        ends.append({name: np.array(leaf) for name, leaf in tree_flatten(net.trainable_parameters())})
    sizes = [leaf.nbytes for leaf in ends[0].values()]
    assert all(np.array_equal(ends[0][name], ends[1][name]) for name in ends[0])
    assert peaks[1] <= peaks[0] + 4 * max(sizes) < peaks[0] + sum(sizes), (peaks, sum(sizes), max(sizes))


def test_without_held_out_rows_growth_and_activations_are_told(tiny_model, rows, tmp_path):
    done = train(tiny_model, rows, tmp_path / "run", data__valid=0, loop__steps=2, loop__activations="true")
    assert log(done, events.Validated) == []
    assert (
        [event.step for event in log(done, events.Growth)]
        == [0, 2]
        == [event.step for event in log(done, events.Activations)]
    )
