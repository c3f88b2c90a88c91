"""The reference run on a GPU, beside other trainers: ``bench/gpu.sh`` (``--try-on-cpu`` tries the script
itself, tiny).

Mistral-7B's shape with random weights made on the device, LoRA of rank 16 on q and v with dropout 0.05, eight
rows an update (micro-batches of two), at most 2,048 tokens a row, layers recomputed in the backward pass. Row
lengths and learned shares are those of a real file of conversations (``syngen_lengths.json``); token ids are
random. Each trainer learns the same rows in a process of its own; a leg that fails is recorded and the others
go on.

``--make-lengths rows.jsonl`` writes the lengths again: two integers a row, tokens and learned tokens.
"""

from __future__ import annotations

import argparse
import importlib.util
import itertools
import json
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import ours
import record

HERE = Path(__file__).parent
WARM, ROWS, MICRO = 3, 8, 2
RANK, ALPHA, DROPOUT, TARGETS = 16, 32, 0.05, ("q_proj", "v_proj")
RATE = 1e-4


@dataclass(frozen=True)
class Shape:
    """A decoder with gated MLPs and grouped queries."""

    layers: int = 32
    width: int = 4096
    heads: int = 32
    kv_heads: int = 8
    mlp: int = 14336
    vocab: int = 32768

    @property
    def config(self) -> dict[str, Any]:
        """As in the model's config.json."""
        return {
            "model_type": "mistral",
            "hidden_size": self.width,
            "num_hidden_layers": self.layers,
            "vocab_size": self.vocab,
            "intermediate_size": self.mlp,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "rms_norm_eps": 1e-5,
            "rope_theta": 1e6,
            "tie_word_embeddings": False,
            "max_position_embeddings": 32768,
        }

    def flops(self, rows: Sequence[Row]) -> float:
        """What an update must compute: forward, and backward to activations; recomputing a layer is not
        counted.

        The head on learned positions only; the attention by pairs of a query and a key at or before it.
        """
        head_dim = self.width // self.heads
        layer = (
            2 * self.width * self.width
            + 2 * self.width * self.kv_heads * head_dim
            + 3 * self.width * self.mlp
        )
        outputs = {"q_proj": self.width, "v_proj": self.kv_heads * head_dim}
        adapters = sum(RANK * (self.width + outputs[name]) for name in TARGETS)
        positions = sum(row.tokens - 1 for row in rows)
        pairs = sum((row.tokens - 1) * row.tokens // 2 for row in rows)
        learned = sum(row.learned for row in rows)
        dense = self.layers * (4 * layer + 6 * adapters) * positions
        return dense + 12 * self.layers * self.width * pairs + 4 * learned * self.width * self.vocab


MISTRAL = Shape()
TINY = Shape(layers=2, width=64, heads=4, kv_heads=2, mlp=128, vocab=512)


@dataclass(frozen=True)
class Row:
    """Random tokens; the first ``tokens`` − ``learned`` are the prompt."""

    tokens: int
    learned: int
    seed: int
    vocab: int

    @property
    def ids(self) -> np.ndarray:
        return (
            np.random.Generator(np.random.PCG64([7, self.seed]))
            .integers(3, self.vocab, self.tokens)
            .astype(np.int32)
        )


@dataclass(frozen=True)
class Task:
    """What a leg needs to know."""

    shape: Shape
    rows: list[Row]
    updates: int  # measured, after WARM
    limit_s: float  # measuring stops here, with what it has
    dtype: str
    cpu: bool  # the script is being tried


def rows_of(path: Path, limit: int, shape: Shape, count: int | None, *, tiny: bool) -> list[Row]:
    """The rows within ``limit`` in a fixed shuffled order, ``count`` of them (all where None, again and again
    if too few)."""
    lengths = [(tokens, learned) for tokens, learned in json.loads(path.read_text()) if tokens <= limit]
    if tiny:
        lengths = [
            (max(4, tokens // 16), max(2, learned // 16)) for tokens, learned in lengths if tokens <= 1024
        ]
    order = np.random.Generator(np.random.PCG64(0)).permutation(len(lengths))
    count = len(lengths) if count is None else count
    chosen = [lengths[order[index % len(order)]] for index in range(count)]
    return [
        Row(tokens, min(learned, tokens - 1), index, shape.vocab)
        for index, (tokens, learned) in enumerate(chosen)
    ]


def product_updates(net: Any, order: Sequence[Row]) -> Callable[[int], list[Row]]:
    """The product's update ``step`` (from 0), evaluated; returns the rows it learned, in the order that the
    product draws."""
    settings = ours.config(
        "random",
        {
            "adapter": {"rank": RANK, "alpha": ALPHA, "dropout": DROPOUT, "targets": TARGETS},
            "batch": {"sequences": ROWS, "length": 2048},
            "optimizer": {"learning_rate": RATE},
            "loop": {"checkpoint_gradients": True},
        },
    )
    rows = [ours.group(row.ids, row.tokens - row.learned, f"row {row.seed}") for row in order]
    updates = ours.updates(net, settings, rows)

    def update(step: int) -> list[Row]:
        members = [order[index] for micro in updates.plan.update(step) for index in micro]
        assert updates().step == step + 1
        return members

    return update


def summary(updates: Sequence[tuple[float, Sequence[Row]]], shape: Shape, **more: Any) -> dict[str, Any]:
    """Rates of measured updates: medians over the updates, and over the whole time in ``mean_*``."""
    seconds = [taken for taken, _ in updates]
    tokens = [sum(row.tokens for row in rows) for _, rows in updates]
    learned = [sum(row.learned for row in rows) for _, rows in updates]
    flops = [shape.flops(rows) for _, rows in updates]
    return {
        "updates": len(updates),
        "seconds_update": statistics.median(seconds),
        "tokens_s": statistics.median(count / taken for count, taken in zip(tokens, seconds, strict=True)),
        "supervised_tokens_s": statistics.median(
            count / taken for count, taken in zip(learned, seconds, strict=True)
        ),
        "mean_tokens_s": sum(tokens) / sum(seconds),
        "mean_supervised_tokens_s": sum(learned) / sum(seconds),
        "flops_s": sum(flops) / sum(seconds),
        **more,
    }


def device_memory() -> int | None:
    """Bytes in use on the first NVIDIA device, by all processes, pools included."""
    command = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits", "--id=0"]
    try:
        return (
            int(
                subprocess.run(
                    command, capture_output=True, text=True, timeout=20, check=True
                ).stdout.split()[0]
            )
            << 20
        )
    except (OSError, subprocess.SubprocessError, ValueError, IndexError):
        return None


def use_mlx(task: Task) -> Any:
    """mlx.core on the device that is asked for. Raises RuntimeError where that is no GPU."""
    from tunesmith.machine import backend

    backend.setup()  # before MLX: without a GPU a fast BLAS must be opened first
    import mlx.core as mx

    if not task.cpu and mx.default_device().type != mx.DeviceType.gpu:
        raise RuntimeError(f"MLX's default device is {mx.default_device()}, not a GPU")
    return mx


def random_net(task: Task, bits: int | None) -> Any:
    """mlx-lm's Mistral with random weights, made on the device one tensor at a time; then packed if asked."""
    import mlx.core as mx
    import mlx.nn as nn
    from mlx.utils import tree_flatten, tree_unflatten
    from mlx_lm.models import llama

    dtype = getattr(mx, task.dtype)
    net = llama.Model(
        llama.ModelArgs.from_dict(task.shape.config)
    )  # mlx-lm reads Mistral with Llama's classes
    mx.random.seed(0)
    parameters: Any = tree_flatten(net.parameters())
    for name, old in parameters:
        new = (
            mx.ones(old.shape, dtype)
            if old.ndim == 1
            else mx.random.normal(old.shape, dtype=dtype, scale=0.02)
        )
        net.update(tree_unflatten([(name, new)]))
        mx.eval(new)
    del parameters, old, new
    if bits is not None:
        nn.quantize(net, group_size=64, bits=bits)
    net.freeze()
    mx.eval(net.parameters())
    mx.clear_cache()
    return net


def leg_products(task: Task) -> dict[str, Any]:
    """Is this the GPU, does it multiply rightly, and how fast? Operations a second by dtype and size."""
    mx = use_mlx(task)
    a = np.random.Generator(np.random.PCG64(0)).normal(size=(256, 256)).astype(np.float32)
    worst = float(np.abs(np.array(mx.array(a) @ mx.array(a)) - a @ a).max())
    if worst > 0.2:  # TF32 is allowed to err by a few hundredths here
        raise RuntimeError(f"a product of 256 × 256 is wrong by {worst}")
    found: dict[str, Any] = {}
    for dtype in ("float32",) if task.cpu else ("bfloat16", "float16"):
        for size in (256, 512) if task.cpu else (4096, 6144, 8192):
            left, right = (mx.random.normal((size, size)).astype(getattr(mx, dtype)) for _ in range(2))
            mx.eval(left, right, left @ right)
            times = []
            for _ in range(7):
                start = time.perf_counter()
                mx.eval([left @ right for _ in range(8)])
                times.append((time.perf_counter() - start) / 8)
            found[f"{dtype} {size}"] = 2 * size**3 / statistics.median(times)
    info = mx.device_info()
    return {
        "default_device": str(mx.default_device()),
        "info": {key: str(value) for key, value in info.items()},
        "worst_error": worst,
        "products": found,
        "best": {
            dtype: max(speed for name, speed in found.items() if name.startswith(dtype))
            for dtype in {name.split()[0] for name in found}
        },
    }


def leg_ours(task: Task, bits: int | None = None) -> dict[str, Any]:
    """The product on the rows, one update at a time."""
    mx = use_mlx(task)
    net = random_net(task, bits)
    weights = mx.get_active_memory()
    update = product_updates(net, task.rows)
    mx.reset_peak_memory()
    started, done = time.perf_counter(), []
    for step in range(WARM + task.updates):
        start = time.perf_counter()
        rows = update(step)
        now = time.perf_counter()
        done.append((now - start, rows))
        if now - started > task.limit_s and step > WARM:
            break
    memory = {"weights": weights, "peak": mx.get_peak_memory(), "device": device_memory()}
    return summary(done[WARM:], task.shape, first_s=done[0][0], **memory)


def leg_epoch(task: Task) -> dict[str, Any]:
    """All rows once with the product, nothing left out of the clock but making the weights."""
    mx = use_mlx(task)
    net = random_net(task, None)
    mx.reset_peak_memory()
    start = time.perf_counter()
    update = product_updates(net, task.rows)
    steps = -(-len(task.rows) // ROWS)
    learned: list[Row] = []
    for step in range(steps):
        learned += update(step)
        if time.perf_counter() - start > task.limit_s:
            break
    taken = time.perf_counter() - start
    whole = {
        "rows": len(learned),
        "of": len(task.rows),
        "epoch_s": taken,
        "epoch_estimate_s": taken * steps / (step + 1),
    }
    found = summary(
        [(taken, learned)], task.shape, **whole, peak=mx.get_peak_memory(), device=device_memory()
    )
    return found | {"updates": step + 1, "seconds_update": taken / (step + 1)}


def leg_mlx_lm(task: Task, bits: int | None = None) -> dict[str, Any]:
    """mlx-lm's own trainer: batches of two, four accumulated, its gradient checkpointing, the prompt masked
    by its length.

    Its data set class is used as its command line uses it. The clock is read whenever the trainer asks for a
    batch: all that it does between two batches is its time."""
    mx = use_mlx(task)
    import mlx.optimizers as optim
    from mlx_lm.tuner import trainer
    from mlx_lm.tuner.datasets import CacheDataset
    from mlx_lm.tuner.utils import linear_to_lora_layers

    net = random_net(task, bits)
    weights = mx.get_active_memory()
    keys = [f"self_attn.{name}" for name in TARGETS]
    lora = {"rank": RANK, "scale": ALPHA / RANK, "dropout": DROPOUT, "keys": keys}
    linear_to_lora_layers(net, task.shape.layers, lora)

    class Ready(list):
        def process(self, row: dict[str, Any]) -> tuple[list[int], int]:
            return row["ids"], row["offset"]

    data = Ready(
        {"ids": row.ids.tolist(), "offset": row.tokens - row.learned, "row": row} for row in task.rows
    )
    marks: list[tuple[float, list[Row]]] = []
    end = time.perf_counter() + task.limit_s

    def batches(*args: Any, **options: Any) -> Iterator[tuple[Any, Any]]:
        for batch, lengths in trainer.iterate_batches(*args, **options):
            rows = [
                Row(int(stop), int(stop - start), 0, task.shape.vocab) for start, stop in lengths.tolist()
            ]
            marks.append((time.perf_counter(), rows))
            if time.perf_counter() > end and len(marks) > (WARM + 1) * ROWS // MICRO:
                return
            yield batch, lengths

    mx.reset_peak_memory()
    with tempfile.TemporaryDirectory() as folder:
        iterations = (
            WARM + task.updates
        ) * ROWS // MICRO + 1  # asking for one more batch ends the last update's time
        args = trainer.TrainingArgs(
            batch_size=MICRO,
            iters=iterations,
            steps_per_report=iterations,
            steps_per_eval=10**9,
            steps_per_save=10**9,
            max_seq_length=2048,
            grad_checkpoint=True,
            grad_accumulation_steps=ROWS // MICRO,
            adapter_file=str(Path(folder) / "adapters.safetensors"),
        )
        began = time.perf_counter()
        trainer.train(
            net, optim.AdamW(learning_rate=RATE), CacheDataset(data), args=args, iterate_batches=batches
        )
    each = ROWS // MICRO
    updates = []
    for first in range(WARM * each, len(marks) - each, each):
        members = [row for _, rows in marks[first : first + each] for row in rows]
        updates.append((marks[first + each][0] - marks[first][0], members))
    memory = {"weights": weights, "peak": mx.get_peak_memory(), "device": device_memory()}
    return summary(updates, task.shape, first_s=marks[each][0] - began, **memory)


def torch_model(task: Task) -> tuple[Any, str]:
    """transformers' Mistral with random weights on the device, for PEFT to adapt. Raises RuntimeError without
    CUDA."""
    import torch
    from transformers import MistralConfig, MistralForCausalLM

    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu" and not task.cpu:
        raise RuntimeError("torch sees no CUDA device")
    torch.manual_seed(0)
    settings = {
        key: value for key, value in task.shape.config.items() if key not in ("model_type", "rope_theta")
    }
    config = MistralConfig(**settings, sliding_window=None, use_cache=False, attn_implementation="sdpa")
    before = torch.get_default_dtype()
    torch.set_default_dtype(getattr(torch, task.dtype))
    try:
        with torch.device(device):
            net = MistralForCausalLM(config)
    finally:
        torch.set_default_dtype(before)
    return net, device


def lora_config() -> Any:
    from peft import LoraConfig

    return LoraConfig(
        r=RANK, lora_alpha=ALPHA, lora_dropout=DROPOUT, target_modules=list(TARGETS), task_type="CAUSAL_LM"
    )


def padded(rows: Sequence[Row]) -> dict[str, Any]:
    """A micro-batch as torch's trainers want it: the prompt and the padding are not learned."""
    import torch

    length = max(row.tokens for row in rows)
    ids = torch.zeros((len(rows), length), dtype=torch.long)
    mask, labels = torch.zeros_like(ids), torch.full_like(ids, -100)
    for index, row in enumerate(rows):
        ids[index, : row.tokens] = torch.from_numpy(row.ids).long()
        mask[index, : row.tokens] = 1
        labels[index, row.tokens - row.learned : row.tokens] = ids[
            index, row.tokens - row.learned : row.tokens
        ]
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def torch_memory(device: str) -> dict[str, int | None]:
    import torch

    return {
        "peak": torch.cuda.max_memory_allocated() if device == "cuda" else None,
        "device": device_memory(),
    }


def leg_peft(task: Task) -> dict[str, Any]:
    """A plain torch loop over a PEFT model: rows of an update paired by length, tokens counted equally."""
    import torch
    from peft import get_peft_model

    net, device = torch_model(task)
    net.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    net.enable_input_require_grads()
    net = get_peft_model(net, lora_config()).train()
    trained = [parameter for parameter in net.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=RATE, weight_decay=0.0)
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    started, done = time.perf_counter(), []
    for step in range(WARM + task.updates):
        start = time.perf_counter()
        rows = sorted(task.rows[step * ROWS : (step + 1) * ROWS], key=lambda row: -row.tokens)
        units = sum(row.learned for row in rows)
        for first in range(0, len(rows), MICRO):
            members = rows[first : first + MICRO]
            batch = {key: value.to(device) for key, value in padded(members).items()}
            loss = net(**batch).loss * (sum(row.learned for row in members) / units)
            loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if device == "cuda":
            torch.cuda.synchronize()
        now = time.perf_counter()
        done.append((now - start, rows))
        if now - started > task.limit_s and step > WARM:
            break
    return summary(done[WARM:], task.shape, first_s=done[0][0], **torch_memory(device))


def leg_trl(task: Task) -> dict[str, Any]:
    """TRL's SFTTrainer with PEFT. It fetches batches ahead, so tokens are the mean of all rows: each is
    learned once."""
    import torch
    from datasets import Dataset
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast, TrainerCallback
    from trl import SFTConfig, SFTTrainer

    net, device = torch_model(task)
    words = Tokenizer(models.WordLevel({"<pad>": 0, "</s>": 1, "<unk>": 2}, unk_token="<unk>"))
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    )
    end = time.perf_counter() + task.limit_s

    class Clock(TrainerCallback):
        def __init__(self) -> None:
            self.marks: list[float] = []

        def on_step_end(self, args: Any, state: Any, control: Any, **more: Any) -> None:
            if device == "cuda":
                torch.cuda.synchronize()
            self.marks.append(time.perf_counter())
            control.should_training_stop |= self.marks[-1] > end and len(self.marks) > WARM + 1

    clock = Clock()
    data = Dataset.from_dict(
        {"input_ids": [row.ids.tolist() for row in task.rows], "place": list(range(len(task.rows)))}
    )  # the collator makes the batch from the place
    with tempfile.TemporaryDirectory() as folder:
        config = SFTConfig(
            output_dir=folder,
            per_device_train_batch_size=MICRO,
            gradient_accumulation_steps=ROWS // MICRO,
            learning_rate=RATE,
            max_steps=WARM + task.updates,
            gradient_checkpointing=True,
            gradient_checkpointing_kwargs={"use_reentrant": False},
            bf16=device == "cuda",
            save_strategy="no",
            report_to=[],
            logging_steps=10**6,
            remove_unused_columns=False,
            dataset_kwargs={"skip_prepare_dataset": True},
            max_length=2048,
            use_cpu=device == "cpu",
            disable_tqdm=True,
        )
        trainer = SFTTrainer(
            model=net,
            args=config,
            train_dataset=data,
            processing_class=tokenizer,
            peft_config=lora_config(),
            data_collator=lambda members: padded([task.rows[member["place"]] for member in members]),
            callbacks=[clock],
        )
        if device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        began = time.perf_counter()
        trainer.train()
    marks = clock.marks[WARM - 1 :]
    count = len(task.rows)
    mean = Row(
        round(sum(row.tokens for row in task.rows) / count),
        round(sum(row.learned for row in task.rows) / count),
        0,
        3,
    )
    updates = [(after - before, [mean] * ROWS) for before, after in itertools.pairwise(marks)]
    return summary(updates, task.shape, first_s=clock.marks[0] - began, **torch_memory(device))


@dataclass(frozen=True)
class Leg:
    """needs: modules without which it is not tried. limit_s: for the process, making the weights included."""

    run: Callable[[Task], dict[str, Any]]
    dtype: str = "float16"
    needs: tuple[str, ...] = ()
    limit_s: float = 75.0
    every_row: bool = False


LEGS = {
    "products": Leg(leg_products, limit_s=60),
    "ours float16": Leg(leg_ours),
    "mlx-lm float16": Leg(leg_mlx_lm),
    "ours 4 bits": Leg(lambda task: leg_ours(task, 4)),
    "mlx-lm 4 bits": Leg(lambda task: leg_mlx_lm(task, 4)),
    "torch + PEFT bfloat16": Leg(leg_peft, "bfloat16", ("torch", "peft", "transformers")),
    "TRL + PEFT bfloat16": Leg(leg_trl, "bfloat16", ("torch", "peft", "transformers", "trl", "datasets")),
    "ours float16, every row once": Leg(leg_epoch, limit_s=150, every_row=True),
}


def run_leg(name: str, asked: argparse.Namespace, result: Path) -> None:
    """In a process of its own: do the leg and write what it found, or what stopped it."""
    leg = LEGS[name]
    shape = TINY if asked.try_on_cpu else MISTRAL
    updates = asked.updates
    count = None if leg.every_row else ROWS * (WARM + updates)
    if asked.try_on_cpu and leg.every_row:
        count = 4 * ROWS
    rows = rows_of(asked.lengths, 2048, shape, count, tiny=asked.try_on_cpu)
    dtype = "float32" if asked.try_on_cpu else leg.dtype
    try:
        # A third of the time is for starting and for making the weights.
        found = leg.run(Task(shape, rows, updates, asked.limit_s * 2 / 3, dtype, asked.try_on_cpu))
    except BaseException as error:  # whatever it is, it belongs into the record
        found = {"failed": f"{type(error).__name__}: {error}", "where": traceback.format_exc(limit=-3)}
    result.write_text(json.dumps(found))


def start_leg(name: str, asked: argparse.Namespace, left_s: float) -> dict[str, Any]:
    """The leg in a fresh process, and its result."""
    leg = LEGS[name]
    missing = [module for module in leg.needs if importlib.util.find_spec(module) is None]
    if missing:
        return {"skipped": f"not installed: {', '.join(missing)}"}
    limit = min(leg.limit_s, left_s)
    if limit < 10:
        return {"skipped": "no time left"}
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder) / "leg.json"
        command = [sys.executable, __file__, "--leg", name, "--result", str(result), "--limit-s", str(limit)]
        command += [
            "--lengths",
            str(asked.lengths),
            "--updates",
            str(asked.updates),
            *(["--try-on-cpu"] * asked.try_on_cpu),
        ]
        try:
            done = subprocess.run(command, stdout=sys.stderr, timeout=limit, check=False)
        except subprocess.TimeoutExpired:
            return {"failed": f"not done in {limit:.0f} s"}
        if not result.is_file():
            return {"failed": f"the process ended with status {done.returncode}"}
        return json.loads(result.read_text()) | {"leg_s": time.perf_counter() - started}


def bars(legs: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """What was asked for and what was reached; ``met`` is None where it could not be measured."""

    def peak(name: str, limit: float) -> dict[str, Any]:
        found = legs.get(name, {}).get("peak")
        text = f"{name}: peak memory below {limit / 1e9:.0f} GB"
        return {"bar": text, "found": found and found / 1e9, "met": None if found is None else found < limit}

    def faster(ours: str, theirs: str, factor: float) -> dict[str, Any]:
        left, right = (legs.get(name, {}).get("supervised_tokens_s") for name in (ours, theirs))
        ratio = left / right if left and right else None
        text = f"{ours}: at least {factor} × the supervised tokens a second of {theirs}"
        return {"bar": text, "found": ratio, "met": None if ratio is None else ratio >= factor}

    return [
        peak("ours float16", 16e9),
        peak("ours float16, every row once", 16e9),
        peak("ours 4 bits", 7e9),
        faster("ours float16", "mlx-lm float16", 1.5),
        faster("ours 4 bits", "mlx-lm 4 bits", 1.5),
    ]


def show(legs: dict[str, dict[str, Any]], reached: list[dict[str, Any]]) -> None:
    """A table, and a line for each bar."""

    def line(name: str, *cells: str) -> None:
        widths = (8, 9, 8, 7, 9, 5)
        texts = [f"{cell:>{width}}" for cell, width in zip(cells, widths, strict=True)]
        print(f"{name:30} {' '.join(texts)}", file=sys.stderr)

    line("leg", "tok/s", "learned/s", "s/update", "peak GB", "device GB", "MFU")
    for name, found in legs.items():
        if problem := found.get("failed") or found.get("skipped"):
            print(f"{name:30} {problem[:95]}", file=sys.stderr)
        elif "tokens_s" in found:
            memory = [f"{found[key] / 1e9:.2f}" if found.get(key) else "–" for key in ("peak", "device")]
            use = f"{found['utilisation']:.0%}" if found.get("utilisation") else "–"
            rates = [f"{found[key]:.0f}" for key in ("tokens_s", "supervised_tokens_s")]
            line(name, *rates, f"{found['seconds_update']:.3f}", *memory, use)
    for bar in reached:
        word = {None: "not measured", True: "met", False: "MISSED"}[bar["met"]]
        value = "" if bar["found"] is None else f" ({bar['found']:.2f})"
        print(f"{word:>12}: {bar['bar']}{value}", file=sys.stderr)


def make_lengths(data: str, out: Path) -> None:
    """Write (tokens, learned tokens) of each row as Mistral's third tokenizer renders it."""
    pairs = ours.row_lengths(data, "mistral-v3")
    out.write_text(json.dumps(pairs, separators=(",", ":")).replace("],[", "],\n[") + "\n")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "--lengths", type=Path, default=HERE / "syngen_lengths.json", help="[[tokens, learned], …]"
    )
    parser.add_argument("--updates", type=int, default=20, help=f"measured, after {WARM} to warm up")
    parser.add_argument("--minutes", type=float, default=8.0, help="for all legs together")
    parser.add_argument("--legs", nargs="+", choices=tuple(LEGS), help="only these; products is always first")
    parser.add_argument("--out", type=Path, help="default: bench/results/gpu-<device>.json")
    parser.add_argument(
        "--try-on-cpu",
        "--smoke",
        action="store_true",
        help="tiny widths in float32: tries the script, measures nothing",
    )
    parser.add_argument("--make-lengths", metavar="ROWS", help="write --lengths from this file and end")
    for hidden in ("--leg", "--result"):
        parser.add_argument(hidden, help=argparse.SUPPRESS)
    parser.add_argument("--limit-s", type=float, default=60.0, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.make_lengths:
        make_lengths(asked.make_lengths, asked.lengths)
        return 0
    if asked.leg:
        run_leg(asked.leg, asked, Path(asked.result))
        return 0
    return compare(asked)


def compare(asked: argparse.Namespace) -> int:

    end = time.perf_counter() + 60 * asked.minutes
    legs = {"products": start_leg("products", asked, 60 * asked.minutes)}
    if "failed" in legs["products"]:
        sys.exit(
            f"no GPU to measure on: {legs['products']['failed']} (--try-on-cpu tries the script without one)"
        )
    best = legs["products"]["best"]
    print(
        f"{legs['products']['default_device']}, {legs['products']['info'].get('device_name')}",
        file=sys.stderr,
    )
    for name, speed in legs["products"]["products"].items():
        print(f"  {name:>14}: {speed / 1e12:8.2f} TFLOP/s", file=sys.stderr)
    device = "try-on-cpu" if asked.try_on_cpu else legs["products"]["info"].get("device_name", "unknown")
    out = (
        asked.out
        or HERE / "results" / f"gpu-{''.join(c if c.isalnum() else '-' for c in device).strip('-')}.json"
    )
    out.parent.mkdir(parents=True, exist_ok=True)
    reached: list[dict[str, Any]] = []
    for name, leg in LEGS.items():
        if name == "products" or (asked.legs and name not in asked.legs):
            continue
        legs[name] = found = start_leg(name, asked, end - time.perf_counter())
        if "flops_s" in found:
            found["utilisation"] = found["flops_s"] / best.get(leg.dtype, max(best.values()))
        reached = [] if asked.try_on_cpu else bars(legs)
        shape = asdict(TINY if asked.try_on_cpu else MISTRAL)
        result = {
            "benchmark": "gpu",
            "tried_on_cpu": asked.try_on_cpu,
            "shape": shape,
            "rows_an_update": ROWS,
            "legs": legs,
            "bars": reached,
        }
        # After each leg, so that an end from outside loses only what was under way.
        record.keep(result, out)
    show(legs, reached)
    print(out)
    return 1 if asked.try_on_cpu and any("failed" in leg for leg in legs.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
