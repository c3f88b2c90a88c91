"""What does adapting routed experts cost? An update with adapters on attention alone, on experts too, and
with DoRA, on a mixture of experts of random weights.

    python bench/experts.py --out bench/results/experts.json
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from typing import Any

import ours
from rich.table import Table
from sides import Comparison, Numbers

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
RECOMPUTED = "the same, recomputed"
SIDES: dict[str, dict[str, Any]] = {
    "attention": {"kind": "lora", "targets": ATTENTION},
    "attention and experts": {"kind": "lora", "targets": "all-linear"},
    RECOMPUTED: {"kind": "lora", "targets": "all-linear"},
    "the same, DoRA": {"kind": "dora", "targets": "all-linear"},
}
SIZES = {"width": 512, "layers": 4, "experts": 32, "chosen": 4, "inner": 256, "vocab": 8192, "rank": 16}
SMOKE = {"width": 64, "layers": 1, "experts": 4, "chosen": 2, "inner": 32, "vocab": 256, "rank": 4}


def prepared(side: str, options: argparse.Namespace) -> tuple[Any, Any]:
    """A qwen3_moe of these sizes, and the adapter of ``side``."""
    settings = ours.config(
        "random",
        {
            "adapter": {"rank": options.rank, "alpha": 2 * options.rank, **SIDES[side]},
            "batch": {"sequences": options.rows, "length": options.length},
            "loop": {"checkpoint_gradients": side == RECOMPUTED},
        },
    )
    from mlx_lm.models import qwen3_moe

    arguments = qwen3_moe.ModelArgs(
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
    return ours.randomised(lambda: qwen3_moe.Model(arguments)), settings


def table(sides: Mapping[str, Numbers]) -> Table:
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


if __name__ == "__main__":
    smoke = SMOKE | {"length": 64}
    Comparison(__file__, __doc__.splitlines()[0], tuple(SIDES), SIZES, smoke, 3, prepared, table).main()
