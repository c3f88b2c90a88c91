"""Run directories that hold what the list, the lineage and the pruning read, made without training."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from tunesmith.runs import artefacts
from tunesmith.runs.artefacts import CarriedSummary, Distances, Exported, Stops

CONFIG = """model:
  path: {model}
  adapter: null
data:
  train: [{data}]
objective:
  kind: {objective}
adapter:
  start: {start}
loop:
  seed: {seed}
"""


def run(
    path: Path,
    *,
    status: str = "completed",
    model: str = "/models/smol",
    data: str = "/data/rows.jsonl",
    objective: str = "sft",
    day: int = 1,
    seed: int = 0,
    steps: tuple[int, ...] = (10,),
    best: int | None = 10,
    best_value: float = 0.5,
    report: dict[str, Any] | None = None,
    start: Path | None = None,
) -> Path:
    """start: a checkpoint of another run."""
    path.mkdir(parents=True)
    lineage = {} if start is None else {"start": _entry(start)}
    manifest = {
        "created": f"2026-11-{day:02d}T05:04:16+00:00",
        "hashes": {"data": {data: "d1"}, "template": "7e", "base": "ba"},
        "lineage": lineage,
        "status": status,
    }
    (path / "manifest.json").write_text(json.dumps(manifest))
    settings = CONFIG.format(
        model=model, data=data, objective=objective, seed=seed, start="null" if start is None else start
    )
    (path / "config.yaml").write_text(settings)
    for step in steps:
        folder = path / "checkpoints" / f"{step:06d}"
        folder.mkdir(parents=True)
        content = f"{path.name} {step}".encode()
        (folder / "adapters.safetensors").write_bytes(content)
        cursor = {"step": step, "sha256": {"adapters.safetensors": hashlib.sha256(content).hexdigest()}}
        (folder / "cursor.json").write_text(json.dumps(cursor))
    if steps:
        index = {"last": steps[-1], "best": best, "metric": "validation loss", "best_value": best_value}
        (path / "checkpoints" / "index.json").write_text(json.dumps(index | {"kept": list(steps)}))
    if report is not None:
        (path / "report.json").write_text(json.dumps(report))
    return path


def export(run: Path, kind: str, *, accepted: bool = True, folder: str | None = None) -> Path:
    """An artefact of ``run`` that is only its record. folder: its name, if it is not ``kind``."""
    path = run / "exports" / (folder or kind)
    path.mkdir(parents=True)
    exported = Exported(
        path=path,
        kind=kind,
        checkpoint="000020",
        rows=1,
        size_bytes=1,
        distances=Distances(1, 0.0, 0.0, 0.0, 0.0, 0.0, 1.0, 0.0, 1.0, 1.0, 1.0),
        stops=Stops(1, 1, 1, 1, ()),
        weights=CarriedSummary(1),
        reasons=() if accepted else ("inert",),
    )
    artefacts.write(exported, path)
    return path


def _entry(checkpoint: Path) -> dict[str, Any]:
    manifest = checkpoint.parent.parent / "manifest.json"
    above = json.loads(manifest.read_text())["lineage"] if manifest.is_file() else {}
    value = hashlib.sha256((checkpoint / "adapters.safetensors").read_bytes()).hexdigest()
    return {"checkpoint": str(checkpoint.resolve()), "sha256": value, "lineage": above}
