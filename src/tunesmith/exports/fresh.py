"""Reload an artefact in a process of its own and measure it: ``python -m tunesmith.exports.fresh JOB``.

JOB is a folder with ``job.json``. The log-probabilities of the artefact, the sketches of its weights and its
answers are written into it."""

from __future__ import annotations

import json
import subprocess
import sys
import traceback
from pathlib import Path

import numpy as np

from tunesmith.errors import ExportError, TunesmithError
from tunesmith.exports import fidelity, kind, weights
from tunesmith.exports.fidelity import Probe
from tunesmith.machine import backend, imports
from tunesmith.model.loading import ModelSpec
from tunesmith.runs.directory import Run

JOB, RESULT, LOGPROBS, SKETCH = "job.json", "result.json", "artefact.npy", "artefact.npz"


def run(job: Path) -> None:
    """Start the process. Raises ExportError, with what it said, if it fails."""
    words = [sys.executable, "-m", "tunesmith.exports.fresh", str(job)]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    if done.returncode:
        last = done.stderr.strip().splitlines()[-1:] or [f"exit status {done.returncode}"]
        raise ExportError(f"the artefact cannot be reloaded: {last[0]}")


def measure(job: Path) -> None:
    """Write what the job asks."""
    settings = json.loads((job / JOB).read_text("utf-8"))
    source = ModelSpec.model_validate(settings["source"])
    opened = Run.open(settings["run"])
    chosen, folder = kind.named(settings["kind"]), Path(settings["folder"])
    reloaded = chosen.reload(folder, source, opened)
    probes = [Probe(*probe) for probe in settings["probes"]]
    differing = _differing(opened, reloaded, settings["rows"], settings["all"])
    fidelity.log_probabilities(reloaded.net, probes, job / LOGPROBS)
    answers = fidelity.answers(reloaded.net, probes, reloaded.ends)
    if reloaded.merge is not None:
        reloaded.merge()
    np.savez(job / SKETCH, **weights.sketch(reloaded.net))  # type: ignore[arg-type]
    result = {"answers": answers, "ends": reloaded.ends, "problems": [*reloaded.problems, *differing]}
    (job / RESULT).write_text(json.dumps(result), encoding="utf-8")


def _differing(opened: Run, reloaded: kind.Reloaded, limit: int, expected: list[list[int]]) -> list[str]:
    """What is said of rows that the artefact's own tokenizer and template render to other ids."""
    try:
        rendered = fidelity.rows(opened, opened.config, reloaded.renderer, limit)
    except TunesmithError as error:
        return [f"its tokenizer or template renders no row: {error.what.splitlines()[-1].strip()}"]
    actual = [probe.ids for probe in rendered]
    if actual == expected:
        return []
    n_equal = sum(ids in actual for ids in expected)
    return [f"other ids: its tokenizer and template render {n_equal} of {len(expected)} rows as in training"]


if __name__ == "__main__":
    imports.hide("torch")  # as the command line does
    backend.setup()
    try:
        measure(Path(sys.argv[1]))
    except TunesmithError as error:
        sys.exit(f"{type(error).__name__}: {' '.join(str(error).split())}")
    except Exception as error:
        traceback.print_exc()
        sys.exit(f"{type(error).__name__}: {error}")
