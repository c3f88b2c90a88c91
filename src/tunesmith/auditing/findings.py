"""The result of an audit: findings with their rows, comparisons, repairs. Does not know how rows are read or
how rules work."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

from tunesmith.display.notebook import NotebookResult

Severity = Literal["good", "note", "warning", "error"]
SEVERITIES: tuple[Severity, ...] = ("error", "warning", "note", "good")
"""Most severe first. good: a bar that is met. note: worth knowing. warning: look at it. error: `train`
stops."""


@dataclass(frozen=True, slots=True)
class FindingRow:
    """One row of a finding. ``source``: ``file:line``. ``note``: what is wrong there, with secrets and
    personal data masked."""

    source: str
    note: str = ""


@dataclass(frozen=True, slots=True)
class Finding:
    """``rule``: dimension, dot, name (``duplicates.exact``). ``what``: one sentence. ``rows``: the clearest
    examples first.

    count: affected rows, of ``of`` rows examined. value: what was measured, if it is not the share of rows.
    threshold: the bar in words (``> 2.5 bits``), or None if the number is only reported."""

    rule: str
    severity: Severity
    what: str
    count: int = 0
    of: int = 0
    value: float | None = None
    threshold: str | None = None
    rows: tuple[FindingRow, ...] = ()
    hint: str = ""
    of_set: bool = False  # it is about the set: its rows are examples, not at fault
    accepted: Severity | None = None  # what it was before `AuditSpec.accept` made it a note

    @property
    def share(self) -> float:
        return self.count / self.of if self.of else 0.0

    @property
    def dimension(self) -> str:
        return self.rule.partition(".")[0]

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "rows": [asdict(row) for row in self.rows], "share": self.share}


FEW = 50
"""With fewer rows the verdict says that they can teach little."""


class Print(NamedTuple):
    """64-bit digests of the normal forms (`views.normal`) of a row's words and prompt, by which rows of two
    audits are compared."""

    source: str
    label: bool | None
    words: int
    prompt: int | None


@dataclass(frozen=True)
class Change:
    """A rule in both audits. ``first`` and ``second``: its finding in each, or None."""

    rule: str
    first: Finding | None
    second: Finding | None


@dataclass(frozen=True)
class AuditComparison:
    """Two audits. Rows are the same if their words are, apart from case, spacing and punctuation. ``shared``:
    rows of the second that the first has too.

    relabelled: of those, rows whose words have another label in the first. prompts: rows of the second whose
    prompt the first has, whatever else they say. only_first, only_second: rows that the other lacks."""

    files: tuple[list[str], list[str]]
    rows: tuple[int, int]
    shared: list[FindingRow]
    relabelled: list[FindingRow]
    prompts: list[FindingRow]
    only_first: list[str]
    only_second: list[str]
    changes: list[Change]

    def to_json(self) -> dict[str, Any]:
        fields = asdict(self)
        fields["changes"] = [
            {"rule": change.rule, "first": _brief(change.first), "second": _brief(change.second)}
            for change in self.changes
        ]
        return fields


def _brief(finding: Finding | None) -> dict[str, Any] | None:
    if finding is None:
        return None
    return {
        key: value
        for key, value in finding.to_json().items()
        if key in ("severity", "what", "count", "share", "value")
    }


class Fixed(NamedTuple):
    """A corrected copy. ``rows`` = written + the total of ``removed``. The counters: rule → steps.
    ``ledger``: JSONL, one line a step."""

    out: Path
    ledger: Path
    rows: int
    written: int
    changed: Counter[str]
    removed: Counter[str]
    left: Counter[str]

    def to_json(self) -> dict[str, Any]:
        return {**self._asdict(), "out": str(self.out), "ledger": str(self.ledger)}

    def told(self) -> str:
        """What was done, in a few lines for a terminal."""
        lines = [
            f"fixed: {self.written:,} of {self.rows:,} rows are in {self.out}, every step in {self.ledger}"
        ]
        for action, rules in (
            ("changed", self.changed),
            ("removed", self.removed),
            ("left as they are", self.left),
        ):
            if rules:
                lines.append(
                    f"  {action}: " + ", ".join(f"{rule} {count:,}" for rule, count in rules.most_common())
                )
        return "\n".join(lines)


@dataclass(frozen=True)
class Audit(NotebookResult):
    """All that was found in ``rows`` rows of ``files`` (path → sha256 of its bytes). ``findings``: most
    severe first.

    quality: source → score from 0 to 100 (`quality.scores`), lowest first. charts: what the page draws
    (`page`). prints: of every row that could be read. seconds: how long it took. compared: with other files,
    if asked. fixed: the corrected copy, if asked."""

    files: dict[str, str]
    rows: int
    findings: list[Finding]
    quality: dict[str, float]
    charts: dict[str, Any] = field(default_factory=dict)
    prints: list[Print] = field(default_factory=list, repr=False)
    seconds: float = 0.0
    compared: AuditComparison | None = None
    fixed: Fixed | None = None

    def of(self, severity: Severity) -> list[Finding]:
        return [finding for finding in self.findings if finding.severity == severity]

    @property
    def verdict(self) -> str:
        """One sentence: whether the rows are fit to train on, and the most severe finding."""
        if not self.rows:
            return "There are no rows."
        errors, warnings = self.of("error"), self.of("warning")
        if errors:
            rest = f" and {len(warnings)} warning{'s' * (len(warnings) != 1)}" if warnings else ""
            return (
                f"Do not train on this yet: {len(errors)} error{'s' * (len(errors) != 1)}{rest}. First: "
                f"{errors[0].what}"
            )
        if warnings:
            many = f"{len(warnings)} warning{'s' * (len(warnings) != 1)}"
            return f"Fit to train on, with {many} to look at. First: {warnings[0].what}"
        few = f", though {counted(self.rows)} can teach little" if self.rows < FEW else ""
        return f"Fit to train on: nothing stands in the way{few}."

    def to_json(self) -> dict[str, Any]:
        """Everything but the charts, for machines."""
        return {
            "verdict": self.verdict,
            "files": self.files,
            "rows": self.rows,
            "findings": [finding.to_json() for finding in self.findings],
            "quality": self.quality,
            "seconds": round(self.seconds, 3),
            **({"compared": self.compared.to_json()} if self.compared else {}),
            **({"fixed": self.fixed.to_json()} if self.fixed else {}),
        }


def counted(count: int, of: int = 0) -> str:
    """``1 row``, ``1,200 rows (12.0%)``."""
    return f"{count:,} row{'s' * (count != 1)}" + (f" ({count / of:.1%})" if of else "")


def gravest_first(findings: Iterable[Finding]) -> list[Finding]:
    """By severity, then by the number of affected rows; otherwise in the order given."""
    return sorted(findings, key=lambda finding: (SEVERITIES.index(finding.severity), -finding.count))
