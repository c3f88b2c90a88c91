"""What llama.cpp itself computes from an artefact, in a process of its own:
``python -m tunesmith.exports.llama_reading JOB``.

A file that it cannot use may end the process that loads it, and what the process holds is its memory. JOB is
a folder with ``llama.json``; the log-probabilities and what else was read are written into it."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
import psutil

from tunesmith.errors import ExportError
from tunesmith.exports.llama_cpp import LlamaCpp
from tunesmith.files import read_json
from tunesmith.model.gguf import ggml

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
    """``refused``: why llama.cpp computed nothing. ``other_ids``: the texts that got other ids. ``endless``:
    the tokens at which it goes on. ``load_s``, ``memory_bytes`` and ``seconds`` of each round: what it
    costs."""

    refused: str | None = None
    other_ids: Sequence[int] = ()
    endless: Sequence[int] = ()
    load_s: float = 0.0
    memory_bytes: int = 0
    seconds: Sequence[float] = field(default_factory=list)


def run(job: LlamaJob, folder: Path) -> LlamaResult:
    """Start the process; it works in ``folder``. Raises ExportError if the system ended it."""
    (folder / JOB).write_text(json.dumps(asdict(job)), encoding="utf-8")
    words = [sys.executable, "-P", "-m", "tunesmith.exports.llama_reading", str(folder)]
    done = subprocess.run(words, capture_output=True, text=True, errors="replace", check=False)
    if done.returncode == -signal.SIGKILL:
        hint = "the machine may be out of memory: end other programs, or measure fewer --rows"
        raise ExportError("the process in which llama.cpp reads the artefact was ended", hint=hint)
    if done.returncode:
        last = done.stderr.strip().splitlines()[-1:] or [f"exit status {done.returncode}"]
        return LlamaResult(f"llama.cpp ended when it read the artefact: {last[0]}")
    return read_json(folder / RESULT, LlamaResult, ExportError, None)


def measure(folder: Path) -> LlamaResult:
    """Write the log-probabilities; returns the rest."""
    job = read_json(folder / JOB, LlamaJob, ExportError, None)
    longest = max(len(ids) for ids, _ in job.rows)
    before, began = _memory(), time.perf_counter()
    adapter = None if job.adapter is None else Path(job.adapter)
    model = LlamaCpp(Path(job.model), adapter, max(longest, len(job.prompt) + job.answer), ggml.threads())
    load_s = time.perf_counter() - began
    seconds: list[float] = []
    memory = 0
    for number in range(-1, job.rounds):
        began = time.perf_counter()
        model.generate(job.prompt, job.answer)
        if number >= 0:
            seconds.append(time.perf_counter() - began)
        memory = max(memory, _memory() - before)
    parts = [_log_probabilities(model.logits(ids, places)) for ids, places in job.rows if places]
    np.save(folder / LOGPROBS, np.concatenate(parts))
    return LlamaResult(
        other_ids=[number for number, row in enumerate(job.texts) if model.ids(row.text) != list(row.ids)],
        endless=[token for token in job.ends if not model.ends(token)],
        load_s=load_s,
        memory_bytes=memory,
        seconds=seconds,
    )


def _memory() -> int:
    return psutil.Process().memory_info().rss


def _log_probabilities(logits: np.ndarray) -> np.ndarray:
    values = logits.astype(np.float64)
    values -= values.max(axis=1, keepdims=True)
    return (values - np.log(np.exp(values).sum(axis=1, keepdims=True))).astype(np.float32)


if __name__ == "__main__":
    place = Path(sys.argv[1])
    try:
        result = measure(place)
    except ExportError as error:
        result = LlamaResult(refused=error.what)
    (place / RESULT).write_text(json.dumps(asdict(result)), encoding="utf-8")
