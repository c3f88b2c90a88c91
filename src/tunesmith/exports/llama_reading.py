"""What llama.cpp itself computes from an artefact, in a process of its own:
``python -m tunesmith.exports.llama_reading JOB``.

A file that it cannot use may end the process that loads it, and what the process holds is its memory. JOB is
a folder with ``llama.json``; the log-probabilities and what else was read are written into it."""

from __future__ import annotations

import json
import signal
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
import psutil

from tunesmith import events
from tunesmith.errors import ExportError, SetupError, TunesmithError
from tunesmith.events import Sink
from tunesmith.exports import llama_cpp, processes
from tunesmith.exports.llama_cpp import LlamaCpp
from tunesmith.exports.processes import EndedProcess
from tunesmith.files import read_json
from tunesmith.model.gguf import ggml

ENDED = (signal.SIGKILL, signal.SIGTERM)
"""What the system, or a program that watches memory, ends a process by; a crash has other signals."""
JOB, RESULT, LOGPROBS = "llama.json", "llama_result.json", "llama.npy"


class Text(NamedTuple):
    """A text, and its ids in training."""

    text: str
    ids: Sequence[int]


@dataclass(frozen=True)
class LlamaJob:
    """``rows``: ids, and the places whose next token is predicted. ``texts``: the ids of their prompts are
    compared. ``ends``: the tokens that end trained rows. ``prompt``: is answered by ``answer`` tokens, in
    ``rounds`` rounds."""

    model: str
    adapter: str | None
    rows: Sequence[tuple[Sequence[int], Sequence[int]]]
    texts: Sequence[Text]
    ends: Sequence[int]
    prompt: Sequence[int]
    answer: int
    rounds: int


@dataclass(frozen=True)
class LlamaResult:
    """``refused``: why llama.cpp does not take the artefact. ``failed``: why nothing was computed for a
    reason that says nothing of the artefact. ``other_ids``: the texts that got other ids. ``endless``: the
    tokens at which it goes on. ``load_s``, ``memory_bytes`` and ``seconds`` of each round: what it costs."""

    refused: str | None = None
    failed: str | None = None
    other_ids: Sequence[int] = ()
    endless: Sequence[int] = ()
    load_s: float = 0.0
    memory_bytes: int = 0
    seconds: Sequence[float] = field(default_factory=list)


def run(job: LlamaJob, folder: Path, notify: Sink) -> LlamaResult:
    """Start the process; it works in ``folder``, and its progress goes to ``notify``."""
    (folder / JOB).write_text(json.dumps(asdict(job)), encoding="utf-8")
    ended = processes.follow("tunesmith.exports.llama_reading", folder, notify)
    if ended.status:
        return meaning(ended)
    try:
        return read_json(folder / RESULT, LlamaResult, SetupError, None)
    except SetupError as error:
        return LlamaResult(failed=error.what)


def meaning(ended: EndedProcess) -> LlamaResult:
    """What it means that the process failed. Only a crash in llama.cpp's code is held against the
    artefact."""
    if -ended.status in ENDED:
        reason = "the process in which llama.cpp reads was ended: the machine may be out of memory"
        return LlamaResult(failed=reason)
    if ended.status > 0 or llama_cpp.lacks_memory(ended.said):
        return LlamaResult(failed=f"the process in which llama.cpp reads failed: {ended.last_line}")
    return LlamaResult(refused=f"llama.cpp crashed when it read the artefact: {ended.last_line}")


def measure(folder: Path, notify: Sink) -> LlamaResult:
    """Write the log-probabilities; returns the rest. Raises ExportError if llama.cpp refuses the files."""
    job = read_json(folder / JOB, LlamaJob, SetupError, None)
    longest = max(len(ids) for ids, _ in job.rows)
    before, began = _memory(), time.perf_counter()
    adapter = None if job.adapter is None else Path(job.adapter)
    model = LlamaCpp(Path(job.model), adapter, max(longest, len(job.prompt) + job.answer), ggml.threads())
    load_s = time.perf_counter() - began
    seconds: list[float] = []
    memory, tick = 0, events.ticker(notify, "llama.cpp: speed")
    for number in range(-1, job.rounds):
        began = time.perf_counter()
        model.generate(job.prompt, job.answer)
        if number >= 0:
            seconds.append(time.perf_counter() - began)
        memory = max(memory, _memory() - before)
        tick(number + 2, job.rounds + 1)
    parts, tick = list[np.ndarray](), events.ticker(notify, "llama.cpp: rows")
    for done, (ids, places) in enumerate(job.rows, start=1):
        if places:
            parts.append(_log_probabilities(model.logits(ids, places)))
        tick(done, len(job.rows))
    np.save(folder / LOGPROBS, np.concatenate(parts))
    return LlamaResult(
        other_ids=[number for number, row in enumerate(job.texts) if model.ids(row.text) != list(row.ids)],
        endless=[token for token in job.ends if not model.ends(token)],
        load_s=load_s,
        memory_bytes=memory,
        seconds=seconds,
    )


def outcome(folder: Path, notify: Sink) -> LlamaResult:
    """`measure`, or why it could not."""
    try:
        return measure(folder, notify)
    except ExportError as error:
        return LlamaResult(refused=error.what)
    except TunesmithError as error:
        return LlamaResult(failed=error.what)


def _memory() -> int:
    return psutil.Process().memory_info().rss


def _log_probabilities(logits: np.ndarray) -> np.ndarray:
    values = logits.astype(np.float64)
    values -= values.max(axis=1, keepdims=True)
    return (values - np.log(np.exp(values).sum(axis=1, keepdims=True))).astype(np.float32)


if __name__ == "__main__":
    place = Path(sys.argv[1])
    (place / RESULT).write_text(json.dumps(asdict(outcome(place, processes.reporter()))), encoding="utf-8")
