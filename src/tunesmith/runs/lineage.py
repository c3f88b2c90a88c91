"""Where an adapter comes from: the run or the checkpoint that a setting names, and what it was trained on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tunesmith.adapters import files
from tunesmith.data.sources import sha256
from tunesmith.errors import ModelError
from tunesmith.runs import checkpoints, prompts, tags
from tunesmith.runs.config import RunConfig
from tunesmith.runs.directory import MANIFEST, Run


def anchored(config: RunConfig) -> RunConfig:
    """``config`` with absolute paths and the texts of its prompts, so that its run can be resumed from any
    folder. A run that is named as an adapter becomes its best checkpoint."""
    data: dict[str, Any] = {"train": tuple(map(_absolute, config.data.train))}
    data |= (
        {"valid": tuple(map(_absolute, config.data.valid))} if isinstance(config.data.valid, tuple) else {}
    )
    data["mix"] = tuple(
        entry.model_copy(update={"path": tuple(map(_absolute, entry.path))}) for entry in config.data.mix
    )
    model = {
        "path": _absolute(config.model.path),
        "tokenizer": config.model.tokenizer and _absolute(config.model.tokenizer),
        "adapter": _checkpoint(config.model.adapter, "model.adapter"),
    }
    start = _checkpoint(config.adapter.start, "adapter.start")
    blocks = {
        "data": config.data.model_copy(update=data),
        "model": config.model.model_copy(update=model),
        "adapter": config.adapter.model_copy(update={"start": start}),
        "loop": config.loop.model_copy(update={"prompts": prompts.resolve(config.loop.prompts)}),
    }
    return config.model_copy(update=blocks)


def _absolute(path: str) -> str:
    """``path`` as it is if no such file exists: it may be the name of a package."""
    return str(Path(path).expanduser().resolve()) if Path(path).expanduser().exists() else path


def _checkpoint(path: str | None, where: str) -> str | None:
    """The checkpoint folder that ``path`` names: itself, or the best one of a run, which may be named by a
    tag. Raises ModelError if it is neither."""
    if path is None:
        return None
    folder = tags.find(Path(path).expanduser())
    if (folder / MANIFEST).is_file():
        return str(checkpoints.choose(Run(folder), "best").resolve())
    if not files.weights_file(folder).is_file():
        hint = "give the folder of a run or a checkpoint, or of an adapter that PEFT or mlx-lm saved"
        if (folder / "adapter_model.bin").is_file():
            hint = "it has adapter_model.bin, which is not read: save it in PEFT as safetensors"
        raise ModelError("is neither a run nor a checkpoint", where=f"{where}: {path}", hint=hint)
    return str(folder.resolve())


def origin(checkpoint: str, base: str) -> dict[str, Any]:
    """The manifest's entry on the adapter in ``checkpoint``. Raises ModelError if it was not trained on
    ``base``."""
    folder = Path(checkpoint)
    weights = files.weights_file(folder)
    if not weights.is_file():
        raise ModelError(
            "the adapter to start from is missing", where=checkpoint, hint="put it back, or start a new run"
        )
    entry: dict[str, Any] = {"checkpoint": checkpoint, "sha256": sha256(weights)}
    if (program := files.layout(folder)) != "tunesmith":
        entry["saved_by"] = program
    run = Run(folder.parent.parent)
    if (run.path / MANIFEST).is_file():
        manifest, hashes = run.manifest, run.hashes
        ancestors = manifest.get("lineage", {})
        if hashes["base"] != base:
            below = ancestors.get("merged", {}).get("checkpoint", "null")
            hint = f"give the model it was made for, with model.adapter={below}"
            raise ModelError("this adapter was trained on another base", where=checkpoint, hint=hint)
        entry |= {"run": run.path.name, "objective": run.config.objective.kind, "data": hashes["data"]}
        entry |= {"lineage": ancestors} if ancestors else {}
    return entry
