"""Two audits side by side: which rows both have, and what was found more or less often. Before and after
cleaning, or training against validation."""

from __future__ import annotations

from collections.abc import Sequence

from tunesmith.auditing.findings import Audit, AuditComparison, Change, Finding, FindingRow, counted


def compare(first: Audit, second: Audit) -> AuditComparison:
    """What differs from ``first`` to ``second``."""
    words: dict[int, str] = {}
    labels: dict[int, dict[bool | None, str]] = {}
    asked: dict[int, str] = {}
    for one in first.prints:
        words.setdefault(one.words, one.source)
        labels.setdefault(one.words, {}).setdefault(one.label, one.source)
        if one.prompt is not None:
            asked.setdefault(one.prompt, one.source)
    has = {one.words for one in second.prints}
    shared, relabelled, prompts = [], [], []
    for one in second.prints:
        if one.words in words:
            shared.append(FindingRow(one.source, f"as {words[one.words]}"))
            if one.label not in labels[one.words]:
                (label, source), *_ = labels[one.words].items()
                relabelled.append(FindingRow(one.source, f"{_word(one.label)}; {source} is {_word(label)}"))
        if one.prompt is not None and one.prompt in asked:
            prompts.append(FindingRow(one.source, f"as {asked[one.prompt]}"))
    return AuditComparison(
        (list(first.files), list(second.files)),
        (first.rows, second.rows),
        shared,
        relabelled,
        prompts,
        [one.source for one in first.prints if one.words not in has],
        [one.source for one in second.prints if one.words not in words],
        _changes(first.findings, second.findings),
    )


def _changes(first: Sequence[Finding], second: Sequence[Finding]) -> list[Change]:
    """Rules on which the two differ, in the order of the first, then of the second."""
    was, now = ({one.rule: one for one in findings} for findings in (first, second))
    both = [Change(rule, was.get(rule), now.get(rule)) for rule in dict.fromkeys([*was, *now])]
    return [one for one in both if _gist(one.first) != _gist(one.second)]


def _gist(finding: Finding | None) -> tuple[str, int] | None:
    """What makes a finding another: shares move with the number of rows, and with them every sentence."""
    return finding and (finding.severity, finding.count)


def _word(label: bool | None) -> str:
    return {True: "desirable", False: "undesirable", None: "unlabelled"}[label]


def told(found: AuditComparison) -> str:
    """What differs, in a few lines for a terminal."""
    (first, second), (many, others) = (", ".join(files) for files in found.files), found.rows
    lines = [f"compared: {first} ({counted(many)}) with {second} ({counted(others)})"]
    for rows, what in (
        (found.shared, "of the second with words that stand in the first too"),
        (found.relabelled, "of these with another label there"),
        (found.prompts, "of the second with a prompt of the first"),
    ):
        lines.append(f"  {counted(len(rows))} {what}{_places([row.source for row in rows])}")
    lines.append(f"  only in the first: {counted(len(found.only_first))}{_places(found.only_first)}")
    lines.append(f"  only in the second: {counted(len(found.only_second))}{_places(found.only_second)}")
    for one in found.changes:
        was, now = (
            f"{side.severity}, {side.what}" if side else "nothing" for side in (one.first, one.second)
        )
        lines.append(f"  {one.rule}: {was} → {now}")
    return "\n".join(lines)


def _places(sources: Sequence[str]) -> str:
    return f" ({', '.join(sources[:3])}{', …' if len(sources) > 3 else ''})" if sources else ""
