"""Rows that repeat another: exactly, apart from case, spacing and punctuation, or nearly (`near`).

Repeated rows are learned more often than others and can stand on both sides of a split. System texts, and
beginnings that many rows share, do not count for nearness. Of a group the first row is the original and is
not named; rows that differ in the label alone are for `conflicts`."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import ClassVar, NamedTuple

from tunesmith.auditing import near
from tunesmith.auditing.findings import Finding, FindingRow, Severity, counted
from tunesmith.auditing.registry import Rule, register
from tunesmith.auditing.views import Context, Survey, View, digest, normal

SHARE = 0.05
"""A larger share of repeated rows is a warning."""


class RowHashes(NamedTuple):
    exact: int  # of everything that is learned or read, calls, tools and the label included
    same: int  # digest of their normal form
    signature: bytes


@register
class Duplicates(Rule):
    name = "duplicates"
    order = 50
    looks_at = "rows that repeat another"
    findings: ClassVar = {
        "exact": "the same to the letter",
        "normalised": "the same but for case, spacing and punctuation",
        "near": "nearly the same, by edit distance",
    }
    bar = "reported; a warning above 5 % of the rows"

    def look(self, view: View, context: Context) -> RowHashes | None:
        if view.example is None:
            return None
        text = normal(spoken(view))
        same = digest(normal(view.whole) or view.whole)
        return RowHashes(int(view.example.id, 16), same, near.signature(text) if text else b"")

    def judge(self, facts: list[RowHashes | None], survey: Survey) -> Iterator[Finding]:
        hashes = {row: fact for row in survey.training if (fact := facts[row]) is not None}
        if not hashes:
            return
        rows = list(hashes)
        repeats = _repeats(survey, ((hashes[row].exact, row) for row in rows))
        yield _finding("exact", survey, rows, repeats, "to the letter")
        firsts = sorted({hashes[row].exact: row for row in reversed(rows)}.values())
        repeats = _repeats(survey, ((hashes[row].same, row) for row in firsts))
        yield _finding("normalised", survey, rows, repeats, "but for case, spacing and punctuation")
        firsts = sorted({hashes[row].same: row for row in reversed(firsts)}.values())
        alike = _near({row: hashes[row].signature for row in firsts if hashes[row].signature}, survey)
        yield _finding(
            "near", survey, rows, alike, f"to at least {survey.spec.similarity:.0%} of their letters"
        )


def _near(signatures: dict[int, bytes], survey: Survey) -> dict[int, str]:
    """Row → which row it is nearest to, for all but the first of each group of near rows."""
    rows = list(signatures)

    def texts(places: Sequence[int]) -> dict[int, str]:
        views = survey.fetch([rows[place] for place in places])
        return {place: normal(spoken(views[rows[place]])) for place in places}

    pairs = near.pairs(list(signatures.values()), texts, survey.spec.similarity)
    best: dict[
        int, tuple[float, int]
    ] = {}  # place → similarity of its nearest place, and that place, negated
    for first, second, similarity in pairs:
        best[first] = max(best.get(first, (0.0, 0)), (similarity, -second))
        best[second] = max(best.get(second, (0.0, 0)), (similarity, -first))
    notes = {}
    for group in near.groups((first, second) for first, second, _ in pairs):
        for place in group[1:]:
            similarity, nearest = best[place]
            row, original = rows[place], rows[-nearest]
            other = "" if survey.labels[original] == survey.labels[row] else ", with the other label"
            notes[row] = f"{similarity:.1%} as {survey.sources[original]}{other}"
    return notes


def spoken(view: View) -> str:
    """All words except system texts, which rows may share at length and yet differ."""
    return "\n".join(part.text for part in view.parts if part.role != "system")


def _repeats(survey: Survey, keys: Iterable[tuple[int, int]]) -> dict[int, str]:
    """Row → which earlier row has the same key."""
    first: dict[int, int] = {}
    notes: dict[int, str] = {}
    for key, row in keys:
        if first.setdefault(key, row) != row:
            other = "" if survey.labels[first[key]] == survey.labels[row] else ", with the other label"
            notes[row] = f"as {survey.sources[first[key]]}{other}"
    return notes


def _finding(name: str, survey: Survey, rows: list[int], notes: dict[int, str], how: str) -> Finding:
    count, share = len(notes), len(notes) / max(len(rows), 1)
    severity: Severity = "good" if not count else "warning" if share > SHARE else "note"
    sentence = (
        f"{counted(count, len(rows))} repeating an earlier row {how}"
        if count
        else f"no row repeats another {how}"
    )
    hint = (
        "`--fix OUT` removes them" if name == "exact" else "keep one of each, unless the repetition is meant"
    )
    evidence = tuple(FindingRow(survey.sources[row], note) for row, note in notes.items())
    return Finding(
        f"duplicates.{name}", severity, sentence, count, len(rows), rows=evidence, hint=hint if count else ""
    )
