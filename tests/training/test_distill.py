"""Distilled rows of ``data.mix``: their loss is the divergence from the base by every way through the model,
and they keep what the other rows would change."""

from __future__ import annotations

import functools
import json
import shutil
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from unittest import mock

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from adapters import mixtures
from mlx.utils import tree_flatten
from model.families import FAMILIES, made, moved
from training import mixed_rows
from typer.testing import CliRunner

import tiny
import tunesmith
from tunesmith import events
from tunesmith.adapters import DoRA, LoRA, LoRAExperts, QALoRA, adapted, load
from tunesmith.cli import app
from tunesmith.errors import ConfigError
from tunesmith.model import kernels, loading, logprobs, wrap
from tunesmith.reports.facts import read_log
from tunesmith.reports.summary import summarise
from tunesmith.runs import checkpoints
from tunesmith.runs.config import RunConfig
from tunesmith.runs.directory import Run
from tunesmith.tokens.batches import Cut, Group, Plan, collate
from tunesmith.tokens.template import Tokens
from tunesmith.training import forecast, frozen, gradients, preparation

ADAPTERS = {
    "lora": LoRA(rank=4, targets="all-linear"),
    "dora": DoRA(rank=4, targets="all-linear"),
    "head": LoRA(rank=4, targets=("all-linear", "lm_head")),
    "upper": LoRA(rank=4, targets="all-linear", layers=1),
}
KEY = mx.random.key(0)


def groups_of(*lengths: int, vocabulary: int = 300) -> list[Group]:
    random = np.random.Generator(np.random.PCG64(5))
    groups = []
    for length in lengths:
        targets = (random.random(length) < 0.6) * random.choice([1.0, 0.5], length)
        ids = random.integers(0, vocabulary, length).astype(np.int32)
        sequence = Tokens(ids, targets.astype(np.float32))
        groups.append(Group((sequence,), "x:1", mixed=True, distilled=True))
    return groups


def config(**batch: object) -> RunConfig:
    return RunConfig(model={"path": "x"}, data={"train": "x"}, batch=batch)


@functools.cache
def net_of(folder: Path, adapter: str | None) -> nn.Module:
    net = loading.load(loading.ModelSpec(path=str(folder))).net
    if adapter is not None:
        ADAPTERS[adapter].attach(net, 0)
        net.update(moved(net.trainable_parameters()))
    mx.eval(net.parameters())
    return net.train()


def plain(net: nn.Module, base: nn.Module, groups: list[Group]):
    """Row by row: Σ weight · Σ p·(log p − log q) over the whole vocabulary, of ``base``, another model, and
    ``net``."""

    def total(weights: dict) -> mx.array:
        net.update(weights)
        loss = mx.array(0.0)
        for group in groups:
            ids = mx.array(group.sequences[0].ids)[None]
            mine, theirs = (one(ids[:, :-1])[0].astype(mx.float32) for one in (net, base))
            q, p = (logits - mx.logsumexp(logits, axis=-1, keepdims=True) for logits in (mine, theirs))
            each = (mx.exp(p) * (p - q)).sum(axis=-1)
            loss = loss + (each * mx.array(group.sequences[0].targets[1:])).sum()
        return loss

    weights = net.trainable_parameters()
    found = mx.value_and_grad(total)(weights)
    mx.eval(found)
    net.update(weights)
    return found


def assert_close(found, expected, tolerance: float = 2e-4) -> None:
    (loss, slopes), (right_loss, right) = found, expected
    assert loss.item() == pytest.approx(right_loss.item(), rel=tolerance, abs=1e-6) and loss.item() > 0.01
    left, right = dict(tree_flatten(slopes)), dict(tree_flatten(right))
    assert left.keys() == right.keys() and left
    largest = max(float(mx.abs(value).max()) for value in right.values())
    for name, value in right.items():
        scale = max(float(mx.abs(value).max()), 0.05 * largest)
        np.testing.assert_allclose(left[name] / scale, value / scale, rtol=0, atol=tolerance, err_msg=name)


@pytest.mark.parametrize(
    "way", ["padded", "packed", "rounded", "compiled", "recomputed", "in parts", "whole"]
)
@pytest.mark.parametrize(
    ("kind", "adapter"),
    [("tiny_model", "lora"), ("tiny_model", "dora"), ("tiny_mistral", "head"), ("tiny_mistral", "upper")],
)
def test_every_way_is_the_divergence_from_the_base(kind, adapter, way, request):
    folder = request.getfixturevalue(kind)
    net, groups = net_of(folder, adapter), groups_of(9, 30, 17)
    rounded = collate(groups, bucket=True)
    shape = (*rounded.tokens.shape, len(rounded.learned), way == "compiled")
    compiled = frozenset({shape} if way in ("rounded", "compiled") else ())
    split = mock.patch.object(gradients.abilities, "splits", return_value=False)
    with split if way == "whole" else ExitStack():
        runs = config(pack=way == "packed")
        shared = frozen.shared(net, groups, runs)
        assert (shared is not None) == (adapter == "upper" and way != "packed")
        step = gradients.Gradients(net, runs, compiled, shared=shared)
    with ExitStack() as around:
        if way == "recomputed":
            around.enter_context(gradients.checkpointed(net))
        if way == "in parts":
            around.enter_context(mock.patch.object(logprobs, "CHUNK", 2100))
        (loss, logps), slopes = step(groups, KEY)
        mx.eval(loss, logps, slopes)
    assert (way == "compiled") == bool(step.traces)
    assert_close((loss, slopes), plain(net, net_of(folder, None), groups))
    assert loss.item() == pytest.approx(-logps.sum().item(), rel=1e-5)


def test_a_fresh_adapter_is_its_base_to_the_last_bit(tiny_model):
    net = loading.load(loading.ModelSpec(path=str(tiny_model))).net
    LoRA(rank=4, targets="all-linear", dropout=0.5).attach(net, 0)
    (loss, _), slopes = gradients.Gradients(net.train(), config())(groups_of(20, 9), KEY)
    assert loss.item() == 0
    assert max(float(mx.abs(slope).max()) for _, slope in tree_flatten(slopes)) < 1e-6


@pytest.mark.parametrize("name", [*FAMILIES])
def test_layers_below_the_adapter_are_computed_once_and_change_nothing(name):
    net = made(name)
    LoRA(rank=1, targets="all-linear", layers=2).attach(net, 0)
    net.update(moved(net.trainable_parameters()))
    groups, runs = groups_of(7, 12, vocabulary=96), config()
    shared = frozen.shared(net.train(), groups, runs)
    assert shared is not None and shared.depth == 2
    assert frozen.shared(net, [group._replace(distilled=False) for group in groups], runs) is None
    passes: list[int] = []
    plain_call = type(net.layers[0]).__call__

    def counted(kind):
        return lambda layer, *args, **options: passes.append(1) or plain_call(layer, *args, **options)

    shares, repeats = gradients.Gradients(net, runs, shared=shared), gradients.Gradients(net, runs)
    with wrap.replaced(net.layers[:1], counted):
        (loss, _), slopes = shares(groups, KEY)
        assert len(passes) == 1
        (plain_loss, _), plain_slopes = repeats(groups, KEY)
        assert len(passes) == 3
    assert_close((loss, slopes), (plain_loss, plain_slopes))


@pytest.mark.parametrize("adapter", [LoRA(rank=2, targets="all-linear"), DoRA(rank=2, targets="all-linear")])
def test_adapted_experts_are_compared_with_those_of_the_base(adapter):
    net, base = mixtures.fresh(), mixtures.fresh()
    adapter.attach(net, 0)
    assert any(isinstance(layer, LoRAExperts) for layer in adapted(net).values())
    net.update(moved(net.trainable_parameters()))
    groups = groups_of(7, 12, vocabulary=64)
    (loss, _), slopes = gradients.Gradients(net.train(), config())(groups, KEY)
    assert_close((loss, slopes), plain(net, base, groups))


def test_cached_layers_serve_model_and_base(tiny_mistral, tmp_path):
    net, groups = net_of(tiny_mistral, "upper"), groups_of(9, 30)
    lower = frozen.Lower(net, tmp_path / "kept")
    lower.open(groups)
    (loss, _), slopes = gradients.Gradients(net, config(), lower=lower)(groups, KEY)
    assert lower.computed == 2
    assert_close((loss, slopes), plain(net, net_of(tiny_mistral, None), groups))


def test_a_quantised_base_is_the_teacher_as_it_is(tiny_mistral):
    nets = []
    for adapter in (QALoRA(rank=4, targets="all-linear"), None):
        net = loading.load(loading.ModelSpec(path=str(tiny_mistral), quantize=4)).net
        if adapter is not None:
            adapter.attach(net, 0)
            net.update(moved(net.trainable_parameters()))
        nets.append(net.train())
    groups = groups_of(9, 14)
    (loss, _), slopes = gradients.Gradients(nets[0], config())(groups, KEY)
    assert_close((loss, slopes), plain(*nets, groups))


def test_the_divergence_of_wide_rows_is_exact():
    random = np.random.Generator(np.random.PCG64(1))
    base, logits = random.normal(size=(2, 3, 50_000)) * 4
    p, q = (one - np.log(np.exp(one).sum(-1, keepdims=True)) for one in (base, logits))
    expected = (np.exp(p) * (p - q)).sum(-1)
    found, slope = mx.value_and_grad(lambda own: kernels.divergences(mx.array(base), own).sum())(
        mx.array(logits, mx.float32)
    )
    assert found.item() == pytest.approx(expected.sum(), rel=1e-5)
    np.testing.assert_allclose(slope, np.exp(q) - np.exp(p), atol=1e-6)
    same = mx.array(base, mx.float32)
    still, none = mx.value_and_grad(lambda own: kernels.divergences(same, own).sum())(same)
    assert still.item() == 0 and mx.abs(none).max().item() < 1e-7
    if kernels.choice() == "compiled":
        assert mx.abs(none).max().item() == 0


@pytest.mark.parametrize("pack", [False, True])
def test_distilled_rows_have_micro_batches_of_their_own(pack):
    lengths = tuple(range(10, 34))
    distilled = tuple(index % 3 == 0 for index in range(24))
    plan = Plan(lengths, 8, Cut(64, pack=pack), 0, distilled=distilled)
    for ranks in (1, 2):
        for step in range(3):
            micros = [micro for rank in range(ranks) for micro in plan.update(step, rank, ranks)]
            assert sorted(member for micro in micros for member in micro) == sorted(plan.members(step))
            assert all(len({distilled[member] for member in micro}) == 1 for micro in micros)
            dealt = [
                [member for micro in plan.update(step, rank, ranks) for member in micro]
                for rank in range(ranks)
            ]
            for kind in (dealt, [[member for member in share if distilled[member]] for share in dealt]):
                assert max(map(len, kind)) - min(map(len, kind)) <= (1 if kind is not dealt else 2)


def test_the_largest_micro_batch_of_each_kind_is_tried_before_the_first_update(runs):
    """The other kind may be shorter and need more: it has two sets of logits."""
    tried = {
        distill: [
            event for event in events.read(run.path / "events.jsonl") if isinstance(event, events.Probed)
        ]
        for distill, run in runs.items()
    }
    assert {distill: len(found) for distill, found in tried.items()} == {True: 2, False: 1}


SETS = [*mixed_rows.SETS, "adapter.rank=4", "optimizer.learning_rate=0.02"]


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> dict[str, Path]:
    return mixed_rows.written(tmp_path_factory.mktemp("distill"))


def settings(tiny_model: Path, files: dict[str, Path], distill: bool, *sets: str):
    mix = f"data.mix=[{{path: {files['general']}, repeat: 2, distill: {json.dumps(distill)}}}]"
    return tunesmith.configure(model=str(tiny_model), data=[str(files["task"])], sets=[*SETS, mix, *sets])


@pytest.fixture(scope="module")
def runs(tmp_path_factory, tiny_model, files) -> dict[bool, Run]:
    out = tmp_path_factory.mktemp("runs")
    for distill in (True, False):
        tunesmith.train(settings(tiny_model, files, distill), out=out / str(distill))
    return {distill: Run.open(out / str(distill)) for distill in (True, False)}


def steps_of(run: Run) -> list[events.StepDone]:
    return [event for event in events.read(run.path / "events.jsonl") if isinstance(event, events.StepDone)]


def drift(tiny_model: Path, run: Run, groups: list[Group]) -> float:
    """Mean divergence of the trained model from its base on the learned tokens of ``groups``."""
    net = loading.load(loading.ModelSpec(path=str(tiny_model))).net
    load(net, checkpoints.choose(run, "last"))
    net.eval()
    (loss, _), _ = gradients.Gradients(net, config())(groups, KEY)
    return loss.item() / sum(group.units for group in groups)


def test_distilled_rows_hold_the_model_to_its_base(runs, tiny_model, files):
    """Less than half of the divergence that learning their tokens gives, and the task is learned."""
    prepared = preparation.prepare(settings(tiny_model, files, True).spec)
    groups = [group for group in prepared.train if group.distilled][:12]
    found = {distill: drift(tiny_model, run, groups) for distill, run in runs.items()}
    assert 0 < found[True] < 0.5 * found[False]
    losses = {distill: [step.task_loss for step in steps_of(run)] for distill, run in runs.items()}
    assert np.mean(losses[True][-3:]) < 0.95 * np.mean(losses[True][:3])


def test_the_loss_of_distilled_rows_begins_at_zero_and_is_told_apart(runs):
    first, *_, last = [step for step in steps_of(runs[True]) if step.mixed_loss is not None]
    assert first.step == 1 and first.mixed_loss == 0 < last.mixed_loss
    assert steps_of(runs[False])[0].mixed_loss > 1
    counts = json.loads((runs[True].path / "data" / "plan.json").read_text())
    assert counts["mix"]["general.jsonl"]["distilled"] is True
    whole = summarise(runs[True].path, read_log(runs[True].path))
    assert "of the mixed rows (their divergence from the base) went from" in whole.loss
    assert "(their divergence" not in summarise(runs[False].path, read_log(runs[False].path)).loss
    tunesmith.report(runs[True].path)
    card = (runs[True].path / "model_card.md").read_text()
    assert "24 rows an epoch of general.jsonl (probabilities of the base are learned)" in card


def test_shown_rows_say_which_are_distilled(runs):
    for distill, run in runs.items():
        shown = CliRunner().invoke(app, ["show", str(run.path), "--json"], catch_exceptions=False).stdout
        rows = [json.loads(line) for line in shown.splitlines()]
        assert {row["mix"] for row in rows} == {None, "general.jsonl"}
        assert all(row["distilled"] is (distill and row["mix"] is not None) for row in rows)


@pytest.mark.parametrize("step", [0, 5])
def test_a_run_with_distilled_rows_is_resumed_to_the_byte(runs, tmp_path, step):
    died = Run.open(shutil.copytree(runs[True].path, tmp_path / "died"))
    for later in runs[True].checkpoints():
        if later > step:
            shutil.rmtree(died.checkpoint(later))
    died.mark("running")
    tunesmith.train(resume=died.path)
    final = [checkpoints.choose(run, "last") for run in (died, runs[True])]
    for name in ("adapters.safetensors", "optimizer.safetensors"):
        assert (final[0] / name).read_bytes() == (final[1] / name).read_bytes()


def test_a_run_may_have_distilled_entries_beside_others(tiny_model, files, tmp_path):
    other = tiny.write_rows(tmp_path / "other.jsonl", tiny.conversations(6, seed=3))
    entries = (
        f"[{{path: {files['general']}, repeat: 1, distill: true}}, {{path: {other}, repeat: 1, weight: 2}}]"
    )
    sets = [*SETS, "loop.epochs=1", "audit.before_training=false", f"data.mix={entries}"]
    settings = tunesmith.configure(model=str(tiny_model), data=[str(files["task"])], sets=sets)
    tunesmith.train(settings, out=tmp_path / "run")
    counts = json.loads((tmp_path / "run" / "data" / "plan.json").read_text())["mix"]
    assert "weight" not in counts["general.jsonl"] and counts["general.jsonl"]["distilled"] is True
    assert counts["other.jsonl"]["weight"] == 2 and "distilled" not in counts["other.jsonl"]
    steps = steps_of(Run.open(tmp_path / "run"))
    assert (
        sum(step.learned for step in steps)
        == json.loads((tmp_path / "run/data/plan.json").read_text())["supervised_tokens"]
    )
    text = summarise(tmp_path / "run", read_log(tmp_path / "run")).loss
    assert "(of the distilled ones their divergence from the base)" in text


@pytest.mark.parametrize("cut", ["batch.micro=5", "batch.pack=true", "loop.compile=true"])
def test_the_cut_into_micro_batches_changes_no_loss(tiny_model, files, tmp_path, cut):
    found = []
    for name, sets in (("a", []), ("b", [cut])):
        chosen = settings(tiny_model, files, True, "adapter.dropout=0", "loop.steps=4", *sets)
        tunesmith.train(chosen, out=tmp_path / name)
        found.append([(step.loss, step.mixed_loss) for step in steps_of(Run.open(tmp_path / name))])
    np.testing.assert_allclose(np.array(found[0], float), np.array(found[1], float), rtol=2e-3, atol=1e-5)


def test_plan_says_what_is_distilled_and_counts_its_pass(tiny_model, files):
    for distill in (True, False):
        mix = f"data.mix=[{{path: {files['general']}, repeat: 2, distill: {json.dumps(distill)}}}]"
        sets = [word for text in (*SETS, mix) for word in ("--set", text)]
        arguments = ["plan", "--model", str(tiny_model), "--data", str(files["task"]), *sets]
        shown = CliRunner().invoke(app, arguments)
        assert shown.exit_code == 0, shown.output
        assert ("probabilities of the base are learned" in shown.output) is distill
        config = settings(tiny_model, files, distill).spec
        needs = forecast.Outline.of(config).needs(preparation.prepare(config))
        found = [sized for update in needs.updates for sized in update if sized[0].distilled]
        assert bool(found) is distill
        for micro, length in found[:3]:
            pace, other = needs.pace(1e9), replace(micro, distilled=False)
            assert pace.micro(micro, length) > 1.2 * pace.micro(other, length)
            assert needs.moment_of(micro).total > needs.moment_of(other).total


@pytest.mark.parametrize(
    ("sets", "message"),
    [
        (["objective=kto"], "distill is for sft: kto compares answers"),
        (["adapter.kind=full"], "needs the base as it was, and adapter.kind is full"),
        (["adapter.full_modules=input_layernorm"], "and adapter.full_modules is set: its weights change"),
        (["model.resize_embeddings=true"], "and model.resize_embeddings is true"),
    ],
)
def test_a_run_without_its_base_is_refused(tiny_model, files, sets, message):
    kept = [text for text in SETS if not (sets == ["adapter.kind=full"] and text.startswith("adapter."))]
    mix = f"data.mix=[{{path: {files['general']}, repeat: 2, distill: true}}]"
    with pytest.raises(ConfigError, match=message):
        tunesmith.configure(model=str(tiny_model), data=[str(files["task"])], sets=[*kept, mix, *sets])
