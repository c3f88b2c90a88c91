"""What does adapting routed experts cost? An update with adapters on attention alone, on experts too, and
with DoRA, on a mixture of experts of random weights.

Each side runs in a process of its own, since a peak of memory cannot be taken back: one update to warm up,
then the median. The rounds are interleaved. Table on stderr, JSON on stdout and to ``--out``.

    python bench/experts.py --out bench/results/experts.json
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

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
SIDES: dict[str, dict[str, Any]] = {
    "attention": {"kind": "lora", "targets": ATTENTION},
    "attention and experts": {"kind": "lora", "targets": "all-linear"},
    "the same, recomputed": {"kind": "lora", "targets": "all-linear"},
    "the same, DoRA": {"kind": "dora", "targets": "all-linear"},
}


def net(options: argparse.Namespace) -> Any:
    """A qwen3_moe with random weights in float32."""
    import mlx.core as mx
    from mlx.utils import tree_map
    from mlx_lm.models import qwen3_moe

    mx.random.seed(0)
    model = qwen3_moe.Model(
        qwen3_moe.ModelArgs(
            model_type="qwen3_moe",
            hidden_size=options.width,
            num_hidden_layers=options.layers,
            intermediate_size=options.width,
            num_attention_heads=options.width // 64,
            num_key_value_heads=max(1, options.width // 128),
            head_dim=64,
            num_experts=options.experts,
            num_experts_per_tok=options.chosen,
            moe_intermediate_size=options.inner,
            decoder_sparse_step=1,
            mlp_only_layers=[],
            rms_norm_eps=1e-6,
            vocab_size=options.vocab,
            rope_theta=1e6,
            tie_word_embeddings=True,
            max_position_embeddings=4096,
            norm_topk_prob=True,
        )
    )
    model.update(
        tree_map(lambda p: mx.random.normal(p.shape, scale=0.02) if p.ndim > 1 else p, model.parameters())
    )
    model.freeze()
    mx.eval(model.parameters())
    return model


def measure(side: str, options: argparse.Namespace) -> dict[str, Any]:
    """In this process: seconds of an update (median), trained parameters, and the peak of MLX's allocator
    above the weights."""
    rows = [
        ours.group(
            np.random.Generator(np.random.PCG64(row)).integers(0, options.vocab, options.length), 1, ""
        )
        for row in range(options.rows)
    ]
    settings = ours.config(
        "random",
        {
            "adapter": {"rank": options.rank, "alpha": 2 * options.rank, **SIDES[side]},
            "batch": {"sequences": options.rows, "length": options.length},
            "loop": {"checkpoint_gradients": side == "the same, recomputed"},
        },
    )
    model = net(options)
    update = ours.updates(model, settings, rows)
    import mlx.core as mx
    from mlx.utils import tree_flatten

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
        "trained": sum(value.size for _, value in tree_flatten(model.trainable_parameters())),
        "weights": weights,
        "above_weights": mx.get_peak_memory() - weights,
    }


def measured(side: str, words: list[str]) -> dict[str, Any]:
    """The same in a fresh process."""
    done = subprocess.run([sys.executable, __file__, *words, "--side", side], capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{side}: {done.stderr.strip()}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def table(sides: dict[str, dict[str, Any]]) -> Table:
    shown = Table("adapters on", "parameters", "seconds an update", "memory above the weights")
    first = sides["attention"]
    for side, numbers in sides.items():
        ratios = (numbers[key] / first[key] for key in ("seconds", "above_weights"))
        time_ratio, memory_ratio = (f"{ratio:.2f}×" for ratio in ratios)
        shown.add_row(
            side,
            f"{numbers['trained'] / 1e6:.2f} M",
            f"{numbers['seconds']:.3f} ({time_ratio})",
            f"{numbers['above_weights'] / 1e6:.0f} MB ({memory_ratio})",
        )
    return shown


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    sizes = {"width": 512, "layers": 4, "experts": 32, "chosen": 4, "inner": 256, "vocab": 8192, "rank": 16}
    for name, default in (sizes | {"rows": 4, "length": 256, "updates": 3, "rounds": 3}).items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--side", choices=SIDES, help="measure this alone, in this process")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--smoke", action="store_true", help=small.HELP)
    options = parser.parse_args()
    if options.smoke:
        tiny = {"width": 64, "layers": 1, "experts": 4, "chosen": 2, "inner": 32, "vocab": 256, "rank": 4}
        vars(options).update(tiny | {"rows": 2, "length": 64, "updates": 1, "rounds": 1})
    if options.side:
        print(json.dumps(measure(options.side, options)))
        return
    keys = [*sizes, "rows", "length", "updates"]
    words = [word for key in keys for word in (f"--{key}", str(vars(options)[key]))]
    rounds = [{side: measured(side, words) for side in SIDES} for _ in range(options.rounds)]
    sides = {
        side: rounds[0][side] | {"seconds": statistics.median(numbers[side]["seconds"] for numbers in rounds)}
        for side in SIDES
    }
    Console(stderr=True).print(table(sides))
    result = {"benchmark": "experts", "sizes": {key: vars(options)[key] for key in keys}, "sides": sides}
    print(json.dumps(record.keep(result, options.out)))


if __name__ == "__main__":
    main()
