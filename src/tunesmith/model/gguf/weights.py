"""model.safetensors from the tensors of a GGUF file, in Hugging Face's names, shapes and orders of rows.

One matrix is dequantised at a time, of a stack of experts one expert, so that memory holds one of them."""

from __future__ import annotations

import math
import re
import shutil
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from gguf import GGMLQuantizationType, ReaderTensor, quants

from tunesmith.errors import ModelError
from tunesmith.model import stored
from tunesmith.model.gguf.architectures import EXPERTS, TOP, Architecture, Config
from tunesmith.model.gguf.metadata import FACTORS, Metadata

TENSOR_TYPES = frozenset(
    "F32 F16 BF16 Q4_0 Q4_1 Q5_0 Q5_1 Q8_0 Q2_K Q3_K Q4_K Q5_K Q6_K TQ1_0 TQ2_0 MXFP4 NVFP4 "
    "IQ1_S IQ1_M IQ2_XXS IQ2_XS IQ2_S IQ3_XXS IQ3_S IQ4_NL IQ4_XS".split()
)
"""The types that the gguf package dequantises."""
DTYPES = {"float32": (4, "F32"), "float16": (2, "F16"), "bfloat16": (2, "BF16")}
BLOCK, PACKED = 32, 16
"""MXFP4: the numbers that share a scale, and the bytes that hold them."""


class Part(NamedTuple):
    """One tensor of model.safetensors. ``arrays``: makes its values, cut along the first axis. ``source``:
    the tensors of the file that it is made of. ``packed``: bytes, which are written as they are."""

    name: str
    source: str
    shape: tuple[int, ...]
    arrays: Callable[[], Iterator[np.ndarray]]
    packed: bool = False


def problems(architecture: Architecture, metadata: Metadata) -> list[str]:
    """The tensors that are missing, unknown, or of a type that cannot be read, one text each."""
    n_blocks = metadata.values.get("block_count", 0)
    needed = {f"{part}.weight" for part in TOP} - {"output.weight"}
    optional = {"output.weight", *FACTORS}
    if architecture.head is not None:
        optional.discard("output.weight")
        needed |= {"output.weight"} if architecture.head else set()
    for number in range(n_blocks):
        needed |= {f"blk.{number}.{part}.weight" for part in architecture.parts}
        needed |= {f"blk.{number}.{part}.bias" for part in architecture.biased}
        optional |= {f"blk.{number}.{part}.bias" for part in architecture.biases}
    given = metadata.tensors
    return [
        *(
            f"{name} has type {tensor.tensor_type.name}"
            for name, tensor in given.items()
            if tensor.tensor_type.name not in TENSOR_TYPES
        ),
        *(f"tensor {name} is not understood" for name in given if name not in needed | optional),
        *(f"tensor {name} is missing" for name in sorted(needed - given.keys())),
    ]


def wrong_ranks(architecture: Architecture, metadata: Metadata) -> list[str]:
    """The tensors whose number of dimensions is not what their name says, one text each."""
    known = {*TOP, *architecture.parts, *(name.removesuffix(".weight") for name in FACTORS)}
    problems = []
    for name, tensor in metadata.tensors.items():
        part, _, suffix = name.rpartition(".")
        part = part.rpartition(".")[2]
        vector = suffix == "bias" or name in FACTORS or part.endswith(("norm", "sinks"))
        rank = (1 if vector else 2) + (part in EXPERTS)
        if part in known and len(tensor.shape) != rank:
            problems.append(f"tensor {name} has {len(tensor.shape)} dimensions, {rank} expected")
    return problems


def parts(architecture: Architecture, metadata: Metadata, config: Config) -> Iterator[Part]:
    """The tensors of model.safetensors in the order of the file."""
    for name, tensor in metadata.tensors.items():
        match = re.fullmatch(r"(?:blk\.(\d+)\.)?(\w+)\.(weight|bias)", name)
        if match is None or name in FACTORS:
            continue
        number, part, suffix = match.groups()
        if number is None:
            yield Part(
                f"{TOP[part]}.{suffix}",
                name,
                _shape(tensor),
                partial(_converted, architecture, tensor, part, config),
            )
        elif part in EXPERTS:
            layer = f"model.layers.{number}.mlp.experts"
            yield from _experts(architecture, metadata, layer, name)
        else:
            target = f"model.layers.{number}.{architecture.parts[part]}"
            target += "" if part == "attn_sinks" else f".{suffix}"
            yield Part(target, name, _shape(tensor), partial(_converted, architecture, tensor, part, config))


def header(parts: Iterable[Part], dtype: str) -> dict[str, dict[str, Any]]:
    """The header of the safetensors file that `write` makes of ``parts``."""
    size, code = DTYPES[dtype]
    entries: dict[str, dict[str, Any]] = {"__metadata__": {"format": "pt"}}
    end = 0
    for part in parts:
        start, end = end, end + (1 if part.packed else size) * math.prod(part.shape)
        entries[part.name] = {
            "dtype": "U8" if part.packed else code,
            "shape": list(part.shape),
            "data_offsets": [start, end],
        }
    return entries


def write(parts: Iterable[Part], target: Path, dtype: str, tick: Callable[[int, int], None]) -> None:
    """One safetensors file: an 8-byte length, a JSON header, the tensors in the order of the header. tick:
    called with the number of tensors that are written, and of all.

    Raises ModelError if the disk is too small, or if a tensor has values that are not finite as ``dtype``."""
    parts = list(parts)
    entries = header(parts, dtype)
    end = stored.content_bytes(entries)
    free = shutil.disk_usage(target.parent).free
    if free < end + (64 << 20):
        message = f"converted weights take {end / 1e9:.1f} GB, {free / 1e9:.1f} GB are free"
        raise ModelError(message, hint="set TUNESMITH_CACHE to a folder on a larger disk")
    with target.open("wb") as out:
        out.write(stored.header_bytes(entries))
        for done, part in enumerate(parts, start=1):
            for array in part.arrays():
                out.write((array if part.packed else _stored(array, part.source, dtype)).tobytes())
            tick(done, len(parts))


def _stored(array: np.ndarray, source: str, dtype: str) -> np.ndarray:
    stored = array.astype(np.float16) if dtype == "float16" else array
    if not np.isfinite(stored).all():
        raise ModelError(f"{source} has values that are not finite as {dtype}")
    return quants.quantize(array, GGMLQuantizationType.BF16) if dtype == "bfloat16" else stored


def _shape(tensor: ReaderTensor) -> tuple[int, ...]:
    return tuple(int(size) for size in reversed(tensor.shape))


def _values(data: np.ndarray, tensor: ReaderTensor) -> np.ndarray:
    return quants.dequantize(data, tensor.tensor_type).astype(np.float32, copy=False)


def _converted(
    architecture: Architecture, tensor: ReaderTensor, part: str, config: Config
) -> Iterator[np.ndarray]:
    try:
        yield from_file(architecture, part, _values(tensor.data, tensor), config)
    except ModelError as error:
        raise ModelError(f"{tensor.name} {error.what}") from error


def from_file(architecture: Architecture, part: str, array: np.ndarray, config: Config) -> np.ndarray:
    """``array`` of a file in Hugging Face's order. llama.cpp has the pairs (i, i + head/2) of rows of queries
    and keys side by side, Hugging Face has halves; norms may be stored with their 1. Raises ModelError if the
    rows are not those of the heads."""
    if architecture.interleaved and part in ("attn_q", "attn_k"):
        heads = config["num_attention_heads" if part == "attn_q" else "num_key_value_heads"]
        head = config["head_dim"]
        if array.shape[0] != heads * head:
            raise ModelError(f"has {array.shape[0]} rows, {heads} heads of {head} expected")
        return array.reshape(heads, head // 2, 2, -1).swapaxes(1, 2).reshape(array.shape)
    if architecture.shifted and part.endswith("norm"):
        return array - 1.0
    return array


def in_file(architecture: Architecture, part: str, array: np.ndarray, config: Config) -> np.ndarray:
    """The inverse of `from_file`."""
    if architecture.interleaved and part in ("attn_q", "attn_k"):
        heads = config["num_attention_heads" if part == "attn_q" else "num_key_value_heads"]
        return array.reshape(heads, 2, config["head_dim"] // 2, -1).swapaxes(1, 2).reshape(array.shape)
    if architecture.shifted and part.endswith("norm"):
        return array + 1.0
    return array


def _experts(architecture: Architecture, metadata: Metadata, layer: str, name: str) -> Iterator[Part]:
    """The parts made of a stack of experts: each expert's matrix; of gpt-oss stacks, at the place of the
    gate one of gate and up together."""
    tensor = metadata.tensors[name]
    block, part, suffix = name.rsplit(".", 2)
    if architecture.model_type != "gpt_oss":
        shape, projection = _shape(tensor), part.split("_")[1]
        for number, data in enumerate(tensor.data):
            expert = f"{layer}.{number}.{projection}_proj.{suffix}"
            yield Part(expert, name, shape[1:], partial(_expert, tensor, data))
    elif part == "ffn_down_exps":
        yield from _stacked(f"{layer}.down_proj", [tensor], suffix)
    elif part == "ffn_gate_exps":
        up = metadata.tensors[f"{block}.ffn_up_exps.{suffix}"]
        if up.tensor_type != tensor.tensor_type or up.shape.tolist() != tensor.shape.tolist():
            raise ModelError(f"{name} and {up.name} differ in type or shape")
        yield from _stacked(f"{layer}.gate_up_proj", [tensor, up], suffix)


def _expert(tensor: ReaderTensor, data: np.ndarray) -> Iterator[np.ndarray]:
    yield _values(data, tensor)


def _stacked(target: str, tensors: list[ReaderTensor], suffix: str) -> Iterator[Part]:
    """gpt-oss: rows of the tensors in turns. MXFP4 keeps its bits; other matrices are stored input by
    output."""
    shape = _shape(tensors[0])
    n_experts, rows = shape[0], shape[1] * len(tensors)
    source = " or ".join(tensor.name for tensor in tensors)
    if suffix == "bias":
        yield Part(f"{target}_bias", source, (n_experts, rows), partial(_in_turns, tensors))
    elif tensors[0].tensor_type == GGMLQuantizationType.MXFP4:
        scales = (n_experts, rows, shape[2] // BLOCK)
        yield Part(f"{target}_blocks", source, (*scales, PACKED), partial(_mxfp4_blocks, tensors), True)
        yield Part(f"{target}_scales", source, scales, partial(_mxfp4_scales, tensors), True)
    else:
        yield Part(target, source, (n_experts, shape[2], rows), partial(_in_turns, tensors))


def _in_turns(tensors: list[ReaderTensor]) -> Iterator[np.ndarray]:
    for stacks in zip(*(tensor.data for tensor in tensors), strict=True):
        values = [_values(data, tensor) for data, tensor in zip(stacks, tensors, strict=True)]
        rows = np.stack(values, axis=1).reshape(-1, *values[0].shape[1:])
        yield np.ascontiguousarray(rows.T)


def _mxfp4(tensors: list[ReaderTensor]) -> Iterator[np.ndarray]:
    """(rows, blocks, 17) bytes of each expert: a scale, then 32 numbers of 4 bits, the first half of them in
    the low bits."""
    for stacks in zip(*(tensor.data for tensor in tensors), strict=True):
        rows = np.stack(list(stacks), axis=1)
        yield rows.reshape(-1, rows.shape[-1] // (PACKED + 1), PACKED + 1)


def _mxfp4_scales(tensors: list[ReaderTensor]) -> Iterator[np.ndarray]:
    for blocks in _mxfp4(tensors):
        yield blocks[..., 0]


def _mxfp4_blocks(tensors: list[ReaderTensor]) -> Iterator[np.ndarray]:
    """Hugging Face has neighbours in one byte, the first of them in the low bits."""
    for blocks in _mxfp4(tensors):
        numbers = np.concatenate([blocks[..., 1:] & 15, blocks[..., 1:] >> 4], axis=-1)
        yield numbers[..., ::2] | (numbers[..., 1::2] << 4)
