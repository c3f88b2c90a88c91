"""Which bytes does each token add to a text?

Two notations of a vocabulary are read: byte-level BPE, where each byte stands as one printable character, and
sentencepiece's, where ``▁`` stands for a space and ``<0x0A>`` for a byte."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, cast

from tunesmith.errors import ModelError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")


def sentencepiece_bytes(piece: str) -> bytes:
    """Bytes of a token in sentencepiece's notation."""
    byte = _BYTE.fullmatch(piece)
    return bytes([int(byte[1], 16)]) if byte else piece.replace("▁", " ").encode()


def hugging_face_bytes(tokenizer: PreTrainedTokenizerBase, size: int) -> list[bytes]:
    """Bytes of the tokens 0 to ``size`` - 1; empty if there is no token of that id. Raises ModelError if the
    tokenizer has another notation."""
    own = cast(Any, tokenizer)
    kinds = _decoders(json.loads(own.backend_tokenizer.to_str())["decoder"]) if own.is_fast else []
    if "ByteLevel" in kinds:
        read = _byte_level_reader()
    elif "ByteFallback" in kinds or "Metaspace" in kinds:
        read = sentencepiece_bytes
    else:
        text = f"the bytes of this tokenizer's tokens are not known (decoder: {', '.join(kinds) or 'none'})"
        raise ModelError(text, hint="byte-level BPE and sentencepiece are known")
    added = {number: token.content.encode() for number, token in own.added_tokens_decoder.items()}
    names = own.convert_ids_to_tokens(range(size))
    return [
        added[number] if number in added else b"" if name is None else read(name)
        for number, name in enumerate(names)
    ]


def _decoders(decoder: dict[str, Any] | None) -> Sequence[str]:
    if decoder is None:
        return []
    return [decoder["type"], *(part["type"] for part in decoder.get("decoders", []))]


def _byte_level_reader() -> Callable[[str], bytes]:
    """Reads the notation of byte-level BPE: printable bytes of Latin-1 stand for themselves, the others, in
    order, for the characters from U+0100 on."""
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = [byte for byte in range(256) if byte not in printable]
    bytes_of = {chr(byte): byte for byte in printable} | {chr(256 + n): byte for n, byte in enumerate(others)}

    def read(name: str) -> bytes:
        if all(letter in bytes_of for letter in name):
            return bytes(bytes_of[letter] for letter in name)
        return name.encode()

    return read
