"""How fast a model generates on this machine, how long its first token takes, and how much memory it needs.

Every side does the same work: prompts of given lengths, continued greedily for a given number of tokens past
any end token. Tokens a second are generated tokens over the whole time, the prompt's included. Rounds are the
sources of speed and memory, prompts those of latency, whose percentiles are bootstrapped over prompts with
all their rounds. An adapter is measured beside its base, not merged: merged, it costs nothing. Memory is
MLX's, weights included, without Python's.

Times get no verdict: base and tuned are timed one after the other, so other load on the machine can affect
all rounds of one side, and no interval over rounds distinguishes that from a slower model. Of several ranks
only the first measures, while the others wait."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import mlx.core as mx
import numpy as np

from tunesmith.data.formats import JSON
from tunesmith.engine import generation
from tunesmith.evaluation import statistics, suites
from tunesmith.evaluation.statistics import BOOTSTRAP, ONE, Statistic
from tunesmith.evaluation.subject import Subject
from tunesmith.evaluation.tasks import Material, Meaning, Task, digest, register
from tunesmith.machine import backend
from tunesmith.runs.records import ExampleScore, Score
from tunesmith.tokens.template import Renderer

BATCHES = (1, 4, 16)
PROMPT, SPOKEN = 48, 24
"""Tokens of each prompt, and generated after it, for speed."""
WARM_UP = 2
"""Tokens generated after each prompt before the first round."""
ROUNDS = 5
LATENCY_ROUNDS = 2
LENGTHS = tuple(int(length) for length in np.geomspace(8, 256, 30).round())
"""Tokens of the prompts for latency."""
PERCENTILES = (50, 95, 99)


class Timed(NamedTuple):
    """One measurement. ``kind``: speed, memory or latency. ``value``: seconds for ``units`` tokens, or
    bytes."""

    source: str
    kind: str
    size: int  # sequences at once; of latency, tokens of the prompt
    value: float
    units: float


def _speed(size: int) -> Statistic:
    def of(score: ExampleScore) -> float | None:
        return score.value if (score.detail["kind"], score.detail["size"]) == ("speed", size) else None

    return Statistic(f"speed_batch_{size}", of, lambda each: 1 / each, unit="tokens/s")


def _memory(score: ExampleScore) -> float | None:
    return score.value if score.detail["kind"] == "memory" else None


class Efficiency(Task[Timed]):
    """``value``: seconds a token, bytes, or seconds to the first token; ``units``: tokens, or 1."""

    name, version = "efficiency", "1"
    statistics = (*map(_speed, BATCHES), Statistic("peak_memory", _memory, better="lower", unit="bytes"))
    question = "efficiency"
    title, asks = "Speed, time to the first token, memory", "prompts of fixed lengths"
    meanings = (
        *(
            Meaning(
                f"speed_batch_{size}",
                f"Speed in batches of {size}",
                f"tokens generated a second, {size} answers at a time",
            )
            for size in BATCHES
        ),
        Meaning(
            "peak_memory", "Peak memory", "the most memory that MLX held while generating, weights included"
        ),
        *(
            Meaning(
                f"first_token_p{rank}",
                f"Time to the first token, {rank}th percentile",
                f"{rank} of 100 prompts wait less for their first token",
            )
            for rank in PERCENTILES
        ),
    )
    cached = False

    def __init__(self, renderer: Renderer, limit: int | None = None) -> None:
        self._rounds = min(ROUNDS, limit or ROUNDS)
        self._lengths = _spread(limit or len(LENGTHS))
        words = " ".join(str(entry.row["text"]) for entry in suites.entries("text", ()))
        ids = renderer.text_prompt(words)
        self._ids = ids * -(-max(*LENGTHS, PROMPT + max(BATCHES)) // len(ids))

    @property
    def identity(self) -> str:
        return digest(
            self.name,
            self.version,
            [list(BATCHES), PROMPT, SPOKEN, self._rounds, LATENCY_ROUNDS, list(self._lengths)],
            self._ids,
        )

    def measure(self, subject: Subject) -> list[Timed]:
        """All rounds after a warm-up; empty on ranks other than the first."""
        if not subject.ranks.writes:
            return []
        tick, done, timed = subject.ticker("speed"), 0, list[Timed]()
        for round in range(-1, self._rounds):
            mx.reset_peak_memory()
            for size in BATCHES:
                prompts = [self._ids[index : index + PROMPT] for index in range(size)]
                began = time.perf_counter()
                spoken = SPOKEN if round >= 0 else WARM_UP
                made = generation.generate(
                    subject.net, prompts, max_tokens=spoken, eos_ids=(), batch_size=size
                )
                spent, tokens = time.perf_counter() - began, sum(len(answer.ids) for answer in made)
                if round >= 0:
                    timed.append(Timed(f"round {round + 1}", "speed", size, spent / tokens, tokens))
                done += 1
                tick(done, (self._rounds + 1) * len(BATCHES))
            if round >= 0:
                timed.append(Timed(f"round {round + 1}", "memory", max(BATCHES), backend.memory()["peak"], 1))
        tick = subject.ticker("latency")
        next(generation.stream(subject.net, self._ids[: max(self._lengths)], max_tokens=1, eos_ids=()))
        for round in range(LATENCY_ROUNDS):
            for index, length in enumerate(self._lengths):
                began = time.perf_counter()
                next(generation.stream(subject.net, self._ids[:length], max_tokens=1, eos_ids=()))
                spent = time.perf_counter() - began
                timed.append(Timed(f"prompt {index + 1}", "latency", length, spent, 1))
                tick(round * len(self._lengths) + index + 1, LATENCY_ROUNDS * len(self._lengths))
        return timed

    def score(self, items: Sequence[Timed]) -> list[ExampleScore]:
        scores: list[ExampleScore] = []
        for item in items:
            detail: dict[str, JSON] = {"kind": item.kind, "size": item.size}
            scores.append(
                ExampleScore(item.source, item.value, item.units, detail, f"{item.kind}, {item.size}")
            )
        return scores

    def summarise(
        self, base: Sequence[ExampleScore] | None, tuned: Sequence[ExampleScore], seed: int
    ) -> list[Score]:
        """The ratios of sums as every task has them, then percentiles of the time to the first token, in
        seconds."""
        scores = super().summarise(base, tuned, seed)
        sides = [_latencies(side) for side in (tuned, base) if side is not None]
        return scores + [self._percentile(rank, sides, seed) for rank in PERCENTILES]

    def _percentile(self, rank: int, sides: Sequence[np.ndarray], seed: int) -> Score:
        """sides: (prompts, rounds) seconds of tuned and, if measured, base."""
        n = len(sides[0])
        drawn = np.random.default_rng(seed).integers(n, size=(statistics.RESAMPLES, n))
        values = [float(np.percentile(side, rank)) for side in sides]
        draws = np.stack([np.percentile(side[drawn].reshape(len(drawn), -1), rank, axis=1) for side in sides])

        def interval(of: np.ndarray) -> tuple[float | None, float | None]:
            low, high = np.quantile(of, statistics.edges(n)) if n > 1 else (None, None)
            return (None, None) if low is None or high is None else (float(low), float(high))

        score = Score(
            self.name,
            self.version,
            f"first_token_p{rank}",
            values[0],
            *interval(draws[0]),
            n,
            unit="s",
            note=ONE if n == 1 else None,
        )
        if len(sides) == 1:
            return score
        delta_low, delta_high = interval(draws[0] - draws[1])
        p = statistics.inverted(draws[0] - draws[1], n) if n > 1 else None
        return replace(
            score,
            delta=values[0] - values[1],
            delta_low=delta_low,
            delta_high=delta_high,
            p=p,
            test=None if p is None else BOOTSTRAP,
        )


def _spread(count: int) -> tuple[int, ...]:
    """At most ``count`` of `LENGTHS`, from the shortest to the longest; one alone is the longest."""
    count = min(count, len(LENGTHS))
    places = np.linspace(len(LENGTHS) - 1, 0, count).round().astype(int)[::-1]
    return tuple(LENGTHS[place] for place in places)


def _latencies(side: Sequence[ExampleScore]) -> np.ndarray:
    """(prompts, rounds) seconds."""
    by_source: dict[str, list[float]] = {}
    for score in side:
        if score.detail["kind"] == "latency":
            by_source.setdefault(score.source, []).append(score.value)
    return np.array(list(by_source.values()))


@register(Efficiency)
def build(material: Material) -> list[Task]:
    return [Efficiency(material.renderer, material.spec.limit)]
