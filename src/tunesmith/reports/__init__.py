"""What came of a run, for people and for machines? A page, a text, a JSON document, two pictures and a model
card, all from the run directory.

``report.html`` answers whether to ship the run; ``report.md`` and ``report.json`` hold the same facts,
``report.png`` the verdict and ``curves.png`` the course of training; ``model_card.md`` is for those who
receive the weights. They can be written again at any time."""

from __future__ import annotations

import json
from pathlib import Path

from tunesmith.errors import EvaluationError
from tunesmith.files import draft, write_json, write_text
from tunesmith.reports import card, figures, markdown, page
from tunesmith.reports.facts import read_log
from tunesmith.reports.summary import Summary, ship, summarise, to_json
from tunesmith.reports.verdict import Reason
from tunesmith.runs.directory import CHECKPOINTS, EVALS, EVENTS, MANIFEST

__all__ = [
    "HTML",
    "MACHINE",
    "TEXT",
    "Summary",
    "ship",
    "summarise",
    "to_json",
    "verdict_line",
    "verdict_lines",
    "write",
]

TEXT, MACHINE, HTML = "report.md", "report.json", "report.html"


def write(run_dir: Path) -> Path:
    """Write all files into ``run_dir``, each whole or not at all, and return the path of ``report.md``.

    Raises EvaluationError if the folder cannot be written to."""
    log = read_log(run_dir)
    summary = summarise(run_dir, log)
    try:
        write_json(run_dir / MACHINE, to_json(summary))
        with draft(run_dir / figures.CURVES) as path:
            figures.curves(log, path)
        with draft(run_dir / figures.PICTURE) as path:
            figures.picture(summary, log, path)
        write_text(run_dir / HTML, page.html(summary, log))
        write_text(run_dir / TEXT, markdown.text(summary))
        card.write(summary)
    except OSError as error:
        message = f"the report cannot be written: {error.strerror or error}"
        hint = "make room, or copy the run to a folder that you may write to"
        raise EvaluationError(message, where=str(run_dir), hint=hint) from error
    return run_dir / TEXT


def verdict_line(run_dir: Path) -> str:
    """The verdict in one line: of the evaluation, or if there is none of the loss."""
    return verdict_lines(run_dir)[0]


def verdict_lines(run_dir: Path) -> list[str]:
    """The verdict's line, then its reasons, those against shipping first.

    They are those of report.json if that is newer than all it was made from and has reasons (0.1.0 wrote
    none)."""
    made = run_dir / MACHINE
    sources = [run_dir / EVENTS, run_dir / MANIFEST, run_dir / CHECKPOINTS, run_dir / EVALS]
    sources += [*(run_dir / EVALS).glob("*"), *(run_dir / EVALS).glob("*/*")]
    times = [path.stat().st_mtime_ns for path in sources if path.exists()]
    try:
        if made.stat().st_mtime_ns > max(times, default=0):
            content = json.loads(made.read_text(encoding="utf-8"))
            return [content["verdict"], *(Reason(**reason).line for reason in content["reasons"])]
    except (OSError, ValueError, KeyError, TypeError):
        pass  # there is none, or it cannot be read
    return summarise(run_dir).lines
