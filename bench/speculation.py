"""Does guessing ahead make one answer at a time faster, and does it stop where it does not?

Greedy continuations in float32, one at a time, with guesses from the text itself (`PromptLookup`) and
without, in turn: of a prompt whose 32 random tokens stand there six times, which models go on repeating, and
of 192 tokens without repetition. ``ratio``: tokens a second with guesses over those without, inside a round,
from the second round on: the first one is the trial. Ends with 1 if a token differs, or if a ratio's median
is below 1.5 for the repetition or 0.9 without one.

    python bench/speculation.py --out bench/results/speculation.json
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import ours
import record
import small

import rivals
from tunesmith.engine.engine import Engine
from tunesmith.engine.requests import Request
from tunesmith.engine.speculation import PromptLookup, Speculation

NEW = 96  # tokens
BARS = {"repeated": 1.5, "random": 0.9}
"""Least medians of the ratios."""


def prompts(vocabulary: int) -> dict[str, list[int]]:
    random = np.random.Generator(np.random.PCG64(0))
    return {
        "repeated": random.integers(1, vocabulary, 32).tolist() * 6,
        "random": random.permutation(np.arange(1, vocabulary))[:192].tolist(),
    }


def answer(net: Any, prompt: list[int], speculation: Speculation | None) -> tuple[list[int], float]:
    """The continuation, and tokens a second after the first."""
    with Engine(net, speculation=speculation) as engine:
        engine.submit([Request(prompt, max_tokens=NEW)])
        ids = [token.token for token in engine.step()]
        started = time.perf_counter()
        while new := engine.step():
            ids += [token.token for token in new]
        return ids, (len(ids) - 1) / (time.perf_counter() - started)


def compared(net: Any, prompt: list[int], rounds: int) -> dict[str, Any]:
    speculation = Speculation(PromptLookup())
    plain, guessed, same = [], [], True
    for _ in range(rounds):
        (expected, slow), (ids, fast) = answer(net, prompt, None), answer(net, prompt, speculation)
        same = same and ids == expected
        plain.append(slow)
        guessed.append(fast)
    pace = speculation.paces[None]
    ratios = [fast / slow for fast, slow in zip(guessed, plain, strict=True)][1:]
    return {
        "tokens_per_second": {"plain": statistics.median(plain), "guessed": statistics.median(guessed[1:])},
        "ratio": statistics.median(ratios),
        "min_max": [min(ratios), max(ratios)],
        "same_tokens": same,
        "phase": pace.phase,
        "guessed": pace.guessed,
        "accepted": pace.accepted,
    }


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default=rivals.default_model(), help="folder or GGUF file")
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--smoke", action="store_true", help=small.HELP)
    options = parser.parse_args()
    with small.inputs(options, rounds=2):
        if not Path(options.model).exists():
            parser.error(f"--model: {options.model} is not there; `make demo` fetches it")
        folder = ours.folder(options.model)
        net = ours.load(ours.config(str(folder), {"model": {"dtype": "float32"}}))
        vocabulary = json.loads((folder / "config.json").read_text("utf-8"))["vocab_size"]
        texts = {name: compared(net, prompt, options.rounds) for name, prompt in prompts(vocabulary).items()}
        result = record.keep({"benchmark": "speculation", "new": NEW, "prompts": texts}, options.out)
        print(json.dumps(result, indent=1))
        good = all(texts[name]["same_tokens"] and texts[name]["ratio"] >= bar for name, bar in BARS.items())
        return 0 if options.smoke or good else 1


if __name__ == "__main__":
    sys.exit(main())
