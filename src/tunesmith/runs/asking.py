"""How a run was trained to be asked: its plan says so; of an older run, its held-out rows. Also, which tools
its first held-out rows declare."""

from __future__ import annotations

import json
from itertools import islice

from tunesmith.data import asking, formats
from tunesmith.data.asking import KINDS, AskedAs, asked_as
from tunesmith.data.formats import JSON, DataSpec, Dropped, Example
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
    return asked_as(_held_out(run))


def declared_tools(run: Run) -> list[tuple[JSON, ...]]:
    """The different lists of tools that the first `LOOKED_AT` held-out rows declare."""
    lists = {json.dumps(tools): tools for tools in map(asking.tools_of, _held_out(run))}
    return [tools for tools in lists.values() if tools]


def _held_out(run: Run) -> list[Example]:
    """The first `LOOKED_AT` held-out rows; empty if there are none."""
    file = run.path / VALID
    if not file.is_file() or not file.stat().st_size:
        return []
    rows = islice(formats.rows([file], DataSpec(train=(str(file),), valid=0.0)), LOOKED_AT)
    return [row for row in rows if not isinstance(row, Dropped)]
