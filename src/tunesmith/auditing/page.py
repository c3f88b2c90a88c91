"""An audit as a page (`display.page`): verdict, dimensions, findings with their rows, charts, worst rows.

The charts are those of the rules (`Rule.draw`)."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from os import fsencode
from os.path import realpath
from pathlib import Path, PurePath, PurePosixPath, PureWindowsPath
from statistics import median
from typing import Any
from urllib.parse import quote

from markupsafe import Markup

from tunesmith.auditing import registry
from tunesmith.auditing.findings import SEVERITIES, Audit, Finding
from tunesmith.auditing.screen import SIGNS, binned, concerned, dimensions, gravest, measured, placed, worst
from tunesmith.display import charts, notebook, page
from tunesmith.display.text import EXCERPT, escaped, many, visible

ROWS, BINS, WORST = 200, 25, 20
SHOWN = 5
"""Worst rows in a notebook."""
BYTES = 900_000
"""Of rows, over all findings: later findings show fewer than `ROWS` once it is used up."""


def write(audit: Audit, path: Path) -> None:
    """Write the page, whole or not at all. Raises ConfigError as `check` does, and if the file cannot be
    written."""
    check(path)
    page.write(html(audit), path, "audit")


def check(path: Path) -> None:
    """Raises ConfigError if ``path`` exists and is not a page of an audit."""
    page.check(path, "audit")


def html(audit: Audit) -> str:
    """The whole page. The same audit gives the same page."""
    places = _Places()
    low = [(places.of(row.source), row) for row in worst(audit, WORST)]
    sections = _sections(audit)
    points = [
        [*places.of(source), label, cluster, text]
        for section in sections
        for source, label, cluster, text in section.points
    ]
    rows = _rows(audit.findings, places)
    files = places.files()
    tone = gravest(audit)
    return page.render(
        "page.html",
        {"points": points, "rows": rows, "files": files},
        package="tunesmith.auditing",
        verb="audit",
        tone="good" if tone == "note" else tone,
        filters={"measured": measured, "concerned": concerned},
        facts={
            "audit": audit,
            "findings": audit.findings,
            "dimensions": dimensions(audit),
            "severities": SEVERITIES,
            "signs": SIGNS,
            "sections": sections,
            "quality": _quality(list(audit.quality.values())),
            "worst": low,
            "files": files,
            "shown": rows,
        },
    )


def in_notebook(audit: Audit) -> Markup:
    """What a notebook shows: verdict, findings with what to do, scores, the worst rows."""
    tone = gravest(audit)
    grave = [finding for finding in audit.findings if finding.severity != "good"]
    findings = [
        (
            f"{SIGNS[finding.severity]} {finding.severity}",
            finding.rule,
            finding.what,
            ", ".join(visible(row.source, EXCERPT) for row in finding.rows[:2]),
            finding.hint,
        )
        for finding in grave
    ]
    parts = [notebook.verdict(f"{SIGNS[tone]} {audit.verdict}", "good" if tone == "note" else tone)]
    if findings:
        parts.append(notebook.table(["", "rule", "finding", "rows", "what to do"], findings))
    parts.append(notebook.soft(f"{many(audit.rows, 'row')}, {many(len(audit.of('good')), 'bar')} met"))
    rows = [
        (f"{row.score:.0f}", row.source, ", ".join(row.why), visible(row.text, EXCERPT))
        for row in worst(audit, SHOWN)
    ]
    table = notebook.table(["score", "row", "why", "text"], rows, numbers=(0,)) if rows else Markup("")
    scores = _quality(list(audit.quality.values()))
    return Markup("").join([*parts, notebook.folded("Worst rows and distribution of scores", table + scores)])


def _sections(audit: Audit) -> list[registry.Section]:
    """The charts of the rules; the last dimension first, so that the map, which is the largest, stands at the
    end."""
    drawn = [
        rule.draw(audit.charts[rule.chart])
        for rule in reversed(registry.rules())
        if rule.chart and audit.charts.get(rule.chart)
    ]
    return [section for section in drawn if section is not None]


def _quality(scores: Sequence[float]) -> Markup:
    if not scores:
        return Markup("")
    edges = [100 * bin / BINS for bin in range(BINS + 1)]
    title = f"Distribution of {len(scores):,} scores"
    marks = {"median": median(scores)}
    return charts.columns(
        title, edges, binned(scores, BINS), x="quality score", y="rows", name="quality", marks=marks
    )


class _Places:
    """Where rows are, each file once."""

    def __init__(self) -> None:
        self._at: dict[str, int] = {}

    def of(self, source: str) -> tuple[int, str]:
        """The number of the file and the line, or "" if the source names none."""
        path, line = placed(source)
        return self._at.setdefault(path, len(self._at)), line

    def files(self) -> list[dict[str, str]]:
        """name: without its folder if that is enough. path: as given. address: "" if none can be written."""
        names = Counter(_pure(path).name for path in self._at)
        return [
            {
                "name": escaped(path if names[(name := _pure(path).name)] > 1 else name),
                "path": escaped(path),
                "address": _address(path),
            }
            for path in self._at
        ]


def _rows(findings: Sequence[Finding], places: _Places) -> list[list[list[Any]]]:
    """File, line and note of the first rows of each finding."""
    left, rows_of = BYTES, []
    for finding in findings:
        shown = []
        for row in finding.rows[:ROWS] if left > 0 else ():
            shown.append([*places.of(row.source), visible(row.note, EXCERPT)])
            left -= len(shown[-1][-1].encode()) + 20
        rows_of.append(shown)
    return rows_of


def _pure(path: str) -> PurePath:
    return PureWindowsPath(path) if re.match(r"[A-Za-z]:[\\/]", path) else PurePosixPath(path)


def _address(path: str) -> str:
    pure = _pure(path)
    if isinstance(pure, PureWindowsPath):
        return "file:///" + quote(pure.as_posix(), safe="/:", errors="replace")
    try:
        return "file://" + quote(
            fsencode(Path(realpath(pure.parent), pure.name))
        )  # a link keeps its name; ".." is resolved
    except ValueError:  # no file of this machine has such a name
        return ""
