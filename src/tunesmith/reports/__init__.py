"""What came of a run, for people and for machines? A page, a text, a JSON document, two pictures and a model
card, all from the run directory.

``report.html`` answers whether to ship the run; ``report.md`` and ``report.json`` hold the same facts,
``report.png`` the verdict and ``curves.png`` the course of training; ``model_card.md`` is for those who
receive the weights. They can be written again at any time."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

from typing_extensions import TypedDict

from tunesmith.errors import EvaluationError
from tunesmith.files import draft, read_json, write_json, write_text
from tunesmith.reports import card, figures, markdown, page
from tunesmith.reports.facts import read_log
from tunesmith.reports.summary import Summary, ship, summarise, to_json
from tunesmith.reports.verdict import Reason
from tunesmith.runs.artefacts import RECORD
from tunesmith.runs.directory import CHECKPOINTS, EVALS, EVENTS, EXPORTS, MANIFEST

__all__ = [
    "HTML",
    "MACHINE",
    "TEXT",
    "Summary",
    "is_current",
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


class _Made(TypedDict):
    """What the verdict needs of report.json."""

    verdict: str
    reasons: list[Reason]


def is_current(run_dir: Path) -> bool:
    """Whether all files are there, and newer than what they were made from."""
    files = (MACHINE, HTML, TEXT, card.CARD, figures.CURVES, figures.PICTURE)
    return all((run_dir / name).is_file() for name in files) and _newest_source(run_dir) < (
        (run_dir / MACHINE).stat().st_mtime_ns
    )


def verdict_lines(run_dir: Path) -> list[str]:
    """The verdict's line, then its reasons, those against shipping first.

    They are those of report.json if that is newer than all it was made from and has reasons (0.1.0 wrote
    none)."""
    made = run_dir / MACHINE
    with suppress(OSError, EvaluationError):  # there is none, or it cannot be read
        if made.stat().st_mtime_ns > _newest_source(run_dir):
            content = read_json(made, _Made, EvaluationError, None)
            return [content["verdict"], *(reason.line for reason in content["reasons"])]
    return summarise(run_dir).lines


def _newest_source(run_dir: Path) -> int:
    """When the newest of the files was written that a report is made from, in nanoseconds."""
    sources = [run_dir / EVENTS, run_dir / MANIFEST, run_dir / CHECKPOINTS, run_dir / EVALS]
    sources += [*(run_dir / EVALS).glob("*"), *(run_dir / EVALS).glob("*/*")]
    sources += [run_dir / EXPORTS, *(run_dir / EXPORTS).glob(f"*/{RECORD}")]
    return max((path.stat().st_mtime_ns for path in sources if path.exists()), default=0)
