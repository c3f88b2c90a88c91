"""How fast is an update, how much memory does it need, and how fast are answers? Of models with random
weights in the shapes of SmolLM2-135M and Mistral-7B: values do not change how long a product takes."""

from __future__ import annotations

import gc
import json
import shutil
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten, tree_unflatten
from mlx_lm.models import llama

from tunesmith.engine import generation
from tunesmith.machine import backend
from tunesmith.machine.memory import room
from tunesmith.model import kernels, quantisation
from tunesmith.model.loading import evaluating
from tunesmith.preflight.thorough.results import Findings, SkippedStage, figure
from tunesmith.runs.config import RunConfig
from tunesmith.settings import config
from tunesmith.tokens.batches import Group
from tunesmith.tokens.template import Tokens
from tunesmith.training import anatomy, footprint
from tunesmith.training.footprint import Micro
from tunesmith.training.without_run import UpdatesWithoutRun

Tick = Callable[[], None]
"""Called when a unit of a stage's work is done."""
REFERENCE = "mistral-7b-m4-24gb"
"""The preset whose memory is measured."""
ROUNDS = 3
ROWS = (504, 280, 568, 376, 117, 448, 806, 638)
"""Tokens of the rows of `bench/train_speed.py`."""
LEARNED = 0.9
"""Share of a row that is learned, as there."""
PROMPT, ANSWER, TOGETHER = 64, 48, 16
"""Tokens of a prompt and of its answer, and the most answers at once, as in `bench/generation.py`."""


@dataclass(frozen=True, slots=True)
class ModelShape:
    """A decoder with gated MLPs and grouped queries."""

    layers: int
    width: int
    heads: int
    kv_heads: int
    mlp: int
    vocabulary: int
    tied: bool = False

    @property
    def settings(self) -> dict[str, Any]:
        """As in config.json."""
        return {
            "model_type": "mistral",
            "architectures": ["MistralForCausalLM"],
            "hidden_size": self.width,
            "num_hidden_layers": self.layers,
            "intermediate_size": self.mlp,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "vocab_size": self.vocabulary,
            "rms_norm_eps": 1e-5,
            "rope_theta": 1e6,
            "max_position_embeddings": 32768,
            "tie_word_embeddings": self.tied,
        }

    @property
    def weights(self) -> int:
        """Their number, norms left out."""
        head = self.width // self.heads
        layer = 2 * self.width**2 + 2 * self.width * self.kv_heads * head + 3 * self.width * self.mlp
        return self.layers * layer + self.vocabulary * self.width * (1 if self.tied else 2)


SMOLLM2 = ModelShape(30, 576, 9, 3, 1536, 49152, tied=True)
MISTRAL = ModelShape(32, 4096, 32, 8, 14336, 32768)


@dataclass(frozen=True, slots=True)
class Scale:
    """What is measured. ``small``: tiny shapes and short rows, to try the stages; their figures are compared
    with nothing."""

    small: bool = False

    def of(self, shape: ModelShape) -> ModelShape:
        small = ModelShape(min(shape.layers, 2), 64, 4, 2, 128, 512, shape.tied)
        return small if self.small else shape

    def tokens(self, count: int) -> int:
        return max(4, count // 16) if self.small else count

    @property
    def rounds(self) -> int:
        return 1 if self.small else ROUNDS


def random_net(shape: ModelShape, dtype: mx.Dtype, bits: int | None = None) -> nn.Module:
    """A frozen model with random weights, as it would be loaded: on a CPU quantised weights are held in
    float32. The tensors are made one at a time."""
    net = llama.Model(llama.ModelArgs.from_dict(shape.settings))  # mlx-lm reads Mistral by these classes
    flat: Any = tree_flatten(net.parameters())
    for number, (name, old) in enumerate(flat):
        key = mx.random.key(number)
        drawn = mx.ones(old.shape) if old.ndim == 1 else 0.02 * mx.random.normal(old.shape, key=key)
        net.update(tree_unflatten([(name, drawn.astype(dtype))]))
        if bits is None:
            mx.eval(net.parameters())
    if bits is not None:
        nn.quantize(net, group_size=64, bits=bits)  # each layer is drawn and packed when it is evaluated
        for layer in net.layers:
            mx.eval(layer.parameters())
        net = net if backend.setup().kind == "gpu" else quantisation.expand(net)
    mx.eval(net.parameters())
    kernels.install(net)
    net.freeze()
    mx.clear_cache()
    return net.eval()


def write_model(folder: Path, shape: ModelShape) -> None:
    """A folder in Hugging Face's layout: random float32 weights, and the tokenizer of Mistral v3, which
    mistral-common ships. ``shape`` has its 32,768 ids."""
    import mistral_common

    tokenizer = Path(mistral_common.__file__).parent / "data" / "mistral_instruct_tokenizer_240323.model.v3"
    shutil.copy(tokenizer, folder / "tokenizer.model.v3")
    (folder / "config.json").write_text(json.dumps(shape.settings), encoding="utf-8")
    flat: Any = tree_flatten(random_net(shape, mx.float32).parameters())
    mx.save_safetensors(str(folder / "model.safetensors"), dict(flat), metadata={"format": "mlx"})


def rows(lengths: Sequence[int], vocabulary: int) -> list[Group]:
    """Rows of random tokens, of which the last nine tenths are learned."""
    made: list[Group] = []
    for number, length in enumerate(lengths):
        ids = np.random.Generator(np.random.PCG64([7, number])).integers(3, vocabulary, length)
        learned = (np.arange(length) >= length - round(LEARNED * length)).astype(np.float32)
        made.append(Group((Tokens(ids.astype(np.int32), learned),), f"random:{number + 1}"))
    return made


def updates(net: nn.Module, groups: Sequence[Group], tree: dict[str, Any]) -> UpdatesWithoutRun:
    common = {"model": {"path": "random"}, "data": {"train": ("random",), "valid": 0}}
    settings = RunConfig.model_validate(tree | common)
    settings.adapter.attach(net, settings.loop.seed)
    return UpdatesWithoutRun(net, settings, groups)


def _timed(
    update: UpdatesWithoutRun, groups: Sequence[Group], rounds: int, tick: Tick
) -> tuple[float, float]:
    """(median of learned tokens a second, peak of MLX's memory in GB) after an update that does not count."""
    learned = sum(int((group.sequences[0].targets[1:] > 0).sum()) for group in groups)
    update()
    tick()
    mx.reset_peak_memory()
    seconds: list[float] = []
    for _ in range(rounds):
        seconds.append(update().seconds)
        tick()
    return learned / statistics.median(seconds), mx.get_peak_memory() / 1e9


def _require_memory(needed: float, what: str) -> None:
    free = room().free
    if needed > free:
        raise SkippedStage(f"{what} needs about {needed / 1e9:.1f} GB, and {free / 1e9:.1f} GB are free")


def _update_tree(lengths: Sequence[int]) -> dict[str, Any]:
    return {
        "adapter": {"rank": 16, "alpha": 32.0, "dropout": 0.0, "targets": ("q_proj", "v_proj")},
        "batch": {"sequences": len(lengths)},
        "loop": {"steps": 1000},
    }


def small_model(scale: Scale, tick: Tick) -> Findings:
    """LoRA of rank 16 on q and v of SmolLM2-135M's shape in float32, eight rows an update."""
    shape, lengths = scale.of(SMOLLM2), [scale.tokens(length) for length in ROWS]
    _require_memory(4 * shape.weights + 2e9 * (not scale.small), "an update of SmolLM2-135M")
    net, groups = random_net(shape, mx.float32), rows(lengths, shape.vocabulary)
    rate, peak = _timed(updates(net, groups, _update_tree(lengths)), groups, scale.rounds, tick)
    figures = [
        figure("update.smollm2", rate, "learned tokens/s"),
        figure("update.smollm2.memory", peak, "GB"),
    ]
    return {"deviations": [], "figures": figures, "notes": []}


def wide_layers(scale: Scale, tick: Tick) -> Findings:
    """The same of two layers of Mistral-7B's widths, one row of 512 tokens, as in `bench/shape_7b.py`."""
    shape, lengths = replace(scale.of(MISTRAL), layers=2), [scale.tokens(512)]
    on_gpu = backend.setup().kind == "gpu"
    dtype = mx.bfloat16 if on_gpu else mx.float32
    _require_memory(dtype.size * shape.weights + 2e9 * (not scale.small), "two layers of Mistral-7B")
    net, groups = random_net(shape, dtype), rows(lengths, shape.vocabulary)
    rate, peak = _timed(updates(net, groups, _update_tree(lengths)), groups, scale.rounds, tick)
    name = f"update.two_layers_of_7b.{str(dtype).removeprefix('mlx.core.')}"
    figures = [figure(name, rate, "learned tokens/s"), figure(f"{name}.memory", peak, "GB")]
    return {"deviations": [], "figures": figures, "notes": []}


def answers(scale: Scale, tick: Tick) -> Findings:
    """Greedy answers of SmolLM2-135M's shape in float32, one at a time and several at once."""
    shape, new = scale.of(SMOLLM2), scale.tokens(ANSWER)
    net = random_net(shape, mx.float32)
    figures = []
    for count in (1, TOGETHER):
        prompts = [
            [1 + (7 * place + 31 * row) % (shape.vocabulary - 1) for place in range(PROMPT)]
            for row in range(count)
        ]
        seconds: list[float] = []
        n_tokens = 0
        for _ in range(1 + scale.rounds):  # the first one compiles
            started = time.perf_counter()
            made = generation.generate(net, prompts, max_tokens=new, eos_ids=[-1], batch_size=count)
            seconds.append(time.perf_counter() - started)
            n_tokens = sum(len(answer.ids) for answer in made)
            tick()
        figures.append(figure(f"answers.{count}", n_tokens / statistics.median(seconds[1:]), "tokens/s"))
    return {"deviations": [], "figures": figures, "notes": []}


def _preset() -> dict[str, Any]:
    """Those settings of the preset on which the memory of an update depends."""
    tree = config.load(RunConfig, preset=REFERENCE, sets=["data.train=random"]).spec.model_dump()
    loop = {"checkpoint_gradients": tree["loop"]["checkpoint_gradients"], "steps": 1000}
    return {"adapter": tree["adapter"], "batch": tree["batch"], "optimizer": tree["optimizer"], "loop": loop}


def _planned(net: nn.Module, shape: ModelShape, lengths: Sequence[int]) -> float:
    """Bytes that `plan` computes for an update of micro-batches of two rows of ``lengths``."""
    with evaluating(net):  # no dropout, which has no key
        parts = anatomy.of(net, shape.settings)
    tokens = 2 * max(lengths)
    micro = Micro(tokens, round(LEARNED * tokens))
    moment = footprint.training(parts, micro, recomputed=True, several=len(lengths) > 2)
    return parts.weights_bytes + parts.adapter_bytes + footprint.state_bytes(parts, "adamw") + moment.total


def reference_memory(scale: Scale, tick: Tick) -> Findings:
    """The peak of the preset for Mistral-7B on a Mac with 24 GB: as planned, and measured on a GPU with room
    for it. Elsewhere two layers and shorter rows are measured and compared with their plan."""
    whole, on_gpu = scale.of(MISTRAL), backend.setup().kind == "gpu"
    fits = on_gpu and room().free > 17e9
    shape = whole if fits else replace(whole, layers=2)
    lengths = [scale.tokens(2048 if fits else 512)] * (8 if fits else 4)
    needed = shape.weights * (0.6 if on_gpu else 4.0) + 1.5e9 * (not scale.small)
    _require_memory(needed, "the reference preset")
    net = random_net(shape, mx.bfloat16 if on_gpu else mx.float32, bits=4)
    tree = _preset()
    tree["batch"] |= {"sequences": len(lengths), "micro": 2, "length": max(lengths)}
    groups = rows(lengths, shape.vocabulary)
    update = updates(net, groups, tree)
    planned = _planned(net, shape, lengths)
    gc.collect()
    rate, peak = _timed(update, groups, 1, tick)
    figures = [
        figure("reference.memory.planned", _planned_whole(whole, scale) / 1e9, "GB"),
        figure("reference.memory.measured_over_planned", 1e9 * peak / planned, "ratio"),
    ]
    if fits:
        figures.append(figure("reference.memory", peak, "GB"))
        figures.append(figure("reference.update", rate, "learned tokens/s"))
        return {"deviations": [], "figures": figures, "notes": []}
    note = f"{REFERENCE} was measured on {shape.layers} layers and rows of {max(lengths)} tokens"
    return {"deviations": [], "figures": figures, "notes": [note]}


def _planned_whole(shape: ModelShape, scale: Scale) -> float:
    """Bytes that `plan` computes for the whole preset on a GPU. No weight is evaluated."""
    net = llama.Model(llama.ModelArgs.from_dict(shape.settings))
    net.set_dtype(mx.bfloat16)
    nn.quantize(net, group_size=64, bits=4)
    net.freeze()
    settings = RunConfig.model_validate(_preset() | {"model": {"path": "x"}, "data": {"train": ("x",)}})
    settings.adapter.attach(net, settings.loop.seed, lazily=True)
    return _planned(net, shape, [scale.tokens(2048)] * 8)


def products(scale: Scale, tick: Tick) -> Iterator[tuple[str, float]]:
    """(dtype, GFLOP/s) of large products."""
    on_gpu = backend.setup().kind == "gpu"
    size = 64 if scale.small else 4096 if on_gpu else 2048
    for dtype in (mx.float32, mx.float16, mx.bfloat16) if on_gpu else (mx.float32,):
        a = mx.random.normal((size, size), key=mx.random.key(0)).astype(dtype)
        mx.eval(a @ a)
        seconds: list[float] = []
        for _ in range(scale.rounds):
            started = time.perf_counter()
            mx.eval(a @ a)
            seconds.append(time.perf_counter() - started)
        tick()
        yield str(dtype).removeprefix("mlx.core."), 2 * size**3 / statistics.median(seconds) / 1e9
