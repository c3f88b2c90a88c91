"""An update without a run directory is the update of a run."""

from __future__ import annotations

import gc
import tempfile

import mlx.core as mx
import pytest

import tiny
import tunesmith
from tunesmith import events
from tunesmith.errors import TrainingError
from tunesmith.model import loading
from tunesmith.training import preparation
from tunesmith.training.without_run import UpdatesWithoutRun


def test_updates_without_a_run_give_its_losses(tiny_model, tmp_path):
    rows = tiny.write_rows(tmp_path / "rows.jsonl", tiny.conversations(12))
    settings = ["data.valid=0", "loop.steps=5", "batch.sequences=4", "loop.samples=0", "adapter.dropout=0.1"]
    resolved = tunesmith.configure(model=str(tiny_model), data=[str(rows)], sets=settings)
    done: list[events.StepDone] = []

    def hear(event: events.Event) -> None:
        if isinstance(event, events.StepDone):
            done.append(event)

    tunesmith.train(resolved, out=tmp_path / "run", notify=hear)
    net = loading.load(resolved.spec.model).net
    resolved.spec.adapter.attach(net, resolved.spec.loop.seed)
    net.train()  # dropout has no key before the first update
    update = UpdatesWithoutRun(net, resolved.spec, preparation.prepare(resolved.spec).train)
    again = [update() for _ in range(5)]
    assert [(event.step, event.loss, event.units) for event in again] == [
        (event.step, event.loss, event.units) for event in done
    ]
    assert len({event.loss for event in done}) == 5 and min(event.seconds for event in again) > 0


def test_an_update_that_is_not_finite_is_an_error(tiny_model, tmp_path):
    rows = tiny.write_rows(tmp_path / "rows.jsonl", tiny.conversations(4))
    resolved = tunesmith.configure(
        model=str(tiny_model), data=[str(rows)], sets=["data.valid=0", "loop.steps=2", "batch.sequences=4"]
    )
    net = loading.load(resolved.spec.model).net
    resolved.spec.adapter.attach(net, 0)
    net.layers[0].self_attn.q_proj.lora_b += mx.nan
    update = UpdatesWithoutRun(net, resolved.spec, preparation.prepare(resolved.spec).train)
    with pytest.raises(TrainingError, match="the update is not finite: loss nan"):
        update()


def test_the_frozen_layers_are_cached_in_a_folder_that_goes_with_the_updates(
    tiny_model, tmp_path, monkeypatch
):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    (tmp_path / "temporary").mkdir()
    rows = tiny.write_rows(tmp_path / "rows.jsonl", tiny.conversations(4))
    settings = ["data.valid=0", "loop.steps=2", "batch.sequences=4", "loop.cache_frozen=true"]
    resolved = tunesmith.configure(
        model=str(tiny_model), data=[str(rows)], sets=[*settings, "adapter.layers=1"]
    )
    net = loading.load(resolved.spec.model).net
    resolved.spec.adapter.attach(net, 0)
    update = UpdatesWithoutRun(net, resolved.spec, preparation.prepare(resolved.spec).train)
    update()
    assert len(list((tmp_path / "temporary").glob("*/*.safetensors"))) == 4
    del update
    gc.collect()
    assert list((tmp_path / "temporary").iterdir()) == []
