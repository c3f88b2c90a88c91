"""A quality score for each row, from 0 to 100.

A row begins at 100 and is multiplied by `FACTORS` once for each finding that names it; a row that cannot be
read has 0. The score orders rows for reading, worst first. It is not a probability, and findings about the
set as a whole do not enter it."""

from __future__ import annotations

from collections.abc import Sequence

from tunesmith.auditing.findings import Finding

FACTORS = {"error": 0.4, "warning": 0.7, "note": 0.9, "good": 1.0}


def scores(
    sources: Sequence[str], unreadable: Sequence[str], findings: Sequence[Finding]
) -> tuple[dict[str, float], dict[str, list[str]]]:
    """(source → score, lowest first; source → rules that lowered it)."""
    scored = dict.fromkeys(sources, 100.0) | dict.fromkeys(unreadable, 0.0)
    why: dict[str, list[str]] = {}
    for finding in findings:
        if finding.severity == "good" or finding.of_set:
            continue
        for source in {row.source for row in finding.rows} & scored.keys():
            scored[source] *= FACTORS[finding.severity]
            why.setdefault(source, []).append(finding.rule)
    return dict(sorted(scored.items(), key=lambda item: item[1])), why
