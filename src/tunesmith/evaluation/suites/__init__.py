"""Fixed questions: the suites that come with the package, and files used instead.

A suite is JSON lines beside this file, each with an ``id``. Files are JSON lines, a JSON array, gzip of
either, folders of them, CSV with a header, or plain text, one item a line. The task interprets the items."""

from __future__ import annotations

import csv
import json
import math
import os
from collections.abc import Callable, Iterator, Sequence
from importlib import resources
from itertools import zip_longest
from pathlib import Path
from typing import NamedTuple, TypeVar

from tunesmith.data import sources
from tunesmith.data.examples import BadRow
from tunesmith.data.formats import JSON
from tunesmith.errors import DataError, EvaluationError, TunesmithError, listing
from tunesmith.events import Notice, Sink

T = TypeVar("T")


class Entry(NamedTuple):
    """``source``: ``suite:id``, or ``file:line`` by the file's name. ``row``: for a line of plain text, only
    the key ``text``."""

    source: str
    row: dict[str, JSON]

    def words(self, *keys: str) -> str:
        """The text under the first of ``keys`` that the row has. Raises DataError if it has none, or the text
        is empty."""
        value = next((self.row[key] for key in keys if key in self.row), None)
        if not isinstance(value, str) or not value.strip():
            raise DataError(f"no text under {' or '.join(keys)}", where=self.source)
        return value

    def kind(self, *keys: str) -> str:
        """The category under the first of ``keys`` that the row has, else the name of the file."""
        categories = (self.row[key] for key in keys if isinstance(self.row.get(key), str))
        return str(next(categories, Path(self.source.rpartition(":")[0]).stem))


def entries(suite: str, paths: Sequence[str]) -> list[Entry]:
    """The entries of ``paths``; without paths, those of the suite in the package. Raises DataError if a file
    cannot be read."""
    if not paths:
        text = resources.files(__name__).joinpath(f"{suite}.jsonl").read_text(encoding="utf-8")
        rows = map(json.loads, text.splitlines())
        return [Entry(f"{suite}:{row['id']}", row) for row in rows]
    chosen: dict[Path, Path] = {}
    for given in paths:
        flat = Path(given).suffix.lower() in (".csv", ".txt") and Path(given).expanduser().is_file()
        for file in [Path(given).expanduser()] if flat else sources.files([given]):
            if chosen.setdefault(file.resolve(), file) is not file:
                raise DataError(
                    "is given twice", where=str(file), hint="name a file once, alone or by its folder"
                )
    root = os.path.commonpath([file.parent for file in chosen])
    alike = len({file.name for file in chosen}) < len(chosen)
    names = [os.path.relpath(file, root) if alike else given.name for file, given in chosen.items()]
    made = [entry for file, name in zip(chosen.values(), names, strict=True) for entry in _read(file, name)]
    if not made:
        raise DataError(
            "has no rows", where=", ".join(paths), hint=f"omit --{suite} for the suite in the package"
        )
    return made


def _read(file: Path, name: str) -> Iterator[Entry]:
    """The entries of a file; ``name`` stands for it in their sources."""
    if file.suffix.lower() in (".csv", ".txt"):
        try:
            text = file.read_text(encoding="utf-8-sig")
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(f"cannot be read: {error}", where=str(file), hint="save it as UTF-8") from error
        if file.suffix.lower() == ".txt":
            yield from (
                Entry(f"{name}:{number}", {"text": line})
                for number, line in enumerate(text.split("\n"), 1)
                if line.strip()
            )
            return
        reader = csv.DictReader(text.splitlines(keepends=True))
        begins = 2
        for row in reader:
            if None in row or None in row.values():
                raise DataError("has another number of fields than the header", where=f"{file}:{begins}")
            yield Entry(f"{name}:{begins}", dict(row))
            begins = reader.line_num + 1
        return
    for raw in sources.raws(file):
        try:
            value = sources.value(raw.text)
        except RecursionError:
            value = BadRow("json", "", "plain JSON", "values nested too deeply")
        if isinstance(value, BadRow) or not isinstance(value, dict):
            message = f"is not a row: {value}" if isinstance(value, BadRow) else "is not a JSON object"
            raise DataError(message, where=raw.source, hint="one JSON object a line")
        yield Entry(name + raw.source.removeprefix(str(file)), value)


def made(entries: Sequence[Entry], make: Callable[[Entry], T], hint: str) -> list[T]:
    """Each entry made into an item. Raises DataError listing those that cannot be."""
    items: list[T] = []
    problems: list[TunesmithError] = []
    for entry in entries:
        try:
            items.append(make(entry))
        except TunesmithError as error:
            problems.append(error)
    if problems:
        lines = [f"{error.where}: {error.what}" if error.where else error.what for error in problems]
        raise DataError(
            f"{len(problems)} of {len(entries)} items cannot be used\n{listing(lines)}", hint=hint
        )
    return items


def spread(
    items: Sequence[T], limit: int | None, keys: Sequence[Callable[[T], object]], name: str, notify: Sink
) -> list[T]:
    """At most ``limit`` of ``items``, in order, taken evenly: by turns from each value of the first key, and
    within these from each value of the next."""
    if limit is None or limit >= len(items):
        return list(items)
    notify(Notice(f"{name}: only {limit} of {len(items)} items are asked, evenly by kind", level="warning"))
    return [items[index] for index in sorted(_turns(items, range(len(items)), keys)[:limit])]


def _turns(items: Sequence[T], places: Sequence[int], keys: Sequence[Callable[[T], object]]) -> list[int]:
    """``places``, by turns from each value of the first key."""
    if not keys:
        return list(places)
    by: dict[object, list[int]] = {}
    for place in places:
        by.setdefault(keys[0](items[place]), []).append(place)
    rounds = zip_longest(*(_turns(items, part, keys[1:]) for part in by.values()))
    return [place for turn in rounds for place in turn if place is not None]


def require_finite(name: str, values: Sequence[tuple[str, float]]) -> None:
    """Raise EvaluationError listing the items whose log-probability is not finite: leaving them out would
    make the model look better than it is."""
    bad = [f"{source}: {value:g}" for source, value in values if not math.isfinite(value)]
    if bad:
        message = f"{name}: {len(bad)} of {len(values)} values are not finite\n{listing(bad)}"
        raise EvaluationError(message, hint="the model has diverged: choose an earlier checkpoint")
