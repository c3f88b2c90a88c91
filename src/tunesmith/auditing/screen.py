"""An audit in one screen of a terminal: verdict, every dimension beside its bar, the findings with what to
do, the worst rows.

What does not fit is counted; the page and the JSON have everything. `page` uses the short forms of findings
from here."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import NamedTuple

from rich.console import Console, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from tunesmith.auditing.findings import SEVERITIES, Audit, Finding, Severity
from tunesmith.auditing.registry import Rule, rules
from tunesmith.display.console import duration
from tunesmith.display.text import many, percent, visible

LINES = 45
"""Lines of the screen. At least `FEWEST` findings are shown, however many lines they take."""
FEWEST = 3
SIGNS: dict[Severity, str] = {"error": "✗", "warning": "!", "note": "i", "good": "✓"}
COLOURS: dict[Severity, str] = {"error": "red", "warning": "yellow", "note": "cyan", "good": "green"}
SPARKS = "▁▂▃▄▅▆▇█"


class Dimension(NamedTuple):
    """``findings``: most severe first. ``severity``: of the first, or None if there are none. ``rule``: None
    if no rule is registered under this name."""

    name: str
    severity: Severity | None
    findings: list[Finding]
    rule: Rule | None

    def meaning(self, finding: Finding) -> str:
        return self.rule.meaning(finding) if self.rule else ""


class Worst(NamedTuple):
    source: str
    score: float
    why: list[str]
    text: str


def dimensions(audit: Audit) -> list[Dimension]:
    """All dimensions in the order of the rules, those without a finding too; then those that no rule has."""
    known = {rule.name: rule for rule in rules()}
    by_dimension: dict[str, list[Finding]] = {name: [] for name in known}
    for finding in sorted(audit.findings, key=lambda finding: SEVERITIES.index(finding.severity)):
        by_dimension.setdefault(finding.dimension, []).append(finding)
    return [
        Dimension(name, findings[0].severity if findings else None, findings, known.get(name))
        for name, findings in by_dimension.items()
    ]


def gravest(audit: Audit) -> Severity:
    """The highest severity of all findings; good if there are none."""
    for severity in SEVERITIES:
        if audit.of(severity):
            return severity
    return "good"


def worst(audit: Audit, limit: int) -> list[Worst]:
    """The ``limit`` worst rows."""
    if "worst" in audit.charts:
        return [
            Worst(row["source"], row["score"], row["why"], row["text"])
            for row in audit.charts["worst"][:limit]
        ]
    return [Worst(source, score, [], "") for source, score in list(audit.quality.items())[:limit]]


def binned(scores: Iterable[float], bins: int) -> list[int]:
    """How many scores from 0 to 100 are in each of ``bins`` bins of one width; 100 is in the last."""
    counts = [0] * bins
    for score in scores:
        counts[min(max(int(score * bins / 100), 0), bins - 1)] += 1
    return counts


def measured(finding: Finding) -> str:
    """The number to compare with the bar: the value, else the share of rows; "" if neither is known."""
    value = finding.value
    if value is None:
        return percent(finding.share) if finding.of else f"{finding.count:,}" if finding.count else ""
    if "%" in (finding.threshold or ""):
        return percent(value)
    return f"{value:,.4g}" if abs(value) < 1_000 else f"{value:,.0f}"


def concerned(finding: Finding) -> str:
    """``12 of 1,000 rows``; "" if the finding is not about particular rows."""
    if finding.value is not None and not finding.count:
        return ""
    if not finding.of:
        return many(finding.count, "row") if finding.count else ""
    return f"{finding.count:,} of {many(finding.of, 'row')}"


def render(audit: Audit, console: Console) -> None:
    """Print the audit. Without a terminal, and under NO_COLOR, it is plain text: every colour has a sign
    beside it."""
    styles = {} if console.no_color else {"bold": "bold", "dim": "dim", **COLOURS}
    head: list[RenderableType] = [
        Text(f"{SIGNS[gravest(audit)]} {visible(audit.verdict, 300)}", styles.get("bold", "")),
        Text(_facts(audit), styles.get("dim", "")),
        Text(""),
        _table(audit, styles),
        Text(""),
    ]
    foot = _foot(audit, styles)
    left = LINES - sum(_height(part, console) for part in [*head, *foot])
    for part in [*head, *_fitting(audit, console, left, styles), *foot]:
        console.print(part, overflow="fold")


def _height(part: RenderableType, console: Console) -> int:
    return len(console.render_lines(part, console.options.update(overflow="fold"), pad=False))


def _facts(audit: Audit) -> str:
    names = [visible(path, 60) for path in audit.files]
    more = [f"{len(names) - 2:,} more"] if len(names) > 2 else []
    facts = [many(audit.rows, "row"), ", ".join(names[:2] + more), duration(audit.seconds)]
    return " · ".join(filter(None, facts))


def _table(audit: Audit, styles: Mapping[str, str]) -> Table:
    table = Table(
        box=None, padding=(0, 2, 0, 0), header_style=styles.get("bold", ""), pad_edge=False, expand=True
    )
    for name, wide in (("", 9), ("dimension", 13)):
        table.add_column(name, no_wrap=True, overflow="ellipsis", width=wide)
    for name, ratio in (("measured", 3), ("bar", 2)):
        table.add_column(name, no_wrap=True, overflow="ellipsis", ratio=ratio)
    for name, severity, findings, _ in dimensions(audit):
        findings = sorted(
            findings, key=lambda finding: finding.threshold is None
        )  # so that bars stand in the order of what they are for
        shown = " · ".join(
            f"{finding.rule.partition('.')[2] or finding.rule} {measured(finding)}".rstrip()
            for finding in findings
        )
        bars = " · ".join(dict.fromkeys(finding.threshold for finding in findings if finding.threshold))
        sign = Text(f"{SIGNS[severity]} {severity}" if severity else "·", styles.get(severity or "dim", ""))
        table.add_row(
            sign, Text(visible(name, 40)), Text(visible(shown or "no finding", 300)), Text(visible(bars, 120))
        )
    return table


def _fitting(audit: Audit, console: Console, lines: int, styles: Mapping[str, str]) -> list[RenderableType]:
    """Errors and warnings, most severe first, as many as fit into ``lines``; then how many more there are."""
    grave = [*audit.of("error"), *audit.of("warning")]
    whole = _places(audit)
    blocks: list[RenderableType] = []
    for finding in grave:
        block = _block(finding, styles, whole)
        lines -= _height(block, console)
        if lines < 2 and len(blocks) >= FEWEST:  # one line for what is left out, one to set it apart
            break
        blocks.append(block)
    hidden = grave[len(blocks) :]
    counts = [
        (sum(finding_hidden.severity == kind for finding_hidden in hidden), f"more {kind}")
        for kind in ("error", "warning")
    ]
    if hidden:
        counted = " and ".join(many(count, kind) for count, kind in counts if count)
        blocks.append(Text(f"… {counted}: see --html or --json", styles.get("bold", "")))
    return [*blocks, Text("")] if blocks else []


def _block(finding: Finding, styles: Mapping[str, str], short: Callable[[Sequence[str]], str]) -> Table:
    block = Table.grid(padding=(0, 1, 0, 0))
    block.add_column(width=9, overflow="fold")
    block.add_column(overflow="fold", ratio=1)
    body = Text(visible(finding.what, 300))
    if finding.hint:
        body.append(f"\n→ {visible(finding.hint, 240)}")
    share = percent(finding.share) if finding.of and concerned(finding) else ""
    known = [
        visible(finding.rule, 60),
        concerned(finding),
        share,
        short([row.source for row in finding.rows[:3]]),
    ]
    body.append("\n" + " · ".join(filter(None, known)), styles.get("dim", ""))
    block.add_row(
        Text(f"{SIGNS[finding.severity]} {finding.severity}", styles.get(finding.severity, "")), body
    )
    return block


def placed(source: str) -> tuple[str, str]:
    """The file, and ``line`` or ``line:column``, or "" if ``source`` has neither."""
    match = re.fullmatch(r"(.*?):(\d+(?::\d+)?)", source, re.DOTALL)
    return (match[1], match[2]) if match else (source, "")


def _places(audit: Audit) -> Callable[[Sequence[str]], str]:
    """Writes sources as ``a.jsonl:3, :8, b.jsonl:1``: no folder where the name is enough, no file twice in a
    row."""
    names = Counter(Path(path).name for path in audit.files)

    def told(sources: Sequence[str]) -> str:
        shown, before = [], None
        for source in sources:
            path, line = placed(source)
            name = Path(path).name if names[Path(path).name] < 2 else path
            shown.append(
                f":{line}"
                if line and path == before
                else visible(f"{name[-60:]}{':' * bool(line)}{line}", 120)
            )
            before = path
        return ", ".join(shown)

    return told


def _foot(audit: Audit, styles: Mapping[str, str]) -> list[RenderableType]:
    parts_shown: list[RenderableType] = []
    short, low = _places(audit), worst(audit, 3)
    if audit.quality:
        counts = binned(audit.quality.values(), 10)
        bars = "".join(
            SPARKS[-(-count * (len(SPARKS) - 1) // max(counts))] if count else "·" for count in counts
        )
        parts_shown.append(
            Text(
                f"quality   0 {bars} 100, median {median(audit.quality.values()):.0f}"
                + "; worst rows:" * bool(low)
            )
        )
    for row in low:
        parts = [
            f"{row.score:>3.0f}  {short([row.source])}",
            visible(", ".join(row.why), 100),
            visible(row.text, 100),
        ]
        line = Text(" · ".join(filter(None, parts)), no_wrap=True, overflow="ellipsis")
        parts_shown.append(Padding(line, (0, 0, 0, 10), expand=False))
    notes = audit.of("note")
    accepted = sum(note.accepted is not None for note in notes)
    more = [many(len(notes), "note") + (f" ({accepted} accepted)" if accepted else "")] if notes else []
    more += [f"{many(met, 'bar')} met"] if (met := len(audit.of("good"))) else []
    return (
        [*parts_shown, Text(f"{' and '.join(more)}: see --html or --json", styles.get("dim", ""))]
        if more
        else parts_shown
    )
