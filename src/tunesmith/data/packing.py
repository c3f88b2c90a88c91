"""Compressed files as streams of bytes: gzip, bzip2, xz, Zstandard, and a zip archive of one file.

Which of them a file is, its first bytes say; its name may lie."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO, cast

from tunesmith.errors import DataError, SetupError

SUFFIXES = (".gz", ".bz2", ".xz", ".zst", ".zip")
TABLES = (".csv", ".tsv", ".parquet")
"""Endings of files that are not read through a compression."""
EXTRA = "pip install 'tunesmith[tables]'"


def opened(path: Path) -> BinaryIO:
    """The bytes of a file, without its compression; reading them raises DataError if it is damaged. Raises
    SetupError if a package is missing that can read it."""
    stream = path.open("rb")
    head = stream.peek(6)
    for magic, (name, opener) in _KINDS.items():
        if head.startswith(magic):
            stream.close()
            try:
                return cast(BinaryIO, io.BufferedReader(_Unpacked(opener(path), path, name)))
            except _DAMAGED as error:
                raise _damaged(path, name, error) from error
    return stream


def _zip(path: Path) -> BinaryIO:
    archive = zipfile.ZipFile(path)
    names = [
        member.filename
        for member in archive.infolist()
        if not member.is_dir() and not member.filename.startswith("__MACOSX/")
    ]
    if len(names) != 1:
        archive.close()
        text = f"is a zip archive of {len(names)} files"
        raise DataError(text, where=str(path), hint="unpack it and name its folder")
    if names[0].lower().endswith(TABLES):
        archive.close()
        raise DataError(f"holds a table ({names[0]})", where=str(path), hint="unpack it")
    if archive.getinfo(names[0]).flag_bits & 1:
        archive.close()
        raise DataError("is encrypted", where=str(path), hint="unpack it")
    return cast(BinaryIO, archive.open(names[0]))


def _zst(path: Path) -> BinaryIO:
    try:
        import pyarrow
    except ImportError:
        hint = f"{EXTRA}, or unpack it: zstd -d {path.name}"
        raise SetupError(f"{path} is compressed by Zstandard", hint=hint) from None
    return cast(BinaryIO, pyarrow.input_stream(str(path), compression="zstd"))


_Opener = Callable[[Path], BinaryIO]
_KINDS: dict[bytes, tuple[str, _Opener]] = {
    b"\x1f\x8b": ("gzip", cast(_Opener, gzip.open)),
    b"BZh": ("bzip2", cast(_Opener, bz2.open)),
    b"\xfd7zXZ\x00": ("xz", cast(_Opener, lzma.open)),
    b"\x28\xb5\x2f\xfd": ("Zstandard", _zst),
    b"PK\x03\x04": ("zip", _zip),
}
_DAMAGED = (
    OSError,
    EOFError,
    ValueError,
    zlib.error,
    lzma.LZMAError,
    zipfile.BadZipFile,
    NotImplementedError,
)


class _Unpacked(io.RawIOBase):
    """Turns each library's errors on damaged files into DataError."""

    def __init__(self, inner: BinaryIO, path: Path, name: str) -> None:
        self._inner, self._path, self._name = inner, path, name

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]  # any buffer of bytes
        try:
            data = self._inner.read(len(buffer))
        except _DAMAGED as error:
            raise _damaged(self._path, self._name, error) from error
        buffer[: len(data)] = data
        return len(data)

    def close(self) -> None:
        self._inner.close()
        super().close()


def _damaged(path: Path, name: str, error: Exception) -> DataError:
    return DataError(
        f"the {name} file is damaged: {error}", where=str(path), hint="copy or compress it again"
    )
