"""The tokenizer of a model folder as values of a GGUF header: the inverse of `tokenizer.build_tokenizer`.

The name of the pre-tokenizer is the one whose cuts are those of the model's own. Scores that tokenizer.json
does not have follow from the order of its merges."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

from tokenizers import normalizers

from tunesmith.errors import ModelError
from tunesmith.model.gguf.architectures import Value, Values
from tunesmith.model.gguf.pretokenizers import PRETOKENIZERS
from tunesmith.model.gguf.tokenizer import (
    BYTE,
    CONTROL,
    NORMAL,
    PROBE,
    UNKNOWN,
    UNUSED,
    USER_DEFINED,
    build_tokenizer,
)

PREFIX = "tokenizer.ggml."
INSTRUCTION = "[INST]"
"""Token 3 of Mistral v3. Its templates write the space before words, which llama.cpp would write once more
after each control token."""
CUT_PROBES = (
    PROBE,
    "\n \n\n \n\n\n \t \t\t \t\n  \n   \n    \n     \n🚀 (normal) ✅ 🦙🦙 3 33 333 3333 33333 3.3 3..3",
    "нещо на Български ''''''```````\"\"\"\"......!!!!!!?????? I've been 'told he's there, 'RE you sure?",
    "We'Ve a'lL; HTTPServer camelCase ÉCOLE naïve Straße 日本語テキスト 한국어 ไทย हिन्दी ٣٤ ½",
    "e\u0301 \u00a0\u3000x \r\n a_b def f(x):\n    return {'a': [1]}  # c\n\n\nhttps://a.b/c?d=1&e=2",
    "$5+<=>^~|`\\ //*** ------======= 'M not sure I'll make it, 'D you like tea?",
)
"""Texts that pre-tokenizers cut differently."""


def tokenizer_values(folder: Path, n_tokens: int, ends: Sequence[int]) -> Values:
    """The values of the tokenizer in ``folder``, for an embedding of ``n_tokens`` rows.

    ends: the tokens that end an answer; the first becomes the end token. Raises ModelError if the header
    cannot express the tokenizer."""
    if not (folder / "tokenizer.json").is_file():
        values = _of_sentencepiece(folder)
        roles: dict[str, int | None] = {}
    else:
        values, roles = _of_folder(folder)
    values |= {f"{key}_token_id": token for key, token in roles.items() if token is not None}
    for key, token in zip(("eos", "eot", "eom"), ends, strict=False):
        values[f"{key}_token_id"] = token
    _fill(values, n_tokens)
    return {_key(key): value for key, value in values.items()}


def _key(name: str) -> str:
    return name if name.startswith("tokenizer.") else PREFIX + name


def _fill(values: Values, n_tokens: int) -> None:
    """Name the rows of the embedding that the tokenizer does not use."""
    tokens, kinds = cast(list[str], values["tokens"]), cast(list[int], values["token_type"])
    if len(tokens) > n_tokens:
        message = f"the tokenizer has {len(tokens)} tokens, the embedding {n_tokens} rows"
        raise ModelError(message, hint="model.resize_embeddings: true adds rows")
    padding = [f"[PAD{number}]" for number in range(len(tokens), n_tokens)]
    values["tokens"], values["token_type"] = tokens + padding, kinds + [UNUSED] * len(padding)
    if "scores" in values:
        values["scores"] = cast(list[float], values["scores"]) + [-1e6] * len(padding)


def _of_folder(folder: Path) -> tuple[Values, dict[str, int | None]]:
    from transformers import AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
    backend = tokenizer.backend_tokenizer
    content = json.loads(backend.to_str())
    model = content["model"]
    if model["type"] != "BPE":
        raise ModelError(f"the tokenizer is of type {model['type']}, GGUF files are written with BPE")
    tokens, kinds = _tokens(tokenizer, bool(model.get("byte_fallback")))
    values: Values = {"tokens": tokens, "token_type": kinds}
    if model.get("byte_fallback"):
        values |= _scored(folder, content, tokens, kinds)
    else:
        values |= {"model": "gpt2", "merges": _merges(model), "pre": _pre_tokenizer(backend, model)}
    plain = tokenizer.encode("a", add_special_tokens=False)
    opened = tokenizer.encode("a")
    bos = tokenizer.bos_token_id
    values["add_bos_token"] = bos is not None and opened[:1] == [bos] and plain[:1] != [bos]
    values["add_eos_token"] = False
    values |= _templates(tokenizer.chat_template)
    roles = {
        "bos": bos,
        "eos": tokenizer.eos_token_id,
        "unknown": tokenizer.unk_token_id,
        "padding": tokenizer.pad_token_id,
    }
    return values, roles


def _tokens(tokenizer: Any, has_unknown: bool) -> tuple[list[str], list[int]]:
    """All tokens in the order of their ids, and their types. has_unknown: a token stands for unknown text."""
    by_id = {index: token for token, index in tokenizer.get_vocab().items()}
    added = tokenizer.added_tokens_decoder
    by_id |= {index: token.content for index, token in added.items()}
    size = max(by_id) + 1
    unknown = tokenizer.unk_token_id if has_unknown else None
    tokens = [by_id.get(index, f"[PAD{index}]") for index in range(size)]
    kinds: list[int] = []
    for index, token in enumerate(tokens):
        if index not in by_id:
            kinds.append(UNUSED)
        elif index == unknown:
            kinds.append(UNKNOWN)
        elif index in added:
            kinds.append(CONTROL if added[index].special else USER_DEFINED)
        else:
            kinds.append(BYTE if _is_byte(token) else NORMAL)
    return tokens, kinds


def _is_byte(token: str) -> bool:
    return len(token) == 6 and token.startswith("<0x") and token.endswith(">")


def _merges(model: dict[str, Any]) -> list[str]:
    return [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]


def _pre_tokenizer(backend: Any, model: dict[str, Any]) -> str:
    """The name of the pre-tokenizer. Raises ModelError if no known one cuts as this one."""
    if backend.pre_tokenizer is None:
        raise ModelError("the tokenizer has no pre-tokenizer, and llama.cpp has no name for that")
    nfc = isinstance(backend.normalizer, normalizers.NFC)
    cuts = [_cuts(backend.pre_tokenizer, text) for text in CUT_PROBES]
    if backend.normalizer is not None and not nfc:
        raise ModelError("the tokenizer normalises text in a way that GGUF files cannot say")
    equal = [
        name
        for name, known in PRETOKENIZERS.items()
        if [_cuts(known.build(), text) for text in CUT_PROBES] == cuts
    ]
    whole = bool(model.get("ignore_merges"))
    best = [name for name in equal if PRETOKENIZERS[name].whole == whole and PRETOKENIZERS[name].nfc == nfc]
    best = best or [name for name in equal if PRETOKENIZERS[name].whole == whole]
    if not best:
        raise ModelError("the tokenizer cuts text as no pre-tokenizer that llama.cpp knows by name")
    return best[0]


def _cuts(pre_tokenizer: Any, text: str) -> list[tuple[int, int]]:
    return [place for _, place in pre_tokenizer.pre_tokenize_str(text)]


def _scored(folder: Path, content: dict[str, Any], tokens: list[str], kinds: list[int]) -> Values:
    """The values of a SentencePiece vocabulary: the higher the score of a token, the earlier it is made."""
    model = content["model"]
    order: dict[str, int] = {}
    for rank, merge in enumerate(_merges(model)):
        order.setdefault(merge.replace(" ", ""), rank)
    last = len(order)
    scores = [-float(order.get(token, last + index)) for index, token in enumerate(tokens)]
    for index, (token, kind) in enumerate(zip(tokens, kinds, strict=True)):
        if kind == USER_DEFINED:
            scores[index], tokens[index] = -1000.0, token.replace("▁", " ")
    own = _pieces(folder / "tokenizer.model") if (folder / "tokenizer.model").is_file() else []
    for index, (piece, score, _) in enumerate(own):
        if index < len(tokens) and tokens[index] == piece and kinds[index] == NORMAL:
            scores[index] = score
    parts = json.dumps([content.get("normalizer"), content.get("pre_tokenizer")])
    prefix = '"Prepend"' in parts or '"prepend_scheme": "first"' in parts or '"always"' in parts
    prefix = prefix and tokens[3:4] != [INSTRUCTION]
    return {"model": "llama", "pre": "default", "scores": scores, "add_space_prefix": prefix}


def _of_sentencepiece(folder: Path) -> Values:
    """The values of a folder that has the file of SentencePiece alone."""
    names = ("tokenizer.model", "tokenizer.model.v3")
    file = next((folder / name for name in names if (folder / name).is_file()), None)
    if file is None:
        raise ModelError("there is neither tokenizer.json nor tokenizer.model", where=str(folder))
    pieces = _pieces(file)
    roles = {token: index for index, (token, _, _) in enumerate(pieces)}
    values: Values = {
        "model": "llama",
        "pre": "default",
        "tokens": [token for token, _, _ in pieces],
        "scores": [score for _, score, _ in pieces],
        "token_type": [kind for _, _, kind in pieces],
        "add_space_prefix": pieces[3][0] != INSTRUCTION,
        "add_bos_token": True,
        "add_eos_token": False,
    }
    for key, token in (("bos", "<s>"), ("eos", "</s>"), ("unknown", "<unk>")):
        if token in roles:
            values[f"{key}_token_id"] = roles[token]
    return values


def _pieces(file: Path) -> list[tuple[str, float, int]]:
    """Text, score and type of each token."""
    from sentencepiece import SentencePieceProcessor

    model: Any = SentencePieceProcessor(model_file=str(file))
    pieces: list[tuple[str, float, int]] = []
    for index in range(model.get_piece_size()):
        kind = NORMAL
        if model.is_unknown(index):
            kind = UNKNOWN
        elif model.is_control(index):
            kind = CONTROL
        elif model.is_byte(index):
            kind = BYTE
        elif model.is_unused(index):
            kind = UNUSED
        pieces.append((model.id_to_piece(index), model.get_score(index), kind))
    return pieces


def _templates(template: str | dict[str, str] | None) -> Values:
    if template is None:
        return {}
    templates = {"default": template} if isinstance(template, str) else template
    default = templates.get("default") or next(iter(templates.values()))
    values: Values = {"tokenizer.chat_template": default}
    others = {name: text for name, text in templates.items() if name != "default"}
    values |= {f"tokenizer.chat_template.{name}": text for name, text in others.items()}
    return values | ({"tokenizer.chat_templates": list(others)} if others else {})


def require_readable(values: dict[str, Value], architecture: str) -> None:
    """Raises ModelError if the values are not those of a tokenizer that can be read back."""
    build_tokenizer({"general.architecture": architecture, **values})
