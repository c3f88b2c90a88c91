"""A folder to continue the run on a cluster: its exact tokens, its adapter in PEFT's layout, and its settings
for TRL, axolotl, SkyPilot, vLLM and SGLang.

Its rows are read again and compared with those that the run learns, and its adapter with the live one."""

from __future__ import annotations

import json
import shlex
import shutil
from collections.abc import Iterable, Sequence
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, TypedDict

from tunesmith import events
from tunesmith.adapters.specs import Full
from tunesmith.errors import ExportError
from tunesmith.events import Sink
from tunesmith.exports import stored, training_rows
from tunesmith.exports.kind import ArtefactNotes, ExportKind, Reloaded, Tolerance, Tuned, refuse, register
from tunesmith.exports.kinds.peft import CONFIG, PEFTAdapter
from tunesmith.learning.optimizer import OptimizerSpec
from tunesmith.model.loading import ModelSpec
from tunesmith.runs.config import RunConfig
from tunesmith.runs.directory import Run
from tunesmith.settings import origins
from tunesmith.tokens.batches import Group

if TYPE_CHECKING:
    from tunesmith.training.preparation import Prepared

ADAPTER, TOKENIZER, SETTINGS = "adapter", "tokenizer", "settings.json"
ROWS = {"train": "rows/train.jsonl", "valid": "rows/valid.jsonl"}
PARQUET = ".parquet"
"""Ending of the same rows as a table, which is written if pyarrow is installed (the extra ``tables``)."""
IGNORED = -100
"""Label of a token that is not learned."""
OPTIMIZERS = {"adamw": "adamw_torch", "adam": "adamw_torch", "adafactor": "adafactor"}
RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
"""What vLLM takes as ``--max-lora-rank``."""
INSTEAD = "--to peft"
MICRO = 8
"""Rows on a device at once, at most, if the run does not say."""
WITHOUT_PARQUET = "the rows are JSON lines alone: pip install 'tunesmith[tables]' writes them as Parquet too"
REQUIREMENTS = ("torch", "transformers>=5.23", "trl>=1.16", "peft>=0.21", "datasets>=4", "accelerate>=1.10")


class TokenRow(TypedDict):
    """One line of a rows file, with the columns that TRL and axolotl know."""

    input_ids: list[int]
    attention_mask: list[int]
    labels: list[int]


@register
class Cluster(ExportKind):
    name: ClassVar[str] = "cluster"
    what: ClassVar[str] = "exact tokens, adapter and scripts to continue with TRL, axolotl or SkyPilot"
    stands_alone: ClassVar[bool] = False
    tolerance: ClassVar[Tolerance] = PEFTAdapter.tolerance

    def accepts(self, tuned: Tuned) -> None:
        PEFTAdapter().accepts(tuned)
        config, only_adapter = tuned.config, "--to peft writes the adapter alone"
        if (kind := config.objective.kind) != "sft":
            raise refuse(f"cluster: TRL takes rows as tokens for sft only, not for {kind}", only_adapter)
        if config.template.prompt_weight:
            what = "cluster: labels cannot hold weights of tokens (template.prompt_weight)"
            raise refuse(what, only_adapter)
        if (kind := config.optimizer.kind) not in OPTIMIZERS:
            what = f"cluster: the optimizer {kind} has no counterpart that moves weights in the same way"
            raise refuse(what, f"{only_adapter}; written are {', '.join(OPTIMIZERS)}")

    def write(self, tuned: Tuned, folder: Path, notify: Sink) -> ArtefactNotes:
        name = tuned.run.path.resolve().name
        for part in (ADAPTER, TOKENIZER, "rows"):
            (folder / part).mkdir()
        PEFTAdapter().write(tuned, folder / ADAPTER, notify)
        stored.copy_settings(tuned.loaded.path, tuned.tokenizer, folder / TOKENIZER)
        shutil.rmtree(folder / TOKENIZER / "additional_chat_templates", ignore_errors=True)
        prepared = training_rows.prepare(tuned.run, tuned.config, self.name, INSTEAD, notify)
        sides = {"train": training_rows.first_epoch(prepared), "valid": prepared.valid}
        present = {side: ROWS[side] for side, groups in sides.items() if groups}
        tables = [_write_rows(folder / path, sides[side]) for side, path in present.items()]
        settings = _settings(tuned, json.loads((folder / ADAPTER / CONFIG).read_text("utf-8")), prepared)
        settings["rows"] = present
        remarks = _remarks(tuned.config) + (() if all(tables) else (WITHOUT_PARQUET,))
        (folder / SETTINGS).write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
        (folder / "requirements.txt").write_text("".join(f"{line}\n" for line in REQUIREMENTS))
        (folder / "train.py").write_text(_text("train.py.txt"), encoding="utf-8")
        (folder / "axolotl.yaml").write_text(origins.write(_axolotl(settings)), encoding="utf-8")
        (folder / "sky.yaml").write_text(origins.write(_sky(settings, name)), encoding="utf-8")
        for server, command in _servers(settings, name).items():
            (folder / f"serve-{server}.sh").write_text(f"#!/bin/sh\n{command}\n", encoding="utf-8")
        lines = "".join(f"\n- {remark}" for remark in remarks)
        rows = _described_rows(folder, present.values())
        readme = _text("README.md.txt").format(name=name, model=settings["model"], rows=rows, remarks=lines)
        (folder / "README.md").write_text(readme, encoding="utf-8")
        return ArtefactNotes(remarks=remarks)

    def reload(self, folder: Path, source: ModelSpec, run: Run, notify: Sink) -> Reloaded:
        reloaded = PEFTAdapter().reload(folder / ADAPTER, source, run, notify)
        config = run.config.model_copy(update={"model": source})
        prepared = training_rows.prepare(run, config, self.name, INSTEAD, events.silent)
        expected = {"train": training_rows.first_epoch(prepared), "valid": prepared.valid}
        problems = [
            problem
            for side, groups in expected.items()
            for problem in differing(folder / ROWS[side], [token_row(group) for group in groups])
        ]
        return reloaded._replace(problems=(*reloaded.problems, *problems))


def _text(name: str) -> str:
    return (files("tunesmith.exports") / "cluster_files" / name).read_text("utf-8")


def token_row(group: Group) -> TokenRow:
    """Raises ExportError for a token of a weight that is neither 0 nor 1."""
    (tokens,) = group.sequences
    ids, targets = tokens.ids.tolist(), tokens.targets.tolist()
    if set(targets) - {0.0, 1.0}:
        raise ExportError("cluster: labels cannot hold weights of tokens", where=group.source)
    labels = [token if target else IGNORED for token, target in zip(ids, targets, strict=True)]
    return TokenRow(
        input_ids=ids,
        attention_mask=[1] * len(ids),
        labels=[IGNORED, *labels[1:]],  # nothing predicts the first token
    )


def _write_rows(path: Path, groups: Sequence[Group]) -> bool:
    """Write the rows as JSON lines, and beside them as a Parquet file if pyarrow is installed. Returns
    whether it is."""
    rows = [token_row(group) for group in groups]
    with path.open("w", encoding="utf-8") as file:
        for row in rows:
            file.write(json.dumps(row) + "\n")
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError:
        return False
    numbers = {"input_ids": pyarrow.int32(), "attention_mask": pyarrow.int8(), "labels": pyarrow.int32()}
    schema = pyarrow.schema([(name, pyarrow.list_(number)) for name, number in numbers.items()])
    table = pyarrow.Table.from_pylist([dict(row) for row in rows], schema)
    parquet.write_table(table, path.with_suffix(PARQUET), compression="zstd")
    return True


def _described_rows(folder: Path, paths: Iterable[str]) -> str:
    """The lines of the README on the files of rows that are in ``folder``."""
    lines = list(paths)
    tables = [path for line in lines if (folder / (path := str(Path(line).with_suffix(PARQUET)))).is_file()]
    columns = "`input_ids`, `attention_mask`, `labels` (-100: not learned)"
    row = f"| {_listed(lines)} | the exact tokens of the run, in the order of its first epoch: {columns} |"
    if not tables:
        return row
    return f"{row}\n| {_listed(tables)} | the same rows as tables, which `train.py` reads if they are there |"


def _listed(paths: Iterable[str]) -> str:
    return ", ".join(f"`{path}`" for path in paths)


def differing(path: Path, expected: Sequence[TokenRow]) -> list[str]:
    """What is wrong with the rows in ``path`` and in the Parquet file beside it, in one sentence for each."""
    if not path.is_file():
        return [f"{path.name}: {len(expected)} rows are missing"] if expected else []
    table = path.with_suffix(PARQUET)
    problems = [_difference(path.name, _rows_in_lines(path), expected)]
    if table.is_file():
        problems.append(_difference(table.name, _rows_in_table(table), expected))
    return [problem for problem in problems if problem is not None]


def _rows_in_lines(path: Path) -> Sequence[object] | None:
    """None if it cannot be read."""
    try:
        return [json.loads(line) for line in path.read_text("utf-8").splitlines()]
    except ValueError:
        return None


def _rows_in_table(path: Path) -> Sequence[object] | None:
    """None if it cannot be read."""
    from pyarrow import ArrowException, parquet

    try:
        return parquet.read_table(path).to_pylist()
    except (ArrowException, OSError):
        return None


def _difference(name: str, rows: Sequence[object] | None, expected: Sequence[TokenRow]) -> str | None:
    if rows is None:
        return f"{name}: it is not {'a Parquet file' if name.endswith(PARQUET) else 'JSON lines'}"
    if len(rows) != len(expected):
        return f"{name}: {len(rows)} rows, and the run has {len(expected)}"
    wrong = [
        number for number, (row, other) in enumerate(zip(rows, expected, strict=True), 1) if row != other
    ]
    if not wrong:
        return None
    return f"{name}:{wrong[0]}: other ids or labels than in training, in {len(wrong)} rows"


def _settings(tuned: Tuned, adapter: dict[str, Any], prepared: Prepared) -> dict[str, Any]:
    """The settings of the run in the names of TRL, PEFT and transformers. adapter: PEFT's settings of it."""
    config = tuned.config
    loop, optimizer, batch = config.loop, config.optimizer, config.batch
    lora = (
        "task_type",
        "r",
        "lora_alpha",
        "lora_dropout",
        "use_rslora",
        "use_dora",
        "target_modules",
        "bias",
    )
    betas = optimizer.betas or (0.9, 0.999)
    return {
        "model": tuned.source.path,
        "revision": tuned.source.revision,
        "lora": {key: adapter[key] for key in lora},
        "sequences": batch.sequences,
        "micro": _micro(batch.sequences, batch.micro),
        "length": max(len(group.sequences[0].ids) for group in prepared.train),
        "training": {
            "max_steps": prepared.plan.steps,
            "learning_rate": optimizer.learning_rate,
            **_schedule(optimizer),
            "warmup_steps": optimizer.warmup(prepared.plan.steps),
            "optim": OPTIMIZERS[optimizer.kind],
            "adam_beta1": betas[0],
            "adam_beta2": betas[1],
            "adam_epsilon": optimizer.eps or 1e-8,
            "weight_decay": optimizer.weight_decay or 0.0,
            "max_grad_norm": optimizer.max_norm or 0.0,
            "gradient_checkpointing": loop.checkpoint_gradients,
            **_validations(prepared, loop.validate_every),
            "save_steps": loop.save_every or prepared.plan.steps,
            "save_total_limit": loop.keep_last,
            "seed": min(loop.seed, 2**32 - 1),
        },
    }


def _validations(prepared: Prepared, every: int) -> dict[str, Any]:
    return {"eval_strategy": "steps", "eval_steps": every} if prepared.valid and every else {}


def _micro(sequences: int, micro: int | None) -> int:
    """The most rows on a device at once that divide an update."""
    most = min(micro or MICRO, sequences)
    return next(rows for rows in range(most, 0, -1) if sequences % rows == 0)


def _schedule(optimizer: OptimizerSpec) -> dict[str, Any]:
    """transformers' schedule that falls as the run's does."""
    share = optimizer.final_share
    if optimizer.schedule == "constant":
        return {"lr_scheduler_type": "constant_with_warmup"}
    if not share:
        return {"lr_scheduler_type": optimizer.schedule}
    if optimizer.schedule == "cosine":
        return {"lr_scheduler_type": "cosine_with_min_lr", "lr_scheduler_kwargs": {"min_lr_rate": share}}
    end = {"lr_end": optimizer.learning_rate * share, "power": 1.0}
    return {"lr_scheduler_type": "polynomial", "lr_scheduler_kwargs": end}


def _axolotl(settings: dict[str, Any]) -> dict[str, Any]:
    """The configuration of axolotl, which takes most names from transformers."""
    lora, training = settings["lora"], dict(settings["training"])
    rows = {side: {"path": path, "ds_type": "json", "type": None} for side, path in settings["rows"].items()}
    if "valid" in rows:
        rows["valid"]["split"] = "train"  # how the datasets library calls the rows of a file
    optimizer = {"optimizer": training.pop("optim"), "lr_scheduler": training.pop("lr_scheduler_type")}
    revision = {} if settings["revision"] is None else {"revision_of_model": settings["revision"]}
    return {
        "base_model": settings["model"],
        **revision,
        "tokenizer_config": f"./{TOKENIZER}",
        "adapter": "lora",
        "lora_model_dir": f"./{ADAPTER}",
        "lora_r": lora["r"],
        "lora_alpha": lora["lora_alpha"],
        "lora_dropout": lora["lora_dropout"],
        "lora_target_modules": lora["target_modules"],
        "peft_use_rslora": lora["use_rslora"],
        "peft_use_dora": lora["use_dora"],
        "datasets": [rows["train"]],
        **({"test_datasets": [rows["valid"]]} if "valid" in rows else {}),
        "shuffle_merged_datasets": False,
        "curriculum_sampling": True,
        "sequence_len": settings["length"],
        "sample_packing": False,
        "micro_batch_size": settings["micro"],
        "gradient_accumulation_steps": settings["sequences"] // settings["micro"],
        **optimizer,
        **training,
        "bf16": "auto",
        "output_dir": "./out",
    }


def _sky(settings: dict[str, Any], name: str) -> dict[str, Any]:
    """The task of SkyPilot. A base on this machine travels with it."""
    local = Path(settings["model"]).is_dir()
    mounts = {"file_mounts": {"/base": settings["model"]}} if local else {}
    task = "".join(letter if letter.isascii() and letter.isalnum() else "-" for letter in name.lower())
    return {
        "name": f"tunesmith-{task}"[:60].strip("-"),
        "resources": {"accelerators": "A100:1"},
        "workdir": ".",
        **mounts,
        "envs": {"MODEL": "/base" if local else settings["model"]},
        "setup": "pip install -r requirements.txt",
        "run": 'accelerate launch --num_processes "$SKYPILOT_NUM_GPUS_PER_NODE" train.py --model "$MODEL"',
    }


def _servers(settings: dict[str, Any], name: str) -> dict[str, str]:
    """The command of each server. Both offer the adapter by the run's name."""
    model, adapter, rank = (
        shlex.quote(settings["model"]),
        shlex.quote(f"{name}=./{ADAPTER}"),
        settings["lora"]["r"],
    )
    most = next((limit for limit in RANKS if limit >= rank), rank)
    return {
        "vllm": f"exec vllm serve {model} --enable-lora --max-lora-rank {most} --lora-modules {adapter}",
        "sglang": (
            f"exec python -m sglang.launch_server --model-path {model} --enable-lora --max-lora-rank {rank} "
            f"--lora-paths {adapter}"
        ),
    }


def _remarks(config: RunConfig) -> tuple[str, ...]:
    """What differs from the run, or does not work elsewhere."""
    remarks = ["use: accelerate launch train.py, in the folder of the artefact"]
    optimizer, adapter = config.optimizer, config.adapter
    if optimizer.warmup_steps or optimizer.warmup_share:
        remarks.append("transformers' warm-up begins one update later, with a learning rate of 0")
    if not isinstance(adapter, Full) and adapter.kind == "dora":
        remarks.append("vLLM and SGLang do not load DoRA")
    if not isinstance(adapter, Full) and adapter.rank > RANKS[-1]:
        remarks.append(f"vLLM loads adapters up to rank {RANKS[-1]}")
    if config.batch.pack:
        remarks.append("rows are padded instead of packed: the losses are the same")
    return tuple(remarks)
