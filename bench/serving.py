"""How many tokens a second does the server answer with, and how soon does an answer begin?

SmolLM2 in float32 with an adapter that was trained for one update, greedy, at 1, 8 and 32 requests at once:
`tunesmith serve`; mlx-lm's server with the same adapter and the same BLAS; and, with a Python that has
xllamacpp, llama.cpp's server with the merged model in float32, as the figure to look up to. Servers are
started once, and asked in turn; prompts differ from request to request, so no cache of prompts helps. Then
eight adapters mixed in one batch, against one.

Ends with 1 if ours gives less than 1.0, 1.5 or 2.0 times the tokens a second of mlx-lm's server at 1, 8 or 32
at once, if the first tokens come later (95th percentile), or if eight adapters give less than 0.8 times the
tokens of one.

    python bench/serving.py --llama /path/to/python/with/xllamacpp --out bench/results/serving.json
    bench/gpu.sh serving --model MODEL --out bench/results/serving_gpu.json
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import os
import socket
import statistics
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import ours
import record
import small

import rivals
import tunesmith

AT_ONCE = (1, 8, 32)
BARS = {1: 1.0, 8: 1.5, 32: 2.0}
"""Requests at once → tokens a second over those of mlx-lm's server, at least."""
MIXED_BAR = 0.8
N_ADAPTERS = 8
TOKENS = 64
"""Of each answer."""
ROW = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
MLX_LM = f"""
import contextlib, ctypes
with contextlib.suppress(OSError):  # beside a GPU there may be none
    ctypes.CDLL({rivals.OPENBLAS!r}, mode=ctypes.RTLD_GLOBAL)
from mlx_lm import server
server.main()
"""
LLAMA = """
import sys, time, xllamacpp
settings = xllamacpp.CommonParams()
settings.model.path, settings.port = sys.argv[1], int(sys.argv[2])
settings.n_parallel, settings.n_ctx, settings.n_gpu_layers = int(sys.argv[3]), 512 * int(sys.argv[3]), 0
settings.cpuparams.n_threads = settings.cpuparams_batch.n_threads = int(sys.argv[4])
settings.verbosity = -1
server = xllamacpp.Server(settings)
while True:
    time.sleep(60)
"""


def adapters(model: str, folder: Path, count: int) -> list[Path]:
    """Runs of one update, LoRA of rank 16 on q and v, each with a seed of its own."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = folder / "row.jsonl"
    rows.write_text(json.dumps(ROW) + "\n")
    runs: list[Path] = []
    for seed in range(count):
        sets = ["loop.steps=1", "loop.samples=0", "batch.sequences=1", "data.valid=0", f"loop.seed={seed}"]
        sets += ["audit.before_training=false", "adapter.rank=16", "model.dtype=float32"]
        run = folder / f"adapter-{seed}"
        if not run.exists():
            tunesmith.train(tunesmith.configure(model=model, data=[str(rows)], sets=sets), out=run)
        runs.append(run)
    return runs


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@contextmanager
def started(name: str, command: Sequence[str], port: int, log: Path) -> Iterator[int]:
    """The port of a server, when it answers; it is ended on leaving."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith("OPENBLAS_")}
    with log.open("w") as output:
        process = subprocess.Popen(command, env=environment, stdout=output, stderr=subprocess.STDOUT)
    try:
        end = time.monotonic() + 300
        while not healthy(port):
            if process.poll() is not None or time.monotonic() > end:
                raise SystemExit(f"{name} did not start:\n{log.read_text()[-2000:]}")
            time.sleep(0.2)
        yield port
    finally:
        process.terminate()
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def healthy(port: int) -> bool:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5) as answer:
            return answer.status == 200
    except (urllib.error.URLError, OSError):
        return False


def commands(folder: Path, runs: Sequence[Path], options: argparse.Namespace) -> dict[str, list[str]]:
    """Name of a server → how it is started; the port is written as PORT."""
    log = str(folder / "access.log")
    serve = [sys.executable, "-m", "tunesmith", "serve", *map(str, runs), "--port", "PORT", "--log", log]
    exported = folder / "mlx"
    tunesmith.export(runs[0], to="mlx", out=exported)
    started_by: dict[str, list[str]] = {"tunesmith": [*serve, "--batch-size", str(max(AT_ONCE))]}
    rival = [sys.executable, "-c", MLX_LM, "--model", options.model, "--port", "PORT"]
    started_by["mlx_lm"] = [*rival, "--adapter-path", str(exported), "--log-level", "ERROR"]
    if options.llama:
        merged = folder / "merged"
        tunesmith.export(runs[0], to="gguf-f32", out=merged)
        (file,) = merged.glob("*.gguf")
        cores = str(len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count())
        started_by["llama_cpp"] = [options.llama, "-c", LLAMA, str(file), "PORT", str(max(AT_ONCE)), cores]
    return started_by


def ask(port: int, names: Sequence[str], at_once: int, tokens: int, seed: int) -> Mapping[str, Any]:
    """The report of ``at_once`` requests that were sent together."""
    from tunesmith.serving import load

    address = load.ServerAddress("127.0.0.1", port)
    report = asyncio.run(load.at_once(address, load.calls(names, at_once, tokens, seed=seed)))
    if report["errors"]:
        raise SystemExit(f"port {port}: not every request was answered: {report['errors']}")
    return report


def interleaved(
    ways: Mapping[str, tuple[int, Sequence[str]]],
    at_once: int,
    options: argparse.Namespace,
    seeds: Iterator[int],
) -> dict[str, Any]:
    """Each way (port, names of models) is asked in turn; the medians, and the ratios of the first way to each
    other inside a round. Prompts come from ``seeds``, and are never asked twice."""
    names = list(ways)
    rounds: list[dict[str, Mapping[str, Any]]] = []
    for number in range(options.rounds):
        order = names[number % len(names) :] + names[: number % len(names)]
        rounds.append({name: ask(*ways[name], at_once, options.tokens, next(seeds)) for name in order})
    first = names[0]

    def median(name: str, value: str) -> float:
        return statistics.median(read(reports[name], value) for reports in rounds)

    def ratio(name: str, value: str) -> dict[str, float]:
        each = [read(reports[first], value) / read(reports[name], value) for reports in rounds]
        return {"median": statistics.median(each), "min": min(each), "max": max(each)}

    values = ("tokens_per_second", "first_p95_s", "token_p95_s")
    return {
        "measured": {name: {value: median(name, value) for value in values} for name in names},
        "ratios": {name: {value: ratio(name, value) for value in values[:2]} for name in names[1:]},
    }


def read(report: Mapping[str, Any], value: str) -> float:
    if value == "tokens_per_second":
        return report[value]
    return report["first_s" if value == "first_p95_s" else "token_s"]["p95"]


def measure(folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    runs = adapters(options.model, options.folder or folder, N_ADAPTERS)
    with ExitStack() as stack:
        ports: dict[str, int] = {}
        for name, command in commands(folder, runs, options).items():
            port = free_port()
            words = [str(port) if word == "PORT" else word for word in command]
            ports[name] = stack.enter_context(started(name, words, port, folder / f"{name}.log"))
        one = {"tunesmith": [runs[0].name], "mlx_lm": ["default_model"], "llama_cpp": ["merged"]}
        ways = {name: (port, one[name]) for name, port in ports.items()}
        seeds = itertools.count()
        for way in ways.values():
            ask(*way, 2, options.tokens, next(seeds))  # warm
        result: dict[str, Any] = {"servers": {}, "adapters": {}}
        for at_once in options.at_once:
            result["servers"][str(at_once)] = interleaved(ways, at_once, options, seeds)
            say(f"{at_once} at once", result["servers"][str(at_once)])
        own = ports["tunesmith"]
        mixture = {"mixed": (own, [run.name for run in runs]), "one": (own, [runs[0].name])}
        for at_once in [count for count in options.at_once if count >= N_ADAPTERS]:
            result["adapters"][str(at_once)] = interleaved(mixture, at_once, options, seeds)
            say(f"{at_once} at once, {len(runs)} adapters", result["adapters"][str(at_once)])
    return result


def say(title: str, numbers: Mapping[str, Any]) -> None:
    for name, measured in numbers["measured"].items():
        print(f"{title}: {name}: {json.dumps(measured)}", file=sys.stderr)
    for name, ratios in numbers["ratios"].items():
        print(f"{title}: over {name}: {json.dumps(ratios)}", file=sys.stderr, flush=True)


def missed(result: Mapping[str, Any]) -> list[str]:
    """The bars that were not met."""
    texts: list[str] = []
    for at_once, numbers in result["servers"].items():
        ratios, bar = numbers["ratios"]["mlx_lm"], BARS[int(at_once)]
        speed, first = (ratios[value]["median"] for value in ("tokens_per_second", "first_p95_s"))
        if speed < bar:
            texts.append(f"{at_once} at once: {speed:.2f} times mlx-lm's tokens a second, not {bar}")
        if first > 1.0:
            texts.append(f"{at_once} at once: the first token takes {first:.2f} times as long as mlx-lm's")
    for at_once, numbers in result["adapters"].items():
        share = numbers["ratios"]["one"]["tokens_per_second"]["median"]
        if share < MIXED_BAR:
            texts.append(f"{at_once} at once: eight adapters give {share:.2f} of the tokens, not {MIXED_BAR}")
    return texts


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default=rivals.default_model(), help="folder or GGUF file")
    parser.add_argument("--llama", help="a Python that has xllamacpp, for llama.cpp's server")
    parser.add_argument("--folder", type=Path, help="keep the adapters here, or use them")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--at-once", type=int, nargs="+", choices=AT_ONCE, default=list(AT_ONCE))
    parser.add_argument("--tokens", type=int, default=TOKENS, help="of each answer")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--smoke", action="store_true", help=small.HELP)
    options = parser.parse_args()
    with small.inputs(options, rounds=1, tokens=4) as folder:
        if not Path(options.model).exists():
            parser.error(f"--model: {options.model} is not there; `make demo` fetches it")
        options.model = str(ours.folder(options.model))
        result = {"benchmark": "serving", "tokens": options.tokens} | measure(folder, options)
        print(json.dumps(record.keep(result, options.out)))
    problems = missed(result)
    for text in problems:
        print(f"missed: {text}", file=sys.stderr)
    return 0 if options.smoke else int(bool(problems))


if __name__ == "__main__":
    sys.exit(main())
