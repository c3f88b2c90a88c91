"""What rows and files of settings look like."""

from __future__ import annotations

from writing import code, console, prose, table

from tunesmith.data.layout import layouts
from tunesmith.serving import keys
from tunesmith.serving.guardrails.settings import guardrail_settings
from tunesmith.settings.config import Spec, meanings
from tunesmith.sweeps.spec import SweepSpec

INTRODUCTION = """# File formats

## Rows to train on

A file is JSONL (one object a line), a JSON array, CSV, TSV or Parquet, compressed or not;
[data](../data.md) has all that is read and refused. The layout of each row is found by its keys.
`data.format` names one layout instead.
"""
OTHERS = """Any row may have `label: true` or `label: false`, a verdict on its answer. A message may have
`learn: true` or `false`. Keys that are not known are kept as metadata.
"""
SETTINGS = """## Settings

YAML with the keys of [every setting](settings.md). `tunesmith init > run.yaml` writes one.
"""
SWEEP = """## Sweep

The YAML file of `tunesmith sweep FILE`. [Sweeps](../sweeps.md) has examples.
"""
GUARDRAILS = """## Guardrails

The YAML file of `tunesmith serve --guardrails FILE`. [Serving](../serving.md#guardrails) says what each
guardrail detects.
"""
KEYS = """## Keys of the server

The JSON file of `tunesmith serve --keys FILE`: a list of objects.
"""


def text() -> str:
    parts = [INTRODUCTION]
    for layout in layouts().values():
        parts += [f"### {layout.name}\n", f"Keys: {layout.looks_like}. Becomes {layout.becomes}.\n"]
        parts.append(console(layout.example.splitlines()).replace("```", "```json", 1))
    parts += [OTHERS, SETTINGS, SWEEP, keys_of(SweepSpec), GUARDRAILS, keys_of(guardrail_settings())]
    return "\n".join([*parts, KEYS, prose(keys.KeySpec.__doc__) + "\n", keys_of(keys.KeySpec)])


def keys_of(kind: type[Spec]) -> str:
    rows = [
        (
            code(setting.key),
            setting.allowed,
            "required" if setting.default is None else code(setting.default),
            setting.effect,
        )
        for setting in meanings(kind)
    ]
    return table(["key", "value", "default", "meaning"], rows)
