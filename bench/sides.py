"""Compares updates of several sides, such as two kinds of adapter, on a model of random weights.

Each side runs in a process of its own, since a peak of memory cannot be taken back: one update to warm up,
then the median. With several rounds the sides are interleaved. Table on stderr, JSON on stdout and to
``--out``."""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import ours
import record
import small
from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:
    import mlx.nn as nn

    from tunesmith.runs.config import RunConfig

Numbers = dict[str, Any]
SHARED = {"vocab": 0, "rows": 4, "length": 256, "updates": 3}
"""Sizes of every comparison: ids, rows of an update, tokens of a row, updates that are timed."""


@dataclass(frozen=True)
class Comparison:
    """``file``: the script, whose name is the benchmark's. ``sizes``: defaults of its options, `SHARED` among
    them; ``smoke``: the same for ``--smoke``. ``prepared``: the model and the settings of a side. ``table``:
    of the numbers by side."""

    file: str
    description: str
    sides: Sequence[str]
    sizes: Mapping[str, int]
    smoke: Mapping[str, int]
    rounds: int
    prepared: Callable[[str, argparse.Namespace], tuple[nn.Module, RunConfig]]
    table: Callable[[Mapping[str, Numbers]], Table]

    def main(self) -> None:
        options = self._options()
        if options.side:
            print(json.dumps(self._measure(options)))
            return
        sizes = {name: vars(options)[name] for name in self._defaults()}
        rounds = [
            {side: self._in_a_process(side, sizes) for side in self.sides} for _ in range(options.rounds)
        ]
        sides = {side: _median([numbers[side] for numbers in rounds]) for side in self.sides}
        Console(stderr=True).print(self.table(sides))
        result = {"benchmark": Path(self.file).stem, "sizes": sizes, "sides": sides}
        print(json.dumps(record.keep(result, options.out)))

    def _defaults(self) -> dict[str, int]:
        return SHARED | dict(self.sizes)

    def _options(self) -> argparse.Namespace:
        parser = argparse.ArgumentParser(description=self.description)
        for name, default in (self._defaults() | {"rounds": self.rounds}).items():
            parser.add_argument(f"--{name}", type=int, default=default)
        parser.add_argument("--side", choices=self.sides, help="measure this alone, in this process")
        parser.add_argument("--out", type=Path)
        parser.add_argument("--smoke", action="store_true", help=small.HELP)
        options = parser.parse_args()
        if options.smoke:
            vars(options).update({"rounds": 1, "rows": 2, "updates": 1, **self.smoke})
        return options

    def _in_a_process(self, side: str, sizes: Mapping[str, int]) -> Numbers:
        words = [word for name, size in sizes.items() for word in (f"--{name}", str(size))]
        command = [sys.executable, self.file, *words, "--side", side]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(f"{side}: {done.stderr.strip()}")
        return json.loads(done.stdout.strip().splitlines()[-1])

    def _measure(self, options: argparse.Namespace) -> Numbers:
        """In this process: seconds of an update (median), the loss, trained parameters, the weights, and the
        peak of MLX's allocator above them."""
        model, settings = self.prepared(options.side, options)
        update = ours.updates(model, settings, _rows(options))
        import mlx.core as mx
        from mlx.utils import tree_flatten

        weights = mx.get_active_memory()
        mx.reset_peak_memory()
        seconds: list[float] = []
        for _ in range(1 + options.updates):
            start = time.perf_counter()
            loss = update().loss
            seconds.append(time.perf_counter() - start)
        trained: Any = tree_flatten(model.trainable_parameters())
        return {
            "seconds": statistics.median(seconds[1:]),
            "loss": loss,
            "trained": sum(value.size for _, value in trained),
            "weights": weights,
            "above_weights": mx.get_peak_memory() - weights,
        }


def _rows(options: argparse.Namespace) -> list[Any]:
    """Random ids, all learned but the first."""
    random = [np.random.Generator(np.random.PCG64(row)) for row in range(options.rows)]
    return [ours.group(row.integers(0, options.vocab, options.length), 1, "") for row in random]


def _median(rounds: Sequence[Numbers]) -> Numbers:
    return rounds[0] | {"seconds": statistics.median(numbers["seconds"] for numbers in rounds)}
