"""What does it save to split the head of a multimodal wrapper? An update of the text model inside a mistral3
of random weights, with its head split, and with all logits computed.

Each side runs in a process of its own, since a peak of memory cannot be taken back: one update to warm up,
then the median. Table on stderr, JSON on stdout and to ``--out``.

    python bench/wrappers.py --out bench/results/wrappers.json
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import ours
import record
import small
from rich.console import Console
from rich.table import Table

SIDES = ("all logits", "head split")


def net(options: argparse.Namespace) -> Any:
    """A mistral3 with random weights in float32."""
    import mlx.core as mx
    from mlx.utils import tree_map
    from mlx_lm.models import mistral3

    mx.random.seed(0)
    text = {
        "model_type": "llama",
        "hidden_size": options.width,
        "num_hidden_layers": options.layers,
        "intermediate_size": 2 * options.width,
        "num_attention_heads": options.width // 64,
        "rms_norm_eps": 1e-6,
        "vocab_size": options.vocab,
        "tie_word_embeddings": True,
    }
    model = mistral3.Model(mistral3.ModelArgs.from_dict({"model_type": "mistral3", "text_config": text}))
    model.update(
        tree_map(lambda p: mx.random.normal(p.shape, scale=0.02) if p.ndim > 1 else p, model.parameters())
    )
    model.freeze()
    mx.eval(model.parameters())
    return model


def measure(side: str, options: argparse.Namespace) -> dict[str, Any]:
    """In this process: seconds of an update (median) and the peak of MLX's allocator above the weights."""
    rows = [
        ours.group(
            np.random.Generator(np.random.PCG64(row)).integers(0, options.vocab, options.length), 1, ""
        )
        for row in range(options.rows)
    ]
    batch = {"sequences": options.rows, "length": options.length, "tokens": options.rows * options.length}
    settings = ours.config("random", {"batch": batch})
    model = net(options)
    vars(model)["_abilities"] = {"splits": side == "head split"}
    update = ours.updates(model, settings, rows)
    import mlx.core as mx

    weights = mx.get_active_memory()
    mx.reset_peak_memory()
    seconds: list[float] = []
    for _ in range(1 + options.updates):
        start = time.perf_counter()
        loss = update().loss
        seconds.append(time.perf_counter() - start)
    return {
        "seconds": statistics.median(seconds[1:]),
        "loss": loss,
        "weights": weights,
        "above_weights": mx.get_peak_memory() - weights,
    }


def measured(side: str, words: list[str]) -> dict[str, Any]:
    """The same in a fresh process."""
    done = subprocess.run([sys.executable, __file__, *words, "--side", side], capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{side}: {done.stderr.strip()}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    sizes = {"width": 256, "layers": 2, "vocab": 131072, "rows": 4, "length": 256, "updates": 3}
    for name, default in sizes.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--side", choices=SIDES, help="measure this alone, in this process")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--smoke", action="store_true", help=small.HELP)
    options = parser.parse_args()
    if options.smoke:
        vars(options).update({"width": 64, "layers": 1, "vocab": 512, "rows": 2, "length": 32, "updates": 1})
    if options.side:
        print(json.dumps(measure(options.side, options)))
        return
    words = [word for key in sizes for word in (f"--{key}", str(vars(options)[key]))]
    sides = {side: measured(side, words) for side in SIDES}
    shown = Table("logits", "seconds an update", "memory above the weights", "loss")
    for side, numbers in sides.items():
        memory = f"{numbers['above_weights'] / 1e6:.0f} MB"
        shown.add_row(side, f"{numbers['seconds']:.3f}", memory, f"{numbers['loss']:.6f}")
    Console(stderr=True).print(shown)
    result = {"benchmark": "wrappers", "sizes": {key: vars(options)[key] for key in sizes}, "sides": sides}
    print(json.dumps(record.keep(result, options.out)))


if __name__ == "__main__":
    main()
