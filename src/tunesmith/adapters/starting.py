"""The adapter that a setting names, to train it further or to merge it into the base: saved by tunesmith,
PEFT or mlx-lm."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

import mlx.nn as nn

from tunesmith import events
from tunesmith.adapters import files, mlx_lm_files, peft_files
from tunesmith.adapters.attachment import Adapter
from tunesmith.adapters.layers import Linear, adapted, trainable
from tunesmith.adapters.specs import AdapterSpec, Full
from tunesmith.errors import ConfigError
from tunesmith.events import Notice, Sink
from tunesmith.model.loading import Loaded

MERGE = "model.adapter instead merges it into the base, and the new adapter may have any shape"
BASE_NAMES = ("base_model_name_or_path", "model")
"""The settings in which PEFT and mlx-lm name the base."""


def read(folder: Path, loaded: Loaded, path: str, notify: Sink = events.silent) -> tuple[Adapter, ...]:
    """The adapter in ``folder`` for ``loaded``, which was loaded from ``path``; in several parts if its
    layers have several ranks or scales. Raises ModelError if it cannot be read or does not fit."""
    program = files.layout(folder)
    if program == "tunesmith":
        return (files.read(folder),)
    settings = files.read_settings(folder)
    named = next((str(settings[key]) for key in BASE_NAMES if settings.get(key)), None)
    if named is not None and Path(named).name.lower() not in path.lower():
        text = f"this adapter names another base: {named}"
        hint = "its tensors fit this one, but it was trained on that"
        notify(Notice(text, level="warning", where=str(folder), hint=hint))
    return (mlx_lm_files.read(folder),) if program == "mlx-lm" else peft_files.read(folder, loaded, notify)


def go_on(net: nn.Module, spec: AdapterSpec, parts: Sequence[Adapter]) -> None:
    """Fill the adapter that ``spec`` attached with the tensors of ``parts``. Raises ConfigError, which names
    the settings to give, if the two differ in shape."""
    first = parts[0]
    if files.layout(Path(first.source)) == "tunesmith":
        files.go_on(net, spec, first)
        return
    where = "adapter.start"
    if len(parts) > 1:
        shapes = ", ".join(f"rank {_rank(part)} with scale {_scale(part):g}" for part in parts)
        message = f"the layers of the adapter in {first.source} have several ranks or scales ({shapes})"
        raise ConfigError(message, where=where, hint=MERGE)
    if differences := _differences(net, spec, first):
        message = f"the adapter of {first.source} has another shape: {'; '.join(differences)}"
        raise ConfigError(message, where=where, hint=f"give {_settings(net, first)}; {MERGE}")
    first.fill(net)


def _rank(part: Adapter) -> int | None:
    return None if isinstance(part.spec, Full) else part.spec.rank


def _scale(part: Adapter) -> float:
    return 1.0 if isinstance(part.spec, Full) else part.spec.scale


def _differences(net: nn.Module, spec: AdapterSpec, start: Adapter) -> list[str]:
    """What the adapter of ``net`` has otherwise than ``start``."""
    there = start.spec
    if spec.kind != there.kind:
        return [f"adapter.kind is {spec.kind}, there {there.kind}"]
    differences: list[str] = []
    if not isinstance(spec, Full) and not isinstance(there, Full):
        if spec.rank != there.rank:
            differences.append(f"adapter.rank is {spec.rank}, there {there.rank}")
        if not math.isclose(spec.scale, there.scale, rel_tol=1e-6):
            differences.append(f"the update is scaled by {spec.scale:g}, there by {there.scale:g}")
    here, layers = set(adapted(net)), set(start.layers or ())
    if here != layers:
        differences.append(
            f"{len(here)} layers are adapted, there {len(layers)}, {len(here & layers)} in both"
        )
    elif (ours := _full(trainable(net), here)) != (theirs := _full(start.tensors, layers)):
        differences.append(f"trained in full are {_list(ours)}, there {_list(theirs)}")
    return differences


def _full(tensors: Collection[str], layers: Collection[str]) -> set[str]:
    """The modules of ``tensors`` that are not adapted layers."""
    return {name.rpartition(".")[0] for name in tensors} - set(layers)


def _list(names: Collection[str]) -> str:
    return ", ".join(sorted(names)) or "no modules"


def _settings(net: nn.Module, start: Adapter) -> str:
    """The settings under which a new adapter has the shape of ``start``."""
    spec = start.spec
    values: Mapping[str, object] = {"kind": spec.kind, "targets": f"[{', '.join(_targets(net, start))}]"}
    if not isinstance(spec, Full):
        full = {"full_modules": f"[{', '.join(spec.full_modules)}]"} if spec.full_modules else {}
        stabilised = {"rank_stabilised": "true"} if spec.rank_stabilised else {}
        values = {**values, "rank": spec.rank, "alpha": f"{spec.alpha:g}", **stabilised, **full}
    return " ".join(f'--set "adapter.{key}={value}"' for key, value in values.items())


def _targets(net: nn.Module, start: Adapter) -> list[str]:
    """The targets that mean the layers of ``start``: their last words if these mean no other layer."""
    layers = start.layers
    if layers is None:
        return list(start.spec.targets)
    words = {name.rpartition(".")[2] for name in layers}
    linear = {
        name.removesuffix(".linear") for name, module in net.named_modules() if isinstance(module, Linear)
    }
    meant = {name for name in linear if name.rpartition(".")[2] in words}
    return sorted(words) if meant == set(layers) else list(layers)
