"""What the training arguments of Hugging Face transformers mean here; axolotl, LLaMA-Factory and TRL pass
them on. Names and defaults are those of transformers 5 unless a program has its own."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tunesmith.data import sources
from tunesmith.errors import ConfigError
from tunesmith.runs.migration.keys import Keys, Old

CUDA = "kernels and compilers of CUDA: MLX has its own"
DISTRIBUTED = (
    "distribution over devices: `mlx.launch` starts tunesmith on several machines, each with all weights"
)
LOGGING = "tunesmith logs every update in the run directory, and reports from it"
PLACE = "where results go: `tunesmith train --out FOLDER`"
HUB = "`tunesmith push` uploads a finished artefact"
TOKENIZER = "the tokenizer and its special tokens are the model's own: change them in its folder"
TEMPLATE = "rows are rendered by the model's own chat template: change it in its folder"
RESUME = "`tunesmith train --resume RUN`"
LOADER = "how rows are prepared and loaded: no effect on what is learned"
PER_EPOCH = "set it in updates: one epoch has rows / batch.sequences of them"
ROWS = "a number of rows: tunesmith takes a share, or files"
TRACKERS = "online trackers are not written to: loop.tensorboard writes TensorBoard files"
NOISE = "tunesmith adds no noise to embeddings"
VISION = "images, video and audio are not trained on"
MEMORY = "tunesmith plans its memory by itself: batch.tokens, loop.checkpoint_gradients"

REASONS: Mapping[str, str] = {
    "output_dir": PLACE,
    "overwrite_output_dir": PLACE,
    "run_name": PLACE,
    "logging_*": LOGGING,
    "log_*": LOGGING,
    "disable_tqdm": LOGGING,
    "include_*": LOGGING,
    "report_to": TRACKERS,
    "wandb_*": TRACKERS,
    "swanlab_*": TRACKERS,
    "trackio_*": TRACKERS,
    "mlflow_*": TRACKERS,
    "comet_*": TRACKERS,
    "use_wandb": TRACKERS,
    "use_swanlab": TRACKERS,
    "use_mlflow": TRACKERS,
    "use_comet": TRACKERS,
    "project": TRACKERS,
    "hub_*": HUB,
    "push_to_hub": HUB,
    "resume_from_checkpoint": RESUME,
    "auto_resume_from_checkpoints": RESUME,
    "ignore_data_skip": RESUME,
    "do_train": "tunesmith train trains",
    "do_eval": "the held-out rows are always measured",
    "do_predict": "`tunesmith evaluate RUN`",
    "eval_on_start": "the held-out rows are always measured before the first update",
    "evaluation_strategy": PER_EPOCH,
    "eval_strategy": PER_EPOCH,
    "save_strategy": PER_EPOCH,
    "eval_steps": PER_EPOCH,
    "save_steps": PER_EPOCH,
    "eval_delay": PER_EPOCH,
    "per_device_eval_batch_size": "held-out rows are measured many at once, batch.tokens at most",
    "eval_*": "the held-out rows are measured one way, in sums over all of them",
    "batch_eval_metrics": "the held-out rows are measured one way, in sums over all of them",
    "prediction_loss_only": "the held-out rows are measured one way, in sums over all of them",
    "metric_for_best_model": "loop.best names what decides: loss, perplexity or a metric of the objective",
    "greater_is_better": "loop.best knows which metrics are better the lower they are",
    "save_only_model": "a checkpoint always holds what resuming needs",
    "save_safetensors": "checkpoints are always safetensors",
    "save_*": "a checkpoint is written whole at every loop.save_every",
    "bf16*": "the dtype of computing is that of the weights: model.dtype",
    "fp16*": "the dtype of computing is that of the weights: model.dtype",
    "fp8*": "the dtype of computing is that of the weights: model.dtype",
    "tf32": CUDA,
    "optim_args": "optimizer.* names each option",
    "optim_target_modules": "low-rank gradients (GaLore, APOLLO) have no counterpart",
    "average_tokens_across_devices": "losses are always sums over all learned tokens of an update",
    "label_smoothing_factor": "labels are not smoothed",
    "gradient_checkpointing_kwargs*": "recomputing has no variants here",
    "activation_*": MEMORY,
    "auto_find_batch_size": MEMORY,
    "torch_empty_cache_steps": MEMORY,
    "low_cpu_mem_usage": MEMORY,
    "max_memory*": MEMORY,
    "gpu_memory_limit": MEMORY,
    "device_map*": MEMORY,
    "use_cache": "the key-value cache is for generation",
    "torch_compile*": "loop.compile decides whether the step is compiled",
    "attn_implementation": CUDA,
    "flash_attn*": CUDA,
    "*flash_attention": CUDA,
    "*_attention": CUDA,
    "*liger*": CUDA,
    "neftune_noise_alpha": NOISE,
    "deepspeed*": DISTRIBUTED,
    "fsdp*": DISTRIBUTED,
    "ddp*": DISTRIBUTED,
    "local_rank": DISTRIBUTED,
    "*parallel*": DISTRIBUTED,
    "accelerator_config*": DISTRIBUTED,
    "ray_*": DISTRIBUTED,
    "dataloader_drop_last": "the last rows of an epoch are always trained",
    "dataloader_*": LOADER,
    "dataset_num_proc": LOADER,
    "dataset_processes": LOADER,
    "remove_unused_columns": LOADER,
    "length_column_name": LOADER,
    "group_by_length": "rows are shuffled; padding is kept low within an update",
    "train_sampling_strategy": "rows are shuffled; padding is kept low within an update",
    "pad_to_multiple_of": "padding changes nothing that is learned",
    "padding_free": "batch.pack lays rows end to end",
    "data_seed": "loop.seed decides the split and the order of rows too",
    "full_determinism": "a run is always a function of its settings and its seed",
    "use_cpu": "MLX takes the GPU if there is one",
    "seed": "loop.seed",
    "image_*": VISION,
    "video_*": VISION,
    "audio_*": VISION,
    "*vision*": VISION,
    "*multi_modal*": VISION,
    "use_fast_tokenizer": TOKENIZER,
    "chat_template*": TEMPLATE,
    "special_tokens*": TOKENIZER,
    "eos_token": TOKENIZER,
    "pad_token": "padding is never learned, and needs no token",
    "debug": "`--debug` shows tracebacks",
    "skip_memory_metrics": LOGGING,
    "label_names": LOADER,
    "enable_jit_checkpoint": "a run that is interrupted keeps its last checkpoint: loop.save_every",
    "restore_callback_states_from_checkpoint": RESUME,
    "lora_task_type": "tunesmith trains language models",
    "bnb_*": "MLX quantises in groups of integers (affine), not in nf4 or fp4",
    "lora_target_parameters": "routed experts are adapted by name: adapter.targets",
    "loraplus_*": "A and B have one learning rate: LoRA+ has no counterpart",
}

_OPTIMIZERS = {
    "adamw": "adamw",
    "adam": "adam",
    "adafactor": "adafactor",
    "sgd": "sgd",
    "adagrad": "adagrad",
    "rmsprop": "rmsprop",
    "lion": "lion",
    "muon": "muon",
}
_EXACT = ("adamw", "adamw_torch", "adamw_torch_fused", "adamw_hf", "adamw_torch_xla", "adamw_apex_fused")
_SCHEDULES = {
    "linear": "linear",
    "cosine": "cosine",
    "constant": "constant",
    "constant_with_warmup": "constant",
}


def batch(keys: Keys, micro: Old[int], accumulation: Old[int], *, pack: bool, length: int) -> None:
    """Rows an update from rows a micro-batch and micro-batches an update, on one device. ``pack``: the
    program lays rows end to end in blocks of ``length`` tokens, and counts blocks."""
    for old in (micro, accumulation):
        if old.value < 1:
            raise ConfigError(f"must be at least 1, not {old.value}", where=old.where)
    rows = micro.value * accumulation.value
    note = f"Rows an update: {micro.value} × {accumulation.value}, on one device."
    if pack:
        note += (
            f" {keys.program} counts packed blocks of {length} tokens, tunesmith rows: multiply by the rows "
        )
        note += "that fit one block (tunesmith train --dry-run shows their lengths)."
        keys.set("batch.tokens", micro.value * length, micro, note="Tokens on the device at once.")
    else:
        keys.set("batch.micro", micro.value, micro)
    keys.set("batch.sequences", rows, micro, accumulation, note=note)


def epochs(keys: Keys, default: float, *names: str) -> None:
    """Epochs, or ``max_steps`` updates where they are given and above 0."""
    passes, steps = keys.number(*names, default=default), keys.integer("max_steps", default=-1)
    if steps.value > 0:
        keys.set("loop.steps", steps.value, steps, note="Updates; epochs are ignored, as there.")
        keys.leave("max_steps is given, and overrides epochs", passes)
    else:
        keys.set("loop.epochs", passes.value, passes, *[steps] * steps.given)


def schedule(keys: Keys, rate: Old[float], name: Old[str]) -> None:
    """The learning rate, its schedule and its warm-up."""
    keys.set("optimizer.learning_rate", rate.value, rate)
    kind, floor, olds, note = name.value, 0.0, [name], ""
    if kind == "cosine_with_min_lr":
        share = keys.number("lr_scheduler_kwargs.min_lr_rate", default=0.0)
        least = keys.number("lr_scheduler_kwargs.min_lr", default=share.value * rate.value)
        kind, floor = "cosine", least.value / rate.value if rate.value else 0.0
        olds += [old for old in (share, least) if old.given]
    ratio = keys.number("cosine_min_lr_ratio", default=0.0)
    if ratio.given and kind == "cosine":
        floor, olds = ratio.value, [name, ratio]
    else:
        keys.leave("the schedule is not cosine", ratio)
    if kind not in _SCHEDULES:
        note = f"{kind} has no counterpart; cosine falls in its place."
    keys.set("optimizer.schedule", _SCHEDULES.get(kind, "cosine"), name, note=note)
    if floor:
        keys.set("optimizer.final_share", round(floor, 12), *olds)
    used = {old.key for old in olds}
    options = [old for old in keys.below("lr_scheduler_kwargs") if old.key not in used]
    keys.leave("options of a schedule without a counterpart", *options)
    if kind == "constant":
        warm = [keys.number(key, default=0.0) for key in ("warmup_steps", "warmup_ratio")]
        keys.leave("the schedule constant has no warm-up there: constant_with_warmup has", *warm)
    else:
        warmup(keys)


def warmup(keys: Keys) -> None:
    """``warmup_steps``, where a value below 1 is a share; or else ``warmup_ratio``."""
    steps, ratio = keys.number("warmup_steps", default=0.0), keys.number("warmup_ratio", default=0.0)
    if steps.value >= 1:
        keys.set("optimizer.warmup_steps", int(steps.value), steps)
        keys.leave("warmup_steps is given, and overrides it", ratio)
    elif steps.value > 0:
        keys.set(
            "optimizer.warmup_share", steps.value, steps, note="A share of all updates, as it is below 1."
        )
        keys.leave("warmup_steps is given, and overrides it", ratio)
    elif ratio.given:
        keys.set("optimizer.warmup_share", ratio.value, ratio, *[steps] * steps.given)
    else:
        keys.carry("optimizer.warmup_steps", steps.holding(int(steps.value)))


def optimizer(keys: Keys, name: Old[str]) -> None:
    """The optimizer with its options, and clipping."""
    word = name.value.lower().replace("paged_", "").replace("schedule_free_", "")
    kind = next((ours for start, ours in _OPTIMIZERS.items() if word.split("_")[0] == start), "adamw")
    note = ""
    if word.split("_")[0] not in _OPTIMIZERS or "galore" in word or "apollo" in word:
        kind, note = "adamw", f"{name.value} has no counterpart; AdamW takes its place."
    elif kind == "adamw" and name.value.lower() not in _EXACT:
        note = "AdamW with its state in float32, not in fewer bits or paged: the same rule, more memory."
    elif kind != "adamw":
        note = f"MLX's {kind}; options that the two name differently keep MLX's defaults."
    keys.set("optimizer.kind", kind, name, note=note)
    decay = keys.number("weight_decay", default=0.0)
    if kind in ("adam", "rmsprop", "adagrad"):
        keys.leave(f"{kind} has no decoupled weight decay here", decay)
    else:
        keys.carry("optimizer.weight_decay", decay)
    first, second = keys.number("adam_beta1", default=0.9), keys.number("adam_beta2", default=0.999)
    eps = keys.number("adam_epsilon", default=1e-8)
    if kind in ("adamw", "adam"):
        if first.given or second.given:
            keys.set("optimizer.betas", [first.value, second.value], first, second)
        keys.carry("optimizer.eps", eps)
    else:
        keys.leave(f"an option of Adam, and the optimizer is {kind}", first, second, eps)
    norm = keys.number("max_grad_norm", default=1.0)
    if norm.given:
        keys.set("optimizer.max_norm", norm.value if norm.value > 0 else None, norm)


def intervals(keys: Keys) -> None:
    """Updates between validations and checkpoints, and how many checkpoints are kept."""
    for ours, steps, strategies in (
        ("loop.validate_every", "eval_steps", ("eval_strategy", "evaluation_strategy")),
        ("loop.save_every", "save_steps", ("save_strategy",)),
    ):
        strategy = keys.text(*strategies, default="steps")
        interval = keys.number(steps, default=0.0)
        if strategy.value in ("no", "false"):
            keys.set(ours, 0, strategy, note="0: the last only.")
            keys.leave(f"{strategy.key} is no", interval)
        elif strategy.value == "steps" and interval.value >= 1:
            keys.set(ours, int(interval.value), interval, *[strategy] * strategy.given)
    keep = keys.integer("save_total_limit", default=3)
    if keep.given:
        keys.set("loop.keep_last", max(1, keep.value), keep, note="Beside the best.")
    best = keys.flag("load_best_model_at_end", default=False)
    if best.value and held_out_rows(keys):
        keys.set("loop.keep_best", True, best)
    else:
        keys.leave("no rows are held out" if best.value else "loop.keep_best", best)


def held_out_rows(keys: Keys) -> bool:
    """Whether rows are held out, as far as settings say so yet."""
    setting = keys.settings.get("data.valid")
    return setting is None or setting.value not in (0, 0.0, [])


def early_stop(keys: Keys, patience: Old[int]) -> None:
    """Validations without a new best after which training stops; after `intervals`."""
    interval = keys.settings.get("loop.validate_every")
    if not held_out_rows(keys):
        keys.leave("no rows are held out", patience)
    elif interval is not None and interval.value == 0:
        keys.leave("there is one validation, at the end", patience)
    else:
        keys.carry("loop.early_stop", patience)


def held_out(keys: Keys, share: Old[float]) -> None:
    """The share of rows that is held out; a number of rows has no counterpart."""
    if share.value >= 1:
        keys.leave(ROWS, share)
    else:
        note = "Without held-out rows a run has no validation and no evaluation: 0.1 is usual."
        keys.set("data.valid", share.value, share, note="" if share.value else note)


def precision(keys: Keys) -> None:
    """The dtype of the weights from ``bf16`` or ``fp16``, whose values are true, false and auto."""
    for dtype, names in {"bfloat16": ("bf16", "bfloat16"), "float16": ("fp16", "float16")}.items():
        flag = keys.text(*names, default="false")
        if flag.value in ("true", "full"):
            note = "Slow on a Linux CPU, where auto is float32." if dtype == "bfloat16" else ""
            keys.set("model.dtype", dtype, flag, note=note)
            return
        if flag.value == "auto":
            keys.set("model.dtype", "auto", flag)
            return


def quantised(keys: Keys, four: Old[bool], eight: Old[bool]) -> None:
    """``load_in_4bit`` and ``load_in_8bit``."""
    if not (four.given or eight.given):
        return
    if four.value or eight.value:
        used = four if four.value else eight
        note = "Integers in groups of 64 (affine) instead of bitsandbytes' formats: nearly the same error."
        keys.set("model.quantize", 4 if four.value else 8, used, note=note)
        keys.leave("the base is quantised as the other key says", eight if four.value else four)
    else:
        keys.set("model.quantize", None, *[old for old in (four, eight) if old.given])


def dropout(keys: Keys, old: Old[float], *, compares: bool) -> None:
    """``compares``: the objective compares answers; TRL's trainers of these switch dropout off."""
    if compares and old.value:
        note = f"The old trainer switches dropout off in this objective: {old.value:g} had no effect."
        keys.set("adapter.dropout", 0.0, old, note=note)
    else:
        keys.set("adapter.dropout", old.value, old)


def data(keys: Keys, paths: list[str], *olds: Old[Any], note: str = "") -> None:
    """Files to train on; names of hub datasets are kept, with a note."""
    hub = [path for path in paths if _on_hub(path)]
    if hub:
        note += f"{' ' * bool(note)}tunesmith reads files: download {', '.join(hub)} and name the files here."
    keys.set("data.train", [*paths], *olds, note=note)


def _on_hub(path: str) -> bool:
    """Whether ``path`` is the name of a dataset (``owner/name``) rather than that of a file or folder."""
    plain = not path.lower().endswith(sources.SUFFIXES) and not path.startswith((".", "/", "~"))
    return plain and path.count("/") <= 1 and not Path(path).exists()


def targets(keys: Keys, names: Old[list[str]], linear: Old[bool]) -> None:
    """The layers with adapters. ``linear``: all linear layers, whatever ``names`` says. One name that holds a
    regular expression has no counterpart."""
    expression = next((name for name in names.value if set(name) & set("\\()|[]^$+")), None)
    if linear.value or names.value == ["all-linear"]:
        used = [old for old in (linear, names) if old.given and (old is names or linear.value)]
        keys.set("adapter.targets", ["all-linear"], *used, note="All linear layers of the blocks.")
        keys.leave("lora_target_modules has all-linear", *[linear] * (not linear.value))
    elif expression is not None:
        note = (
            "The regular expression for layers has no counterpart: name the layers, or use patterns (*_proj)."
        )
        keys.set("adapter.targets", ["all-linear"], note=note)
        keys.leave("a regular expression", names)
        keys.leave("lora_target_modules names the layers", linear)
    else:
        layers = [name for name in names.value if name not in _EMBEDDINGS]
        note = ""
        if len(layers) < len(names.value):
            note = "Embeddings have no low-rank adapter here: adapter.full_modules trains them in full."
        elif not names.given:
            note = f"{keys.program} leaves the layers to PEFT, whose choice depends on the family."
        keys.set("adapter.targets", [*layers] or ["auto"], names, *[linear] * linear.given, note=note)


_EMBEDDINGS = ("embed_tokens", "wte", "embedding", "word_embeddings")


def full_modules(keys: Keys, names: Old[list[str]]) -> None:
    """Modules that are trained in full beside the adapter."""
    if names.given:
        keys.set("adapter.full_modules", [*names.value], names)
