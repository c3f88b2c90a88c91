"""How time and memory of one update grow: ``python bench/scaling.py --out bench/results/scaling.json``

Along each axis (row length, rows, rank, layers) one thing grows and the rest stays. Each point runs in a
process of its own, since a peak of memory cannot be taken back: one update to warm up, then the median of
three. The exponent k of y ~ x^k is fitted by least squares on logarithms and compared with what theory says.

Table on stderr, JSON on stdout and to ``--out``; the plot has the same name with ``.png``. Stop early with
``--max-length``."""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import ours
import record
import small
from rich.console import Console
from rich.table import Table

SLOW_S = 12.0  # where the first update takes longer, one more is measured instead of three


@dataclass(frozen=True)
class Point:
    """One update: what the model is, and what it learns from."""

    length: int = 256
    rows: int = 2
    rank: int = 16
    targets: str = "q_proj,v_proj"
    layers: int = 4
    width: int = 256
    mlp: int = 1024
    heads: int = 2
    vocab: int = 4096
    checkpoint: bool = False


class Axis(NamedTuple):
    """time and memory: (lowest, highest) exponent that theory allows, and why."""

    name: str
    key: str
    points: dict[str, list[Point]]
    time: tuple[float, float, str]
    memory: tuple[float, float, str]


LINEAR = (0.8, 1.2, "linear")


def axes(base: Point, max_length: int) -> list[Axis]:
    lengths = [n for n in (256, 512, 1024, 2048, 4096, 8192) if n <= max_length]
    ranks = (4, 8, 16, 32, 64, 128)
    # Above 1 in both: the attention meets each pair of positions; memory only where the scores are kept.
    quadratic = (0.8, 2.0, "linear, and quadratic at long rows, where attention rules")
    aside = (-0.1, 0.5, "a constant (the base) and a linear part (the adapters)")
    return [
        Axis(
            "row length (tokens)",
            "length",
            {"1 row": [replace(base, rows=1, length=n) for n in lengths]},
            quadratic,
            (0.8, 2.0, "linear, or quadratic where attention scores are kept"),
        ),
        Axis(
            f"rows of {base.length} tokens",
            "rows",
            {"": [replace(base, rows=n) for n in (1, 2, 4, 8, 16)]},
            LINEAR,
            (-0.1, 0.5, "constant once a micro-batch is full"),
        ),
        Axis(
            "rank",
            "rank",
            {
                "q, v": [replace(base, rank=n) for n in ranks],
                "all linear": [replace(base, rank=n, targets="all-linear") for n in ranks],
            },
            aside,
            (-0.1, 1.0, "a constant (activations), then linear (adapters and their moments)"),
        ),
        Axis(
            "layers",
            "layers",
            {"": [replace(base, layers=n) for n in (2, 4, 8, 16)]},
            LINEAR,
            LINEAR if not base.checkpoint else (0.0, 1.2, "at most linear: layers are recomputed"),
        ),
    ]


def updates(point: Point) -> Callable[[], object]:
    """Each call makes an optimizer update on random rows and weights."""
    import numpy as np

    net = ours.random_llama(
        hidden_size=point.width,
        num_hidden_layers=point.layers,
        intermediate_size=point.mlp,
        num_attention_heads=point.heads,
        num_key_value_heads=point.heads,
        vocab_size=point.vocab,
    )
    settings = ours.config(
        "random",
        {
            "adapter": {
                "rank": point.rank,
                "alpha": 2 * point.rank,
                "targets": tuple(point.targets.split(",")),
            },
            "batch": {"sequences": point.rows, "length": max(8, point.length)},
            "loop": {"checkpoint_gradients": point.checkpoint},
        },
    )
    random = np.random.Generator(np.random.PCG64(0))
    rows = [
        ours.group(random.integers(0, point.vocab, point.length), point.length // 10, f"row {row}")
        for row in range(point.rows)
    ]
    return ours.updates(net, settings, rows)


def measure(point: Point) -> dict[str, Any]:
    """In this process: seconds (median), bytes above the weights in MLX's allocator, and the highest resident
    size."""
    update = updates(point)
    import mlx.core as mx

    weights = mx.get_active_memory()
    mx.reset_peak_memory()
    times: list[float] = []
    while len(times) < 4 and not (len(times) == 2 and times[0] > SLOW_S):
        start = time.perf_counter()
        update()
        times.append(time.perf_counter() - start)
    warm = times[1:]
    resident = next(
        (line.split()[1] for line in Path("/proc/self/status").read_text().splitlines() if "VmHWM" in line),
        "0",
    )
    return {
        **asdict(point),
        "seconds": statistics.median(warm),
        "updates": len(warm),
        "weights": weights,
        "above_weights": mx.get_peak_memory() - weights,
        "peak_resident": int(resident) * 1024,
    }


def measured(point: Point, limit_s: float) -> dict[str, Any]:
    """The same in a fresh process; where it fails or takes too long, ``failed`` says so."""
    command = [sys.executable, __file__, "--point", json.dumps(asdict(point))]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=max(1.0, limit_s), check=False)
    except subprocess.TimeoutExpired:
        return {**asdict(point), "failed": f"not done in {limit_s:.0f} s"}
    if done.returncode:
        return {
            **asdict(point),
            "failed": (done.stderr.strip().splitlines() or [f"status {done.returncode}"])[-1],
        }
    return json.loads(done.stdout.strip().splitlines()[-1])


def exponent(xs: Sequence[float], ys: Sequence[float]) -> float | None:
    """k of y ~ x^k."""
    import numpy as np

    if len(xs) < 2 or min(ys) <= 0:
        return None
    return float(np.polyfit(np.log(xs), np.log(ys), 1)[0])


def verdict(name: str, fitted: float | None, last: float | None, theory: tuple[float, float, str]) -> str:
    """One sentence: the fitted exponent, what theory says, and whether they agree."""
    if fitted is None or last is None:
        return f"{name}: too few points"
    low, high, why = theory
    agree = "as" if low <= fitted <= high else "NOT as"
    kind = "linear" if LINEAR[0] <= fitted <= LINEAR[1] else "not linear"
    return (
        f"{name}: exponent {fitted:.2f} ({kind}; {last:.2f} between the last two), {agree} theory says: {why}"
    )


def plot(results: list[dict[str, Any]], path: Path) -> None:
    """Time above, memory below, one column an axis, all logarithmic."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(2, len(results), figsize=(4 * len(results), 7.5), squeeze=False)
    for column, axis in enumerate(results):
        for row, (key, label, factor) in enumerate(
            (("seconds", "seconds an update", 1), ("above_weights", "MB above weights", 1e-6))
        ):
            panel = panels[row][column]
            fitted = []
            for line in axis["lines"]:
                points = [point for point in line["points"] if "failed" not in point]
                if not points:
                    continue
                xs, ys = [point[axis["key"]] for point in points], [point[key] * factor for point in points]
                panel.plot(xs, ys, "o-", label=line["name"] or None)
                if (power := line["exponents"][key]) is not None:
                    fitted.append(f"{line['name']} x^{power:.2f}".strip())
            panel.set(
                xscale="log",
                yscale="log",
                xlabel=axis["name"],
                ylabel=label,
                title=" · ".join(fitted) or "no fit",
            )
            panel.grid(True, which="both", alpha=0.3)
            if len(axis["lines"]) > 1:
                panel.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def along(axis: Axis, end: float, table: Table, verdicts: list[str]) -> dict[str, Any]:
    """Measure the points of an axis; a row of ``table`` for each, and what theory says of them."""
    lines = []
    for name, points in axis.points.items():
        measurements = [measured(point, end - time.perf_counter()) for point in points]
        for point in measurements:
            cells = [axis.name, name, str(point[axis.key])]
            if "failed" in point:
                table.add_row(*cells, point["failed"], "", "")
            else:
                memory = (point["above_weights"] / 1e6, point["peak_resident"] / 1e6)
                table.add_row(*cells, f"{point['seconds']:.3f}", *(f"{value:.0f}" for value in memory))
        table.add_section()
        good = [point for point in measurements if "failed" not in point]
        xs = [point[axis.key] for point in good]
        exponents, last = {}, {}
        for key, theory in (("seconds", axis.time), ("above_weights", axis.memory)):
            ys = [point[key] for point in good]
            exponents[key], last[key] = exponent(xs, ys), exponent(xs[-2:], ys[-2:])
            title = f"{axis.name}{', ' if name else ''}{name}, {'time' if key == 'seconds' else 'memory'}"
            verdicts.append(verdict(title, exponents[key], last[key], theory))
        lines.append({"name": name, "points": measurements, "exponents": exponents, "last_two": last})
    return {"name": axis.name, "key": axis.key, "lines": lines}


def compare(options: argparse.Namespace) -> None:
    console = Console(stderr=True, width=130)
    end = time.perf_counter() + 60 * options.minutes
    base = Point(
        length=options.length,
        width=options.width,
        mlp=options.mlp,
        heads=options.heads,
        vocab=options.vocab,
        checkpoint=options.checkpoint,
    )
    table = Table(title="one update")
    for heading in ("axis", "", "x", "seconds", "MB above weights", "MB resident, peak"):
        table.add_column(heading, justify="left" if heading in ("axis", "") else "right")
    chosen = axes(base, options.max_length)
    if options.axes:
        chosen = [axis for axis in chosen if axis.key in options.axes]
    verdicts: list[str] = []
    # The longest rows last: if time runs out, it is they that are missing.
    ordered = sorted(chosen, key=lambda axis: axis.key == "length")
    results = [along(axis, end, table, verdicts) for axis in ordered]
    console.print(table)
    for line in verdicts:
        console.print(line, highlight=False)
    result = {"benchmark": "scaling", "base": asdict(base), "axes": results, "verdicts": verdicts}
    print(json.dumps(record.keep(result, options.out), ensure_ascii=False))
    if options.out:
        plot(results, options.out.with_suffix(".png"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--max-length", type=int, default=8192, help="longest row of the first axis")
    parser.add_argument("--axes", nargs="+", choices=("length", "rows", "rank", "layers"), help="only these")
    parser.add_argument("--checkpoint", action="store_true", help="recompute each layer in the backward pass")
    for name, default in {"length": 256, "width": 256, "mlp": 1024, "heads": 2, "vocab": 4096}.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument(
        "--minutes", type=float, default=8.0, help="points that do not fit in are left out, and said so"
    )
    parser.add_argument("--out", type=Path, help="such as bench/results/scaling.json")
    parser.add_argument("--smoke", action="store_true", help=small.HELP)
    parser.add_argument("--point", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.point:
        print(json.dumps(measure(Point(**json.loads(options.point)))))
        return
    with small.inputs(options, axes=["length"], max_length=512, width=32, mlp=64, vocab=256):
        compare(options)


if __name__ == "__main__":
    main()
