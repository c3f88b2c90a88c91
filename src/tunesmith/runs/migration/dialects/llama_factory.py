"""LLaMA-Factory: the YAML of ``llamafactory-cli train`` (``examples/train_lora/*.yaml``)."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

from tunesmith.errors import ConfigError
from tunesmith.runs.migration import training_arguments
from tunesmith.runs.migration.dialect import Dialect
from tunesmith.runs.migration.keys import Keys, Old

INFO = "dataset_info.json"
KINDS = {"sigmoid": "dpo", "hinge": "dpo", "ipo": "dpo", "orpo": "orpo", "simpo": "simpo"}
"""``pref_loss`` → kind of our objective."""
OPTIMIZERS = "this optimizer has no counterpart: optimizer.kind lists those of MLX"
WEIGHTED = "a loss weighted by the token's own probability has no counterpart"


class LlamaFactory(Dialect):
    """Stages pt, sft, dpo and kto."""

    name = "llama-factory"
    marks: ClassVar[frozenset[str]] = frozenset(
        "model_name_or_path stage finetuning_type cutoff_len template lora_target lora_rank quantization_bit "
        "pref_beta pref_loss dataset dataset_dir val_size max_samples preprocessing_num_workers plot_loss "
        "adapter_name_or_path train_on_prompt mask_history neat_packing".split()
    )
    reasons: ClassVar[Mapping[str, str]] = {
        "template": training_arguments.TEMPLATE,
        "default_system": "write it into the rows",
        "tool_format": training_arguments.TEMPLATE,
        "enable_thinking": "template.thinking, and the reasoning of each row",
        "preserve_thinking": "template.options gives the chat template its variables",
        "dataset_dir": "the file is named in data.train",
        "max_samples": "all rows are trained on: write a file with fewer",
        "mix_strategy": "files are read one after another, and shuffled",
        "interleave_probs": "files are read one after another, and shuffled",
        "disable_shuffling": "rows are always shuffled, another way in every epoch",
        "streaming": training_arguments.LOADER,
        "buffer_size": training_arguments.LOADER,
        "preprocessing_*": training_arguments.LOADER,
        "overwrite_cache": training_arguments.LOADER,
        "tokenized_path": training_arguments.LOADER,
        "data_shared_file_system": training_arguments.LOADER,
        "ignore_pad_token_for_loss": "padding is never learned",
        "media_dir": training_arguments.VISION,
        "freeze_*": "the parts that are trained: adapter.kind=full with adapter.layers and adapter.targets",
        "quantization_*": "MLX quantises in groups of integers (affine)",
        "double_quantization": "MLX quantises in groups of integers (affine)",
        "pissa_*": "an adapter that changes the base when it begins has no counterpart",
        "use_galore": OPTIMIZERS,
        "galore_*": OPTIMIZERS,
        "use_apollo": OPTIMIZERS,
        "apollo_*": OPTIMIZERS,
        "use_badam": OPTIMIZERS,
        "badam_*": OPTIMIZERS,
        "use_adam_mini": OPTIMIZERS,
        "use_llama_pro": "blocks that are added to the model have no counterpart",
        "mixture_of_depths": "mixture of depths has no counterpart",
        "use_*ft_loss": WEIGHTED,
        "*aft_alpha": WEIGHTED,
        "asft_alpha": WEIGHTED,
        "plot_loss": training_arguments.LOGGING,
        "compute_accuracy": "`tunesmith evaluate` measures the answers",
        "cache_dir": "the cache of the hub: the environment variable HF_HOME",
        "model_max_length": "batch.length",
        "use_unsloth*": training_arguments.CUDA,
        "use_v1_kernels": training_arguments.CUDA,
        "use_kt": training_arguments.CUDA,
        "kt_*": training_arguments.CUDA,
        "gradient_checkpointing": "layers are recomputed unless disable_gradient_checkpointing is true",
        "use_reentrant_gc": "recomputing has no variants here",
        "upcast_*": "losses are computed in float32",
        "pure_bf16": "the dtype of computing is that of the weights: model.dtype",
        "rope_scaling": "change it in config.json of the model",
        "shift_attn": "shifted sparse attention has no counterpart",
        "split_special_tokens": "data.text_control says what control tokens in text mean",
        "add_*tokens": "add them to the tokenizer, and set model.resize_embeddings",
        "new_special_tokens_config": "add them to the tokenizer, and set model.resize_embeddings",
        "init_special_tokens": "new embeddings start at the mean of the old ones",
        "moe_aux_loss_coef": "routers are not trained, so that no load-balancing loss is added",
        "export_*": "`tunesmith export RUN`",
        "infer_*": "`tunesmith serve RUN`",
        "vllm_*": "`tunesmith serve RUN`",
        "max_new_tokens": "`tunesmith evaluate RUN`",
        "predict_with_generate": "`tunesmith evaluate RUN`",
        "temperature": "`tunesmith evaluate RUN`",
        "top_*": "`tunesmith evaluate RUN`",
        "ref_model*": "the reference is the model before training",
        "pref_ftx": "objective.sft_weight is for kto: these compare pairs alone",
        "pref_bco_weight": "the loss of BCO has no counterpart",
        "ld_alpha": "LD-DPO has no counterpart",
        "*_hub_token": training_arguments.HUB,
        **training_arguments.REASONS,
    }

    def translate(self, keys: Keys) -> None:
        kind = _objective(keys)
        if keys.has("model_name_or_path"):
            keys.carry("model.path", keys.text("model_name_or_path", default=""))
        keys.carry("model.revision", keys.text("model_revision", default="main"))
        keys.carry("model.trust_remote_code", keys.flag("trust_remote_code", default=False))
        keys.carry("model.resize_embeddings", keys.flag("resize_vocab", default=False))
        _quantised(keys)
        training_arguments.precision(keys)
        _data(keys, kind)
        _adapter(keys, kind)
        _batch(keys)
        training_arguments.epochs(keys, 3.0, "num_train_epochs")
        rate = keys.number("learning_rate", default=5e-5)
        training_arguments.schedule(keys, rate, keys.text("lr_scheduler_type", default="linear"))
        muon = keys.flag("use_muon", default=False)
        training_arguments.optimizer(
            keys, muon.holding("muon") if muon.value else keys.text("optim", default="adamw_torch")
        )
        training_arguments.intervals(keys)
        training_arguments.early_stop(keys, keys.integer("early_stopping_steps", default=1))
        keys.carry("loop.seed", keys.integer("seed", default=42))
        plain = keys.flag("disable_gradient_checkpointing", default=False)
        note = "" if plain.given else "LLaMA-Factory recomputes layers unless told not to."
        keys.set("loop.checkpoint_gradients", not plain.value, plain, note=note)


def _objective(keys: Keys) -> str:
    """Sets the objective and its options, and returns its kind."""
    stage = keys.text("stage", default="sft")
    loss = keys.text("pref_loss", default="sigmoid")
    beta = keys.number("pref_beta", default=0.1)
    if stage.value not in ("pt", "sft", "dpo", "kto"):
        hint = "these have one: pt, sft, dpo, kto"
        raise ConfigError(f"{stage.value} has no counterpart", where=stage.where, hint=hint)
    if stage.value in ("pt", "sft"):
        note = "Rows of plain text are learned as a whole." if stage.value == "pt" else ""
        keys.set("objective.kind", "sft", stage, note=note)
        keys.leave(f"the stage is {stage.value}", loss, beta)
        return "sft"
    if stage.value == "kto":
        keys.set("objective.kind", "kto", stage)
        for ours, name in (
            ("desirable_weight", "kto_chosen_weight"),
            ("undesirable_weight", "kto_rejected_weight"),
        ):
            weight = keys.number(name, default=1.0)
            keys.set(f"objective.{ours}", weight.value, weight, note="null: from the class counts.")
        keys.leave("the stage is kto", loss)
        keys.carry("objective.sft_weight", keys.number("pref_ftx", default=0.0))
    elif loss.value in KINDS:
        keys.set("objective.kind", KINDS[loss.value], stage, *[loss] * loss.given)
        if KINDS[loss.value] == "dpo":
            keys.set("objective.loss", loss.value, loss)
    else:
        hint = f"these have one: {', '.join(KINDS)}"
        raise ConfigError(f"{loss.value} has no counterpart", where=loss.where, hint=hint)
    kind = stage.value if stage.value == "kto" else KINDS[loss.value]
    keys.set("objective.beta", beta.value, beta)
    if kind == "simpo":
        keys.set("objective.gamma", (gamma := keys.number("simpo_gamma", default=0.5)).value, gamma)
    smoothing = keys.number("dpo_label_smoothing", default=0.0)
    keys.leave(
        "objective.loss=robust corrects for flipped labels; conservative smoothing has none", smoothing
    )
    return kind


def _quantised(keys: Keys) -> None:
    bits = keys.integer("quantization_bit", default=0)
    if bits.value in (4, 8):
        note = "Integers in groups of 64 (affine) instead of bitsandbytes' formats: nearly the same error."
        keys.set("model.quantize", bits.value, bits, note=note)
    else:
        keys.leave("tunesmith quantises to 4 or 8 bits", bits)


def _data(keys: Keys, kind: str) -> None:
    """The files behind the names of datasets, the held-out share and which tokens are learned."""
    folder = keys.text("dataset_dir", default="data")
    names = keys.texts("dataset", default=[])
    if names.given:
        paths, note = _files(keys, names, folder.value)
        keys.set("data.train", [*paths], names, *[folder] * folder.given, note=note)
    held_out, share = keys.texts("eval_dataset", default=[]), keys.number("val_size", default=0.0)
    if held_out.given:
        paths, note = _files(keys, held_out, folder.value)
        keys.set("data.valid", [*paths], held_out, note=note)
        keys.leave("eval_dataset is held out", share)
    else:
        training_arguments.held_out(keys, share)
    prompts, history = keys.flag("train_on_prompt", default=False), keys.flag("mask_history", default=False)
    if kind == "sft" and prompts.given:
        keys.set("template.prompt_weight", float(prompts.value), prompts)
    if history.given:
        keys.set("template.learn", "last" if history.value else "all", history)


def _files(keys: Keys, names: Old[list[str]], folder: str) -> tuple[list[str], str]:
    """The files of datasets by dataset_info.json in ``folder``, looked for from here and from the file of
    settings; and a note on those that are not there."""
    for place in (Path(folder), keys.file.parent / folder):
        if (place / INFO).is_file():
            known = _known(place / INFO)
            break
    else:
        place, known = Path(folder), {}
    paths, missing = [], []
    for name in names.value:
        entry = known.get(name)
        file = entry.get("file_name") if isinstance(entry, dict) else None
        paths.append(str(place / (file if isinstance(file, str) else f"{name}.json")))
        missing += [] if isinstance(file, str) else [name]
    note = (
        f"No file is known for {', '.join(missing)} ({INFO} in {folder} names it): correct it."
        if missing
        else ""
    )
    return paths, note


def _known(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"cannot be read: {error}", where=str(path), hint="correct it, or move it away"
        ) from error
    return content if isinstance(content, dict) else {}


def _adapter(keys: Keys, kind: str) -> None:
    method = keys.text("finetuning_type", default="lora")
    if method.value == "full":
        keys.set("adapter.kind", "full", method)
    elif method.value == "freeze":
        layers = keys.integer("freeze_trainable_layers", default=2)
        if layers.value <= 0:
            raise ConfigError(
                "the first layers alone cannot be trained", where=layers.where, hint="the last can"
            )
        keys.set("adapter.kind", "full", method)
        keys.set("adapter.layers", layers.value, layers, note="The last blocks, in full.")
    elif method.value == "lora":
        _lora(keys, method, kind)
    else:
        hint = "lora, freeze and full have one"
        raise ConfigError(f"{method.value} has no counterpart", where=method.where, hint=hint)
    if method.value != "lora":
        lora = [
            old for name, old in keys.leaves.items() if name.startswith("lora_") and old.value is not None
        ]
        variants = [keys.flag(name, default=False) for name in ("use_dora", "use_rslora")]
        keys.leave(f"finetuning_type is {method.value}", *lora, *variants)


def _lora(keys: Keys, method: Old[str], kind: str) -> None:
    dora = keys.flag("use_dora", default=False)
    keys.set("adapter.kind", "dora" if dora.value else "lora", method, *[dora] * dora.given)
    rank = keys.integer("lora_rank", default=8)
    alpha = keys.number("lora_alpha", default=2.0 * rank.value)
    keys.set("adapter.rank", rank.value, rank)
    note = "" if alpha.given else "LLaMA-Factory takes twice the rank."
    keys.set("adapter.alpha", alpha.value, alpha, *[rank] * (not alpha.given), note=note)
    training_arguments.dropout(
        keys, keys.number("lora_dropout", default=0.0), compares=kind in ("dpo", "kto")
    )
    names = keys.texts("lora_target", default=["all"])
    every = names.holding(["all-linear" if name == "all" else name for name in names.value])
    training_arguments.targets(
        keys, every, Old("lora_target", names.value == ["all"] and not names.given, None)
    )
    training_arguments.full_modules(keys, keys.texts("additional_target", default=[]))
    keys.carry("adapter.rank_stabilised", keys.flag("use_rslora", default=False))
    start, new = (
        keys.texts("adapter_name_or_path", default=[]),
        keys.flag("create_new_adapter", default=False),
    )
    if start.given:
        key = "model.adapter" if new.value else "adapter.start"
        note = (
            "Merged into the base."
            if new.value
            else "Trained further: rank, scale and targets must be the same."
        )
        if len(start.value) > 1:
            note += " LLaMA-Factory merges those before the last: merge them first (tunesmith compose)."
        keys.set(key, start.value[-1], start, *[new] * new.given, note=note)


def _batch(keys: Keys) -> None:
    length = keys.integer("cutoff_len", default=2048)
    pack = keys.flag("packing", "neat_packing", default=False)
    micro = keys.integer("per_device_train_batch_size", default=8)
    accumulation = keys.integer("gradient_accumulation_steps", default=1)
    training_arguments.batch(keys, micro, accumulation, pack=pack.value, length=length.value)
    note = "Each row attends only to itself, as with neat_packing." if pack.value else ""
    keys.carry("batch.pack", pack, note=note)
    keys.set("batch.length", length.value, length)
    note = "LLaMA-Factory cuts the ends of prompt and answer; here the oldest turns are cut."
    keys.set("template.too_long", "cut", length, note=note)
