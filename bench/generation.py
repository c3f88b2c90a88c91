"""How many tokens a second are generated, one answer at a time and several at once?

Greedy continuations of prompts of 64 tokens, the same for each way: with the compiled kernels, with chains of
MLX's operations in their place (``TUNESMITH_KERNELS=operations``), and, where torch is installed, with
transformers' ``generate``. Each way is a process of its own; they take turns. ``ratio``: seconds of the other
way over ours inside a round, above 1 if ours is faster. The greedy tokens must agree for the most part: where
two tokens are nearly as likely, a rounding decides.

    python bench/generation.py --out bench/results/generation.json
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import ours
import record
import small

import rivals

BATCHES = (1, 4, 16)
PROMPT, NEW = 64, 48  # tokens
AGREE = 0.5  # share of equal tokens, at least


def prompts(count: int, vocabulary: int) -> list[list[int]]:
    return [
        [1 + (7 * place + 31 * row) % (vocabulary - 1) for place in range(PROMPT)] for row in range(count)
    ]


def generate(path: str, way: str) -> Any:
    """The function (prompts) → continuations of ``NEW`` tokens each."""
    if way == "torch":
        import torch
        from transformers import AutoModelForCausalLM

        theirs = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
        theirs.generation_config.eos_token_id = None

        def by_torch(given: list[list[int]]) -> list[list[int]]:
            with torch.no_grad():
                ids = torch.tensor(given)
                made = theirs.generate(
                    ids,
                    attention_mask=torch.ones_like(ids),
                    max_new_tokens=NEW,
                    do_sample=False,
                    pad_token_id=0,
                )
            return made[:, PROMPT:].tolist()

        return by_torch
    net = ours.load(ours.config(path, {"model": {"dtype": "float32"}}))
    from tunesmith.engine import generation

    def by_us(given: list[list[int]]) -> list[list[int]]:
        made = generation.generate(net, given, max_tokens=NEW, eos_ids=[-1], batch_size=len(given))
        return [answer.ids for answer in made]

    return by_us


def work(path: str, way: str) -> None:
    """In a process of its own: for each line with a batch size, one JSON line of seconds and tokens."""
    make = generate(path, way)
    vocabulary = json.loads((Path(path) / "config.json").read_text("utf-8"))["vocab_size"]
    make(prompts(1, vocabulary))  # warm
    print("ready", flush=True)
    for line in sys.stdin:
        given = prompts(int(line), vocabulary)
        started = time.perf_counter()
        ids = make(given)
        print(json.dumps({"seconds": time.perf_counter() - started, "ids": ids}), flush=True)


def start(path: str, way: str) -> subprocess.Popen[str]:
    environment = os.environ | ({"TUNESMITH_KERNELS": "operations"} if way == "operations" else {})
    command = [sys.executable, __file__, "--model", path, "--worker", way]
    process = subprocess.Popen(
        command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None and process.stdout.readline().strip() == "ready"
    return process


def ask(process: subprocess.Popen[str], batch: int) -> dict[str, Any]:
    assert process.stdin is not None and process.stdout is not None
    print(batch, file=process.stdin, flush=True)
    return json.loads(process.stdout.readline())


def compare(path: str, ways: list[str], rounds: int) -> dict[str, Any]:
    processes = {way: start(path, way) for way in ways}
    batches: dict[str, Any] = {}
    for batch in BATCHES:
        answers = [{way: ask(processes[way], batch) for way in ways} for _ in range(rounds)]
        first = answers[0]
        seconds = {way: statistics.median(answer[way]["seconds"] for answer in answers) for way in ways}

        def ratio(way: str, answers: list[dict[str, Any]] = answers) -> list[float]:
            return [answer[way]["seconds"] / answer["compiled"]["seconds"] for answer in answers]

        def equal(way: str, first: dict[str, Any] = first) -> float:
            rows = zip(first[way]["ids"], first["compiled"]["ids"], strict=True)
            same = [left == right for row in rows for left, right in zip(*row, strict=True)]
            return sum(same) / len(same)

        batches[str(batch)] = {
            "tokens_per_second": {way: batch * NEW / seconds[way] for way in ways},
            "ratio": {way: statistics.median(ratio(way)) for way in ways[1:]},
            "min_max": {way: [min(ratio(way)), max(ratio(way))] for way in ways[1:]},
            "equal_tokens": {way: equal(way) for way in ways[1:]},
        }
    for process in processes.values():
        assert process.stdin is not None
        process.stdin.close()
        process.wait()
    return batches


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default=rivals.default_model(), help="folder or GGUF file")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--worker", choices=("compiled", "operations", "torch"), help=argparse.SUPPRESS)
    parser.add_argument("--smoke", action="store_true", help=small.HELP)
    options = parser.parse_args()
    if options.worker:
        work(options.model, options.worker)
        return 0
    with small.inputs(options, rounds=1):
        if not Path(options.model).exists():
            parser.error(f"--model: {options.model} is not there; `make demo` fetches it")
        ways = ["compiled", "operations", *(["torch"] if importlib.util.find_spec("torch") else [])]
        folder = ours.folder(options.model)
        batches = compare(str(folder), ways, options.rounds)
        result = record.keep(
            {"benchmark": "generation", "prompt": PROMPT, "new": NEW, "batches": batches}, options.out
        )
        print(json.dumps(result, indent=1))
        shares = [share for part in batches.values() for share in part["equal_tokens"].values()]
        return 0 if options.smoke or min(shares) >= AGREE else 1


if __name__ == "__main__":
    sys.exit(main())
