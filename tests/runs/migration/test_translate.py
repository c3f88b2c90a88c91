"""Files of other programs become ours: every mapped value with the same effect, every other key named.

The files have the keys of public ones and values of their own; each names its model in its first line."""

from __future__ import annotations

import inspect
import json
from pathlib import Path
from typing import Any

import mlx.optimizers
import pytest
import yaml
from mlx_lm.lora import CONFIG_DEFAULTS
from mlx_lm.tuner.utils import build_schedule
from typer.testing import CliRunner

import tiny
import tunesmith
from tunesmith.cli import app
from tunesmith.errors import ConfigError
from tunesmith.runs.migration import Translation, translate
from tunesmith.runs.migration.dialect import dialects
from tunesmith.runs.migration.keys import UNKNOWN

FILES = Path(__file__).parent / "files"
EXPECTED: dict[str, tuple[str, dict[str, Any]]] = {
    "mlx-lm-example.yaml": (
        "mlx-lm",
        {
            "model.path": "small-llama",
            "data.train": ("support-tickets",),
            "template.prompt_weight": 1.0,
            "template.too_long": "cut",
            "objective.kind": "sft",
            "adapter.kind": "lora",
            "adapter.rank": 12,
            "adapter.alpha": 120.0,
            "adapter.scale": 10.0,
            "adapter.dropout": 0.1,
            "adapter.layers": 2,
            "adapter.targets": ("self_attn.q_proj", "self_attn.o_proj"),
            "batch.sequences": 6,
            "batch.micro": 6,
            "batch.length": 1536,
            "optimizer.kind": "adamw",
            "optimizer.weight_decay": 0.01,
            "optimizer.learning_rate": 3e-5,
            "optimizer.schedule": "constant",
            "optimizer.max_norm": None,
            "loop.steps": 240,
            "loop.validate_every": 60,
            "loop.save_every": 80,
            "loop.seed": 3,
        },
    ),
    "mlx-lm-schedule.yaml": (
        "mlx-lm",
        {
            "adapter.kind": "dora",
            "adapter.scale": 20.0,
            "adapter.layers": 8,
            "template.learn": "last",
            "template.prompt_weight": 0.0,
            "optimizer.learning_rate": 4e-5,
            "optimizer.schedule": "cosine",
            "optimizer.warmup_steps": 20,
            "optimizer.final_share": 0.05,
            "loop.steps": 500,
            "loop.checkpoint_gradients": True,
        },
    ),
    "mlx-lm-accumulated.yaml": (
        "mlx-lm",
        {
            "adapter.scale": 2.0,
            "adapter.layers": None,
            "adapter.targets": ("all-linear",),
            "batch.sequences": 8,
            "batch.micro": 1,
            "loop.steps": 150,
            "loop.validate_every": 25,
            "loop.save_every": 50,
        },
    ),
    "axolotl-qlora.yml": (
        "axolotl",
        {
            "model.quantize": 4,
            "model.dtype": "auto",
            "data.train": ("rows/instructions.jsonl",),
            "data.valid": 0.04,
            "data.format": "alpaca",
            "data.instruction_layout": "instruct",
            "template.prompt_weight": 0.0,
            "template.too_long": "drop",
            "adapter.kind": "lora",
            "adapter.rank": 24,
            "adapter.alpha": 48.0,
            "adapter.targets": ("q_proj", "v_proj", "o_proj"),
            "batch.sequences": 8,
            "batch.micro": None,
            "batch.tokens": 4096,
            "batch.pack": True,
            "optimizer.kind": "adamw",
            "optimizer.warmup_share": 0.05,
            "optimizer.weight_decay": 0.01,
            "optimizer.max_norm": 1.0,
            "loop.epochs": 2.0,
        },
    ),
    "axolotl-kto.yml": (
        "axolotl",
        {
            "objective.kind": "kto",
            "objective.beta": 0.2,
            "objective.desirable_weight": 0.8,
            "objective.undesirable_weight": 1.0,
            "data.valid": 0.0,
            "data.format": "auto",
            "adapter.dropout": 0.0,  # TRL's KTO trainer switches it off
            "adapter.targets": ("all-linear",),
            "batch.sequences": 16,
            "batch.micro": 2,
            "optimizer.learning_rate": 2e-5,
            "optimizer.schedule": "linear",
            "optimizer.warmup_steps": 30,
        },
    ),
    "axolotl-full.yml": (
        "axolotl",
        {
            "model.dtype": "bfloat16",
            "data.train": ("rows/chats.jsonl", "rows/more.jsonl"),
            "data.valid": 0.2,  # 500 rows have no counterpart
            "data.format": "sharegpt",
            "template.prompt_weight": 1.0,
            "template.too_long": "cut",
            "adapter.kind": "full",
            "batch.sequences": 4,
            "batch.pack": False,
            "optimizer.kind": "adafactor",
            "optimizer.schedule": "cosine",
            "optimizer.warmup_share": 0.03,
            "optimizer.max_norm": 0.5,
            "loop.steps": 900,
            "loop.validate_every": 150,
            "loop.save_every": 300,
            "loop.keep_last": 2,
            "loop.early_stop": 3,
            "loop.checkpoint_gradients": True,
            "loop.seed": 7,
        },
    ),
    "llama-factory-sft.yaml": (
        "llama-factory",
        {
            "model.trust_remote_code": True,
            "model.dtype": "bfloat16",
            "data.train": ("data/greetings.json", "data/orders.json"),
            "data.valid": 0.1,
            "adapter.rank": 12,
            "adapter.alpha": 24.0,  # twice the rank
            "adapter.targets": ("all-linear",),
            "batch.sequences": 8,
            "batch.length": 1024,
            "optimizer.schedule": "cosine",
            "optimizer.warmup_share": 0.05,
            "loop.validate_every": 125,
            "loop.save_every": 250,
            "loop.checkpoint_gradients": True,
        },
    ),
    "llama-factory-dpo.yaml": (
        "llama-factory",
        {
            "objective.kind": "dpo",
            "objective.loss": "sigmoid",
            "objective.beta": 0.3,
            "adapter.kind": "dora",
            "adapter.alpha": 32.0,
            "adapter.dropout": 0.0,
            "adapter.targets": ("q_proj", "v_proj"),
            "batch.sequences": 16,
            "data.valid": 0.0,
            "loop.epochs": 3.0,
        },
    ),
    "llama-factory-qlora-kto.yaml": (
        "llama-factory",
        {
            "model.quantize": 4,
            "model.dtype": "float16",
            "objective.kind": "kto",
            "objective.beta": 0.15,
            "objective.desirable_weight": 1.0,
            "objective.undesirable_weight": 1.3,
            "data.train": ("my_data/judged.json",),
            "data.valid": ("my_data/judged_held_out.json",),
            "optimizer.schedule": "constant",
            "optimizer.warmup_steps": 20,
            "optimizer.max_norm": None,
            "loop.steps": 400,
        },
    ),
    "trl-sft.yaml": (
        "trl",
        {
            "model.revision": "v2",
            "model.dtype": "bfloat16",
            "model.quantize": 4,
            "data.train": ("owner/chats",),
            "data.valid": 0.05,
            "template.prompt_weight": 1.0,
            "objective.kind": "sft",
            "adapter.scale": 0.5,
            "batch.sequences": 16,
            "batch.micro": 2,
            "batch.length": 1024,
            "loop.epochs": 2.0,
            "loop.save_every": 50,
            "loop.keep_last": 2,
        },
    ),
    "dpo/trl-config.yaml": (
        "trl",
        {
            "data.train": ("owner/pairs", "owner/more-pairs"),
            "data.valid": 0.0,
            "objective.kind": "dpo",
            "objective.loss": "apo_zero",
            "objective.beta": 0.07,
            "adapter.kind": "full",
            "batch.sequences": 8,
            "optimizer.schedule": "cosine",
            "optimizer.final_share": 0.2,
            "optimizer.max_norm": 0.3,
            "loop.validate_every": 0,
        },
    ),
    "trl-cli.yaml": (
        "trl",
        {
            "data.train": ("rows/reviews.jsonl",),
            "template.prompt_weight": 0.0,
            "adapter.kind": "dora",
            "adapter.rank": 16,
            "adapter.alpha": 32.0,
            "adapter.dropout": 0.05,
            "adapter.targets": ("auto",),
            "adapter.full_modules": ("input_layernorm",),
            "batch.sequences": 8,
            "batch.tokens": 4096,
            "batch.pack": True,
            "optimizer.schedule": "linear",
            "optimizer.warmup_share": 0.05,
            "loop.epochs": 3.0,
        },
    ),
    "toolset-training-kto.yaml": (
        "toolset-training",
        {
            "model.path": "mistralai/Mistral-7B-Instruct-v0.3",
            "model.dtype": "float16",
            "data.train": ("judged.jsonl",),
            "data.valid": 0.1,
            "objective.kind": "kto",
            "objective.beta": 0.2,
            "objective.desirable_weight": 1.0,
            "objective.undesirable_weight": 2.5,
            "adapter.rank": 12,
            "adapter.alpha": 24.0,
            "adapter.targets": ("q_proj", "v_proj"),
            "batch.sequences": 12,
            "batch.micro": 4,
            "batch.length": 768,
            "optimizer.warmup_steps": 7,
            "optimizer.weight_decay": 0.02,
            "optimizer.max_norm": 0.8,
            "loop.steps": 60,
            "loop.validate_every": 15,
            "loop.save_every": 30,
            "loop.keep_last": 2,
            "loop.seed": 13,
            "loop.prompts": ("Which notes mention the harbour?",),
            "loop.sample_tokens": 60,
        },
    ),
    "toolset-training-sft.yaml": (
        "toolset-training",
        {
            "objective.kind": "sft",
            "objective.undesirable": "learn",
            "template.prompt_weight": 1.0,
            "adapter.targets": ("q_proj", "k_proj", "v_proj"),
            "adapter.rank": 48,
            "loop.steps": None,
            "loop.epochs": 3.0,
        },
    ),
    "toolset-training-short.yaml": (
        "toolset-training",
        {"data.valid": 0.25, "loop.steps": 5, "batch.sequences": 6, "adapter.kind": "lora"},
    ),
}
EXAMPLES = {
    "mlx-lm": "mlx-lm-example.yaml",
    "axolotl": "axolotl-qlora.yml",
    "llama-factory": "llama-factory-dpo.yaml",
    "trl": "trl-cli.yaml",
    "toolset-training": "toolset-training-kto.yaml",
}


def run(*words: object, code: int = 0):
    result = CliRunner().invoke(app, list(map(str, words)), catch_exceptions=False)
    assert result.exit_code == code, result.output
    return result


def leaves(value: Any, key: str = "") -> dict[str, Any]:
    """Key path → value of a file, by another way than the reader's."""
    if isinstance(value, dict) and value:
        paths = [leaves(item, f"{key}.{name}" if key else name) for name, item in value.items()]
        return {path: item for part in paths for path, item in part.items()}
    if isinstance(value, list) and any(isinstance(item, dict) for item in value):
        parts = [leaves(item, f"{key}[{index}]") for index, item in enumerate(value)]
        return {path: item for part in parts for path, item in part.items()}
    return {key: value}


@pytest.fixture
def file(tmp_path):
    """Writes a file of settings."""

    def write(text: str, name: str = "old.yml") -> Path:
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text, encoding="utf-8")
        return path

    return write


def resolved(translation: Translation, folder: Path) -> Any:
    """The settings that `train --config` reads from the translation."""
    path = folder / "run.yaml"
    path.write_text(translation.yaml, encoding="utf-8")
    return tunesmith.configure(config=[path]).spec


def value_of(spec: Any, key: str) -> Any:
    for part in key.split("."):
        spec = getattr(spec, part)
    return spec


def test_there_are_three_files_of_each_program():
    names = [program for program, _ in EXPECTED.values()]
    assert sorted(names) == sorted(3 * list(dialects())) and len(dialects()) == 5
    assert {path.relative_to(FILES).as_posix() for path in FILES.rglob("*.y*ml")} == set(EXPECTED)


@pytest.mark.parametrize("name", EXPECTED)
def test_a_file_is_recognised_and_each_mapped_value_has_the_same_effect(name, tmp_path):
    program, expected = EXPECTED[name]
    translation = translate(FILES / name)
    spec = resolved(translation, tmp_path)
    assert translation.program == program
    assert {key: value_of(spec, key) for key in expected} == expected
    for setting in translation.settings:  # what is written is what is read
        value = setting.value
        assert value_of(spec, setting.key) == (tuple(value) if isinstance(value, list) else value)


@pytest.mark.parametrize("name", EXPECTED)
def test_every_key_is_used_left_out_with_a_reason_or_empty(name):
    translation = translate(FILES / name)
    old = leaves(yaml.safe_load((FILES / name).read_text()))
    left_out = [entry.key for entry in translation.left_out]
    assert sorted([*translation.used, *left_out, *translation.empty]) == sorted(old)
    assert set(translation.empty) == {key for key, value in old.items() if value is None}
    assert [entry.key for entry in translation.left_out if entry.reason == UNKNOWN] == []
    lines = (FILES / name).read_text().splitlines()
    for entry in translation.left_out:
        if entry.key.isidentifier():
            assert lines[int(entry.origin.rpartition(":")[2]) - 1].startswith(entry.key)


@pytest.mark.parametrize("name", EXPECTED)
def test_the_old_name_stands_beside_each_setting(name):
    translation = translate(FILES / name)
    beside, section = {}, ""
    for line in translation.yaml.splitlines():
        if line.startswith("  ") and not line.startswith("  #"):
            beside[f"{section}.{line.split(':')[0].strip()}"] = line.partition("  # ")[2]
        elif not line.startswith((" ", "#")):
            section = line.rstrip(":")
    assert beside.keys() == {setting.key for setting in translation.settings}
    for setting in translation.settings:
        assert all(f"{old.key}: " in beside[setting.key] for old in setting.sources)


@pytest.mark.parametrize("program", EXAMPLES)
def test_train_reads_the_translation(program, tiny_model, tmp_path):
    """With a model and rows of this machine; the files name others."""
    pairs = [
        {"prompt": f"Name {n}.", "chosen": f"It is {n}, said slowly.", "rejected": f"No {n}."}
        for n in range(12)
    ]
    judged = [
        {"messages": [{"role": "user", "content": f"Name {n}."}, {"role": "assistant", "content": f"{n}!"}]}
        | {"label": n % 3 > 0}
        for n in range(24)
    ]
    alpaca = [{"instruction": f"Say {n}.", "input": "", "output": f"So: {n}."} for n in range(24)]
    rows = {"llama-factory": pairs, "toolset-training": judged, "axolotl": alpaca}
    data = tiny.write_rows(tmp_path / "rows.jsonl", rows.get(program, tiny.conversations(24)))
    options = ["--model", tiny_model, "--data", data]
    done = run("init", "--from", FILES / EXAMPLES[program], *options)
    assert f"  # --model: {tiny_model}\n" in done.stdout  # given, not a default
    (tmp_path / "run.yaml").write_text(done.stdout)
    quick = ["--set", "model.quantize=null", "--set", "audit.before_training=false", "--dry-run", "--json"]
    plan = json.loads(run("train", "--config", tmp_path / "run.yaml", *quick).stdout)
    assert plan["steps"] >= 1


def test_every_key_of_mlx_lm_is_known_and_its_silent_defaults_are_its_explicit_ones(file, tmp_path):
    known = {"model": "m", "data": "d", "train": True}
    explicit = CONFIG_DEFAULTS | known
    silent = translate(file(yaml.safe_dump(known)), program="mlx-lm")
    spoken = translate(file(yaml.safe_dump(explicit)), program="mlx-lm")
    assert [entry.key for entry in spoken.left_out if entry.reason == UNKNOWN] == []
    assert resolved(silent, tmp_path).model_dump(exclude={"loop"}) == resolved(spoken, tmp_path).model_dump(
        exclude={"loop"}
    )
    assert resolved(silent, tmp_path).loop.steps == CONFIG_DEFAULTS["iters"]
    decay = inspect.signature(mlx.optimizers.AdamW).parameters["weight_decay"].default
    adamw = translate(file("model: m\ndata: d\noptimizer: adamw\niters: 5\n"))
    assert resolved(adamw, tmp_path).optimizer.weight_decay == decay


def test_the_settings_beside_an_adapter_of_mlx_lm_are_read(file, tmp_path):
    old = CONFIG_DEFAULTS | {"model": "m", "data": "d", "train": True, "adapter_file": None, "iters": 70}
    translation = translate(file(json.dumps(old), "adapter_config.json"))
    assert translation.program == "mlx-lm" and resolved(translation, tmp_path).loop.steps == 70


def test_the_schedule_of_mlx_lm_gives_the_rates_of_mlx_lm(tmp_path):
    old = yaml.safe_load((FILES / "mlx-lm-schedule.yaml").read_text())["lr_schedule"]
    rates = build_schedule(old)
    spec = resolved(translate(FILES / "mlx-lm-schedule.yaml"), tmp_path).optimizer
    for step in (21, 100, 250, 400, 499):  # the joint of mlx-lm's warm-up is one update later
        assert spec.rate(step, 500) == pytest.approx(float(rates(mlx.core.array(step + 1))), rel=2e-3)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("warmup_ratio: 0.2", {"warmup_share": 0.2, "warmup_steps": None}),
        ("warmup_steps: 12", {"warmup_share": None, "warmup_steps": 12}),
        ("warmup_steps: 12\nwarmup_ratio: 0.2", {"warmup_share": None, "warmup_steps": 12}),
        ("warmup_steps: 0.1", {"warmup_share": 0.1, "warmup_steps": None}),
        ("lr_scheduler_type: constant\nwarmup_steps: 5", {"schedule": "constant", "warmup_steps": None}),
        ("max_grad_norm: 0", {"max_norm": None}),
        ("optim: lion_32bit\nadam_beta1: 0.8", {"kind": "lion", "betas": None}),
        ("adam_beta2: 0.95", {"betas": (0.9, 0.95)}),
        ("optim: paged_adamw_8bit", {"kind": "adamw"}),
        ("optim: galore_adamw", {"kind": "adamw"}),
        ("learning_rate: '5e-5'", {"learning_rate": 5e-5}),
    ],
)
def test_training_arguments(text, expected, file, tmp_path):
    path = file(f"model_name_or_path: m\nstage: sft\ndataset: d\n{text}\n")
    spec = resolved(translate(path), tmp_path).optimizer
    assert {key: getattr(spec, key) for key in expected} == expected


@pytest.mark.parametrize(
    ("path", "text", "kind"),
    [
        ("sft/config.yaml", "", "sft"),
        ("orpo/config.yaml", "beta: 0.1", "orpo"),
        ("dpo/config.yaml", "", "dpo"),
        ("old.yaml", "beta: 0.1", "dpo"),
        ("old.yaml", "undesirable_weight: 1.5", "kto"),
        ("old.yaml", "loss_type: apo_zero_unpaired", "apo_zero_unpaired"),
        ("old.yaml", "loss_type: [simpo]", "simpo"),
    ],
)
def test_the_trainer_of_trl_is_told_by_keys_and_path(path, text, kind, file, tmp_path):
    translation = translate(file(f"model_name_or_path: m\ndataset_name: d\n{text}\n", path))
    assert resolved(translation, tmp_path).objective.kind == kind
    assert "Correct it" in next(entry.note for entry in translation.settings if entry.key == "objective.kind")


@pytest.mark.parametrize(
    ("text", "dropout"), [("", 0.05), ("beta: 0.1", 0.0), ("beta: 0.1\ndisable_dropout: false", 0.05)]
)
def test_dropout_is_off_where_trl_switches_it_off(text, dropout, file, tmp_path):
    path = file(f"model_name_or_path: m\ndataset_name: d\nuse_peft: true\nlora_dropout: 0.05\n{text}\n")
    assert resolved(translate(path), tmp_path).adapter.dropout == dropout


@pytest.mark.parametrize(
    ("text", "patience"),
    [("val_size: 0.1", 4), ("val_size: 0.1\neval_strategy: 'no'", None), ("val_size: 0", None)],
)
def test_early_stop_needs_validations(text, patience, file, tmp_path):
    path = file(f"model_name_or_path: m\nstage: sft\ndataset: d\nearly_stopping_steps: 4\n{text}\n")
    translation = translate(path)
    assert resolved(translation, tmp_path).loop.early_stop == patience
    left_out = {entry.key for entry in translation.left_out}
    assert ("early_stopping_steps" in left_out) == (patience is None)


def test_names_of_llama_factory_are_looked_up(file, tmp_path):
    (tmp_path / "sets").mkdir()
    known = {
        "orders": {"file_name": "orders_2024.jsonl", "formatting": "sharegpt"},
        "hub": {"hf_hub_url": "a/b"},
    }
    (tmp_path / "sets" / "dataset_info.json").write_text(json.dumps(known))
    path = file("model_name_or_path: m\nstage: sft\ndataset: orders, hub\ndataset_dir: sets\n")
    setting = next(entry for entry in translate(path).settings if entry.key == "data.train")
    assert setting.value == [f"{tmp_path}/sets/orders_2024.jsonl", f"{tmp_path}/sets/hub.json"]
    assert "hub" in setting.note and "orders" not in setting.note


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "old.yml: holds no settings"),
        ("- a\n", "old.yml:1: must be a mapping of keys, not list"),
        ("a: [1\n", "not readable as YAML"),
        ("lr: 1\n", "old.yml: is not a file of settings that is recognised (it begins with lr)"),
        ("model: {path: m}\ndata: {train: d}\n", "old.yml: these are settings of tunesmith already"),
        ("base_model: m\niters: 3\n", "old.yml: may be a file of axolotl or mlx-lm"),
        ("base_model: m\nsequence_len: long\n", 'old.yml:2: sequence_len: must be an integer, not "long"'),
        ("base_model: m\nsequence_len: 1.5\n", "old.yml:2: sequence_len: must be an integer, not 1.5"),
        ("base_model: m\nsample_packing: 3\n", "old.yml:2: sample_packing: must be true or false, not 3"),
        (
            "base_model: m\nlora_r: 0\nadapter: lora\n",
            "old.yml:2 (lora_r): adapter.rank: must be an integer ≥ 1",
        ),
        ("base_model: m\nrl: grpo\n", "old.yml:2: rl: grpo has no counterpart"),
        (
            "base_model: m\nreward_model: true\nadapter: lora\n",
            "old.yml:2: reward_model: tunesmith trains no",
        ),
        ("base_model: m\nadapter: ia3\n", "old.yml:2: adapter: ia3 has no counterpart"),
        ("base_model: m\nmicro_batch_size: 0\n", "old.yml:2: micro_batch_size: must be at least 1, not 0"),
        ("model_name_or_path: m\nstage: rm\n", "old.yml:2: stage: rm has no counterpart"),
        ("model_name_or_path: m\nstage: dpo\npref_loss: kto_pair\n", "old.yml:3: pref_loss: kto_pair has no"),
        (
            "model_name_or_path: m\nuse_peft: true\nnum_generations: 8\n",
            "old.yml:3: num_generations: training on",
        ),
        ("model: m\nfine_tune_type: ia3\n", "old.yml:2: fine_tune_type: must be one of lora, dora, full"),
        ("model: m\niters: 3\nlr_schedule: {arguments: [a]}\n", "must be a list of numbers"),
    ],
)
def test_bad_files_are_refused_with_place_and_hint(text, message, file):
    with pytest.raises(ConfigError) as refused:
        translate(file(text))
    assert message in str(refused.value) and "old.yml" in str(refused.value)


def test_a_file_that_is_not_there_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"nowhere\.yml: cannot be read: No such file"):
        translate(tmp_path / "nowhere.yml")


def test_model_and_data_of_the_command_line_replace_those_of_the_file(tmp_path):
    source = FILES / "axolotl-kto.yml"
    translation = translate(source, model="mine", data=["a.jsonl", "b.jsonl"])
    spec = resolved(translation, tmp_path)
    assert (spec.model.path, spec.data.train) == ("mine", ("a.jsonl", "b.jsonl"))
    left_out = {entry.key for entry in translation.left_out}
    assert {"base_model", "datasets[0].path"} <= left_out


def test_what_the_file_does_not_say_is_missing_and_named(file, tmp_path):
    path = file("model_name_or_path: m\nlearning_rate: 1e-4\nuse_peft: true\n")
    done = run("init", "--from", path)
    assert "data.train is missing: give --data FILE" in done.stderr
    assert "# train:  # not in" in done.stdout
    (tmp_path / "run.yaml").write_text(done.stdout)
    spec = tunesmith.configure(config=[tmp_path / "run.yaml"], data=["d.jsonl"]).spec
    assert spec.optimizer.learning_rate == 1e-4


def test_json_for_machines_counts_every_key():
    done = json.loads(run("init", "--from", FILES / "trl-sft.yaml", "--json").stdout)
    assert done["program"] == "trl" and done["settings"]["adapter.rank"]["value"] == 24
    assert done["settings"]["adapter.rank"]["from"][0]["key"] == "lora_r"
    assert done["settings"]["adapter.rank"]["from"][0]["where"].endswith("trl-sft.yaml:11")
    counts = done["counts"]
    assert (
        counts["keys"]
        == counts["used"] + counts["left_out"] + counts["empty"]
        == len(leaves(yaml.safe_load((FILES / "trl-sft.yaml").read_text())))
    )
    assert yaml.safe_load(done["yaml"])["adapter"]["rank"] == 24


def test_the_function_and_the_verb_say_the_same():
    path = FILES / "mlx-lm-example.yaml"
    assert tunesmith.init(source=path) == run("init", "--from", path).stdout
    assert tunesmith.init(source=path, source_format="mlx-lm") == tunesmith.init(source=path)
    with pytest.raises(ConfigError, match="exclude each other"):
        tunesmith.init(source=path, preset="smollm2-demo")
    with pytest.raises(ConfigError, match="unsloth is not a program that is known"):
        tunesmith.init(source=path, source_format="unsloth")
    with pytest.raises(ConfigError, match="--from-format: needs a file"):
        tunesmith.init(source_format="trl")


def test_texts_that_a_terminal_obeys_are_written_out(file):
    path = file('base_model: m\nwandb_name: "a\\u001b[2Jb\\nc: d"\nsequence_len: 64\n')
    text = translate(path).yaml
    assert "\x1b" not in text and yaml.safe_load(text)["batch"]["length"] == 64
