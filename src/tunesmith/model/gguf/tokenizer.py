"""The tokenizer of a GGUF file, from its metadata: byte-level BPE, or a SentencePiece vocabulary with scores.

Unigram, WordPiece and other kinds are refused."""

from __future__ import annotations

from collections import Counter
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, processors

from tunesmith.errors import ModelError
from tunesmith.model.gguf.pretokenizers import PRETOKENIZERS

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
"""Values of tokenizer.ggml.token_type."""
PROBE = "Hello, world! It's 2026:\n\n\tdef f(x):  return {'a': [1, 23, 456]}  # äöü, 日本語, \U0001f642"
KEEPING_SPACE = ("<unk>", "<s>", "<|endoftext|>")
"""Tokens of Phi 3 that do not swallow the white space after them, as its other special tokens do."""


def build_tokenizer(metadata: dict[str, Any]) -> tuple[Tokenizer, dict[str, Any]]:
    """The tokenizer of the metadata, and the values of tokenizer_config.json.

    Raises ModelError if its kind or its pre-tokenizer is not known, or if it does not reproduce a probe
    text."""
    given = {key.removeprefix("tokenizer.ggml."): value for key, value in metadata.items()}
    kind, tokens = given.get("model"), given.get("tokens")
    if kind not in ("gpt2", "llama"):
        raise ModelError(f"tokenizer.ggml.model is {kind!r}", hint="gpt2 (BPE) and llama can be read")
    if not tokens:
        hint = "the file holds no vocabulary: give the folder of the original model"
        raise ModelError("tokenizer.ggml.tokens is missing", hint=hint)
    vocab = {token: index for index, token in enumerate(tokens)}
    if len(vocab) != len(tokens):
        repeated = [token for token, count in Counter(tokens).items() if count > 1]
        raise ModelError(f"tokens listed twice: {', '.join(map(repr, repeated[:5]))}")
    kinds = _of_length(given, "token_type", len(tokens)) or [NORMAL] * len(tokens)
    tokenizer = _byte_level(given, vocab) if kind == "gpt2" else _sentencepiece(given, vocab, kinds)
    phi3 = metadata.get("general.architecture") == "phi3" and kind == "llama"
    tokenizer.add_tokens(
        [
            AddedToken(
                token,
                normalized=False,
                special=token_kind != USER_DEFINED,
                rstrip=phi3 and token not in KEEPING_SPACE,
            )
            for token, token_kind in zip(tokens, kinds, strict=True)
            if token_kind in (CONTROL, UNKNOWN, USER_DEFINED)
        ]
    )
    roles = _roles(given, tokens)
    _mark_ends(tokenizer, given, vocab, roles)
    decoded = tokenizer.decode(
        tokenizer.encode(PROBE, add_special_tokens=False).ids, skip_special_tokens=False
    )
    if decoded != PROBE:
        message = "the tokenizer in the file does not reproduce a probe text"
        raise ModelError(message, hint=f"read as {decoded!r}")
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False, **roles}
    return tokenizer, settings | _chat_templates(metadata)


def _of_length(given: dict[str, Any], key: str, length: int) -> list[Any] | None:
    """The list under ``key``, one value a token; None if it is not there."""
    values = given.get(key)
    if values is not None and len(values) != length:
        raise ModelError(f"tokenizer.ggml.{key} has {len(values)} values, tokenizer.ggml.tokens {length}")
    return values


def _roles(given: dict[str, Any], tokens: list[str]) -> dict[str, str]:
    """The tokens that begin and end a text, stand for unknown text, and pad a batch."""
    names = {"bos": "bos", "eos": "eos", "unknown": "unk", "padding": "pad"}
    roles = {}
    for key, name in names.items():
        index = given.get(f"{key}_token_id")
        if index is not None and not index < len(tokens):
            raise ModelError(f"tokenizer.ggml.{key}_token_id is {index}, there are {len(tokens)} tokens")
        if index is not None:
            roles[f"{name}_token"] = tokens[index]
    return roles


def _mark_ends(
    tokenizer: Tokenizer, given: dict[str, Any], vocab: dict[str, int], roles: dict[str, str]
) -> None:
    """Put BOS before a text and EOS after it, if the file says so. llama.cpp puts BOS before the text of a
    SentencePiece vocabulary that says nothing."""
    bos, eos = roles.get("bos_token"), roles.get("eos_token")
    before = [bos] if bos and given.get("add_bos_token", given["model"] == "llama") else []
    after = [eos] if eos and given.get("add_eos_token", False) else []
    if before or after:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=[*before, "$A", *after],
            special_tokens=[(token, vocab[token]) for token in dict.fromkeys(before + after)],
        )


def _chat_templates(metadata: dict[str, Any]) -> dict[str, Any]:
    templates = [
        {"name": key.removeprefix("tokenizer.chat_template").lstrip(".") or "default", "template": text}
        for key, text in metadata.items()
        if key.startswith("tokenizer.chat_template") and isinstance(text, str)
    ]
    if not templates:
        return {}
    return {"chat_template": templates if len(templates) > 1 else templates[0]["template"]}


def _byte_level(given: dict[str, Any], vocab: dict[str, int]) -> Tokenizer:
    name = given.get("pre")
    if name not in PRETOKENIZERS:
        hint = (
            f"known ones: {', '.join(PRETOKENIZERS)}; another would give other tokens than the model was"
            " trained on, so give the folder of the original model"
        )
        raise ModelError(f"tokenizer.ggml.pre is {name!r}: its pre-tokenizer is not known", hint=hint)
    pretokenizer = PRETOKENIZERS[name]
    merges = [tuple(merge.split(" ", 1)) for merge in given.get("merges") or ()]
    if not merges:
        raise ModelError("tokenizer.ggml.merges is missing")
    try:
        tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges, ignore_merges=pretokenizer.whole))
    except Exception as error:  # tokenizers raises plain Exception for a merge that is not in the vocabulary
        raise ModelError(f"tokenizer.ggml.merges cannot be used: {error}") from error
    tokenizer.pre_tokenizer = pretokenizer.build()
    if pretokenizer.nfc:
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _sentencepiece(given: dict[str, Any], vocab: dict[str, int], kinds: list[int]) -> Tokenizer:
    """BPE whose merges are ordered by the score of what they make. Of two pairs that make the same token the
    one with the longer left part comes first: SentencePiece takes the leftmost pair, which in a run of equal
    characters such as spaces has the token on its left that was made before."""
    scores = _of_length(given, "scores", len(vocab)) or [-float(index) for index in range(len(vocab))]
    usable = {token for token, index in vocab.items() if kinds[index] in (NORMAL, USER_DEFINED)}
    merges = [
        (token[:cut], token[cut:])
        for token in usable
        for cut in range(1, len(token))
        if {token[:cut], token[cut:]} <= usable
    ]
    merges.sort(
        key=lambda pair: (
            -scores[vocab[pair[0] + pair[1]]],
            -len(pair[0]),
            -len(pair[1]),
            vocab[pair[0]],
            vocab[pair[1]],
        )
    )
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
