"""How much memory does writing an export take? A model of 1.5 billion random weights in Qwen2's shape, in
files of at most 1 GB, and an adapter of rank 16 that was trained on it for one update.

Each kind is written in a process of its own, by the code that `tunesmith export` runs. The bar is on the peak
of the anonymous resident memory, sampled every 2 ms; the highest resident memory (VmHWM), which also counts
mapped files, is given beside it. The gate is not measured: it needs the model in memory. Linux only.

    python bench/export_memory.py --out bench/results/export_memory.json
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import record
import small

KINDS = ("hf", "gguf-q8_0")
SHARDS, FIXED_BYTES = 1.3, 10**9
"""The bar: so many times the largest file of the base, and so much beside it."""
SHARD_BYTES = 10**9
ROW = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
SIZES = {"layers": 28, "width": 1536, "heads": 12, "kv_heads": 2, "inner": 8960, "vocab": 151_936}
SMOKE = {"layers": 2, "width": 64, "heads": 4, "kv_heads": 2, "inner": 128, "vocab": 1024}


def shapes(options: argparse.Namespace) -> dict[str, tuple[int, ...]]:
    """The tensors of a Qwen2 model whose head is tied, in the order of the files."""
    width, keys = options.width, options.width // options.heads * options.kv_heads
    named: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (options.vocab, width)}
    for layer in range(options.layers):
        prefix = f"model.layers.{layer}."
        named |= {
            f"{prefix}self_attn.q_proj.weight": (width, width),
            f"{prefix}self_attn.q_proj.bias": (width,),
            f"{prefix}self_attn.k_proj.weight": (keys, width),
            f"{prefix}self_attn.k_proj.bias": (keys,),
            f"{prefix}self_attn.v_proj.weight": (keys, width),
            f"{prefix}self_attn.v_proj.bias": (keys,),
            f"{prefix}self_attn.o_proj.weight": (width, width),
            f"{prefix}mlp.gate_proj.weight": (options.inner, width),
            f"{prefix}mlp.up_proj.weight": (options.inner, width),
            f"{prefix}mlp.down_proj.weight": (width, options.inner),
            f"{prefix}input_layernorm.weight": (width,),
            f"{prefix}post_attention_layernorm.weight": (width,),
        }
    return named | {"model.norm.weight": (width,)}


def shards(named: Mapping[str, tuple[int, ...]]) -> Iterator[list[str]]:
    """The names of the tensors of each file."""
    names: list[str] = []
    held = 0
    for name, shape in named.items():
        size = 2 * int(np.prod(shape))
        if names and held + size > SHARD_BYTES:
            yield names
            names, held = [], 0
        names.append(name)
        held += size
    yield names


def write_model(folder: Path, options: argparse.Namespace) -> None:
    """config.json, a tokenizer with as many tokens as the embedding has rows, and bfloat16 weights."""
    import mlx.core as mx

    import tiny

    folder.mkdir()
    tiny.write_tokenizer(folder)
    enlarge_tokenizer(folder / "tokenizer.json", options.vocab)
    config = {
        "model_type": "qwen2",
        "architectures": ["Qwen2ForCausalLM"],
        "hidden_size": options.width,
        "num_hidden_layers": options.layers,
        "intermediate_size": options.inner,
        "num_attention_heads": options.heads,
        "num_key_value_heads": options.kv_heads,
        "rms_norm_eps": 1e-6,
        "vocab_size": options.vocab,
        "max_position_embeddings": 32768,
        "rope_theta": 1e6,
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
    }
    (folder / "config.json").write_text(json.dumps(config))
    named = shapes(options)
    parts = list(shards(named))
    places: dict[str, str] = {}
    for number, names in enumerate(parts, start=1):
        file = f"model-{number:05}-of-{len(parts):05}.safetensors"
        tensors = {name: random_tensor(name, named[name]) for name in names}
        mx.save_safetensors(str(folder / file), tensors, metadata={"format": "pt"})
        places |= dict.fromkeys(names, file)
        mx.clear_cache()
    total = sum(2 * int(np.prod(shape)) for shape in named.values())
    index = {"metadata": {"total_size": total}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def random_tensor(name: str, shape: tuple[int, ...]) -> Any:
    import mlx.core as mx

    values = 0.02 * mx.random.normal(shape, dtype=mx.bfloat16)
    return 1 + values if name.endswith("norm.weight") else values


def enlarge_tokenizer(path: Path, size: int) -> None:
    """Give the tokenizer random merges until it has ``size`` tokens: a real one of this size takes memory."""
    content = json.loads(path.read_text("utf-8"))
    vocabulary, merges = content["model"]["vocab"], content["model"]["merges"]
    control = {token["content"] for token in content["added_tokens"]}
    texts = [text for text in vocabulary if text not in control]
    random = np.random.Generator(np.random.PCG64(0))
    while len(vocabulary) < size:
        first, second = (texts[place] for place in random.integers(0, len(texts), 2))
        if first + second not in vocabulary and len(first + second) <= 16:
            vocabulary[first + second] = len(vocabulary)
            merges.append([first, second] if isinstance(merges[0], list) else f"{first} {second}")
            texts.append(first + second)
    path.write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")


def train(model: str, rows: str, run: str) -> None:
    """One update on one short row, with an adapter on all linear layers, and nothing else."""
    import tunesmith  # before MLX, so that it chooses the BLAS

    sets = ["adapter.rank=16", "adapter.targets=all-linear", "loop.steps=1", "batch.sequences=1"]
    sets += ["data.valid=0", "audit.before_training=false"]
    config = tunesmith.configure(model=model, data=[rows], sets=sets)
    tunesmith.train(config, out=run)


def write(run: str, name: str, folder: str) -> None:
    """What `tunesmith export` does between opening the run and reloading the artefact."""
    from tunesmith import events  # before MLX, so that it chooses the BLAS
    from tunesmith.exports import gate, kind
    from tunesmith.machine import backend, imports
    from tunesmith.runs import checkpoints, opening
    from tunesmith.runs.directory import Run

    imports.hide("torch")
    backend.setup()
    opened, chosen = Run.open(run), kind.named(name)
    tuned, _ = gate.prepared(opening.of_run(opened, checkpoints.choose(opened, "last")), 1, events.silent)
    chosen.accepts(tuned)
    gate.write(chosen, tuned, Path(folder), events.silent)


def child(*words: str) -> list[str]:
    return [sys.executable, str(Path(__file__).resolve()), "--child", *words]


def measured(run: Path, name: str, folder: Path) -> dict[str, Any]:
    """Seconds, bytes written, and the two peaks of memory."""
    folder.mkdir()
    started = time.perf_counter()
    process = subprocess.Popen(child("write", str(run), name, str(folder)))
    anonymous = highest = 0
    while process.poll() is None:
        status = Path(f"/proc/{process.pid}/status").read_text()
        facts = dict(line.split(":", 1) for line in status.splitlines())
        if "RssAnon" in facts:  # not of a process that has ended
            anonymous = max(anonymous, 1024 * int(facts["RssAnon"].split()[0]))
            highest = max(highest, 1024 * int(facts["VmHWM"].split()[0]))
        time.sleep(0.002)
    if process.returncode:
        raise SystemExit(f"{name}: the process that writes it ended with {process.returncode}")
    return {
        "seconds": round(time.perf_counter() - started, 1),
        "bytes": sum(file.stat().st_size for file in folder.iterdir()),
        "anonymous_bytes": anonymous,
        "highest_bytes": highest,
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for name, value in SIZES.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=value)
    parser.add_argument("--folder", type=Path, help="keep the model and the run here, or use them")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--smoke", action="store_true", help=small.HELP)
    options = parser.parse_args()
    with small.inputs(options, **SMOKE) as folder:
        place = options.folder or folder
        model, run, rows = place / "qwen2", place / "run", place / "row.jsonl"
        if not model.exists():
            write_model(model, options)
        if not run.exists():
            rows.write_text(json.dumps(ROW) + "\n")
            words = child("train", str(model), str(rows), str(run))
            subprocess.run(words, check=True, stdout=sys.stderr)
        files = [file.stat().st_size for file in model.glob("model*.safetensors")]
        bar = int(SHARDS * max(files)) + FIXED_BYTES
        result: dict[str, Any] = {
            "benchmark": "export_memory",
            "sizes": {name: vars(options)[name] for name in SIZES},
            "weights": sum(int(np.prod(shape)) for shape in shapes(options).values()),
            "files": len(files),
            "largest_file_bytes": max(files),
            "bar_bytes": bar,
            "kinds": {},
        }
        for name in KINDS:
            numbers = measured(run, name, folder / name)
            numbers["met"] = numbers["anonymous_bytes"] < bar
            result["kinds"][name] = numbers
            print(f"{name}: {json.dumps(numbers)}, bar {bar:,}", file=sys.stderr)
        print(json.dumps(record.keep(result, options.out)))
    sys.exit(not all(numbers["met"] for numbers in result["kinds"].values()))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        {"train": train, "write": write}[sys.argv[2]](*sys.argv[3:])
    else:
        main()
