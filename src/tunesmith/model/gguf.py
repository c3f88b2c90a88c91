"""A GGUF file of the llama family as a model folder: config.json, model.safetensors, tokenizer files.

Follows the GGUF specification and the conventions of llama.cpp's converter. Tensors are dequantised one at a
time, so memory holds one of them. What cannot be read exactly is refused by name. The folder is kept in the
cache under the hash of the file and is complete or absent, never half-written."""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import shutil
import struct
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGMLQuantizationType, GGUFReader, quants
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from tunesmith import events
from tunesmith.errors import ModelError, listing
from tunesmith.events import Notice, Sink
from tunesmith.files import draft
from tunesmith.machine import backend

CONVERTER = 1  # part of the cache key: increased when the same file would be converted differently
ARCHITECTURES = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM"}
TENSOR_TYPES = frozenset(
    "F32 F16 BF16 Q4_0 Q4_1 Q5_0 Q5_1 Q8_0 Q2_K Q3_K Q4_K Q5_K Q6_K IQ4_NL IQ4_XS".split()
)
# Keys under the architecture's name. Any other could change what the model computes, unless its value is the
# neutral one.
REQUIRED = (
    "block_count embedding_length feed_forward_length attention.head_count attention.layer_norm_rms_epsilon"
).split()
OPTIONAL = (
    "context_length attention.head_count_kv attention.key_length attention.value_length rope.freq_base "
    "rope.dimension_count rope.scaling.original_context_length rope.scaling.finetuned "
    "vocab_size tensor_data_layout"
).split()
NEUTRAL = {"rope.scaling.type": "none", "rope.scaling.factor": 1.0, "rope.scale_linear": 1.0}
ROPE = "rope_freqs.weight"
TOP = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
BLOCK = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}

_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# tokenizer.ggml.pre -> (the pre-tokenizer, whether a whole piece is looked up first). None: GPT-2's own
# cut.
SPLITS: dict[str, tuple[str | None, bool]] = {
    "gpt-2": (None, False),
    "smollm": (None, False),
    "llama-bpe": (_LLAMA3, True),
    "qwen2": (_LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}"), False),
    "tekken": (_TEKKEN, True),
}
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)  # tokenizer.ggml.token_type
STRING, ARRAY = 8, 9  # kinds of values in the header; all others are of fixed size
SIZES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
PROBE = "Hello, world! It's 2026:\n\n\tdef f(x):  return {'a': [1, 23, 456]}  # äöü, 日本語, \U0001f642"


def convert(path: Path, dtype: str, notify: Sink = events.silent) -> Path:
    """The model folder of a GGUF file, from the cache or made now.

    The cache is `backend.cache_folder`. dtype: float32, float16 or bfloat16, of all tensors; or auto: the
    file's own where most matrices are bfloat16 or float32, float16 otherwise. Raises ModelError if anything
    in the file cannot be read exactly."""
    with path.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    target = backend.cache_folder() / "gguf" / f"{path.stem}-{digest[:16]}-{dtype}-{CONVERTER}"
    if target.is_dir():
        notify(Notice(f"GGUF {path.name}: converted before, read from {target}"))
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        with draft(target) as folder:
            folder.mkdir()
            types = _write(path, folder, dtype)
    except ModelError as error:
        error.where = error.where or str(path)
        raise
    except OSError:
        if not target.is_dir():  # else another process was faster
            raise
        return target
    notify(Notice(f"GGUF {path.name}: converted to {target} ({types})"))
    return target


def texts(path: Path) -> dict[str, str]:
    """The texts of the header, as ``general.license``, in milliseconds. Raises ModelError if the header is
    damaged."""

    def number(code: str) -> int:
        return struct.unpack(f"<{code}", stream.read(struct.calcsize(code)))[0]

    def value(kind: int) -> str | None:
        """The next value if it is a text; other values are skipped."""
        if kind == STRING:
            length = number("Q")
            if len(text := stream.read(length)) < length:
                raise ValueError("it is cut short")
            return text.decode("utf-8", "replace")
        inner, count = (number("I"), number("Q")) if kind == ARRAY else (kind, 1)
        if inner in SIZES:
            stream.seek(SIZES[inner] * count, os.SEEK_CUR)
        else:
            for _ in range(count):
                value(inner)

    try:
        with path.open("rb") as stream:
            if stream.read(4) != b"GGUF":
                raise ValueError("it does not begin with GGUF")
            stream.seek(12, os.SEEK_CUR)  # version, number of tensors
            fields = {str(value(STRING)): value(number("I")) for _ in range(number("Q"))}
    except (OSError, ValueError, OverflowError, MemoryError, RecursionError, struct.error) as error:
        raise ModelError(f"is not a GGUF file with a readable header: {error}", where=str(path)) from error
    return {key: text for key, text in fields.items() if text is not None}


def _write(path: Path, folder: Path, dtype: str) -> str:
    """Convert the file into ``folder``. Returns how many matrices there are of each type."""
    try:
        reader = GGUFReader(path)
    except (ValueError, IndexError, KeyError, TypeError, OverflowError, MemoryError) as error:
        hint = "it may be cut short or of a newer version; compare its size with the source's"
        raise ModelError(f"is not a complete, readable GGUF file: {error}", hint=hint) from error
    if reader.byte_order != "I":
        raise ModelError("is a GGUF file of the other byte order")
    metadata = {name: field.contents() for name, field in reader.fields.items()}
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    config = _config(metadata, tensors)
    tokenizer, settings = build_tokenizer(metadata)
    types = Counter(
        tensor.tensor_type.name for tensor in reader.tensors if len(tensor.shape) > 1
    ).most_common()
    if dtype == "auto":
        dtype = {"BF16": "bfloat16", "F32": "float32"}.get(types[0][0], "float16")
    ends = [
        metadata[key]
        for key in ("tokenizer.ggml.eos_token_id", "tokenizer.ggml.eot_token_id")
        if key in metadata
    ]
    config |= {"dtype": dtype, "eos_token_id": list(dict.fromkeys(ends)) or None}
    tensors.pop(ROPE, None)
    _write_weights(tensors, config, folder / "model.safetensors", dtype)
    (folder / "config.json").write_text(json.dumps(config, indent=1))
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=1))
    tokenizer.save(str(folder / "tokenizer.json"))
    return ", ".join(f"{count} {name}" for name, count in types)


def _config(metadata: dict[str, Any], tensors: dict[str, Any]) -> dict[str, Any]:
    """The values of config.json. Raises ModelError, which lists everything that is not understood."""
    architecture = metadata.get("general.architecture")
    if architecture not in ARCHITECTURES:
        hint = (
            f"these can be read: {', '.join(ARCHITECTURES)}; for others give the Hugging Face or MLX folder"
        )
        raise ModelError(f"GGUF of architecture {architecture!r}", hint=hint)
    prefix = f"{architecture}."
    values = {key.removeprefix(prefix): value for key, value in metadata.items() if key.startswith(prefix)}
    problems = [f"{prefix}{key} is missing" for key in REQUIRED if key not in values]
    problems += [
        f"{prefix}{key} = {value!r} is not understood"
        for key, value in values.items()
        if isinstance(value, list)
        or (key not in (*REQUIRED, *OPTIONAL) and value not in (0, None, NEUTRAL.get(key)))
    ]
    kinds = {name: tensor.tensor_type.name for name, tensor in tensors.items()}
    problems += [f"{name} has type {kind}" for name, kind in kinds.items() if kind not in TENSOR_TYPES]
    problems += [f"tensor {name} is not understood" for name in tensors if not _name(name) and name != ROPE]
    problems += [] if "token_embd.weight" in tensors else ["tensor token_embd.weight is missing"]
    if problems:
        raise ModelError(f"cannot be read:\n{listing(problems)}")
    heads, width = values["attention.head_count"], values["embedding_length"]
    head = values.get("attention.key_length", width // heads)
    for key in ("attention.value_length", "rope.dimension_count"):
        if values.get(key, head) != head:
            raise ModelError(f"{prefix}{key} is {values[key]}, a head has {head}")
    theta = float(values.get("rope.freq_base", 10000.0))
    return {
        "architectures": [ARCHITECTURES[architecture]],
        "model_type": architecture,
        "vocab_size": int(tensors["token_embd.weight"].shape[1]),
        "tie_word_embeddings": "output.weight" not in tensors,
        "hidden_size": width,
        "num_hidden_layers": values["block_count"],
        "intermediate_size": values["feed_forward_length"],
        "num_attention_heads": heads,
        "num_key_value_heads": values.get("attention.head_count_kv", heads),
        "head_dim": head,
        "rms_norm_eps": round(values["attention.layer_norm_rms_epsilon"], 12),  # 9.99999974e-06 is 1e-5
        "max_position_embeddings": values.get("context_length", 2048),
        "rope_theta": theta,
        "rope_scaling": _llama3_scaling(tensors[ROPE].data, theta, head) if ROPE in tensors else None,
        "attention_bias": "blk.0.attn_q.bias" in tensors,
        "mlp_bias": "blk.0.ffn_up.bias" in tensors,
    }


def _llama3_scaling(factors: np.ndarray, theta: float, head: int) -> dict[str, Any]:
    """The rule of Llama 3.1 that gives these factors of the (head / 2,) frequencies."""
    given, original = np.asarray(factors, np.float32).ravel(), 8192
    wave = 2 * np.pi * theta ** (np.arange(0, head, 2) / head)
    smooth = np.clip((original / wave - 1.0) / 3.0, 0.0, 1.0)
    expected = 1.0 / ((1.0 - smooth) / given.max() + smooth)
    if given.shape != expected.shape or not np.allclose(given, expected, rtol=1e-3):
        raise ModelError(f"{ROPE} does not follow Llama 3.1's rule")
    return {
        "rope_type": "llama3",
        "factor": float(given.max()),
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": original,
    }


def _name(name: str) -> str | None:
    """The Hugging Face name of a GGUF tensor."""
    match = re.fullmatch(r"(?:blk\.(\d+)\.)?(\w+)\.(weight|bias)", name)
    layer, part, suffix = match.groups() if match else (None, "", "")
    target = (
        f"model.layers.{layer}.{BLOCK[part]}" if layer and part in BLOCK else None if layer else TOP.get(part)
    )
    return target and f"{target}.{suffix}"


def _write_weights(tensors: dict[str, Any], config: dict[str, Any], target: Path, dtype: str) -> None:
    """One safetensors file: an 8-byte length, a JSON header, the tensors in the order of the header."""
    size, code = {"float32": (4, "F32"), "float16": (2, "F16"), "bfloat16": (2, "BF16")}[dtype]
    entries: dict[str | None, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, tensor in tensors.items():
        shape = [int(n) for n in reversed(tensor.shape)]
        start, end = end, end + size * math.prod(shape)
        entries[_name(name)] = {"dtype": code, "shape": shape, "data_offsets": [start, end]}
    free = shutil.disk_usage(target.parent).free
    if free < end + (64 << 20):
        message = f"converted weights take {end / 1e9:.1f} GB, {free / 1e9:.1f} GB are free"
        raise ModelError(message, hint="set TUNESMITH_CACHE to a folder on a larger disk")
    header = json.dumps(entries).encode()
    header += b" " * (-len(header) % 8)
    with target.open("wb") as out:
        out.write(len(header).to_bytes(8, "little") + header)
        for name, tensor in tensors.items():
            array = quants.dequantize(tensor.data, tensor.tensor_type).astype(np.float32, copy=False)
            if config["model_type"] == "llama" and (part := re.search(r"\.attn_([qk])\.", name)):
                heads, head = (
                    config["num_attention_heads" if part[1] == "q" else "num_key_value_heads"],
                    config["head_dim"],
                )
                if array.shape[0] != heads * head:
                    raise ModelError(f"{name} has {array.shape[0]} rows, {heads} heads of {head} expected")
                # llama.cpp has the pairs (i, i + head/2) side by side, Hugging Face has halves
                array = array.reshape(heads, head // 2, 2, -1).swapaxes(1, 2).reshape(array.shape)
            stored = array.astype(np.float16) if dtype == "float16" else array
            if not np.isfinite(stored).all():
                raise ModelError(f"{name} has values that are not finite as {dtype}")
            out.write(
                (
                    quants.quantize(array, GGMLQuantizationType.BF16) if dtype == "bfloat16" else stored
                ).tobytes()
            )


def build_tokenizer(metadata: dict[str, Any]) -> tuple[Tokenizer, dict[str, Any]]:
    """The tokenizer of the metadata, and the values of tokenizer_config.json.

    Raises ModelError if its kind or its pre-tokenizer is not known, or if it does not reproduce a probe
    text."""
    given = {key.removeprefix("tokenizer.ggml."): value for key, value in metadata.items()}
    kind, tokens = given.get("model"), given.get("tokens")
    if kind not in ("gpt2", "llama") or not tokens:
        raise ModelError(f"tokenizer.ggml.model is {kind!r}", hint="gpt2 (BPE) and llama can be read")
    vocab = {token: index for index, token in enumerate(tokens)}
    if len(vocab) != len(tokens):
        twice = [token for token, count in Counter(tokens).items() if count > 1]
        raise ModelError(f"tokens listed twice: {', '.join(map(repr, twice[:5]))}")
    kinds = given.get("token_type") or [NORMAL] * len(tokens)
    tokenizer = _byte_level(given, vocab) if kind == "gpt2" else _sentencepiece(given, vocab, kinds)
    tokenizer.add_tokens(
        [
            AddedToken(token, normalized=False, special=k != USER_DEFINED)
            for token, k in zip(tokens, kinds, strict=True)
            if k in (CONTROL, UNKNOWN, USER_DEFINED)
        ]
    )
    names = {"bos": "bos", "eos": "eos", "unknown": "unk", "padding": "pad"}
    roles = {
        f"{name}_token": tokens[given[f"{key}_token_id"]]
        for key, name in names.items()
        if f"{key}_token_id" in given
    }
    bos = roles.get("bos_token")
    if bos and given.get(
        "add_bos_token", kind == "llama"
    ):  # llama.cpp adds it to a SentencePiece vocabulary that says nothing
        tokenizer.post_processor = processors.TemplateProcessing(
            single=[bos, "$A"], special_tokens=[(bos, vocab[bos])]
        )
    back = tokenizer.decode(tokenizer.encode(PROBE, add_special_tokens=False).ids, skip_special_tokens=False)
    if back != PROBE:
        raise ModelError(
            "the tokenizer in the file does not reproduce a probe text", hint=f"read as {back!r}"
        )
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False, **roles}
    templates = [
        {"name": key.removeprefix("tokenizer.chat_template").lstrip(".") or "default", "template": text}
        for key, text in metadata.items()
        if key.startswith("tokenizer.chat_template") and isinstance(text, str)
    ]
    if templates:
        settings["chat_template"] = templates if len(templates) > 1 else templates[0]["template"]
    return tokenizer, settings


def _byte_level(given: dict[str, Any], vocab: dict[str, int]) -> Tokenizer:
    pre = given.get("pre")
    if pre not in SPLITS:
        hint = (
            f"known ones: {', '.join(SPLITS)}; another would give other tokens than the model was trained on"
        )
        raise ModelError(f"tokenizer.ggml.pre is {pre!r}: its pre-tokenizer is not known", hint=hint)
    pattern, whole = SPLITS[pre]
    merges = [tuple(merge.split(" ", 1)) for merge in given.get("merges") or ()]
    if not merges:
        raise ModelError("tokenizer.ggml.merges is missing")
    try:
        tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges, ignore_merges=whole))
    except Exception as error:  # tokenizers raises plain Exception for a merge that is not in the vocabulary
        raise ModelError(f"tokenizer.ggml.merges cannot be used: {error}") from error
    cuts: list[Any] = [pre_tokenizers.Digits(individual_digits=True)] if pre == "smollm" else []
    cuts += [pre_tokenizers.Split(Regex(pattern), behavior="isolated")] if pattern else []
    cuts.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=pattern is None))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(cuts)
    if pre == "qwen2":
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _sentencepiece(given: dict[str, Any], vocab: dict[str, int], kinds: list[int]) -> Tokenizer:
    """BPE whose merges are ordered by the score of what they make, as SentencePiece does."""
    scores = given.get("scores") or [-float(index) for index in range(len(vocab))]
    usable = {token for token, index in vocab.items() if kinds[index] in (NORMAL, USER_DEFINED)}
    merges = [
        (token[:cut], token[cut:])
        for token in usable
        for cut in range(1, len(token))
        if {token[:cut], token[cut:]} <= usable
    ]
    merges.sort(key=lambda pair: (-scores[vocab[pair[0] + pair[1]]], vocab[pair[0]], vocab[pair[1]]))
    unknown = next((token for token, index in vocab.items() if kinds[index] == UNKNOWN), None)
    tokenizer = Tokenizer(
        models.BPE(vocab=vocab, merges=merges, unk_token=unknown, fuse_unk=True, byte_fallback=BYTE in kinds)
    )
    prefix = given.get("add_space_prefix", True)
    space = normalizers.Replace(" ", "▁")
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), space]) if prefix else space
    parts = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence([*parts, decoders.Strip(" ", 1, 0)] if prefix else parts)
    return tokenizer
