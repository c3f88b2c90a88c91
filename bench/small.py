"""Inputs for ``--smoke``: a tiny random model and a few rows, so that a script runs in seconds. Its numbers
mean nothing."""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

HELP = "try the script in seconds, with a tiny model and one round; the numbers mean nothing"


@contextmanager
def inputs(options: argparse.Namespace, **smaller: Any) -> Iterator[Path]:
    """A folder for the time of the benchmark. With ``--smoke``, ``options`` get a tiny model, a few labelled
    rows and the values of ``smaller``, and results go into that folder unless ``--out`` names another
    place."""
    with tempfile.TemporaryDirectory(prefix="bench-") as name:
        folder = Path(name)
        if options.smoke:
            options.model, options.data = model(folder), rows(folder)
            options.out = options.out or folder / "result.json"
            vars(options).update(smaller)
        yield folder


def model(folder: Path) -> str:
    import tiny

    return str(tiny.write_llama(folder / "model"))


def rows(folder: Path, count: int = 40) -> str:
    """Half of the rows are labelled good."""
    import tiny

    labelled = [row | {"label": index % 2 == 0} for index, row in enumerate(tiny.conversations(count))]
    return str(tiny.write_rows(folder / "rows.jsonl", labelled))
