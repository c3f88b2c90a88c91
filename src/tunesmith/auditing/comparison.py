"""Two audits side by side: which rows both have, and what was found more or less often. Before and after
cleaning, or training against validation."""

from __future__ import annotations

from collections.abc import Sequence

from tunesmith.auditing.findings import Audit, AuditComparison, Change, Finding, FindingRow, counted


def compare(first: Audit, second: Audit) -> AuditComparison:
    """What differs from ``first`` to ``second``."""
    words: dict[int, str] = {}
    labels: dict[int, dict[bool | None, str]] = {}
    prompt_sources: dict[int, str] = {}
    for row in first.prints:
        words.setdefault(row.words, row.source)
        labels.setdefault(row.words, {}).setdefault(row.label, row.source)
        if row.prompt is not None:
            prompt_sources.setdefault(row.prompt, row.source)
    has = {row.words for row in second.prints}
    shared, relabelled, prompts = [], [], []
    for row in second.prints:
        if row.words in words:
            shared.append(FindingRow(row.source, f"as {words[row.words]}"))
            if row.label not in labels[row.words]:
                (label, source), *_ = labels[row.words].items()
                relabelled.append(FindingRow(row.source, f"{_word(row.label)}; {source} is {_word(label)}"))
        if row.prompt is not None and row.prompt in prompt_sources:
            prompts.append(FindingRow(row.source, f"as {prompt_sources[row.prompt]}"))
    return AuditComparison(
        (list(first.files), list(second.files)),
        (first.rows, second.rows),
        shared,
        relabelled,
        prompts,
        [row.source for row in first.prints if row.words not in has],
        [row.source for row in second.prints if row.words not in words],
        _changes(first.findings, second.findings),
    )


def _changes(first: Sequence[Finding], second: Sequence[Finding]) -> list[Change]:
    """Rules on which the two differ, in the order of the first, then of the second."""
    was, now = ({change.rule: change for change in findings} for findings in (first, second))
    both = [Change(rule, was.get(rule), now.get(rule)) for rule in dict.fromkeys([*was, *now])]
    return [change for change in both if _gist(change.first) != _gist(change.second)]


def _gist(finding: Finding | None) -> tuple[str, int] | None:
    """What is compared: not shares and sentences, which change with the number of rows."""
    return finding and (finding.severity, finding.count)


def _word(label: bool | None) -> str:
    return {True: "desirable", False: "undesirable", None: "unlabelled"}[label]


def told(comparison: AuditComparison) -> str:
    """What differs, in a few lines for a terminal."""
    (first, second), (many, others) = (", ".join(files) for files in comparison.files), comparison.rows
    lines = [f"compared: {first} ({counted(many)}) with {second} ({counted(others)})"]
    for rows, relation in (
        (comparison.shared, "of the second whose words are also in the first"),
        (comparison.relabelled, "of these with another label there"),
        (comparison.prompts, "of the second with a prompt of the first"),
    ):
        lines.append(f"  {counted(len(rows))} {relation}{_places([row.source for row in rows])}")
    lines.append(
        f"  only in the first: {counted(len(comparison.only_first))}{_places(comparison.only_first)}"
    )
    lines.append(
        f"  only in the second: {counted(len(comparison.only_second))}{_places(comparison.only_second)}"
    )
    for change in comparison.changes:
        was, now = (
            f"{side.severity}, {side.what}" if side else "nothing" for side in (change.first, change.second)
        )
        lines.append(f"  {change.rule}: {was} → {now}")
    return "\n".join(lines)


def _places(sources: Sequence[str]) -> str:
    return f" ({', '.join(sources[:3])}{', …' if len(sources) > 3 else ''})" if sources else ""
