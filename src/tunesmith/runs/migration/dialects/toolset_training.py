"""Toolset-Training (``mistral_lora_mac/config.yaml``): supervised fine-tuning and KTO of Mistral-7B on a Mac,
the system that tunesmith replaces."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from tunesmith.runs.migration import training_arguments
from tunesmith.runs.migration.dialect import Dialect
from tunesmith.runs.migration.keys import Keys, Old

SAMPLES = "samples of a run are answered greedily, so that two checkpoints compare"


class ToolsetTraining(Dialect):
    """A file with a block ``kto`` is KTO's; without one every row is imitated."""

    name = "toolset-training"
    marks: ClassVar[frozenset[str]] = frozenset(
        "model.name model.max_seq_length lora.rank lora.alpha lora.target_modules training.num_epochs "
        "training.per_device_batch_size training.gradient_accumulation_steps data.dataset_path "
        "data.train_split output.checkpoint_dir system.memory_limit_gb".split()
    )
    reasons: ClassVar[Mapping[str, str]] = {
        "model.cache_dir": "the cache of the hub: the environment variable HF_HOME",
        "model.max_seq_length": "the same as data.max_seq_length",
        "training.logging_steps": training_arguments.LOGGING,
        "training.num_epochs": "max_steps is given, and ends the run",
        "logging.*": training_arguments.LOGGING,
        "output.*": training_arguments.PLACE,
        "data.seed": "loop.seed decides the split and the order of rows too",
        "data.shuffle": "rows are always shuffled, another way in every epoch",
        "evaluation.*": SAMPLES,
        "system.device": "MLX takes the GPU if there is one",
        "system.memory_limit_gb": "`tunesmith train --dry-run` shows the memory that a run takes",
        "system.num_workers": training_arguments.LOADER,
        "lora.bias": "biases are not trained",
    }

    def translate(self, keys: Keys) -> None:
        if keys.has("model.name"):
            keys.carry("model.path", keys.text("model.name", default=""))
        keys.carry("model.dtype", keys.text("model.dtype", default="float16"))
        keys.carry("model.trust_remote_code", keys.flag("model.trust_remote_code", default=False))
        _data(keys)
        _objective(keys)
        _adapter(keys)
        micro = keys.integer("training.per_device_batch_size", default=2)
        accumulation = keys.integer("training.gradient_accumulation_steps", default=4)
        training_arguments.batch(keys, micro, accumulation, pack=False, length=0)
        length = keys.integer("data.max_seq_length", "model.max_seq_length", default=2048)
        keys.set("batch.length", length.value, length)
        note = "The old system cuts the end of a longer row; here its oldest turns are cut."
        keys.set("template.too_long", "cut", length, note=note)
        _optimizer(keys)
        _loop(keys)


def _data(keys: Keys) -> None:
    if keys.has("data.dataset_path"):
        path = keys.text("data.dataset_path", default="")
        training_arguments.data(keys, [path.value], path)
    split = keys.number("data.train_split", default=0.8)
    note = "1 − train_split; near-duplicates stay on one side, which the old split did not see to."
    keys.set("data.valid", round(1 - split.value, 12), split, note=note)


def _objective(keys: Keys) -> None:
    if not keys.has("kto"):
        block = Old("kto", None, None)
        note = (
            "No block kto: the old system imitates every row, whatever its label; leave_out skips bad rows."
        )
        keys.set("objective.kind", "sft", block)
        keys.set("objective.undesirable", "learn", block, note=note)
        note = "It also learns the prompts like the answers; 0 is usual."
        keys.set("template.prompt_weight", 1.0, block, note=note)
        return
    beta = keys.number("kto.beta", default=0.1)
    keys.set("objective.kind", "kto", beta)
    note = "The old loss takes means a token, prompt included; KTO's are sums over the answer: the same beta "
    note += "holds the reference more strongly here."
    keys.set("objective.beta", beta.value, beta, note=note)
    for ours, name in (("desirable_weight", "lambda_d"), ("undesirable_weight", "lambda_u")):
        weight = keys.number(f"kto.{name}", default=1.0)
        keys.set(f"objective.{ours}", weight.value, weight, note="null: from the class counts.")


def _adapter(keys: Keys) -> None:
    rank = keys.integer("lora.rank", default=16)
    alpha = keys.number("lora.alpha", default=32.0)
    dropout = keys.number("lora.dropout", default=0.05)
    targets = keys.texts("lora.target_modules", default=["q_proj", "v_proj"])
    bias = keys.text("lora.bias", default="none")
    keys.set("adapter.kind", "lora", *[bias] * (bias.given and bias.value == "none"))
    keys.set("adapter.rank", rank.value, rank)
    keys.set("adapter.alpha", alpha.value, alpha)
    keys.set("adapter.dropout", dropout.value, dropout)
    keys.set("adapter.targets", [*targets.value], targets)


def _optimizer(keys: Keys) -> None:
    keys.set(
        "optimizer.kind", "adamw", note="With bias correction, as in the paper; the old system has none."
    )
    rate = keys.number("training.learning_rate", default=1e-4)
    warm = keys.integer("training.warmup_steps", default=100)
    decay = keys.number("training.weight_decay", default=0.01)
    norm = keys.number("training.max_grad_norm", default=1.0)
    keys.set("optimizer.learning_rate", rate.value, rate)
    keys.set("optimizer.schedule", "cosine")
    keys.set("optimizer.warmup_steps", warm.value, warm)
    keys.set("optimizer.weight_decay", decay.value, decay, note="On matrices only.")
    note = "The old clipping left out the layers, whose gradients are in lists: updates may be smaller now."
    keys.set("optimizer.max_norm", norm.value, norm, note=note)


def _loop(keys: Keys) -> None:
    epochs, steps = (
        keys.integer("training.num_epochs", default=1),
        keys.integer("training.max_steps", default=-1),
    )
    if steps.value > 0:
        note = f"Updates. The old system also stops after num_epochs ({epochs.value}), whichever comes first."
        keys.set("loop.steps", steps.value, steps, note=note)
    else:
        keys.set("loop.epochs", float(epochs.value), epochs, *[steps] * steps.given)
    keys.set("loop.seed", (seed := keys.integer("training.seed", default=42)).value, seed)
    keys.carry("loop.validate_every", keys.integer("training.eval_steps", default=50))
    keys.carry("loop.save_every", keys.integer("training.save_steps", default=100))
    keep = keys.integer("output.keep_last_n_checkpoints", default=3)
    keys.set("loop.keep_last", keep.value, keep)
    keys.set("loop.keep_best", True, note="The old system copies its best checkpoint too.")
    keys.carry("loop.prompts", keys.texts("evaluation.sample_prompts", default=[]))
    keys.carry("loop.sample_tokens", keys.integer("evaluation.max_new_tokens", default=100))
