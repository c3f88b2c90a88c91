"""A GGUF file from the tensors and settings of a model: the inverse of reading one, by the same tables.

Tensors are written one at a time. A model that was read from a GGUF file keeps that file's header, and the
bytes of all tensors that did not change."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import mlx.core as mx
import numpy as np
from gguf import (
    GGML_QUANT_SIZES,
    GGMLQuantizationType,
    GGUFValueType,
    GGUFWriter,
    LlamaFileType,
    ReaderField,
    ReaderTensor,
    quants,
)

from tunesmith.errors import ModelError, listing
from tunesmith.model.gguf import ggml, tensor_types, weights
from tunesmith.model.gguf.architectures import (
    ARCHITECTURES,
    TOP,
    Architecture,
    Config,
    Value,
    Values,
    describe,
    settings,
)
from tunesmith.model.gguf.metadata import Metadata
from tunesmith.model.gguf.reading import GGUFModel

Dense = dict[str, Callable[[], mx.array]]
"""Name of a tensor in the net → function that computes it in float32."""
BLOCK = 1 << 22
"""Values that are encoded at a time."""
SAME = {"mistral": "llama", "gemma3": "gemma3_text"}
"""Model types that are written as another one."""
NOT_COMPARED = frozenset(
    "architectures model_type vocab_size tie_word_embeddings attention_bias mlp_bias rope_scaling "
    "rope_parameters original_max_position_embeddings pad_token_id sliding_window use_sliding_window "
    "hidden_activation".split()
)
"""Settings that hold the same in other words, or that are compared by what follows from them."""
UNQUANTISED = frozenset(GGMLQuantizationType[name] for name in ("F32", "F16", "BF16"))


class NewTensor(NamedTuple):
    """A tensor of the file. ``shape``: in numpy's order. ``content``: makes its bytes, cut along the first
    axis; it is called once. ``narrow``: its rows do not fill the blocks of the type that the file would have
    for it. ``weighed``: its errors are weighed by an importance matrix."""

    name: str
    shape: tuple[int, ...]
    type: GGMLQuantizationType
    content: Callable[[], Iterable[np.ndarray]]
    narrow: bool = False
    weighed: bool = False

    @property
    def n_weights(self) -> int:
        return math.prod(self.shape)

    @property
    def n_bytes(self) -> int:
        block, size = GGML_QUANT_SIZES[self.type]
        return self.n_weights // block * size


class Encoding(NamedTuple):
    """How the matrices of a file are written. ``type``: the type that the file is named after.
    ``importance``: by tensor of the net, the weight of the error in each column."""

    type: str
    importance: Mapping[str, np.ndarray] = {}


class Slot(NamedTuple):
    """The tensor ``tensor`` of the net, which is the part ``part`` of a block, or of the whole, in a file."""

    tensor: str
    part: str


def architecture_of(config: Config) -> str:
    """The name of the architecture that a model is written as. Raises ModelError if there is none."""
    model_type = str(config.get("model_type"))
    model_type = SAME.get(model_type, model_type)
    for name, architecture in ARCHITECTURES.items():
        if architecture.model_type == model_type and architecture.values is not None:
            return name
    raise ModelError(f"models of type {config.get('model_type')} cannot be written as GGUF")


def slots(architecture: Architecture, n_blocks: int) -> dict[str, Slot]:
    """The tensors that a file can have, by name."""
    possible = {f"{part}.weight": Slot(f"{name}.weight", part) for part, name in TOP.items()}
    for number in range(n_blocks):
        for part, name in architecture.parts.items():
            place = f"model.layers.{number}.{name or _experts(architecture, part)}"
            for suffix in ("weight", "bias"):
                tensor = place if part == "attn_sinks" else f"{place}.{suffix}"
                possible[f"blk.{number}.{part}.{suffix}"] = Slot(tensor, part)
    return possible


def _experts(architecture: Architecture, part: str) -> str:
    holder = "experts" if architecture.model_type == "gpt_oss" else "switch_mlp"
    return f"mlp.{holder}.{part.split('_')[1]}_proj"


def described(config: Config, dense: Dense) -> tuple[str, Values, dict[str, np.ndarray]]:
    """The architecture, its values by key, and the tensors of rotary frequencies.

    Raises ModelError, with everything that the file cannot hold: what would be read from it is compared with
    ``config``."""
    name = architecture_of(config)
    architecture = ARCHITECTURES[name]
    shapes = {
        slot: tuple(dense[place.tensor]().shape)
        for slot, place in slots(architecture, config["num_hidden_layers"]).items()
        if place.tensor in dense
    }
    n_tokens = shapes["token_embd.weight"][0]
    description = describe(architecture, config, n_tokens)
    tensors = {slot: _stand_in(slot, shape) for slot, shape in shapes.items()}
    tensors |= {slot: _stand_in(slot, value.shape, value) for slot, value in description.factors.items()}
    metadata = Metadata(name, dict(description.values), tensors)
    problems = weights.problems(architecture, metadata)
    if len(shapes) < len(dense):
        known = {place.tensor for place in slots(architecture, config["num_hidden_layers"]).values()}
        problems += [f"tensor {tensor} has no place" for tensor in dense if tensor not in known]
    if not problems:
        problems = _differences(config, settings(architecture, metadata))
    if problems:
        raise ModelError(f"cannot be written as GGUF:\n{listing(problems)}")
    values: Values = {f"{name}.{key}": value for key, value in description.values.items()}
    return name, values, description.factors


def _stand_in(name: str, shape: tuple[int, ...], data: np.ndarray | None = None) -> ReaderTensor:
    size = math.prod(shape)
    held = np.zeros(0, np.float32) if data is None else data
    kind, order = GGMLQuantizationType.F32, np.array(shape[::-1], np.uint32)
    return ReaderTensor(name, kind, order, size, 4 * size, 0, held, ReaderField(0, name))


def _differences(config: Config, read: Config) -> list[str]:
    """The settings that would be read otherwise."""
    problems = [
        f"{key} is {config[key]}, a file says {value}"
        for key, value in read.items()
        if key not in NOT_COMPARED and config.get(key) is not None and not _equal(config[key], value)
    ]
    rotary = config.get("no_rope_layers")
    if rotary is not None and rotary != [int((number + 1) % 4 != 0) for number in range(len(rotary))]:
        problems.append("no_rope_layers: every fourth layer expected")
    return problems


def _equal(value: object, other: object) -> bool:
    if isinstance(value, int | float) and isinstance(other, int | float):
        return math.isclose(value, other, rel_tol=1e-6)
    return value == other


def new_tensors(
    architecture: Architecture,
    config: Config,
    dense: Dense,
    factors: Mapping[str, np.ndarray],
    encoding: Encoding,
) -> list[NewTensor]:
    """All tensors of a file. Writing one removes its function from ``dense``, which frees it."""
    tensors = [
        NewTensor(name, value.shape, GGMLQuantizationType.F32, lambda value=value: [value])
        for name, value in factors.items()
    ]
    tied = "lm_head.weight" not in dense
    for name, slot in slots(architecture, config["num_hidden_layers"]).items():
        if slot.tensor in dense:
            head = name == ("token_embd.weight" if tied else "output.weight")
            tensors.append(_computed(name, head, architecture, slot, config, dense, encoding))
    return tensors


def _computed(
    name: str,
    head: bool,
    architecture: Architecture,
    slot: Slot,
    config: Config,
    dense: Dense,
    encoding: Encoding,
) -> NewTensor:
    """head: whether the matrix gives the logits."""
    shape = tuple(dense[slot.tensor]().shape)
    kind, narrow = tensor_types.choose(name, shape, encoding.type, config["num_hidden_layers"], head=head)
    importance = None if head or kind in UNQUANTISED else encoding.importance.get(slot.tensor)

    def content() -> Iterator[np.ndarray]:
        value = np.asarray(dense.pop(slot.tensor)())
        rows = np.atleast_2d(weights.in_file(architecture, slot.part, value, config))
        rows = rows.reshape(-1, rows.shape[-1])
        step = max(1, BLOCK // rows.shape[-1])
        for first in range(0, len(rows), step):
            yield encoded(rows[first : first + step], kind, name, importance)

    return NewTensor(name, shape, kind, content, narrow, importance is not None)


def encoded(
    value: np.ndarray, kind: GGMLQuantizationType, name: str, importance: np.ndarray | None = None
) -> np.ndarray:
    """``value`` in the type. importance: the weight of the error in each column. Raises ModelError if the
    type cannot hold it, SetupError if llama.cpp is needed to write it and not installed."""
    if importance is not None or kind.name.endswith("_K"):
        return ggml.quantised(value, kind, importance)
    with np.errstate(over="ignore"):
        content = quants.quantize(np.ascontiguousarray(value), kind)
    if kind == GGMLQuantizationType.F16 and not np.isfinite(content).all():
        raise ModelError(f"{name} has values that {kind.name} cannot hold")
    return content


def kept_tensors(
    reader: GGUFModel,
    architecture: Architecture,
    config: Config,
    dense: Dense,
    changed: Collection[str],
    encoding: Encoding,
) -> Iterator[NewTensor]:
    """The tensors of the file that the model was read from: those of ``changed`` as they are in ``dense``, by
    ``encoding``, all others as they are. Writing one removes its function from ``dense``."""
    places = slots(architecture, config["num_hidden_layers"])
    head = "output.weight" if any(tensor.name == "output.weight" for tensor in reader.tensors) else ""
    for tensor in reader.tensors:
        slot = places.get(tensor.name)
        shape = tuple(int(size) for size in reversed(tensor.shape))
        if slot is None or slot.tensor not in changed:
            yield NewTensor(tensor.name, shape, tensor.tensor_type, lambda data=tensor.data: [data])
            continue
        is_head = tensor.name == (head or "token_embd.weight")
        yield _computed(tensor.name, is_head, architecture, slot, config, dense, encoding)


def file_type(mix: str) -> int:
    """The value of general.file_type."""
    return LlamaFileType.ALL_F32 if mix == "F32" else LlamaFileType[f"MOSTLY_{mix}"]


def bits(tensors: Sequence[NewTensor]) -> float:
    """Bits a weight over all ``tensors``."""
    return 8 * sum(tensor.n_bytes for tensor in tensors) / sum(tensor.n_weights for tensor in tensors)


def write(
    path: Path,
    architecture: str,
    values: Mapping[str, Value],
    tensors: Sequence[NewTensor],
    fields: Sequence[ReaderField] = (),
    *,
    tick: Callable[[int, int], None] = lambda done, total: None,
) -> None:
    """Write the file, one tensor at a time. fields: of the header of another file; ``values`` come before
    those. tick: called with the number of tensors that are written, and of all."""
    writer = GGUFWriter(path, architecture)
    for key, value in values.items():
        writer.add_key_value(key, value, _value_type(value))
    for field in fields:
        if not field.name.startswith("GGUF.") and field.name not in {*values, "general.architecture"}:
            inner = field.types[-1] if field.types[0] == GGUFValueType.ARRAY else None
            writer.add_key_value(field.name, field.contents(), field.types[0], inner)
            if field.name == "general.alignment":  # the writer pads tensors to its own attribute
                writer.data_alignment = int(field.contents())
    for tensor in tensors:
        number = np.dtype(np.float32)
        writer.add_tensor_info(tensor.name, tensor.shape, number, tensor.n_bytes, tensor.type)
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        assert writer.fout is not None
        (file,) = writer.fout
        for done, tensor in enumerate(tensors, start=1):
            writer.write_padding(file, file.tell())
            start = file.tell()
            for block in tensor.content():
                file.write(np.ascontiguousarray(block).data)
            assert file.tell() - start == tensor.n_bytes, tensor.name
            writer.write_padding(file, file.tell() - start)
            mx.clear_cache()
            tick(done, len(tensors))
    finally:
        writer.close()


def _value_type(value: Value) -> GGUFValueType:
    if isinstance(value, list):
        return GGUFValueType.ARRAY
    if isinstance(value, bool):
        return GGUFValueType.BOOL
    if isinstance(value, str):
        return GGUFValueType.STRING
    return GGUFValueType.UINT32 if isinstance(value, int) else GGUFValueType.FLOAT32
