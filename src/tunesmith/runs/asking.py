"""How a run was trained to be asked: its plan says so; of an older run, its held-out rows."""

from __future__ import annotations

import json
from itertools import islice

from tunesmith.data import formats
from tunesmith.data.asking import KINDS, AskedAs, asked_as
from tunesmith.data.formats import DataSpec, Dropped
from tunesmith.runs.directory import PLAN, VALID, Run

LOOKED_AT = 100
"""Held-out rows that are enough to know."""


def of_run(run: Run) -> AskedAs:
    try:
        plan = json.loads((run.path / PLAN).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        plan = None
    recorded = plan.get("asked_as") if isinstance(plan, dict) else None
    for kind in KINDS:
        if kind == recorded:
            return kind
    held_out = run.path / VALID
    if not held_out.is_file() or not held_out.stat().st_size:
        return "chat"
    rows = islice(formats.rows([held_out], DataSpec(train=(str(held_out),), valid=0.0)), LOOKED_AT)
    return asked_as(row for row in rows if not isinstance(row, Dropped))
