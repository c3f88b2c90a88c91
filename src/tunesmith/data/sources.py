"""From files to rows as they are written: JSON lines, a JSON array, a table, compressed or not, folders of
them; read as a stream.

What a row means is for `formats`. Words are never changed; bytes that are not UTF-8 become lone surrogates,
so that only their own rows are lost."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import closing
from math import inf
from pathlib import Path
from typing import BinaryIO, NamedTuple

from tunesmith.data import packing, tables
from tunesmith.data.examples import BadRow
from tunesmith.errors import DataError
from tunesmith.settings.origins import JSON

TABLES = tables.SUFFIXES
UNREAD = (".xlsx", ".xls", ".ods", ".arrow", ".feather", ".pkl", ".pickle", ".txt.lz4")
_ARCHIVES = (".7z", ".rar", ".tar", ".tgz")
"""Endings of files that are not read: reported at once, not row by row."""
_PROSE = (".txt", ".text", ".md")
"""Endings of files that may hold rows of JSON, and mostly hold prose."""
_LINES = (".jsonl", ".ndjson", ".json")
SUFFIXES = (*_LINES, *(f"{name}{packed}" for name in _LINES for packed in packing.SUFFIXES), *TABLES)
_DESCRIPTIONS = ("dataset_info.json", "dataset_infos.json", "dataset_dict.json")
"""Files that the datasets library writes beside the rows."""


class Raw(NamedTuple):
    """A row as written. ``source``: ``file:line``, where it starts; ``file:line:column`` for a later row of
    the same line."""

    source: str
    text: str


def files(paths: Sequence[str | Path]) -> list[Path]:
    """The files of ``paths`` in order; of a folder by name. Raises DataError if one is missing, given twice,
    or empty."""
    paths_found: dict[Path, Path] = {}
    for given in paths:
        path = Path(given).expanduser()
        if not path.exists():
            raise DataError("no such file or folder", where=str(given), hint=f"looked from {Path.cwd()}")
        if not path.is_dir() and not path.is_file():
            raise DataError(
                "is not a regular file",
                where=str(given),
                hint="rows are read more than once: write them to a file",
            )
        if path.is_file():
            _refuse_unread(path)
        listed = inside(path) if path.is_dir() else [path]
        if not listed:
            raise DataError(
                "the folder has no data", where=str(given), hint="names must end in " + ", ".join(SUFFIXES)
            )
        for file in listed:
            if paths_found.setdefault(file.resolve(), file) is not file:
                raise DataError(
                    "is given twice", where=str(file), hint="name a file once, alone or by its folder"
                )
    return list(paths_found.values())


def inside(folder: Path) -> list[Path]:
    """The files of rows in a folder, by name. Hidden files and descriptions of the data are left out, and
    tables that are `copies`."""
    return _without_copies(_visible(folder))[0]


def copies(folder: Path) -> list[Path]:
    """Tables in a folder beside a JSON file of the same stem: copies of it, as the hub makes them."""
    return _without_copies(_visible(folder))[1] if folder.is_dir() else []


def _visible(folder: Path) -> list[Path]:
    return [
        file
        for file in sorted(folder.rglob("*"))
        if file.name.lower().endswith(SUFFIXES)
        and file.name.lower() not in _DESCRIPTIONS
        and not any(part[0] == "." for part in file.relative_to(folder).parts)
        and file.is_file()
    ]


def _without_copies(files: list[Path]) -> tuple[list[Path], list[Path]]:
    json_stems = {(file.parent, stem(file)) for file in files if not _is_table(file.name)}
    rows: list[Path] = []
    tables: list[Path] = []
    for file in files:
        is_copy = _is_table(file.name) and (file.parent, stem(file)) in json_stems
        (tables if is_copy else rows).append(file)
    return rows, tables


def stem(file: Path) -> str:
    """The name of a file of rows in lower case, without its ending."""
    name = file.name.lower()
    return name.removesuffix(next((suffix for suffix in SUFFIXES if name.endswith(suffix)), ""))


def _is_table(name: str) -> bool:
    return name.lower().endswith(TABLES)


def _refuse_unread(path: Path) -> None:
    """Raises DataError if the name of a file says that it cannot be read, whatever it is compressed by."""
    name = unpacked = path.name.lower()
    while unpacked.endswith(packing.SUFFIXES):
        unpacked = unpacked.rpartition(".")[0]
    kind = unpacked.rpartition(".")[2].upper()
    if unpacked.endswith(_ARCHIVES):
        raise DataError(f"is a {kind} archive", where=str(path), hint="unpack it and name its folder")
    if unpacked.endswith(UNREAD):
        raise DataError(f"is a {kind} file", where=str(path), hint="write it as JSONL, one row a line")
    if unpacked != name and _is_table(unpacked):
        raise DataError(f"is a compressed {kind} file", where=str(path), hint="unpack it")


def sha256(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def raws(path: Path) -> Iterator[Raw]:
    """Every row of a file; lines and tables are streamed, an array is read whole. Raises DataError if it
    cannot be read."""
    if _is_table(path.name):
        for place, row in tables.rows(path):
            yield Raw(f"{path}:{place}", row)
        return
    try:
        with closing(packing.opened(path)) as stream:
            yield from _raws(stream, path)
    except OSError as error:
        raise DataError(f"cannot be read: {error.strerror or error}", where=str(path)) from error


def _raws(stream: BinaryIO, path: Path) -> Iterator[Raw]:
    before: list[bytes] | None = []  # blank lines, and the first that is not
    for number, data in enumerate(stream, 1):
        if number == 1:
            if data[:2] in (b"\xff\xfe", b"\xfe\xff"):
                raise DataError("is UTF-16", where=str(path), hint="save it as UTF-8")
            data = data.removeprefix(b"\xef\xbb\xbf")
        if before is not None:
            before.append(data)
            if data.lstrip(b" \t\r\n")[:1] == b"[":
                yield from _array(b"".join([*before, stream.read()]).decode("utf-8", "surrogateescape"), path)
                return
            if data.strip(b" \t\r\n"):
                _refuse_prose(path, data)
                before = None
        text = data.decode("utf-8", "surrogateescape").removesuffix(
            "\n"
        )  # U+2028 and similar characters do not end a line
        if text.strip():
            yield Raw(f"{path}:{number}", text.removesuffix("\r"))


def _refuse_prose(path: Path, first: bytes) -> None:
    """Raises DataError for a text file whose first line is not a row."""
    names = (f"{name}{packed}" for name in _PROSE for packed in ("", *packing.SUFFIXES))
    if path.name.lower().endswith(tuple(names)) and not first.lstrip(b" \t\r\n").startswith(b"{"):
        hint = 'write each passage as a row of a JSONL file: {"text": "…"}'
        raise DataError("is plain text, not rows", where=str(path), hint=hint)


def _array(text: str, path: Path) -> Iterator[Raw]:
    """The rows of an array. Only where a row ends is looked at here, not what it holds."""
    ends = json.JSONDecoder(parse_int=str, parse_float=str, parse_constant=str)
    line, start, counted, fresh, position = (
        1,
        0,
        0,
        True,
        _skip(text, _skip(text, 0) + 1),
    )  # fresh: the first row of its line
    try:
        while text[position : position + 1] != "]":
            if breaks := text.count("\n", counted, position):
                line, start, fresh = line + breaks, text.rfind("\n", counted, position) + 1, True
            counted = position
            try:
                _, end = ends.raw_decode(text, position)
            except RecursionError:
                raise json.JSONDecodeError("values nested too deeply", text, position) from None
            yield Raw(
                f"{path}:{line}" if fresh else f"{path}:{line}:{position - start + 1}", text[position:end]
            )
            fresh = False
            position = _skip(text, end)
            comma = text[position : position + 1] == ","
            position = _skip(text, position + 1) if comma else position
            if comma == (text[position : position + 1] == "]"):
                raise json.JSONDecodeError("expected a comma and a row, or ]", text, position)
        if (position := _skip(text, position + 1)) < len(text):
            raise json.JSONDecodeError("more text after ]", text, position)
    except json.JSONDecodeError as error:
        hint = "mend it, or write one row a line (JSONL)"
        raise DataError(
            f"the JSON array breaks off: {error.msg}", where=f"{path}:{error.lineno}", hint=hint
        ) from None


def _skip(text: str, position: int) -> int:
    while position < len(text) and text[position] in " \t\r\n":
        position += 1
    return position


def value(text: str) -> JSON | BadRow:
    """The JSON of a whole row, or what is wrong with it. Raises RecursionError if it is nested too deeply."""
    return _Decoder().whole(text)


class _Decoder(json.JSONDecoder):
    """Strict JSON: what Python's reader would lose or invent makes the row a bad one."""

    def __init__(self) -> None:
        number = self._number
        super().__init__(
            object_pairs_hook=self._object, parse_constant=number, parse_float=number, parse_int=number
        )
        self.problems: list[str] = []

    def _number(self, text: str) -> int | float:
        try:
            value = int(text) if text.lstrip("-").isdigit() else float(text)
        except ValueError:  # more digits than Python converts
            value = inf
        if abs(value) == inf or value != value:
            self.problems.append(f"{text[:40]}, a number that cannot be kept")
        return value

    def _object(self, pairs: list[tuple[str, JSON]]) -> dict[str, JSON]:
        result = dict(pairs)
        if len(result) < len(pairs):
            key, _ = Counter(key for key, _ in pairs).most_common(1)[0]
            self.problems.append(f"the key {show(key)} twice in one object")
        return result

    def whole(self, text: str) -> JSON | BadRow:
        try:
            match, end = self.raw_decode(text, _skip(text, 0))
            if (end := _skip(text, end)) < len(text):
                raise json.JSONDecodeError("more text after the value", text, end)
        except json.JSONDecodeError as error:
            near = show(text[max(0, error.pos - 20) : error.pos + 20])
            message = error.msg.removesuffix(" at")  # "Unterminated string starting at"
            fault = f"{message[:1].lower()}{message[1:]} at column {error.pos + 1}: {near}"
            hint = "mend the line; rows over many lines need a JSON array"
            return BadRow("json", "", "one whole JSON object a line", f"broken JSON, {fault}", hint)
        if self.problems:
            return BadRow("json", "", "plain JSON", self.problems[0])
        try:  # half a surrogate pair, which no encoding can write
            if not text.isascii() or "\\u" in text:
                (text + json.dumps(match, ensure_ascii=False)).encode()
        except UnicodeEncodeError as error:
            part = show(error.object[max(0, error.start - 20) : error.start + 1])
            hint = "save the file as UTF-8; a character above U+FFFF takes two \\u escapes"
            return BadRow("encoding", "", "text that UTF-8 can write", part, hint)
        return match


def show(value: object) -> str:
    """A value on one line, cut at 80 characters."""
    text = json.dumps(value)
    return text if len(text) <= 80 else f"{text[:77]}…"
