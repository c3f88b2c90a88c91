"""Tables as rows in JSON: CSV with its names in the first line, and Parquet.

Cells of a CSV file are text, and empty ones null; what a text holds (messages, a verdict) is read as in any
row."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tunesmith.data import packing
from tunesmith.errors import DataError, SetupError

SUFFIXES = packing.TABLES
LARGEST_CELL = 2**30
BATCH = 256  # rows of a Parquet file that are in memory at once


def rows(path: Path) -> Iterator[tuple[int, str]]:
    """(line or number of the row, the row in JSON). Raises DataError if the table cannot be read as a whole,
    SetupError if a package is missing."""
    ending = path.suffix.lower()
    return _parquet(path) if ending == ".parquet" else _csv(path, "\t" if ending == ".tsv" else ",")


def _csv(path: Path, delimiter: str) -> Iterator[tuple[int, str]]:
    csv.field_size_limit(LARGEST_CELL)
    line = 1
    try:
        with path.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as stream:
            reader = csv.reader(stream, delimiter=delimiter, strict=True)
            names = next(reader, [])
            if len(set(names)) < len(names) or not all(name.strip() for name in names):
                hint = "the first line holds the names of the columns, each once"
                raise DataError(f"the columns are {', '.join(names)}", where=f"{path}:1", hint=hint)
            line = reader.line_num + 1
            for cells in reader:
                if len(cells) > len(names):
                    text = f"{len(cells)} cells, and the first line names {len(names)} columns"
                    hint = "a cell that holds the delimiter or a line break stands in quotation marks"
                    raise DataError(text, where=f"{path}:{line}", hint=hint)
                if any(cells):
                    yield (
                        line,
                        json.dumps({name: cell or None for name, cell in zip(names, cells, strict=False)}),
                    )
                line = reader.line_num + 1
    except csv.Error as error:
        hint = "write it as JSONL, one row a line"
        raise DataError(f"cannot be read as a table: {error}", where=f"{path}:{line}", hint=hint) from error
    except OSError as error:
        raise DataError(f"cannot be read: {error.strerror}", where=str(path)) from error


def _parquet(path: Path) -> Iterator[tuple[int, str]]:
    try:
        from pyarrow import ArrowException, parquet
    except ImportError:
        raise SetupError(f"{path} is a Parquet file", hint=f"{packing.EXTRA}, or write it as JSONL") from None
    number = 0
    try:
        with parquet.ParquetFile(path) as table:
            for batch in table.iter_batches(batch_size=BATCH):
                for row in batch.to_pylist():
                    number += 1
                    plain = {name: _plain(cell) for name, cell in row.items()}
                    yield number, json.dumps(plain, default=str)
    except UnicodeDecodeError as error:
        text = f"a text in the {BATCH} rows after row {number} is not UTF-8: {error.reason}"
        raise DataError(text, where=str(path), hint="write it again, with its texts in UTF-8") from error
    except (ArrowException, OSError) as error:
        raise DataError(
            f"the Parquet file is damaged: {error}", where=str(path), hint="copy it again"
        ) from error


def _plain(value: Any) -> Any:
    """The value of a cell without what JSON cannot write: NaN becomes null, bytes the count of them.

    Fields that are null are left out of objects: Arrow gives every object of a column the fields of all of
    them, such as the arguments of other calls. A map is a list of pairs."""
    if isinstance(value, dict):
        return {key: _plain(inner) for key, inner in value.items() if inner is not None}
    if isinstance(value, list | tuple):
        return [_plain(inner) for inner in value]
    if isinstance(value, bytes):
        return f"{len(value)} bytes"
    return None if isinstance(value, float) and not math.isfinite(value) else value
