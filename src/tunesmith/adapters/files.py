"""Adapters on disk: adapters.safetensors and adapter_config.json, in mlx-lm's layout, which mlx-lm reads."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, Literal

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_unflatten
from pydantic import Field, TypeAdapter
from safetensors import SafetensorError, TensorSpec, safe_open, serialize

from tunesmith.adapters.attachment import UNFIT, Adapter
from tunesmith.adapters.layers import QALoRALinear, adapted, trainable
from tunesmith.adapters.specs import AdapterSpec, Full, LoRA, QALoRA, blocks_of
from tunesmith.errors import ConfigError, ModelError
from tunesmith.settings.origins import JSON

WEIGHTS = "adapters.safetensors"
PEFT_WEIGHTS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"
Layout = Literal["tunesmith", "mlx-lm", "PEFT"]


def save(net: nn.Module, spec: AdapterSpec, folder: Path) -> None:
    """Write the trainable tensors and the spec, not atomically. mlx-lm reads both, but refuses
    ``full_modules`` by name."""
    config = _config(spec, len(blocks_of(net, spec.layers)), adapted(net))
    _write(folder, config, trainable(net))


def _config(spec: AdapterSpec, n_blocks: int, layers: Iterable[str]) -> dict[str, object]:
    """What ``adapter_config.json`` holds. layers: names of the adapted ones."""
    config: dict[str, object] = {"fine_tune_type": spec.kind, "num_layers": n_blocks}
    if not isinstance(spec, Full):
        config["lora_parameters"] = {
            "rank": spec.rank,
            "scale": spec.scale,
            "dropout": spec.dropout,
            "keys": list(layers),
        }
    return config | {"tunesmith": {"adapter": spec.model_dump(mode="json")}}


def _write(folder: Path, config: Mapping[str, object], tensors: Mapping[str, mx.array]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    (folder / WEIGHTS).write_bytes(serialised(tensors, "mlx"))


def serialised(tensors: Mapping[str, mx.array], layout: str) -> bytes:
    """``tensors`` as a safetensors file, each in its dtype; bfloat16, which numpy does not know, by its
    bits."""
    arrays = {
        name: np.ascontiguousarray(np.array(value.view(mx.uint16) if value.dtype == mx.bfloat16 else value))
        for name, value in tensors.items()
    }
    stored = {
        name: TensorSpec(
            dtype=str(tensors[name].dtype).removeprefix("mlx.core."),
            shape=array.shape,
            data_ptr=array.ctypes.data,
            data_len=array.nbytes,
        )
        for name, array in arrays.items()
    }
    return bytes(serialize(stored, metadata={"format": layout}))


def save_as_lora(net: nn.Module, spec: QALoRA, folder: Path) -> None:
    """Write the QA-LoRA adapter of ``net`` as the LoRA adapter that computes the same, for mlx-lm."""
    layers = adapted(net)
    plain = LoRA.model_validate(spec.model_dump(exclude={"kind", "start"}))
    tensors: dict[str, mx.array] = {}
    for name, layer in layers.items():
        assert isinstance(layer, QALoRALinear)
        tensors |= {f"{name}.lora_a": layer.expanded_a(), f"{name}.lora_b": layer.factors[1]}
    config = _config(plain, len(blocks_of(net, spec.layers)), layers)
    _write(folder, config, tensors)


def copy_without_start(saved: Path, folder: Path) -> None:
    """Copy what `save` wrote for another machine: ``start`` is a path of this one, and becomes null."""
    shutil.copyfile(saved / WEIGHTS, folder / WEIGHTS)
    config = json.loads((saved / CONFIG).read_text("utf-8"))
    if config.get("tunesmith", {}).get("adapter", {}).get("start") is not None:
        config["tunesmith"]["adapter"]["start"] = None
    (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def read(folder: Path) -> Adapter:
    """What `save` wrote. Raises ModelError if it cannot be read."""
    return Adapter(read_spec(folder), read_tensors(folder / WEIGHTS), str(folder), read_layers(folder))


def load(net: nn.Module, folder: Path, *, lazily: bool = False) -> AdapterSpec:
    """Put what `save` wrote into ``net`` for good; returns its spec. lazily: nothing is read or computed
    until it is used. Raises ModelError if it cannot be read or does not fit; ``net`` may have changed
    then."""
    adapter = read(folder)
    adapter.install(net, lazily=lazily)
    return adapter.spec


@contextmanager
def attached(net: nn.Module, folder: Path) -> Iterator[Adapter]:
    """Inside, ``net`` has the adapter of ``folder``; afterwards it is exactly what it was. Raises as `load`
    does."""
    adapter = read(folder)
    handle = adapter.attach(net)
    try:
        yield adapter
    finally:
        handle.detach()


def load_tensors(net: nn.Module, folder: Path) -> None:
    """Fill the adapter that is attached to ``net``. Raises ModelError, listing every tensor that does not
    fit, and leaves ``net`` as it was."""
    read(folder).fill(net)


def layout(folder: Path) -> Layout:
    """The program whose layout the settings of an adapter have. Raises ModelError if they cannot be read."""
    settings = read_settings(folder)
    return "tunesmith" if "tunesmith" in settings else "PEFT" if "peft_type" in settings else "mlx-lm"


def read_settings(folder: Path) -> dict[str, JSON]:
    """The settings beside the tensors of an adapter. Raises ModelError if they cannot be read."""
    try:
        settings = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        message = f"{CONFIG} cannot be read: {type(error).__name__}: {error}"
        raise ModelError(message, where=str(folder), hint=UNFIT) from error
    if not isinstance(settings, dict):
        raise ModelError(f"{CONFIG} does not hold settings by name", where=str(folder), hint=UNFIT)
    return settings


def weights_file(folder: Path) -> Path:
    """The file of an adapter's tensors: PEFT's if only that exists."""
    of_peft = folder / PEFT_WEIGHTS
    return of_peft if of_peft.is_file() and not (folder / WEIGHTS).is_file() else folder / WEIGHTS


def read_spec(folder: Path) -> AdapterSpec:
    """The spec of what `save` wrote. Raises ModelError if it cannot be read."""
    try:
        stored = json.loads((folder / CONFIG).read_text(encoding="utf-8"))["tunesmith"]["adapter"]
        kinds: TypeAdapter[AdapterSpec] = TypeAdapter(Annotated[AdapterSpec, Field(discriminator="kind")])
        return kinds.validate_python(stored)
    except (OSError, ValueError, TypeError, KeyError) as error:
        message = f"{CONFIG} cannot be read: {type(error).__name__}: {error}"
        raise ModelError(message, where=str(folder), hint=UNFIT) from error


def read_layers(folder: Path) -> tuple[str, ...] | None:
    """Names of the layers that the adapter of ``folder`` adapts; None if it was trained in full. Raises
    ModelError if they cannot be read."""
    try:
        stored = json.loads((folder / CONFIG).read_text(encoding="utf-8")).get("lora_parameters")
        return None if stored is None else tuple(map(str, stored["keys"]))
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        message = f"{CONFIG} cannot be read: {type(error).__name__}: {error}"
        raise ModelError(message, where=str(folder), hint=UNFIT) from error


def has_dora_on_experts(folder: Path) -> bool:
    """Whether the adapter of ``folder`` has magnitudes for each expert, which mlx-lm cannot load; False if
    there is no whole adapter."""
    try:
        with safe_open(folder / WEIGHTS, framework="numpy") as file:
            magnitudes = [name for name in file.keys() if name.endswith(".m")]
            return any(len(file.get_slice(name).get_shape()) == 2 for name in magnitudes)
    except (OSError, SafetensorError):
        return False


def read_tensors(path: Path) -> dict[str, mx.array]:
    """The tensors of a safetensors file by name. Raises ModelError if it cannot be read."""
    try:
        _require_whole(path)
        tensors: Any = mx.load(str(path))
    except (OSError, ValueError, RuntimeError) as error:
        raise ModelError(f"{path.name} cannot be read: {error}", where=str(path.parent)) from error
    return tensors


def _require_whole(path: Path) -> None:
    """Raises ValueError if the file is shorter than its header says. MLX would notice only when it reads the
    tensors; here they stay unread until they are used."""
    with path.open("rb") as file:
        header_size = int.from_bytes(file.read(8), "little")
        if 8 + header_size > path.stat().st_size:
            raise ValueError("it is cut short")
        header = json.loads(file.read(header_size))
    ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
    if 8 + header_size + max(ends, default=0) > path.stat().st_size:
        raise ValueError("it is cut short")


def go_on(net: nn.Module, spec: AdapterSpec, start: Adapter) -> None:
    """Fill the adapter that ``spec`` attached with the tensors of ``start``. Raises ConfigError if the two
    differ in shape."""
    before, now = _shape(start.spec), _shape(spec)
    if before != now:
        if before["kind"] == now["kind"]:
            differences = [
                f"adapter.{key} is {now.get(key)}, there {before.get(key)}"
                for key in sorted(before | now)
                if before.get(key) != now.get(key)
            ]
        else:
            differences = [f"adapter.kind is {now['kind']}, there {before['kind']}"]
        message = f"the adapter of {start.source} has another shape: {'; '.join(differences)}"
        hint = "give the same, or model.adapter instead: it is merged into the base, "
        hint += "and the new adapter may have any shape"
        raise ConfigError(message, where="adapter.start", hint=hint)
    start.fill(net)


def _shape(spec: AdapterSpec) -> dict[str, object]:
    """The settings that decide the tensors' names and shapes; the order of names in a list means nothing."""
    settings = spec.model_dump(mode="json", exclude={"start", "dropout", "dtype"})
    return {key: sorted(value) if isinstance(value, list) else value for key, value in settings.items()}


def load_by_mlx_lm(net: nn.Module, folder: Path) -> Callable[[], None]:
    """Put the adapter of ``folder`` into ``net`` by mlx-lm's own code; returns the function that merges it.
    Raises ModelError if mlx-lm refuses it."""
    from mlx_lm.tuner.utils import load_adapters

    try:
        load_adapters(net, str(folder))
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise ModelError(f"mlx-lm does not load the adapter: {error}", where=str(folder)) from error

    def fuse() -> None:
        layers: Any = [(name, module) for name, module in net.named_modules() if "fuse" in dir(module)]
        net.update_modules(tree_unflatten([(name, module.fuse(dequantize=True)) for name, module in layers]))

    return fuse
