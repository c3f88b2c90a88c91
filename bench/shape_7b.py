"""The same comparison at Mistral-7B's widths, with two layers and random weights: what is left to win where
products rule.

Three cases, each one update: a single row of 512 tokens; four rows, by twos in mlx-lm; eight rows, all at
once in mlx-lm. Rows have the lengths and prompt shares of real data, their tokens are random.
``product_share`` is the part of the measured time that the matrix products need which cannot be avoided, at
the rate that this machine reaches in large products."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import shutil
import statistics
import sys
import tempfile
import time
import uuid
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import record
import small

import rivals
from rivals import Job, Row

BARS = {"single": 1.0, "batch_2": 1.3, "batch_8": 1.6}
CASES = {
    "single": (1, 1),
    "batch_2": (4, 2),
    "batch_8": (8, 8),
}  # rows, and how many at once in the other trainers
SINGLE_TOKENS = 512
# padded tokens a second on two Zen 3 cores with two layers, only for the duration that is printed first
GUESSED = 55.0


@dataclasses.dataclass(frozen=True)
class Shape:
    """Widths of a Mistral model."""

    layers: int
    hidden: int = 4096
    heads: int = 32
    kv_heads: int = 8
    mlp: int = 14336
    vocab: int = 32768

    @property
    def kv(self) -> int:
        return self.hidden // self.heads * self.kv_heads

    @property
    def linears(self) -> dict[str, tuple[int, int]]:
        """Linear layers of one block: name → (in, out)."""
        return {
            "self_attn.q_proj": (self.hidden, self.hidden),
            "self_attn.k_proj": (self.hidden, self.kv),
            "self_attn.v_proj": (self.hidden, self.kv),
            "self_attn.o_proj": (self.hidden, self.hidden),
            "mlp.gate_proj": (self.hidden, self.mlp),
            "mlp.up_proj": (self.hidden, self.mlp),
            "mlp.down_proj": (self.mlp, self.hidden),
        }

    def shrunk(self, by: int) -> Shape:
        return Shape(
            self.layers,
            self.hidden // by,
            self.heads // by,
            self.kv_heads // by,
            self.mlp // by,
            self.vocab // by,
        )


def weights(shape: Shape, cache: Path) -> Path:
    """A folder in Hugging Face's layout with random weights, made once; one file a layer, so that little is
    in memory."""
    from safetensors.numpy import save_file

    target = cache / f"mistral-{shape.hidden}-{shape.mlp}-{shape.vocab}-x{shape.layers}-seed{rivals.SEED}"
    if target.is_dir():
        return target
    draft = cache / f".{uuid.uuid4().hex}"
    draft.mkdir(parents=True)
    random = np.random.Generator(np.random.PCG64(rivals.SEED))
    index: dict[str, str] = {}

    def write(name: str, matrices: dict[str, tuple[int, int]], vectors: list[str]) -> None:
        tensors = {
            key: random.standard_normal(size, dtype=np.float32) * np.float32(0.02)
            for key, size in matrices.items()
        }
        tensors |= {key: np.ones(shape.hidden, np.float32) for key in vectors}
        save_file(tensors, draft / name, metadata={"format": "pt"})
        index.update(dict.fromkeys(tensors, name))

    try:
        outer = {
            "model.embed_tokens.weight": (shape.vocab, shape.hidden),
            "lm_head.weight": (shape.vocab, shape.hidden),
        }
        write("model-outer.safetensors", outer, ["model.norm.weight"])
        for layer in range(shape.layers):
            start = f"model.layers.{layer}"
            norms = [f"{start}.input_layernorm.weight", f"{start}.post_attention_layernorm.weight"]
            inner = {f"{start}.{name}.weight": (size[1], size[0]) for name, size in shape.linears.items()}
            write(f"model-layer{layer}.safetensors", inner, norms)
        config = {
            "architectures": ["MistralForCausalLM"],
            "model_type": "mistral",
            "hidden_size": shape.hidden,
            "intermediate_size": shape.mlp,
            "num_hidden_layers": shape.layers,
            "num_attention_heads": shape.heads,
            "num_key_value_heads": shape.kv_heads,
            "head_dim": shape.hidden // shape.heads,
            "vocab_size": shape.vocab,
            "rms_norm_eps": 1e-5,
            "rope_theta": 1e6,
            "max_position_embeddings": 32768,
            "hidden_act": "silu",
            "sliding_window": None,
            "tie_word_embeddings": False,
            "dtype": "float32",
            "bos_token_id": 1,
            "eos_token_id": 2,
        }
        (draft / "config.json").write_text(json.dumps(config, indent=1), encoding="utf-8")
        whole = {"metadata": {}, "weight_map": index}
        (draft / "model.safetensors.index.json").write_text(json.dumps(whole, indent=1), encoding="utf-8")
        draft.rename(target)
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    return target


def needed(shape: Shape, job: Job) -> float:
    """Floating-point operations of the products that one update cannot avoid; a multiply-add is two.

    For each row of T tokens, K of them learned, with P weights in the linear layers of all blocks:

        forward                       2·P·T backward to activations       2·P·T, less 2·D·(D + 2·KV)·T:
        nothing below the first block's q, k and v is trained attention, causal half        2·D·T² a layer
        forward (scores, values), twice that backward adapters                      2·r·(in + out)·T for each
        adapted layer, three times: forward, activations, weights head, on learned tokens only  2·D·V·K
        forward, the same backward to activations

    Padding, recomputing and the logits of prompts are not in it: whoever computes them needs more time for
    the same."""
    per_token = 4.0 * shape.layers * sum(a * b for a, b in shape.linears.values())
    per_token -= 2.0 * shape.hidden * (shape.hidden + 2 * shape.kv)
    adapted = [size for name, size in shape.linears.items() if name.rsplit(".", 1)[-1] in job.targets]
    per_token += 6.0 * job.rank * shape.layers * sum(a + b for a, b in adapted)
    total = 0.0
    for row in job.rows:
        total += per_token * len(row.ids) + 6.0 * shape.layers * shape.hidden * len(row.ids) ** 2
        total += 4.0 * shape.hidden * shape.vocab * row.learned
    return total


def synthetic(rows: list[Row], vocab: int) -> list[Row]:
    """Rows of the same lengths and prompts, of random tokens."""
    random = np.random.Generator(np.random.PCG64(rivals.SEED))
    return [Row(random.integers(3, vocab, len(row.ids)).tolist(), row.offset) for row in rows]


def positions(job: Job) -> int:
    """Positions that all trainers together compute in one round: ours without padding, mlx-lm's with it."""
    padded = sum(len(rows) * max(len(row.ids) for row in rows) for rows in job.batches)
    return padded + sum(len(row.ids) for row in job.rows)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", default=rivals.default_data(), help="rows whose lengths are taken")
    parser.add_argument(
        "--model", default=rivals.default_model(), help="folder or GGUF file whose tokenizer counts them"
    )
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--targets", choices=sorted(rivals.TARGETS), default="qv")
    parser.add_argument("--cases", nargs="+", choices=list(CASES), default=list(CASES))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument(
        "--max-tokens", type=int, default=768, help="longest row; the default keeps a run under half an hour"
    )
    parser.add_argument("--torch", action="store_true", help="compare with plain torch too")
    parser.add_argument(
        "--shrink", type=int, choices=(1, 2, 4, 8), default=1, help="divide all widths, to try the script"
    )
    parser.add_argument(
        "--cache", type=Path, default=Path(tempfile.gettempdir()) / "tunesmith-bench", help="for the weights"
    )
    parser.add_argument("--bars", action="store_true", help="fail when a bar is missed, too")
    parser.add_argument("--out", type=Path, help="default: bench/results/shape_7b.json")
    parser.add_argument("--smoke", action="store_true", help=small.HELP)
    options = parser.parse_args()
    os.environ["BENCH_KEEP_MEMORY"] = "1"  # two trainers of a few GB each
    # The product rate is measured in this process: with the kernels that OpenBLAS chooses by itself, as in
    # the workers.
    os.environ.pop("OPENBLAS_CORETYPE", None)
    if options.rounds < 1 or options.layers < 1:
        parser.error("--rounds and --layers are at least 1")
    smaller = {"shrink": 8, "layers": 1, "max_tokens": 64, "rounds": 1, "cases": ["batch_2"]}
    with small.inputs(options, **smaller) as folder:
        options.cache = folder if options.smoke else options.cache
        rivals.require_inputs(parser, options.data, options.model)
        return compare(options)


def compare(options: argparse.Namespace) -> int:
    import ours  # opens a fast BLAS

    shape = Shape(options.layers).shrunk(options.shrink)
    _, real = rivals.our_rows(options.data, options.model, options.max_tokens)
    tokens = min(SINGLE_TOKENS, options.max_tokens)
    middle = [Row([0] * tokens, round(statistics.median(row.offset for row in real)))]
    folder = str(weights(shape, options.cache))
    jobs: dict[str, Job] = {}
    for name in options.cases:
        count, batch = CASES[name]
        rows = middle if name == "single" else rivals.quantiles(real, count, rivals.SEED)
        jobs[name] = Job(folder, synthetic(rows, shape.vocab), rivals.TARGETS[options.targets], batch=batch)
    each = sum(positions(job) for job in jobs.values()) / GUESSED * options.layers / 2 / options.shrink**2
    seconds = each * (options.rounds + 1) * (1.5 if options.torch else 1.0)
    print(
        f"{options.layers} layers {shape.hidden} wide; rows of "
        + ", ".join(f"{[len(row.ids) for row in job.rows]} ({name})" for name, job in jobs.items())
        + f"; about {seconds / 60:.0f} minutes, to {datetime.fromtimestamp(time.time() + seconds):%H:%M}",
        file=sys.stderr,
        flush=True,
    )

    others = ["mlx_lm_blas", *(["torch"] if options.torch else [])]
    without = rivals.skipped(others)
    names = ["tunesmith", *(name for name in others if name not in without)]
    repeats = 0 if options.smoke else rivals.REPEATS
    result: dict[str, Any] = record.facts() | {
        "benchmark": "shape_7b",
        "skipped": without,
        "shape": dataclasses.asdict(shape),
        "targets": options.targets,
        "rounds": options.rounds,
        "row_lengths": {name: [len(row.ids) for row in job.rows] for name, job in jobs.items()},
        "learned_tokens": {name: sum(row.learned for row in job.rows) for name, job in jobs.items()},
    }
    summary: dict[str, Any] = {"benchmark": "shape_7b"}
    problems: list[str] = []
    result["races"] = {}
    for name, job in jobs.items():
        rate = ours.product_rate()
        race = rivals.race(name, dict.fromkeys(names, job), options.rounds, repeats)
        result["races"][name] = race
        rate = max(rate, ours.product_rate())  # the ceiling: what it reaches when nothing disturbs it
        work, trainers = needed(shape, job), race["trainers"]
        ratios: dict[str, Any] = {
            f"ratio_{other}": ratio["median"] for other, ratio in race["ratios"].items()
        }
        if options.bars:
            missed = rivals.missed(ratios, {"ratio_mlx_lm_blas": BARS[name]})
            problems += [f"{name}: {text}" for text in missed]
        memory = {key: trainer["peak_rss_bytes"] for key, trainer in trainers.items()}
        result[name] = summary[name] = ratios | {
            "min_max": {
                f"ratio_{other}": [ratio["min"], ratio["max"]] for other, ratio in race["ratios"].items()
            },
            "memory_ratio_mlx_lm": memory["tunesmith"] / memory["mlx_lm_blas"]
            if "mlx_lm_blas" in memory
            else None,
            "learned_tokens_per_second": {
                key: trainer["learned_tokens_per_second"] for key, trainer in trainers.items()
            },
            "peak_rss_gb": {key: peak / 1e9 for key, peak in memory.items()},
            "product_gflop": work / 1e9,
            "product_gflops": rate / 1e9,
            "product_share": {key: work / rate / trainer["seconds"] for key, trainer in trainers.items()},
            "agree": race["agree"],
            "rejected": race["rejected"],
            "disturbed": race["disturbed"],
        }
    out = options.out or Path(__file__).parent / "results" / "shape_7b.json"
    return rivals.finish(result, summary, problems, out)


if __name__ == "__main__":
    sys.exit(main())
