"""The script for a cluster, run by TRL on torch, begins with the loss of the run that goes on here."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import tiny
import tunesmith
from tunesmith.exports.kinds import cluster
from tunesmith.learning.optimizer import OptimizerSpec

pytestmark = [pytest.mark.parity, pytest.mark.filterwarnings("ignore")]

QUICK = ["loop.steps=6", "optimizer.learning_rate=0.01", "adapter.rank=4", "adapter.targets=all-linear"]
EPOCH = 3
"""Updates of the first epoch, in which the rows are the same."""


def train(folder: Path, model: Path, out: str, *sets: str) -> Path:
    rows = tiny.write_rows(folder / "rows.jsonl", tiny.conversations(24))
    config = tunesmith.configure(model=str(model), data=[str(rows)], sets=[*QUICK, *sets])
    tunesmith.train(config, out=folder / out)
    return folder / out


def by_trl(script: Path, out: Path, *words: str) -> list[dict]:
    """The log of the script."""
    environ = os.environ | {
        "HF_HUB_OFFLINE": "1",
        "HF_HOME": str(out.parent / "hf"),
        "CUDA_VISIBLE_DEVICES": "",
    }
    command = [sys.executable, str(script), "--out", str(out), *words]
    done = subprocess.run(command, env=environ, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return [entry for entry in json.loads((out / "log.json").read_text()) if "loss" in entry]


@pytest.mark.parametrize("setting", ["adapter.kind=lora", "adapter.kind=dora"])
def test_the_first_losses_are_those_of_the_run(setting, tmp_path, tiny_model):
    start = train(tmp_path, tiny_model, "start", setting)
    folder = tunesmith.export(start, to="cluster", rows=2).path
    on = train(tmp_path, tiny_model, "on", setting, f"adapter.start={start}")
    ours = [json.loads(line) for line in (on / "events.jsonl").read_text().splitlines()]
    ours = [event for event in ours if event["kind"] == "StepDone"]
    for words in ([], ["--micro", "4"]):
        log = by_trl(folder / "train.py", tmp_path / f"out{len(words)}", *words)
        assert len(log) == len(ours) == 6
        assert log[0]["loss"] == pytest.approx(ours[0]["loss"], abs=1e-4)
        for step in range(EPOCH):
            assert log[step]["loss"] == pytest.approx(ours[step]["loss"], abs=1e-3)
            assert log[step]["learning_rate"] == pytest.approx(ours[step]["learning_rate"], rel=1e-6)
    back = train(tmp_path, tiny_model, "back", setting, f"adapter.start={tmp_path / 'out0'}")
    assert str(tmp_path / "out0") in (back / "config.yaml").read_text()


def test_a_new_adapter_has_the_settings_of_the_run(tmp_path, tiny_model):
    folder = tunesmith.export(train(tmp_path, tiny_model, "start"), to="cluster", rows=2).path
    by_trl(folder / "train.py", tmp_path / "out", "--new", "--steps", "1")
    new, old = (
        json.loads((path / "adapter_config.json").read_text())
        for path in (tmp_path / "out", folder / "adapter")
    )
    for key in ("r", "lora_alpha", "lora_dropout", "use_rslora", "use_dora"):
        assert new[key] == old[key], key
    assert sorted(new["target_modules"]) == sorted(old["target_modules"])


@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant"])
@pytest.mark.parametrize("share", [0.0, 0.25])
def test_transformers_schedule_falls_as_ours(schedule, share):
    import torch
    from transformers import get_scheduler

    spec = OptimizerSpec(learning_rate=0.01, schedule=schedule, final_share=share)
    written = cluster._schedule(spec)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.01)
    scheduler = get_scheduler(
        written["lr_scheduler_type"],
        optimizer,
        num_warmup_steps=0,
        num_training_steps=20,
        scheduler_specific_kwargs=written.get("lr_scheduler_kwargs"),
    )
    for step in range(20):
        assert scheduler.get_last_lr()[0] == pytest.approx(spec.rate(step, 20), rel=1e-6)
        optimizer.step()
        scheduler.step()
