"""mlx-lm: the YAML of ``mlx_lm.lora --config`` (``mlx_lm/examples/lora_config.yaml``), and the
``adapter_config.json`` that it writes beside an adapter."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar

from tunesmith.runs.migration import training_arguments
from tunesmith.runs.migration.dialect import Dialect
from tunesmith.runs.migration.keys import Keys, Old

SUBSETS = "tunesmith measures all held-out rows, so that two measurements compare"
TEST = "`tunesmith evaluate RUN --data FILE`"
FIELDS = "columns of a dataset: write the rows with prompt and completion, messages or text"


class MLXLM(Dialect):
    """Its defaults apply where a file is silent: 16 layers, 1,000 iterations, scale 20, no clipping."""

    name = "mlx-lm"
    marks: ClassVar[frozenset[str]] = frozenset(
        "fine_tune_type lora_parameters iters num_layers lora_layers val_batches steps_per_report "
        "steps_per_eval adapter_path adapter_file resume_adapter_file mask_prompt grad_checkpoint "
        "lr_schedule grad_accumulation_steps optimizer_config hf_dataset test_batches".split()
    )
    reasons: ClassVar[Mapping[str, str]] = {
        "train": "tunesmith train trains",
        "test": TEST,
        "test_batches": TEST,
        "val_batches": SUBSETS,
        "steps_per_report": training_arguments.LOGGING,
        "adapter_path": training_arguments.PLACE,
        "adapter_file": training_arguments.PLACE,
        "clear_cache_threshold": training_arguments.MEMORY,
        "report_to": training_arguments.TRACKERS,
        "wandb": training_arguments.TRACKERS,
        "project_name": training_arguments.TRACKERS,
        "config": "the name of the file itself",
        "hf_dataset*": FIELDS,
        "lora_parameters.alpha": "mlx-lm scales by lora_parameters.scale alone, and does not read it",
        "lora_parameters*": "fine_tune_type is full: there is no adapter",
        "num_layers": "fine_tune_type decides",
        "optimizer_config.*": "options of another optimizer, or that MLX's optimizer has no counterpart for",
    }

    def translate(self, keys: Keys) -> None:
        if keys.has("model"):
            keys.carry("model.path", keys.text("model", default=""))
        keys.carry("model.trust_remote_code", keys.flag("trust_remote_code", default=False))
        _data(keys)
        _adapter(keys)
        accumulation = keys.integer("grad_accumulation_steps", default=1)
        accumulation = accumulation.holding(max(1, accumulation.value))
        micro = keys.integer("batch_size", default=4)
        training_arguments.batch(keys, micro, accumulation, pack=False, length=0)
        length = keys.integer("max_seq_length", default=2048)
        keys.set("batch.length", length.value, length)
        note = (
            "mlx-lm cuts the end of a longer row, which is often the answer; here its oldest turns are cut."
        )
        keys.set("template.too_long", "cut", length, note=note)
        iterations = _length(keys, accumulation)
        _optimizer(keys)
        _schedule(keys, iterations // accumulation.value)
        keys.set("loop.seed", (seed := keys.integer("seed", default=0)).value, seed)
        keys.carry("loop.checkpoint_gradients", keys.flag("grad_checkpoint", default=False))


def _data(keys: Keys) -> None:
    """The folder with train.jsonl and valid.jsonl, and which tokens are learned."""
    if keys.has("data"):
        folder = keys.text("data", default="")
        note = "A folder with train.jsonl and valid.jsonl: the second is held out, as there."
        training_arguments.data(keys, [folder.value], folder, note=note)
    elif datasets := [key for key in ("hf_dataset", *keys.items("hf_dataset")) if keys.has(f"{key}.path")]:
        paths = [keys.text(f"{key}.path", default="") for key in datasets]
        training_arguments.data(keys, [path.value for path in paths], *paths)
    mask = keys.flag("mask_prompt", default=False)
    if mask.value:
        note = "mask_prompt learns the last answer of a conversation alone; all: every answer."
        keys.set("template.learn", "last", mask, note=note)
    else:
        note = "mlx-lm learns the prompt like the answer unless mask_prompt is true; 0 is usual."
        keys.set("template.prompt_weight", 1.0, mask, note=note)


def _adapter(keys: Keys) -> None:
    kind = keys.choice("fine_tune_type", default="lora", among=("lora", "dora", "full"))
    layers = keys.integer("num_layers", "lora_layers", default=16)
    keys.set("adapter.kind", kind.value, kind)
    note = "-1 is all blocks." if layers.value < 0 else ""
    keys.set("adapter.layers", layers.value if layers.value > 0 else None, layers, note=note)
    resume = keys.text("resume_adapter_file", default="")
    if resume.given:
        note = "The folder of the file: its rank, scale and targets must be those below."
        keys.set("adapter.start", str(Path(resume.value).parent), resume, note=note)
    if kind.value == "full":
        return
    rank = keys.integer("lora_parameters.rank", default=8)
    scale = keys.number("lora_parameters.scale", default=20.0)
    keys.set("adapter.rank", rank.value, rank)
    note = f"alpha = scale · rank: the update is scaled by alpha / rank, which is {scale.value:g} again."
    keys.set("adapter.alpha", scale.value * rank.value, scale, rank, note=note)
    keys.set("adapter.dropout", (part := keys.number("lora_parameters.dropout", default=0.0)).value, part)
    targets = keys.texts("lora_parameters.keys", default=["all-linear"])
    note = "" if targets.given else "Without keys mlx-lm adapts every linear layer, and routers too."
    keys.set("adapter.targets", [*targets.value], targets, note=note)


def _length(keys: Keys, accumulation: Old[int]) -> int:
    """Iterations, which are micro-batches there, as updates. Returns the iterations."""
    iterations = keys.integer("iters", default=1000)
    steps = max(1, iterations.value // accumulation.value)
    note = "mlx-lm counts micro-batches, tunesmith updates."
    keys.set("loop.steps", steps, iterations, accumulation, note=note if accumulation.value > 1 else "")
    for ours, name in (("loop.validate_every", "steps_per_eval"), ("loop.save_every", "save_every")):
        interval = keys.integer(name, default=0)
        if interval.given:
            updates = max(1, interval.value // accumulation.value)
            keys.set(ours, updates, interval, *[accumulation] * (accumulation.value > 1))
    return iterations.value


def _optimizer(keys: Keys) -> None:
    among = ("adam", "adamw", "muon", "sgd", "adafactor")
    name = keys.choice("optimizer", default="adam", among=among)
    kind, note = name.value, ""
    prefix = f"optimizer_config.{kind}"
    corrected = keys.flag(f"{prefix}.bias_correction", default=False)
    if kind in ("adam", "adamw") and not corrected.value:
        note = (
            "tunesmith corrects the bias of Adam's moments, as the paper does. mlx-lm does not unless told, "
        )
        note += "which makes its first updates about three times as large."
    elif kind == "adafactor":
        note = "mlx-lm's Adafactor sets its own step size; here the rate of the schedule is the rate."
    keys.set("optimizer.kind", kind, name, *[corrected] * corrected.given, note=note)
    if keys.has(f"{prefix}.betas") and kind in ("adam", "adamw"):
        betas = keys.numbers(f"{prefix}.betas", default=[])
        keys.set("optimizer.betas", [*betas.value], betas)
    if kind in ("adam", "adamw"):
        keys.carry("optimizer.eps", keys.number(f"{prefix}.eps", default=1e-8))
    if kind in ("adamw", "muon"):
        decay = keys.number(f"{prefix}.weight_decay", default=0.01)
        keys.set("optimizer.weight_decay", decay.value, decay, note="On matrices only.")
    elif kind in ("sgd", "adafactor"):
        keys.carry("optimizer.weight_decay", keys.number(f"{prefix}.weight_decay", default=0.0))
    if kind in ("sgd", "muon"):
        keys.carry("optimizer.momentum", keys.number(f"{prefix}.momentum", default=0.0))
    note = "mlx-lm does not clip gradients; 1.0 is usual, and one bad row then does less harm."
    keys.set("optimizer.max_norm", None, note=note)


def _schedule(keys: Keys, steps: int) -> None:
    """A constant rate, or ``lr_schedule`` with the arguments of MLX's schedulers. steps: updates in all."""
    rate = keys.number("learning_rate", default=1e-5)
    if not keys.has("lr_schedule"):
        keys.set("optimizer.learning_rate", rate.value, rate)
        keys.set("optimizer.schedule", "constant", Old("lr_schedule", None, None))
        return
    name = keys.text("lr_schedule.name", default="cosine_decay")
    arguments = keys.numbers("lr_schedule.arguments", default=[])
    warm = keys.integer("lr_schedule.warmup", default=0)
    numbers = arguments.value
    peak = numbers[0] if numbers else rate.value
    kind, note, floor, decay = "cosine", "", 0.0, steps - warm.value
    if name.value == "cosine_decay" and len(numbers) > 1:
        decay, floor = int(numbers[1]), numbers[2] if len(numbers) > 2 else 0.0
    elif name.value == "linear_schedule" and len(numbers) > 2:
        kind, floor, decay = "linear", numbers[1], int(numbers[2])
    else:
        note = f"{name.value} has no counterpart; cosine falls in its place."
    if abs(decay + warm.value - steps) > 1:
        note += (
            f"{' ' * bool(note)}mlx-lm's rate falls for {decay} updates after the warm-up and then stays; "
        )
        note += f"here it falls until the end, update {steps}."
    keys.leave("lr_schedule has the rate, and overrides it", rate)
    keys.set("optimizer.learning_rate", peak, arguments)
    keys.set("optimizer.schedule", kind, name, note=note)
    keys.set("optimizer.final_share", round(floor / peak, 12) if peak else 0.0, arguments)
    keys.set("optimizer.warmup_steps", warm.value, warm)
    start = keys.number("lr_schedule.warmup_init", default=0.0)
    keys.leave("the warm-up starts at rate / warmup_steps", start)
