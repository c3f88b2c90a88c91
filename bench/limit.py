"""How far one update is from what the machine can do: ``python bench/limit.py --model FOLDER --data
rows.jsonl``

Counts the floating-point operations that an update cannot avoid, divides them by the measured speed of a
float32 product of the same shape, and sets the result beside the measured time of each stage and of the
whole. Only real positions count as needed, so padding, recomputation of what was known and all that is no
product lower the share that is reached.

Without ``--model`` the weights are random at given widths. The table goes to stderr, JSON to stdout and to
``--out``."""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ours
import record
import small
from rich.console import Console
from rich.table import Table

from tunesmith.machine import backend

DEVICE = backend.setup()  # before MLX: a fast BLAS must be opened first

import mlx.core as mx  # noqa: E402
import mlx.nn as nn  # noqa: E402
import numpy as np  # noqa: E402

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
MLP = ("gate_proj", "up_proj", "down_proj")
PLACE = {
    "q_proj": 0,
    "k_proj": 0,
    "v_proj": 0,
    "attention": 1,
    "o_proj": 2,
    "gate_proj": 3,
    "up_proj": 3,
    "down_proj": 4,
}
"""Order inside a layer: a gradient must pass a place only where something adapted lies before it."""


@dataclass(frozen=True)
class Update:
    """One optimizer update, and its parts by name."""

    net: nn.Module
    micro: list[tuple[np.ndarray, int]]  # tokens (N, T) as they meet the device, and how many are learned
    lengths: list[tuple[int, int]]  # (tokens, learned tokens) of each row
    make: Callable[[], object]  # the whole update, evaluated
    attention: Callable[[mx.array, mx.array, mx.array, float], mx.array]  # q, k, v, scale
    swiglu: Callable[[mx.array, mx.array], mx.array]
    head_loss: Callable[
        [mx.array, int], mx.array
    ]  # (N, T, D) hidden states, index in `micro` → sum of the loss


def update_of(options: argparse.Namespace) -> Update:
    """The update that the product makes of the rows, with its own plan of micro-batches."""
    from tunesmith.model import kernels, logprobs
    from tunesmith.tokens.batches import collate

    settings = ours.config(
        options.model or "random",
        {
            "adapter": {
                "rank": options.rank,
                "alpha": 2 * options.rank,
                "dropout": options.dropout,
                "targets": tuple(options.targets),
            },
            "batch": {"sequences": options.rows, "length": options.max_length},
            "loop": {"checkpoint_gradients": options.checkpoint},
        },
    )
    net = ours.load(settings) if options.model else random_net(options)
    groups = [ours.group(ids, learned, f"row {row}") for row, (ids, learned) in enumerate(rows(options))]
    make = ours.updates(net, settings, groups)
    batches = [collate([groups[index] for index in members]) for members in make.plan.update(0)]

    def head_loss(hidden: mx.array, index: int) -> mx.array:
        """The objective on ``hidden``: what is left is the head and the loss."""
        batch = batches[index]
        flat = hidden.reshape(-1, hidden.shape[-1])[mx.array(batch.positions)]
        logps = logprobs.sequence_logps(
            net, batch, lambda net, batch: logprobs.chosen(net, flat, mx.array(batch.learned))
        )
        return settings.objective.losses(logps, mx.array(batch.fields)).sum()

    def attention(q: mx.array, k: mx.array, v: mx.array, scale: float) -> mx.array:
        return kernels.attention(q, k, v, cache=None, scale=scale, mask="causal")

    return Update(
        net,
        [(batch.tokens, len(batch.learned)) for batch in batches],
        [(group.tokens, int(group.units)) for group in groups],
        make,
        attention,
        kernels.swiglu,
        head_loss,
    )


def rows(options: argparse.Namespace) -> list[tuple[Any, int]]:
    """(ids, first learned token) of each row of the update."""
    if options.data:
        rendered = ours.rendered_rows(options.data, options.model or "mistral-v3", options.max_length)
        return list(rendered[1][: options.rows])
    random = np.random.Generator(np.random.PCG64(0))
    made = []
    for row in range(options.rows):
        length = options.lengths[row % len(options.lengths)]
        made.append(
            (random.integers(0, options.vocab, length), max(1, round(length * (1 - options.learned))))
        )
    return made


def random_net(options: argparse.Namespace) -> nn.Module:
    return ours.random_llama(
        hidden_size=options.width,
        num_hidden_layers=options.layers,
        intermediate_size=options.mlp,
        num_attention_heads=options.heads,
        num_key_value_heads=options.kv_heads,
        vocab_size=options.vocab,
        tie_word_embeddings=True,
    )


def base(linear: Any) -> Any:
    """The frozen layer inside an adapted one, or the layer itself."""
    return linear.linear if "lora_a" in linear else linear


def modules(layer: Any) -> dict[str, Any]:
    """The seven linear layers of a block by their plain name."""
    return {name: layer.self_attn[name] for name in ATTENTION} | {name: layer.mlp[name] for name in MLP}


@dataclass
class Stage:
    """flops_* count the whole update; shape and rate describe the product that stands for them."""

    name: str
    flops_forward: float
    flops_backward: float
    rate: float = 0.0  # operations a second of a product of this shape
    forward_s: float = 0.0
    backward_s: float = 0.0

    @property
    def flops(self) -> float:
        return self.flops_forward + self.flops_backward

    @property
    def floor_s(self) -> float:
        return self.flops / self.rate if self.rate else 0.0

    @property
    def measured_s(self) -> float:
        return self.forward_s + self.backward_s


def count(net: Any, lengths: Sequence[tuple[int, int]], checkpoint: bool) -> list[Stage]:
    """The operations that one update needs: a product of (m, k) and (k, n) is 2·m·k·n.

    Forward through all; backward to activations down to the lowest adapted place, weights of adapters only.
    The attention counts pairs of a query and a key at or before it: two products forward, four backward. With
    ``checkpoint`` the layers from the lowest adapted one upwards go forward twice."""
    positions = sum(tokens - 1 for tokens, _ in lengths)
    pairs = sum((tokens - 1) * tokens // 2 for tokens, _ in lengths)
    learned = sum(units for _, units in lengths)
    layers = list(net.layers)
    args = net.args
    places = [[PLACE[name] for name, one in modules(layer).items() if "lora_a" in one] for layer in layers]
    lowest = min((index for index, found in enumerate(places) if found), default=len(layers))
    first = min(places[lowest]) if lowest < len(layers) else 9
    projections, mlp, adapters = (
        Stage("projections q k v o", 0, 0),
        Stage("MLP", 0, 0),
        Stage("adapters", 0, 0),
    )
    attention = Stage("attention products", 0, 0)
    head_dim = layers[0].self_attn.head_dim
    for index, layer in enumerate(layers):
        again = 2 if checkpoint and index >= lowest else 1
        passed = {
            name: index > lowest or (index == lowest and first < place) for name, place in PLACE.items()
        }
        for name, linear in modules(layer).items():
            outputs, inputs = base(linear).weight.shape
            stage = projections if name in ATTENTION else mlp
            cost = 2 * positions * inputs * outputs
            stage.flops_forward += cost * again
            stage.flops_backward += cost * passed[name]
            if "lora_a" in linear:
                rank = linear.lora_a.shape[1]
                down, up = 2 * positions * inputs * rank, 2 * positions * rank * outputs
                adapters.flops_forward += (down + up) * again
                adapters.flops_backward += 2 * up + down + down * passed[name]
        products = 2 * pairs * args.num_attention_heads * head_dim
        attention.flops_forward += 2 * products * again
        attention.flops_backward += 4 * products * passed["attention"]
    head = 2 * learned * args.hidden_size * args.vocab_size
    return [projections, attention, mlp, adapters, Stage("head and loss", head, head)]


def seconds(run: Callable[[], Any], repeats: int) -> float:
    """Median time of ``run`` evaluated, after one run outside the clock."""
    mx.eval(run())
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        mx.eval(run())
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def rate(left: tuple[int, ...], right: tuple[int, ...], repeats: int) -> float:
    """Operations a second of a float32 product of these shapes."""
    a, b = mx.random.normal(left), mx.random.normal(right)
    mx.eval(a, b)
    return 2 * float(np.prod(left)) * right[-1] / seconds(lambda: a @ b, repeats)


def rates(update: Update, stages: Sequence[Stage], repeats: int) -> None:
    """Give each stage the product rate of its own shape: the most common of its products, over the longest
    micro-batch."""
    net: Any = update.net
    args = net.args
    tokens, _ = update.micro[0]
    rows, length = tokens.shape[0], tokens.shape[1]
    flat = rows * length
    learned = max(1, max(count for _, count in update.micro))
    adapted = [one for layer in net.layers for one in modules(layer).values() if "lora_a" in one]
    head_dim = net.layers[0].self_attn.head_dim
    shapes = {
        "projections q k v o": (
            (flat, args.hidden_size),
            (args.hidden_size, args.num_attention_heads * head_dim),
        ),
        "attention products": (
            (rows * args.num_attention_heads, length, head_dim),
            (rows * args.num_attention_heads, head_dim, length),
        ),
        "MLP": ((flat, args.hidden_size), (args.hidden_size, args.intermediate_size)),
        "adapters": (
            (flat, args.hidden_size),
            (args.hidden_size, adapted[0].lora_a.shape[1] if adapted else 1),
        ),
        "head and loss": ((learned, args.hidden_size), (args.hidden_size, args.vocab_size)),
    }
    for stage in stages:
        if stage.name in shapes:
            stage.rate = rate(*shapes[stage.name], repeats)


def measure(update: Update, stages: list[Stage], checkpoint: bool, repeats: int) -> None:
    """Fill in the time of each stage: the function itself on the shapes of each micro-batch, times the
    layers.

    backward = (forward and gradients together) − forward, since the gradients use what the forward pass
    computed. A stage of its own is added for norms, positions and residual sums, which are no products but
    take time."""
    net: Any = update.net
    layers = list(net.layers)
    args, layer = net.args, layers[-1]
    adapted = [[name for name, one in modules(each).items() if "lora_a" in one] for each in layers]
    lowest = min((index for index, found in enumerate(adapted) if found), default=len(layers))
    above, with_adapters = len(layers) - lowest, sum(bool(found) for found in adapted)
    example = layers[next((index for index, found in enumerate(adapted) if found), -1)]
    inside = modules(example)
    head_dim = layer.self_attn.head_dim
    frozen = {name: base(one) for name, one in modules(layer).items()}
    branches = (
        [(inside[name], inside[name].lora_a, inside[name].lora_b) for name in adapted[lowest]]
        if above
        else []
    )
    stages.insert(3, rest := Stage("norms, rope, sums", 0, 0))
    by_name = {stage.name: stage for stage in stages}
    net.eval()  # dropout needs keys that belong to a run; its share falls into the unexplained rest

    def add(
        name: str,
        forward: Callable[..., Any],
        inputs: list[mx.array],
        times: int,
        backward: int,
        again: bool = True,
    ) -> None:
        mx.eval(inputs)
        outputs = forward(*inputs)
        cotangents = [
            mx.random.normal(one.shape) for one in (outputs if isinstance(outputs, tuple) else (outputs,))
        ]
        mx.eval(cotangents)
        once = seconds(lambda: forward(*inputs), repeats)
        both = seconds(lambda: mx.vjp(forward, inputs, cotangents), repeats) if backward else once
        by_name[name].forward_s += once * (times + (backward if checkpoint and again else 0))
        by_name[name].backward_s += max(0.0, both - once) * backward

    for index, (tokens, _) in enumerate(update.micro):
        rows, length = tokens.shape[0], tokens.shape[1]
        x = mx.random.normal((rows, length, args.hidden_size))
        wide = mx.random.normal((rows, length, args.num_attention_heads * head_dim))
        q = mx.random.normal((rows, args.num_attention_heads, length, head_dim))
        k, v = (mx.random.normal((rows, args.num_key_value_heads, length, head_dim)) for _ in range(2))

        def project(x: mx.array, wide: mx.array) -> tuple[mx.array, ...]:
            return (*(frozen[name](x) for name in ATTENTION[:3]), frozen["o_proj"](wide))

        def feed(x: mx.array) -> mx.array:
            return frozen["down_proj"](update.swiglu(frozen["gate_proj"](x), frozen["up_proj"](x)))

        def small(x: mx.array, y: mx.array, q: mx.array, k: mx.array) -> tuple[mx.array, ...]:
            rope = layer.self_attn.rope
            h = x + y
            return layer.input_layernorm(x), layer.post_attention_layernorm(h), h + y, rope(q), rope(k)

        add("projections q k v o", project, [x, wide], len(layers), above)
        add(
            "attention products",
            lambda q, k, v: update.attention(q, k, v, head_dim**-0.5),
            [q, k, v],
            len(layers),
            above,
        )
        add("MLP", feed, [x], len(layers), above)
        add(rest.name, small, [x, mx.random.normal(x.shape), q, k], len(layers), above)
        for linear, a, b in branches:
            held = mx.random.normal((rows, length, a.shape[0]))

            def branch(x: mx.array, a: mx.array, b: mx.array, linear: Any = linear) -> mx.array:
                linear.lora_a, linear.lora_b = a, b
                return linear.branch(x)

            add("adapters", branch, [held, a, b], with_adapters, with_adapters)
            linear.lora_a, linear.lora_b = a, b  # the traced ones must not stay
        add(
            "head and loss",
            lambda hidden, index=index: update.head_loss(hidden, index),
            [x],
            1,
            1,
            again=False,
        )


def compare(options: argparse.Namespace) -> None:
    update = update_of(options)
    make = update.make

    def whole_update() -> list[mx.array]:
        make()  # it is evaluated when this returns
        return []

    whole = seconds(whole_update, options.repeats)
    stages = count(update.net, update.lengths, options.checkpoint)
    rates(update, stages, options.repeats)
    measure(update, stages, options.checkpoint, options.repeats)
    positions = sum(tokens - 1 for tokens, _ in update.lengths)
    padded = sum(tokens.shape[0] * tokens.shape[1] for tokens, _ in update.micro)
    explained, floor = sum(stage.measured_s for stage in stages), sum(stage.floor_s for stage in stages)
    flops, best = sum(stage.flops for stage in stages), max(stage.rate for stage in stages)

    table = Table(
        title=f"one update: {len(update.lengths)} rows, {positions} positions, "
        f"padding {1 - positions / padded:.0%}"
    )
    for heading in (
        "stage",
        "GFLOP",
        "GFLOP/s of its product",
        "floor s",
        "forward s",
        "backward s",
        "sum s",
        "floor ÷ sum",
    ):
        table.add_column(heading, justify="left" if heading == "stage" else "right")
    for stage in stages:
        share = f"{stage.floor_s / stage.measured_s:.0%}" if stage.flops and stage.measured_s else "–"
        table.add_row(
            stage.name,
            f"{stage.flops / 1e9:.1f}",
            f"{stage.rate / 1e9:.1f}" if stage.rate else "–",
            f"{stage.floor_s:.3f}",
            f"{stage.forward_s:.3f}",
            f"{stage.backward_s:.3f}",
            f"{stage.measured_s:.3f}",
            share,
        )
    table.add_section()
    table.add_row(
        "all stages",
        f"{flops / 1e9:.1f}",
        "",
        f"{floor:.3f}",
        "",
        "",
        f"{explained:.3f}",
        f"{floor / explained:.0%}",
    )
    table.add_row("unexplained rest", "", "", "", "", "", f"{whole - explained:.3f}", "")
    table.add_row(
        "whole update",
        f"{flops / 1e9:.1f}",
        f"{flops / whole / 1e9:.1f} reached",
        f"{floor:.3f}",
        "",
        "",
        f"{whole:.3f}",
        f"{floor / whole:.0%}",
    )
    Console(stderr=True, width=130).print(table)
    result = {
        "benchmark": "limit",
        "device": DEVICE.name,
        "blas": DEVICE.blas,
        "model": options.model or "random",
        "rows": update.lengths,
        "targets": options.targets,
        "rank": options.rank,
        "checkpoint": options.checkpoint,
        "padding_share": 1 - positions / padded,
        "whole_s": whole,
        "explained_s": explained,
        "unexplained_s": whole - explained,
        "floor_s": floor,
        "flops": flops,
        "reached_flops_s": flops / whole,
        "best_product_flops_s": best,
        "share_of_own_products": floor / whole,
        "share_of_best_product": flops / best / whole,
        "tokens_s": sum(tokens for tokens, _ in update.lengths) / whole,
        "stages": [
            {
                "name": stage.name,
                "flops_forward": stage.flops_forward,
                "flops_backward": stage.flops_backward,
                "product_flops_s": stage.rate,
                "floor_s": stage.floor_s,
                "forward_s": stage.forward_s,
                "backward_s": stage.backward_s,
            }
            for stage in stages
        ],
    }
    print(json.dumps(record.keep(result, options.out), ensure_ascii=False))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", help="folder, GGUF file or hub id; default: random weights")
    parser.add_argument("--data", help="training rows; default: random tokens")
    parser.add_argument("--rows", type=int, default=8, help="rows of the update")
    parser.add_argument("--max-length", type=int, default=1024)
    parser.add_argument("--lengths", type=int, nargs="+", default=[512], help="of random rows")
    parser.add_argument("--learned", type=float, default=0.926, help="share of learned tokens of random rows")
    for name, default in {
        "layers": 4,
        "width": 576,
        "mlp": 1536,
        "heads": 9,
        "kv-heads": 3,
        "vocab": 49152,
    }.items():
        parser.add_argument(f"--{name}", type=int, default=default, help="of random weights")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--targets", nargs="+", default=["q_proj", "v_proj"], help="or all-linear")
    parser.add_argument("--dropout", type=float, default=0.0)
    parser.add_argument("--checkpoint", action="store_true", help="recompute each layer in the backward pass")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path, help="such as bench/results/limit.json")
    parser.add_argument("--smoke", action="store_true", help=small.HELP)
    options = parser.parse_args()
    with small.inputs(options, rows=4, max_length=128, repeats=1):
        compare(options)


if __name__ == "__main__":
    main()
