"""Reload an artefact in a process of its own and measure it: ``python -m tunesmith.exports.fresh JOB``.

JOB is a folder with ``job.json``. The log-probabilities of the artefact, the sketches of its weights, its
answers, its cost and its scores are written into it."""

from __future__ import annotations

import json
import signal
import sys
import time
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import mlx.core as mx
import numpy as np

from tunesmith import events
from tunesmith.errors import ExportError, TunesmithError
from tunesmith.events import Sink
from tunesmith.exports import cost, fidelity, headlines, kind, processes, weights
from tunesmith.exports.fidelity import Ended, Probe
from tunesmith.exports.kind import ForLlamaCpp
from tunesmith.files import read_json
from tunesmith.machine import backend, imports
from tunesmith.model.loading import ModelSpec
from tunesmith.runs.artefacts import Cost
from tunesmith.runs.directory import Run
from tunesmith.runs.records import ExampleScore

JOB, RESULT, LOGPROBS, SKETCH = "job.json", "result.json", "artefact.npy", "artefact.npz"


@dataclass(frozen=True)
class Job:
    """What is measured. ``rows``: most held-out rows. ``ids``: those of each row in training. ``tasks``:
    groups of tasks that are asked, each on the first ``limit`` rows and items."""

    kind: str
    folder: str
    run: str
    source: ModelSpec
    rows: int
    probes: Sequence[Probe]
    ids: Sequence[Sequence[int]]
    tasks: tuple[str, ...] = ()
    limit: int | None = None


@dataclass(frozen=True)
class Result:
    """``ends``: the tokens at which those who use the artefact stop. ``problems``: reasons to reject it.
    ``scores``: by task and version."""

    answers: Sequence[Ended]
    ends: Sequence[int]
    problems: Sequence[str]
    cost: Cost | None = None
    scores: Mapping[str, list[ExampleScore]] = field(default_factory=dict)
    remarks: Sequence[str] = ()


def run(job: Job, folder: Path, notify: Sink) -> Result:
    """Start the process; it works in ``folder``, and its progress goes to ``notify``. Raises ExportError,
    with what it said, if it fails."""
    content = {**vars(job), "source": job.source.model_dump(mode="json")}
    (folder / JOB).write_text(json.dumps(content), encoding="utf-8")
    ended = processes.follow("tunesmith.exports.fresh", folder, notify)
    if ended.status < 0:
        number = -ended.status
        name = signal.Signals(number).name if number in set(signal.Signals) else f"signal {number}"
        hint = "the machine may be out of memory: end other programs, or measure fewer --rows"
        raise ExportError(f"the process that reloads the artefact was ended by {name}", hint=hint)
    if ended.status:
        raise ExportError(f"the artefact cannot be reloaded: {ended.last_line}")
    return read_json(folder / RESULT, Result, ExportError, None)


def measure(folder: Path, notify: Sink) -> None:
    """Write what the job asks."""
    job = read_json(folder / JOB, Job, ExportError, None)
    opened, chosen = Run.open(job.run), kind.named(job.kind)
    began = time.perf_counter()
    reloaded = chosen.reload(Path(job.folder), job.source, opened, notify)
    mx.eval(reloaded.net.parameters())
    load_s = time.perf_counter() - began
    problems = [*reloaded.problems, *_differing(opened, reloaded, job.rows, job.ids)]
    tick = events.ticker(notify, "artefact: rows")
    fidelity.log_probabilities(reloaded.net, job.probes, folder / LOGPROBS, tick)
    tick = events.ticker(notify, "artefact: answers")
    answers = fidelity.answers(reloaded.net, job.probes, reloaded.ends, tick)
    tick = events.ticker(notify, "artefact: speed")
    by_llama_cpp = isinstance(chosen, ForLlamaCpp)
    spent = None if by_llama_cpp else cost.measure(reloaded.net, job.probes, load_s, tick)
    scores = headlines.measure(reloaded.net, reloaded.renderer, opened, job.tasks, job.limit, notify)
    if reloaded.merge is not None:
        reloaded.merge()
    sketches = weights.sketch(reloaded.net, events.ticker(notify, "artefact: tensors"))
    np.savez(folder / SKETCH, **sketches)  # type: ignore[arg-type]
    result = {
        "answers": answers,
        "ends": reloaded.ends,
        "problems": problems,
        "remarks": reloaded.remarks,
        "cost": spent and asdict(spent),
        "scores": {label: [asdict(score) for score in of_task] for label, of_task in scores.items()},
    }
    (folder / RESULT).write_text(json.dumps(result), encoding="utf-8")


def _differing(
    opened: Run, reloaded: kind.Reloaded, limit: int, expected: Sequence[Sequence[int]]
) -> list[str]:
    """Sentences on rows that the artefact's own tokenizer and template render to other ids."""
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
    notify_parent = processes.reporter()
    imports.hide("torch")  # as the command line does
    backend.setup()
    try:
        measure(Path(sys.argv[1]), notify_parent)
    except TunesmithError as error:
        sys.exit(f"{type(error).__name__}: {' '.join(str(error).split())}")
    except Exception as error:
        traceback.print_exc()
        sys.exit(f"{type(error).__name__}: {error}")
