"""TRL: script arguments, ModelConfig and a trainer's config in one YAML, as ``trl sft --config``, TrlParser
and the recipes of the alignment-handbook have them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from tunesmith.errors import ConfigError
from tunesmith.runs.migration import training_arguments
from tunesmith.runs.migration.dialect import Dialect
from tunesmith.runs.migration.keys import Keys, Old

RATES = {"sft": 2e-5}
"""Objective → the trainer's own learning rate; 1e-6 is that of the others."""
LOSSES = ("sigmoid", "robust", "hinge", "ipo", "sigmoid_norm", "apo_zero")
ONLINE = ("num_generations", "reward_model_path", "reward_funcs", "num_sample_generations")
"""Keys of trainers that let the model answer while it learns."""
REFERENCE = "the reference is the model before training, measured once and kept"
HUB_DATA = "a dataset of the hub: download this part of it"


class TRL(Dialect):
    """The YAML does not say which trainer reads it. KTO, SimPO and DPO are told by their keys, ORPO by the
    name of a folder or file; without a sign it is SFT."""

    name = "trl"
    marks: ClassVar[frozenset[str]] = frozenset(
        "model_name_or_path dataset_name dataset_mixture dataset_mixer dataset_splits dataset_train_split "
        "dataset_test_split dataset_config use_peft torch_dtype lora_task_type max_prompt_length "
        "assistant_only_loss completion_only_loss lora_r".split()
    )
    reasons: ClassVar[Mapping[str, str]] = {
        "dataset_test_split": "name its file in data.valid",
        "dataset_mixture.seed": "loop.seed decides the split and the order of rows",
        "dataset_mixture*.weight": "a share of a dataset: write a file with so many rows",
        "datasets*.fraction": "a share of a dataset: write a file with so many rows",
        "dataset_mixer.*": HUB_DATA,
        "dataset_mixture*": HUB_DATA,
        "datasets*": HUB_DATA,
        "dataset_config": HUB_DATA,
        "dataset_train_split": HUB_DATA,
        "dataset_splits": HUB_DATA,
        "dataset_configs": HUB_DATA,
        "dataset_kwargs*": training_arguments.LOADER,
        "dataset_streaming": training_arguments.LOADER,
        "streaming": training_arguments.LOADER,
        "dataset_text_field": "rows of plain text are read under the key text",
        "shuffle_dataset": "rows are always shuffled, another way in every epoch",
        "max_prompt_length": "prompt and answer share batch.length",
        "max_completion_length": "prompt and answer share batch.length",
        "truncation_mode": "template.too_long=cut cuts the oldest turns",
        "packing_strategy": "batch.pack has no options",
        "eval_packing": "batch.pack is for held-out rows too",
        "model_init_kwargs*": "model.dtype, model.revision and model.quantize name what is set of it",
        "router_aux_loss_coef": "routers are not trained, so that no load-balancing loss is added",
        "disable_dropout": "adapter.dropout",
        "is_encoder_decoder": "tunesmith trains decoders",
        "ref_model*": REFERENCE,
        "model_adapter_name": REFERENCE,
        "ref_adapter_name": REFERENCE,
        "precompute_ref_*": REFERENCE,
        "sync_ref_model": REFERENCE,
        "reference_free": REFERENCE,
        "f_*": "the divergence is the reverse Kullback-Leibler's",
        "loss_weights": "one loss is minimised",
        "ld_alpha": "LD-DPO has no counterpart",
        "use_weighting": "WPO has no counterpart",
        "label_smoothing": "objective.loss=robust is for flipped labels; plain smoothing has no counterpart",
        "discopop_tau": "DiscoPOP has no counterpart",
        "cpo_alpha": "SimPO has no term of likelihood here",
        "use_bnb_nested_quant": "MLX quantises in groups of integers (affine)",
        "env.*": "set environment variables in the shell",
        "ignore_bias_buffers": training_arguments.DISTRIBUTED,
        "system_prompt": "write it into the rows",
        **training_arguments.REASONS,
    }

    def translate(self, keys: Keys) -> None:
        kind = _objective(keys)
        if keys.has("model_name_or_path"):
            keys.carry("model.path", keys.text("model_name_or_path", default=""))
        keys.carry("model.revision", keys.text("model_revision", default="main"))
        keys.carry("model.trust_remote_code", keys.flag("trust_remote_code", default=False))
        four, eight = (keys.flag(f"load_in_{bits}bit", default=False) for bits in (4, 8))
        training_arguments.quantised(keys, four, eight)
        among = ("auto", "bfloat16", "float16", "float32")
        dtype = keys.choice("dtype", "torch_dtype", default="auto", among=among)
        keys.carry("model.dtype", dtype, note="Slow on a Linux CPU." if dtype.value == "bfloat16" else "")
        _data(keys, kind)
        _adapter(keys, kind)
        _batch(keys)
        training_arguments.epochs(keys, 3.0, "num_train_epochs")
        rate = keys.number("learning_rate", default=RATES.get(kind, 1e-6))
        training_arguments.schedule(keys, rate, keys.text("lr_scheduler_type", default="linear"))
        training_arguments.optimizer(keys, keys.text("optim", default="adamw_torch_fused"))
        training_arguments.intervals(keys)
        keys.carry("loop.seed", keys.integer("seed", default=42))
        recompute = keys.flag("gradient_checkpointing", default=True)
        keys.set("loop.checkpoint_gradients", recompute.value, recompute)


def _objective(keys: Keys) -> str:
    """Sets the objective and its options, and returns its kind."""
    losses = keys.texts("loss_type", default=[])
    loss = losses.holding(losses.value[0] if losses.value else "")
    kind = _kind(keys, loss)
    note = (
        f"TRL's YAML does not name its trainer: {kind} is told by its keys and the path. Correct it if not."
    )
    known = ("nll", "chunked_nll") if kind == "sft" else ("kto", "simpo", "apo_zero_unpaired")
    keys.set("objective.kind", kind, *[loss] * (loss.value in known), note=note)
    if kind == "sft":
        return kind
    if kind == "dpo":
        chosen = loss.value or "sigmoid"
        if chosen not in LOSSES:
            hint = f"these have one: {', '.join(LOSSES)}"
            raise ConfigError(f"{chosen} has no counterpart", where=loss.where, hint=hint)
        keys.set("objective.loss", chosen, loss.holding(chosen))
        if chosen == "robust":
            keys.carry("objective.label_smoothing", keys.number("label_smoothing", default=0.0))
    keys.set("objective.beta", (beta := keys.number("beta", default=0.1)).value, beta)
    if kind in ("kto", "apo_zero_unpaired"):
        for side in ("desirable", "undesirable"):
            weight = keys.number(f"{side}_weight", default=1.0)
            keys.set(f"objective.{side}_weight", weight.value, weight, note="null: from the class counts.")
    if kind == "simpo":
        keys.set("objective.gamma", (gamma := keys.number("simpo_gamma", default=0.5)).value, gamma)
    return kind


def _kind(keys: Keys, loss: Old[str]) -> str:
    """The kind of our objective, from keys that one trainer alone has, or from the names of file and
    folder."""
    words = set(
        f"{keys.file.parent.name} {keys.file.stem}".lower().replace("-", " ").replace("_", " ").split()
    )
    for key in ONLINE:
        if keys.has(key):
            hint = "sft, kto, dpo, orpo and simpo have one"
            raise ConfigError(
                "training on answers of the model has no counterpart", where=keys.leaves[key].where, hint=hint
            )
    if loss.value == "apo_zero_unpaired":
        return loss.value
    if keys.has("desirable_weight") or keys.has("undesirable_weight") or loss.value == "kto":
        return "kto"
    if keys.has("simpo_gamma") or loss.value == "simpo":
        return "simpo"
    if (
        keys.has("beta")
        or loss.value in LOSSES
        or keys.has("max_prompt_length")
        or words & {"dpo", "orpo", "kto"}
    ):
        return next((name for name in ("orpo", "kto") if name in words), "dpo")
    return "sft"


def _data(keys: Keys, kind: str) -> None:
    """Names of datasets, the held-out share and which tokens are learned."""
    name = keys.text("dataset_name", default="")
    items = [item for head in ("datasets", "dataset_mixture.datasets") for item in keys.items(head)]
    mixed = [keys.text(f"{item}.path", f"{item}.id", default="") for item in items]
    mixed += [old.holding(old.key.partition(".")[2]) for old in keys.below("dataset_mixer")]
    given = [old for old in (mixed or [name]) if old.given]
    if given:
        training_arguments.data(keys, list(dict.fromkeys(old.value for old in given)), *given)
    share = keys.number("test_split_size", "dataset_mixture.test_split_size", default=0.0)
    strategy = keys.text("eval_strategy", "evaluation_strategy", default="no")
    if share.given:
        training_arguments.held_out(keys, share)
    elif strategy.value in ("no", "false"):
        note = "TRL measures no rows then; without held-out rows a run has no evaluation: 0.1 is usual."
        keys.set("data.valid", 0.0, strategy, note=note)
    if kind == "sft":
        answers = keys.flag("assistant_only_loss", default=False)
        completion = keys.flag("completion_only_loss", default=False)
        learned = answers.value or completion.value
        note = "TRL learns whole conversations unless assistant_only_loss is true; of rows with prompt and "
        note += "completion it learns the completion: 0 is right for these."
        olds = [old for old in (answers, completion) if old.given] or [answers]
        keys.set("template.prompt_weight", float(not learned), *olds, note="" if learned else note)


def _adapter(keys: Keys, kind: str) -> None:
    peft, dora = keys.flag("use_peft", default=False), keys.flag("use_dora", default=False)
    if not peft.value:
        keys.set("adapter.kind", "full", peft, note="Without use_peft TRL trains the weights themselves.")
        lora = [
            old for name, old in keys.leaves.items() if name.startswith("lora_") and old.value is not None
        ]
        keys.leave("use_peft is not true", *lora, dora, keys.flag("use_rslora", default=False))
        return
    keys.set("adapter.kind", "dora" if dora.value else "lora", peft, *[dora] * dora.given)
    rank, alpha = keys.integer("lora_r", default=16), keys.number("lora_alpha", default=32.0)
    keys.set("adapter.rank", rank.value, rank)
    keys.set("adapter.alpha", alpha.value, alpha)
    off = keys.flag("disable_dropout", default=True).value and kind != "sft"
    training_arguments.dropout(keys, keys.number("lora_dropout", default=0.05), compares=off)
    names = keys.texts("lora_target_modules", default=["auto"])
    training_arguments.targets(keys, names, Old("use_peft", False, None))
    training_arguments.full_modules(keys, keys.texts("lora_modules_to_save", default=[]))
    keys.carry("adapter.rank_stabilised", keys.flag("use_rslora", default=False))


def _batch(keys: Keys) -> None:
    length = keys.integer("max_length", "max_seq_length", default=1024)
    pack = keys.flag("packing", default=False)
    micro = keys.integer("per_device_train_batch_size", default=8)
    accumulation = keys.integer("gradient_accumulation_steps", default=1)
    training_arguments.batch(keys, micro, accumulation, pack=pack.value, length=length.value)
    keys.carry("batch.pack", pack)
    keys.set("batch.length", length.value, length)
    note = "TRL cuts the end of a longer row, which is often the answer; here its oldest turns are cut."
    keys.set("template.too_long", "cut", length, note=note)
