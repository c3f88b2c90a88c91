"""Rows that repeat another: to the letter, but for case, spacing and punctuation, or nearly (`near`).

Repeated rows are learned more often than others and can stand on both sides of a split. For nearness system
texts, and what many rows begin with, do not count. Of a group the first row is the original and is not named;
rows that agree but for the label are for `conflicts`."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import ClassVar, NamedTuple

from tunesmith.auditing import near
from tunesmith.auditing.findings import Finding, FindingRow, Severity, counted
from tunesmith.auditing.registry import Rule, register
from tunesmith.auditing.views import Context, Survey, View, digest, normal

SHARE = 0.05
"""Above it repeated rows are a warning: they then weigh on what is learned."""


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

    def judge(self, kept: list[RowHashes | None], survey: Survey) -> Iterator[Finding]:
        rows = [at for at in survey.training if kept[at] is not None]
        if not rows:
            return
        held = {at: one for at, one in enumerate(kept) if one is not None}
        yield _finding(
            "exact", survey, rows, _repeats(survey, ((held[at].exact, at) for at in rows)), "to the letter"
        )
        firsts = sorted({held[at].exact: at for at in reversed(rows)}.values())
        alike = _repeats(survey, ((held[at].same, at) for at in firsts))
        yield _finding("normalised", survey, rows, alike, "but for case, spacing and punctuation")
        firsts = sorted(
            at for at in {held[at].same: at for at in reversed(firsts)}.values() if held[at].signature
        )

        def texts(places: Sequence[int]) -> dict[int, str]:
            views = survey.fetch([firsts[place] for place in places])
            return {place: normal(spoken(views[firsts[place]])) for place in places}

        found = near.pairs([held[at].signature for at in firsts], texts, survey.spec.similarity)
        best: dict[int, tuple[float, int]] = {}
        for one, other, similarity in found:
            best[one] = max(best.get(one, (0.0, 0)), (similarity, -other))
            best[other] = max(best.get(other, (0.0, 0)), (similarity, -one))
        notes = {}
        for group in near.groups((one, other) for one, other, _ in found):
            for place in group[1:]:
                similarity, most = best[place]
                first, at = firsts[-most], firsts[place]
                other = "" if survey.labels[first] == survey.labels[at] else ", with the other label"
                notes[at] = f"{similarity:.1%} as {survey.sources[first]}{other}"
        yield _finding(
            "near", survey, rows, notes, f"to at least {survey.spec.similarity:.0%} of their letters"
        )


def spoken(view: View) -> str:
    """All words but system texts, which rows may share at length and yet differ."""
    return "\n".join(part.text for part in view.parts if part.role != "system")


def _repeats(survey: Survey, keys: Iterable[tuple[int, int]]) -> dict[int, str]:
    """Row → which earlier row has the same key."""
    first: dict[int, int] = {}
    found: dict[int, str] = {}
    for key, at in keys:
        if first.setdefault(key, at) != at:
            other = "" if survey.labels[first[key]] == survey.labels[at] else ", with the other label"
            found[at] = f"as {survey.sources[first[key]]}{other}"
    return found


def _finding(name: str, survey: Survey, rows: list[int], notes: dict[int, str], how: str) -> Finding:
    count, share = len(notes), len(notes) / max(len(rows), 1)
    severity: Severity = "good" if not count else "warning" if share > SHARE else "note"
    what = (
        f"{counted(count, len(rows))} repeating an earlier row {how}"
        if count
        else f"no row repeats another {how}"
    )
    hint = (
        "`--fix OUT` removes them" if name == "exact" else "keep one of each, unless the repetition is meant"
    )
    evidence = tuple(FindingRow(survey.sources[at], note) for at, note in notes.items())
    return Finding(
        f"duplicates.{name}", severity, what, count, len(rows), rows=evidence, hint=hint if count else ""
    )
