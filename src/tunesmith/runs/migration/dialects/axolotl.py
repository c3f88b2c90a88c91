"""axolotl: the YAML of ``axolotl train`` (``examples/*/*.yml``)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from tunesmith.errors import ConfigError
from tunesmith.runs.migration import training_arguments
from tunesmith.runs.migration.dialect import Dialect
from tunesmith.runs.migration.keys import Keys

LAYOUTS = {"alpaca": "alpaca", "completion": "text", "sharegpt": "sharegpt"}
"""``type`` of a dataset → our layout, but for chat_template, which depends on field_messages."""
CHAT = {"messages": "messages", "conversations": "sharegpt"}
OBJECTIVES = ("dpo", "ipo", "kto", "orpo", "simpo")
COLUMNS = "columns of a dataset: tunesmith reads the layouts of docs/data.md by their keys"
SCHEDULE = "the schedule is linear or cosine after a linear warm-up, and falls to the end"
HUB_DATA = "a dataset of the hub: download this part of it"


class Axolotl(Dialect):
    """Supervised fine-tuning, and ``rl: dpo``, ipo, kto, orpo, simpo."""

    name = "axolotl"
    marks: ClassVar[frozenset[str]] = frozenset(
        "base_model sequence_len micro_batch_size val_set_size sample_packing lora_target_linear num_epochs "
        "lr_scheduler saves_per_epoch evals_per_epoch dataset_prepared_path load_in_4bit adapter rl "
        "pad_to_sequence_len train_on_inputs lora_model_dir".split()
    )
    reasons: ClassVar[Mapping[str, str]] = {
        "model_type": "config.json of the model decides",
        "tokenizer_*": training_arguments.TOKENIZER,
        "tokens": "add them to the tokenizer, and set model.resize_embeddings",
        "tokens.*": training_arguments.TOKENIZER,
        "resize_token_embeddings_to_32x": "padding of the embedding has no effect on what is learned",
        "reinit_weights": "training begins with the weights of the base",
        "dp_*": training_arguments.DISTRIBUTED,
        "use_ray": training_arguments.DISTRIBUTED,
        "experts_implementation": training_arguments.CUDA,
        "*linearized_experts": training_arguments.CUDA,
        "*_attn_impl": training_arguments.CUDA,
        "flex_attn_*": training_arguments.CUDA,
        "use_*_kernels": training_arguments.CUDA,
        "gptq*": "a base that is quantised for CUDA: take its 16-bit weights and model.quantize",
        "model_quantization_config*": "a base that is quantised for CUDA: take its 16-bit weights",
        "peft.loftq*": "LoftQ has no counterpart",
        "model_config.*": "change it in config.json of the model",
        "pretraining_dataset*": COLUMNS,
        "streaming*": training_arguments.LOADER,
        "min_sample_len": "short rows are not left out",
        "max_packed_sequence_len": "batch.length is used for packing too",
        "cosine_constant_lr_ratio": SCHEDULE,
        "eta_min": SCHEDULE,
        "lr_quadratic_warmup": SCHEDULE,
        "jagged_restart_*": SCHEDULE,
        "lisa_*": "LISA has no counterpart",
        "diffusion.*": "diffusion language models are not trained",
        "llmcompressor.*": "sparse training has no counterpart",
        "*eaft*": "a loss weighted by the token's own probability has no counterpart",
        "hf_use_auth_token": "the environment variable HF_TOKEN",
        "use_otel_metrics": training_arguments.TRACKERS,
        "otel_*": training_arguments.TRACKERS,
        "added_tokens_overrides*": training_arguments.TOKENIZER,
        "eot_tokens": training_arguments.TEMPLATE,
        "default_system_message": "write it into the rows",
        "is_*_derived_model": "config.json of the model decides",
        "dataset_*": training_arguments.LOADER,
        "skip_prepare_dataset": training_arguments.LOADER,
        "shuffle_*": "rows are always shuffled, another way in every epoch",
        "datasets*.path": HUB_DATA,
        "datasets*.split": HUB_DATA,
        "datasets*.name": HUB_DATA,
        "datasets*.ds_type": "the layout of a file is found by its content",
        "datasets*.roles_to_train*": "template.learn: all, last, or the answers that rows mark",
        "datasets*.train_on_eos": "the end of an answer is always learned",
        "datasets*.chat_template": training_arguments.TEMPLATE,
        "datasets*": COLUMNS,
        "test_datasets*": COLUMNS,
        "saves_per_epoch": training_arguments.PER_EPOCH,
        "evals_per_epoch": training_arguments.PER_EPOCH,
        "eval_sample_packing": "batch.pack is for held-out rows too",
        "pad_to_sequence_len": "padding changes nothing that is learned",
        "sample_packing_*": "batch.pack has no options",
        "lora_*_kernel": training_arguments.CUDA,
        "lora_fan_in_fan_out": "tunesmith knows which layers store their weights transposed",
        "lora_on_cpu": training_arguments.MEMORY,
        "loraplus_*": training_arguments.REASONS["loraplus_*"],
        "peft_*": "an option of PEFT without a counterpart, or adapter is empty",
        "relora*": "ReLoRA restarts have no counterpart",
        "plugins": "plugins of axolotl; what they switch on is listed by itself",
        "use_kernels": training_arguments.CUDA,
        "*scattermoe*": training_arguments.CUDA,
        "*sonicmoe*": training_arguments.CUDA,
        "*_kernel": training_arguments.CUDA,
        "cut_cross_entropy": training_arguments.CUDA,
        "loss_watchdog_*": "a run stops after three updates in a row that are not finite",
        "strict": "an unknown key is always refused",
        "debug": "tunesmith --debug",
        "unfrozen_parameters": "parameters by pattern: adapter.targets of adapter.kind=full names modules",
        "qat*": "training for quantisation has no counterpart",
        "trl.*": "options of reinforcement learning have no counterpart",
        "*quantize_moe_experts": "model.quantize quantises the experts too",
        "experimental_skip_move_to_device": training_arguments.MEMORY,
        "process*": training_arguments.VISION,
        "batch_size": "gradient_accumulation_steps and micro_batch_size are used",
        **training_arguments.REASONS,
    }

    def translate(self, keys: Keys) -> None:
        kind = _objective(keys)
        if keys.has("base_model"):
            keys.carry("model.path", keys.text("base_model", default=""))
        keys.carry("model.revision", keys.text("revision_of_model", default=""))
        keys.carry("model.trust_remote_code", keys.flag("trust_remote_code", default=False))
        four, eight = (keys.flag(f"load_in_{bits}bit", default=False) for bits in (4, 8))
        training_arguments.quantised(keys, four, eight)
        training_arguments.precision(keys)
        _data(keys, kind)
        _adapter(keys, kind)
        _batch(keys)
        training_arguments.epochs(keys, 1.0, "num_epochs")
        rate = keys.number("learning_rate", default=5e-5)
        training_arguments.schedule(keys, rate, keys.text("lr_scheduler", default="cosine"))
        if not (keys.has("warmup_steps") or keys.has("warmup_ratio")):
            keys.set("optimizer.warmup_share", 0.03, note="axolotl's default, which it ends at 100 updates.")
        training_arguments.optimizer(keys, keys.text("optimizer", default="adamw_torch_fused"))
        training_arguments.intervals(keys)
        training_arguments.early_stop(keys, keys.integer("early_stopping_patience", default=1))
        keys.carry("loop.seed", keys.integer("seed", default=42))
        recompute = keys.text("gradient_checkpointing", default="false")
        if recompute.given:
            keys.set("loop.checkpoint_gradients", recompute.value != "false", recompute)
        keys.carry("loop.tensorboard", keys.flag("use_tensorboard", default=False))


def _objective(keys: Keys) -> str:
    """Sets the objective and its options, and returns its kind."""
    learning = keys.text("rl", default="sft")
    for key in ("reward_model", "process_reward_model"):
        if keys.flag(key, default=False).value:
            raise ConfigError("tunesmith trains no reward models", where=keys.leaves[key].where)
    if learning.given and learning.value not in OBJECTIVES:
        hint = f"these have one: {', '.join(OBJECTIVES)}, and supervised fine-tuning without rl"
        raise ConfigError(f"{learning.value} has no counterpart", where=learning.where, hint=hint)
    if not learning.given:
        keys.set("objective.kind", "sft", note="Without rl axolotl fine-tunes on the answers.")
        return "sft"
    kind = "dpo" if learning.value == "ipo" else learning.value
    keys.set("objective.kind", kind, learning)
    if learning.value == "ipo":
        keys.set("objective.loss", "ipo", learning)
    names = ("rl_beta", "dpo_beta", "orpo_alpha") if kind == "orpo" else ("rl_beta", "dpo_beta", "trl.beta")
    keys.set("objective.beta", (beta := keys.number(*names, default=0.1)).value, beta)
    if kind == "kto":
        for side in ("desirable", "undesirable"):
            weight = keys.number(f"kto_{side}_weight", default=1.0)
            note = "null: from the class counts."
            keys.set(f"objective.{side}_weight", weight.value or 1.0, weight, note=note)
    if kind == "simpo":
        keys.set("objective.gamma", (gamma := keys.number("simpo_gamma", default=0.5)).value, gamma)
        keys.leave("SimPO has no term of likelihood here", keys.number("cpo_alpha", default=1.0))
    smoothing = keys.number("dpo_label_smoothing", default=0.0)
    keys.leave(
        "objective.loss=robust corrects for flipped labels; conservative smoothing has none", smoothing
    )
    return kind


def _data(keys: Keys, kind: str) -> None:
    """Files, layout, the held-out share and which tokens are learned."""
    items = keys.items("datasets") or keys.items("pretraining_dataset")
    paths, olds = [], []
    for item in items:
        files = keys.texts(f"{item}.data_files", default=[])
        path = keys.text(f"{item}.path", default="")
        paths += files.value if files.given else [path.value] * path.given
        olds += [files] if files.given else [path] * path.given
        if files.given:
            keys.leave("data_files names the files", path)
    if paths:
        training_arguments.data(keys, [str(path) for path in paths], *olds)
    _layout(keys, items, kind)
    tests = [keys.text(f"{item}.path", default="") for item in keys.items("test_datasets")]
    share = keys.number("val_set_size", default=0.0)
    if any(test.given for test in tests):
        given = [test for test in tests if test.given]
        keys.set("data.valid", [test.value for test in given], *given)
        keys.leave("test_datasets are held out", share)
    else:
        training_arguments.held_out(keys, share)
    prompts = keys.flag("train_on_inputs", default=False)
    if kind == "sft" and prompts.value:
        keys.set("template.prompt_weight", 1.0, prompts)
    elif prompts.given and not prompts.value:
        keys.set("template.prompt_weight", 0.0, prompts)
    keys.leave(
        "prompts are never learned by objectives that compare", *[prompts] * prompts.value * (kind != "sft")
    )


def _layout(keys: Keys, items: list[str], kind: str) -> None:
    """``data.format`` if all datasets have the same layout; otherwise it is found row by row."""
    layouts, olds = set(), []
    for item in items:
        form = keys.text(f"{item}.type", default="")
        field = keys.text(f"{item}.field_messages", default="messages")
        if form.value == "chat_template" and kind == "sft":
            layouts.add(CHAT.get(field.value, ""))
            olds += [form] + [field] * (field.given and field.value in CHAT)
        else:
            layouts.add(LAYOUTS.get(form.value, "") if kind == "sft" else "")
            olds += [form] * form.given
    chosen = layouts.pop() if len(layouts) == 1 else ""
    if chosen:
        keys.set("data.format", chosen, *olds)
    elif olds:
        note = "The layout of each row is found by its keys, and the model's own template renders it."
        keys.set("data.format", "auto", *olds, note=note)
    if chosen == "alpaca":
        note = (
            "axolotl writes ### Instruction: texts without the chat template, below an introduction that is "
        )
        note += "not written here; chat: the model's own template."
        keys.set("data.instruction_layout", "instruct", *olds, note=note)


def _adapter(keys: Keys, kind: str) -> None:
    adapter = keys.text("adapter", default="")
    if not adapter.given:
        keys.set("adapter.kind", "full", note="Without adapter axolotl trains the weights themselves.")
        lora = [
            old for name, old in keys.leaves.items() if name.startswith("lora_") and old.value is not None
        ]
        keys.leave("adapter is empty: nothing is adapted", *lora)
        return
    if adapter.value not in ("lora", "qlora"):
        hint = "lora, qlora, or nothing for full weights"
        raise ConfigError(f"{adapter.value} has no counterpart", where=adapter.where, hint=hint)
    dora = keys.flag("peft_use_dora", default=False)
    keys.set("adapter.kind", "dora" if dora.value else "lora", adapter, *[dora] * dora.given)
    rank, alpha = keys.integer("lora_r", default=8), keys.number("lora_alpha", default=16.0)
    keys.set("adapter.rank", rank.value, rank)
    keys.set("adapter.alpha", alpha.value, alpha)
    training_arguments.dropout(keys, keys.number("lora_dropout", default=0.0), compares=kind != "sft")
    keys.carry("adapter.rank_stabilised", keys.flag("peft_use_rslora", default=False))
    linear = keys.flag("lora_target_linear", default=False)
    training_arguments.targets(keys, keys.texts("lora_target_modules", default=["auto"]), linear)
    training_arguments.full_modules(keys, keys.texts("lora_modules_to_save", default=[]))
    start = keys.text("lora_model_dir", default="")
    keys.carry(
        "adapter.start", start, note="A folder that PEFT saved; rank, scale and targets must be the same."
    )


def _batch(keys: Keys) -> None:
    length = keys.integer("sequence_len", default=512)
    pack = keys.flag("sample_packing", default=False)
    micro = keys.integer("micro_batch_size", default=1)
    accumulation = keys.integer("gradient_accumulation_steps", default=1)
    training_arguments.batch(keys, micro, accumulation, pack=pack.value, length=length.value)
    keys.carry("batch.pack", pack)
    keys.set("batch.length", length.value, length)
    too_long = {"drop": "drop", "truncate": "cut", "raise": "refuse"}
    strategy = keys.choice("excess_length_strategy", default="drop", among=too_long)
    note = "The oldest turns are cut, not the end." if strategy.value == "truncate" else ""
    keys.set("template.too_long", too_long[strategy.value], strategy, note=note)
