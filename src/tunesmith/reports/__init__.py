"""What came of a run, for people and for machines: one page, one text, one JSON and two pictures, all from
the run directory.

``report.html`` answers whether to ship it; ``report.md`` and ``report.json`` hold the same facts,
``report.png`` the gist and ``curves.png`` the course of training; ``model_card.md`` is for whom it is given
to. They can be written anew at any time."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

from tunesmith.errors import EvaluationError
from tunesmith.files import write_json, write_text
from tunesmith.reports import card, markdown, page
from tunesmith.reports import figures as figure
from tunesmith.reports import summary as facts
from tunesmith.reports.summary import summary as summarise
from tunesmith.runs.directory import CHECKPOINTS, EVALS, EVENTS, MANIFEST

__all__ = ["HTML", "MACHINE", "TEXT", "summarise", "verdict_line", "write"]

TEXT, MACHINE, HTML = "report.md", "report.json", "report.html"


def write(run_dir: Path) -> Path:
    """Write all files into ``run_dir``, each whole or not at all, and return the path of ``report.md``.

    Raises EvaluationError where the folder cannot be written to.
    """
    log = facts.log(run_dir)
    found = summarise(run_dir, log)
    try:
        write_json(run_dir / MACHINE, found)
        _draw(run_dir / figure.CURVES, lambda draft: figure.curves(log, draft))
        _draw(run_dir / figure.PICTURE, lambda draft: figure.picture(found, log, draft))
        write_text(run_dir / HTML, page.html(run_dir, found, log))
        write_text(run_dir / TEXT, markdown.text(run_dir, found))
        card.write(run_dir, found)
    except OSError as error:
        what = f"the report cannot be written: {error.strerror or error}"
        raise EvaluationError(
            what, where=str(run_dir), hint="make room, or copy the run to where you may write"
        ) from error
    return run_dir / TEXT


def verdict_line(run_dir: Path) -> str:
    """One sentence with its uncertainty: of the evaluation, or where there is none of the loss.

    What the report says where that is newer than all it was made from.
    """
    made = run_dir / MACHINE
    sources = [run_dir / EVENTS, run_dir / MANIFEST, run_dir / CHECKPOINTS, run_dir / EVALS]
    sources += [*(run_dir / EVALS).glob("*"), *(run_dir / EVALS).glob("*/*")]
    times = [path.stat().st_mtime_ns for path in sources if path.exists()]
    try:
        if made.stat().st_mtime_ns > max(times, default=0):
            return json.loads(made.read_text(encoding="utf-8"))["verdict"]
    except (OSError, ValueError, KeyError, TypeError):
        pass  # there is none, or none that can be read
    return summarise(run_dir)["verdict"]


def _draw(path: Path, draw: Callable[[Path], None]) -> None:
    draft = path.with_name(f".{path.name}")
    try:
        draw(draft)
        os.replace(draft, path)
    finally:
        draft.unlink(missing_ok=True)
