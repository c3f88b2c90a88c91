"""What does it take to use an artefact on this machine: its speed and memory while it answers one prompt."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import mlx.core as mx
import mlx.nn as nn

from tunesmith.engine import generation
from tunesmith.evaluation import statistics
from tunesmith.evaluation.statistics import Statistic, TaskStatistics
from tunesmith.exports.fidelity import SEED, Probe
from tunesmith.machine import backend
from tunesmith.runs.artefacts import Cost
from tunesmith.runs.records import ExampleScore

PROMPT, ANSWER, ROUNDS = 48, 24, 5
"""Tokens of the prompt, tokens of the answer, and how often it is generated after a warm-up."""
SPEED = Statistic("speed", lambda score: score.value, lambda each: 1 / each, better="higher", unit="tokens/s")


def measure(net: nn.Module, probes: Sequence[Probe], load_s: float, tick: Callable[[int, int], None]) -> Cost:
    """load_s: how long loading took. tick: called with the number of rounds that are done, and of all."""
    prompt = prompt_of(probes)
    seconds: list[float] = []
    mx.reset_peak_memory()
    for number in range(-1, ROUNDS):
        began = time.perf_counter()
        generation.generate(net, [prompt], max_tokens=ANSWER, eos_ids=(), batch_size=1)
        spent = time.perf_counter() - began
        tick(number + 2, ROUNDS + 1)
        if number >= 0:
            seconds.append(spent)
    return summarised(load_s, backend.memory()["peak"], seconds)


def prompt_of(probes: Sequence[Probe]) -> list[int]:
    """A prompt of the rows' own tokens."""
    ids = [token for probe in probes for token in probe.ids]
    return (ids * -(-PROMPT // len(ids)))[:PROMPT]


def summarised(load_s: float, memory_bytes: int, seconds: Sequence[float]) -> Cost:
    """seconds: of each round."""
    rounds = [
        ExampleScore(f"round {number}", spent / ANSWER, ANSWER) for number, spent in enumerate(seconds, 1)
    ]
    task = TaskStatistics("export.speed", "1", [SPEED])
    return Cost(load_s, memory_bytes, statistics.summarise(task, None, rounds, SEED)[0])
