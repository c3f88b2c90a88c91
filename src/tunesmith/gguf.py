"""A GGUF file of the llama family as a model folder: config.json, model.safetensors, tokenizer files.

Follows the GGUF specification and the conventions of llama.cpp's converter: rows of q and k are interleaved for its
rotary embedding, an absent ``output.weight`` means tied embeddings, the tokenizer lies in the metadata. Tensors are
dequantised one at a time, so memory holds one of them. What cannot be read exactly is refused by name. The folder is
kept in the cache under the hash of the file and is complete or absent, never half-written.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import struct
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from tunesmith import events
from tunesmith.errors import ModelError, listing
from tunesmith.events import Notice, Sink

if TYPE_CHECKING:
    from gguf import GGUFReader
    from tokenizers import Tokenizer

CONVERTER = 1
"""Part of the cache key: goes up when the same file would be converted to something else."""

ARCHITECTURES = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM"}
TENSOR_TYPES = frozenset("F32 F16 BF16 Q4_0 Q4_1 Q5_0 Q5_1 Q8_0 Q2_K Q3_K Q4_K Q5_K Q6_K IQ4_NL IQ4_XS".split())
# Keys under the architecture's name. Any other could change what the model computes.
KEYS = frozenset(
    "block_count context_length embedding_length feed_forward_length attention.head_count attention.head_count_kv "
    "attention.layer_norm_rms_epsilon attention.key_length attention.value_length rope.freq_base rope.dimension_count "
    "rope.scaling.type rope.scaling.factor rope.scaling.original_context_length rope.scaling.finetuned "
    "rope.scale_linear vocab_size tensor_data_layout".split()
)  # fmt: skip
ROPE = "rope_freqs.weight"
TOP = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
BLOCK = {
    "attn_norm": "input_layernorm", "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj", "attn_output": "self_attn.o_proj", "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj",
}  # fmt: skip

_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# tokenizer.ggml.pre -> (how text is cut before merging, is a whole piece looked up first). None: GPT-2's own cut.
SPLITS: dict[str, tuple[str | None, bool]] = {
    "gpt-2": (None, False),
    "smollm": (None, False),
    "llama-bpe": (_LLAMA3, True),
    "qwen2": (_LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}"), False),
    "tekken": (_TEKKEN, True),
}
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)  # tokenizer.ggml.token_type
PROBE = "Hello, world! It's 2026:\n\n\tdef f(x):  return {'a': [1, 23, 456]}  # äöü, 日本語, \U0001f642"


def cache_root() -> Path:
    """Where converted models are kept: ``$TUNESMITH_CACHE``, else ``~/.cache/tunesmith``."""
    return Path(os.environ.get("TUNESMITH_CACHE") or Path.home() / ".cache" / "tunesmith")


def convert(path: Path, dtype: str, notify: Sink = events.silent) -> Path:
    """The model folder of a GGUF file, from the cache or made now.

    dtype: float32, float16 or bfloat16, of all tensors; or auto: the file's own where its matrices are bfloat16 or
    float32, float16 otherwise. Raises ModelError where anything in the file cannot be read exactly.
    """
    digest = file_hash(path)
    parent = cache_root() / "gguf"
    name = f"{path.stem}-{digest[:16]}-{dtype}-{CONVERTER}"
    if (parent / name).is_dir():
        notify(Notice(f"GGUF {path.name}: converted before, read from {parent / name}"))
        return parent / name
    parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{name}-", dir=parent))
    try:
        types = _write(path, temporary, dtype)
        try:
            temporary.rename(parent / name)
        except OSError:
            if not (parent / name).is_dir():  # else another process was faster
                raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    notify(Notice(f"GGUF {path.name}: converted to {parent / name} ({types})"))
    return parent / name


def file_hash(path: Path) -> str:
    """sha256 of the whole file, hex."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _write(path: Path, folder: Path, dtype: str) -> str:
    """Everything of the file into ``folder``. Returns the tensor types and how many there are of each."""
    reader = _open(path)
    metadata = {name: field.contents() for name, field in reader.fields.items()}
    types = Counter(tensor.tensor_type.name for tensor in reader.tensors)
    config = _config(path, metadata, reader)
    tokenizer, settings = build_tokenizer(path, metadata)
    if tokenizer.get_vocab_size() > config["vocab_size"]:
        raise ModelError(
            f"{tokenizer.get_vocab_size()} tokens but only {config['vocab_size']} rows in token_embd.weight", where=str(path)
        )
    if dtype == "auto":
        matrices = {tensor.tensor_type.name for tensor in reader.tensors if len(tensor.shape) > 1}
        dtype = {"BF16": "bfloat16", "F32": "float32"}.get(matrices.pop() if len(matrices) == 1 else "", "float16")
    ends = [metadata[key] for key in ("tokenizer.ggml.eos_token_id", "tokenizer.ggml.eot_token_id") if key in metadata]
    ends = list(dict.fromkeys(int(end) for end in ends))
    generation = {"eos_token_id": ends[0] if len(ends) == 1 else ends} if ends else {}
    if "tokenizer.ggml.bos_token_id" in metadata:
        generation["bos_token_id"] = int(metadata["tokenizer.ggml.bos_token_id"])
    _write_weights(path, reader, config, folder / "model.safetensors", dtype)
    _write_json(folder / "config.json", config | generation | {"dtype": dtype})
    _write_json(folder / "generation_config.json", generation)
    _write_json(folder / "tokenizer.json", json.loads(tokenizer.to_str()))
    _write_json(folder / "tokenizer_config.json", settings)
    return ", ".join(f"{count} {name}" for name, count in types.most_common())


def _open(path: Path) -> GGUFReader:
    from gguf import GGUFReader

    try:
        reader = GGUFReader(path)
    except (ValueError, IndexError, KeyError, TypeError, OverflowError, MemoryError) as error:
        raise ModelError(
            f"is not a whole GGUF file that can be read: {error}",
            where=str(path), hint="it may be cut short or of a newer version; compare its size with the source's",
        ) from error  # fmt: skip
    if (reader.endianess.name == "LITTLE") != (sys.byteorder == "little"):
        raise ModelError(f"is a {reader.endianess.name.lower()}-endian GGUF file", where=str(path))
    return reader


def _config(path: Path, metadata: dict[str, Any], reader: GGUFReader) -> dict[str, Any]:
    """The values of config.json. Raises ModelError listing all that is not understood."""
    architecture = metadata.get("general.architecture")
    if architecture not in ARCHITECTURES:
        raise ModelError(
            f"GGUF of architecture {architecture!r}", where=str(path),
            hint=f"these can be read: {', '.join(ARCHITECTURES)}; for others give the Hugging Face or MLX folder",
        )  # fmt: skip
    values = {key.removeprefix(architecture + "."): value for key, value in metadata.items()
              if key.startswith(architecture + ".")}  # fmt: skip
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    problems = [
        f"{architecture}.{key} = {value!r} is not understood"
        for key, value in values.items() if key not in KEYS and value not in (0, None)
    ] + [
        f"{architecture}.{key} differs from layer to layer"
        for key, value in values.items() if key in KEYS and isinstance(value, list)
    ]  # fmt: skip
    problems += [f"{t.name} has type {t.tensor_type.name}" for t in reader.tensors
                 if t.tensor_type.name not in TENSOR_TYPES]  # fmt: skip
    problems += [f"tensor {name} is not understood" for name in tensors if not _name(name) and name != ROPE]
    needed = ("block_count", "embedding_length", "feed_forward_length", "attention.head_count",
              "attention.layer_norm_rms_epsilon")  # fmt: skip
    problems += [f"{architecture}.{key} is missing" for key in needed if key not in values]
    problems += [] if "token_embd.weight" in tensors else ["tensor token_embd.weight is missing"]
    if problems:
        raise ModelError(f"cannot be read:\n{listing(problems)}", where=str(path))
    heads, width = int(values["attention.head_count"]), int(values["embedding_length"])
    head = int(values.get("attention.key_length", width // heads))
    for key in ("attention.value_length", "rope.dimension_count"):
        if int(values.get(key, head)) != head:
            raise ModelError(f"{architecture}.{key} is {values[key]}, a head has {head}", where=str(path))
    return {
        "architectures": [ARCHITECTURES[architecture]],
        "model_type": architecture,
        "hidden_size": width,
        "num_hidden_layers": int(values["block_count"]),
        "intermediate_size": int(values["feed_forward_length"]),
        "num_attention_heads": heads,
        "num_key_value_heads": int(values.get("attention.head_count_kv", heads)),
        "head_dim": head,
        "rms_norm_eps": round(float(values["attention.layer_norm_rms_epsilon"]), 12),  # 9.99999974e-06 is 1e-5
        "max_position_embeddings": int(values.get("context_length", 2048)),
        "rope_theta": float(values.get("rope.freq_base", 10000.0)),
        "rope_scaling": _rope_scaling(path, values, tensors, head),
        "attention_bias": "blk.0.attn_q.bias" in tensors,
        "mlp_bias": "blk.0.ffn_up.bias" in tensors,
        "hidden_act": "silu",
        "tie_word_embeddings": "output.weight" not in tensors,
        "vocab_size": int(tensors["token_embd.weight"].shape[1]),
    }


def _rope_scaling(path: Path, values: dict[str, Any], tensors: dict[str, Any], head: int) -> dict[str, Any] | None:
    kind = values.get("rope.scaling.type", "linear" if "rope.scale_linear" in values else "none")
    factor = float(values.get("rope.scaling.factor", values.get("rope.scale_linear", 1.0)))
    original = int(values.get("rope.scaling.original_context_length", 8192))
    if ROPE in tensors:  # Llama 3.1: the factors of all frequencies, already worked out
        given = np.asarray(tensors[ROPE].data, np.float32).ravel()
        scaling = {"rope_type": "llama3", "factor": float(given.max()), "low_freq_factor": 1.0,
                   "high_freq_factor": 4.0, "original_max_position_embeddings": original}  # fmt: skip
        wave = 2 * np.pi * float(values.get("rope.freq_base", 10000.0)) ** (np.arange(0, head, 2) / head)
        smooth = np.clip((original / wave - 1.0) / 3.0, 0.0, 1.0)
        expected = 1.0 / ((1.0 - smooth) / scaling["factor"] + smooth)
        if given.shape != expected.shape or not np.allclose(given, expected, rtol=1e-3):
            raise ModelError(f"{ROPE} does not follow Llama 3.1's rule", where=str(path))
        return scaling
    if kind == "none" or (kind == "linear" and factor == 1.0):
        return None
    if kind == "linear":
        return {"rope_type": "linear", "factor": factor}
    if kind == "yarn" and "rope.scaling.original_context_length" in values:
        return {"rope_type": "yarn", "factor": factor, "original_max_position_embeddings": original}
    raise ModelError(f"rope.scaling.type {kind!r} cannot be read", where=str(path), hint="none, linear and yarn can")


def _name(name: str) -> str | None:
    """The Hugging Face name of a GGUF tensor."""
    if found := re.fullmatch(r"(?:blk\.(\d+)\.)?(\w+)\.(weight|bias)", name):
        layer, part, suffix = found.groups()
        target = TOP.get(part) if layer is None else BLOCK.get(part)
        if target is not None:
            return f"{target}.{suffix}" if layer is None else f"model.layers.{int(layer)}.{target}.{suffix}"
    return None


def _write_weights(path: Path, reader: GGUFReader, config: dict[str, Any], target: Path, dtype: str) -> None:
    """One safetensors file: an 8-byte length, a JSON header, the tensors in the order of the header."""
    from gguf import GGMLQuantizationType, quants

    size, code = {"float32": (4, "F32"), "float16": (2, "F16"), "bfloat16": (2, "BF16")}[dtype]
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    tensors = [tensor for tensor in reader.tensors if _name(tensor.name)]
    for tensor in tensors:
        shape = [int(n) for n in reversed(tensor.shape)]
        length = size * int(np.prod(shape))
        entries[_name(tensor.name) or ""] = {"dtype": code, "shape": shape, "data_offsets": [at, at + length]}
        at += length
    free = shutil.disk_usage(target.parent).free
    if free < at + (64 << 20):
        raise ModelError(
            f"converted weights take {at / 1e9:.1f} GB, {free / 1e9:.1f} GB are free", where=str(target.parent),
            hint="set TUNESMITH_CACHE to a folder on a larger disk",
        )  # fmt: skip
    header = json.dumps(entries).encode()
    header += b" " * (-len(header) % 8)
    broken: list[str] = []
    with target.open("wb") as out:
        out.write(struct.pack("<Q", len(header)) + header)
        for tensor in tensors:
            array = quants.dequantize(tensor.data, tensor.tensor_type).astype(np.float32, copy=False)
            if config["model_type"] == "llama" and (part := re.search(r"\.attn_([qk])\.", tensor.name)):
                heads = config["num_attention_heads" if part[1] == "q" else "num_key_value_heads"]
                array = _uninterleave(path, tensor.name, array, heads, config["head_dim"])
            stored = array.astype(np.float16) if dtype == "float16" else array
            if not np.isfinite(stored).all():
                broken.append(tensor.name)
            if dtype == "bfloat16":
                stored = quants.quantize(array, GGMLQuantizationType.BF16)
            out.write(np.ascontiguousarray(stored).tobytes())
        out.flush()
        os.fsync(out.fileno())
    if broken:
        raise ModelError(f"values that are not finite as {dtype} in:\n{listing(broken)}", where=str(path))


def _uninterleave(path: Path, name: str, array: np.ndarray, heads: int, head: int) -> np.ndarray:
    """(heads · head, …) from llama.cpp's order, pairs (i, i + head/2) side by side, to Hugging Face's halves."""
    if array.shape[0] != heads * head:
        raise ModelError(f"{name} has {array.shape[0]} rows, {heads} heads of {head} expected", where=str(path))
    return array.reshape(heads, head // 2, 2, -1).swapaxes(1, 2).reshape(array.shape)


def _write_json(path: Path, value: object) -> None:
    with path.open("w", encoding="utf-8") as out:
        json.dump(value, out, ensure_ascii=False, indent=1)
        out.flush()
        os.fsync(out.fileno())


def build_tokenizer(path: Path, metadata: dict[str, Any]) -> tuple[Tokenizer, dict[str, Any]]:
    """The tokenizer of the metadata, and the values of tokenizer_config.json.

    Raises ModelError where its kind or its way of cutting text is not known, or where it cannot spell a probe text.
    """
    from tokenizers import AddedToken, processors

    def get(key: str, default: Any = None) -> Any:
        return metadata.get(f"tokenizer.ggml.{key}", default)

    kind, tokens = get("model"), get("tokens")
    if kind not in ("gpt2", "llama") or not tokens:
        raise ModelError(f"tokenizer.ggml.model is {kind!r}", where=str(path), hint="gpt2 (BPE) and llama can be read")
    vocab = {token: index for index, token in enumerate(tokens)}
    if len(vocab) != len(tokens):
        twice = [token for token, count in Counter(tokens).items() if count > 1]
        raise ModelError(f"tokens listed twice: {', '.join(map(repr, twice[:5]))}", where=str(path))
    kinds = get("token_type") or [NORMAL] * len(tokens)
    tokenizer = _byte_level(path, get, vocab) if kind == "gpt2" else _sentencepiece(get, vocab, kinds)
    special = [t for t, k in zip(tokens, kinds, strict=True) if k in (CONTROL, UNKNOWN)]
    plain = [t for t, k in zip(tokens, kinds, strict=True) if k == USER_DEFINED]
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in special])
    tokenizer.add_tokens([AddedToken(token, normalized=False) for token in plain])

    named = {"bos_token": "bos_token_id", "eos_token": "eos_token_id", "unk_token": "unknown_token_id",
             "pad_token": "padding_token_id"}  # fmt: skip
    roles = {role: tokens[int(get(key))] for role, key in named.items() if get(key) is not None}
    # llama.cpp adds BOS to a SentencePiece vocabulary that says nothing, and EOS to none.
    edges = {
        "bos_token": bool(get("add_bos_token", kind == "llama")) and "bos_token" in roles,
        "eos_token": bool(get("add_eos_token", False)) and "eos_token" in roles,
    }
    if any(edges.values()):
        before = f"{roles['bos_token']} " if edges["bos_token"] else ""
        after = f" {roles['eos_token']}" if edges["eos_token"] else ""
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{before}$A{after}",
            pair=f"{before}$A {before}$B{after}",
            special_tokens=[(roles[role], vocab[roles[role]]) for role, used in edges.items() if used],
        )
    ids = tokenizer.encode(PROBE, add_special_tokens=False).ids
    if tokenizer.decode(ids, skip_special_tokens=False) != PROBE:
        raise ModelError(
            "the tokenizer in the file does not spell a probe text back", where=str(path),
            hint=f"read as {tokenizer.decode(ids, skip_special_tokens=False)!r}",
        )  # fmt: skip
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False, **roles}
    if isinstance(template := metadata.get("tokenizer.chat_template"), str):
        more = {key.removeprefix("tokenizer.chat_template."): value for key, value in metadata.items()
                if key.startswith("tokenizer.chat_template.")}  # fmt: skip
        named_templates = [{"name": name, "template": text} for name, text in {"default": template, **more}.items()]
        settings["chat_template"] = named_templates if more else template
    return tokenizer, settings


def _byte_level(path: Path, get: Any, vocab: dict[str, int]) -> Tokenizer:
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

    pre = get("pre")
    if pre not in SPLITS:
        raise ModelError(
            f"tokenizer.ggml.pre is {pre!r}: how its text is cut before merging is not known", where=str(path),
            hint=f"these are: {', '.join(SPLITS)}; others would give other tokens than the model was trained on",
        )  # fmt: skip
    cut, whole = SPLITS[pre]
    merges = [tuple(merge.split(" ", 1)) for merge in get("merges") or ()]
    if not merges:
        raise ModelError("tokenizer.ggml.merges is missing", where=str(path))
    try:
        model = models.BPE(vocab=vocab, merges=merges, ignore_merges=whole)
    except Exception as error:  # tokenizers raises plain Exception for a merge that is not in the vocabulary
        raise ModelError(f"tokenizer.ggml.merges cannot be used: {error}", where=str(path)) from error
    tokenizer = Tokenizer(model)
    level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=cut is None)
    first = {"gpt-2": [], "smollm": [pre_tokenizers.Digits(individual_digits=True)]}
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [*(first[pre] if cut is None else [pre_tokenizers.Split(Regex(cut), behavior="isolated")]), level]
    )
    if pre == "qwen2":
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _sentencepiece(get: Any, vocab: dict[str, int], kinds: list[int]) -> Tokenizer:
    """BPE whose merges are ordered by the score of what they make, as SentencePiece does."""
    from tokenizers import Tokenizer, decoders, models, normalizers

    scores = get("scores") or [-float(index) for index in range(len(vocab))]
    usable = {token for token, index in vocab.items() if kinds[index] in (NORMAL, USER_DEFINED)}
    merges: list[tuple[float, int, int, tuple[str, str]]] = []
    for token in usable:
        for cut in range(1, len(token)):
            left, right = token[:cut], token[cut:]
            if left in usable and right in usable:
                merges.append((-scores[vocab[token]], vocab[left], vocab[right], (left, right)))
    merges.sort()
    unknown = next((token for token, index in vocab.items() if kinds[index] == UNKNOWN), None)
    tokenizer = Tokenizer(
        models.BPE(vocab=vocab, merges=[pair for *_, pair in merges], unk_token=unknown, fuse_unk=True,
                   byte_fallback=BYTE in kinds)
    )  # fmt: skip
    prefix = bool(get("add_space_prefix", True))
    space = normalizers.Replace(" ", "▁")
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), space]) if prefix else space
    parts = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence([*parts, decoders.Strip(" ", 1, 0)] if prefix else parts)
    return tokenizer
