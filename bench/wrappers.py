"""What does it save to split the head of a multimodal wrapper? An update of the text model inside a mistral3
of random weights, with its head split, and with all logits computed.

    python bench/wrappers.py --out bench/results/wrappers.json
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from typing import Any

import ours
from rich.table import Table
from sides import Comparison, Numbers

SIDES = ("all logits", "head split")
SIZES = {"width": 256, "layers": 2, "vocab": 131072}
SMOKE = {"width": 64, "layers": 1, "vocab": 512, "length": 32}


def prepared(side: str, options: argparse.Namespace) -> tuple[Any, Any]:
    """A mistral3 of these sizes, told whether its head can be split."""
    batch = {"sequences": options.rows, "length": options.length, "tokens": options.rows * options.length}
    settings = ours.config("random", {"batch": batch})
    from mlx_lm.models import mistral3

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
    arguments = mistral3.ModelArgs.from_dict({"model_type": "mistral3", "text_config": text})
    model = ours.randomised(lambda: mistral3.Model(arguments))
    vars(model)["_abilities"] = {"splits": side == "head split"}
    return model, settings


def table(sides: Mapping[str, Numbers]) -> Table:
    shown = Table("logits", "seconds an update", "memory above the weights", "loss")
    for side, numbers in sides.items():
        memory = f"{numbers['above_weights'] / 1e6:.0f} MB"
        shown.add_row(side, f"{numbers['seconds']:.3f}", memory, f"{numbers['loss']:.6f}")
    return shown


if __name__ == "__main__":
    Comparison(__file__, __doc__.splitlines()[0], SIDES, SIZES, SMOKE, 1, prepared, table).main()
