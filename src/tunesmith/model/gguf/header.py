"""The texts in the header of a GGUF file, without reading its arrays."""

from __future__ import annotations

import os
import struct
from pathlib import Path

from tunesmith.errors import ModelError

STRING, ARRAY = 8, 9
"""Types of values whose size is in the file."""
SIZES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
"""Bytes of a value of the other types."""


def texts(path: Path) -> dict[str, str]:
    """The texts of the header, such as ``general.license``; takes milliseconds. Raises ModelError if the
    header is damaged."""

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
