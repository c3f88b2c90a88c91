"""How far is `tunesmith plan` from what a run needs? Twelve settings on models of four shapes: predicted and
measured peak of memory, and time of an update, from shapes alone and after --measure.

Each setting runs in a process of its own, since a peak cannot be taken back: it is planned, planned with
--measure, and trained.

    python bench/plan.py --model MODEL --out bench/results/plan.json

MODEL is a real model (a folder or a GGUF file); the other three have random weights."""

from __future__ import annotations

import argparse
import gc
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import ours
import record
import small
from rich.console import Console
from rich.table import Table

ALL = ["adapter.targets=all-linear"]
RECOMPUTED = ["loop.checkpoint_gradients=true"]
KTO = ["objective.kind=kto"]
SETTINGS: dict[str, tuple[str, list[str]]] = {
    "LoRA": ("wide", []),
    "DoRA": ("wide", ["adapter.kind=dora", *ALL]),
    "full": ("wide", ["adapter.kind=full", "optimizer.learning_rate=1e-5"]),
    "4 bits": ("wide", ["model.quantize=4", *ALL]),
    "8 bits, DoRA": ("deep", ["model.quantize=8", "adapter.kind=dora"]),
    "recomputed": ("deep", [*RECOMPUTED, *ALL]),
    "packed": ("deep", ["batch.pack=true"]),
    "experts": ("experts", ALL),
    "experts, KTO": ("experts", KTO),
    "real, LoRA": ("real", []),
    "real, KTO": ("real", KTO),
    "real, DoRA, recomputed": ("real", ["adapter.kind=dora", *ALL, *RECOMPUTED]),
}
"""Name → shape of the model, and settings."""
SHAPES: dict[str, dict[str, int]] = {
    "wide": {"hidden_size": 512, "num_hidden_layers": 6, "intermediate_size": 1408, "vocab_size": 24000},
    "deep": {"hidden_size": 384, "num_hidden_layers": 16, "intermediate_size": 1024, "vocab_size": 4096},
    "experts": {"hidden_size": 256, "num_hidden_layers": 4, "intermediate_size": 512, "vocab_size": 8192},
}
SMOKE = {"hidden_size": 64, "num_hidden_layers": 2, "intermediate_size": 128, "vocab_size": 512}
MIXTURE = {"num_experts": 16, "num_experts_per_tok": 4, "moe_intermediate_size": 192}


def write_model(folder: Path, shape: str, sizes: dict[str, int]) -> Path:
    """A folder with a random model in float32 and a tiny tokenizer."""
    import tiny

    folder.mkdir(parents=True, exist_ok=True)
    tiny.write_tokenizer(folder)
    heads = sizes["hidden_size"] // 64 or 1
    config: dict[str, Any] = {
        "model_type": "llama",
        "rms_norm_eps": 1e-5,
        "num_attention_heads": heads,
        "num_key_value_heads": heads if shape == "deep" else max(1, heads // 4),
        "tie_word_embeddings": shape != "deep",
        "rope_theta": 1e4,
        **sizes,
    }
    if shape == "experts":
        config |= {"model_type": "qwen3_moe", "head_dim": 64, "decoder_sparse_step": 1, "mlp_only_layers": []}
        config |= {"max_position_embeddings": 4096, "norm_topk_prob": True, **MIXTURE}
    (folder / "config.json").write_text(json.dumps(config))
    import importlib

    module = importlib.import_module(f"mlx_lm.models.{config['model_type']}")
    net = ours.randomised(lambda: module.Model(module.ModelArgs.from_dict(config)))
    net.save_weights(str(folder / "model.safetensors"))
    return folder


def write_rows(path: Path, options: argparse.Namespace) -> Path:
    """Labelled rows of random words, from a quarter of the longest to the longest."""
    import tiny

    random = np.random.Generator(np.random.PCG64(7))
    words, rows = tiny.WORDS.split(), []
    for index in range(options.rows):
        count = int(random.integers(options.words // 4, options.words + 1))
        question, answer = (" ".join(random.choice(words, size)) for size in (count // 3, count - count // 3))
        turns = [{"role": "user", "content": f"{index} {question}"}, {"role": "assistant", "content": answer}]
        rows.append({"messages": turns, "label": index % 2 == 0})
    return tiny.write_rows(path, rows)


def measure(name: str, options: argparse.Namespace) -> dict[str, Any]:
    """In this process: the forecasts of a setting, and what its run needed."""
    import tunesmith
    from tunesmith.runs import forecasts
    from tunesmith.training import story  # `tunesmith.train` without its report

    shape, sets = SETTINGS[name]
    folder = Path(options.folder)
    model = options.model if shape == "real" else str(folder / shape)
    common = [
        "audit.before_training=false",
        "data.max_dropped=1",
        "objective.undesirable=learn" if "objective.kind=kto" not in sets else "objective.kind=kto",
        "batch.sequences=4",
        f"batch.tokens={options.tokens}",
        f"loop.steps={options.updates}",
        "loop.sample_tokens=16",
        "loop.samples=1",
        "loop.validate_every=0",
        "loop.save_every=0",
        "data.valid=0.1",
    ]
    config = tunesmith.configure(model=model, data=[str(folder / "rows.jsonl")], sets=[*common, *sets])
    from_shapes = tunesmith.plan(config).forecast
    corrected = tunesmith.plan(config, measure=True).forecast
    gc.collect()  # else the peak of the run has the weights of the plan in it
    run = story.train(
        config.spec, config.origins, out=folder / "runs" / name.replace(", ", "-").replace(" ", "-")
    )
    assert run is not None
    written = forecasts.read(run)
    assert written is not None and written.measured is not None
    measured = written.measured
    return {
        "model": shape,
        "settings": sets,
        "measured": {"peak": measured.peak, "resident": measured.resident, "update_s": measured.update_s},
        "shapes": _compared(from_shapes, measured),
        "after_measure": _compared(corrected, measured),
    }


def _compared(forecast: Any, measured: Any) -> dict[str, Any]:
    peak, update = forecast.peak, forecast.update_s
    return {
        "peak": peak.value,
        "peak_error": peak.value / measured.peak - 1,
        "peak_covered": peak.covers(measured.peak),
        "moment": forecast.moment,
        "parts": {term.name: term.amount.value for term in forecast.memory},
        "update_s": update.value,
        "update_error": update.value / measured.update_s - 1,
        "update_covered": update.covers(measured.update_s),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="")
    parser.add_argument("--updates", type=int, default=6)
    parser.add_argument("--rows", type=int, default=28)
    parser.add_argument("--words", type=int, default=400, help="of the longest row")
    parser.add_argument("--tokens", type=int, default=1024, help="on the device at once")
    parser.add_argument("--only", nargs="*", choices=SETTINGS, default=list(SETTINGS))
    parser.add_argument("--folder", help="with the models and rows; used inside")
    parser.add_argument("--setting", choices=SETTINGS, help="measure this alone, in this process")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--smoke", action="store_true", help=small.HELP)
    options = parser.parse_args()
    if options.setting:
        print(json.dumps(measure(options.setting, options)))
        return
    with tempfile.TemporaryDirectory(prefix="bench-") as name:
        folder = Path(name)
        if options.smoke:
            few = {"updates": 2, "rows": 12, "words": 40, "tokens": 64, "only": ["LoRA", "experts, KTO"]}
            vars(options).update(few, model=small.model(folder))
        shapes = {SETTINGS[setting][0] for setting in options.only} & SHAPES.keys()
        for shape in shapes:
            write_model(folder / shape, shape, SMOKE if options.smoke else SHAPES[shape])
        write_rows(folder / "rows.jsonl", options)
        _link_kernels(folder / "cache")
        results: dict[str, dict[str, Any]] = {}
        for setting in options.only:
            results[setting] = _in_a_process(setting, folder, options)
            result = {"benchmark": "plan", "settings": results, "summary": _summary(results)}
            record.keep(result, options.out)  # what is measured is not lost
    Console(stderr=True).print(_table(results))
    print(json.dumps(result))


def _link_kernels(cache: Path) -> None:
    """An empty folder for TUNESMITH_CACHE, but for the kernels: they were compiled before."""
    from tunesmith.machine import backend

    kernels = backend.cache_folder() / "kernels"
    kernels.mkdir(parents=True, exist_ok=True)
    cache.mkdir()
    (cache / "kernels").symlink_to(kernels)


def _in_a_process(setting: str, folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    words = ["--setting", setting, "--folder", str(folder), "--model", options.model]
    words += ["--updates", str(options.updates), "--tokens", str(options.tokens)]
    environ = os.environ | {"TUNESMITH_CACHE": str(folder / "cache")}
    command = [sys.executable, __file__, *words]
    done = subprocess.run(command, capture_output=True, text=True, env=environ)
    if done.returncode:
        raise SystemExit(f"{setting}: {done.stderr.strip()}")
    result = json.loads(done.stdout.strip().splitlines()[-1])
    print(f"{setting}: {result['shapes']['peak_error']:+.1%}", file=sys.stderr, flush=True)
    return result


def _summary(results: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """The largest errors, and the share of intervals that cover what was measured."""
    summary: dict[str, Any] = {}
    for basis in ("shapes", "after_measure"):
        rows = [result[basis] for result in results.values()]
        covered = [row[f"{kind}_covered"] for row in rows for kind in ("peak", "update")]
        summary[basis] = {
            "peak_error_max": max(abs(row["peak_error"]) for row in rows),
            "update_error_max": max(abs(row["update_error"]) for row in rows),
            "covered": sum(covered) / len(covered),
        }
    return summary


def _table(results: dict[str, dict[str, Any]]) -> Table:
    table = Table("setting", "peak, MB", "from shapes", "measured", "update, s", "from shapes", "measured")
    for setting, result in results.items():
        measured = result["measured"]
        errors = {
            (kind, basis): f"{result[basis][f'{kind}_error']:+.0%}"
            + ("" if result[basis][f"{kind}_covered"] else " !")
            for kind in ("peak", "update")
            for basis in ("shapes", "after_measure")
        }
        table.add_row(
            f"{setting} ({result['model']})",
            f"{measured['peak'] / 1e6:.0f}",
            errors["peak", "shapes"],
            errors["peak", "after_measure"],
            f"{measured['update_s']:.2f}",
            errors["update", "shapes"],
            errors["update", "after_measure"],
        )
    return table


if __name__ == "__main__":
    main()
