"""Adapters that mlx-lm saved: adapters.safetensors and adapter_config.json without settings of tunesmith.

The tensors have the names and shapes of ours. They decide which layers are adapted: a layer
that mlx-lm adapts and that has no tensors there would be as in the base."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import BaseModel, Field

from tunesmith.adapters import files
from tunesmith.adapters.attachment import Adapter
from tunesmith.adapters.specs import DoRA, Full, LoRA
from tunesmith.errors import ModelError, listing
from tunesmith.files import checked


class LoRAParameters(BaseModel):
    rank: int = Field(ge=1)
    scale: float = Field(gt=0)
    dropout: float = Field(0.0, ge=0, lt=1)


class MLXSettings(BaseModel):
    """adapter_config.json of mlx-lm; settings of its training are not read."""

    fine_tune_type: Literal["lora", "dora", "full"] = "lora"
    lora_parameters: LoRAParameters | None = None


def read(folder: Path) -> Adapter:
    """The adapter in ``folder``. Raises ModelError if it cannot be read, or has tensors that are not those of
    its kind."""
    where = f"{folder / files.CONFIG}"
    settings = checked(files.read_settings(folder), MLXSettings, where, ModelError, None)
    tensors = files.read_tensors(folder / files.WEIGHTS)
    modules = tuple(sorted({name.rpartition(".")[0] for name in tensors}))
    if not tensors:
        raise ModelError("the adapter has no tensors", where=str(folder))
    kind, parameters = settings.fine_tune_type, settings.lora_parameters
    if kind == "full":
        return Adapter(Full.model_validate({"targets": modules}), tensors, str(folder))
    if parameters is None:
        hint = "mlx-lm writes rank and scale there"
        raise ModelError("the key lora_parameters is missing", where=where, hint=hint)
    due = {"lora_a", "lora_b", *(["m"] if kind == "dora" else [])}
    if strange := sorted(name for name in tensors if name.rpartition(".")[2] not in due):
        message = f"{len(strange)} tensors are not those of {kind}:\n{listing(strange)}"
        raise ModelError(message, where=str(folder))
    values: dict[str, object] = {
        "rank": parameters.rank,
        "alpha": parameters.scale * parameters.rank,
        "dropout": parameters.dropout,
        "targets": modules,
    }
    spec = (DoRA if kind == "dora" else LoRA).model_validate(values)
    return Adapter(spec, tensors, str(folder), modules)
