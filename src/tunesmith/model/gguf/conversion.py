"""A GGUF file, or the parts of a split one, as a model folder in the cache.

The folder is kept under the hash of the file, and is complete or absent, never half-written."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from contextlib import suppress
from pathlib import Path
from typing import Any

from tunesmith import events
from tunesmith.errors import ModelError, listing
from tunesmith.events import Notice, Sink
from tunesmith.files import draft
from tunesmith.machine import backend
from tunesmith.model import stored
from tunesmith.model.gguf import reading, source, weights
from tunesmith.model.gguf.architectures import ARCHITECTURES, NEUTRAL, REQUIRED, Architecture, settings
from tunesmith.model.gguf.metadata import Metadata
from tunesmith.model.gguf.reading import GGUFModel
from tunesmith.model.gguf.tokenizer import build_tokenizer
from tunesmith.model.gguf.weights import Part

DTYPES = ("float32", "float16", "bfloat16", "auto")
CONVERTER = 2
"""Part of the cache key: increased if the same file would be converted differently."""
WEIGHTS = "model.safetensors"
ORIGINAL = "give the folder of the original model, or convert it again with a newer llama.cpp"


def convert(path: Path, dtype: str, notify: Sink = events.silent) -> Path:
    """The model folder of a GGUF file, from the cache or made now.

    The cache is `backend.cache_folder`. dtype: float32, float16 or bfloat16, of all tensors; or auto: the
    file's own if most matrices are bfloat16 or float32, float16 otherwise. Raises ModelError if anything in
    the file cannot be read exactly."""
    whole = digest(path)
    target = _folder(path, whole, dtype)
    if target.is_dir():
        if source.read(target) is None:  # an earlier release did not record it
            with suppress(OSError):
                source.write(target, path, whole)
        notify(Notice(f"GGUF {path.name}: converted before, read from {target}"))
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        with draft(target) as folder:
            folder.mkdir()
            types = write_folder(path, folder, dtype, notify)
            source.write(folder, path, whole)
    except ModelError as error:
        error.where, error.hint = error.where or str(path), error.hint or ORIGINAL
        raise
    except OSError:
        if not target.is_dir():  # else another process was faster
            raise
        return target
    notify(Notice(f"GGUF {path.name}: converted to {target} ({types})"))
    return target


def made_of(path: Path) -> list[Path]:
    """The model folders in the cache that the file was converted to, in whatever dtype. Raises ModelError if
    a part of the model is missing."""
    whole = digest(path)
    return [folder for dtype in DTYPES if (folder := _folder(path, whole, dtype)).is_dir()]


def _folder(path: Path, whole: str, dtype: str) -> Path:
    return backend.cache_folder() / "gguf" / f"{path.stem}-{whole[:16]}-{dtype}-{CONVERTER}"


def write_folder(path: Path, folder: Path, dtype: str, notify: Sink = events.silent) -> str:
    """Convert the file into the empty ``folder``. Returns how many matrices there are of each type. Raises
    ModelError if anything in the file cannot be read exactly."""
    parts, dtype, types = _write_settings(path, folder, dtype)
    tick = events.ticker(notify, "GGUF tensors converted", events.QUIET_S)
    weights.write(parts, folder / WEIGHTS, dtype, tick)
    return ", ".join(f"{count} {name}" for name, count in types)


def write_outline(path: Path, folder: Path, dtype: str) -> None:
    """As `write_folder`, from the header of the file alone: the weights have their shapes, and no content.
    Raises ModelError as `write_folder` does."""
    try:
        parts, dtype, _ = _write_settings(path, folder, dtype)
    except ModelError as error:
        error.where, error.hint = error.where or str(path), error.hint or ORIGINAL
        raise
    stored.write_hollow(folder / WEIGHTS, weights.header(parts, dtype))


def _write_settings(path: Path, folder: Path, dtype: str) -> tuple[list[Part], str, list[tuple[str, int]]]:
    """Write settings and tokenizer. Returns the tensors that the weights are made of, their dtype, and how
    many matrices there are of each type."""
    model = reading.read(path)
    keys = {name: field.contents() for name, field in model.fields.items()}
    architecture, metadata = _read(keys, model)
    try:
        config = settings(architecture, metadata)
        tokenizer, tokenizer_settings = build_tokenizer(keys)
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        raise ModelError(f"has values in its header that cannot be used: {error!r}") from error
    parts = list(weights.parts(architecture, metadata, config))
    types = Counter(
        tensor.tensor_type.name for tensor in model.tensors if len(tensor.shape) > 1
    ).most_common()
    if dtype == "auto":
        dtype = {"BF16": "bfloat16", "F32": "float32"}.get(types[0][0], "float16")
    ends = [
        keys[key] for key in ("tokenizer.ggml.eos_token_id", "tokenizer.ggml.eot_token_id") if key in keys
    ]
    config |= {"dtype": dtype, "eos_token_id": list(dict.fromkeys(ends)) or None}
    if any(part.packed for part in parts):
        config["quantization_config"] = {
            "quant_method": "mxfp4",
            "modules_to_not_convert": [
                "model.layers.*.self_attn",
                "model.layers.*.mlp.router",
                "model.embed_tokens",
                "lm_head",
            ],
        }
    (folder / "config.json").write_text(json.dumps(config, indent=1))
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer_settings, indent=1))
    tokenizer.save(str(folder / "tokenizer.json"))
    return parts, dtype, types


def digest(path: Path) -> str:
    """SHA-256 of a GGUF file; of a model in several files, of their hashes. Raises ModelError if a part is
    missing."""
    hashes: list[str] = []
    for file in reading.files(path):
        with file.open("rb") as stream:
            hashes.append(hashlib.file_digest(stream, "sha256").hexdigest())
    return hashes[0] if len(hashes) == 1 else hashlib.sha256(" ".join(hashes).encode()).hexdigest()


def _read(keys: dict[str, Any], model: GGUFModel) -> tuple[Architecture, Metadata]:
    """The architecture of the file and its values, which it understands: all keys and tensors are known,
    none is missing. Raises ModelError, which lists every problem."""
    name = keys.get("general.architecture")
    if not isinstance(name, str) or name not in ARCHITECTURES:
        hint = (
            f"these can be read: {', '.join(ARCHITECTURES)}; for others give the Hugging Face or MLX folder"
        )
        raise ModelError(f"general.architecture is {name!r}, which is not supported", hint=hint)
    architecture = ARCHITECTURES[name]
    prefix = f"{name}."
    values = {key.removeprefix(prefix): value for key, value in keys.items() if key.startswith(prefix)}
    metadata = Metadata(name, values, {tensor.name: tensor for tensor in model.tensors})
    known = architecture.known_keys()
    if problems := [*metadata.wrong_numbers(known), *weights.wrong_ranks(architecture, metadata)]:
        raise ModelError(f"cannot be read:\n{listing(problems)}")
    problems = [f"{prefix}{key} is missing" for key in (*REQUIRED, *architecture.keys) if key not in values]
    problems += [
        f"{prefix}{key} = {value!r} is not understood"
        for key, value in values.items()
        if isinstance(value, list) or (key not in known and value not in (0, None, NEUTRAL.get(key)))
    ]
    problems += weights.problems(architecture, metadata)
    if problems:
        raise ModelError(f"cannot be read:\n{listing(problems)}")
    return architecture, metadata
