"""Every option of TRL's trainers has a meaning or a reason in `tunesmith init --from`."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import yaml

from tunesmith.runs.migration import translate
from tunesmith.runs.migration.keys import UNKNOWN

pytestmark = pytest.mark.parity
VALUES: dict[str, Any] = {
    "max_length": 512,
    "dataset_name": "rows.jsonl",
    "model_name_or_path": "m",
    "lora_target_modules": ["q_proj"],
    "lora_modules_to_save": ["norm"],
    "completion_only_loss": True,
    "lr_scheduler_kwargs": {"num_cycles": 1},
    "lr_scheduler_type": "linear",
    "optim": "adamw_torch",
    "eval_strategy": "no",
}
"""Of options whose default is null or an object."""


@pytest.mark.parametrize("name", ["SFTConfig", "DPOConfig", "KTOConfig"])
def test_no_option_is_unknown(name, tmp_path):
    trl = pytest.importorskip("trl")
    old: dict[str, Any] = {}
    for config in (getattr(trl, name), trl.ModelConfig, trl.ScriptArguments):
        for field in dataclasses.fields(config):
            default = field.default if field.default is not dataclasses.MISSING else None
            plain = isinstance(default, bool | int | float | str) and type(default) in (bool, int, float, str)
            old[field.name] = VALUES.get(field.name, default if plain else 1)
    old["loss_type"] = {"SFTConfig": "nll", "DPOConfig": ["sigmoid"], "KTOConfig": "kto"}[name]
    path = tmp_path / "old.yaml"
    path.write_text(yaml.safe_dump(old), encoding="utf-8")
    translation = translate(path, program="trl")
    assert [entry.key for entry in translation.left_out if entry.reason == UNKNOWN] == []
    assert len(translation.used) > 25 and len(old) > 140
