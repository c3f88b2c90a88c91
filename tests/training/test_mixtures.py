"""Laws of adapters on routed experts, through the command line: cut, packed, recomputed and resumed runs
agree; what is trained is evaluated, and mlx-lm reads it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from adapters import mixtures
from mlx.utils import tree_flatten
from mlx_lm.utils import load_adapters, load_model
from safetensors.numpy import load_file
from training.test_laws import call, final, losses, train

import tiny
import tunesmith
from tunesmith import adapters, events
from tunesmith.model import loading
from tunesmith.runs import checkpoints
from tunesmith.runs.directory import Run
from tunesmith.training import story

ALL = {"adapter__targets": "all-linear"}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return mixtures.write(tmp_path_factory.mktemp("model") / "mixture")


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    return tiny.write_rows(tmp_path_factory.mktemp("rows") / "rows.jsonl", tiny.conversations(32))


def tensors(run: Run) -> dict[str, np.ndarray]:
    return load_file(checkpoints.choose(run, "last") / "adapters.safetensors")


def agree(run: Run, other: Run, tolerance: float) -> None:
    first, second = tensors(run), tensors(other)
    assert first.keys() == second.keys() and sum("switch_mlp" in name for name in first) == 12
    for name in first:
        assert np.abs(first[name]).max() > 0, name
        np.testing.assert_allclose(first[name], second[name], atol=tolerance, err_msg=name)


def test_batch_cuts_packing_and_recomputation_agree(model, rows, tmp_path):
    ways = [
        {"batch__micro": 1},
        {"batch__micro": 6},
        {"batch__micro": 6, "batch__pack": "true"},
        {"batch__micro": 2, "loop__checkpoint_gradients": "true"},
    ]
    runs = [
        train(model, rows, tmp_path / str(number), **ALL, **way, loop__steps=4, optimizer__learning_rate=1e-3)
        for number, way in enumerate(ways)
    ]
    for run in runs[1:]:
        np.testing.assert_allclose(losses(run), losses(runs[0]), rtol=5e-5)
        agree(run, runs[0], 2e-4)


def resumed(straight: Run, step: int, out: Path) -> Run:
    """A copy of ``straight`` whose process died after checkpoint ``step``, resumed."""
    shutil.copytree(straight.path, out)
    for later in straight.checkpoints():
        if later > step:
            shutil.rmtree(Run(out).checkpoint(later))
    Run(out).mark("running")
    call("train", "--resume", str(out))
    return Run(out)


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_resumed_equals_straight_to_the_byte(model, rows, tmp_path, kind):
    changes = {**ALL, "adapter__kind": kind, "adapter__dropout": 0.1, "loop__keep_last": 99}
    straight = train(model, rows, tmp_path / "a", **changes)
    again = resumed(straight, 4, tmp_path / "b")
    assert final(again) == final(straight) and losses(again) == losses(straight)


def test_a_run_from_before_experts_were_adapted_goes_on_with_its_layers(model, rows, tmp_path, monkeypatch):
    """Its checkpoint names what all-linear was up to release 0.1.0: routers, and no experts."""
    net = loading.load(loading.ModelSpec(path=str(model))).net
    linear = {name for name, layer in net.named_modules() if isinstance(layer, nn.Linear)} - {"lm_head"}
    assert len(linear) == 10
    with monkeypatch.context() as before:
        before.setattr(story, "_recorded", lambda config, resume: linear)
        old = train(model, rows, tmp_path / "a", **ALL, loop__keep_last=99)
    assert {name.rsplit(".", 1)[0] for name in tensors(old)} == linear
    again = resumed(old, 4, tmp_path / "b")
    assert final(again) == final(old)
    further = train(model, rows, tmp_path / "c", **ALL, adapter__start=old.checkpoint(8), loop__steps=1)
    assert tensors(further).keys() == tensors(old).keys()


def test_the_dry_run_says_what_is_adapted(model, rows):
    words = ["--model", str(model), "--data", str(rows), "--dry-run", "--json"]
    counts = json.loads(
        call("train", *words, "--set", "adapter.targets=all-linear", "--set", "adapter.rank=4")
    )
    assert counts["adapter"] == (
        "8 layers adapted (k_proj, o_proj, q_proj, v_proj); "
        "4 routed experts adapted in each of 6 layers (down_proj, gate_proj, up_proj); "
        "2 layers that are routers not adapted (gate)"
    )
    assert counts["trainable"] == 2 * 4 * (2 * (64 + 32) + 2 * (64 + 16) + 4 * 3 * (64 + 96))


def test_experts_that_are_not_adapted_are_said_in_the_log(model, rows, tmp_path):
    run = train(model, rows, tmp_path / "a", loop__steps=1)
    texts = [
        event.what for event in events.read(run.path / "events.jsonl") if isinstance(event, events.Notice)
    ]
    assert any("6 layers of routed experts not adapted" in text for text in texts)


def test_mlx_lm_reads_the_adapter_and_it_is_merged_and_continued(model, rows, tmp_path):
    run = train(model, rows, tmp_path / "a", **ALL, loop__steps=3)
    folder = checkpoints.choose(run, "last")
    theirs = load_adapters(load_model(model)[0], str(folder)).eval()
    net = loading.load(loading.ModelSpec(path=str(model))).net
    adapters.load(net, folder)
    ids = mx.arange(64).reshape(2, 32)
    np.testing.assert_allclose(np.array(net.eval()(ids)), np.array(theirs(ids)), atol=1e-4)
    for key in ("adapter__start", "model__adapter"):
        again = train(model, rows, tmp_path / key, **ALL, loop__steps=1, **{key: folder})
        assert losses(again)[0] < losses(run)[0]


def test_a_quantised_base_is_trained_and_evaluated(model, rows, tmp_path):
    run = train(model, rows, tmp_path / "a", **ALL, model__quantize=4, model__group_size=32, loop__steps=3)
    assert all(np.abs(value).max() > 0 for value in tensors(run).values())
    tunesmith.evaluate(run.path, tasks=["perplexity"])
    net = loading.load(run.config.model).net
    assert not [name for name, _ in tree_flatten(net.parameters()) if name.endswith("scales")]  # on a CPU
